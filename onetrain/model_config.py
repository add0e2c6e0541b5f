"""The shape of a model: its switches, the families that are settings of them, and which settings
cannot be built.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any

from onetrain.config import UserError, a_type, shortened
from onetrain.ops.rope import SCALINGS

# A preset only fills what the user left open. d_ff is d_ff_ratio * n_embd, rounded up to a multiple
# of d_ff_multiple.
_GPT2 = dict(
    vocab_size=50304,
    bias=False,
    normalization='layernorm',
    norm_eps=1e-5,
    norm_position='pre',
    activation='gelu_tanh',
    ffn_type='standard',
    d_ff_ratio=4,
    d_ff_multiple=1,
    position_encoding='learned_absolute',
    rope_theta=10000.0,
    rotary_pct=1.0,
    qk_norm=False,
    parallel_residual=False,
    weight_tying=True,
    rope_scaling='none',
    rope_beta_fast=32.0,
    rope_beta_slow=1.0,
    rope_truncate=False,
    rope_low_freq_factor=1.0,
    rope_high_freq_factor=4.0,
    sliding_window=0,
    window_pattern='S',
    attention_sinks=False,
    num_experts=0,
    num_experts_per_tok=2,
    num_shared_experts=0,
    n_dense_layers=0,
    score_function='softmax',
    n_groups=1,
    topk_groups=1,
    norm_topk_prob=True,
    route_scale=1.0,
)
_LLAMA = dict(
    _GPT2,
    vocab_size=32000,
    normalization='rmsnorm',
    activation='silu',
    ffn_type='swiglu',
    d_ff_ratio=8 / 3,
    d_ff_multiple=256,
    position_encoding='rope',
    weight_tying=False,
)
PRESETS = {
    'gpt2': _GPT2,
    'llama': _LLAMA,
    'llama3': dict(_LLAMA, vocab_size=128256, rope_theta=500000.0, d_ff_ratio=3.5, d_ff_multiple=1),
    'qwen3': dict(
        _LLAMA,
        vocab_size=151936,
        rope_theta=1000000.0,
        d_ff_ratio=3,
        d_ff_multiple=1,
        norm_eps=1e-6,
        qk_norm=True,
    ),
    'neox': dict(
        _GPT2,
        vocab_size=50257,
        bias=True,
        activation='gelu',
        position_encoding='rope',
        rotary_pct=0.25,
        parallel_residual=True,
        weight_tying=False,
    ),
    'moe': dict(
        _LLAMA, vocab_size=49152, num_experts=8, num_shared_experts=1, score_function='sigmoid'
    ),
    'mixtral': dict(_LLAMA, rope_theta=1000000.0, d_ff_ratio=3.5, d_ff_multiple=1, num_experts=8),
    'qwen3_moe': dict(
        _LLAMA,
        vocab_size=151936,
        rope_theta=1000000.0,
        d_ff_ratio=3,
        d_ff_multiple=1,
        norm_eps=1e-6,
        qk_norm=True,
        num_experts=128,
        num_experts_per_tok=8,
    ),
    'deepseek': dict(
        _LLAMA,
        vocab_size=129280,
        norm_eps=1e-6,
        num_experts=256,
        num_experts_per_tok=8,
        num_shared_experts=1,
        n_dense_layers=3,
        score_function='sigmoid',
        n_groups=8,
        topk_groups=4,
        route_scale=2.5,
    ),
    'gpt_oss': dict(
        _LLAMA,
        vocab_size=201088,
        rope_theta=150000.0,
        d_ff_ratio=1,
        d_ff_multiple=1,
        bias=True,
        ffn_type='swiglu_clamped',
        num_experts=32,
        num_experts_per_tok=4,
        attention_sinks=True,
        sliding_window=128,
        window_pattern='SL',
        rope_scaling='yarn',
        rope_factor=32.0,
        rope_original_block_size=4096,
    ),
    'custom': _GPT2,
}


ROUTING = (
    'num_experts',
    'num_experts_per_tok',
    'num_shared_experts',
    'expert_d_ff',
    'n_dense_layers',
    'score_function',
    'n_groups',
    'topk_groups',
    'norm_topk_prob',
    'route_scale',
)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model: every switch decided. The names are the trainer's keys."""

    n_layer: int
    n_head: int
    num_key_value_heads: int
    n_embd: int
    head_dim: int
    d_ff: int
    block_size: int
    vocab_size: int
    bias: bool
    normalization: str  # 'layernorm' | 'layernorm_nobias' | 'rmsnorm'
    norm_eps: float
    norm_position: str  # 'pre' | 'post'
    activation: str
    ffn_type: str  # 'standard' | 'swiglu' | 'swiglu_clamped'
    position_encoding: str  # 'learned_absolute' | 'rope' | 'none'
    rope_theta: float
    rotary_pct: float  # share of each head that RoPE turns
    qk_norm: bool  # RMSNorm on each head of q and k
    parallel_residual: bool
    weight_tying: bool
    rope_scaling: str  # 'none' | one of rope.SCALINGS
    rope_factor: float
    rope_original_block_size: int  # block_size before the scaling
    rope_attention_factor: float | None  # of yarn; None: from rope_factor
    rope_beta_fast: float
    rope_beta_slow: float
    rope_truncate: bool
    rope_low_freq_factor: float  # of llama3
    rope_high_freq_factor: float
    sliding_window: int  # tokens that a query of an S layer sees, itself included; 0 = all
    # S and L, repeated over the layers: which slide and which look all the way back
    window_pattern: str
    attention_sinks: bool
    num_experts: int  # 0: a dense model
    num_experts_per_tok: int
    num_shared_experts: int  # that every token goes to
    expert_d_ff: int
    n_dense_layers: int  # first layers without experts
    score_function: str  # 'sigmoid' | 'softmax'
    n_groups: int
    topk_groups: int
    norm_topk_prob: bool
    route_scale: float

    @property
    def rotary_dims(self) -> int:
        """Dimensions of each head that RoPE rotates."""
        return int(self.head_dim * self.rotary_pct)

    @property
    def windows(self) -> list:
        """Return the window of each layer, None where it sees everything."""
        return [
            (
                self.sliding_window
                if self.sliding_window and self.window_pattern[i % len(self.window_pattern)] == 'S'
                else None
            )
            for i in range(self.n_layer)
        ]

    @property
    def expert_layers(self):
        """Numbers of the layers with experts."""
        return range(self.n_dense_layers, self.n_layer) if self.num_experts else range(0)

    def describe(self) -> str:
        """Return the short form for logs, such as 18L-16H-2048D-GQA8-RoPE-RMS-SwiGLU-PreNorm."""
        position = {'learned_absolute': 'AbsPos', 'rope': 'RoPE', 'none': 'NoPos'}[
            self.position_encoding
        ]
        norm = 'RMS' if self.normalization == 'rmsnorm' else 'LN'
        ffn = (
            'SwiGLU'
            if self.ffn_type != 'standard'
            else self.activation.upper().replace('_TANH', '')
        )
        parts = [f'{self.n_layer}L-{self.n_head}H-{self.n_embd}D']
        if self.num_key_value_heads != self.n_head:
            parts.append(f'GQA{self.num_key_value_heads}')
        parts += [position, norm, ffn, 'PostNorm' if self.norm_position == 'post' else 'PreNorm']
        if self.parallel_residual:
            parts.append('Parallel')
        if self.num_experts:
            parts.append(
                f'MoE{self.num_experts}top{self.num_experts_per_tok}'
                + (f'+{self.num_shared_experts}' if self.num_shared_experts else '')
            )
        return '-'.join(parts)


_CHOICES = {
    'normalization': ('layernorm', 'layernorm_nobias', 'rmsnorm'),
    'norm_position': ('pre', 'post'),
    'activation': ('gelu', 'gelu_tanh', 'silu', 'relu', 'relu2'),
    'ffn_type': ('standard', 'swiglu', 'swiglu_clamped'),
    'position_encoding': ('learned_absolute', 'rope', 'none'),
    'rope_scaling': ('none', *SCALINGS),
    'score_function': ('sigmoid', 'softmax'),
}
_MOST = {
    'n_layer': 10**4,
    'n_head': 2**16,
    'num_key_value_heads': 2**16,
    'n_embd': 2**20,
    'head_dim': 2**16,
    'd_ff': 2**24,
    'expert_d_ff': 2**24,
    'num_experts': 2**14,
    'num_experts_per_tok': 2**14,
    'num_shared_experts': 2**10,
    'n_dense_layers': 10**4,
    'vocab_size': 2**30,
}
_POSITIVE = (
    'n_layer',
    'n_head',
    'n_embd',
    'block_size',
    'vocab_size',
    'num_key_value_heads',
    'head_dim',
    'd_ff',
    'expert_d_ff',
    'rope_original_block_size',
)


def _check_types(given):
    """Raise UserError for a value (None: left open) that is not of the type of its field in
    ModelConfig, or out of its bounds.

    They may come from the configuration of a checkpoint or of a Hugging Face folder, which anybody
    wrote.
    """
    for name, kind in typing.get_type_hints(ModelConfig).items():
        value = given[name]
        if value is None:
            continue
        kinds = typing.get_args(kind) or (kind,)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = (
            isinstance(value, bool)
            if bool in kinds
            else (
                isinstance(value, str)
                if str in kinds
                else number and (float in kinds or isinstance(value, int))
            )
        )
        if fits and number and not abs(value) < 2**63:  # nan is not
            raise UserError(f'{name}={shortened(value)} must be a number below 2**63')
        if not fits:
            raise UserError(
                f'{name}={shortened(value)} is {a_type(value)}, expected'
                f' {" or ".join(k.__name__ for k in kinds if k is not type(None))}'
            )
        if name in _CHOICES and value not in _CHOICES[name]:
            raise UserError(f'{name}={shortened(value)} is not one of {", ".join(_CHOICES[name])}')
        if name in _POSITIVE and value < 1:
            raise UserError(f'{name}={value} must be at least 1')
        if name in _MOST and value > _MOST[name]:
            raise UserError(f'{name}={value} must be at most {_MOST[name]:,}')


def resolve_shape(settings: dict, vocab_size: int | None = None) -> 'ModelConfig':
    """Return ModelConfig from the trainer's keys, where None means that the preset decides.

    settings: mapping with arch_preset, block_size and the names of ModelConfig; vocab_size: of the
    data set, used when settings leave it open. Raises UserError for a shape that cannot be built.
    """
    name = settings.get('arch_preset')
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f'arch_preset={shortened(name)} is not one of {", ".join(PRESETS)}')
    preset = PRESETS[name]
    given = {field.name: settings.get(field.name) for field in dataclasses.fields(ModelConfig)}
    _check_types(given)
    shape: dict[str, Any] = {
        name: preset.get(name) if value is None else value for name, value in given.items()
    }
    if missing := [
        name for name in ('n_layer', 'n_head', 'n_embd', 'block_size') if shape[name] is None
    ]:
        raise UserError(f'{missing[0]} is not given, and no preset has it')
    if given['vocab_size'] is None and vocab_size is not None:
        shape['vocab_size'] = vocab_size
    if shape['vocab_size'] is None:
        raise UserError('vocab_size is not given, and neither a preset nor a data set has it')
    if (
        given['normalization'] is None
        and shape['normalization'] == 'layernorm'
        and not shape['bias']
    ):
        shape['normalization'] = 'layernorm_nobias'
    if given['n_dense_layers'] is None:
        shape['n_dense_layers'] = min(shape['n_dense_layers'], shape['n_layer'] - 1)
    _fill(shape, preset)
    config = ModelConfig(**shape)
    _check(config)
    _check_scaling(config)
    if config.num_experts:
        _check_experts(config)
    return config


def _fill(shape, preset):
    """Compute the sizes of the dict `shape` that are left open (None) from the others. Raises
    UserError for heads that do not divide.
    """
    n_embd, n_head = shape['n_embd'], shape['n_head']
    if shape['head_dim'] is None:
        if n_embd % n_head:
            close = [h for h in range(1, n_embd + 1) if n_embd % h == 0]
            close = min(close, key=lambda h: abs(h - n_head))
            raise UserError(
                f'n_embd={n_embd} is not divisible by n_head={n_head}: type --n_head={close}, or'
                ' give --head_dim'
            )
        shape['head_dim'] = n_embd // n_head
    if shape['num_key_value_heads'] is None:
        shape['num_key_value_heads'] = n_head
    if n_head % shape['num_key_value_heads']:
        raise UserError(
            f'n_head={n_head} is not a multiple of'
            f' num_key_value_heads={shape["num_key_value_heads"]}'
        )
    if shape['d_ff'] is None:
        multiple = preset['d_ff_multiple']
        shape['d_ff'] = math.ceil(preset['d_ff_ratio'] * n_embd / multiple) * multiple
    if shape['expert_d_ff'] is None:
        shape['expert_d_ff'] = shape['d_ff']
    if shape['rope_original_block_size'] is None:
        shape['rope_original_block_size'] = shape['block_size']
    if shape['rope_factor'] is None:
        shape['rope_factor'] = max(1.0, shape['block_size'] / shape['rope_original_block_size'])


def _check(c):
    """Raise UserError for a ModelConfig that cannot be built."""
    if not 0 < c.rotary_pct <= 1 or not 1 < c.rope_theta <= 1e15 or not 0 <= c.norm_eps <= 1:
        raise UserError(
            f'rotary_pct={c.rotary_pct} must be above 0 and at most 1,'
            f' rope_theta={c.rope_theta} above 1, norm_eps={c.norm_eps} from 0 to 1'
        )
    if c.position_encoding == 'rope' and (c.rotary_dims % 2 or c.rotary_dims < 2):
        raise UserError(
            f'RoPE turns pairs of dimensions, but head_dim={c.head_dim} with'
            f' rotary_pct={c.rotary_pct} gives {c.rotary_dims} of them: choose an even'
            ' number'
        )
    if c.parallel_residual and c.norm_position == 'post':
        raise UserError("parallel_residual=True needs norm_position='pre'")
    if c.ffn_type == 'swiglu_clamped' and c.activation != 'silu':
        raise UserError(
            'ffn_type=swiglu_clamped has an activation of its own: leave'
            f' --activation={c.activation} out'
        )
    if c.sliding_window < 0 or set(c.window_pattern) - {'S', 'L'} or not c.window_pattern:
        raise UserError(
            f'sliding_window={c.sliding_window} must not be negative,'
            f' window_pattern={c.window_pattern!r} is of the letters S (slides) and L (looks'
            ' all the way back), such as SSSL'
        )


def _check_scaling(c):
    if c.rope_scaling == 'none':
        return
    if c.position_encoding != 'rope':
        raise UserError(
            f'rope_scaling={c.rope_scaling} needs position_encoding=rope, not {c.position_encoding}'
        )
    if not 1 <= c.rope_factor <= 1e6 or c.rope_scaling == 'dynamic' and c.rotary_dims <= 2:
        raise UserError(
            f'rope_factor={c.rope_factor} must be from 1 to 1e6: type the number of times that the'
            ' context became longer'
        )
    if (
        c.rope_scaling == 'llama3'
        and not 0 < c.rope_low_freq_factor < c.rope_high_freq_factor
        or c.rope_scaling == 'yarn'
        and not 0 < c.rope_beta_slow < c.rope_beta_fast < 1e6
    ):
        raise UserError(
            'rope_scaling: rope_low_freq_factor must be below rope_high_freq_factor, rope_beta_slow'
            ' below rope_beta_fast, all above 0'
        )


def _check_experts(c):
    if not 1 <= c.num_experts_per_tok <= c.num_experts:
        raise UserError(
            f'num_experts_per_tok={c.num_experts_per_tok} must be at least 1 and at most'
            f' num_experts={c.num_experts}'
        )
    if not 1 <= c.topk_groups <= c.n_groups or c.num_experts % c.n_groups:
        raise UserError(
            f'num_experts={c.num_experts} must be a multiple of n_groups={c.n_groups}, and'
            f' topk_groups={c.topk_groups} from 1 to n_groups'
        )
    within = c.topk_groups * c.num_experts // c.n_groups
    if c.num_experts_per_tok > within:
        raise UserError(
            f'num_experts_per_tok={c.num_experts_per_tok} is more than the {within} experts of'
            f' topk_groups={c.topk_groups} groups of {c.num_experts // c.n_groups}'
        )
    if c.num_shared_experts < 0 or not 0 <= c.n_dense_layers <= c.n_layer or c.route_scale <= 0:
        raise UserError(
            f'num_shared_experts={c.num_shared_experts} must not be negative,'
            f' n_dense_layers={c.n_dense_layers} from 0 to n_layer={c.n_layer},'
            f' route_scale={c.route_scale} above 0'
        )
