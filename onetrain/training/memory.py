"""How much memory a training step will need, found out by taking one without any: on tensors that
have shapes and no contents, each storage counted while it lives.

What is counted is what the operators of a step ask for. An allocator may hold more: blocks that
were freed and fit nothing (on a CPU, where big ones are kept for speed, a tenth to a half). With
torch.compile it is the prediction for the same step without it.
"""

import functools
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from onetrain.config import UserError

if TYPE_CHECKING:
    from model import Model
    from train import Config

SHARE = 0.9  # of the free memory that find_batch_size() takes
PATIENCE_S = 6  # in which a batch that fits is looked for
MOST_MICRO_STEPS = 10**6  # more than anybody wants to have proposed


@dataclass(frozen=True)
class Prediction:
    """Bytes per rank. activations: all that comes and goes in a step beside parameters and
    gradients, when the sum is largest: what backward needs, logits, gathered parameters.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes of all of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations

    def describe(self) -> str:
        """Return the sum and its parts in words."""
        parts = ', '.join(
            f'{what} {getattr(self, what) / 1e9:.2f}'
            for what in ('parameters', 'gradients', 'optimizer', 'activations')
        )
        return f'{self.total / 1e9:.2f} GB predicted for a step ({parts})'


class NotPredicted(UserError):
    """The step could not be gone through without contents; the message says why."""


class Counter(TorchDispatchMode):
    """now, peak: bytes of the storages that operators made within the block, those that exist and
    those that existed at most at a time.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor, until it is gone."""
        storage = tensor.untyped_storage()
        if storage not in self.known:
            size = self.known[storage] = storage.nbytes()
            weakref.finalize(storage, self._gone, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, size):
        self.now -= size


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step on one process that holds all of the model.

    peak: the most at a time, without optimizer state; units: of each part that FSDP gathers by
    itself, ascending.
    """

    parameters: int
    gradients: int
    optimizer: int
    peak: int
    units: tuple[int, ...]

    def per_rank(self, layout: str, ranks: int, offload: bool = False) -> 'Prediction':
        """Return the Prediction for a rank under `layout`, one of those in layouts.py, which shards
        what it shards over `ranks`; offload: whether the memory of the CPU holds that.
        """
        fully = layout in ('ZeRO-2', 'ZeRO-3')
        activations = self.peak - self.parameters - self.gradients
        if fully:  # what is gathered: all, or the unit at work and the next
            activations += self.parameters if layout == 'ZeRO-2' else sum(self.units[-2:])
        if fully and offload:
            # the gradients of a unit, until they are summed over the ranks
            return Prediction(0, self.units[-1], 0, activations)
        share = ranks if fully else 1
        return Prediction(
            self.parameters // share,
            self.gradients // share,
            self.optimizer // (ranks if fully or layout == 'ZeRO-1' else 1),
            activations,
        )


def step_memory(
    build: Callable,
    batch_size: int,
    length: int,
    device: str | torch.device,
    autocast: Any,
    *,
    accumulation: int = 1,
    muon: bool = False,
) -> 'StepMemory':
    """Return the StepMemory of `accumulation` micro-steps of batch_size sequences, `length` tokens
    of each on this rank.

    build(): the model as one process has it; autocast: context of the forward pass; muon: whether
    its matrices have one tensor of optimizer state, not two. Raises NotPredicted where an operator
    needs contents, as a loop over experts does.
    """
    try:
        return _step(build, batch_size, length, device, autocast, min(accumulation, 2), muon)
    except Exception as error:  # whatever an operator of this device says
        raise NotPredicted(
            f'the memory of a step cannot be predicted ({type(error).__name__}:'
            f' {" ".join(str(error).split())[:150]})'
        ) from None


def _step(build, batch_size, length, device, autocast, micro_steps, muon):
    with FakeTensorMode(), torch.device(device), Counter() as counter:
        model = build()
        for p in model.parameters():
            counter.count(p)
        parameters = sum(p.nbytes for p in model.parameters())
        x, y = (torch.zeros(batch_size, length, dtype=torch.int64) for _ in range(2))
        for _ in range(micro_steps):
            with autocast:
                loss = model(x, y, reduction='sum')
            loss.backward()
            del loss
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        matrices = set(model.matrices()) if muon else ()
        state = sum(
            p.nbytes * (1 if name in matrices else 2) for name, p in model.named_parameters()
        )
        units = sorted(
            sum(p.nbytes for p in module.parameters())
            for module in (*model.transformer.h, model.transformer.wte, model.lm_head)
        )
    return StepMemory(parameters, gradients, state, counter.peak, tuple(units))


def available_memory(device: torch.device) -> int:
    """Return bytes that a process can have on `device`: free ones of a GPU; on a CPU what the
    kernel calls available, shared by the processes of this machine.
    """
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    with open('/proc/meminfo') as f:
        kilobytes = next(int(line.split()[1]) for line in f if line.startswith('MemAvailable'))
    return 1024 * kilobytes // int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def refuse_too_large(model: 'Model', device: torch.device, shards: int = 1) -> None:
    """Raise UserError if the float32 parameters of `model` (on the meta device), split over
    `shards` ranks, do not fit into the free memory of `device`.
    """
    needed, free = sum(4 * p.numel() for p in model.parameters()) / shards, available_memory(device)
    if needed > free:
        largest, parameter = max(model.named_parameters(), key=lambda item: item[1].numel())
        raise UserError(
            f'the weights of this model take {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of'
            f' memory are free: make it smaller (the largest tensor is {largest},'
            f' {tuple(parameter.shape)}), or share it out with --use_fsdp=True on more processes'
        )


def refuse_large_step(
    prediction: 'Prediction',
    device: torch.device,
    c: 'Config',
    accumulation: int,
    sharded: bool,
    predicted: Callable,
) -> None:
    """Raise UserError for a step that does not fit into the free memory of `device`, with keys
    that make it fit and how much they take.

    c: train.Config; accumulation: micro-steps; sharded: whether parameters are; predicted: function
    of ({key: other value of c}, batch_size, accumulation).
    """
    room, sequences = available_memory(device), c.batch_size * accumulation
    if prediction.total <= room:
        return
    until, ways, recompute = time.monotonic() + PATIENCE_S, [], {}
    taken = prediction.total
    for how in {'none': ('selective', 'full'), 'selective': ('full',)}.get(
        c.activation_checkpointing, ()
    ):
        if time.monotonic() > until:
            break
        recompute = {'activation_checkpointing': how}
        taken = predicted(recompute, c.batch_size, accumulation).total
        if taken <= room:
            ways.append((f'--activation_checkpointing={how}', taken))
    attempts: list[tuple] = [({}, prediction.total)]
    attempts += [(recompute, taken)] if recompute else []
    for changes, most in attempts:
        if changes and ways:  # one key suffices
            break
        at = functools.partial(predicted, changes)
        size, total = _smaller_batch(at, c.batch_size, sequences, room, most, until)
        if size:
            words = [f'--{key}={value}' for key, value in changes.items()]
            words += [f'--batch_size={size}']
            if not c.total_batch_size:
                words += [f'--gradient_accumulation_steps={sequences // size}']
            ways.append((' '.join(words), total))
    lines = [f'{words} takes {total / 1e9:.2f} GB' for words, total in ways] or [
        'no activation_checkpointing or smaller batch_size was found with which it fits'
    ]
    if not sharded and device.type == 'cuda':
        lines.append('--use_fsdp=True on several GPUs shards it')
    raise UserError(
        f'{prediction.describe()}, and {room / 1e9:.1f} GB are free: {"; ".join(lines)};'
        ' --ignore_memory=True starts all the same'
    )


def _smaller_batch(predicted, batch_size, sequences, room, most, until):
    """Return (size, bytes) of the largest batch below batch_size that divides `sequences` and fits,
    (0, 0) where none does or none is found before the time `until`.

    predicted: function of (batch_size, accumulation); most: bytes of batch_size, from which those
    of others are estimated by a straight line before they are predicted.
    """
    if batch_size == 1 or time.monotonic() > until:
        return 0, 0
    least = predicted(1, min(sequences, 2)).total
    slope = (most - least) / (batch_size - 1)
    for size in range(batch_size - 1, 0, -1):
        steps, rest = divmod(sequences, size)
        if rest or steps > MOST_MICRO_STEPS or least + slope * (size - 1) > room:
            continue
        total = predicted(size, min(steps, 2)).total
        if total <= room:
            return size, total
        if time.monotonic() > until:
            break
    return 0, 0


def find_batch_size(predicted: Callable, sequences: int, room: int) -> int:
    """Return the largest batch_size that divides `sequences`, those of an iteration on a rank, for
    which predicted(batch_size).total is at most SHARE of `room` bytes.

    Raises UserError where not even one sequence fits.
    """
    sizes = [size for size in range(1, sequences + 1) if sequences % size == 0]
    low, high = -1, len(sizes) - 1  # the largest that fits is in between
    while low < high:
        middle = (low + high + 1) // 2
        if predicted(sizes[middle]).total <= SHARE * room:
            low = middle
        else:
            high = middle - 1
    if low < 0:
        raise UserError(
            f'find_batch_size=True: even one sequence does not fit into {SHARE:.0%} of'
            f' {room / 1e9:.1f} GB: {predicted(1).describe()}; type a smaller --block_size,'
            ' --activation_checkpointing=full, or share the model out with --use_fsdp=True'
        )
    return sizes[low]
