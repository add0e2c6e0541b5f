"""Causal self-attention behind one call, with the plain reference beside the fast kernels.

`flash_attn_3` and `flash_attn_2` are the packages of that name, `sdpa` is torch's scaled_dot_product_attention (which
picks its own flash, cuDNN or memory-efficient kernel), `manual` is the formula softmax(q k^T / sqrt(d)) v written out.
"""
import importlib.util
import math

import torch
import torch.nn.functional as F

from engine.ring import ring_attention

BACKENDS = ('flash_attn_3', 'flash_attn_2', 'sdpa', 'manual')
_MODULES = {'flash_attn_3': 'flash_attn_interface', 'flash_attn_2': 'flash_attn'}


def choose_backend(requested, device_type, dtype, head_dim, dropout=0.0):
    """(backend, reasons): the first backend from `requested` on, in the order of BACKENDS, that can run.

    dtype: torch dtype that the kernel would see. reasons: one sentence for each backend passed over.
    """
    reasons = []
    for backend in BACKENDS[BACKENDS.index(requested):]:
        reason = _why_not(backend, device_type, dtype, head_dim, dropout)
        if reason is None:
            return backend, reasons
        reasons.append(f'{backend}: {reason}')
    raise AssertionError('manual attention runs everywhere')


def _why_not(backend, device_type, dtype, head_dim, dropout):
    if backend not in _MODULES:
        return None
    if device_type != 'cuda':
        return 'needs an NVIDIA GPU'
    if importlib.util.find_spec(_MODULES[backend]) is None:
        return f'the package {_MODULES[backend]} is not installed'
    if backend == 'flash_attn_3' and torch.cuda.get_device_capability()[0] != 9:
        return 'needs a Hopper GPU'
    if backend == 'flash_attn_3' and dropout > 0:
        return 'has no dropout'
    if dtype not in (torch.float16, torch.bfloat16):
        return f'needs float16 or bfloat16, not {str(dtype).removeprefix("torch.")}'
    if head_dim > 256 or head_dim % 8:
        return f'needs a head_dim that is a multiple of 8 and at most 256, not {head_dim}'
    return None


def attention(q, k, v, backend, dropout=0.0, ring=None):
    """Causal attention, scaled by 1/sqrt(head_dim).

    q: (B, n_head, T, head_dim); k, v: (B, n_kv, T, head_dim) with n_head a multiple of n_kv (grouped queries: head h
    reads key/value head h // (n_head / n_kv)). Returns (B, n_head, T, head_dim) in q's dtype.
    dropout: probability for the attention weights, 0 outside training. ring: the ranks that share the sequence, each with its part of T
    (engine/ring.py); then the backend is theirs.
    """
    if ring is not None:
        return ring_attention(q, k, v, ring)
    return _KERNELS[backend](q, k, v, dropout)


def _flash_attn_3(q, k, v, dropout):
    from flash_attn_interface import flash_attn_func
    out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True,
                          deterministic=torch.are_deterministic_algorithms_enabled())
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _flash_attn_2(q, k, v, dropout):
    from flash_attn import flash_attn_func
    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=dropout, causal=True,
                           deterministic=torch.are_deterministic_algorithms_enabled()).transpose(1, 2)


def _sdpa(q, k, v, dropout):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.size(1) != k.size(1))


def _manual(q, k, v, dropout):
    B, n_head, T, head_dim = q.shape
    n_kv = k.size(1)
    q = q.reshape(B, n_kv, n_head // n_kv, T, head_dim)
    scores = (q @ k.unsqueeze(2).transpose(-2, -1)) / math.sqrt(head_dim)  # (B, n_kv, n_head/n_kv, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    weights = F.softmax(scores.float().masked_fill(future, float('-inf')), dim=-1).to(v.dtype)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    return (weights @ v.unsqueeze(2)).reshape(B, n_head, T, head_dim)


# operators of these kernels, whose outputs are dear to compute and small to keep (activation_checkpointing='selective')
DEAR = ('aten::_scaled_dot_product_flash_attention', 'aten::_scaled_dot_product_flash_attention_for_cpu', 'aten::_scaled_dot_product_efficient_attention',
        'aten::_scaled_dot_product_cudnn_attention', 'flash_attn::_flash_attn_forward', 'flash_attn_3::_flash_attn_forward', 'flash_attn_3::fwd')
_KERNELS = {'flash_attn_3': _flash_attn_3, 'flash_attn_2': _flash_attn_2, 'sdpa': _sdpa, 'manual': _manual}
