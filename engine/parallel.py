"""Processes and devices. Every other file asks here for rank, world size and device."""
import contextlib
import ctypes
import gc
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from engine.configurator import ConfigError


@dataclass
class World:
    """This process among all: `rank` of `size`, on `device`; `group` is the process group for host-side agreement."""
    rank: int
    local_rank: int
    size: int
    device: torch.device
    backend: str | None = None
    group: object = None

    @property
    def main(self):
        return self.rank == 0


def start(device=None, backend=None):
    """Join the processes that torchrun started, or be the only one, and take a device.

    device: 'cpu' | 'cuda' | 'cuda:1' | None (a GPU where there is one); backend: 'nccl' | 'gloo' | None (what fits).
    Raises ConfigError for a device or backend that this machine does not have.
    """
    rank, local_rank, size = (int(os.environ.get(name, default)) for name, default in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    device_type = (device or ('cuda' if torch.cuda.is_available() else 'cpu')).split(':')[0]
    if device_type not in ('cpu', 'cuda'):
        raise ConfigError(f"device={device!r} is not one of 'cpu', 'cuda', 'cuda:N'")
    if device_type == 'cuda' and not torch.cuda.is_available():
        raise ConfigError(f'device={device!r} was asked for, but torch {torch.__version__} sees no GPU here: type --device=cpu')
    if device_type == 'cuda':
        index = local_rank if size > 1 else int(device.split(':')[1]) if device and ':' in device else 0
        if index >= torch.cuda.device_count():
            raise ConfigError(f'GPU {index} was asked for, but there are {torch.cuda.device_count()}: '
                              f'lower --nproc_per_node or --device')
        chosen = torch.device('cuda', index)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device('cpu')
        _keep_freed_memory()
    backend = backend or ('nccl' if device_type == 'cuda' else 'gloo')
    if backend not in ('nccl', 'gloo') or (backend == 'nccl' and device_type == 'cpu' and size > 1):
        raise ConfigError(f"backend={backend!r} does not serve device={device_type!r}: type --backend={'nccl' if device_type == 'cuda' else 'gloo'}")
    world = World(rank, local_rank, size, chosen)
    if size > 1:
        if device_type == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get('LOCAL_WORLD_SIZE', size))))
        dist.init_process_group(backend=backend)
        world.backend = backend
        world.group = dist.new_group(backend='gloo') if backend != 'gloo' else dist.group.WORLD
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


def any_rank(flag, world):
    """True on every rank if `flag` is on any; agreed on the host, so no GPU waits."""
    if world.size == 1:
        return flag
    answer = torch.tensor(int(flag))
    dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=world.group)
    return bool(answer.item())


def share(value, world):
    """Rank 0's `value` (any small builtin) on every rank."""
    box = [value]
    if world.size > 1:
        dist.broadcast_object_list(box, src=0, group=world.group)
    return box[0]


def barrier(world):
    if world.size > 1:
        dist.barrier(group=world.group)


def leave(code):
    """End the process with exit code `code`.

    gloo's threads make a normal interpreter exit abort at random ("terminate called without an active exception"), so a
    distributed process collects, waits for the others, destroys the group, flushes and leaves without further ado.
    """
    if dist.is_initialized():
        gc.collect()
        if code == 0:
            dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
