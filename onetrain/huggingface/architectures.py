"""The architectures of transformers that model.py computes, a row each."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onetrain.config import UserError

if TYPE_CHECKING:
    from onetrain.model_config import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """One model_type of transformers, and what it takes where a config.json is silent.

    name: of its classes; theta: of RoPE, None without; rotary_pct: share of a head that is rotated;
    norm_eps: of its norm; window: sliding_window.
    """

    name: str
    theta: float | None = 10000.0
    rotary_pct: float = 1.0
    norm_eps: float = 1e-6
    window: int | None = None


ARCHITECTURES = {
    'gpt2': Architecture('GPT2', theta=None, norm_eps=1e-5),
    'llama': Architecture('Llama'),
    'mistral': Architecture('Mistral', window=4096),
    'qwen3': Architecture('Qwen3'),
    'gpt_neox': Architecture('GPTNeoX', rotary_pct=0.25, norm_eps=1e-5),
    'mixtral': Architecture('Mixtral', theta=1e6, norm_eps=1e-5),
    'qwen3_moe': Architecture('Qwen3Moe'),
    'gpt_oss': Architecture('GptOss', theta=150000.0, norm_eps=1e-5, window=128),
    'glm4_moe': Architecture('Glm4Moe', rotary_pct=0.5, norm_eps=1e-5),
}
ACTIVATIONS = {
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu': 'gelu',
    'silu': 'silu',
    'relu': 'relu',
}


def architecture_of(config: 'ModelConfig') -> str:
    """Return the Hugging Face architecture (a key of ARCHITECTURES) that computes what `config`
    does.

    Raises UserError, naming the switches in the way, where there is none.
    """
    have = dataclasses.asdict(config)
    have['windows'] = (
        'none' if not config.sliding_window else 'all' if None not in config.windows else 'some'
    )
    have['shared'], have['groups'] = (
        config.num_shared_experts > 0,
        config.topk_groups < config.n_groups,
    )
    wanted = _switches(config, have['windows'])
    routes = ('mixtral', 'qwen3_moe', 'gpt_oss', 'glm4_moe')
    names = {'windows': 'window_pattern', 'shared': 'num_shared_experts', 'groups': 'topk_groups'}
    in_the_way = {
        kind: [
            f'{names.get(key, key)}={getattr(config, names.get(key, key))!r}'
            for key, value in switches.items()
            if have[key] != value
            and not (
                kind == 'gpt2'
                and key == 'normalization'
                and config.normalization == 'layernorm_nobias'
            )
        ]
        for kind, switches in wanted.items()
        if (kind in routes) == (config.num_experts > 0)
    }
    kind = min(in_the_way, key=lambda k: len(in_the_way[k]))
    if in_the_way[kind]:
        raise UserError(
            f'no Hugging Face architecture computes this model; nearest is {kind}, in the way are'
            f' {", ".join(in_the_way[kind])}'
        )
    if config.activation not in ACTIVATIONS.values():
        raise UserError(
            f'no Hugging Face architecture computes this model: activation={config.activation!r}'
        )
    return kind


def _switches(config, windows):
    """Return {model_type: {key: value that a model must have to be of it}}. windows: 'none', 'all'
    or 'some' of the layers of `config` have a sliding window.
    """
    common = dict(norm_position='pre', attention_sinks=False, num_experts=0, windows='none')
    layernorm = dict(
        common,
        normalization='layernorm',
        ffn_type='standard',
        qk_norm=False,
        num_key_value_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
    )
    llama = dict(
        common,
        normalization='rmsnorm',
        ffn_type='swiglu',
        position_encoding='rope',
        rotary_pct=1.0,
        parallel_residual=False,
        bias=False,
        qk_norm=False,
    )
    routed = _without(llama, 'num_experts')
    softmax = dict(routed, score_function='softmax', shared=False, groups=False, route_scale=1.0)
    everywhere = dict(norm_topk_prob=True, n_dense_layers=0)  # experts in all layers
    return {
        'gpt2': dict(layernorm, position_encoding='learned_absolute', parallel_residual=False),
        'llama': _without(llama, 'bias'),
        'mistral': dict(llama, windows='all'),
        'qwen3': _without(dict(llama, qk_norm=True), 'windows'),
        'gpt_neox': dict(layernorm, position_encoding='rope', bias=True),
        'mixtral': dict(softmax, **everywhere)
        | dict(windows='none' if windows == 'none' else 'all'),
        'qwen3_moe': dict(softmax, qk_norm=True),
        'gpt_oss': _without(softmax, 'windows')
        | everywhere
        | dict(bias=True, ffn_type='swiglu_clamped', attention_sinks=True),
        'glm4_moe': _without(routed, 'rotary_pct', 'qk_norm')
        | dict(score_function='sigmoid', shared=True),
    }


def _without(switches, *keys):
    return {key: value for key, value in switches.items() if key not in keys}
