"""
The memory of a training step as predicted and as measured: growth of the resident set on a CPU, of
the allocator's peak on a GPU, each model in a process of its own.

    python bench/memory_prediction.py                     # small models of three families
    python bench/memory_prediction.py --device=cuda --dtype=bfloat16 \\
        --models llama:24:2048:16:2048:8:32000:none

A model is FAMILY:layers:width:heads:block:batch:vocabulary:checkpointing. On a CPU glibc is told to
give freed memory back at once, which train.py tells it not to do, for speed: what is measured is
what the step asks for, not what an allocator holds.
"""

import argparse
import gc
import json
import os
import subprocess
import sys

from onetrain.command_line import run_command

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

MODELS = (
    'gpt2:6:384:6:256:8:50304:none',
    'llama3:4:512:8:512:4:32000:none',
    'llama:6:384:6:256:8:8192:full',
    'moe:4:256:4:256:8:4096:selective',
)


def measure(model, device, dtype):
    """Prints {'predicted', 'measured', 'seconds'} of one model: bytes, bytes, and how long the
    prediction took.
    """
    import time

    import torch

    from model import Model
    from onetrain.model_config import resolve_shape
    from onetrain.ops import kernels
    from onetrain.ops.cross_entropy import choose_chunk
    from onetrain.training import memory, optim
    from onetrain.training.startup_report import memory_gb

    family, *sizes, recomputed = model.split(':')
    layers, width, heads, block, batch, vocabulary = map(int, sizes)
    device = torch.device(device)

    def build(n_layer=layers, n_embd=width):
        shape = resolve_shape(
            dict(
                arch_preset=family,
                n_layer=n_layer,
                n_head=heads,
                n_embd=n_embd,
                block_size=block,
                vocab_size=vocabulary,
            )
        )
        return Model(
            shape,
            activation_checkpointing=recomputed,
            loss_chunk=choose_chunk(
                None, batch * block, vocabulary, device.type, getattr(torch, dtype)
            )[0],
        )

    autocast = kernels.autocast(device.type, getattr(torch, dtype))

    def train(model, batch, steps):
        optimizer = optim.build_adamw(
            model.named_parameters(),
            learning_rate=1e-3,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            device_type=device.type,
        )
        for _ in range(steps):
            x, y = (torch.randint(0, vocabulary, (batch, block), device=device) for _ in range(2))
            with autocast:
                loss = model(x, y, reduction='sum')
            loss.backward()
            optim.clip_gradients(list(model.parameters()), 1.0)
            optimizer.step()
            model.zero_grad(set_to_none=True)
            del loss

    started = time.perf_counter()
    predicted = memory.step_memory(build, batch, block, device, autocast).per_rank('single', 1)
    seconds = time.perf_counter() - started
    with device:
        train(build(1, 8 * heads), 1, 1)  # kernels are loaded
    gc.collect()
    before = memory_gb(device)['allocated_gb']
    with device:
        model = build()
    train(model, batch, 3)
    print(
        json.dumps(
            {
                'predicted': predicted.total,
                'measured': 1e9 * (memory_gb(device)['max_allocated_gb'] - before),
                'seconds': seconds,
            }
        )
    )


def compare(models, device='cpu', dtype='float32'):
    """{model: predicted / measured}; prints a line for each."""
    ratios = {}
    for model in models:
        done = subprocess.run(
            [sys.executable, __file__, f'--one={model}', f'--device={device}', f'--dtype={dtype}'],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                'MALLOC_MMAP_THRESHOLD_': '65536',
                'MALLOC_TRIM_THRESHOLD_': '65536',
            },
        )
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
        ratios[model] = found['predicted'] / found['measured']
        print(
            f'{model:>40}: {found["predicted"] / 1e6:8.0f} MB predicted in {found["seconds"]:.2f}'
            f' s, {found["measured"] / 1e6:8.0f} MB measured, {ratios[model]:.3f}',
            flush=True,
        )
    return ratios


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--models', nargs='+', default=MODELS)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
    parser.add_argument('--one', help='one process: a model')
    args = parser.parse_args()
    if args.one:
        return measure(args.one, args.device, args.dtype)
    compare(args.models, args.device, args.dtype)


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
