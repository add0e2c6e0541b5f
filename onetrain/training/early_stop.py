"""When to stop a run whose validation loss no longer improves."""

import math
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from onetrain.distributed import collectives
from onetrain.logs.run_json import read_records

if TYPE_CHECKING:
    from onetrain.training.session import Session
    from train import Config


class Patience:
    """Counts evaluations since the best one.

    most: after so many without an improvement is_over() is true; 0: never. losses: of the
    evaluations that were made before; say: told when it is over.
    """

    def __init__(self, most: int, losses: Iterable[float], say: Callable):
        self.most, self.best, self.since, self.say = most, math.inf, 0, say
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> None:
        """Take up the validation loss of an evaluation."""
        better = loss < self.best
        self.best = loss if better else self.best
        self.since = 0 if better else self.since + 1
        if self.since == self.most > 0:
            self.say(
                f'the validation loss has not improved in {self.most} evaluations: the run ends'
                ' here (early_stop_patience; 0 goes on)'
            )

    def is_over(self) -> bool:
        """Return whether to stop."""
        return 0 < self.most <= self.since


def open_patience(c: 'Config', session: 'Session') -> Patience:
    """Return the Patience of a run, which knows the evaluations in its log."""

    def losses():
        path = f'{session.log.path}.jsonl'
        if not c.early_stop_patience or not os.path.isfile(path):
            return []
        found = (
            record.get('val_loss') for record in read_records(path) if record['type'] == 'eval'
        )
        return [math.inf if loss is None else loss for loss in found]

    known = collectives.broadcast_from_main(losses, session.world)
    return Patience(c.early_stop_patience, known, session.log.say)
