"""
What a checkpoint costs: how long training waits for it, in the background and in the foreground, in
turns within one run.

    python bench/checkpoint_stall.py                    a state of 0.6 GB on a CPU
    # 1.3 B, on a GPU
    python bench/checkpoint_stall.py --n_layer=18 --n_embd=2304 --n_head=18 \\
        --vocab_size=32000 --batch_size=8 --block_size=2048

Each save is followed by --steps training steps. Written are, per save, the seconds that training
stood still (stall), the seconds until the checkpoint was whole on disk (total), and the time that
the steps after it took beyond the median step (drag): what the writing thread takes from the
computing ones.
"""

import argparse
import os
import statistics
import sys
import tempfile

import torch

from model import Model
from onetrain.checkpoint.async_writer import Saver
from onetrain.command_line import run_command, whole
from onetrain.distributed import processes
from onetrain.model_config import resolve_shape
from onetrain.ops.kernels import synchronized_time
from onetrain.training import optim

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (
        ('n_layer', 6),
        ('n_embd', 768),
        ('n_head', 12),
        ('vocab_size', 8192),
        ('batch_size', 4),
        ('block_size', 256),
        ('saves', 5),
        ('steps', 6),
    ):
        parser.add_argument(f'--{name}', type=whole(), default=value)
    parser.add_argument('--folder', help='where to write, a temporary folder by default')
    args = parser.parse_args()
    world = processes.start()
    device = world.device
    shape = resolve_shape(
        dict(
            arch_preset='llama',
            n_layer=args.n_layer,
            n_embd=args.n_embd,
            n_head=args.n_head,
            block_size=args.block_size,
            vocab_size=args.vocab_size,
        )
    )
    model = Model.on_meta(shape).allocate(device)
    model.init_weights(0)
    named = dict(model.named_parameters())
    optimizer = optim.build_adamw(
        named, learning_rate=1e-4, betas=(0.9, 0.95), weight_decay=0.1, device_type=device.type
    )
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    guard = optim.NonFiniteGuard(named.values(), scaler, 3)
    optimization = optim.Optimization(optimizer, scaler, guard, named, named)
    x = torch.randint(args.vocab_size, (args.batch_size, args.block_size + 1), device=device)
    step = 0

    def train_step(saver):
        nonlocal step
        started = synchronized_time(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == 'cuda'):
            loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        norm = optim.clip_gradients(list(named.values()), 1.0)
        saver.wait_staged()
        step += 1
        guard.step(optimizer, step, loss.detach(), norm)
        optimizer.zero_grad(set_to_none=True)
        return synchronized_time(device) - started

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        savers = {
            name: Saver(os.path.join(folder, name), world, keep=1, background=name == 'background')
            for name in ('background', 'foreground')
        }
        for saver in savers.values():
            saver.reserve(optimization.tensors(model))
        for _ in range(3):
            train_step(savers['background'])
        usual = statistics.median(train_step(savers['background']) for _ in range(8))
        size = sum(t.nbytes for t in optimization.tensors(model).values())
        print(
            f'{sum(p.numel() for p in named.values()):,} parameters, a state of {size / 1e9:.2f}'
            f' GB, {device}, a step takes {usual:.3f} s; torch {torch.__version__},'
            f' {torch.get_num_threads()} threads'
        )
        rows = {name: [] for name in savers}
        for turn in range(args.saves):
            for name in (
                ('background', 'foreground') if turn % 2 == 0 else ('foreground', 'background')
            ):
                saver = savers[name]
                saver.start(step, optimization.tensors(model), {'config': {}})
                times = [train_step(saver) for _ in range(args.steps)]
                outcome = saver.wait()
                assert outcome.error is None, outcome
                drag = (
                    sum(times)
                    - args.steps * usual
                    - (outcome.stall_s if name == 'background' else 0)
                )
                rows[name].append((outcome.stall_s, outcome.total_s, drag))
                print(
                    f'{name}: stall {outcome.stall_s:.3f} s, total {outcome.total_s:.2f} s, drag'
                    f' {drag:+.2f} s',
                    flush=True,
                )
        print(
            '\nmedians  '
            + '   '.join(
                f'{name}: stall {statistics.median(r[0] for r in found):.3f} s, total'
                f' {statistics.median(r[1] for r in found):.2f} s, drag'
                f' {statistics.median(r[2] for r in found):+.2f} s'
                for name, found in rows.items()
            )
        )
        stalls = [
            statistics.median(r[0] for r in rows[name]) for name in ('background', 'foreground')
        ]
        print(f'stall in the background / in the foreground: {stalls[0] / stalls[1]:.4f}')


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
