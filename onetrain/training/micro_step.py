"""A micro-step, forward and backward: as it is written, or recorded once as a CUDA graph and
replayed.
"""

import functools
import gc
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onetrain.config import UserError
from onetrain.data.loader import inputs_and_targets, read_batch
from onetrain.distributed import collectives, layouts
from onetrain.logs.run_log import now

if TYPE_CHECKING:
    from model import Model
    from onetrain.data.order import Order
    from onetrain.distributed.processes import World
    from onetrain.evaluation.evaluator import Evaluator
    from onetrain.training.batch_plan import BatchPlan
    from onetrain.training.run_data import RunData
    from onetrain.training.session import Session
    from onetrain.training.start_point import TrainState


class ForwardBackward:
    """micro_step(x, y, number) adds the gradients of micro-step `number` (from 0) of an optimizer
    step to those of `model`.

    train_model: what training calls, from layouts.wrap(); autocast: context of the forward pass;
    scaler: torch's GradScaler; weight: what the sum of the losses is multiplied with; accumulation:
    micro-steps of an optimizer step, after the last of which ranks exchange gradients.
    """

    def __init__(
        self,
        model: 'Model',
        train_model: nn.Module,
        world: 'World',
        autocast: Any,
        scaler: Any,
        weight: float,
        accumulation: int,
    ):
        self.model = model
        self.train_model = train_model
        self.world = world
        self.autocast = autocast
        self.scaler = scaler
        self.weight, self.accumulation = weight, accumulation

    def __call__(self, x: torch.Tensor, y: torch.Tensor, number: int) -> torch.Tensor:
        """x, y: (B, T) int64 on the device. Returns the weighted loss, a scalar fp32 tensor on the
        device that is good until the next call.
        """
        with layouts.gradient_sync_context(
            self.train_model, number == self.accumulation - 1, self.world
        ):
            with self.autocast:
                loss = self.train_model(x, y, reduction='sum') * self.weight
            self.scaler.scale(loss).backward()
        return loss.detach()

    def zero_grad(self) -> None:
        """Forget the gradients, after an optimizer step or instead of one."""
        self.model.zero_grad(set_to_none=True)


def compile_ahead(micro_step: Callable, evaluate: Callable) -> tuple:
    """Run all that is compiled once, so that the first iteration takes as long as the others and no
    signal has to wait later; where the compiler fails, everything runs without it.

    micro_step, evaluate: functions without arguments that do so. Returns (seconds, what went wrong
    or None). What they leave in the model is the caller's to forget.
    """
    error, before = None, time.perf_counter()
    try:
        micro_step()
        evaluate()
    except torch._dynamo.exc.TorchDynamoException as failure:
        error = ' '.join(str(failure).split())[:300]
        torch.compiler.set_stance('force_eager')
    return time.perf_counter() - before, error


def record_graph(work: Callable, pool: Any, stream: Any):
    """Return a CUDA graph of the kernels that work() launches, which it does not run.

    pool: that of another graph with which it is to share memory, or None; stream: on which work()
    was warmed up. Where DDP was made on another one, gradients would arrive outside of the
    recording.
    """
    gc.collect()  # what keeps an older graph of autograd alive keeps the streams of its nodes, too
    graph = torch.cuda.CUDAGraph()
    # from torch 2.13 on
    override = getattr(
        torch.autograd.graph, 'set_override_stale_capture_stream', lambda enabled: None
    )
    override(True)
    try:
        # other threads may copy checkpoints meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode='thread_local'):
            work()
    finally:
        override(False)
    return graph


class CudaGraphStep:
    """A ForwardBackward as CUDA graphs: launched at once, without Python's time between the
    kernels. It is called as that is, and computes the same bits.

    A graph reads and writes the same memory at every replay: x and y are copied to where it looks
    for them, and the gradients stay where they are. The first micro-step of an optimizer step has a
    graph of its own, which overwrites the gradients where the others add to them; so has one after
    which ranks exchange them. Dropout draws from torch's generator, which graphs advance.

    prepare() records. As graphs repeat without question what they were given, it then compares what
    they compute on two batches with what the plain step did.
    """

    def __init__(self, plain: 'ForwardBackward', record: Callable = record_graph):
        self.eager_step, self.record = plain, record
        self.graph_keys = [
            (number == 0, plain.world.ddp and number == plain.accumulation - 1)
            for number in range(plain.accumulation)
        ]
        self.graphs, self.losses = {}, {}

    def __call__(self, x: torch.Tensor, y: torch.Tensor, number: int):
        self._copy_inputs(x, y)
        self.graphs[self.graph_keys[number]].replay()
        return self.losses[self.graph_keys[number]]

    def _copy_inputs(self, x, y):
        self.x.copy_(x, non_blocking=True)
        self.y.copy_(y, non_blocking=True)

    def _eager(self, x, y, number):
        """Return what a graph is to repeat."""
        self._copy_inputs(x, y)
        return self.eager_step(self.x, self.y, number)

    def zero_grad(self):
        """Nothing: the first micro-step of the next optimizer step overwrites the gradients."""

    def prepare(self, batches: list[tuple], forget: Callable):
        """Record and compare. batches: two pairs (x, y); forget(): called after each trial, resets
        what a forward pass leaves in the model beside gradients. Returns the seconds that it took.

        Raises UserError on every rank where a step cannot be recorded, or its graphs do not
        repeat it.
        """
        before, world = time.perf_counter(), self.eager_step.world
        if batches[0][0].is_cuda and world.graph_stream is None:
            world.graph_stream = torch.cuda.Stream()
        # strides as those of a batch, or the compiler would begin anew for them, which a recording
        # does not survive
        self.x, self.y = (
            torch.empty_strided(
                tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device
            )
            for tensor in batches[0]
        )
        # as torch's documentation asks: libraries make their plans, DDP its buckets
        with layouts.on_graph_stream(world):
            for _ in range(11 if any(exchange for _, exchange in self.graph_keys) else 3):
                expected = self._trial(self._eager, self.eager_step.zero_grad, batches, forget)
            again = self._trial(self._eager, self.eager_step.zero_grad, batches, forget)
        if batches[0][0].is_cuda:
            torch.cuda.synchronize()
        self.eager_step.zero_grad()
        error = self._record_all()
        forget()
        if collectives.all_reduce_max(int(error is not None), self.eager_step.world):
            raise UserError(
                'use_cuda_graphs=True: the step cannot be recorded'
                f' ({error or "on another process"}): type --use_cuda_graphs=False'
            )
        found = self._trial(self, self.zero_grad, batches, forget)
        repeats = all(torch.equal(a, b) for a, b in zip(expected[0], again[0]))
        alike = (
            all(torch.equal(a, b) for a, b in zip(expected[0], found[0]))
            if repeats
            else torch.allclose(expected[1], found[1], rtol=0.01)
        )
        if collectives.all_reduce_max(int(not alike), self.eager_step.world):
            raise UserError(
                'use_cuda_graphs=True: the recorded step does not compute what the plain one does'
                f' (losses and norms of gradients {found[1].tolist()[:6]}, expected'
                f' {expected[1].tolist()[:6]}): type --use_cuda_graphs=False'
            )
        return time.perf_counter() - before

    def _record_all(self):
        """Record a graph for each kind of micro-step, in the order in which a step replays them,
        since they share memory. Returns what went wrong, or None.
        """
        pool = None
        for number, kind in enumerate(self.graph_keys):
            if kind not in self.graphs:
                try:
                    self.graphs[kind] = self.record(
                        functools.partial(self._work, kind, number),
                        pool,
                        self.eager_step.world.graph_stream,
                    )
                except RuntimeError as failure:
                    # what ended the recording, rather than that it ended
                    failure = failure.__context__ or failure
                    return ' '.join(str(failure).split())[:300]
                pool = pool or self.graphs[kind].pool()
        return None

    def _work(self, kind, number):
        if kind[0]:
            self.eager_step.zero_grad()
        self.losses[kind] = self.eager_step(self.x, self.y, number)

    def _trial(self, call, zero_grad, batches, forget):
        """Return two optimizer steps' worth of micro-steps on these batches in turn: ([bits of the
        losses and gradients, summed up], their float64 losses and norms).
        """
        bits, values = [], []
        for start in range(2):
            zero_grad()
            torch.manual_seed(start)  # dropout
            for number in range(len(self.graph_keys)):
                loss = call(*batches[(start + number) % 2], number)
                bits.append(loss.clone())
                values.append(loss.double())
            gradients = [p.grad for p in self.eager_step.model.parameters()]
            bits += [g.contiguous().view(torch.int32).sum() for g in gradients]
            values += [g.double().norm() for g in gradients]
        zero_grad()
        forget()
        return bits, torch.stack(values)


def compile_and_capture(
    plan: 'BatchPlan',
    data: 'RunData',
    order: 'Order',
    state: 'TrainState',
    micro_step: 'ForwardBackward',
    evaluator: 'Evaluator',
    session: 'Session',
) -> 'ForwardBackward | CudaGraphStep':
    """Compile, and record the CUDA graphs, on the first tokens of the data, which changes no
    weight; returns the micro-step to train with.
    """
    c, world, log, model = plan.config, session.world, session.log, micro_step.model
    # as the loader gives it out: strides count too
    batches = [
        inputs_and_targets(
            read_batch(
                data.train,
                order.starts(state.position + i * c.batch_size, c.batch_size),
                c.block_size,
                world.ring,
            ).to(world.device)
        )
        for i in range(2)
    ]

    def forget_routing():
        model.after_step(world, 0.0, None)

    if c.compile:
        log.say('compiling')
        with session.terminal.doing('compiling'):
            x, y = batches[0]
            seconds, error = compile_ahead(
                lambda: micro_step(x, y, plan.accumulation - 1), evaluator.one_batch
            )
        micro_step.zero_grad()
        forget_routing()
        log.event('compile', seconds=seconds, error=error, timestamp=now())
        failed = f'COMPILING FAILED, so everything runs without: {error}'
        log.say(failed if error else f'compiled in {seconds:.1f} s')
    if c.use_cuda_graphs:
        graphs = CudaGraphStep(micro_step)
        seconds = graphs.prepare(batches, forget_routing)
        log.say(f'CUDA graphs recorded in {seconds:.1f} s: two batches gave what they give without')
        gc.collect()
        return graphs
    gc.collect()
    return micro_step
