"""Draw what evaluate.py found: checkpoints of a run along their iterations, and several runs or
models beside each other.

    python plots/compare_evaluations.py out-a out-b/evaluation_00002000.json hf-demo/evaluation.json

A folder stands for all evaluation*.json in it. The picture is saved as evaluations.png (--output),
a table is printed.
"""

# first, so that a Ctrl-C while libraries are imported ends this without a traceback
from onetrain.command_line import ArgumentParser, run_command

# isort: split
import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from plot_single_run import BLUE, GRAY, GREEN, ORANGE, PURPLE, STYLE, check_output, save

from onetrain.config import UserError
from onetrain.files import parse_json
from onetrain.logs.read_log import number

COLORS = (BLUE, ORANGE, GREEN, PURPLE, GRAY)


class EvaluationError(UserError):
    """A path that holds no evaluation."""


def load(path: Path) -> tuple:
    """Return (label, [results, by step]) of an evaluation*.json or a folder of them. Raises
    EvaluationError.
    """
    path = Path(path)
    files = sorted(path.glob('evaluation*.json')) if path.is_dir() else [path]
    if not files:
        raise EvaluationError(
            f'{path} holds no evaluation*.json: run python evaluate.py --out_dir={path} first'
        )
    found = []
    for file in files:
        try:
            found.append(parse_json(file.read_bytes()))
            if not isinstance(found[-1], dict) or 'architecture' not in found[-1]:
                raise UserError('it has other keys')
            if not isinstance(found[-1].get('step'), (int, type(None))):
                raise UserError('its step is no whole number')
        except (OSError, ValueError) as error:
            raise EvaluationError(f'{file} is not a result of evaluate.py: {error}') from None
    folder = path if path.is_dir() else path.parent
    return folder.resolve().name, sorted(found, key=lambda results: results.get('step') or 0)


def values(results: dict) -> dict[str, float]:
    """Return {title: number} of one evaluation."""

    def of(value, key):
        return value.get(key) if isinstance(value, dict) else None

    losses = (
        results.get('losses')
        if isinstance(results.get('losses'), dict)
        else {'': results.get('loss')}
    )
    found = {}
    for loss in losses.values():
        if isinstance(of(loss, 'dataset'), str):
            name = f'{loss["dataset"].rstrip("/").split("/")[-1]} {loss.get("split")}'
            found[f'{name}: loss'] = number(loss.get('loss'))
            if loss.get('bits_per_byte'):
                found[f'{name}: bits per byte'] = number(loss['bits_per_byte'])
    tasks = results.get('tasks') if isinstance(results.get('tasks'), dict) else {}
    return {
        **found,
        **{f'{name} (%)': 100 * number(of(score, 'acc_norm')) for name, score in tasks.items()},
    }


def draw(models: list[tuple]):
    """Return the figure: a panel for each measure; a curve where a model has several steps, else
    a bar.
    """
    titles = list(
        dict.fromkeys(
            title for _, found in models for results in found for title in values(results)
        )
    )
    if not titles:
        raise EvaluationError(
            'nothing was measured that can be drawn: evaluate with a data set or --tasks'
        )
    rows = (len(titles) + 1) // 2
    along_steps = any(len(found) > 1 for _, found in models)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(13 if len(titles) > 1 else 7, 1 + 3.3 * rows), layout='constrained'
        )
        for panel, title in enumerate(titles):
            axes = figure.add_subplot(rows, min(2, len(titles)), panel + 1)
            for place, (label, found) in enumerate(models):
                draw_model(axes, place, label, found, title, along_steps)
            axes.set_title(title)
            if title.endswith('(%)'):
                draw_chance(axes, models, title, along_steps)
            if along_steps:
                axes.set_xlabel('iteration')
            else:
                axes.set(yticks=range(len(models)), yticklabels=[label for label, _ in models])
                axes.invert_yaxis()
                if not title.endswith('(%)'):
                    axes.margins(x=0.12)
        if along_steps:
            named = {
                label: handle
                for axes in figure.axes
                for handle, label in zip(*axes.get_legend_handles_labels())
            }
            figure.legend(
                named.values(), named.keys(), loc='outside upper center', ncols=min(len(models), 4)
            )
    return figure


def draw_model(
    axes: Any, place: int, label: str, found: list, title: str, along_steps: bool
) -> None:
    """Draw one measure of one model: its curve, or the bar at `place`."""
    color = COLORS[place % len(COLORS)]
    points = [
        (results.get('step') or 0, values(results)[title])
        for results in found
        if title in values(results)
    ]
    if along_steps and points:
        axes.plot(*zip(*points), marker='o', markersize=4, color=color, label=label)
    elif points:
        value = points[0][1]
        axes.barh(place, value, height=0.45, color=color, label=label)
        axes.annotate(
            f'{value:.3g}',
            (value, place),
            xytext=(3, 0),
            textcoords='offset points',
            va='center',
            fontsize=9,
        )


def draw_chance(axes: Any, models: list[tuple], title: str, along_steps: bool) -> None:
    """Mark what guessing would score in a task, from 0 to 100 %."""
    chance = [
        100 * number(score['chance'])
        for _, found in models
        for results in found
        for name, score in (results.get('tasks') or {}).items()
        if f'{name} (%)' == title and isinstance(score, dict) and 'chance' in score
    ]
    if chance:
        draw_line = axes.axhline if along_steps else axes.axvline
        draw_line(chance[0], color='#808080', linestyle=':', linewidth=1.2, label='chance')
    (axes.set_ylim if along_steps else axes.set_xlim)(0, 100)


def table(models: list[tuple]) -> list[str]:
    """Return lines of text: a row for each checkpoint."""
    titles = list(
        dict.fromkeys(
            title for _, found in models for results in found for title in values(results)
        )
    )
    rows = [('model', 'step', *titles)]
    for label, found in models:
        for results in found:
            mine = values(results)
            rows.append(
                (
                    label,
                    '-' if results.get('step') is None else str(results.get('step')),
                    *(
                        f'{mine[title]:.4g}' if np.isfinite(mine.get(title, np.nan)) else '-'
                        for title in titles
                    ),
                )
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        row[0].ljust(widths[0])
        + ''.join('  ' + cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))
        for row in rows
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    parser = ArgumentParser(
        description='Draw what evaluate.py found for checkpoints, runs and models.'
    )
    parser.add_argument('path', nargs='+', help='a folder with evaluation*.json, or one such file')
    parser.add_argument(
        '--output',
        type=Path,
        default=Path('evaluations.png'),
        metavar='FILE',
        help='default: evaluations.png in this folder',
    )
    return run_command(lambda argv: run(parser.parse_args(argv)), argv)


def run(args: argparse.Namespace) -> None:
    """Draw what the parsed `args` name. Raises UserError."""
    check_output(args.output)
    models = [load(path) for path in args.path]
    print('\n'.join(table(models)))
    save(draw(models), args.output)


if __name__ == '__main__':
    sys.exit(main())
