"""Which kernels a run takes, from what was asked for and what this device has."""
import torch

from engine import experts, fp8
from engine.attention import choose_backend, fastest
from engine.configurator import ConfigError


def precision(c, device):
    """The torch dtype of the matmuls of a train.Config: what it names, else bfloat16 where the device has it. Raises ConfigError for float16 where it cannot be."""
    name = c.dtype or ('float32' if device.type == 'cpu' else 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16')
    if name == 'float16' and c.use_fsdp and c.fsdp_offload:
        raise ConfigError('dtype=float16 with fsdp_offload=True is not possible: type --dtype=bfloat16')
    if name == 'float16' and device.type == 'cpu':
        raise ConfigError('dtype=float16 needs a GPU: type --dtype=bfloat16 or --dtype=float32')
    return getattr(torch, name)


def choose(c, shape, device, dtype):
    """({'backend', 'dispatch', 'float8'} of Model, sentences about them for the report).

    c: train.Config; shape: ModelConfig; dtype: torch dtype of the matmuls. Raises ConfigError for what has no substitute.
    """
    notes, special = [], dict(dropout=c.dropout, documents=c.document_mask, sinks=shape.attention_sinks, deterministic=c.deterministic)
    if c.attention_backend == 'auto':
        backend, told = fastest(device, dtype, batch_size=c.batch_size, n_head=shape.n_head, n_kv=shape.num_key_value_heads, head_dim=shape.head_dim, T=c.block_size,
                                window=max(shape.windows, key=lambda window: window or c.block_size) or None, **special)
        notes.append(f'attention_backend=auto takes {backend}: {told}')
    else:
        backend, passed_over = choose_backend(c.attention_backend, device.type, dtype, shape.head_dim, window=any(shape.windows), **special)
        if passed_over:
            notes.append(f'attention_backend={c.attention_backend} falls back to {backend} ({"; ".join(passed_over)})')
    if backend == 'sdpa' and device.type == 'cuda' and c.deterministic and (dtype == torch.float32 or any(shape.windows) or c.document_mask):
        notes.append("deterministic=True, but for float32, windows and documents torch's attention has a kernel on GPUs whose gradients need not repeat to the last bit: "
                     'attention_backend=flex or manual have them repeat')
    dispatch, reason = experts.choose_dispatch(c.expert_dispatch, (shape.n_embd, shape.expert_d_ff), dtype, device.type) if shape.num_experts else (None, None)
    if reason:
        notes.append(f'expert_dispatch={c.expert_dispatch} falls back to {dispatch} ({reason})')
    float8 = fp8.choose(dtype, device) if c.fp8 else None
    if float8 == 'emulated':
        notes.append('fp8=True is emulated on a CPU: the same rounding, slower than without')
    return {'backend': backend, 'dispatch': dispatch, 'float8': float8}, notes
