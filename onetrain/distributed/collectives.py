"""What ranks tell each other: sums, agreement on the host, objects of the main rank."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from onetrain.config import UserError

if TYPE_CHECKING:
    from onetrain.distributed.processes import World


def sum_over_ranks(tensor: torch.Tensor, world: 'World') -> torch.Tensor:
    """Return `tensor` summed over all ranks, in place; returns it."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(number: int, world: 'World') -> int:
    """Return the largest of the ranks' small ints, on every rank; agreed on the host, so no GPU
    waits.
    """
    if world.size == 1:
        return number
    answer = torch.tensor(number)
    dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=world.group)
    return answer.item()


class Agreement:
    """Finds the largest of the ranks' small ints while they work: all_reduce_max() in two halves,
    of which only the second waits.
    """

    def __init__(self, world: 'World'):
        self.world = world
        self.answer: torch.Tensor | None = None
        self.work: dist.Work | None = None

    def begin(self, number: int) -> int:
        """Hand in this rank's number, and return the answer where it is known at once: on one
        process; else 0.
        """
        if self.world.size == 1:
            return number
        self.answer = torch.tensor(number)
        self.work = dist.all_reduce(
            self.answer, op=dist.ReduceOp.MAX, group=self.world.group, async_op=True
        )
        return 0

    def end(self) -> int:
        """Return the largest of the numbers that were handed in, the same on every rank."""
        if self.world.size == 1:
            return 0
        self.work.wait()
        return self.answer.item()


def all_gather_numbers(values: dict[str, float], world: 'World') -> dict[str, list]:
    """Return {name: list of the ranks' values} of a dict of floats that has the same names on every
    rank; agreed on the host.
    """
    mine = torch.tensor([*values.values()], dtype=torch.float64)
    table = [mine.clone() for _ in range(world.size)]
    if world.size > 1:
        dist.all_gather(table, mine, group=world.group)
    return dict(zip(values, torch.stack(table, dim=1).tolist()))


def broadcast_from_main(work: Callable, world: 'World'):
    """Return what work() returns on the main rank (any small builtin), on every rank; a UserError
    that it raises, too. It may take long.
    """
    box: list[Any] = [None, None]
    if world.is_main:
        try:
            box = [work(), None]
        except UserError as error:
            box = [None, str(error)]
    if world.size > 1:
        dist.broadcast_object_list(box, src=0, group=world.slow_group)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def broadcast_tensors(tensors: Iterable[torch.Tensor], world: 'World'):
    """Overwrite each of `tensors`, which every rank has in full, with that of the main rank."""
    for tensor in tensors if world.size > 1 else ():
        dist.broadcast(tensor, src=0)


def once_per_machine(work: Callable, world: 'World') -> tuple:
    """Return what work() returns on the main rank (it must pickle). The first rank of each other
    machine does the work too and returns its own, to be compared, so that a hundred processes do
    not all ask for the same ten thousand files. Raises a UserError of the main rank on all.
    """
    result = broadcast_from_main(work, world)
    return work() if world.local_rank == 0 and not world.is_main else result


def all_gather_objects(value: Any, world: 'World') -> list:
    """Return every rank's `value` (any small builtin), in their order, on every rank; over
    slow_group, which a thread may have for itself.
    """
    if world.size == 1:
        return [value]
    values = [None] * world.size
    dist.all_gather_object(values, value, group=world.slow_group)
    return values


def assert_same_on_all_ranks(values: dict, what: str, world: 'World') -> None:
    """Raise UserError on every rank unless the dict `values` is the same on all, naming the first
    difference.
    """
    everyone = all_gather_objects(values, world)
    for rank, theirs in enumerate(everyone):
        for key in everyone[0]:
            if theirs.get(key) != everyone[0][key]:
                raise UserError(
                    f'{what} differs between processes: {key}={everyone[0][key]!r} on rank 0,'
                    f' {theirs.get(key)!r} on rank {rank}: start all with the same command, files'
                    ' and data'
                )


def barrier(world: 'World') -> None:
    """Wait until all ranks are here."""
    if world.size > 1:
        dist.barrier(group=world.slow_group)
