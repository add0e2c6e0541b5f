"""
nanoGPT's training step beside ours: same model, same batch size, in one process, alternating.

    # time per iteration, median of alternating segments, and their ratio
    python bench/nanogpt_step.py
    # train nanoGPT's way for 2000 iterations and evaluate on the whole split
    python bench/nanogpt_step.py --full --seed=1
    # training time to this loss on the whole split: nanoGPT's recipe and shakespeare_char_quick.py
    python bench/nanogpt_step.py --to=1.88 --seed=1

The reference is nanoGPT's loop rewritten from what it does: windows drawn at random and stacked one
by one, the token file mapped anew for every batch, torch's default AdamW on a CPU, a loss taken
from the device every log_interval iterations.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time

import numpy as np
import torch
from step import Step, config_of

from model import Model
from onetrain.command_line import number, run_command, whole
from onetrain.data.dataset import open_dataset
from onetrain.data.loader import evaluation_batches
from onetrain.distributed import processes
from onetrain.model_config import resolve_shape
from onetrain.training import optim
from train import learning_rate

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

T, B = 64, 12
SHAPE = dict(
    arch_preset='gpt2',
    n_layer=4,
    n_head=4,
    n_embd=128,
    block_size=T,
    vocab_size=65,
    activation='gelu',
)
RATES = dict(learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, lr_decay_iters=2000, decay_lr=True)


def random_windows(folder, batch_size, block_size, device='cpu'):
    """x, y: a batch as nanoGPT draws it."""
    data = np.memmap(os.path.join(folder, 'train.bin'), dtype=np.uint16, mode='r')
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x, y = (
        torch.stack(
            [
                torch.from_numpy(data[i + shift : i + shift + block_size].astype(np.int64))
                for i in ix
            ]
        )
        for shift in (0, 1)
    )
    return (
        (x.pin_memory().to('cuda', non_blocking=True), y.pin_memory().to('cuda', non_blocking=True))
        if device == 'cuda'
        else (x, y)
    )


def reference_loop(
    folder,
    model,
    *,
    batch_size,
    block_size,
    rates,
    learning_rate=None,
    compiled=False,
    device='cpu',
    autocast=None,
    fetch_every=1,
):
    """A generator: one iteration of nanoGPT's loop per next(); yields (iteration, model). rates: of
    AdamW; learning_rate(iteration), or None where it stays.
    """

    def batch():
        return random_windows(folder, batch_size, block_size, device)

    named = dict(model.named_parameters())
    decayed, others = optim.decay_groups(named.items())
    optimizer = torch.optim.AdamW(
        [
            {'params': [named[n] for n in decayed], 'weight_decay': 0.1},
            {'params': [named[n] for n in others], 'weight_decay': 0.0},
        ],
        **rates,
        **({'fused': True} if device == 'cuda' else {}),
    )
    call = torch.compile(model) if compiled else model
    scaler = torch.amp.GradScaler(device, enabled=False)
    iteration = 0
    x, y = batch()
    while True:
        if learning_rate:
            optim.set_learning_rate(optimizer, learning_rate(iteration))
        with autocast or contextlib.nullcontext():
            loss = call(x, y)
        x, y = batch()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        iteration += 1
        if iteration % fetch_every == 0:
            loss.item()
        yield iteration, model


def nanogpts_recipe(folder, seed):
    """reference_loop() with nanoGPT's settings for a CPU."""
    torch.manual_seed(seed)
    model = Model(resolve_shape(SHAPE))
    model.init_weights(seed)
    return reference_loop(
        folder,
        model,
        batch_size=B,
        block_size=T,
        rates=dict(lr=1e-3, betas=(0.9, 0.99)),
        learning_rate=lambda iteration: optim.learning_rate_at(iteration, **RATES),
    )


def our_loop(folder, seed, recipe=None):
    """The same for train.py's step, with nanoGPT's settings or those of a recipe."""
    settings = (
        [recipe]
        if recipe
        else [f'--{key}={value}' for key, value in {**RATES, 'beta2': 0.99}.items()]
    )
    c = config_of(
        [
            *settings,
            f'--seed={seed}',
            '--device=cpu',
            '--compile=False',
            f'--batch_size={B}',
            '--gradient_accumulation_steps=1',
            *(f'--{key}={value}' for key, value in SHAPE.items()),
        ]
    )
    step = Step(c, folder)
    while True:
        optim.set_learning_rate(step.optimizer, learning_rate(c, step.steps))
        step.run()
        step.last_loss.item()
        yield step.steps, step.model


@torch.no_grad()
def whole_split_loss(model, file):
    model.eval()
    total = count = 0
    for x, y, _ in evaluation_batches(file, T, 128, 10**6):
        total, count = total + model(x, y, reduction='sum').item(), count + (y != -1).sum().item()
    model.train()
    return total / count


def time_to(target, loops, val, segment=20):
    """Train `loops` in turns, `segment` iterations each, until the whole validation split has the
    loss `target`; evaluating does not count.
    """
    seconds, there = dict.fromkeys(loops, 0.0), {}
    while len(there) < len(loops):
        for name in [name for name in loops if name not in there]:
            started = time.perf_counter()
            for _ in range(segment):
                iteration, model = next(loops[name])
            seconds[name] += time.perf_counter() - started
            if (loss := whole_split_loss(model, val)) <= target:
                there[name] = seconds[name]
                print(
                    f'{name}: validation loss {loss:.4f} after {iteration} iterations and'
                    f' {seconds[name]:.1f} s of training',
                    flush=True,
                )
    print(f'onetrain / nanoGPT: {there["onetrain"] / there["nanoGPT"]:.2f} of the time')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--full',
        action='store_true',
        help='train both for 2000 iterations and print losses on the whole validation split',
    )
    parser.add_argument('--seed', type=whole(0), default=1337)
    parser.add_argument('--segments', type=whole(), default=15)
    parser.add_argument('--iterations', type=whole(), default=50, help='per segment')
    parser.add_argument(
        '--to', type=number(), help='a validation loss: train both, in turns, until they have it'
    )
    args = parser.parse_args()
    processes.start('cpu')
    folder = os.path.join(ROOT, 'data', 'shakespeare_char')
    _, val, _ = open_dataset('shakespeare_char', ROOT)
    loops = {'nanoGPT': nanogpts_recipe(folder, args.seed), 'onetrain': our_loop(folder, args.seed)}
    if args.full:
        for name, loop in loops.items():
            for iteration, model in loop:  # noqa: B007
                if iteration == 2000:
                    break
            print(
                f'{name}: validation loss {whole_split_loss(model, val):.4f} after {iteration}'
                f' iterations, seed {args.seed}',
                flush=True,
            )
        return
    if args.to:
        loops['onetrain'] = our_loop(folder, args.seed, 'config/shakespeare_char_quick.py')
        return time_to(args.to, loops, val)
    for loop in loops.values():
        for _ in range(20):
            next(loop)
    times = {name: [] for name in loops}
    for segment in range(args.segments):
        for name in sorted(loops, reverse=segment % 2 == 1):
            started = time.perf_counter()
            for _ in range(args.iterations):
                next(loops[name])
            times[name].append(1000 * (time.perf_counter() - started) / args.iterations)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(
            f'{name}: median {medians[name]:.2f} ms per iteration, {min(values):.2f} to'
            f' {max(values):.2f}'
        )
    print(f'nanoGPT / onetrain: {medians["nanoGPT"] / medians["onetrain"]:.2f}')


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
