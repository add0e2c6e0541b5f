"""Losses over the fixed evaluation windows, and scores of multiple-choice tasks."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from onetrain.data.loader import evaluation_batches, evaluation_identity, evaluation_length
from onetrain.distributed import collectives, layouts
from onetrain.evaluation import multiple_choice
from onetrain.ops.cross_entropy import IGNORE

if TYPE_CHECKING:
    from model import Model
    from onetrain.training.batch_plan import BatchPlan
    from onetrain.training.run_data import PromptsAndTasks, RunData
    from onetrain.training.session import Session


class Evaluator:
    """Measures `model` on both splits of `data` (RunData) when it is called, the same on every
    rank.

    eval_model: what evaluation calls, from layouts.wrap(); plan: BatchPlan; prompts_and_tasks: of
    run_data.
    """

    def __init__(
        self,
        plan: 'BatchPlan',
        data: 'RunData',
        prompts_and_tasks: 'PromptsAndTasks',
        model: 'Model',
        eval_model: nn.Module,
        session: 'Session',
    ):
        self.config, self.autocast = plan.config, plan.autocast
        self.data, self.prompts_and_tasks = data, prompts_and_tasks
        self.model, self.eval_model = model, eval_model
        self.world, self.terminal = session.world, session.terminal
        self.agreement, self.stop = session.agreement, session.stop
        c = self.config
        self.windows_hash = evaluation_identity(data.val, c)  # losses on others are not comparable
        self.batches = sum(
            evaluation_length(file, c.block_size, c.batch_size, c.eval_iters, self.world.data_size)
            for file in (data.train, data.val)
        )

    def __call__(self) -> dict | None:
        """Return {'train': loss, 'val': loss}, None if the run is to stop.

        A mixture adds 'sources': {name: loss of val}, and tasks 'tasks': their scores.
        """
        with (
            layouts.forward_only(self.eval_model),
            torch.no_grad(),
            self.terminal.doing('evaluating', self.batches) as work,
        ):
            losses = {}
            for split, file in (('train', self.data.train), ('val', self.data.val)):
                total = self._total(file, work)
                if total is None:
                    return None
                losses[split] = (total[:, 0].sum() / total[:, 1].sum()).item()
            if len(total) > 1:
                sums = zip(self.data.sources, total.tolist())
                losses['sources'] = {name: loss / count for name, (loss, count) in sums if count}
            if self.prompts_and_tasks.tasks:
                losses['tasks'] = self._scores()
                if losses['tasks'] is None:
                    return None
        return losses

    def _total(self, file, work):
        """Sum up (loss, targets) of each source, (sources, 2) float64; None if the run is to
        stop.
        """
        c, world = self.config, self.world
        total = torch.zeros(len(self.data.sources), 2, dtype=torch.float64, device=world.device)
        batches = evaluation_batches(
            file,
            c.block_size,
            c.batch_size,
            c.eval_iters,
            world.data_rank,
            world.data_size,
            world.ring,
        )
        for x, y, source in batches:
            if self.agreement.begin(self.stop.code()):
                return None
            if world.device.type == 'cuda':  # from pinned memory, so that nothing waits for copies
                x, y = x.pin_memory(), y.pin_memory()
            x, y = (part.to(world.device, non_blocking=True) for part in (x, y))
            with self.autocast:
                loss = self.eval_model(x, y, reduction='sum')
            total[source] += torch.stack([loss.double(), (y != IGNORE).sum().double()])
            if self.agreement.end():
                return None
            work.done += 1
        return collectives.sum_over_ranks(total, world)

    def _scores(self):
        world = self.world
        with self.autocast:
            return multiple_choice.evaluate(
                self.prompts_and_tasks.tasks,
                self.model,
                self.config.batch_size,
                world.device,
                lambda values: collectives.sum_over_ranks(values, world),
                world.rank,
                world.size,
                lambda: collectives.all_reduce_max(self.stop.code(), world),
            )

    def one_batch(self) -> None:
        """Compute the loss of a single batch, for the compiler to see an evaluation."""
        c, world = self.config, self.world
        batches = evaluation_batches(
            self.data.train, c.block_size, c.batch_size, 1, ring=world.ring
        )
        x, y = (part.to(world.device) for part in next(batches)[:2])
        with layouts.forward_only(self.eval_model), torch.no_grad(), self.autocast:
            self.eval_model(x, y, reduction='sum')
