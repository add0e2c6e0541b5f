"""How a step is computed: kernels, micro-steps, and the memory that they will take."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model import Model
from onetrain import cpu
from onetrain.distributed import collectives, processes
from onetrain.model_config import ModelConfig
from onetrain.ops import fp8, kernels
from onetrain.ops.cross_entropy import choose_chunk, eager_chunk
from onetrain.training import memory, validate

if TYPE_CHECKING:
    from onetrain.distributed.processes import World
    from onetrain.training.memory import Prediction, StepMemory
    from onetrain.training.run_data import RunData
    from onetrain.training.session import Session
    from onetrain.training.start_point import StartPoint
    from train import Config

# parameters, elements of activations: no prediction is made for smaller models
MIN_SIZE_TO_PREDICT = 10**6, 2**28


@dataclass
class ModelOptions:
    """What Model needs beside its shape, and what a step of it takes.

    config: train.Config; chosen: of kernels.select_kernels(); document_end: as of RunData; dtype:
    of the matmuls; assumed_device: type of the device that a step is planned for, where that is
    not the one of `world`.
    """

    config: 'Config'
    shape: ModelConfig
    chosen: dict
    document_end: int | None
    dtype: torch.dtype
    world: processes.World
    assumed_device: str | None = None

    @property
    def device_type(self) -> str:
        """Return the type of the device that a step runs on."""
        return self.assumed_device or self.world.device.type

    @property
    def autocast(self):
        """Return the context of a forward pass."""
        return kernels.autocast(self.world.device.type, self.dtype)

    @property
    def compiles_whole_model(self) -> bool:
        """Return whether the loss is compiled together with what comes before it, not unit by
        unit.
        """
        return self.config.compile and self.world.layout == 'single'

    @property
    def local_length(self) -> int:
        """Return tokens of a sequence on this rank."""
        return self.config.block_size // self.config.context_parallel

    def loss_chunk(self, tokens: int) -> tuple:
        """Return what choose_chunk() does for micro-steps of `tokens` tokens on this rank."""
        return choose_chunk(
            self.config.loss_chunk,
            tokens,
            self.shape.vocab_size,
            self.device_type,
            self.dtype,
            self.compiles_whole_model,
        )

    def step_chunk(self, tokens: int) -> int:
        """Return the chunk of the loss that takes, as it is written, what a step takes as it is
        run.
        """
        return eager_chunk(
            self.loss_chunk(tokens)[0],
            tokens,
            self.shape.vocab_size,
            self.device_type,
            self.compiles_whole_model,
        )

    def model_kwargs(self, batch_size: int) -> dict:
        """Return the keyword arguments of Model for micro-steps of batch_size sequences."""
        c = self.config
        return dict(
            **self.chosen,
            dropout=c.dropout,
            activation_checkpointing=c.activation_checkpointing,
            aux_loss=c.aux_loss_weight,
            z_loss=c.z_loss_weight,
            document_end=self.document_end,
            head_z_loss=c.head_z_loss_weight,
            loss_chunk=self.loss_chunk(batch_size * self.local_length)[0],
        )

    def predict(self, batch_size: int, accumulation: int) -> 'Prediction':
        """Return the memory.Prediction of a step. Raises memory.NotPredicted."""
        world = self.world
        step = self.step_memory(batch_size, accumulation)
        return step.per_rank(world.layout, world.size // self.config.fsdp_replicas)

    def step_memory(self, batch_size: int, accumulation: int) -> 'StepMemory':
        """Return the memory.StepMemory of a step. Raises memory.NotPredicted."""
        c, world, backend = self.config, self.world, self.chosen['backend']
        settings = {
            **self.model_kwargs(batch_size),
            'backend': backend if backend in ('manual', 'blocks') else 'sdpa',
            'loss_chunk': self.step_chunk(batch_size * self.local_length),
        }
        return memory.step_memory(
            lambda: Model(self.shape, **settings),
            batch_size,
            self.local_length,
            world.device,
            self.autocast,
            accumulation=accumulation,
            muon=c.optimizer == 'muon',
        )

    def check_memory(self, prediction: 'Prediction', accumulation: int) -> None:
        """Raise UserError for a step that does not fit into memory, with what would fit."""

        def predicted(changes, batch_size, accumulation):
            changed = dataclasses.replace(self.config, **changes)
            return dataclasses.replace(self, config=changed).predict(batch_size, accumulation)

        world = self.world
        memory.refuse_large_step(
            prediction, world.device, self.config, accumulation, world.fsdp, predicted
        )


@dataclass
class BatchPlan:
    """config: train.Config with all that was left open resolved; accumulation: micro-steps of an
    optimizer step; sequences_per_step, tokens_per_step: over all ranks.
    """

    config: 'Config'
    options: ModelOptions
    accumulation: int
    sequences_per_step: int
    tokens_per_step: int

    @property
    def autocast(self):
        """Context of the forward pass."""
        return self.options.autocast

    def model(self, world: 'World') -> 'Model':
        """Return the model, which has shapes and no memory yet."""
        config, options = self.config, self.options
        return Model.on_meta(
            options.shape, ring=world.ring, **options.model_kwargs(config.batch_size)
        )


def plan_batches(start: 'StartPoint', data: 'RunData', session: 'Session') -> 'BatchPlan':
    """Return the BatchPlan of start.config. data: RunData."""
    c, world, notes = start.config, session.world, session.notes
    kernels.set_deterministic(c.deterministic)  # before a trial times them
    with session.terminal.doing('trying kernels'):
        dtype = collectives.broadcast_from_main(
            lambda: kernels.precision(c.dtype, world.device, data.shape.n_embd), world
        )
        kernels.set_matmul_precision(c.float32_matmul_precision, dtype)
        chosen, told = collectives.broadcast_from_main(
            lambda: kernels.select_kernels(c, data.shape, world.device, dtype), world
        )
    notes += told
    if c.compile and world.device.type == 'cpu' and not cpu.has_compiler():
        notes.append('compile=True needs a C++ compiler, and there is none: running without')
        c = dataclasses.replace(c, compile=False)
    options = ModelOptions(c, data.shape, chosen, data.document_end, dtype, world)
    if c.find_batch_size:
        c = with_largest_batch(options, session)
    if chosen['float8'] == 'hardware':
        fp8.check_tokens(c.batch_size, c.block_size // c.context_parallel)
    if note := kernels.idle_note(c, data.shape, world.device, dtype, chosen['backend']):
        notes.append(note)
    accumulation = validate.accumulation_steps(c, world.data_size)
    if note := options.loss_chunk(c.batch_size * options.local_length)[1]:
        notes.append(note)
    graphs = validate.validate_cuda_graphs(c, world.device.type, chosen['dispatch'], notes)
    options = dataclasses.replace(options, config=c)
    return resolved_plan(options, accumulation, device=world.device.type, use_cuda_graphs=graphs)


def resolved_plan(options: 'ModelOptions', accumulation: int, **changes) -> 'BatchPlan':
    """Return the BatchPlan of `options`, in whose config all that was left open is resolved.

    changes: {key: value} of the config beside what follows from `options`.
    """
    world = options.world
    resolved = {
        'dtype': str(options.dtype).removeprefix('torch.'),
        'attention_backend': options.chosen['backend'],
        'gradient_accumulation_steps': accumulation,
        'backend': world.backend,
        **dataclasses.asdict(options.shape),
        **changes,
    }
    c = dataclasses.replace(options.config, **resolved)
    sequences = c.batch_size * accumulation * world.data_size
    options = dataclasses.replace(options, config=c)
    return BatchPlan(c, options, accumulation, sequences, sequences * c.block_size)


def with_largest_batch(options: 'ModelOptions', session: 'Session') -> 'Config':
    """Return options.config with the largest batch_size that is predicted to fit, and as many
    micro-steps as keep the tokens of an optimizer step.
    """
    c, world = options.config, options.world
    sequences = c.batch_size * c.gradient_accumulation_steps
    if c.total_batch_size:
        one = dataclasses.replace(c, batch_size=1)
        sequences = validate.accumulation_steps(one, world.data_size)
    room = memory.available_memory(world.device)
    with session.terminal.doing('looking for the largest batch_size that fits'):
        size = memory.find_batch_size(
            lambda size: options.predict(size, sequences // size), sequences, room
        )
        size = -collectives.all_reduce_max(-size, world)  # what fits on every rank
    session.notes.append(
        f'batch_size={size}, with {sequences // size} micro-steps an iteration, is the largest'
        f' that fits: {room / 1e9:.1f} GB are free'
    )
    return dataclasses.replace(c, batch_size=size, gradient_accumulation_steps=sequences // size)


def predict_memory(plan: 'BatchPlan', model: Model, session: 'Session') -> 'Prediction | None':
    """Return the memory.Prediction of a step, None where it is small or cannot be told. Raises
    UserError for a step that does not fit, unless ignore_memory is set.
    """
    c, options = plan.config, plan.options
    world, shape = options.world, options.shape
    widths = 16 * shape.n_layer * shape.n_embd + shape.vocab_size
    parameters = sum(p.numel() for p in model.parameters())
    small = (
        parameters < MIN_SIZE_TO_PREDICT[0]
        and c.batch_size * options.local_length * widths < MIN_SIZE_TO_PREDICT[1]
    )
    if c.eval_only or c.fsdp_offload or small:
        return None
    prediction = None
    try:
        with session.terminal.doing('predicting the memory'):
            prediction = options.predict(c.batch_size, plan.accumulation)
            collectives.broadcast_from_main(
                lambda: (
                    None if c.ignore_memory else options.check_memory(prediction, plan.accumulation)
                ),
                world,
            )
    except memory.NotPredicted as error:
        session.notes.append(str(error))
    return prediction
