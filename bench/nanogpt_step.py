"""
nanoGPT's training step beside ours: same model, same batch size, in one process, alternating.

    python bench/nanogpt_step.py                      # time per iteration, median of alternating segments, and their ratio
    python bench/nanogpt_step.py --full --seed=1      # train nanoGPT's way for 2000 iterations and evaluate on the whole split
    python bench/nanogpt_step.py --to=1.88 --seed=1   # training time to this loss on the whole split: nanoGPT's recipe and config/shakespeare_char_quick.py

The reference is nanoGPT's loop rewritten from what it does: windows drawn at random and stacked one by one, the token file
mapped anew for every batch, torch's default AdamW on a CPU, a loss taken from the device every log_interval iterations.
"""
import argparse
import os
import statistics
import sys
import time

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from engine import optim, parallel  # noqa: E402
from engine.configurator import resolve  # noqa: E402
from engine.dataset import open_dataset  # noqa: E402
from engine.loader import TrainLoader, WindowOrder, evaluation_batches  # noqa: E402
from model import Model  # noqa: E402
from presets import resolve_shape  # noqa: E402
from train import ALIASES, Config, learning_rate  # noqa: E402

T, B = 64, 12
SHAPE = resolve_shape(dict(arch_preset='gpt2', n_layer=4, n_head=4, n_embd=128, block_size=T, vocab_size=65, activation='gelu'))
RATES = dict(learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, lr_decay_iters=2000, decay_lr=True)


def reference_batch(path):
    data = np.memmap(path, dtype=np.uint16, mode='r')
    ix = torch.randint(len(data) - T, (B,))
    x = torch.stack([torch.from_numpy(data[i:i + T].astype(np.int64)) for i in ix])
    y = torch.stack([torch.from_numpy(data[i + 1:i + 1 + T].astype(np.int64)) for i in ix])
    return x, y


def reference_loop(path, seed):
    """A generator: one iteration of nanoGPT's loop per next(); yields (iteration, model)."""
    torch.manual_seed(seed)
    model = Model(SHAPE)
    model.init_weights(seed)
    named = dict(model.named_parameters())
    decayed, others = optim.decay_groups(named.items())
    optimizer = torch.optim.AdamW([{'params': [named[n] for n in decayed], 'weight_decay': 0.1}, {'params': [named[n] for n in others], 'weight_decay': 0.0}],
                                  lr=1e-3, betas=(0.9, 0.99))
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    x, y = reference_batch(path)
    iteration = 0
    while True:
        for group in optimizer.param_groups:
            group['lr'] = optim.learning_rate_at(iteration, **RATES)
        loss = model(x, y)
        x, y = reference_batch(path)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        iteration += 1
        yield iteration, model


def our_loop(file, seed, recipe=None):
    """The same for train.py's step, with nanoGPT's settings or those of a recipe."""
    c, _ = resolve(Config, [recipe] if recipe else ['--learning_rate=1e-3', '--min_lr=1e-4', '--warmup_iters=100', '--lr_decay_iters=2000', '--beta2=0.99'], ALIASES)
    model = Model(SHAPE)
    model.init_weights(seed)
    parameters = list(model.parameters())
    optimizer = optim.build_optimizer(model.named_parameters(), matrices=model.matrices() if c.optimizer == 'muon' else (), momentum=c.muon_momentum, learning_rate=c.learning_rate,
                                      betas=(c.beta1, c.beta2), weight_decay=c.weight_decay, device_type='cpu')
    loader = TrainLoader(file, WindowOrder(len(file), T, seed), batch_size=B, rank=0, world_size=1, position=0, device=torch.device('cpu'))
    iteration = 0
    while True:
        optim.set_learning_rate(optimizer, learning_rate(c, iteration))
        x, y, _ = loader.next()
        loss = model(x, y, reduction='sum') * (1 / (B * T))
        loss.backward()
        optim.clip_gradients(parameters, c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        iteration += 1
        yield iteration, model


@torch.no_grad()
def whole_split_loss(model, file):
    model.eval()
    total = count = 0
    for x, y in evaluation_batches(file, T, 128, 10**6):
        total, count = total + model(x, y, reduction='sum').item(), count + (y != -1).sum().item()
    model.train()
    return total / count


def time_to(target, loops, val, segment=20):
    """Train `loops` in turns, `segment` iterations each, until the whole validation split has the loss `target`; evaluating does not count."""
    seconds, there = dict.fromkeys(loops, 0.0), {}
    while len(there) < len(loops):
        for name in [name for name in loops if name not in there]:
            started = time.perf_counter()
            for _ in range(segment):
                iteration, model = next(loops[name])
            seconds[name] += time.perf_counter() - started
            if (loss := whole_split_loss(model, val)) <= target:
                there[name] = seconds[name]
                print(f'{name}: validation loss {loss:.4f} after {iteration} iterations and {seconds[name]:.1f} s of training', flush=True)
    print(f"onetrain / nanoGPT: {there['onetrain'] / there['nanoGPT']:.2f} of the time")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--full', action='store_true', help='train both for 2000 iterations and print losses on the whole validation split')
    parser.add_argument('--seed', type=int, default=1337)
    parser.add_argument('--segments', type=int, default=15)
    parser.add_argument('--iterations', type=int, default=50, help='per segment')
    parser.add_argument('--to', type=float, help='a validation loss: train both, in turns, until they have it')
    args = parser.parse_args()
    parallel.start('cpu')
    train, val, _ = open_dataset('shakespeare_char', ROOT)
    loops = {'nanoGPT': reference_loop(train.path, args.seed), 'onetrain': our_loop(train, args.seed)}
    if args.full:
        for name, loop in loops.items():
            for iteration, model in loop:
                if iteration == 2000:
                    break
            print(f'{name}: validation loss {whole_split_loss(model, val):.4f} after {iteration} iterations, seed {args.seed}', flush=True)
        return
    if args.to:
        loops['onetrain'] = our_loop(train, args.seed, 'config/shakespeare_char_quick.py')
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
        print(f'{name}: median {medians[name]:.2f} ms per iteration, {min(values):.2f} to {max(values):.2f}')
    print(f"nanoGPT / onetrain: {medians['nanoGPT'] / medians['onetrain']:.2f}")


if __name__ == '__main__':
    main()
