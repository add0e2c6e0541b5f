"""
Bytes of parameters, gradients and optimizer state on each rank, as a table over layouts and 1, 2
and 4 gloo ranks.

    PYTHONPATH=.:tests:tests/distributed python bench/memory_per_rank.py

The model and the measurement are those of tests/distributed/test_memory_per_rank.py: storages of
the tensors that a rank holds after a backward pass.
"""

import argparse
import os
import sys

import test_memory_per_rank

from onetrain.command_line import run_command

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    rows = test_memory_per_rank.table(test_memory_per_rank.LAYOUTS)
    print(
        '| layout | ranks | parameters | gradients | optimizer state | all of it, share of one'
        ' process |\n|---|---|---|---|---|---|'
    )
    for (layout, size), row in rows.items():
        sums = sum(row[part] for part in test_memory_per_rank.PARTS)
        print(
            f'| {layout} | {size} | '
            + ' | '.join(f'{row[part] / 1e6:.3f} MB' for part in test_memory_per_rank.PARTS)
            + f' | {sums / (4 * row["total"]):.4f} |'
        )


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
