"""Causal self-attention behind one call, with the plain reference beside the fast kernels.

`flash_attn_3` and `flash_attn_2` are the packages of that name, `flash_attn_4` is FlashAttention 4,
which torch takes in place of its own flash kernels, `sdpa` is torch's scaled_dot_product_attention
(which picks its own flash, cuDNN or memory-efficient kernel), `cudnn` the same with cuDNN's kernel
only, `flex` is torch's flex_attention, `blocks` is for a CPU (block_attention.py), `manual` is the
formula softmax(q k^T / sqrt(d)) v written out. `auto` is what kernels.fastest_backend() finds.

Beyond causality there are three switches. A window lets a query see that many tokens back, itself
included. Documents keep it within its own text. A sink is one learned logit per head that joins the
softmax and is dropped (gpt-oss): attention may then look at nothing.
"""

import importlib.util
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from onetrain.ops import flash_lse
from onetrain.ops.block_attention import block_attention
from onetrain.ops.ring_attention import ring_attention

if TYPE_CHECKING:
    from onetrain.ops.ring_attention import Ring

BACKENDS = (
    'flash_attn_4',
    'flash_attn_3',
    'flash_attn_2',
    'cudnn',
    'blocks',
    'sdpa',
    'flex',
    'manual',
)
# a mask for queries that see all keys: a single token after those before it
FULL_ATTENTION = 'everything'
_MODULES = {
    'flash_attn_4': 'flash_attn.cute',
    'flash_attn_3': 'flash_attn_interface',
    'flash_attn_2': 'flash_attn',
}
_NATIVE_WINDOW = ('flash_attn_3', 'flash_attn_2')
# of GPUs: Hopper, and the data center's Blackwell
_GENERATIONS = {'flash_attn_4': (9, 10), 'flash_attn_3': (9,)}


def choose_backend(
    requested: str,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    dropout: float = 0.0,
    window: bool = False,
    documents: bool = False,
    sinks: bool = False,
    deterministic: bool = False,
) -> tuple:
    """Return (backend, reasons): the first backend from `requested` on, in the order of BACKENDS,
    that can run; `cudnn` and `blocks` only where they are asked for.

    dtype: torch dtype that the kernel would see; window, documents, sinks: whether the model has
    them; deterministic: whether gradients must repeat to the last bit. reasons: one sentence for
    each backend passed over.
    """
    reasons = []
    for backend in BACKENDS[BACKENDS.index(requested) :]:
        if backend in ('cudnn', 'blocks') and backend != requested:
            continue
        reason = unsupported_reason(
            backend, device_type, dtype, head_dim, dropout, window, documents, sinks, deterministic
        )
        if reason is None:
            return backend, reasons
        reasons.append(f'{backend}: {reason}')
    raise AssertionError('manual attention runs everywhere')


def unsupported_reason(
    backend: str,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    dropout: float,
    window: bool,
    documents: bool,
    sinks: bool,
    deterministic: bool,
) -> str | None:
    """Return why `backend` cannot run, or None. The arguments are those of choose_backend()."""
    if backend == 'manual':
        return None
    if sinks and dropout > 0:
        return 'has no dropout together with attention_sinks'
    if backend == 'sdpa':
        return _reason_against_sdpa(device_type, window, documents, sinks)
    if backend == 'blocks':
        return _reason_against_blocks(device_type, window, documents, sinks)
    if device_type != 'cuda':
        return 'needs an NVIDIA GPU'
    if backend == 'flex':
        return 'has no dropout' if dropout > 0 else None
    if backend in _MODULES and not _installed(_MODULES[backend]):
        return f'the package {_MODULES[backend]} is not installed'
    if (
        backend in _GENERATIONS
        and torch.cuda.get_device_capability()[0] not in _GENERATIONS[backend]
    ):
        return (
            'needs a GPU of compute capability'
            f' {" or ".join(f"{major}.0" for major in _GENERATIONS[backend])}'
        )
    if backend in _GENERATIONS and dropout > 0:
        return 'has no dropout'
    if backend in ('cudnn', 'flash_attn_4') and window:
        return 'is not used with sliding_window'
    if backend == 'cudnn' and deterministic:
        return 'its gradients do not repeat to the last bit (deterministic=True)'
    if documents or sinks:
        return f'is not used with {"document_mask" if documents else "attention_sinks"}'
    if dtype not in (torch.float16, torch.bfloat16):
        return f'needs float16 or bfloat16, not {str(dtype).removeprefix("torch.")}'
    most = 128 if backend in ('cudnn', 'flash_attn_4') else 256
    if head_dim > most or head_dim % 8:
        return f'needs a head_dim that is a multiple of 8 and at most {most}, not {head_dim}'
    return None


def _reason_against_sdpa(device_type, window, documents, sinks):
    if sinks and device_type != 'cpu' and (window or documents):
        return 'gives no log-sum-exp for attention_sinks where there is a window or a document mask'
    return None


def _reason_against_blocks(device_type, window, documents, sinks):
    if device_type != 'cpu':
        return 'is for a CPU'
    special = {'sliding_window': window, 'document_mask': documents, 'attention_sinks': sinks}
    return next((f'is not used with {name}' for name, has in special.items() if has), None)


def _installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is part of
        return False


def activate_backend(backend: str) -> None:
    """Before attention() with this backend: make FlashAttention 4's kernels torch's for the whole
    process, or torch's own again; compile flex_attention, outside of what may be compiled itself.
    """
    if backend == 'flex' and not _compiled:
        from torch.nn.attention.flex_attention import flex_attention

        _compiled.append(torch.compile(flex_attention))
    if backend == 'flash_attn_4':
        activate_flash_attention_impl('FA4')
    elif current_flash_attention_impl() == 'FA4':
        restore_flash_attention_impl()


def make_attention_mask(
    backend: str,
    T: int,
    device: torch.device,
    window: int | None = None,
    documents: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return the `mask` of attention() for T queries and as many keys, made once for all layers of
    a kind; None where causality is all (but for flex).

    window: tokens that a query sees, itself included; documents: (B, T) int64, the number of each
    token's text, or None.
    """
    if window is not None and window >= T or backend in _NATIVE_WINDOW:  # by themselves
        window = None
    if window is None and documents is None and backend != 'flex':
        return None
    if backend == 'flex':
        from torch.nn.attention.flex_attention import create_block_mask

        def allowed(b, h, query, key):
            seen = query >= key
            if window is not None:
                seen = seen & (query - key < window)
            return seen if documents is None else seen & (documents[b, query] == documents[b, key])

        return create_block_mask(
            allowed, None if documents is None else len(documents), None, T, T, device=device
        )
    at = torch.arange(T, device=device)
    back = at[:, None] - at
    seen = (back >= 0)[None, None]
    if window is not None:
        seen = seen & (back < window)
    return (
        seen
        if documents is None
        else seen & (documents[:, None, :, None] == documents[:, None, None, :])
    )


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    backend: str,
    dropout: float = 0.0,
    ring: 'Ring | None' = None,
    window: int | None = None,
    mask: str | torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return causal attention, scaled by 1/sqrt(head_dim).

    q: (B, n_head, T, head_dim); k, v: (B, n_kv, T, head_dim) with n_head a multiple of n_kv
    (grouped queries: head h reads key/value head h // (n_head / n_kv)). Returns (B, n_head, T,
    head_dim) in q's dtype. dropout: probability for the attention weights, 0 outside training.
    ring: the ranks that share the sequence, each with its part of T
    (onetrain/ops/ring_attention.py); then the backend is theirs. window: tokens seen, or None.
    mask: what make_attention_mask() made for this backend (it holds the window too); for sdpa and
    manual also any bool (B or 1, 1, queries, keys), True where a query sees a key, or
    FULL_ATTENTION. sinks: (n_head,) logits, or None.
    """
    if ring is not None:
        return ring_attention(q, k, v, ring)
    return _KERNELS[backend](q, k, v, dropout, window, mask, sinks)


def _window_size(window, k):
    return (-1, -1) if window is None or window >= k.size(2) else (window - 1, 0)


def _flash_attn_4(q, k, v, dropout, window, mask, sinks):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(q, k, v, dropout, window, mask, sinks)


def _cudnn(q, k, v, dropout, window, mask, sinks):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v, dropout, window, mask, sinks)


def _flash_attn_3(q, k, v, dropout, window, mask, sinks):
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        causal=True,
        window_size=_window_size(window, k),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _flash_attn_2(q, k, v, dropout, window, mask, sinks):
    from flash_attn import flash_attn_func

    return flash_attn_func(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        dropout_p=dropout,
        causal=True,
        window_size=_window_size(window, k),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    ).transpose(1, 2)


def _blocks(q, k, v, dropout, window, mask, sinks):
    return block_attention(q, k, v, dropout)


def _sdpa(q, k, v, dropout, window, mask, sinks):
    grouped = q.size(1) != k.size(1)
    if sinks is not None:
        k, v = (
            x.repeat_interleave(q.size(1) // k.size(1), dim=1) if grouped else x for x in (k, v)
        )
        return _WithSinks.apply(
            q, k, v, sinks, mask is None, None if mask is FULL_ATTENTION else mask
        )
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if mask is FULL_ATTENTION else mask,
        dropout_p=dropout,
        is_causal=mask is None,
        enable_gqa=grouped,
    )


def _flex(q, k, v, dropout, window, mask, sinks):
    out = _compiled[0](
        q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1), return_lse=sinks is not None
    )
    if sinks is None:
        return out
    out, lse = out
    return out * torch.sigmoid(lse - sinks.float()[:, None])[..., None].to(out.dtype)


def _manual(q, k, v, dropout, window, mask, sinks):
    B, n_head, T, head_dim = q.shape
    n_kv = k.size(1)
    q = q.reshape(B, n_kv, n_head // n_kv, T, head_dim)
    # (B, n_kv, n_head/n_kv, T, keys)
    scores = (q @ k.unsqueeze(2).transpose(-2, -1)) / math.sqrt(head_dim)
    scores = scores.float()
    if mask is not FULL_ATTENTION:
        seen = (
            torch.ones(T, k.size(2), dtype=torch.bool, device=q.device).tril()
            if mask is None
            else mask[:, :, None]
        )
        scores = scores.masked_fill(~seen, float('-inf'))
    if sinks is not None:
        scores = torch.cat(
            [scores, sinks.float().view(1, n_kv, -1, 1, 1).expand(B, -1, -1, T, 1)], dim=-1
        )
    weights = F.softmax(scores, dim=-1)[..., : k.size(2)].to(v.dtype)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    return (weights @ v.unsqueeze(2)).reshape(B, n_head, T, head_dim)


def _as(like, x):
    """x in the dtype of `like`; not by to(), which returns x itself where it has it: torch 2.11
    would compile a backward pass of zeros.
    """
    return x if x.dtype == like.dtype else x.to(like.dtype)


class _WithSinks(torch.autograd.Function):
    """Attention with one more key in each head, whose score is the sink and whose value is zero.
    With s the sink and l the log-sum-exp without it the output shrinks by sigmoid(l - s); the
    kernel's backward pass is exact once output and log-sum-exp are those of the larger softmax.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, causal, mask):
        out, lse = flash_lse.forward(flash_lse.choose_kernel(q), q, k, v, causal, mask)
        whole = torch.logaddexp(lse, sinks.float()[:, None])
        out = _as(q, out * (lse - whole).exp()[..., None])
        ctx.save_for_backward(q, k, v, sinks, mask, out, whole)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, sinks, mask, out, lse = ctx.saved_tensors
        dq, dk, dv = flash_lse.backward(
            flash_lse.choose_kernel(q), grad.contiguous(), q, k, v, out, lse, ctx.causal, mask
        )
        weight = (sinks.float()[:, None] - lse).exp()  # (B, n_head, T)
        ds = -(weight * (grad.float() * out.float()).sum(-1)).sum((0, 2))
        return _as(q, dq), _as(k, dk), _as(v, dv), _as(sinks, ds), None, None


_compiled: list = []  # flex_attention: as it is written it would write the scores out
# operators of these kernels, whose outputs are dear to compute and small to keep
# (activation_checkpointing='selective')
OPS_TO_SAVE = (
    'aten::_scaled_dot_product_flash_attention',
    'aten::_scaled_dot_product_flash_attention_for_cpu',
    'aten::_scaled_dot_product_efficient_attention',
    'aten::_scaled_dot_product_cudnn_attention',
    'flash_attn::_flash_attn_forward',
    'flash_attn_3::_flash_attn_forward',
    'flash_attn_3::fwd',
    'flex_attention',
)
_KERNELS = {
    'flash_attn_4': _flash_attn_4,
    'flash_attn_3': _flash_attn_3,
    'flash_attn_2': _flash_attn_2,
    'cudnn': _cudnn,
    'blocks': _blocks,
    'sdpa': _sdpa,
    'flex': _flex,
    'manual': _manual,
}
