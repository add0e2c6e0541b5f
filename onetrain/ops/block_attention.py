"""Causal attention as batched matmuls over blocks of queries, each with the keys up to its end:

    keys     0      128     256
    queries  [masked]                 block 0 sees 128 keys,
             [ seen  |masked]         block 1 sees 256, ...

This leaves out most of what causality masks, and keeps a block within the caches of a CPU. There
torch's own flash kernel multiplies small tiles, for which bfloat16 gains nothing: this takes a
quarter to seven tenths of its time (bench/RESULTS.md). The weights are kept for the backward pass.
"""

import math

import torch

BLOCK = 128  # queries
# scores computed at a time; more leave the caches
MAX_SCORES = 2**21


def block_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0
) -> torch.Tensor:
    """Return causal attention of as many queries as keys. Shapes, dtypes and dropout: as for
    attention() in attention.py.
    """
    keep = []
    if dropout:  # drawn outside of the operator, where the compiler sees it
        keep = [torch.rand(shape, device=q.device) >= dropout for shape in _shapes_of_weights(q, k)]
    return _BlockAttention.apply(q, k, v, 1 / (1 - dropout), *keep)


class _BlockAttention(torch.autograd.Function):
    """scale: of the weights that `keep`, (N, G * block, end) bool of each block, leaves."""

    @staticmethod
    def forward(ctx, q, k, v, scale, *keep):
        v = v.contiguous()  # not a view of what all three were computed together in
        with torch.autocast(q.device.type, enabled=False):
            out, *weights = _forward(q, k, v, [*keep], scale, any(ctx.needs_input_grad[:3]))
        ctx.save_for_backward(q, k, v, *weights, *keep)
        ctx.scale, ctx.blocks = scale, len(weights)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        weights, keep = kept[: ctx.blocks], kept[ctx.blocks :]
        return *_backward(grad, q, k, v, weights, keep, ctx.scale), None, *(None for _ in keep)


# operators, so that the compiler and the prediction of memory see one for each layer, not hundreds


@torch.library.custom_op('onetrain::block_attention', mutates_args=())
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keep: list[torch.Tensor],
    scale: float,
    with_weights: bool,
) -> list[torch.Tensor]:
    """Return [(B, n_head, T, D), and with_weights those of each block]."""
    out = q.new_empty(q.shape)
    kept = [q.new_empty(shape) for shape in _shapes_of_weights(q, k)] if with_weights else []
    for part, groups in _parts(q, k):
        queries, keys, values = _grouped(q[part], k[part], v[part])
        N, G, T, D = queries.shape
        written = out[part].view(queries.shape)
        for number, start in enumerate(range(0, T, BLOCK)):
            rows, end = _rows(queries, start)
            scores = torch.bmm(rows, keys[:, :end].mT)  # (N, G * block, end)
            length = end - start
            future = torch.full((length, length), -math.inf, dtype=q.dtype, device=q.device)
            scores.view(N, G, length, end)[..., start:].add_(future.triu(1))
            place = {'out': kept[number][groups]} if with_weights else {}
            weights = torch.softmax(scores, dim=-1, **place)
            if keep:
                weights = weights * keep[number][groups] * scale
            found = torch.bmm(weights, values[:, :end])
            written[:, :, start:end] = found.view(N, G, length, D)
    return [out, *kept]


@torch.library.custom_op('onetrain::block_attention_backward', mutates_args=())
def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: list[torch.Tensor],
    keep: list[torch.Tensor],
    scale: float,
) -> list[torch.Tensor]:
    """Return the gradients of q, k and v."""
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for part, groups in _parts(q, k):
        queries, keys, values = _grouped(q[part], k[part], v[part])
        N, G, T, D = queries.shape
        of_out = grad[part].reshape(queries.shape)
        of_q, of_k, of_v = (
            x[part].view(shape)
            for x, shape in ((dq, queries.shape), (dk, keys.shape), (dv, values.shape))
        )
        for number, start in enumerate(range(0, T, BLOCK)):
            rows, end = _rows(queries, start)
            grad_rows, _ = _rows(of_out, start)
            dropped = chosen = weights[number][groups]
            d_weights = torch.bmm(grad_rows, values[:, :end].mT)
            if keep:
                dropped = chosen * keep[number][groups] * scale
                d_weights = d_weights * keep[number][groups] * scale
            of_v[:, :end] += torch.bmm(dropped.mT, grad_rows)
            # the derivative of softmax: weights * (d_weights - sum(weights * d_weights))
            d_scores = torch._softmax_backward_data(d_weights, chosen, -1, chosen.dtype)
            of_k[:, :end] += torch.bmm(d_scores.mT, rows)
            d_rows = torch.bmm(d_scores, keys[:, :end]) / math.sqrt(D)
            of_q[:, :, start:end] = d_rows.view(N, G, end - start, D)
    return [dq, dk, dv]


@_forward.register_fake
def _(q, k, v, keep, scale, with_weights):
    shapes = _shapes_of_weights(q, k) if with_weights else []
    return [q.new_empty(shape) for shape in (q.shape, *shapes)]


@_backward.register_fake
def _(grad, q, k, v, weights, keep, scale):
    return [x.new_empty(x.shape) for x in (q, k, v)]


def _shapes_of_weights(q, k):
    """Return (N, G * block, end) of each block: N = B * n_kv groups of G query heads, which are
    rows of the same matmul.
    """
    B, n_head, T, _ = q.shape
    n_kv = k.size(1)
    ends = [min(T, start + BLOCK) for start in range(0, T, BLOCK)]
    return [
        (B * n_kv, n_head // n_kv * (end - number * BLOCK), end) for number, end in enumerate(ends)
    ]


def _parts(q, k):
    """Yield the slices of sequences, and of their groups, that are computed at a time."""
    B, n_head, T, _ = q.shape
    size = max(1, MAX_SCORES // (n_head * min(T, BLOCK) * T))
    for first in range(0, B, size):
        last = min(B, first + size)
        yield slice(first, last), slice(first * k.size(1), last * k.size(1))


def _grouped(q, k, v):
    """Return scaled queries (N, G, T, D), keys and values (N, T, D)."""
    B, n_head, T, D = q.shape
    n_kv = k.size(1)
    q = (q / math.sqrt(D)).reshape(B * n_kv, n_head // n_kv, T, D)
    return q, k.reshape(-1, T, D), v.reshape(-1, T, D)


def _rows(x, start):
    """Return the block of x (N, G, T, D) at `start` as (N, G * block, D), and where it ends."""
    N, _, T, D = x.shape
    end = min(T, start + BLOCK)
    return x[:, :, start:end].reshape(N, -1, D), end
