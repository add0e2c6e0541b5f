"""A plan for every recipe of config/ on one machine, as the table of docs/planning.md.

python bench/plan_recipes.py --gpus=8xA100-80 --price=1.80
"""

import glob
import json
import os
import subprocess
import sys

from onetrain.command_line import ArgumentParser, number, run_command

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('--gpus', default='8xA100-80')
    parser.add_argument('--price', type=number(), default=1.80, help='dollars per GPU and hour')
    args = parser.parse_args()
    print(
        '| recipe | parameters | tokens | layout | recomputed | batch | GB | hours | cost | loss |'
    )
    print('|---|---|---|---|---|---|---|---|---|---|')
    for path in sorted(glob.glob(os.path.join(ROOT, 'config', '*.py'))):
        with open(path) as f:
            if '\ninit_from' in f.read():  # its shape is that of weights from elsewhere
                continue
        command = ['plan.py', path, f'--gpus={args.gpus}', f'--price={args.price}', '--json']
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
        )
        plan = json.loads(done.stdout)
        best, middle = plan['best'], plan['estimates'][1]  # of 30, 40 and 50 % MFU
        cells = [
            f'`{os.path.basename(path)}`',
            f'{plan["parameters"]["total"]:,}',
            f'{plan["tokens"] / 1e9:.3g} B',
            best['layout'],
            best['activation_checkpointing'],
            str(best['batch_size']),
            f'{best["gigabytes"]:.1f}',
            f'{middle["hours"]:,.1f}',
            f'${middle["dollars"]:,.2f}',
            '-' if plan['loss_extrapolated'] else f'{plan["loss"]:.3f}',
        ]
        print('| ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
    sys.exit(run_command(lambda argv: main(), interrupted=None))
