"""What the log and the terminal say of the iterations."""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from onetrain import flops
from onetrain.distributed import collectives, layouts
from onetrain.distributed.stragglers import Stragglers
from onetrain.logs.terminal import progress_line
from onetrain.ops import kernels
from onetrain.training.profiler import Profiler
from onetrain.training.startup_report import memory_gb

if TYPE_CHECKING:
    from model import Model
    from onetrain.data.loader import TrainLoader
    from onetrain.distributed.processes import World
    from onetrain.training.batch_plan import BatchPlan
    from onetrain.training.optim import NonFiniteGuard
    from onetrain.training.session import Session
    from onetrain.training.start_point import TrainState
    from train import StepResult


class IterationLog:
    """Times the iterations between two lines of the log, and writes them.

    record() is called on every rank; of a step that it is not called for, count() alone keeps the
    time. What runs between iterations is left out of their time within excluded().

    utilization(tokens per second): the `mfu` object of the log.
    """

    def __init__(
        self,
        plan: 'BatchPlan',
        model: 'Model',
        train_model: nn.Module,
        loader: 'TrainLoader',
        guard: 'NonFiniteGuard',
        utilization: Callable,
        session: 'Session',
        start_step: int,
    ):
        self.config, self.plan, self.model, self.loader = plan.config, plan, model, loader
        self.train_model, self.log = train_model, session.log
        self.world, self.terminal = session.world, session.terminal
        self.start_step = start_step
        self.stragglers = Stragglers(self.world, self.log.say)
        self.guard, self.utilization = guard, utilization
        self.last_counts = guard.counts()
        self.interval_start, self.interval_steps, self.warming_up = time.perf_counter(), 0, True
        self.first_step: tuple | None = None  # (step, time) of the first iteration
        profile = self.config.profile if self.world.is_main else None
        self.profiler = Profiler(profile, self.config.out_dir, self.log.say)
        self.profiler.after(start_step)

    @contextlib.contextmanager
    def excluded(self, device: torch.device | None = None):
        """Exclude the enclosed time from the iterations' timing; device: to synchronize first."""
        began = kernels.synchronized_time(device) if device is not None else time.perf_counter()
        yield
        self.interval_start += time.perf_counter() - began

    def count(self, step: int, waited: float) -> None:
        """Count the iteration `step`; waited: seconds blocked on a checkpoint, excluded from
        timing.
        """
        self.interval_steps += 1
        self.interval_start += waited
        # the time that is left is estimated without the first iteration, which warms up
        self.first_step = self.first_step or (step, time.monotonic())
        self.terminal.advance(step)
        self.profiler.after(step)

    def due(self, step: int, measured: bool) -> bool:
        """Return whether to record this step. measured: whether its gradients were."""
        c = self.config
        return step % c.log_interval == 0 or measured or step in (self.start_step + 1, c.max_iters)

    def record(self, state: 'TrainState', result: 'StepResult') -> dict[str, int]:
        """Log iteration state.step, for which it waits for the device; returns guard.counts().

        result: StepResult.
        """
        c, step = self.config, state.step
        loss = result.loss.item()  # waits for the device
        used = memory_gb(self.world.device)
        waited = {} if c.use_cuda_graphs else layouts.gradient_wait(self.train_model)
        table = collectives.all_gather_numbers(
            {**used, 'data_wait_s': self.loader.wait_s / self.interval_steps, **waited}, self.world
        )
        worst = {key: max(values) for key, values in table.items()}
        seconds = (time.perf_counter() - self.interval_start) / self.interval_steps
        rate = self.plan.tokens_per_step / seconds
        mfu = None if self.warming_up else self.utilization(rate)
        norm = result.grad_norm.item()
        statistics = {key: value.item() for key, value in result.statistics.items()}
        bad, moe = self.guard.counts(), self._routing(step, result.routing)
        left, wall_s = self._seconds_left(step), self.log.wall_s()
        spent = self.log.cost_before, self.log.wall_before
        cost = costs(c.price_per_hour, wall_s, left, *spent)
        more = [f'load {moe["load_score"]:.0f}'] if moe else []
        more += [f'${cost["cost"]:,.2f}'] if cost else []
        self.log.event(
            'iter',
            iter=step,
            loss=loss,
            lr=result.lr,
            tokens_seen=state.tokens,
            time_ms=1000 * seconds,
            tokens_per_sec=rate,
            data_wait_ms=1000 * worst['data_wait_s'],
            comm_wait_ms=1000 * worst['comm_wait_s'] if 'comm_wait_s' in worst else None,
            **self.stragglers.of(table, seconds),
            wall_s=wall_s,
            left_s=left,
            **cost,
            mfu=mfu and {key: mfu[key] for key in flops.VARIES},
            memory={key: worst[key] for key in used},
            gradients={'global_norm': norm, **statistics},
            skipped={'bad': bad['bad'], 'spikes': bad['spikes']},
            **({'moe': moe} if moe else {}),
        )
        self.log.say(
            progress_line(
                step,
                c.max_iters,
                loss,
                result.lr,
                norm,
                rate,
                mfu and mfu['mfu_percent'],
                left,
                more,
                self.terminal.width(),
            )
        )
        self._tell_skipped(bad)
        return bad

    def reset_interval(self) -> None:
        """Begin the interval of the next line."""
        self.interval_start, self.interval_steps, self.warming_up = time.perf_counter(), 0, False
        self.loader.wait_s = 0.0

    def _routing(self, step, routing):
        """Return the `moe` object of the log, with the share of each expert every
        expert_log_interval iterations, met or passed since the last line; None for a dense model.
        """
        if routing is None:
            return None
        every, ends = self.config.expert_log_interval, (self.start_step + 1, self.config.max_iters)
        shares = every and (step in ends or step // every > (step - self.interval_steps) // every)
        return self.model.routing_report(routing, self.plan.tokens_per_step, bool(shares))

    def _seconds_left(self, step):
        first, at = self.first_step
        if step == first:
            return None
        return (time.monotonic() - at) / (step - first) * (self.config.max_iters - step)

    def _tell_skipped(self, bad):
        c = self.config
        for key, what in (
            ('bad', 'loss or gradient not finite'),
            ('spikes', f'gradient norm above {c.spike_factor:g} times its median'),
        ):
            skipped = bad[key] - self.last_counts[key]
            if skipped > 0:
                self.log.say(
                    f'SKIPPED {skipped} updates since the last line ({what}), {bad[key]} in all'
                )
        self.last_counts = bad


def costs(
    price_per_hour: float,
    seconds: float,
    left: float | None,
    cost_before: float = 0.0,
    seconds_before: float = 0.0,
) -> dict:
    """Return {'cost': dollars so far, 'cost_total': of the whole run}, {} without a price.

    seconds: that the run has trained, over all its resumptions; left: None where not known;
    cost_before, seconds_before: when it was last resumed.
    """
    if not price_per_hour:
        return {}
    cost = cost_before + price_per_hour * (seconds - seconds_before) / 3600
    return {
        'cost': cost,
        'cost_total': None if left is None else cost + price_per_hour * left / 3600,
    }


def mfu_function(plan: 'BatchPlan', model: 'Model', world: 'World') -> Callable:
    """Return a function of tokens per second that gives the `mfu` object of the log."""
    return functools.partial(
        flops.utilization,
        model.flops(),
        device_name=world.gpu_name,
        dtype=plan.config.dtype,
        num_devices=world.size,
        architecture=plan.options.shape.describe(),
    )
