"""The picture of a sweep: curves of validation, and the last loss over each key."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from onetrain.sweep.runs import Trial


def draw_sweep(trials: Sequence['Trial'], axes: dict[str, list], path: str) -> None:
    """Draw the trials, best first, and mark the best."""
    keys = [
        key
        for key, values in axes.items()
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    ]
    figure = Figure(figsize=(5.5 * (1 + len(keys)), 4.5), layout='constrained')
    first, *others = figure.subplots(1, 1 + len(keys), squeeze=False)[0]
    for number, trial in enumerate(trials):
        iters, losses = trial.curve
        label = trial.name if number < 10 else None
        first.plot(iters, losses, '.-', color=f'C{number % 10}', linewidth=1.2, label=label)
    first.set(xlabel='iteration', ylabel='validation loss (nats per token)')
    first.legend(frameon=False, fontsize=8)
    for key, plot in zip(keys, others):
        # those that were stopped early do not compare
        ended = [t for t in trials if t.state == 'finished' and not math.isnan(t.loss)]
        plot.plot([t.values[key] for t in ended], [t.loss for t in ended], 'o', color='C0')
        if ended:
            best = min(ended, key=lambda t: t.loss)
            plot.plot(best.values[key], best.loss, '*', color='crimson', markersize=16)
            plot.annotate(
                f'{best.values[key]:g}: {best.loss:.4f}',
                (best.values[key], best.loss),
                textcoords='offset points',
                xytext=(0, 14),
                ha='center',
            )
        if all(value > 0 for value in axes[key]):
            plot.set_xscale('log')
        plot.set(xlabel=key, ylabel='last validation loss')
    for plot in (first, *others):
        plot.grid(alpha=0.3)
        plot.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=130)
