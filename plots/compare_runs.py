"""Draw any number of runs over each other, and print a table of their results.

python plots/compare_runs.py out-gpt2-1.36b out-llama-1.36b --x tokens
"""

# first, so that a Ctrl-C while libraries are imported ends this without a traceback
from onetrain.command_line import ArgumentParser, run_command, whole

# isort: split
import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from plot_single_run import (
    STYLE,
    check_output,
    count,
    default_window,
    grid,
    plot_line,
    save,
    scaled,
    set_limits,
    smooth,
    trained,
)

from onetrain.config import UserError
from onetrain.logs.read_log import NothingLogged, cleaned, load_run

if TYPE_CHECKING:
    from onetrain.logs.read_log import Run

COLORS = ['#2f6690', '#d1603d', '#4a8c5c', '#7a5c99', '#b8892b', '#3a9d9d', '#b0557a', '#5b5b5b']
LINES = ['-', '--', ':', '-.']

# settings that say nothing of what was trained
NOT_A_DIFFERENCE = {
    'out_dir',
    'init_from',
    'auto_resume',
    'resume_from',
    'upload_to',
    'wandb_run_name',
    'device',
    'backend',
    'eval_interval',
    'log_interval',
    'checkpoint_interval',
    'head_dim',
    'num_key_value_heads',
    'd_ff',
    'expert_d_ff',
    'rope_original_block_size',
}

# what each panel shows, its unit, and whether the curve is a column of the iterations or the
# validation loss
PANELS = [
    ('Train loss (smoothed)', 'loss (nats per token)', 'loss'),
    ('Validation loss', 'loss (nats per token)', 'val_loss'),
    ('Throughput', 'tokens per second', 'tokens_per_sec'),
    ('Gradient norm (smoothed)', 'gradient norm, before clipping', 'gradients.global_norm'),
]


def name_runs(runs: list) -> list[str]:
    """Return labels that tell the runs apart: the settings in which they differ, if these are few
    and known of all, else where they lie.
    """
    keys = [
        key
        for key in dict.fromkeys(key for run in runs for key in run.config)
        if key not in NOT_A_DIFFERENCE and len({repr(run.config.get(key)) for run in runs}) > 1
    ]
    if 0 < len(keys) <= 3 and all(run.config for run in runs):
        labels = [', '.join(f'{key}={run.config.get(key)}' for key in keys) for run in runs]
        if distinct(labels):
            return labels
    return name_places(runs)


def name_places(runs: list) -> list[str]:
    """Return the shortest labels that tell the runs apart: the end of the folder's path, else the
    run's name, else both.
    """
    folders = [run.path.resolve().parent.parts for run in runs]
    names = [run.name for run in runs]
    depths = range(1, 1 + max(len(folder) for folder in folders))
    choices = (
        [['/'.join(folder[-depth:]) for folder in folders] for depth in depths]
        if distinct(folders)
        else [names]
    )
    choices += [
        ['/'.join(folder[-depth:] + (name,)) for folder, name in zip(folders, names)]
        for depth in depths
    ]
    # the same run given twice
    choices += [[f'{number} {name}' for number, name in enumerate(names, 1)]]
    return next(labels for labels in choices if distinct(labels))


def distinct(values: list) -> bool:
    """Return whether no two values are the same."""
    return len(set(values)) == len(values)


def x_axis(runs: Sequence, x: str) -> tuple:
    """Return per run, the x value of every iteration record, all in one unit; and the label that
    states the unit.
    """
    if x == 'iters':
        return [run.iters for run in runs], 'iteration'
    values = [run.column('tokens_seen' if x == 'tokens' else 'wall_s') for run in runs]
    if x == 'tokens':
        divisor, word = scaled(np.concatenate(values))
        return [value / divisor for value in values], f'tokens seen{word}'
    longest = np.nanmax(np.concatenate(values))
    divisor, unit = (
        (3600, 'hours')
        if longest >= 7200
        else (60, 'minutes')
        if longest >= 120
        else (1, 'seconds')
    )
    return [value / divisor for value in values], f'wall time ({unit})'


def curve(run: 'Run', kind: str, xs: np.ndarray) -> tuple:
    """x and y of a run in the panel of this kind."""
    if kind == 'val_loss':
        at = np.interp(run.eval_iters, run.iters, xs) if len(run.eval_iters) else run.eval_iters
        return at, run.eval_val_loss
    values = run.column(kind)
    return xs, values if kind == 'tokens_per_sec' else smooth(values, default_window(run))


def draw_comparison(runs: Sequence, labels: Sequence[str], x: str = 'iters'):
    """Return the figure of all runs, over iterations, tokens or wall time ('iters', 'tokens',
    'time').
    """
    xs, x_label = x_axis(runs, x)
    panels = []
    for title, unit, kind in PANELS:
        curves = [curve(run, kind, run_xs) for run, run_xs in zip(runs, xs)]
        if any(np.isfinite(y).any() for _, y in curves):
            panels.append((title, unit, kind, curves))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 1 + 3.6 * ((len(panels) + 1) // 2)), layout='constrained')
        for axes, (title, unit, kind, curves) in zip(grid(figure, len(panels)), panels):
            divisor = 1
            if kind == 'tokens_per_sec':
                divisor, word = scaled(np.concatenate([y for _, y in curves]))
                unit += word
            for number, (at, y) in enumerate(curves):
                style = {
                    'color': COLORS[number % len(COLORS)],
                    'linestyle': LINES[number // len(COLORS) % len(LINES)],
                }
                plot_line(axes, at, y / divisor, label=labels[number], **style)
            axes.set(title=title, ylabel=unit, xlabel=x_label)
            if kind == 'tokens_per_sec':
                axes.set_ylim(bottom=0)
            else:
                set_limits(axes, *(trained(y) if kind == 'val_loss' else y for _, y in curves))
            if x == 'iters':
                axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
                axes.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(),
            loc='outside upper center',
            ncols=min(len(runs), 4),
        )
    return figure


def table(runs: list, labels: list[str]) -> list[str]:
    """Return the results of the runs as lines of text, '-' where a run does not say, and * where
    the validation loss is the best of all.
    """
    least = min(map(best_loss, runs))
    rows = [
        (
            'run',
            'params',
            'last iter',
            'tokens',
            'train loss',
            'best val (at)',
            'tokens/s',
            'MFU',
            'hours',
        )
    ]
    for run, label in zip(runs, labels):
        params = cleaned(run.startup_info.get('model')).get('total_params')
        params = params if isinstance(params, (int, float)) else 0
        best = '-'
        if np.isfinite(run.eval_val_loss).any():
            at = np.nanargmin(run.eval_val_loss)
            mark = '*' if len(runs) > 1 and run.eval_val_loss[at] == least else ''
            best = f'{run.eval_val_loss[at]:.4f} ({run.eval_iters[at]}){mark}'
        rows.append(
            (
                label,
                count(params) if params else '-',
                str(run.iters[-1]),
                known(run.last('tokens_seen'), count),
                known(run.last('loss'), '{:.4f}'.format),
                best,
                known(median(run, 'tokens_per_sec'), '{:,.0f}'.format),
                known(median(run, 'mfu_percent'), '{:.1f} %'.format),
                known(run.last('wall_s') / 3600, '{:.2f}'.format),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        row[0].ljust(widths[0])
        + ''.join('  ' + cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))
        for row in rows
    ]


def best_loss(run: 'Run') -> float:
    """Return the lowest validation loss of a run, infinity where it has none."""
    return np.nanmin(run.eval_val_loss) if np.isfinite(run.eval_val_loss).any() else np.inf


def median(run: 'Run', name: str) -> float:
    """Return the median of a column, NaN where it is not known."""
    return np.nanmedian(run.column(name)) if run.has(name) else np.nan


def known(value: float, form: Callable) -> str:
    """Return form(value), or '-' where it is not known."""
    return form(value) if np.isfinite(value) else '-'


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    parser = ArgumentParser(
        description='Draw runs over each other and print a table of their results.'
    )
    parser.add_argument(
        'path', nargs='+', help='one run each: an out_dir, a run_*.jsonl or a run_*.json'
    )
    parser.add_argument(
        '--x',
        choices=('iters', 'tokens', 'time'),
        default='iters',
        help='what the curves are drawn over (default: iters)',
    )
    parser.add_argument(
        '--output',
        type=Path,
        default=Path('compare.png'),
        metavar='FILE',
        help='default: compare.png in this folder',
    )
    parser.add_argument(
        '--latest', type=whole(), metavar='N', help='only the N runs that began last'
    )
    parser.add_argument(
        '--labels',
        metavar='A,B',
        help=(
            'names for the legend, separated by commas in the order of the paths (default: the'
            ' settings that differ, or the places)'
        ),
    )
    return run_command(lambda argv: run(parser.parse_args(argv)), argv)


def run(args: argparse.Namespace) -> None:
    """Draw what the parsed `args` name. Raises UserError."""
    check_output(args.output)
    given = args.labels.split(',') if args.labels else [None] * len(args.path)
    if len(given) != len(args.path):
        raise UserError(f'--labels names {len(given)} runs, but {len(args.path)} were given')
    runs, named = [], []
    for path, name in zip(args.path, given):
        try:
            runs.append(load_run([path]))
            named.append(name)
        except NothingLogged as error:
            if len(args.path) == 1:
                raise
            print(f'note: {error}; left out')
    if not runs:
        raise UserError(f'no iterations logged in {", ".join(args.path)}')
    if args.latest:
        newest = sorted(range(len(runs)), key=lambda i: runs[i].name)[-args.latest :]
        runs, named = [runs[i] for i in sorted(newest)], [named[i] for i in sorted(newest)]
    labels = named if args.labels else name_runs(runs)
    order = sorted(range(len(runs)), key=lambda i: best_loss(runs[i]))
    runs, labels = [runs[i] for i in order], [labels[i] for i in order]
    for run, label in zip(runs, labels):
        for note in run.notes:
            print(f'note: {label}: {note}')
    print('\n'.join(table(runs, labels)))

    needed = {'iters': 'loss', 'tokens': 'tokens_seen', 'time': 'wall_s'}[args.x]
    drawn = []
    for run, label in zip(runs, labels):
        if run.has(needed):
            drawn.append((run, label))
        else:
            print(
                f'note: {label} did not log {needed}, nor what it can be computed from; left out of'
                ' the picture'
            )
    if not drawn:
        raise UserError(f'none of the runs can be drawn over {args.x}; try --x iters')
    figure = draw_comparison([run for run, _ in drawn], [label for _, label in drawn], args.x)
    save(figure, args.output)


if __name__ == '__main__':
    sys.exit(main())
