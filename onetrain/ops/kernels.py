"""Which kernels a run takes, from what was asked for and what this device has."""

import contextlib
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from onetrain import cpu
from onetrain.config import UserError
from onetrain.ops import experts, fp8
from onetrain.ops.attention import (
    BACKENDS,
    activate_backend,
    attention,
    choose_backend,
    make_attention_mask,
    unsupported_reason,
)

if TYPE_CHECKING:
    from onetrain.model_config import ModelConfig
    from train import Config


# below this width, casting takes what faster matmuls save (bench/RESULTS.md)
MIN_WIDTH_FOR_BFLOAT16 = 128
# far from what is found: 1.6 to 3 with instructions for bfloat16, below 1 without. So a machine
# decides alike each time, and a run that starts anew repeats
MIN_SPEEDUP_OF_BFLOAT16 = 1.3
# of sequences for which attention may keep its weights
MAX_LENGTH_OF_BLOCKS = 1024


def precision(name: str | None, device: torch.device, width: int = 0) -> torch.dtype:
    """Return the torch dtype of matmuls: `name`, such as 'bfloat16', or where it is None bfloat16
    on a GPU that has it, float16 on others; on a CPU bfloat16 where it trains a model of this width
    faster, else float32. Raises UserError for float16 on a CPU.
    """
    if name is None and device.type == 'cpu':
        wide = width >= MIN_WIDTH_FOR_BFLOAT16
        faster = wide and bfloat16_speedup() >= MIN_SPEEDUP_OF_BFLOAT16
        name = 'bfloat16' if faster else 'float32'
    name = name or ('bfloat16' if _has_bfloat16() else 'float16')
    if name == 'float16' and device.type == 'cpu':
        raise UserError('dtype=float16 needs a GPU: type --dtype=bfloat16 or --dtype=float32')
    return getattr(torch, name)


@functools.cache
def bfloat16_speedup() -> float:
    """Return how many times as fast as in float32 this CPU multiplies matrices in bfloat16, found
    by trying; 0 where it has no instructions for that.

    On one thread, by the time that it computed and the best of many tries: other programs must not
    decide.
    """
    if not cpu.has_bfloat16():
        return 0.0
    best = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(20):
        for dtype in best:
            x, w = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
            started = time.thread_time()
            torch.nn.functional.linear(x, w)
            best[dtype] = min(best[dtype], time.thread_time() - started)
    torch.set_num_threads(threads)
    return best[torch.float32] / best[torch.bfloat16]


def autocast(device_type: str, dtype: torch.dtype):
    """Return the context of a forward pass whose matmuls are in `dtype`, a torch dtype."""
    return (
        contextlib.nullcontext()
        if dtype == torch.float32
        else torch.autocast(device_type, dtype=dtype)
    )


def eager_mode():
    """Context in which what was compiled runs without: for inputs of ever new lengths, each of
    which would be compiled anew, and training then go on with code for any length.
    """
    return (
        torch.compiler.set_stance('force_eager')
        if 'torch._dynamo' in sys.modules
        else contextlib.nullcontext()
    )


def _has_bfloat16():
    """Return whether the GPU computes in bfloat16 itself: before Ampere torch emulates it, slowly
    and without flash attention.
    """
    return torch.cuda.is_bf16_supported(including_emulation=False)


def set_deterministic(wanted: bool) -> None:
    """Have torch take kernels that repeat to the last bit, and raise where an operator has none; or
    free it to take any.

    Not by warnings alone: these have memory-efficient and flash attention take backward passes that
    do not repeat, where an error has them take the ones that do.
    """
    # sdpa prefers it on H100 and B200, but its gradients do not repeat
    torch.backends.cuda.enable_cudnn_sdp(not wanted)
    if wanted:
        # read by cuBLAS at its first matmul
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
        # a debugging aid that costs a write per buffer
        torch.utils.deterministic.fill_uninitialized_memory = False


def set_matmul_precision(asked: str, dtype: torch.dtype) -> None:
    """Set the precision of matmuls of float32 to what is asked for, as
    torch.set_float32_matmul_precision() takes it, if `dtype` is that of the matmuls: else routers
    have the only ones, which stay exact.
    """
    torch.set_float32_matmul_precision(asked if dtype == torch.float32 else 'highest')


def synchronized_time(device: torch.device) -> float:
    """time.perf_counter(), once all work so far on `device`, a torch.device or its name, is
    done.
    """
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def select_kernels(
    c: 'Config', shape: 'ModelConfig', device: torch.device, dtype: torch.dtype
) -> tuple:
    """Return ({'backend', 'dispatch', 'float8'} of Model, sentences about them for the report).

    c: train.Config; shape: ModelConfig; dtype: torch dtype of the matmuls. Raises UserError for
    what has no substitute.
    """
    if dtype == torch.float16 and c.use_fsdp and c.fsdp_offload:
        raise UserError(
            'dtype=float16 with fsdp_offload=True is not possible: type --dtype=bfloat16'
        )
    backend, notes = _select_backend(c, shape, device, dtype)
    if device.type == 'cuda' and c.init_from == 'scratch' and shape.vocab_size % 64:
        notes.append(
            f'vocab_size={shape.vocab_size} is no multiple of 64, which makes the largest matmul'
            f' slow on a GPU: --vocab_size={-(-shape.vocab_size // 64) * 64} adds ids that no'
            ' text has'
        )
    dispatch = reason = None
    if shape.num_experts:
        sizes = (shape.n_embd, shape.expert_d_ff)
        dispatch, reason = experts.choose_dispatch(c.expert_dispatch, sizes, dtype, device.type)
    if reason:
        notes.append(f'expert_dispatch={c.expert_dispatch} falls back to {dispatch} ({reason})')
    if dispatch == 'grouped' and experts.syncs_host(device.type):
        notes.append(
            'expert_dispatch=grouped is slow on this GPU, where torch multiplies one expert after'
            ' another and waits for the host at each matmul: compute capability 9.0 or 10.0 (H100,'
            ' H200, B200) has one kernel for all'
        )
    float8 = fp8.choose_recipe(dtype, device) if c.fp8 else None
    if c.float32_matmul_precision != 'highest' and dtype != torch.float32:
        notes.append(
            f'float32_matmul_precision={c.float32_matmul_precision} has no effect with'
            f' dtype={str(dtype).removeprefix("torch.")}'
        )
    if c.dtype is None and dtype == torch.bfloat16 and device.type == 'cpu':
        notes.append(
            f'dtype=bfloat16: this CPU multiplies {bfloat16_speedup():.1f} times as fast in it;'
            ' --dtype=float32 is the other way'
        )
    if dtype == torch.bfloat16 and device.type == 'cpu' and not cpu.has_bfloat16():
        notes.append(
            'WARNING: this CPU has no instructions for bfloat16, which torch emulates:'
            ' --dtype=float32 is several times as fast'
        )
    if float8 == 'emulated':
        notes.append('fp8=True is emulated on a CPU: the same rounding, slower than without')
    return {'backend': backend, 'dispatch': dispatch, 'float8': float8}, notes


def idle_share(sequences: int, heads: int, processors: int) -> float:
    """Return the share of a GPU of so many multiprocessors that FlashAttention 2's deterministic
    backward pass leaves idle, with heads of 128.

    It starts ceil(processors / pairs) blocks for each pair of a sequence and a head
    (run_flash_bwd_seqk_parallel of its flash_bwd_launch_template.h), and there is room for one
    block on a multiprocessor. Times measured on an H100 follow it (bench/RESULTS.md).
    """
    pairs = sequences * heads
    blocks = pairs * math.ceil(processors / pairs)
    return 1 - blocks / (processors * math.ceil(blocks / processors))


def idle_note(
    c: 'Config', shape: 'ModelConfig', device: torch.device, dtype: torch.dtype, backend: str
) -> str | None:
    """Return a sentence where batch_size leaves much of the GPU idle, else None."""
    if not (
        device.type == 'cuda'
        and c.deterministic
        and backend in ('sdpa', 'flash_attn_2')
        and dtype in (torch.float16, torch.bfloat16)
        and 64 < shape.head_dim <= 128
        and not (any(shape.windows) or c.document_mask)
        and torch.cuda.get_device_capability(device) in ((8, 0), (9, 0))
    ):
        return None
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    idle = functools.partial(idle_share, heads=shape.n_head, processors=processors)
    better = [
        size for size in range(c.batch_size // 2 + 1, 2 * c.batch_size + 1) if idle(size) < 0.1
    ]
    if idle(c.batch_size) < 0.25 or not better:
        return None
    nearest = sorted(sorted(better, key=lambda size: abs(size - c.batch_size))[:2])
    return (
        f'batch_size={c.batch_size} leaves {100 * idle(c.batch_size):.0f} % of the GPU idle in'
        " attention's backward pass, which repeats to the last bit;"
        f' {" or ".join(f"--batch_size={size}" for size in nearest)} would not'
    )


def _select_backend(c, shape, device, dtype):
    """Return (attention backend, sentences about it)."""
    special = dict(
        dropout=c.dropout,
        documents=c.document_mask,
        sinks=shape.attention_sinks,
        deterministic=c.deterministic,
    )
    asked = c.attention_backend or default_backend(c, shape, device, dtype)
    if asked == 'auto':
        backend, told = fastest_backend(
            device,
            dtype,
            batch_size=c.batch_size,
            n_head=shape.n_head,
            n_kv=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            T=c.block_size,
            window=max(shape.windows, key=lambda window: window or c.block_size) or None,
            **special,
        )
        return backend, [f'attention_backend=auto takes {backend}: {told}']
    backend, passed_over = choose_backend(
        asked, device.type, dtype, shape.head_dim, window=any(shape.windows), **special
    )
    if not passed_over:
        return backend, []
    return backend, [
        f'attention_backend={asked} falls back to {backend} ({"; ".join(passed_over)})'
    ]


def default_backend(
    c: 'Config', shape: 'ModelConfig', device: torch.device, dtype: torch.dtype
) -> str:
    """Return the backend where attention_backend is None, by rule: a run that continues takes the
    same again.

    On a CPU torch's kernel gains nothing from bfloat16, where matmuls over blocks take a quarter to
    seven tenths of its time; they keep the attention weights, which are many where sequences are
    long, and which selective recomputation does not know how to keep. The backward pass of torch's
    flash attention that repeats to the last bit leaves much of a GPU idle. flex_attention's repeats
    too and takes half the time or less, measured on an H100 for heads of 64 and 128
    (bench/RESULTS.md); so do windows, which sdpa has as a mask alone.
    """
    if device.type == 'cpu':
        special = any(shape.windows) or c.document_mask or shape.attention_sinks
        special = special or c.activation_checkpointing == 'selective'
        short = c.block_size <= MAX_LENGTH_OF_BLOCKS and c.context_parallel == 1
        return 'blocks' if dtype == torch.bfloat16 and short and not special else 'sdpa'
    faster = (
        device.type == 'cuda'
        and torch.cuda.get_device_capability(device)[0] == 9
        and c.deterministic
        and c.compile
        and dtype in (torch.float16, torch.bfloat16)
        and shape.head_dim in (64, 128)
        and not (c.dropout or c.document_mask or shape.attention_sinks)
    )
    return 'flex' if faster else 'sdpa'


def fastest_backend(
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch_size: int,
    n_head: int,
    n_kv: int,
    head_dim: int,
    T: int,
    dropout: float = 0.0,
    window: int | None = None,
    documents: bool = False,
    sinks: bool = False,
    deterministic: bool = False,
) -> tuple:
    """Return (backend, told): the backend whose forward and backward pass together take least time
    on this device, and a sentence with the times.

    Shapes and dtype: those of one layer; window: tokens seen, or None; the rest as choose_backend()
    has it. What fails, or computes something else than `sdpa` does, is out. One that gains less
    than 2 % over sdpa does not take its place.
    """
    # as many sequences as there will be, within a gigabyte or so: a kernel that fills a card with
    # 16 may leave half of it idle with 8
    B = min(batch_size, max(1, 2**17 // T) if device.type == 'cuda' else 1)
    inputs, grad = random_inputs(B, (n_head, n_kv, n_kv, n_head), T, head_dim, device, dtype)
    logits = torch.zeros(n_head, device=device, requires_grad=True) if sinks else None
    texts = (torch.arange(T, device=device) // max(1, T // 4)).expand(B, T) if documents else None
    seconds, failures, expected = {}, [], None
    for backend in sorted(BACKENDS, key=lambda name: name != 'sdpa'):  # sdpa is the reference
        if backend == 'manual' and device.type != 'cpu':
            continue
        reason = unsupported_reason(
            backend,
            device.type,
            dtype,
            head_dim,
            dropout,
            window is not None,
            documents,
            sinks,
            deterministic,
        )
        if reason is None:
            try:
                activate_backend(backend)
                mask = make_attention_mask(backend, T, device, window, texts)
                call = functools.partial(attention, *inputs)
                call = functools.partial(call, backend, 0.0, None, window, mask, logits)
                found, took = time_attention(call, inputs, grad)
                expected = expected or found
                reason = _difference(found, expected, dtype)
                seconds |= {} if reason else {backend: took}
            except Exception as error:  # each package and its compiler raise their own
                reason = ' '.join(str(error).split())[:100] or type(error).__name__
            if reason:
                failures.append(f'{backend} {reason}')
    return _choose_fastest(seconds, failures)


def random_inputs(
    B: int,
    heads: tuple,
    T: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple:
    """Return ((q, k, v), gradient of the output), each (B, its number of heads, T, head_dim)."""
    generator = torch.Generator(device).manual_seed(0)
    *inputs, grad = (
        torch.randn(
            B, n, T, head_dim, generator=generator, device=device, dtype=dtype
        ).requires_grad_()
        for n in heads
    )
    return tuple(inputs), grad


def _difference(found, expected, dtype):
    """Return how far tensors are from the expected ones, in words; None where rounding explains
    it.
    """
    off = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected))
    return None if off < (1e-4 if dtype == torch.float32 else 2e-2) else f'is off by {off:.1e}'


def _choose_fastest(seconds, failures):
    """Return (backend, sentence) from {backend: seconds} of those that work."""
    if not seconds:
        return 'manual', f'no other backend runs ({"; ".join(failures)})'
    best = min(seconds, key=seconds.get)
    if seconds[best] > 0.98 * seconds.get('sdpa', math.inf):
        best = 'sdpa'
    times = ', '.join(
        f'{1000 * took:.2f} ms with {name}'
        for name, took in sorted(seconds.items(), key=lambda item: item[1])
    )
    return best, '; '.join([f'forward and backward of a layer take {times}', *failures])


def time_attention(call: Callable, inputs: tuple, grad: torch.Tensor) -> tuple:
    """Return (output and gradients in float32, median seconds of 5 calls after 2)."""
    took = []
    for _ in range(7):
        started = synchronized_time(grad.device)
        out = call()
        gradients = torch.autograd.grad(out, inputs, grad)
        took.append(synchronized_time(grad.device) - started)
    return [tensor.detach().float() for tensor in (out, *gradients)], statistics.median(took[2:])
