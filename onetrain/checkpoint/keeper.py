"""When checkpoints are saved, what became of them, and the losses noted beside them."""

import math
import platform
import time
from typing import TYPE_CHECKING

import torch

from onetrain import __version__, signals
from onetrain.checkpoint import resume, store
from onetrain.distributed import collectives
from onetrain.logs.run_log import now

if TYPE_CHECKING:
    from model import Model
    from onetrain.checkpoint.async_writer import Saver
    from onetrain.logs.run_log import RunLog
    from onetrain.signals import StopRequest
    from onetrain.training.optim import Optimization
    from onetrain.training.start_point import TrainState
    from train import Config


class CheckpointKeeper:
    """Saves the run, one checkpoint at a time, and keeps the best validation loss.

    state: TrainState, of which it updates best_val_loss; optimization: optim.Optimization; facts:
    what of state.json stays as it is in a run; lineage: of its checkpoints. failed: what kept the
    last save from succeeding, or None; saved_step: of it, -1 for none.
    """

    def __init__(
        self,
        config: 'Config',
        state: 'TrainState',
        model: 'Model',
        optimization: 'Optimization',
        saver: 'Saver',
        facts: dict,
        lineage: str,
        log: 'RunLog',
        stop: 'StopRequest',
    ):
        self.config, self.state, self.saver = config, state, saver
        self.model, self.optimization = model, optimization
        self.facts, self.lineage, self.log = facts, lineage, log
        self.uploader, self.stop, self.world = saver.uploader, stop, saver.world
        self.saved_step = -1
        self.failed: str | None = None
        self.evaluated: tuple = -1, None  # (step, losses)
        saver.reserve(optimization.tensors(model))

    def due(self, ending: bool) -> bool:
        """Return whether to save at this step. ending: whether it is the last, whose weights are
        kept.
        """
        c, step = self.config, self.state.step
        wanted = ending or c.save_interval and step % c.save_interval == 0
        given_up = ending and bool(self.stop.requested_code)
        return bool(wanted) and step not in (self.saved_step, 0) and not given_up

    def save(self) -> None:
        """Wait for the previous save, then start this one."""
        state, best = self.state, self.state.best_val_loss
        record = {
            **self.facts,
            'branch': self.lineage,
            'position': state.position,
            'tokens': state.tokens,
            'config': resume.config_record(self.config),
            'threads': torch.get_num_threads(),
            'best_val_loss': None if best == math.inf else best,
            'scaler': self.optimization.scaler.state_dict(),
            'time': now(),
            'world_size': self.world.size,
            'versions': {
                'onetrain': __version__,
                'torch': torch.__version__,
                'python': platform.python_version(),
            },
        }
        due = time.perf_counter()
        self.report_save(wait=True)  # one save at a time
        self.saver.start(state.step, self.optimization.tensors(self.model), record, due)
        self.saved_step = state.step

    def report_save(self, wait: bool = False) -> None:
        """Report the save in flight if it is done, or with `wait` once it is, and the uploads."""
        outcome = self.saver.wait() if wait else self.saver.poll()
        if outcome is not None:
            self.failed = outcome.error
            if outcome.error:
                self._report_failure(outcome)
            else:
                self._report_success(outcome)
                self.attach_losses(outcome.step)
        self.report_uploads()

    def report_uploads(self) -> None:
        """Log what the uploader did since the last call."""
        for line in self.uploader.take_messages() if self.uploader else ():
            self.log.say(line)

    def _report_failure(self, outcome):
        self.log.event('save_failed', iter=outcome.step, error=outcome.error, timestamp=now())
        rest = 'The older ones are as they were; the next try is at the next interval'
        if outcome.not_finite:
            rest = 'It would be of no use; the older ones are as they were'
            self.stop.requested_code = signals.NOT_FINITE
        self.log.say(f'CHECKPOINT NOT SAVED at iter {outcome.step}: {outcome.error}. {rest}')
        self.saved_step = -1 if self.saved_step == outcome.step else self.saved_step

    def _report_success(self, outcome):
        self.log.event(
            'checkpoint',
            iter=outcome.step,
            val_loss=None,
            path=outcome.path,
            timestamp=now(),
            stall_ms=1000 * outcome.stall_s,
            total_ms=1000 * outcome.total_s,
            bytes=outcome.size,
        )
        stalled = outcome.stall_s >= 0.1
        waited = f', training waited {outcome.stall_s:.1f} s' if stalled else ''
        self.log.say(f'saved {outcome.path}{waited}')
        for note in outcome.notes:
            self.log.say(f'Note: {note}')

    def update_best(self, losses: dict) -> bool:
        """Remember the losses of this step; returns whether they are the best so far."""
        self.evaluated = self.state.step, {**losses, 'data': self.facts['windows']}
        best = losses['val'] < self.state.best_val_loss
        if best:
            self.state.best_val_loss = losses['val']
        return best

    def attach_losses(self, step: int) -> None:
        """Write the losses of `step` beside its checkpoint, once both are there."""
        if self.world.is_main and self.evaluated[0] == step:
            path = store.path_of(self.config.out_dir, step)
            try:
                store.record_evaluation(path, self.evaluated[1])
            except OSError as error:
                self.log.say(
                    f'the losses at iter {step} could not be noted beside its checkpoint'
                    f' ({error.strerror}): it will not count as the best'
                )
            if self.uploader:
                self.uploader.add(step)

    def rewind(self, step: int, position: int, tokens: int):
        """Go back to an earlier step of this run, whose weights the model has. Copies of what was
        saved since then come before what will be saved.
        """
        self.lineage = store.new_lineage([self.lineage])
        self.state.step, self.state.position, self.state.tokens = step, position, tokens

    def finish_copying(self, stop_code: int) -> bool:
        """Wait until all is copied, or for as long as may be; returns whether it is."""
        how = (5,) if stop_code else (600, self.stop.code)
        # in rounds: no rank waits for another for longer
        while (
            done := collectives.broadcast_from_main(lambda: self.uploader.finish(*how), self.world)
        ) is None:
            self.report_uploads()
        self.report_uploads()
        return done
