"""One decoder. GPT-2, LLaMA-2, LLaMA-3, Qwen3, GPT-NeoX and Mixtures of Experts are settings of its
switches (onetrain/model_config.py).

    sequential block (norm_position='pre')        parallel_residual=True (GPT-NeoX)

      x ──┬── norm ── attention ──(+)──┬── norm ── mlp ──(+)──     x ──┬── norm ── attention ──(+)──
          └────────────────────────┘   └──────────────────┘            ├── norm ── mlp ─────────┤
                                                                       └────────────────────────┘

norm_position='post' puts each norm behind its sum instead: x = norm(x + f(x)). With num_experts the
mlp is a mixture of experts, but for the first n_dense_layers. Parameter names are nanoGPT's
(transformer.h.0.attn.c_attn.weight, ...).
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from onetrain import flops
from onetrain.config import UserError
from onetrain.counter_rng import hash_ints
from onetrain.distributed import collectives, layouts
from onetrain.ops import experts, fp8, rope
from onetrain.ops.attention import OPS_TO_SAVE, activate_backend, attention, make_attention_mask
from onetrain.ops.cross_entropy import next_token_loss

if TYPE_CHECKING:
    from onetrain.distributed.processes import World
    from onetrain.flops import TokenFlops
    from onetrain.model_config import ModelConfig
    from onetrain.ops.kv_cache import Cache
    from onetrain.ops.ring_attention import Ring

ACTIVATIONS = {
    'gelu': F.gelu,  # exact, with erf: nanoGPT and GPT-NeoX
    # the approximation that GPT-2 was trained with
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),
    'silu': F.silu,
    'relu': F.relu,
    'relu2': lambda x: F.relu(x).square(),
}


class Norm(nn.Module):
    """LayerNorm with or without bias, or RMSNorm, over the last dimension."""

    def __init__(self, size: int, kind: str, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if kind == 'layernorm' else None
        self.rms, self.eps = kind == 'rmsnorm', eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x of any shape, normalized over its last dimension."""
        weight, bias = self.weight, self.bias
        if weight.dtype != x.dtype:  # FSDP gathers them in bf16; kernels want one dtype
            weight, bias = weight.to(x.dtype), bias if bias is None else bias.to(x.dtype)
        if self.rms:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


class Attention(nn.Module):
    """Causal self-attention of layer number `layer`, with grouped queries where there are fewer
    heads of keys and values.
    """

    def __init__(self, config: 'ModelConfig', layer: int, backend: str, dropout: float):
        super().__init__()
        self.heads = (config.n_head, config.num_key_value_heads, config.num_key_value_heads)
        self.head_dim = config.head_dim
        # q, k, v in one matmul
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * config.head_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = Norm(config.head_dim, 'rmsnorm', config.norm_eps) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, 'rmsnorm', config.norm_eps) if config.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(config.n_head)) if config.attention_sinks else None
        self.layer, self.window = layer, config.windows[layer]
        self.backend, self.dropout = backend, dropout

    def forward(
        self,
        x: torch.Tensor,
        cos_sin: tuple | None,
        ring: 'Ring | None',
        mask: str | torch.Tensor | None,
        cache: 'Cache | None',
    ) -> torch.Tensor:
        """Return (B, T, n_embd) of the same. cos_sin: of rope.cos_sin_table() at the positions of
        x, or None; ring, mask, cache: as in Model.forward().
        """
        B, T, _ = x.shape  # (B, T, n_embd)
        # (B, n_head + 2 n_kv, T, head_dim)
        qkv = self.c_attn(x).view(B, T, sum(self.heads), self.head_dim).transpose(1, 2)
        # queries and keys stay together until both are normalized and rotated
        qk, v = qkv.split_with_sizes((self.heads[0] + self.heads[1], self.heads[2]), dim=1)
        if self.q_norm is not None:
            q, k = qk.split_with_sizes(self.heads[:2], dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1).to(v.dtype)
        if cos_sin is not None:
            qk = rope.apply_rotary_emb(qk, *cos_sin)  # all heads at once
        q, k = qk.split_with_sizes(self.heads[:2], dim=1)
        backend = self.backend
        if cache is not None:  # masks are tensors there
            k, v = cache.extend(self.layer, k, v)
            backend = 'sdpa' if self.sinks is None or x.device.type == 'cpu' else 'manual'
        y = attention(
            q,
            k,
            v,
            backend,
            self.dropout if self.training else 0.0,
            ring,
            self.window,
            mask,
            self.sinks,
        )  # (B, n_head, T, head_dim)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, n_embd)
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


def activation_fn(config: 'ModelConfig') -> tuple:
    """Return (function, ratio): the nonlinearity of an MLP, and how many times wider than its
    output its input is.
    """
    activation = ACTIVATIONS[config.activation]
    if config.ffn_type == 'standard':
        return activation, 1

    def swiglu(x):
        gate, up = x.chunk(2, dim=-1)
        return activation(gate) * up

    def clamped(x):  # gpt-oss
        gate, up = x.chunk(2, dim=-1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    return (clamped if config.ffn_type == 'swiglu_clamped' else swiglu), 2


class MLP(nn.Module):
    """Two linear layers with an activation between them, (B, T, n_embd) to the same; gated kinds
    compute gate and up in one matmul.
    """

    def __init__(self, config: 'ModelConfig', d_ff: int, dropout: float):
        super().__init__()
        self.activation_fn, ratio = activation_fn(config)
        self.c_fc = nn.Linear(config.n_embd, d_ff * ratio, bias=config.bias)  # gated: gate, then up
        self.c_proj = nn.Linear(d_ff, config.n_embd, bias=config.bias)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, T, n_embd) of the same."""
        x = self.c_proj(self.activation_fn(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Router(nn.Linear):
    """Which experts a token goes to: (experts, gates, statistics) of experts. Always in
    fp32.
    """

    def __init__(self, config: 'ModelConfig'):
        super().__init__(config.n_embd, config.num_experts, bias=config.bias)
        self.register_buffer('balance', torch.zeros(config.num_experts))
        self.how = dict(
            top_k=config.num_experts_per_tok,
            **{
                key: getattr(config, key)
                for key in (
                    'score_function',
                    'n_groups',
                    'topk_groups',
                    'norm_topk_prob',
                    'route_scale',
                )
            },
        )

    def forward(self, x: torch.Tensor) -> tuple:
        """Return (experts, gates, statistics) of tokens x, (tokens, n_embd)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = super().forward(x.float())
            chosen, gates, scores = experts.choose_experts(logits, self.balance, **self.how)
            return chosen, gates, experts.routing_statistics(logits, scores, chosen)


class Experts(nn.Module):
    """A linear layer for each of E experts: weight (E, out, in), bias (E, out) or None."""

    def __init__(self, number: int, inputs: int, outputs: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(number, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(number, outputs)) if bias else None


class MoE(nn.Module):
    """Mixture of experts: each token goes through the experts that the router chooses for it, and
    through those that all tokens share.
    """

    def __init__(self, config: 'ModelConfig', dropout: float, dispatch: str):
        super().__init__()
        self.activation_fn, ratio = activation_fn(config)
        self.router = Router(config)
        self.c_fc = Experts(
            config.num_experts, config.n_embd, config.expert_d_ff * ratio, config.bias
        )
        self.c_proj = Experts(config.num_experts, config.expert_d_ff, config.n_embd, config.bias)
        self.shared = (
            MLP(config, config.num_shared_experts * config.expert_d_ff, 0.0)
            if config.num_shared_experts
            else None
        )
        self.dropout, self.dispatch = dropout, dispatch

    def forward(self, x: torch.Tensor) -> tuple:
        """Return (y, statistics of routing) of x, both of x (B, T, n_embd)."""
        flat = x.flatten(0, -2)  # (tokens, n_embd)
        chosen, gates, statistics = self.router(flat)  # (tokens, top_k) twice
        y = experts.run_experts(
            flat,
            chosen,
            gates,
            (self.c_fc.weight, self.c_fc.bias),
            (self.c_proj.weight, self.c_proj.bias),
            self.activation_fn,
            self.dispatch,
        )
        if self.shared is not None:
            y = y + self.shared(flat)
        y = y.view_as(x)
        return F.dropout(y, self.dropout, self.training) if self.dropout else y, statistics


class Block(nn.Module):
    """One layer. forward() returns x and, of a mixture of experts, the statistics of its routing
    (else None).
    """

    def __init__(
        self, config: 'ModelConfig', layer: int, backend: str, dropout: float, dispatch: str | None
    ):
        super().__init__()
        self.ln_1 = Norm(config.n_embd, config.normalization, config.norm_eps)
        self.attn = Attention(config, layer, backend, dropout)
        self.ln_2 = Norm(config.n_embd, config.normalization, config.norm_eps)
        self.is_moe = layer in config.expert_layers
        self.mlp = (
            MoE(config, dropout, dispatch) if self.is_moe else MLP(config, config.d_ff, dropout)
        )
        self.post, self.parallel = config.norm_position == 'post', config.parallel_residual
        self.activation_checkpointing = 'none'

    def forward(
        self,
        x: torch.Tensor,
        cos_sin: tuple | None,
        ring: 'Ring | None' = None,
        mask: str | torch.Tensor | None = None,
        cache: 'Cache | None' = None,
    ) -> tuple:
        """Return (x, statistics of routing or None), x (B, T, n_embd), computed again in backward()
        as activation_checkpointing says.
        """
        if self.activation_checkpointing == 'none' or not torch.is_grad_enabled():
            return self._forward(x, cos_sin, ring, mask, cache)
        keep = (
            {'context_fn': _selective_policy}
            if self.activation_checkpointing == 'selective'
            else {}
        )
        return checkpoint(
            self._forward,
            x,
            cos_sin,
            ring,
            mask,
            cache,
            use_reentrant=False,
            preserve_rng_state=self.mlp.dropout > 0,
            **keep,
        )

    def _forward(self, x, cos_sin, ring, mask, cache):
        if self.parallel:
            y, statistics = self._mlp(self.ln_2(x))
            return x + self.attn(self.ln_1(x), cos_sin, ring, mask, cache) + y, statistics
        if self.post:
            x = self.ln_1(x + self.attn(x, cos_sin, ring, mask, cache))
            y, statistics = self._mlp(x)
            return self.ln_2(x + y), statistics
        x = x + self.attn(self.ln_1(x), cos_sin, ring, mask, cache)
        y, statistics = self._mlp(self.ln_2(x))
        return x + y, statistics

    def _mlp(self, x):
        return self.mlp(x) if self.is_moe else (self.mlp(x), None)


def _selective_policy():
    """Contexts of a forward pass and its repetition in which outputs of matmuls and of attention
    are kept, and all else is computed again.
    """
    kept = {'aten::mm', 'aten::addmm', 'aten::_scaled_mm', 'onetrain::grouped_mm', *OPS_TO_SAVE}
    return create_selective_checkpoint_contexts(
        lambda ctx, operator, *args, **kwargs: (
            CheckpointPolicy.MUST_SAVE
            if operator.name() in kept
            else CheckpointPolicy.PREFER_RECOMPUTE
        )
    )


class Head(nn.Linear):
    """From the last hidden state to logits, or straight to the loss. chunk, z_loss: as
    next_token_loss() takes them.
    """

    def __init__(self, config: 'ModelConfig', chunk: int, z_loss: float):
        super().__init__(config.n_embd, config.vocab_size, bias=False)
        self.chunk, self.z_loss = chunk, z_loss

    def forward(
        self, x: torch.Tensor, targets: torch.Tensor | None = None, reduction: str = 'mean'
    ) -> torch.Tensor:
        """Return logits (B, T, V) of x, or with `targets` the loss."""
        return (
            super().forward(x)
            if targets is None
            else next_token_loss(x, self.weight, targets, reduction, self.chunk, self.z_loss)
        )


class Model(nn.Module):
    """A decoder-only language model.

    config: ModelConfig; backend: what attention.choose_backend returned; dropout: probability;
    activation_checkpointing: what backward() finds kept of each block: 'none' all of it,
    'selective' outputs of matmuls and attention, 'full' only its input; ring: ring_attention.Ring
    of the ranks that share a sequence, or None; dispatch: what experts.choose_dispatch returned;
    aux_loss, z_loss: weights of these losses of experts.routing_statistics in training;
    document_end: token after which attention and positions start anew, or None; loss_chunk: tokens
    whose logits are in memory at a time in training, 0 for all; head_z_loss: weight of the z-loss
    of these logits; float8: what fp8.choose_recipe returned, or None. Parameters mean nothing until
    init_weights() or a state dict fills them. It can be built on the meta device to be counted.
    """

    def __init__(
        self,
        config: 'ModelConfig',
        backend: str = 'sdpa',
        dropout: float = 0.0,
        activation_checkpointing: str = 'none',
        ring: 'Ring | None' = None,
        dispatch: str | None = 'grouped',
        aux_loss: float = 0.0,
        z_loss: float = 0.0,
        document_end: int | None = None,
        loss_chunk: int = 0,
        head_z_loss: float = 0.0,
        float8: str | None = None,
    ):
        super().__init__()
        self.config = config
        self.backend = backend
        self.dropout = dropout
        self.ring = ring
        self.document_end = document_end
        self.aux_loss, self.z_loss = aux_loss, z_loss
        parts = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        if config.position_encoding == 'learned_absolute':
            parts['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        parts['h'] = nn.ModuleList(
            [Block(config, layer, backend, dropout, dispatch) for layer in range(config.n_layer)]
        )
        parts['ln_f'] = Norm(config.n_embd, config.normalization, config.norm_eps)
        self.transformer = nn.ModuleDict(parts)
        for block in parts['h']:
            block.activation_checkpointing = activation_checkpointing
        self.lm_head = Head(config, loss_chunk, head_z_loss)
        if config.weight_tying:
            self.lm_head.weight = self.transformer.wte.weight
        self.rope = config.position_encoding == 'rope'
        if self.rope:
            for name, table in zip(
                ('rope_cos', 'rope_sin'), rope.cos_sin_table(config, config.block_size)
            ):
                self.register_buffer(name, table, persistent=False)
        self.float8_layers = fp8.convert_to_float8(parts['h'], float8) if float8 else 0
        self.moe_layers = [block.mlp for block in parts['h'] if block.is_moe]
        # what the micro-steps of a step add up to: tokens of each expert, and sums of the
        # statistics weighted by tokens
        if self.moe_layers:
            self.register_buffer(
                'routing',
                torch.zeros(
                    len(self.moe_layers),
                    config.num_experts + experts.STATISTICS,
                    dtype=torch.float64,
                ),
                persistent=False,
            )

    @classmethod
    def on_meta(cls, *args, **kwargs) -> 'Model':
        """Return a model that has shapes and no memory: to be split over ranks before
        allocate().
        """
        with torch.device('meta'):
            return cls(*args, **kwargs)

    def allocate(
        self, device: str | torch.device, buffers_on: torch.device | None = None
    ) -> 'Model':
        """Give a model on the meta device memory on `device`: parameters that hold nothing yet,
        without the work of torch's own initialization. Returns it.

        buffers_on: device of what is no parameter where it is another.
        """
        activate_backend(self.backend)
        self.to_empty(device=device)
        if self.config.weight_tying:  # to_empty gives every module a tensor of its own
            self.lm_head.weight = self.transformer.wte.weight
        for module in self.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.zeros_like(buffer, device=buffers_on or device))
        if self.rope:
            self.rope_cos, self.rope_sin = (
                table.to(buffers_on or device)
                for table in rope.cos_sin_table(self.config, self.config.block_size)
            )
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return {name: tensor} of what a checkpoint holds of the model: the parameters, and the
        balance of its experts.
        """
        return {name: p.detach() for name, p in self.named_parameters()} | {
            f'transformer.h.{layer}.mlp.router.balance': moe.router.balance
            for layer, moe in zip(self.config.expert_layers, self.moe_layers)
        }

    def cast_matmuls(self, dtype: torch.dtype) -> None:
        """Keep the weights of matmuls in `dtype`, for a model that is trained no further: autocast
        would cast them for each token that is written. Results are the same to the last bit.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, Experts)) and not isinstance(module, Router):
                for name, p in [*module.named_parameters(recurse=False)]:
                    # not in place: the token table, which may be tied to the head, stays as it is
                    setattr(module, name, nn.Parameter(p.detach().to(dtype), requires_grad=False))

    def sharding_units(self):
        """Return (units, others) for layouts.shard(): what is gathered together, in the order of
        the forward pass; others holds what must be gathered in fp32. A tied table is used at both
        ends and left to the model as a whole.
        """
        routers = [moe.router for moe in self.moe_layers]
        if self.config.weight_tying:
            return list(self.transformer.h), routers
        return [*self.transformer.h, [self.transformer.ln_f, self.lm_head]], [
            self.transformer.wte,
            *routers,
        ]

    def matrices(self) -> list[str]:
        """Return the names of the parameters that Muon is for: matrices within the layers. Tables,
        the head and routers stand for single tokens and experts, row by row, and experts are
        three-dimensional.
        """
        return [
            name
            for name, p in self.named_parameters()
            if '.h.' in name
            and p.dim() == 2
            and not name.endswith('bias')
            and '.router.' not in name
        ]

    def keep_from_compiler(self) -> None:
        """Leave the loss in chunks out of what is compiled on a CPU: it would compute each
        exponential twice rather than keep it.
        """
        if self.lm_head.chunk and self.lm_head.weight.device.type == 'cpu':
            self.lm_head.forward = torch.compiler.disable(self.lm_head.forward)

    def compile_units(self):
        """Compile each block and the head for itself; a head that goes chunk by chunk has nothing
        to gain.
        """
        for module in (*self.transformer.h, *([] if self.lm_head.chunk else [self.lm_head])):
            module.compile()

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        reduction: str = 'mean',
        last_only: bool = False,
        cache: 'Cache | None' = None,
    ) -> torch.Tensor:
        """Return the loss of next-token prediction, or logits.

        idx: (B, T) int64, T <= block_size. With `targets` ((B, T) int64, -1 = none) returns the
        fp32 scalar loss and keeps no logits: the mean over the targets, or their sum with
        reduction='sum'; with a ring, idx and targets are what Ring.read_part() read for this rank,
        and the loss is that of its tokens. The losses of routing are in the gradient only, in
        training. Without targets, returns logits (B, T, V), or (B, 1, V) of the last position with
        last_only; a ring plays no part then. cache: kv_cache.Cache of the tokens before, which
        takes up these.
        """
        T = idx.size(1)
        # sequences are split over ranks in training only
        ring = self.ring if targets is not None else None
        positions, documents = slice(0, T), None
        if ring is not None:
            positions = ring.positions
        elif cache is not None:
            positions = cache.begin(T)
        elif self.document_end is not None:
            documents, positions = documents_of(idx, self.document_end)
        x = self.transformer.wte(idx)  # (B, T, n_embd)
        if 'wpe' in self.transformer:
            x = x + self.transformer.wpe.weight[positions]
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        if ring is not None:
            length = self.config.block_size
        else:
            length = T if cache is None or cache.static else cache.length + T
        cos_sin = self._cos_sin(positions, length) if self.rope else None
        masks = cache.masks if cache is not None else self._masks(T, idx.device, documents)
        routing = []
        for block in self.transformer.h:
            x, statistics = block(x, cos_sin, ring, masks[block.attn.window], cache)
            routing += [statistics] if block.is_moe else []
        if cache is not None:
            cache.end(T)
        x = self.transformer.ln_f(x)
        # the head computes the loss itself, so that not all logits need be there at a time
        loss = self.lm_head(x[:, -1:] if last_only else x, targets, reduction)
        if routing and targets is not None and self.training:
            loss = self._add_routing_losses(
                loss, torch.stack(routing), idx.numel() if reduction == 'sum' else 1, idx.numel()
            )
        return loss

    def _masks(self, T, device, documents):
        """Return {window: mask of attention} for each width of window that layers have."""
        return {
            window: make_attention_mask(self.backend, T, device, window, documents)
            for window in set(self.config.windows)
        }

    def _cos_sin(self, positions, length):
        """Return (cos, sin) for rope.apply_rotary_emb()."""
        if (
            self.config.rope_scaling == 'dynamic'
            and self.config.rope_original_block_size < self.config.block_size != length
        ):
            tables = (
                t.to(self.rope_cos.device)
                for t in rope.cos_sin_table(
                    self.config, max(length, self.config.rope_original_block_size), length
                )
            )
        else:
            tables = self.rope_cos, self.rope_sin
        cos_sin = tuple(table[positions] for table in tables)
        return cos_sin if cos_sin[0].dim() == 2 else tuple(t[:, None] for t in cos_sin)

    def _add_routing_losses(self, loss, statistics, weight, tokens):
        """Return `loss` with the gradients of the losses of routing, and its value as it was. Takes
        the statistics up into self.routing.
        """
        mean = torch.ones_like(statistics[0])
        mean[self.config.num_experts :] = tokens  # counts are sums, the others means
        self.routing += (statistics.detach() * mean).double()
        if not (self.aux_loss or self.z_loss):
            return loss
        losses = statistics[:, -2:].sum(0) / len(statistics)
        extra = weight * (self.aux_loss * losses[0] + self.z_loss * losses[1])
        return loss + (extra - extra.detach())

    @torch.no_grad()
    def after_step(
        self, world: 'World', balance_rate: float, skipped: int | torch.Tensor | None
    ) -> torch.Tensor | None:
        """Work of the model after an optimizer step: sum the statistics of routing over ranks and
        move the balance of experts. skipped: scalar tensor, 1 if the step left the weights alone.
        Returns the statistics as a tensor for routing_report(), or None for a dense model.
        """
        if not self.moe_layers:
            return None
        routing = collectives.sum_over_ranks(self.routing.clone(), world)
        self.routing.zero_()
        if balance_rate:
            experts.update_balance(
                [moe.router.balance for moe in self.moe_layers],
                routing[:, : self.config.num_experts],
                balance_rate,
                1 - skipped,
            )
        return routing

    def routing_report(self, routing: torch.Tensor, tokens: int, shares: bool = True) -> dict:
        """Return the `moe` object of the log of a step of `tokens` tokens, given after_step()'s
        tensor; shares: with that of each expert. Waits for the device.
        """
        return experts.routing_report(
            routing.cpu(),
            self.config.expert_layers,
            [moe.router.balance.cpu() for moe in self.moe_layers],
            tokens,
            self.config.num_experts_per_tok,
            shares,
        )

    @torch.no_grad()
    def init_weights(self, seed: int, device: torch.device | None = None) -> None:
        """Normal with std 0.02 for the token and position tables and the head, sqrt(2 / (5 n_embd))
        for the other matrices (Nguyen and Salazar, "Transformers without Tears", 2019; GPT-2's 0.02
        at n_embd = 1000), residual projections scaled by 1/sqrt(2 n_layer) on top (GPT-2); norms 1,
        biases and sinks 0.

        Every parameter draws from a generator of its own, keyed by (seed, its name): its values do
        not depend on which others exist, nor on how the model is spread over processes. They are
        drawn in full, one parameter at a time, on `device` (None: where the parameter is; the
        numbers of a GPU are not those of a CPU).
        """
        inner = math.sqrt(2 / (5 * self.config.n_embd))
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1 or name.endswith('bias'):
                parameter.fill_(0.0 if name.endswith(('bias', 'sinks')) else 1.0)
                continue
            std = (
                0.02
                if '.h.' not in name
                else (
                    inner / math.sqrt(2 * self.config.n_layer)
                    if name.endswith('c_proj.weight')
                    else inner
                )
            )
            generator = torch.Generator(device or parameter.device)
            generator.manual_seed(hash_ints(seed, *name.encode()) % 2**63)
            layouts.copy_into_shard(
                parameter,
                torch.empty(parameter.shape, device=generator.device).normal_(
                    0.0, std, generator=generator
                ),
            )

    @torch.no_grad()
    def fill(self, weights: Iterable, partial: bool = False) -> None:
        """Take the parameters from `weights`, (name, full tensor) pairs: each rank its part. A
        second name of a tied table is passed over.

        Raises UserError for a parameter that has another shape or, unless `partial`, is missing.
        """
        missing = {**self.tensors(), **dict(self.named_parameters())}
        for name, tensor in weights:
            if (parameter := missing.pop(name, None)) is None:
                continue
            if parameter.shape != tensor.shape:
                raise UserError(
                    f'the weights of {name} have the shape {tuple(tensor.shape)}, this model has'
                    f' {tuple(parameter.shape)}'
                )
            layouts.copy_into_shard(parameter, tensor)
        left = [name for name in missing if not name.endswith('.balance')]
        if left and not partial:
            raise UserError(f'there are no weights for {", ".join(left[:3])}')

    def parameter_counts(self) -> dict[str, int]:
        """Return {'total', 'trainable', 'non_embedding', 'active'}: numbers of parameters;
        non_embedding leaves out the token and position tables (a tied head is the token table, so
        it is left out too); active counts of the experts as many as a token goes to.
        """
        total = sum(p.numel() for p in self.parameters())
        if self.config.weight_tying and self.lm_head.weight is not self.transformer.wte.weight:
            total -= self.lm_head.weight.numel()  # the copy that cast_matmuls() made
        tables = self.transformer.wte.weight.numel() + (
            self.transformer.wpe.weight.numel() if 'wpe' in self.transformer else 0
        )
        of_experts = sum(
            p.numel()
            for moe in self.moe_layers
            for part in (moe.c_fc, moe.c_proj)
            for p in part.parameters()
        )
        idle = (
            of_experts - of_experts * self.config.num_experts_per_tok // self.config.num_experts
            if self.moe_layers
            else 0
        )
        return {
            'total': total,
            'trainable': sum(p.numel() for p in self.parameters() if p.requires_grad),
            'non_embedding': total - tables,
            'active': total - idle,
        }

    def flops(self) -> 'TokenFlops':
        """onetrain.flops.TokenFlops of training on one token of a full sequence: experts that it
        does not go to cost nothing.
        """
        config = self.config

        def linear(module):
            return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))

        blocks = list(self.transformer.h)
        chosen = sum(
            config.num_experts_per_tok * (moe.c_fc.weight[0].numel() + moe.c_proj.weight[0].numel())
            for moe in self.moe_layers
        )
        seen = [min(window or config.block_size, config.block_size) for window in config.windows]
        return flops.per_token(
            {
                'attention': sum(linear(b.attn) for b in blocks),
                'ffn': sum(linear(b.mlp) for b in blocks) + chosen,
                'head': self.lm_head.weight.numel(),
            },
            n_layer=config.n_layer,
            width=config.n_head * config.head_dim,
            seen=seen,
        )


def documents_of(idx: torch.Tensor, end: int) -> tuple:
    """Return (documents, positions), both (B, T) int64: the number of each token's text, which ends
    with the token `end`, and its place there.
    """
    ends = (idx == end).long()
    documents = ends.cumsum(1) - ends
    at = torch.arange(idx.size(1), device=idx.device).expand_as(idx)
    # of a text; that of the row is its first token anyway
    first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
    return documents, at - torch.where(first, at, 0).cummax(1).values
