"""The load score (100 * least / most tokens of an expert) over training with the balancing bias and
without, from the same start; draws both.

    python data/pystdlib/prepare.py
    python bench/expert_balance.py --steps=300

Writes bench/expert_balance.png.
"""

import argparse
import json
import os
import sys
import tempfile

import train
from onetrain.command_line import run_command, whole

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run(folder, rate, steps):
    """[(iteration, mean load score, load score of each layer)] of a run with this balance_rate."""
    code = train.main(
        [
            os.path.join(ROOT, 'config/demo_pystdlib.py'),
            f'--out_dir={folder}',
            '--arch_preset=moe',
            '--num_experts=8',
            '--expert_d_ff=128',
            '--n_layer=2',
            '--batch_size=16',
            '--learning_rate=3e-4',
            '--min_lr=3e-5',
            '--device=cpu',
            f'--balance_rate={rate}',
            f'--max_iters={steps}',
            '--eval_interval=100000',
            '--eval_at_start=False',
            '--sample_interval=0',
            '--log_interval=5',
            '--always_save_checkpoint=False',
            '--save_log_to_json=False',
        ]
    )
    assert code == 0
    log = next(
        name for name in os.listdir(folder) if name.startswith('run_') and name.endswith('.jsonl')
    )
    with open(os.path.join(folder, log)) as f:
        lines = [json.loads(line) for line in f]
    return [
        (
            line['iter'],
            line['moe']['load_score'],
            [layer['load_score'] for layer in line['moe']['layers']],
        )
        for line in lines
        if line['type'] == 'iter'
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--steps', type=whole(), default=300)
    args = parser.parse_args()
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for rate, color in ((3e-3, 'tab:green'), (1e-3, 'tab:blue'), (0.0, 'tab:red')):
        with tempfile.TemporaryDirectory() as folder:
            points = run(folder, rate, args.steps)
        for layer in range(len(points[0][2])):
            axes.plot(
                [p[0] for p in points],
                [p[2][layer] for p in points],
                color=color,
                alpha=0.25,
                linewidth=1,
            )
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            color=color,
            linewidth=2,
            label=f'balance_rate={rate:g}',
        )
        print(
            f'balance_rate={rate:g}: load score {points[0][1]:.1f} at iter {points[0][0]},'
            f' {points[-1][1]:.1f} at iter {points[-1][0]}, highest'
            f' {max(p[1] for p in points):.1f}, first above 60 at iter'
            f' {next((p[0] for p in points if p[1] > 60), None)}'
        )
    axes.set(
        xlabel='iteration',
        ylabel='load score (mean and each layer)',
        ylim=(0, 100),
        title='8 experts, 2 per token',
    )
    axes.legend()
    figure.savefig(os.path.join(ROOT, 'bench', 'expert_balance.png'), dpi=110, bbox_inches='tight')


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
