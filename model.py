"""One decoder. GPT-2, LLaMA-2, LLaMA-3, Qwen3 and GPT-NeoX are presets of its switches.

    sequential block (norm_position='pre')        parallel_residual=True (GPT-NeoX)

      x ──┬── norm ── attention ──(+)──┬── norm ── mlp ──(+)──     x ──┬── norm ── attention ──(+)──
          └────────────────────────┘   └──────────────────┘            ├── norm ── mlp ─────────┤
                                                                       └────────────────────────┘

norm_position='post' puts each norm behind its sum instead: x = norm(x + f(x)).
Parameter names are nanoGPT's (transformer.h.0.attn.c_attn.weight, ...).
"""
import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, CheckpointPolicy

from engine import parallel
from engine.attention import DEAR, attention
from engine.configurator import ConfigError
from engine.loader import mix
from engine.loss import next_token_loss

ACTIVATIONS = {
    'gelu': F.gelu,  # exact, with erf: nanoGPT and GPT-NeoX
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),  # the approximation that GPT-2 was trained with
    'silu': F.silu,
    'relu': F.relu,
    'relu2': lambda x: F.relu(x).square(),
}

# A preset only fills what the user left open. d_ff is d_ff_ratio * n_embd, rounded up to a multiple of d_ff_multiple.
_GPT2 = dict(vocab_size=50304, bias=False, normalization='layernorm', norm_eps=1e-5, norm_position='pre', activation='gelu_tanh',
             ffn_type='standard', d_ff_ratio=4, d_ff_multiple=1, position_encoding='learned_absolute', rope_theta=10000.0, rotary_pct=1.0,
             qk_norm=False, parallel_residual=False, weight_tying=True)
_LLAMA = dict(_GPT2, vocab_size=32000, normalization='rmsnorm', activation='silu', ffn_type='swiglu', d_ff_ratio=8 / 3, d_ff_multiple=256,
              position_encoding='rope', weight_tying=False)
PRESETS = {
    'gpt2': _GPT2,
    'llama': _LLAMA,
    'llama3': dict(_LLAMA, vocab_size=128256, rope_theta=500000.0, d_ff_ratio=3.5, d_ff_multiple=1),
    'qwen3': dict(_LLAMA, vocab_size=151936, rope_theta=1000000.0, d_ff_ratio=3, d_ff_multiple=1, norm_eps=1e-6, qk_norm=True),
    'neox': dict(_GPT2, vocab_size=50257, bias=True, activation='gelu', position_encoding='rope', rotary_pct=0.25,
                 parallel_residual=True, weight_tying=False),
    'custom': _GPT2,
}


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
    ffn_type: str  # 'standard' | 'swiglu'
    position_encoding: str  # 'learned_absolute' | 'rope' | 'none'
    rope_theta: float
    rotary_pct: float  # share of each head that RoPE turns
    qk_norm: bool  # RMSNorm on each head of q and k
    parallel_residual: bool
    weight_tying: bool

    @property
    def rotary_dims(self):
        return int(self.head_dim * self.rotary_pct)

    def describe(self):
        """Short form for logs, such as 18L-16H-2048D-GQA8-RoPE-RMS-SwiGLU-PreNorm."""
        position = {'learned_absolute': 'AbsPos', 'rope': 'RoPE', 'none': 'NoPos'}[self.position_encoding]
        norm = 'RMS' if self.normalization == 'rmsnorm' else 'LN'
        ffn = 'SwiGLU' if self.ffn_type == 'swiglu' else self.activation.upper().replace('_TANH', '')
        parts = [f'{self.n_layer}L-{self.n_head}H-{self.n_embd}D']
        if self.num_key_value_heads != self.n_head:
            parts.append(f'GQA{self.num_key_value_heads}')
        parts += [position, norm, ffn, 'PostNorm' if self.norm_position == 'post' else 'PreNorm']
        if self.parallel_residual:
            parts.append('Parallel')
        return '-'.join(parts)


def resolve_shape(settings, vocab_size=None):
    """ModelConfig from the trainer's keys, where None means that the preset decides.

    settings: mapping with arch_preset, block_size and the names of ModelConfig; vocab_size: of the data set, used when
    settings leave it open. Raises ConfigError for a shape that cannot be built.
    """
    preset = PRESETS.get(settings['arch_preset'])
    if preset is None:
        raise ConfigError(f"arch_preset={settings['arch_preset']!r} is not one of {', '.join(PRESETS)}")
    given = {field.name: settings.get(field.name) for field in dataclasses.fields(ModelConfig)}
    shape = {name: preset.get(name) if value is None else value for name, value in given.items()}
    if given['vocab_size'] is None and vocab_size is not None:
        shape['vocab_size'] = vocab_size
    if given['normalization'] is None and shape['normalization'] == 'layernorm' and not shape['bias']:
        shape['normalization'] = 'layernorm_nobias'
    for name in ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size', 'num_key_value_heads', 'head_dim', 'd_ff'):
        if shape[name] is not None and shape[name] < 1:
            raise ConfigError(f'{name}={shape[name]} must be at least 1')
    n_embd, n_head = shape['n_embd'], shape['n_head']
    if shape['head_dim'] is None:
        if n_embd % n_head:
            close = [h for h in range(1, n_embd + 1) if n_embd % h == 0]
            close = min(close, key=lambda h: abs(h - n_head))
            raise ConfigError(f'n_embd={n_embd} is not divisible by n_head={n_head}: type --n_head={close}, or give --head_dim')
        shape['head_dim'] = n_embd // n_head
    if shape['num_key_value_heads'] is None:
        shape['num_key_value_heads'] = n_head
    if n_head % shape['num_key_value_heads']:
        raise ConfigError(f"n_head={n_head} is not a multiple of num_key_value_heads={shape['num_key_value_heads']}")
    if shape['d_ff'] is None:
        multiple = preset['d_ff_multiple']
        shape['d_ff'] = math.ceil(preset['d_ff_ratio'] * n_embd / multiple) * multiple
    config = ModelConfig(**shape)
    if not 0 < config.rotary_pct <= 1 or config.rope_theta <= 0 or config.norm_eps < 0:
        raise ConfigError(f'rotary_pct={config.rotary_pct} must be above 0 and at most 1, rope_theta={config.rope_theta} above 0, '
                          f'norm_eps={config.norm_eps} not negative')
    if config.position_encoding == 'rope' and (config.rotary_dims % 2 or config.rotary_dims < 2):
        raise ConfigError(f'RoPE turns pairs of dimensions, but head_dim={config.head_dim} with rotary_pct={config.rotary_pct} gives '
                          f'{config.rotary_dims} of them: choose an even number')
    if config.parallel_residual and config.norm_position == 'post':
        raise ConfigError("parallel_residual=True needs norm_position='pre'")
    return config


class Norm(nn.Module):
    """LayerNorm with or without bias, or RMSNorm, over the last dimension."""

    def __init__(self, size, kind, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if kind == 'layernorm' else None
        self.rms, self.eps = kind == 'rmsnorm', eps

    def forward(self, x):
        weight, bias = (p if p is None else p.to(x.dtype) for p in (self.weight, self.bias))  # FSDP gathers them in bf16; kernels want one dtype
        if self.rms:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def rope_table(config):
    """(cos, sin), each (block_size, rotary_dims / 2) fp32, of the angles t * theta^(-2i/d) (Su et al., 2021)."""
    d = config.rotary_dims
    frequencies = config.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
    angles = torch.outer(torch.arange(config.block_size, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Turn the first 2 * cos.size(-1) dimensions of each head, halves paired (i, i + d/2) as in Hugging Face models.

    x: (B, heads, T, head_dim); cos, sin: (T, d/2). Computed in fp32, returned in x's dtype.
    """
    half = cos.size(-1)
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)


class Attention(nn.Module):
    def __init__(self, config, backend, dropout):
        super().__init__()
        self.heads = (config.n_head, config.num_key_value_heads, config.num_key_value_heads)
        self.head_dim = config.head_dim
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * config.head_dim, bias=config.bias)  # q, k, v in one matmul
        self.c_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = Norm(config.head_dim, 'rmsnorm', config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, 'rmsnorm', config.norm_eps) if config.qk_norm else None
        self.backend, self.dropout = backend, dropout

    def forward(self, x, rope, ring):
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).view(B, T, sum(self.heads), self.head_dim).split(self.heads, dim=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        y = attention(q, k, v, self.backend, self.dropout if self.training else 0.0, ring)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, -1))
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


class MLP(nn.Module):
    def __init__(self, config, dropout):
        super().__init__()
        self.gated = config.ffn_type == 'swiglu'
        self.c_fc = nn.Linear(config.n_embd, config.d_ff * (2 if self.gated else 1), bias=config.bias)  # gated: gate, then up
        self.c_proj = nn.Linear(config.d_ff, config.n_embd, bias=config.bias)
        self.activation, self.dropout = ACTIVATIONS[config.activation], dropout

    def forward(self, x):
        x = self.c_fc(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            x = self.activation(gate) * up
        else:
            x = self.activation(x)
        x = self.c_proj(x)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Block(nn.Module):
    def __init__(self, config, backend, dropout):
        super().__init__()
        self.ln_1 = Norm(config.n_embd, config.normalization, config.norm_eps)
        self.attn = Attention(config, backend, dropout)
        self.ln_2 = Norm(config.n_embd, config.normalization, config.norm_eps)
        self.mlp = MLP(config, dropout)
        self.post, self.parallel = config.norm_position == 'post', config.parallel_residual
        self.activation_checkpointing = 'none'

    def forward(self, x, rope, ring=None):
        if self.activation_checkpointing == 'none' or not torch.is_grad_enabled():
            return self._forward(x, rope, ring)
        keep = {'context_fn': _keep_matmuls} if self.activation_checkpointing == 'selective' else {}
        return checkpoint(self._forward, x, rope, ring, use_reentrant=False, preserve_rng_state=self.mlp.dropout > 0, **keep)

    def _forward(self, x, rope, ring):
        if self.parallel:
            return x + self.attn(self.ln_1(x), rope, ring) + self.mlp(self.ln_2(x))
        if self.post:
            x = self.ln_1(x + self.attn(x, rope, ring))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), rope, ring)
        return x + self.mlp(self.ln_2(x))


def _keep_matmuls():
    """Contexts of a forward pass and its repetition in which outputs of matmuls and of attention are kept, and all else is computed again."""
    kept = {'aten::mm', 'aten::addmm', *DEAR}
    return create_selective_checkpoint_contexts(
        lambda ctx, operator, *args, **kwargs: CheckpointPolicy.MUST_SAVE if operator.name() in kept else CheckpointPolicy.PREFER_RECOMPUTE)


class Head(nn.Linear):
    """From the last hidden state to logits, or straight to the loss."""

    def forward(self, x, targets=None, reduction='mean'):
        return super().forward(x) if targets is None else next_token_loss(x, self.weight, targets, reduction)


class Model(nn.Module):
    """A decoder-only language model.

    config: ModelConfig; backend: what engine.attention.choose_backend returned; dropout: probability; activation_checkpointing: what backward()
    finds kept of each block: 'none' all of it, 'selective' outputs of matmuls and attention, 'full' only its input; ring: engine.ring.Ring of the
    ranks that share a sequence, or None. Parameters mean nothing until init_weights() or a state dict fills them. It can be built on the meta
    device to be counted.
    """

    def __init__(self, config, backend='sdpa', dropout=0.0, activation_checkpointing='none', ring=None):
        super().__init__()
        self.config, self.dropout, self.ring = config, dropout, ring
        parts = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        if config.position_encoding == 'learned_absolute':
            parts['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        parts['h'] = nn.ModuleList([Block(config, backend, dropout) for _ in range(config.n_layer)])
        parts['ln_f'] = Norm(config.n_embd, config.normalization, config.norm_eps)
        self.transformer = nn.ModuleDict(parts)
        for block in parts['h']:
            block.activation_checkpointing = activation_checkpointing
        self.lm_head = Head(config.n_embd, config.vocab_size, bias=False)
        if config.weight_tying:
            self.lm_head.weight = self.transformer.wte.weight
        self.rope = config.position_encoding == 'rope'
        if self.rope:
            for name, table in zip(('rope_cos', 'rope_sin'), rope_table(config)):
                self.register_buffer(name, table, persistent=False)

    @classmethod
    def on_meta(cls, *args, **kwargs):
        """A model that has shapes and no memory: to be split over ranks before allocate()."""
        with torch.device('meta'):
            return cls(*args, **kwargs)

    def allocate(self, device, tables_on=None):
        """Give a model on the meta device memory on `device`: parameters that hold nothing yet, without the work of torch's own initialisation. Returns it.

        tables_on: device of the RoPE tables where it is another.
        """
        self.to_empty(device=device)
        if self.config.weight_tying:  # to_empty gives every module a tensor of its own
            self.lm_head.weight = self.transformer.wte.weight
        if self.rope:
            for name, table in zip(('rope_cos', 'rope_sin'), rope_table(self.config)):
                setattr(self, name, table.to(tables_on or device))
        return self

    def sharding_units(self):
        """(units, others) for engine.parallel.shard(): what is gathered together, in the order of the forward pass; others holds what must be
        gathered in fp32. A tied table is used at both ends and left to the model as a whole."""
        if self.config.weight_tying:
            return list(self.transformer.h), []
        return [*self.transformer.h, [self.transformer.ln_f, self.lm_head]], [self.transformer.wte]

    def compile_units(self):
        """Compile each block and the head for itself."""
        for module in (*self.transformer.h, self.lm_head):
            module.compile()

    def forward(self, idx, targets=None, reduction='mean', last_only=False):
        """Loss of next-token prediction, or logits.

        idx: (B, T) int64, T <= block_size. With `targets` ((B, T) int64, -1 = none) returns the fp32 scalar loss and keeps
        no logits: the mean over the targets, or their sum with reduction='sum'; with a ring, idx and targets are what Ring.part()
        gave this rank, and the loss is that of its tokens. Without targets, returns logits (B, T, V), or (B, 1, V) of the last
        position with last_only; a ring plays no part then.
        """
        ring = self.ring if targets is not None else None
        positions = slice(0, idx.size(1)) if ring is None else ring.positions
        x = self.transformer.wte(idx)
        if 'wpe' in self.transformer:
            x = x + self.transformer.wpe.weight[positions]
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        rope = (self.rope_cos[positions], self.rope_sin[positions]) if self.rope else None
        for block in self.transformer.h:
            x = block(x, rope, ring)
        x = self.transformer.ln_f(x)
        return self.lm_head(x[:, -1:] if last_only else x, targets, reduction)

    @torch.no_grad()
    def init_weights(self, seed, device=None):
        """Normal with std 0.02 for the token and position tables and the head, sqrt(2 / (5 n_embd)) for the other matrices
        (Nguyen and Salazar, "Transformers without Tears", 2019; GPT-2's 0.02 at n_embd = 1000), residual projections scaled
        by 1/sqrt(2 n_layer) on top (GPT-2); norms 1, biases 0.

        Every parameter draws from a generator of its own, keyed by (seed, its name): its values do not depend on which
        others exist, nor on how the model is spread over processes. They are drawn in full, one parameter at a time, on `device`
        (None: where the parameter is; the numbers of a GPU are not those of a CPU).
        """
        inner = math.sqrt(2 / (5 * self.config.n_embd))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith('bias') else 1.0)
                continue
            std = 0.02 if '.h.' not in name else inner / math.sqrt(2 * self.config.n_layer) if name.endswith('c_proj.weight') else inner
            generator = torch.Generator(device or parameter.device)
            generator.manual_seed(mix(seed, *name.encode()) % 2**63)
            parallel.put(parameter, torch.empty(parameter.shape, device=generator.device).normal_(0.0, std, generator=generator))

    @torch.no_grad()
    def fill(self, weights):
        """Take the parameters from `weights`, (name, full tensor) pairs: each rank its part. A second name of a tied table is passed over.

        Raises ConfigError for a parameter that is missing or has another shape.
        """
        missing = dict(self.named_parameters())
        for name, tensor in weights:
            if (parameter := missing.pop(name, None)) is None:
                continue
            if parameter.shape != tensor.shape:
                raise ConfigError(f'the weights of {name} have the shape {tuple(tensor.shape)}, this model has {tuple(parameter.shape)}')
            parallel.put(parameter, tensor)
        if missing:
            raise ConfigError(f'there are no weights for {", ".join(list(missing)[:3])}')

    def parameter_counts(self):
        """{'total', 'trainable', 'non_embedding'}: numbers of parameters; non_embedding leaves out the token and position
        tables (a tied head is the token table, so it is left out too)."""
        total = sum(p.numel() for p in self.parameters())
        tables = self.transformer.wte.weight.numel() + (self.transformer.wpe.weight.numel() if 'wpe' in self.transformer else 0)
        return {'total': total, 'trainable': sum(p.numel() for p in self.parameters() if p.requires_grad), 'non_embedding': total - tables}

    def matmul_weights(self):
        """Weights that one token is multiplied with, for engine.flops: {'attention', 'ffn'} of one layer, 'head'."""
        def linear(module):
            return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        block = self.transformer.h[0]
        return {'attention': linear(block.attn), 'ffn': linear(block.mlp), 'head': self.lm_head.weight.numel()}

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, interrupted=lambda: False):
        """Continue the (B, T) int64 prompts by max_new_tokens sampled tokens; returns (B, T + max_new_tokens).

        temperature 0 takes the most likely token. top_k keeps the k most likely ones; top_p the fewest whose probability
        adds up to at least p (nucleus sampling, Holtzman et al., 2019). What lies more than block_size back is forgotten.
        It ends early when interrupted() is true.
        """
        training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            if interrupted():
                break
            logits = self(idx[:, -self.config.block_size:], last_only=True)[:, -1].float()
            if temperature == 0:
                chosen = logits.argmax(dim=-1, keepdim=True)
            else:
                probabilities = truncate(logits / temperature, top_k, top_p).softmax(dim=-1)
                chosen = torch.multinomial(probabilities, 1, generator=generator)
            idx = torch.cat([idx, chosen], dim=1)
        self.train(training)
        return idx


def truncate(logits, top_k=None, top_p=None):
    """`logits` ((B, V)) with -inf at what top_k and top_p leave out; the most likely token always stays."""
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float('-inf'))
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float('-inf'))
    return logits
