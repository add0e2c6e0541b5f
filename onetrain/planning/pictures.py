"""Pictures of a plan: the loss over the parameters at a budget, and a law beside its runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onetrain.config import UserError

if TYPE_CHECKING:
    from onetrain.planning.budget import Candidate
    from onetrain.planning.scaling_laws import Law


def _figure() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('--plot needs matplotlib: pip install matplotlib') from None
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    return figure, axes


def _save(figure, path):
    figure.savefig(path, dpi=150)


def draw_budget(
    found: Sequence['Candidate'], chosen: 'Candidate', budget: float, law: 'Law', path: str
) -> None:
    """Draw the predicted loss of each candidate over its parameters, and mark the chosen one."""
    figure, axes = _figure()
    points = axes.scatter(
        [c.parameters for c in found],
        [c.loss for c in found],
        c=[c.tokens / c.parameters for c in found],
        norm='log',
        cmap='viridis',
        s=22,
    )
    figure.colorbar(points, ax=axes, label='tokens per parameter')
    axes.scatter([chosen.parameters], [chosen.loss], s=180, marker='*', color='crimson', zorder=3)
    axes.annotate(
        f'{chosen.n_layer}L x {chosen.n_embd}\n{chosen.parameters / 1e9:.2f} B,'
        f' {chosen.tokens / 1e9:.1f} B tokens\n{chosen.loss:.4f}',
        (chosen.parameters, chosen.loss),
        textcoords='offset points',
        xytext=(0, 45),
        ha='center',
        arrowprops=dict(arrowstyle='-', color='crimson'),
    )
    low = min(c.loss for c in found)
    axes.set(
        xscale='log',
        xlabel='parameters',
        ylabel='predicted loss (nats per token)',
        title=f'{len(found)} shapes at {budget:.3g} FLOPs ({law.name})',
        ylim=(low - 0.02, min(max(c.loss for c in found), low + 0.35)),
    )
    _save(figure, path)


def draw_fit(runs: Sequence[tuple[float, float, float]], law: 'Law', path: str) -> None:
    """Draw the loss of each run (parameters, tokens, loss) over its tokens, and the law for each
    number of parameters.
    """
    figure, axes = _figure()
    sizes = sorted({n for n, _, _ in runs})
    tokens = np.geomspace(min(d for _, d, _ in runs) / 2, max(d for _, d, _ in runs) * 4, 100)
    for number, size in enumerate(sizes):
        color = f'C{number % 10}'
        mine = sorted((d, loss) for n, d, loss in runs if n == size)
        axes.plot(tokens, [law.loss(size, d) for d in tokens], color=color, linewidth=1)
        axes.plot(*zip(*mine), 'o', color=color, label=f'{size:,.0f} parameters')
    axes.set(
        xscale='log',
        xlabel='tokens',
        ylabel='validation loss (nats per token)',
        title=f'{law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}',
    )
    axes.legend(frameon=False)
    _save(figure, path)
