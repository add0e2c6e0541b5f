"""Attention kernels that give their log-sum-exp, and backward passes that take one from outside.

The backward pass of flash attention needs the output and the log-sum-exp of each query only.
Whoever changes both alike (merging the parts of a ring, adding a logit to the softmax) gets exact
gradients from it.
"""

import math

import torch


def choose_kernel(q: torch.Tensor) -> str:
    """Return 'flash' where torch has it for tensors like q ((B, H, T, head_dim)), else 'manual'."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return (
        'flash'
        if q.device.type == 'cpu' or half and q.size(-1) % 8 == 0 and q.size(-1) <= 256
        else 'manual'
    )


def forward(
    kernel: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None = None,
) -> tuple:
    """Return (out, lse): attention of some queries to some keys, (B, H, t, head_dim) in q's dtype,
    and its log-sum-exp, (B, H, t) fp32.

    q, k, v: as many heads each; mask: bool, broadcastable to (B, H, t, keys), True where a query
    sees a key, or None; never with causal.
    """
    return _FORWARD[kernel](q, k, v, causal, mask)


def backward(
    kernel: str,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None = None,
) -> tuple:
    """Return gradients of q, k, v for the gradient of `out`; out and lse: of the whole softmax, of
    which these keys may be a part.
    """
    return _BACKWARD[kernel](grad, q, k, v, out, lse, causal, mask)


def _added(mask, q):
    return (
        None
        if mask is None
        else torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -math.inf)
    )


def _flash(q, k, v, causal, mask):
    if q.device.type == 'cpu':
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_added(mask, q)
        )
    assert mask is None, 'the CUDA kernel has no mask'
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]


def _flash_backward(grad, q, k, v, out, lse, causal, mask):
    if q.device.type == 'cpu':
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=_added(mask, q)
        )
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that there is not
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        None,
        None,
        q.size(2),
        k.size(2),
        0.0,
        causal,
        seed,
        seed,
    )


def _scores(q, k, causal, mask):
    scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.size(-1))
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores if mask is None else scores.masked_fill(~mask, -math.inf)


def _manual(q, k, v, causal, mask):
    with torch.autocast(q.device.type, enabled=False):
        scores = _scores(q, k, causal, mask)
        lse = scores.logsumexp(dim=-1)
        return ((scores - lse[..., None]).exp() @ v.float()).to(q.dtype), lse


def _manual_backward(grad, q, k, v, out, lse, causal, mask):
    grad = grad.float()
    weights = (_scores(q, k, causal, mask) - lse[..., None]).exp()
    by_score = (
        weights
        * (grad @ v.float().transpose(-2, -1) - (grad * out.float()).sum(-1, keepdim=True))
        / math.sqrt(q.size(-1))
    )
    return (
        by_score @ k.float(),
        by_score.transpose(-2, -1) @ q.float(),
        weights.transpose(-2, -1) @ grad,
    )


_FORWARD = {'flash': _flash, 'manual': _manual}
_BACKWARD = {'flash': _flash_backward, 'manual': _manual_backward}
