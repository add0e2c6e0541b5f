"""
Queries, keys and values by one matmul or by three, gate and up by one or by two: forward and
backward of that part of a layer, in turns.

    python bench/fused_matmuls.py
    python bench/fused_matmuls.py --device=cuda --dtype=bfloat16 --n_embd=2304 --tokens=16384
"""

import argparse
import statistics
import sys

import torch
import torch.nn.functional as F
from step import kernels  # finds the project
from torch import nn

from onetrain.command_line import run_command, whole


class Gated(nn.Module):
    def __init__(self, width, d_ff, matmuls):
        super().__init__()
        self.inward = nn.ModuleList(
            nn.Linear(width, 2 * d_ff // matmuls, bias=False) for _ in range(matmuls)
        )
        self.outward = nn.Linear(d_ff, width, bias=False)

    def forward(self, x):
        gate, up = (
            self.inward[0](x).chunk(2, dim=-1)
            if len(self.inward) == 1
            else (layer(x) for layer in self.inward)
        )
        return self.outward(F.silu(gate) * up)


class Attended(nn.Module):
    """Heads of 64, causal; a quarter of them for keys and values."""

    def __init__(self, width, matmuls):
        super().__init__()
        self.sizes = [width, width // 4 // 64 * 64 or 64, width // 4 // 64 * 64 or 64]
        self.inward = nn.ModuleList(
            nn.Linear(width, size, bias=False)
            for size in ([sum(self.sizes)] if matmuls == 1 else self.sizes)
        )
        self.outward = nn.Linear(width, width, bias=False)

    def forward(self, x):
        parts = (
            self.inward[0](x).split(self.sizes, dim=-1)
            if len(self.inward) == 1
            else [layer(x) for layer in self.inward]
        )
        q, k, v = (part.unflatten(-1, (-1, 64)).transpose(1, 2) for part in parts)
        return self.outward(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            .transpose(1, 2)
            .flatten(2)
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (('n_embd', 384), ('tokens', 2048), ('rounds', 12)):
        parser.add_argument(f'--{name}', type=whole(), default=default)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16', 'float16'))
    args = parser.parse_args()
    width, d_ff = args.n_embd, -(-args.n_embd * 8 // 3 // 64) * 64
    options = dict(device=args.device, dtype=getattr(torch, args.dtype))
    x, gradient = (torch.randn(8, args.tokens // 8, width, **options) for _ in range(2))
    for title, make, many in (
        ('queries, keys, values', lambda matmuls: Attended(width, matmuls), 3),
        ('gate and up', lambda matmuls: Gated(width, d_ff, matmuls), 2),
    ):
        for compiled in (False, True):
            ways = [make(matmuls).to(**options) for matmuls in (1, many)]
            calls = [torch.compile(way) if compiled else way for way in ways]
            seconds = [[], []]
            for turn in range(args.rounds + 3):
                for way in (0, 1) if turn % 2 else (1, 0):
                    started = kernels.synchronized_time(args.device)
                    calls[way](x).backward(gradient)
                    seconds[way].append(kernels.synchronized_time(args.device) - started)
                    ways[way].zero_grad()
            one, more = (1000 * statistics.median(took[3:]) for took in seconds)
            print(
                f'{title}, {"compiled" if compiled else "eager"}: {one:.2f} ms with one matmul,'
                f' {more:.2f} ms with {many}, {more / one:.2f} times',
                flush=True,
            )


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
