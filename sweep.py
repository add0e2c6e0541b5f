"""
Train a recipe with several values of its keys, one run after another, and rank the results.

    python sweep.py config/demo_pystdlib.py --learning_rate=3e-3,7e-3,1.4e-2
    python sweep.py config/own_text.py --learning_rate=3e-4,1e-3 --seed=1,2 --sweep_dir=sweep-own
    python sweep.py config/demo_pystdlib.py --learning_rate=1e-3,3e-3,1e-2,3e-2 --halve_at=100,200

A key of train.py with several values is swept, all combinations; a key with one is the same for all
runs. Each run has its folder in --sweep_dir, and so has the ranked table (sweep.json) and a picture
(sweep.png). Interrupted or killed, the same command goes on: finished runs are not made again, and
one that was cut continues. With --halve_at the runs are compared at each of these iterations, and
the worse half goes no further. On a machine with several GPUs each runs one at a time (--parallel).
"""

import argparse
import sys

from onetrain.command_line import ArgumentParser, run_command, whole
from onetrain.sweep.runs import Sweep, combinations


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    parser = ArgumentParser(description=__doc__, usage='%(prog)s [config/file.py ...] [options]')
    parser.add_argument('--sweep_dir', default='sweep', help='folder of the runs')
    parser.add_argument(
        '--parallel', type=whole(most=64), help='runs at a time (default: one for each GPU)'
    )
    parser.add_argument(
        '--halve_at', metavar='ITER,...', help='iterations from which the better half goes on'
    )
    return run_command(
        lambda argv: run(*parser.parse_known_args(argv)),
        argv,
        interrupted='interrupted; the same command goes on',
    )


def run(args: argparse.Namespace, words: list[str]) -> int:
    """Make the runs that `words`, config files and keys of train.py, ask for; returns the exit
    code. Raises UserError.
    """
    files, axes, fixed = combinations(words)
    sweep = Sweep(files, axes, fixed, args.sweep_dir, args.halve_at, args.parallel)
    failed = sweep.make()
    print('\n'.join(sweep.table()))
    print(f'Picture:     {sweep.draw()}')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
