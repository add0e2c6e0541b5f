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
import torch.nn.functional as F

BLOCK = 128  # queries
# scores computed at a time; more leave the caches
MAX_SCORES = 2**21


def block_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float = 0.0
) -> torch.Tensor:
    """Return causal attention of as many queries as keys. Shapes, dtypes and dropout: as for
    attention() in attention.py.
    """
    B, n_head, T, _ = q.shape
    sequences = max(1, MAX_SCORES // (n_head * min(T, BLOCK) * T))
    if sequences >= B:
        return _BlockAttention.apply(q, k, v, dropout)
    parts = zip(q.split(sequences), k.split(sequences), v.split(sequences))
    return torch.cat([_BlockAttention.apply(*part, dropout) for part in parts])


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, dropout):
        B, n_head, T, D = q.shape
        n_kv = k.size(1)
        # N = B * n_kv groups of G query heads, which are rows of the same matmul
        q = (q / math.sqrt(D)).reshape(B * n_kv, n_head // n_kv, T, D)
        k, v = k.reshape(-1, T, D), v.reshape(-1, T, D)
        N, G = q.shape[:2]
        out, kept = torch.empty_like(q), []
        for start in range(0, T, BLOCK):
            rows, end = _rows(q, start)  # (N, G * block, D)
            scores = torch.bmm(rows, k[:, :end].mT)  # (N, G * block, end)
            length = end - start
            future = torch.full((length, length), -math.inf, dtype=q.dtype, device=q.device)
            scores.view(N, G, length, end)[..., start:].add_(future.triu(1))
            weights = F.softmax(scores, dim=-1)
            keep = None
            if dropout:
                keep = torch.rand_like(weights, dtype=torch.float32) >= dropout
            if any(ctx.needs_input_grad):
                kept += [weights, keep]
            dropped = weights if keep is None else weights * keep / (1 - dropout)
            out[:, :, start:end] = torch.bmm(dropped, v[:, :end]).view(N, G, length, D)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.dropout = dropout
        return out.view(B, n_head, T, D)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        B, n_head, T, D = grad.shape
        N, G = q.shape[:2]
        grad = grad.reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for number, start in enumerate(range(0, T, BLOCK)):
            weights, keep = kept[2 * number : 2 * number + 2]
            rows, end = _rows(q, start)
            grad_rows, _ = _rows(grad, start)
            d_weights = torch.bmm(grad_rows, v[:, :end].mT)
            dropped = weights
            if keep is not None:
                dropped = weights * keep / (1 - ctx.dropout)
                d_weights = d_weights * keep / (1 - ctx.dropout)
            dv[:, :end] += torch.bmm(dropped.mT, grad_rows)
            # the derivative of softmax: weights * (d_weights - sum(weights * d_weights))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            dk[:, :end] += torch.bmm(d_scores.mT, rows)
            d_rows = torch.bmm(d_scores, k[:, :end]) / math.sqrt(D)
            dq[:, :, start:end] = d_rows.view(N, G, end - start, D)
        kv_shape = (B, N // B, T, D)
        return dq.view(B, n_head, T, D), dk.view(kv_shape), dv.view(kv_shape), None


def _rows(x, start):
    """Return the block of x (N, G, T, D) at `start` as (N, G * block, D), and where it ends."""
    N, _, T, D = x.shape
    end = min(T, start + BLOCK)
    return x[:, :, start:end].reshape(N, -1, D), end
