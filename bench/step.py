"""train.py's step on one process, in pieces that can be timed, for any recipe; and what its matmuls
alone take. What bench/throughput.py and bench/peers.py measure.
"""

# first, so that a Ctrl-C while libraries are imported ends this without a traceback
from onetrain.command_line import run_command  # noqa: F401

# isort: split
import dataclasses
import os
import statistics

import numpy as np
import torch

import train
from model import Model
from onetrain.data.order import order_of
from onetrain.data.token_file import TokenFileWriter, read_meta
from onetrain.distributed import processes
from onetrain.logs.terminal import Terminal
from onetrain.model_config import resolve_shape
from onetrain.ops import kernels
from onetrain.training import optim
from onetrain.training.batch_plan import ModelOptions, plan_batches
from onetrain.training.micro_step import CudaGraphStep, ForwardBackward
from onetrain.training.run_data import open_data
from onetrain.training.session import Session
from onetrain.training.start_point import StartPoint, TrainState

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# of a recipe, on one process and on random ids
ALONE = dict(init_from='scratch', use_fsdp=False, context_parallel=1, document_mask=False)


def write_noise(folder, vocab_size, tokens=2_000_000, tokenizer='none'):
    """A data set of random ids: speed does not depend on them, but for how experts are chosen.
    tokenizer: 'none', or 'bytes' with a vocab_size of 257.
    """
    draw = np.random.default_rng(0)
    with TokenFileWriter(
        folder, vocab_size=vocab_size, eot_id=None, tokenizer={'kind': tokenizer}, split='noise'
    ) as writer:
        writer.write('train', draw.integers(0, vocab_size, tokens))
        writer.write('val', draw.integers(0, vocab_size, tokens // 20))


def options_of(c):
    """Return the ModelOptions of a recipe in one process."""
    world, shape = processes.start(c.device), resolve_shape(dataclasses.asdict(c), c.vocab_size)
    dtype = kernels.precision(c.dtype, world.device, shape.n_embd)
    chosen = kernels.select_kernels(c, shape, world.device, dtype)[0]
    return ModelOptions(c, shape, chosen, None, dtype, world)


class Step:
    """c: train.Config; folder: a data set. run() makes an iteration as train.py does, whose loss is
    then last_loss; timed() the same in pieces.
    """

    def __init__(self, c, folder):
        self.world = world = processes.start(c.device)
        session = Session(world, None, Terminal(active=False))
        start = StartPoint(dataclasses.replace(c, dataset=folder, **ALONE))
        data = open_data(start, {}, ROOT, session)
        plan = plan_batches(start, data, session)
        self.device, self.dtype, self.shape = world.device, plan.options.dtype, data.shape
        self.autocast, self.accumulation = plan.autocast, plan.accumulation
        self.tokens, self.grad_clip, self.steps = plan.tokens_per_step, c.grad_clip, 0
        self.model = plan.model(world)
        _, self.train_model = train.build_model(start, plan, self.model, session)
        optimization = train.build_optimizer(plan.config, self.model, world)
        self.parameters, self.guard = optimization.parameters, optimization.guard
        self.optimizer = optimization.optimizer
        order = order_of(data.train, c.block_size, c.seed)
        self.loader = train.open_loader(plan, data, order, TrainState(0, 0, 0), world)
        self.micro_step = ForwardBackward(
            self.model,
            self.train_model,
            world,
            plan.autocast,
            optimization.scaler,
            1 / self.tokens,
            plan.accumulation,
        )
        if plan.config.use_cuda_graphs:
            self.micro_step = CudaGraphStep(self.micro_step)
            self.micro_step.prepare(
                [self.loader.next()[:2] for _ in range(2)],
                lambda: self.model.after_step(world, 0.0, None),
            )

    def data(self):
        self.x, self.y, _ = self.loader.next()

    def forward(self):
        with self.autocast:
            self.loss = self.train_model(self.x, self.y, reduction='sum') * (1 / self.tokens)

    def backward(self):
        self.loss.backward()

    def update(self, loss):
        self.steps += 1
        self.guard.step(
            self.optimizer, self.steps, loss, optim.clip_gradients(self.parameters, self.grad_clip)
        )
        self.micro_step.zero_grad()
        self.last_loss = loss

    def run(self):
        total = torch.zeros((), device=self.device)
        for number in range(self.accumulation):
            self.data()
            total += self.micro_step(self.x, self.y, number)
        self.update(total)

    def timed(self):
        """{'data', 'forward', 'backward', 'optimizer'}: seconds of one iteration, waiting for the
        device after each piece; forward and backward are one, 'graphs', where they are recorded.
        """
        if isinstance(self.micro_step, CudaGraphStep):
            parts = [
                part
                for number in range(self.accumulation)
                for part in (
                    ('data', self.data),
                    ('graphs', lambda number=number: self.micro_step(self.x, self.y, number)),
                )
            ]
        else:
            parts = [
                ('data', self.data),
                ('forward', self.forward),
                ('backward', self.backward),
            ] * self.accumulation
        parts.append(('optimizer', lambda: self.update(torch.zeros((), device=self.device))))
        seconds = {piece: 0.0 for piece, _ in parts}
        for piece, part in parts:
            started = kernels.synchronized_time(self.device)
            part()
            seconds[piece] += kernels.synchronized_time(self.device) - started
        return seconds


def matmuls(shape, tokens, dtype, device):
    """(seconds, FLOPs) of the matmuls of a micro-step in `dtype`, a torch dtype, forward and
    backward, one after the other; of dense linear layers, attention's scores are not among them.
    """
    counted, seconds, flops = {}, 0.0, 0
    for module in Model.on_meta(shape).modules():
        if isinstance(module, torch.nn.Linear):
            counted[tuple(module.weight.shape)] = counted.get(tuple(module.weight.shape), 0) + 1
    for (outputs, inputs), times in counted.items():
        x, w, g = (
            torch.randn(size, dtype=dtype, device=device)
            for size in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        )
        for work in (lambda: x @ w.T, lambda: g @ w, lambda: g.T @ x):
            # so many that waiting for a GPU is no part of it
            found, calls = [], 1 if torch.device(device).type == 'cpu' else 10
            for _ in range(4):
                started = kernels.synchronized_time(device)
                for _ in range(calls):
                    work()
                found.append((kernels.synchronized_time(device) - started) / calls)
            seconds += times * statistics.median(found[1:])
            flops += times * 2 * tokens * inputs * outputs
    return seconds, flops


def device_of(c):
    return torch.device(c.device or ('cuda' if torch.cuda.is_available() else 'cpu'))


def vocabulary_of(c):
    """The size that the recipe, its data set where that has been prepared, or its preset says."""
    known = read_meta(os.path.join(ROOT, 'data', c.dataset)).get('vocab_size')
    return resolve_shape(dataclasses.asdict(c), c.vocab_size or known or 50304).vocab_size


def config_of(argv):
    """train.Config of a recipe and --key=value."""
    return train.resolve(train.Config, argv, train.ALIASES)[0]
