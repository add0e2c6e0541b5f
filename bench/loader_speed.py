"""Batches per second: onetrain/data/loader.py beside nanoGPT's way of gathering them (a memory map
opened for each batch, a random start, a slice and a conversion for each row), from one file and
from many, in turns; then a loader in worker processes.

    python bench/loader_speed.py --rounds=7
"""

import argparse
import statistics
import sys
import tempfile
import time

import numpy as np
import torch

from onetrain.command_line import run_command, whole
from onetrain.data.dataset import open_dataset
from onetrain.data.loader import TrainLoader
from onetrain.data.order import order_of
from onetrain.data.token_file import TokenFileWriter


def nanogpt_batch(path, batch_size, block_size):
    tokens = np.memmap(path, dtype=np.uint16, mode='r')
    starts = torch.randint(len(tokens) - block_size, (batch_size,))
    x = torch.stack([torch.from_numpy(tokens[i : i + block_size].astype(np.int64)) for i in starts])
    y = torch.stack(
        [torch.from_numpy(tokens[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts]
    )
    return x, y


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rounds', type=whole(), default=7)
    parser.add_argument('--batch_size', type=whole(), default=32)
    parser.add_argument('--block_size', type=whole(), default=1024)
    parser.add_argument('--tokens', type=whole(), default=100_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ids = np.random.default_rng(0).integers(0, 50257, args.tokens).astype('<u2')
        for name, sharded in (('one', False), ('many', True)):
            with TokenFileWriter(
                f'{folder}/{name}',
                vocab_size=50257,
                eot_id=None,
                tokenizer={'kind': 'bytes'},
                split='-',
                sharded=sharded,
            ) as writer:
                for split, part in (('train', ids), ('val', ids[:10_000])):
                    for piece in np.array_split(part, 20):
                        writer.append(split, piece, [])
        loaders = {}
        for name in ('one', 'many'):
            file = open_dataset(f'{folder}/{name}', '/')[0]
            loaders[name] = TrainLoader(
                file,
                order_of(file, args.block_size, 0),
                batch_size=args.batch_size,
                rank=0,
                world_size=1,
                position=0,
                device=torch.device('cpu'),
            )
        ways = {
            'nanoGPT': lambda: nanogpt_batch(
                f'{folder}/one/train.bin', args.batch_size, args.block_size
            ),
            'one file': loaders['one'].next,
            '20 files': loaders['many'].next,
        }
        rates = {way: [] for way in ways}
        for turn in range(args.rounds + 1):
            for way in [*ways][:: 1 if turn % 2 else -1]:
                count, started = 0, time.perf_counter()
                while time.perf_counter() - started < 0.5:
                    ways[way]()
                    count += 1
                rates[way] += [count / (time.perf_counter() - started)] * (turn > 0)
        print(
            f'{args.batch_size} x {args.block_size} of {args.tokens / 1e6:.0f} M tokens in the page'
            f' cache, one thread, medians of {args.rounds}'
        )
        for way, found in rates.items():
            ratio = statistics.median(a / b for a, b in zip(found, rates['nanoGPT']))
            print(
                f'{way:>10}: {statistics.median(found):8.0f} batches/s, {ratio:5.1f} times nanoGPT'
            )
        file = open_dataset(f'{folder}/one', '/')[0]
        plain, workers = (
            TrainLoader(
                file,
                order_of(file, args.block_size, 0),
                batch_size=args.batch_size,
                rank=0,
                world_size=1,
                position=0,
                device=torch.device('cpu'),
                num_workers=n,
            )
            for n in (0, 2)
        )
        same = all(
            torch.equal(a, b)
            for _ in range(200)
            for a, b in zip(plain.next()[:2], workers.next()[:2])
        )
        workers.close()
        print(f'2 worker processes give the same 200 batches: {same}')


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
