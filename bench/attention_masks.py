"""Time of a training step with document_mask, a sliding window and attention sinks beside plain
attention: steps alternate in one process.

python bench/attention_masks.py --steps=7
"""

import argparse
import statistics
import sys
import time

import torch

from model import Model
from onetrain.command_line import run_command, whole
from onetrain.distributed import processes
from onetrain.model_config import resolve_shape

END = 7
WAYS = {
    'plain': ({}, None),
    'documents': ({}, END),
    'window 128': (dict(sliding_window=128), None),
    'sinks': (dict(attention_sinks=True), None),
    'all three': (dict(sliding_window=128, attention_sinks=True), END),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--steps', type=whole(), default=7)
    args = parser.parse_args()
    processes.start('cpu')
    sizes = dict(
        arch_preset='llama', n_layer=4, n_head=6, n_embd=384, block_size=1024, vocab_size=2048
    )
    models = {
        name: Model(resolve_shape({**sizes, **more}), document_end=end)
        for name, (more, end) in WAYS.items()
    }
    for model in models.values():
        model.init_weights(0)
    x = torch.randint(2048, (2, 1025), generator=torch.Generator().manual_seed(0))
    times = {name: [] for name in models}
    for turn in range(args.steps + 2):
        for name in [*models][:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            models[name](x[:, :-1], x[:, 1:]).backward()
            times[name] += [time.perf_counter() - started] * (turn >= 2)  # the first are warm-up
    for name, seconds in times.items():
        print(
            f'{name:>10}: {1000 * statistics.median(seconds):6.0f} ms,'
            f' {statistics.median(a / b for a, b in zip(seconds, times["plain"])):.2f} times plain'
        )


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
