"""Validation losses of a recipe under two or more settings, each with several seeds: whether they
differ by more than chance.

    python bench/seeds.py config/shakespeare_char_quick.py --settings dtype=float32 dtype=bfloat16
    python bench/seeds.py config/shakespeare_char_quick.py --seeds=2 --always max_iters=40 \\
        --settings muon_momentum=0.85 muon_momentum=0.95,learning_rate=1e-2

Several keys of one setting stand in one word: dtype=bfloat16,attention_backend=sdpa. Runs take
turns and go to a temporary folder. A difference is given with the standard error of the mean of the
pairs of runs with one seed.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile

from onetrain.command_line import ArgumentParser, run_command, whole
from onetrain.config import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def final_loss(recipe: str, out_dir: str, settings: list[str]) -> float:
    """Train, and return the last validation loss."""
    command = [sys.executable, os.path.join(ROOT, 'train.py'), recipe, f'--out_dir={out_dir}']
    command += [f'--{setting}' for setting in settings]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ['it said nothing']
        errors = [line for line in said if line.startswith('error: ')]
        sentence = (errors or said)[-1].removeprefix('error: ')
        raise UserError(
            f'the run with {" ".join(settings)} ended with {done.returncode}: {sentence}'
        )
    (name,) = [
        name for name in os.listdir(out_dir) if name.startswith('run_') and name.endswith('.jsonl')
    ]
    with open(os.path.join(out_dir, name)) as f:
        return [e['val_loss'] for e in map(json.loads, f) if e.get('type') == 'eval'][-1]


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('recipe')
    parser.add_argument('--settings', nargs='+', required=True, metavar='KEY=VALUE')
    parser.add_argument('--always', nargs='*', default=[], metavar='KEY=VALUE')
    parser.add_argument('--seeds', type=whole(), default=5)
    args = parser.parse_args()
    for word in [*args.always, *','.join(args.settings).split(',')]:
        if '=' not in word:
            raise UserError(f'{word!r} is no setting: type KEY=VALUE, such as dtype=bfloat16')
    if not os.path.isfile(args.recipe):
        raise UserError(f'there is no recipe {args.recipe}: type a file such as config/own_text.py')
    losses = {setting: [] for setting in args.settings}
    for seed in range(args.seeds):
        for setting in [*losses][:: 1 if seed % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                keys = [*args.always, *setting.split(','), f'seed={seed}']
                losses[setting].append(final_loss(args.recipe, os.path.join(folder, 'run'), keys))
            print(f'seed {seed}, {setting}: {losses[setting][-1]:.4f}', flush=True)
    first = losses[args.settings[0]]
    for setting, found in losses.items():
        spread = statistics.stdev(found) if len(found) > 1 else float('nan')
        print(f'{setting}: {statistics.mean(found):.4f}, standard deviation {spread:.4f}')
        if found is not first and len(found) > 1:
            pairs = [b - a for a, b in zip(first, found)]
            error = statistics.stdev(pairs) / len(pairs) ** 0.5
            print(f'    {statistics.mean(pairs):+.4f} +- {error:.4f} beside {args.settings[0]}')


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
