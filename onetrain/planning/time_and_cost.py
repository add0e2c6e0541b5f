"""How long a run takes on given GPUs, and what it costs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from onetrain.config import UserError
from onetrain.logs.read_log import load_run, number

if TYPE_CHECKING:
    from onetrain.logs.read_log import Run
    from onetrain.planning.machines import Machine
    from train import Config

ASSUMED_MFU = (0.3, 0.4, 0.5)
_FORWARD = 1 / 3  # of the FLOPs of training


@dataclass(frozen=True)
class Speed:
    """What all GPUs together do.

    mfu: the share of their peak that it is, None where that is not known; source: 'assumed',
    'given' or where it was measured; evaluation_s: seconds of an evaluation, where it was measured.
    """

    flops_per_sec: float
    mfu: float | None
    source: str
    evaluation_s: float | None = None

    def describe(self) -> str:
        """Return such as '40 % MFU, assumed'."""
        return self.source if self.mfu is None else f'{100 * self.mfu:.3g} % MFU, {self.source}'


@dataclass(frozen=True)
class Estimate:
    """A run at a Speed: tokens, hours of training and evaluations, dollars (None: no price)."""

    speed: Speed
    tokens: float
    tokens_per_sec: float
    hours: float
    dollars: float | None


def assumed_speeds(machine: 'Machine', dtype: str, mfu: float | None) -> list[Speed]:
    """Return the speeds of `machine` at `mfu`, or at each of ASSUMED_MFU; [] where its peak is not
    known.
    """
    peak = machine.peak(dtype)
    if peak is None:
        return []
    if mfu is not None:
        return [Speed(peak * mfu, mfu, 'given')]
    return [Speed(peak * share, share, 'assumed') for share in ASSUMED_MFU]


def measured_speed(path: str, machine: 'Machine | None', dtype: str) -> Speed:
    """Return the speed that the log of a run measured, the median of its last half: its MFU on
    other GPUs where `machine` is given, else what it did where it ran. Raises UserError.
    """
    run = load_run([path])
    rates = _last_half(run.columns['tokens_per_sec'])
    startup = run.startup_info
    per_token = number((startup.get('model') or {}).get('flops_per_token'))
    if not len(rates) or not per_token > 0:
        raise UserError(
            f'--like={path} has no iteration with tokens_per_sec, or no flops_per_token'
        )
    achieved = float(np.median(rates)) * per_token
    if machine is None:
        return Speed(achieved, None, f'as measured in {path}', evaluation_seconds(run))
    shares = _last_half(run.columns['mfu_percent'])
    peak = machine.peak(dtype)
    if not len(shares) or peak is None:
        raise UserError(
            f'--like={path} measured no MFU that {machine.describe()} could have: leave --gpus'
            ' out, for the machine that it ran on, or type --mfu'
        )
    share = float(np.median(shares)) / 100
    return Speed(peak * share, share, f'as in {path}')


def _last_half(values):
    """Return what is measured in the last half of the values of a log."""
    values = values[len(values) // 2 :]
    return values[np.isfinite(values) & (values > 0)]


def evaluation_seconds(run: 'Run') -> float | None:
    """Return what an evaluation of a run took, with the checkpoint before it: the median of what
    passed beside the iterations where there was one. None where that cannot be seen.
    """
    iters, wall = run.iters, run.columns['wall_s']
    beside = np.diff(wall) - np.diff(iters) * run.column('time_ms')[1:] / 1e3
    # an evaluation at 100 comes before iteration 101
    numbers = [
        np.sum((run.eval_iters >= a) & (run.eval_iters < b)) for a, b in zip(iters, iters[1:])
    ]
    each = [gap / n for gap, n in zip(beside, numbers) if n and np.isfinite(gap) and gap > 0]
    return float(np.median(each)) if each else None


def evaluation_share(
    c: 'Config', speed: Speed, flops_per_token: float, batch_size: int, tokens_per_iter: float
) -> float:
    """Return the time of the evaluations as a share of that of training: as was measured, else
    that of forward passes over eval_iters batches of both splits.
    """
    if speed.evaluation_s is not None:
        rate = speed.flops_per_sec / flops_per_token
        return speed.evaluation_s * rate / (c.eval_interval * tokens_per_iter)
    tokens = 2 * c.eval_iters * batch_size * c.block_size
    return _FORWARD * tokens / (c.eval_interval * tokens_per_iter)


def estimate(
    speed: Speed,
    flops_per_token: float,
    *,
    evaluations: float,
    price_per_hour: float | None,
    tokens: float | None = None,
    hours: float | None = None,
) -> Estimate:
    """Return the Estimate of a run of `tokens`, or of `hours`.

    evaluations: of evaluation_share(); price_per_hour: dollars for all GPUs.
    """
    rate = speed.flops_per_sec / flops_per_token
    if tokens is None:
        assert hours is not None
        tokens = hours * 3600 * rate / (1 + evaluations)
    else:
        hours = tokens * (1 + evaluations) / rate / 3600
    dollars = None if price_per_hour is None else hours * price_per_hour
    return Estimate(speed, tokens, rate, hours, dollars)
