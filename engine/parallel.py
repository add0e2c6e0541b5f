"""Processes and devices. Every other file asks here for rank, world size and device."""
import contextlib
import ctypes
import gc
import os
import re
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from engine import stopping
from engine.configurator import ConfigError


@dataclass
class World:
    """This process among all: `rank` of `size`, on `device`.

    group: process group for agreement on the host; saving_group: another, for the thread that writes checkpoints.
    """
    rank: int
    size: int
    device: torch.device
    backend: str | None = None
    group: object = None
    saving_group: object = None

    @property
    def main(self):
        return self.rank == 0


def start(device=None, backend=None):
    """Join the processes that torchrun started, or be the only one, and take a device.

    device: 'cpu' | 'cuda' | 'cuda:1' | None (a GPU where there is one); backend: 'nccl' | 'gloo' | None (what fits).
    Raises ConfigError for a device or backend that this machine does not have.
    """
    rank, local_rank, size, here = (int(os.environ.get(name, default)) for name, default in (
        ('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_WORLD_SIZE', 1)))
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    match = re.fullmatch(r'cpu|cuda(?::(\d+))?', device)
    if not match:
        raise ConfigError(f"device={device!r} is not one of 'cpu', 'cuda', 'cuda:N'")
    device_type = device.split(':')[0]
    if device_type == 'cuda' and not torch.cuda.is_available():
        raise ConfigError(f'device={device!r} was asked for, but torch {torch.__version__} sees no GPU here: type --device=cpu')
    if match[1] and size > 1:
        raise ConfigError(f'device={device!r} names one GPU, but torchrun started {size} processes, which take one each: type --device=cuda')
    if device_type == 'cuda' and here > torch.cuda.device_count():  # every rank sees it, so that the main one can say it
        raise ConfigError(f'{here} processes were started on this machine, which has {torch.cuda.device_count()} GPUs: lower --nproc_per_node')
    backend = backend or ('nccl' if device_type == 'cuda' else 'gloo')
    if backend not in ('nccl', 'gloo') or backend == 'nccl' and device_type == 'cpu':
        raise ConfigError(f"backend={backend!r} does not serve device={device_type!r}: type --backend={'nccl' if device_type == 'cuda' else 'gloo'}")
    if device_type == 'cuda':
        index = local_rank if size > 1 else int(match[1] or 0)
        if index >= torch.cuda.device_count():
            raise ConfigError(f'device={device!r}: there are {torch.cuda.device_count()} GPUs, the first is cuda:0')
        chosen = torch.device('cuda', index)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device('cpu')
        _keep_freed_memory()
    world = World(rank, size, chosen)
    if size > 1:
        store = None
        if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
            # torchrun's store outlives the workers: after a restart (--max-restarts) the keys of the last attempt must not be met
            agent = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), size, is_master=False)
            store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", agent)
        dist.init_process_group(backend=backend, store=store, rank=rank, world_size=size)
        world.backend = backend
        world.group = dist.new_group(backend='gloo') if backend != 'gloo' else dist.group.WORLD
        world.saving_group = dist.new_group(backend='gloo')
    return world


def _keep_freed_memory():
    """Ask glibc to keep the big buffers of a step instead of returning them to the kernel and faulting them in again."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to set
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def wrap(model, world):
    """The model as this layout trains it: itself, or under DistributedDataParallel."""
    if world.size == 1:
        return model
    device_ids = [world.device.index] if world.device.type == 'cuda' else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def last_micro_step(model, last):
    """Context in which backward() sums gradients over ranks only if this is the `last` micro-step of an optimizer step."""
    return contextlib.nullcontext() if last or not hasattr(model, 'no_sync') else model.no_sync()


def sum_over_ranks(tensor, world):
    """`tensor` summed over all ranks, in place; returns it."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(number, world):
    """The largest of the ranks' small ints, on every rank; agreed on the host, so no GPU waits."""
    if world.size == 1:
        return number
    answer = torch.tensor(number)
    dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=world.group)
    return answer.item()


def from_main(work, world):
    """What work() returns on the main rank (any small builtin), on every rank; a ConfigError that it raises, too."""
    box = [None, None]
    if world.main:
        try:
            box = [work(), None]
        except ConfigError as error:
            box = [None, str(error)]
    if world.size > 1:
        dist.broadcast_object_list(box, src=0, group=world.group)
    if box[1] is not None:
        raise ConfigError(box[1])
    return box[0]


def from_all(value, world, group):
    """Every rank's `value` (any small builtin), in their order, on every rank; over `group`, one of world's."""
    if world.size == 1:
        return [value]
    values = [None] * world.size
    dist.all_gather_object(values, value, group=group)
    return values


def barrier(world):
    if world.size > 1:
        dist.barrier(group=world.group)


def leave(code):
    """End the process with exit code `code`.

    gloo's threads make a normal interpreter exit abort at random ("terminate called without an active exception"), so a
    distributed process collects, waits for the others, destroys the group, flushes and leaves without further ado.
    """
    stopping.ignore()  # all is done: a late signal may not change the code
    if dist.is_initialized():
        gc.collect()
        if code == 0:
            dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
