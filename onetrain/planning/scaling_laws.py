"""Laws L(N, D) = E + A / N^alpha + B / D^beta of the loss of N parameters after D tokens.

They hold for the text and the tokenizer that they were fitted on: losses of different tokenizers do
not compare.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onetrain.config import UserError

TOKENS_PER_PARAMETER = 20  # that Chinchilla was trained on
HUBER_DELTA = 1e-3  # of log L, as in Hoffmann et al., appendix D.3
CONSTANTS = ('E', 'A', 'B', 'alpha', 'beta')
LEAST_RUNS = 6  # one more than there are constants


@dataclass(frozen=True)
class Law:
    """Constants of L(N, D), in nats per token.

    sizes, lengths: the least and the most parameters and tokens of the runs that it was fitted to.
    """

    name: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    sizes: tuple[float, float] = (0.0, math.inf)
    lengths: tuple[float, float] = (0.0, math.inf)

    def covers(self, parameters: float, tokens: float) -> bool:
        """Return whether such a run lies between those that the law was fitted to."""
        return (
            self.sizes[0] <= parameters <= self.sizes[1]
            and self.lengths[0] <= tokens <= self.lengths[1]
        )

    def loss(self, parameters: float, tokens: float) -> float:
        """Return the loss of a model of `parameters` after `tokens`."""
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta


# of Chinchilla's 400 models
_PUBLISHED: dict = {'sizes': (70e6, 16e9), 'lengths': (5e9, 500e9)}
LAWS = {
    # Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022, approach 3
    'hoffmann': Law('hoffmann', 1.69, 406.4, 410.7, 0.34, 0.28, **_PUBLISHED),
    # Besiroglu et al., "Chinchilla Scaling: A replication attempt", 2024
    'besiroglu': Law('besiroglu', 1.8172, 482.01, 2085.43, 0.3478, 0.3658, **_PUBLISHED),
}


def read_law(text: str) -> Law:
    """Return the law of that name, or of a file that --fit wrote. Raises UserError."""
    if text in LAWS:
        return LAWS[text]
    try:
        with open(text, encoding='utf-8') as f:
            read = json.load(f)
        e, a, b, alpha, beta = (float(read[key]) for key in CONSTANTS)
        sizes, lengths = (
            (float(low), float(high)) for low, high in (read['sizes'], read['lengths'])
        )
        law = Law(text, e, a, b, alpha, beta, sizes, lengths)
    except FileNotFoundError:
        raise UserError(
            f'--law={text}: no such law and no such file: type {" or ".join(LAWS)}, or a file that'
            ' --fit wrote'
        ) from None
    except (ValueError, LookupError, TypeError, OSError, RecursionError):
        raise UserError(
            f'--law={text} is no file of --fit: a JSON object with {", ".join(CONSTANTS)}, sizes'
            ' and lengths'
        ) from None
    sound = all(0 < getattr(law, name) < 1e9 for name in CONSTANTS) and max(alpha, beta) < 10
    if not sound or not all(0 <= low <= high for low, high in (sizes, lengths)):
        raise UserError(
            f'--law={text}: E, A and B must be above 0, alpha and beta from 0 to 10, sizes and'
            ' lengths ranges'
        )
    return law


@dataclass(frozen=True)
class Fit:
    """A law, for each constant its interval (5 % and 95 % of the resampled fits), and the largest
    deviation of a run from it, as a share of its loss.
    """

    law: Law
    intervals: dict[str, tuple[float, float]]
    largest_deviation: float


def fit(runs: Sequence[tuple[float, float, float]], resamples: int = 100, seed: int = 0) -> Fit:
    """Return the Fit of runs (parameters, tokens, loss): least Huber loss of log L from a grid of
    starts, and again on `resamples` sets of runs drawn with replacement.

    Raises UserError for too few runs, or runs that do not tell N from D.
    """
    points = torch.tensor(list(runs), dtype=torch.float64).reshape(-1, 3)
    if len(points) < LEAST_RUNS or min(len(set(points[:, i].tolist())) for i in (0, 1)) < 2:
        raise UserError(
            f'--fit has {len(points)} runs with an evaluation at their end, and needs at least'
            f' {LEAST_RUNS}, of at least two sizes and two numbers of tokens'
        )
    if not bool((points > 0).all()) or not bool(points.isfinite().all()):
        raise UserError('--fit needs runs whose parameters, tokens and losses are above 0')
    best = min((_descend(points, start) for start in _starts(points)), key=lambda found: found[0])
    draw = torch.Generator().manual_seed(seed)
    resampled = []
    for _ in range(resamples):
        rows = torch.randint(0, len(points), (len(points),), generator=draw)
        resampled.append(_constants(_descend(points[rows], best[1])[1]))
    sizes, lengths = ((column.min().item(), column.max().item()) for column in points.T[:2])
    e, a, b, alpha, beta = _constants(best[1])
    law = Law('fit', e, a, b, alpha, beta, sizes, lengths)
    edges = np.quantile(np.array(resampled), [0.05, 0.95], axis=0).T.tolist()
    deviation = max(abs(law.loss(n, d) / loss - 1) for n, d, loss in points.tolist())
    return Fit(law, {name: tuple(edge) for name, edge in zip(CONSTANTS, edges)}, deviation)


def _log_loss(theta, points):
    """Return log L at each of the points; theta (..., 5): log E, log A, log B, alpha, beta."""
    e, a, b, alpha, beta = theta.unsqueeze(-1).unbind(-2)
    n, d = points[:, 0].log(), points[:, 1].log()
    return torch.stack(
        [a - alpha * n, b - beta * d, e.expand(*theta.shape[:-1], len(n))]
    ).logsumexp(0)


def _misfit(theta, points):
    """Return the Huber loss of log L, summed over the points."""
    deviation = _log_loss(theta, points) - points[:, 2].log()
    return torch.nn.functional.huber_loss(
        deviation, torch.zeros_like(deviation), delta=HUBER_DELTA, reduction='none'
    ).sum(-1)


def _starts(points):
    """Return the eight best of a grid of (log E, log A, log B, alpha, beta)."""
    least = points[:, 2].min().log().item()
    axes = (
        [least + step for step in (-1.5, -0.5, -0.1)],
        [0.0, 5.0, 10.0, 15.0, 20.0],
        [0.0, 5.0, 10.0, 15.0, 20.0],
        [0.1, 0.3, 0.5, 1.0],
        [0.1, 0.3, 0.5, 1.0],
    )
    grid = torch.tensor(list(itertools.product(*axes)), dtype=torch.float64)
    return grid[_misfit(grid, points).argsort()[:8]]


def _descend(points, start):
    """Return (misfit, theta) where L-BFGS ends from `start`."""
    # Steps are taken around the mean of the runs, where the constants hardly depend on each other.
    n, d = points[:, 0].log().mean(), points[:, 1].log().mean()
    e, a, b, alpha, beta = start.tolist()
    centered = torch.tensor([e, a - alpha * n, b - beta * d, alpha, beta], dtype=torch.float64)
    centered.requires_grad_()

    def theta():
        return torch.stack(
            [
                centered[0],
                centered[1] + centered[3] * n,
                centered[2] + centered[4] * d,
                centered[3],
                centered[4],
            ]
        )

    search = torch.optim.LBFGS(
        [centered],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        history_size=20,
        line_search_fn='strong_wolfe',
    )

    def closure():
        search.zero_grad()
        value = _misfit(theta(), points) / HUBER_DELTA
        value.backward()
        return value

    search.step(closure)
    with torch.no_grad():
        found = theta()
        value = _misfit(found, points).item()
    return (value if math.isfinite(value) else math.inf), found


def _constants(theta):
    """Return (E, A, B, alpha, beta)."""
    return [*theta[:3].exp().tolist(), *theta[3:].tolist()]
