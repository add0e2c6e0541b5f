"""
Speed of a recipe on this machine, one process: tokens per second, model FLOPs utilization, memory,
and where the time of an iteration goes.

    python bench/throughput.py config/demo_pystdlib.py
    python bench/throughput.py config/full_llama_1.36b.py --batch_size=24 \\
        --gradient_accumulation_steps=1
    python bench/throughput.py config/full_llama_1.36b.py --n_layer=2 --block_size=256 \\
        --batch_size=2 --gradient_accumulation_steps=1 --device=cpu --dtype=float32

Takes all keys of train.py, and those below. Data are random ids of the recipe's vocabulary. The
speed is the median of whole iterations without a pause; the pieces are timed in others that wait
for the device after each, so they add up to a little more.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile

import torch
from step import (
    Step,
    config_of,
    device_of,
    matmuls,
    options_of,
    run_command,
    vocabulary_of,
    write_noise,
)

from onetrain import flops
from onetrain.ops.kernels import synchronized_time
from onetrain.training import memory
from onetrain.training.startup_report import memory_gb


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('--iterations', type=int, default=10)
    parser.add_argument('--warmup', type=int, default=3)
    parser.add_argument(
        '--largest',
        action='store_true',
        help='the batch_size that find_batch_size would take, and one micro-step',
    )
    parser.add_argument(
        '--json', action='store_true', help='the figures once more, as the last line'
    )
    own, argv = parser.parse_known_args(argv)
    c = config_of(argv)
    vocabulary = vocabulary_of(c)
    with tempfile.TemporaryDirectory() as folder:
        write_noise(folder, vocabulary)
        figures = measure(
            dataclasses.replace(c, vocab_size=vocabulary),
            folder,
            own.largest,
            own.iterations,
            own.warmup,
        )
    if own.json:
        print(json.dumps(figures))
    return figures


def predict(c, batch_size):
    """memory.Prediction of an iteration of `c` with another batch_size, in one micro-step or
    two.
    """
    options = options_of(dataclasses.replace(c, batch_size=batch_size))
    several = c.gradient_accumulation_steps > 1 or c.total_batch_size
    return options.predict(batch_size, 2 if several else 1)


def measure(c, folder, largest, iterations, warmup):
    """Prints; returns {'tokens_per_sec', 'seconds', 'pieces', 'max_allocated_gb', 'compile_s'}."""
    if largest:
        c = dataclasses.replace(
            c,
            batch_size=memory.find_batch_size(
                lambda size: predict(c, size), 64, memory.available_memory(device_of(c))
            ),
            gradient_accumulation_steps=1,
            total_batch_size=0,
        )
    try:
        prediction = predict(c, c.batch_size)
    except memory.NotPredicted as error:
        prediction = error
    step = Step(c, folder)
    device = step.device
    started = synchronized_time(device)
    step.run()
    first = synchronized_time(device) - started
    for _ in range(warmup - 1):
        step.run()
    seconds = []
    for _ in range(iterations):
        started = synchronized_time(device)
        step.run()
        seconds.append(synchronized_time(device) - started)
    pieces = [step.timed() for _ in range(max(3, iterations // 3))]
    middle = statistics.median(seconds)
    rate = step.tokens / middle
    dtype = str(step.dtype).removeprefix('torch.')
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else None
    found = flops.utilization(
        step.model.flops(),
        rate,
        device_name=name,
        dtype=dtype,
        num_devices=1,
        architecture=step.shape.describe(),
    )
    split = {piece: statistics.median(row[piece] for row in pieces) for piece in pieces[0]}
    print(
        f'{step.shape.describe()}: {sum(p.numel() for p in step.parameters) / 1e6:,.1f} M'
        f' parameters, {c.batch_size} x {c.block_size} tokens x {step.accumulation}, {dtype} on'
        f' {name or "the CPU"}, compile={c.compile}, torch {torch.__version__}; medians of'
        f' {iterations} after {warmup}'
    )
    print(
        f'  {1000 * middle:,.1f} ms an iteration ({1000 * min(seconds):,.1f} to'
        f' {1000 * max(seconds):,.1f}), {rate:,.0f} tokens/s; the first took {first:.1f} s'
    )
    if found['mfu'] is not None:
        print(
            f'  MFU {found["mfu_percent"]:.1f} % (6N + 12LHQT), {100 * found["mfu_causal"]:.1f} %'
            f' with half of the attention, of {found["hardware_peak_tflops"]:.0f} TFLOP/s dense'
        )
    used = memory_gb(device)['max_allocated_gb']
    alone, of_matmuls = matmuls(step.shape, c.batch_size * c.block_size, step.dtype, device)
    print(
        f'  {found["achieved_tflops"]:.3f} TFLOP/s; the matmuls of the linear layers alone run at'
        f' {of_matmuls / alone / 1e12:.3f} TFLOP/s and are {alone * step.accumulation / middle:.0%}'
        ' of the time'
    )
    print(
        '  '
        + ', '.join(
            f'{piece} {1000 * value:,.1f} ms ({value / sum(split.values()):.1%})'
            for piece, value in split.items()
        )
    )
    print(
        f'  memory: at most {used:.2f} GB'
        f' {"allocated" if device.type == "cuda" else "of the whole process"};'
        f' {prediction if isinstance(prediction, memory.NotPredicted) else prediction.describe()}',
        flush=True,
    )
    return {
        'tokens_per_sec': rate,
        'seconds': seconds,
        'pieces': split,
        'max_allocated_gb': used,
        'first_s': first,
        'mfu': found['mfu_percent'],
        'predicted_gb': (
            None if isinstance(prediction, memory.NotPredicted) else prediction.total / 1e9
        ),
    }


if __name__ == '__main__':
    sys.exit(run_command(lambda argv: main(argv) and None))
