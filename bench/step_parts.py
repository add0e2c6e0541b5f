"""Where the time of a micro-step goes: each part as the profiler saw it, beside what it takes
alone on this device.

    python bench/step_parts.py config/full_llama_1.36b.py
    python bench/step_parts.py config/demo_pystdlib.py --device=cpu

Takes all keys of train.py. Matmuls and attention are timed one layer after the other with nothing
beside them; the rest is what it has to read and write, by the speed at which this device copies. A
part that takes much longer in the step than alone is where time can be won; where matmuls do, a
GPU is at its limit of power.
"""

import dataclasses
import functools
import statistics
import sys
import tempfile

import torch
from step import (
    Step,
    config_of,
    matmuls,
    run_command,
    vocabulary_of,
    write_noise,
)

from onetrain.ops import kernels
from onetrain.ops.attention import attention, make_attention_mask
from onetrain.ops.kernels import synchronized_time

# words in the names of the profiler's events, the first that fits; on a CPU they are operators
PARTS = {
    'attention': ('flash', 'fmha', 'attention', 'flex', 'sdpa', 'bmm'),
    'optimizer': ('adam', 'multi_tensor', 'foreach', 'lpnorm', 'muon', 'optimizer.step'),
    'matmuls': ('gemm', 'nvjet', 'cutlass', 'xmma', 'matmul', 'mm', 'linear'),
}
REST = 'norms, activations, casts, loss'


def part_of(name: str) -> str:
    """Return the part that an event of the profiler belongs to."""
    name = name.lower()
    return next((part for part, words in PARTS.items() if any(w in name for w in words)), REST)


def profiled(step: Step, iterations: int) -> dict:
    """Return {part: seconds of a micro-step}, 'nothing' for what no event fills."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = step.device.type == 'cuda'
    activities += [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    started = synchronized_time(step.device)
    for _ in range(iterations):
        step.run()
    whole = synchronized_time(step.device) - started  # the profiler would slow it down
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(iterations):
            step.run()
        synchronized_time(step.device)
    seconds = dict.fromkeys((*PARTS, REST), 0.0)
    for event in profile.events():
        if event.is_user_annotation:  # spans the kernels within it
            continue
        if on_gpu and event.device_type == torch.autograd.DeviceType.CUDA:
            seconds[part_of(event.name)] += event.time_range.elapsed_us() / 1e6
        elif not on_gpu and event.name.startswith(('aten::', 'cpp_', 'onetrain::')):
            seconds[part_of(event.name)] += event.self_cpu_time_total / 1e6
    seconds['nothing' if on_gpu else 'Python, compiled code'] = whole - sum(seconds.values())
    return {part: took / iterations / step.accumulation for part, took in seconds.items()}


def bandwidth(device: torch.device) -> float:
    """Return bytes per second that a copy reads and writes, the median of 5."""
    # written: what never was lies on one page of zeros
    source = torch.ones(2**28 if device.type == 'cuda' else 2**25)
    source, target, found = source.to(device), torch.empty_like(source, device=device), []
    for _ in range(6):
        started = synchronized_time(device)
        target.copy_(source)
        found.append(2 * source.nbytes / (synchronized_time(device) - started))
    return statistics.median(found[1:])


def attention_alone(c, shape, step: Step) -> float:
    """Return seconds of attention, forward and backward, in the layers of a micro-step."""
    heads = (shape.n_head, shape.num_key_value_heads, shape.num_key_value_heads, shape.n_head)
    (q, k, v), grad = kernels.random_inputs(
        c.batch_size, heads, c.block_size, shape.head_dim, step.device, step.dtype
    )
    backend, total = step.model.backend, 0.0
    for window in set(shape.windows):
        mask = make_attention_mask(backend, c.block_size, step.device, window, None)
        call = functools.partial(attention, q, k, v, backend, window=window, mask=mask)
        _, took = kernels.time_attention(call, (q, k, v), grad)
        total += took * shape.windows.count(window)
    return total


def traffic(c, shape, step: Step) -> dict:
    """Return {part: bytes that a micro-step reads and writes beside matmuls and attention}.

    Of a block with a float32 residual stream: two norms, two additions to the stream, rotations and
    the activation, forward once and backward twice that; casts of the weights and of their
    gradients, and sums of these; logits and their gradients, each written and read; AdamW with
    clipping, of which a micro-step has its share.
    """
    low, width = step.dtype.itemsize, shape.n_embd
    keys = shape.num_key_value_heads * shape.head_dim
    gated = shape.ffn_type != 'standard'
    block = (20 + 4 * low) * width + 2 * low * (width + keys) + (2 + gated) * low * shape.d_ff
    tokens = c.batch_size * c.block_size
    parameters = sum(p.numel() for p in step.parameters)
    casts = 0 if step.dtype == torch.float32 else 2 * (4 + low)
    sums = 12 * (step.accumulation - 1) / step.accumulation
    rest = 3 * block * shape.n_layer * tokens + (casts + sums) * parameters
    rest += 4 * low * tokens * shape.vocab_size
    return {REST: rest, 'optimizer': (7 + 3) * 4 * parameters / step.accumulation}


def main(argv=None):
    c = config_of(sys.argv[1:] if argv is None else argv)
    c = dataclasses.replace(c, vocab_size=vocabulary_of(c))
    with tempfile.TemporaryDirectory() as folder:
        write_noise(folder, c.vocab_size)
        step = Step(c, folder)
        for _ in range(3):
            step.run()
        measured = profiled(step, 2)
    shape, tokens = step.shape, c.batch_size * c.block_size
    speed = bandwidth(step.device)
    alone = {
        'matmuls': matmuls(shape, tokens, step.dtype, step.device)[0],
        'attention': attention_alone(c, shape, step),
        **{part: moved / speed for part, moved in traffic(c, shape, step).items()},
    }
    name = torch.cuda.get_device_name(step.device) if step.device.type == 'cuda' else 'CPU'
    print(
        f'{shape.describe()}: {c.batch_size} x {c.block_size} tokens x {step.accumulation},'
        f' {str(step.dtype).removeprefix("torch.")}, {step.model.backend}, compile={c.compile}, on'
        f' {name}, which copies {speed / 1e9:,.0f} GB/s; ms of a micro-step'
    )
    print(f'{"":>32} {"alone":>9} {"in the step":>12}')
    for part, took in measured.items():
        predicted = f'{1000 * alone[part]:9.1f}' if part in alone else f'{"":>9}'
        print(f'{part:>32} {predicted} {1000 * took:12.1f}')
    print(f'{"all":>32} {1000 * sum(alone.values()):9.1f} {1000 * sum(measured.values()):12.1f}')
    part = max(alone, key=lambda part: measured[part] - alone[part])
    print(f'furthest from what it takes alone: {part}', flush=True)


if __name__ == '__main__':
    sys.exit(run_command(main))
