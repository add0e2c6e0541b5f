"""Time and peak memory of a training step with a large vocabulary: the loss with all logits at
once, and in chunks, each in a process of its own, in turns.

python bench/loss_memory.py --rounds=5
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

from onetrain.command_line import run_command, whole

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def step(args):
    import torch

    from model import Model
    from onetrain.model_config import resolve_shape
    from onetrain.ops.cross_entropy import choose_chunk
    from onetrain.training import optim
    from onetrain.training.startup_report import memory_gb

    tokens = args.batch_size * args.block_size
    chunk = (
        args.chunk
        if args.chunk >= 0
        else choose_chunk(None, tokens, args.vocab_size, 'cpu', torch.float32)[0]
    )
    model = Model.on_meta(
        resolve_shape(
            dict(
                arch_preset='llama3',
                n_layer=args.n_layer,
                n_head=6,
                num_key_value_heads=6,
                n_embd=args.n_embd,
                block_size=args.block_size,
                vocab_size=args.vocab_size,
            )
        ),
        loss_chunk=chunk,
    ).allocate('cpu')
    model.init_weights(0)
    optimizer = optim.build_adamw(
        dict(model.named_parameters()),
        learning_rate=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        device_type='cpu',
    )
    torch.manual_seed(0)
    x, y = (torch.randint(0, args.vocab_size, (args.batch_size, args.block_size)) for _ in range(2))
    held, seconds = None, []
    for _turn in range(args.steps + 1):
        started = time.perf_counter()
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    held = 4 * 4 * sum(p.numel() for p in model.parameters())  # weights, gradients, two moments
    print(
        statistics.median(seconds[1:]),
        1e9 * memory_gb(torch.device('cpu'))['max_allocated_gb'],
        held,
        loss.item(),
        chunk,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ('rounds', 5),
        ('steps', 4),
        ('batch_size', 8),
        ('block_size', 256),
        ('n_layer', 2),
        ('n_embd', 384),
        ('vocab_size', 128256),
    ):
        parser.add_argument(f'--{name}', type=whole(), default=default)
    parser.add_argument(
        '--chunk',
        type=whole(-1),
        help='one process: tokens in a chunk, 0: all, -1: what training takes',
    )
    args = parser.parse_args()
    if args.chunk is not None:
        return step(args)
    found = {0: [], -1: []}
    for turn in range(args.rounds):
        for chunk in [*found][:: 1 if turn % 2 else -1]:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], f'--chunk={chunk}'],
                capture_output=True,
                text=True,
                check=True,
            )
            found[chunk].append([float(word) for word in done.stdout.split()])
    print(
        f'{args.n_layer} layers, {args.n_embd} wide, vocabulary {args.vocab_size:,},'
        f' {args.batch_size} x {args.block_size} tokens, fp32, medians of {args.rounds}'
    )
    for chunk, rows in found.items():
        seconds, memory, held, loss, size = (statistics.median(column) for column in zip(*rows))
        print(
            f'{"all logits at once" if chunk == 0 else f"chunks of {size:.0f}":>20}:'
            f' {1000 * seconds:7.0f} ms a step, peak {memory / 1e9:.2f} GB, of which'
            f' {held / 1e9:.2f} GB weights, gradients and moments; loss {loss:.6f}'
        )
    pairs = [(b[0] / a[0], b[1] / a[1]) for a, b in zip(found[0], found[-1])]
    print(
        f'chunks / all: time {statistics.median(t for t, _ in pairs):.2f}, peak'
        f' {statistics.median(m for _, m in pairs):.2f}'
    )


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
