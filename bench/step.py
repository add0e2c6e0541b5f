"""train.py's step on one process, in pieces that can be timed, for any recipe; and what its matmuls
alone take. What bench/throughput.py and bench/peers.py measure.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
# First: a Ctrl-C while libraries are imported ends the process quietly
from engine.command_line import run_command  # noqa: E402, F401

# isort: split

import dataclasses  # noqa: E402
import statistics  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402
from data.tokenfile import TokenFileWriter, read_meta  # noqa: E402
from engine import checks, kernels, optim, parallel  # noqa: E402
from engine.dataset import open_dataset  # noqa: E402
from engine.loader import TrainLoader, order_of  # noqa: E402
from engine.loss import choose_chunk  # noqa: E402
from engine.micro_step import CudaGraphStep, ForwardBackward  # noqa: E402
from model import Model  # noqa: E402
from presets import resolve_shape  # noqa: E402


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


def model_settings(c, device):
    """Arguments of Model for a recipe, as train.py has them for one process."""
    dtype, shape = (
        kernels.precision(c.dtype, device),
        resolve_shape(dataclasses.asdict(c), c.vocab_size),
    )
    return dict(
        **kernels.select_kernels(c, shape, device, dtype)[0],
        config=shape,
        dropout=c.dropout,
        activation_checkpointing=c.activation_checkpointing,
        loss_chunk=choose_chunk(
            c.loss_chunk,
            c.batch_size * c.block_size,
            shape.vocab_size,
            device.type,
            dtype,
            c.compile,
        )[0],
    )


class Step:
    """c: train.Config; folder: a data set. run() makes an iteration as train.py does, whose loss is
    then last_loss; timed() the same in pieces.
    """

    def __init__(self, c, folder):
        self.world = parallel.start(c.device)
        self.device = device = self.world.device
        self.dtype = kernels.precision(c.dtype, device)
        self.shape = resolve_shape(dataclasses.asdict(c), c.vocab_size)
        kernels.set_deterministic(c.deterministic)
        settings = model_settings(c, device)
        self.model = Model.on_meta(**settings).allocate(device)
        self.model.init_weights(c.seed)
        self.accumulation = checks.accumulation_steps(c, 1)
        _, self.train_model = parallel.wrap(
            self.model, self.world, c.compile, self.accumulation, c.use_cuda_graphs
        )
        self.parameters, self.grad_clip = list(self.model.parameters()), c.grad_clip
        self.optimizer = optim.build_optimizer(
            self.model.named_parameters(),
            matrices=self.model.matrices() if c.optimizer == 'muon' else (),
            momentum=c.muon_momentum,
            learning_rate=c.learning_rate,
            betas=(c.beta1, c.beta2),
            weight_decay=c.weight_decay,
            device_type=device.type,
        )
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.guard = optim.NonFiniteGuard(self.parameters, scaler, 3)
        self.autocast = kernels.autocast(device.type, self.dtype)
        file = open_dataset(folder, ROOT)[0]
        self.loader = TrainLoader(
            file,
            order_of(file, c.block_size, c.seed),
            batch_size=c.batch_size,
            rank=0,
            world_size=1,
            position=0,
            device=device,
        )
        self.steps, self.tokens = 0, c.batch_size * c.block_size * self.accumulation
        self.micro_step = ForwardBackward(
            self.model,
            self.train_model,
            self.world,
            self.autocast,
            scaler,
            1 / self.tokens,
            self.accumulation,
        )
        if c.use_cuda_graphs:
            self.micro_step = CudaGraphStep(self.micro_step)
            self.micro_step.prepare(
                [self.loader.next()[:2] for _ in range(2)],
                lambda: self.model.after_step(self.world, 0.0, None),
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
