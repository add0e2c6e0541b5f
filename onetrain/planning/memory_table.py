"""What a step takes of each GPU under every layout, and which of them to take.

Activations grow with the tokens of a micro-step by a straight line, one for each way in which the
loss is computed: it is laid through two predictions. What is chosen is predicted itself.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from onetrain.config import UserError
from onetrain.distributed.processes import World
from onetrain.model_config import resolve_shape
from onetrain.ops import kernels
from onetrain.training import validate
from onetrain.training.batch_plan import ModelOptions
from onetrain.training.memory import SHARE, StepMemory

if TYPE_CHECKING:
    from onetrain.model_config import ModelConfig
    from onetrain.planning.machines import Machine
    from train import Config

Recomputation = Literal['none', 'selective', 'full']
RECOMPUTATIONS: tuple[Recomputation, ...] = ('none', 'selective', 'full')
BATCHES = [2**n for n in range(21)]  # those through whose predictions a line may be laid
BUSY_TOKENS = 4096  # of a micro-step, with which large matmuls keep a GPU busy

_SINGLE = dict(
    use_zero1=False,
    use_fsdp=False,
    fsdp_reshard=True,
    fsdp_replicas=1,
    fsdp_offload=False,
    context_parallel=1,
)
_WHY = {
    'single': 'one GPU holds it',
    'DDP': 'only gradients are sent',
    'ZeRO-1': 'no more is sent than by DDP',
    'ZeRO-2': 'gradients and state are shared out',
    'hybrid': 'only gradients leave a node',
    'ZeRO-3': 'all is shared out',
    'context': 'GPUs share each sequence',
    'offload': 'slower than any time below',
}
_WORK = {
    'none': 'nothing is computed twice',
    'selective': 'matmuls are not computed twice',
    'full': 'all is computed twice',
}


@dataclass(frozen=True)
class Layout:
    """A way of sharing out a model, as the keys of train.py ask for it.

    kind: one of those in onetrain/distributed/layouts.py.
    """

    name: str
    kind: str
    keys: dict

    @property
    def why(self) -> str:
        """Return what speaks for it."""
        return _WHY[self.name.split()[0]]


@dataclass(frozen=True)
class Choice:
    """The largest batch that fits, with the bytes that a step then takes of each GPU; batch_size 0:
    not one sequence does, and one takes this much.
    """

    layout: Layout
    recomputation: Recomputation
    batch_size: int
    bytes: float

    @property
    def fits(self) -> bool:
        """Return whether a sequence fits."""
        return self.batch_size > 0


def layouts_of(machine: 'Machine', c: 'Config') -> list[Layout]:
    """Return the layouts that `machine` can be asked for, those that exchange least first."""
    n = machine.count
    if n == 1:
        return [
            Layout('single', 'single', _SINGLE),
            Layout('offload', 'ZeRO-3', {**_SINGLE, 'use_fsdp': True, 'fsdp_offload': True}),
        ]
    fully = {**_SINGLE, 'use_fsdp': True}
    found = [
        Layout('DDP', 'DDP', _SINGLE),
        Layout('ZeRO-1', 'ZeRO-1', {**_SINGLE, 'use_zero1': True}),
        Layout('ZeRO-2', 'ZeRO-2', {**fully, 'fsdp_reshard': False}),
    ]
    if replicas := machine.nodes if machine.nodes > 1 else 2 * (n > 2 and n % 2 == 0):
        keys = {**fully, 'fsdp_replicas': replicas}
        found.append(Layout(f'hybrid {replicas} x {n // replicas}', 'ZeRO-3', keys))
    found.append(Layout('ZeRO-3', 'ZeRO-3', fully))
    if n % 2 == 0 and _splits_sequences(dataclasses.replace(c, context_parallel=2)):
        found.append(Layout('context parallel 2', 'ZeRO-3', {**fully, 'context_parallel': 2}))
    return [*found, Layout('offload', 'ZeRO-3', {**fully, 'fsdp_offload': True})]


def _splits_sequences(c):
    """Return whether a sequence of this model can be spread over ranks."""
    try:
        validate.validate_context_parallel(c, resolve_shape(dataclasses.asdict(c)))
    except UserError:
        return False
    return not c.dropout and c.block_size % c.context_parallel == 0


class MemoryTable:
    """Predictions of a recipe's step, as they are asked for.

    c: train.Config with a dtype; shape: of its model. It serves for several machines.
    """

    def __init__(self, c: 'Config', shape: 'ModelConfig'):
        # the kernels are those of a CPU, which keep what those of a GPU keep
        c = dataclasses.replace(c, device='cpu', attention_backend='sdpa', fp8=False)
        self.config, self.shape = c, shape
        self.cpu, self.dtype = torch.device('cpu'), getattr(torch, c.dtype or 'bfloat16')
        self.chosen, _ = kernels.select_kernels(c, shape, self.cpu, self.dtype)
        self.lines: dict = {}
        self.predicted: dict = {}

    def predict(self, layout: Layout, how: str, batch_size: int, accumulation: int) -> StepMemory:
        """Return the StepMemory of such a step. Raises memory.NotPredicted."""
        key = layout.kind, layout.keys['context_parallel'], how, batch_size, min(accumulation, 2)
        if key not in self.predicted:
            options = self._options(layout, how)
            self.predicted[key] = options.step_memory(batch_size, accumulation)
        return self.predicted[key]

    def _options(self, layout, how):
        c = dataclasses.replace(self.config, activation_checkpointing=how, **layout.keys)
        world = World(0, 1, self.cpu, layout=layout.kind)
        document_end = 0 if c.document_mask else None  # which token it is does not matter
        return ModelOptions(c, self.shape, self.chosen, document_end, self.dtype, world, 'cuda')

    def _loss_kind(self, layout, tokens):
        """Return how the loss of so many tokens is computed: whole, a part of it at a time, or in
        chunks of one size.
        """
        options = self._options(layout, 'none')
        chunk = options.step_chunk(tokens)
        return 'whole' if not chunk else 'part' if chunk == tokens // 4 else 'chunks'

    def _line(self, how, alone, kind):
        """Return two (tokens, StepMemory), through which the line goes for that kind of loss; twice
        the same where only one batch has it.
        """
        alone = alone and kind == 'part'  # else the layouts without shards take the same
        if (how, alone, kind) not in self.lines:
            layout = Layout('', 'single' if alone else 'DDP', _SINGLE)
            block = self.config.block_size
            sizes = [n for n in BATCHES if self._loss_kind(layout, n * block) == kind][:5] or [1]
            self.lines[how, alone, kind] = [
                (n * block, self.predict(layout, how, n, 2)) for n in (sizes[0], sizes[-1])
            ]
        return self.lines[how, alone, kind]

    def bytes(self, layout: Layout, how: str, batch_size: int, count: int) -> float:
        """Return the bytes that a step of `batch_size` sequences takes of each of `count` GPUs, by
        the line.
        """
        tokens = batch_size * self.config.block_size // layout.keys['context_parallel']
        kind = self._loss_kind(layout, tokens)
        (few, low), (many, high) = self._line(how, layout.kind == 'single', kind)
        slope = (high.peak - low.peak) / (many - few) if many > few else 0.0
        held = low.parameters + low.gradients
        if not slope:  # one batch alone: all that it has beside the parameters grows with it
            slope = (low.peak - held) / few
        peak = low.peak + slope * (tokens - few)
        step = dataclasses.replace(low, peak=int(max(peak, held)))
        return _per_rank(step, layout, count)

    def largest(
        self, layout: Layout, how: Recomputation, machine: 'Machine', sequences: int
    ) -> Choice:
        """Return the Choice of the largest batch_size that divides `sequences`, those of an
        iteration on a rank, and that fits.
        """
        room = SHARE * machine.memory
        for size in range(sequences, 0, -1):
            if sequences % size == 0:
                taken = self.bytes(layout, how, size, machine.count)
                if taken <= room:
                    return Choice(layout, how, size, taken)
        return Choice(layout, how, 0, self.bytes(layout, how, 1, machine.count))

    def fill(self, machine: 'Machine', sequences: Callable) -> list[Choice]:
        """Return a Choice for each layout and recomputation. sequences: function of the number of
        ranks that share each sequence.
        """
        return [
            self.largest(layout, how, machine, sequences(layout.keys['context_parallel']))
            for layout in layouts_of(machine, self.config)
            for how in RECOMPUTATIONS
        ]

    def fits(self, machine: 'Machine') -> bool:
        """Return whether one sequence fits on `machine` under a layout without offload."""
        layouts = [each for each in layouts_of(machine, self.config) if each.name != 'offload']
        step = self.predict(layouts[0], 'full', 1, 1)
        taken = min(_per_rank(step, layout, machine.count) for layout in layouts)
        return taken <= SHARE * machine.memory

    def best(
        self, choices: list[Choice], machine: 'Machine', sequences: Callable
    ) -> tuple[Choice, str] | None:
        """Return what to take of fill(), predicted itself, and why; None where nothing fits.

        The least that is computed twice comes first, then the least that is exchanged, among those
        whose micro-steps keep a GPU busy.
        """
        choices = [choice for choice in choices if choice.fits]
        while choices:
            best = min(choices, key=self._rank)
            on_rank = sequences(best.layout.keys['context_parallel'])
            step = self.predict(
                best.layout, best.recomputation, best.batch_size, on_rank // best.batch_size
            )
            taken = _per_rank(step, best.layout, machine.count)
            if taken <= SHARE * machine.memory:
                why = f'{_WORK[best.recomputation]}; {best.layout.why}'
                return dataclasses.replace(best, bytes=taken), why
            choices.remove(best)
            sizes = [s for s in range(1, best.batch_size) if on_rank % s == 0]
            if sizes:
                choices.append(dataclasses.replace(best, batch_size=sizes[-1]))
        return None

    def _rank(self, choice):
        """Return what is smallest for the best."""
        tokens = choice.batch_size * self.config.block_size
        tokens //= choice.layout.keys['context_parallel']
        idle = max(0, BUSY_TOKENS - tokens)
        offload = choice.layout.name == 'offload'
        order = list(_WHY).index(choice.layout.name.split()[0])
        return offload, idle, RECOMPUTATIONS.index(choice.recomputation), order


def _per_rank(step, layout, count):
    shards = count // layout.keys['fsdp_replicas']
    return step.per_rank(layout.kind, shards, layout.keys['fsdp_offload']).total
