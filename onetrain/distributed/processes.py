"""The processes of a run: how they meet, take a device, report an error and leave."""

import contextlib
import ctypes
import datetime
import gc
import os
import re
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from onetrain import signals
from onetrain.config import UserError
from onetrain.descriptors import raise_limit
from onetrain.distributed.heartbeat import Heartbeat
from onetrain.files import redact
from onetrain.ops.ring_attention import Ring

# for what waits for disks and networks: a checkpoint may take long to read
SLOW_TIMEOUT = datetime.timedelta(days=1)

_store = None  # where a rank that fails alone says so

_timeout = None  # how long a rank waits for another

SAVER_THREAD = 'checkpoint'  # the name of the thread that writes one

_heartbeat = None  # of this process, where there are several

# made once: each group of gloo has threads and connections of its own for as long as the process
# lives
_slow_group = None


@dataclass
class World:
    """This process among all: `rank` of `size`, on `device`, and the layout they have together.

    group: process group for agreement on the host; slow_group: another, for what waits for disks
    and networks (also for the thread that writes checkpoints). data_rank of data_size: which of the
    sequences of a micro-step; ring: the ranks that share one sequence, or None.
    """

    rank: int
    size: int
    device: torch.device
    backend: str | None = None
    group: dist.ProcessGroup | None = None
    slow_group: dist.ProcessGroup | None = None
    layout: str = 'single'  # 'single' | 'DDP' | 'ZeRO-1' | 'ZeRO-2' | 'ZeRO-3'
    # DeviceMesh over which parameters or optimizer state are sharded; its last dimension shards
    mesh: DeviceMesh | None = None
    data_rank: int = 0
    data_size: int = 1
    ring: Ring | None = None
    local_size: int = 1  # processes on this machine
    local_rank: int = 0  # of these
    # torch.cuda.Stream on which steps are recorded, warmed up and exchange gradients; None without
    # CUDA graphs
    graph_stream: torch.cuda.Stream | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and talks."""
        return self.rank == 0

    @property
    def gpu_name(self):
        """Return the name of the GPU of this rank, None on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else None

    @property
    def ddp(self) -> bool:
        """Whether torch's DistributedDataParallel sums the gradients."""
        return self.layout in ('DDP', 'ZeRO-1')

    @property
    def fsdp(self) -> bool:
        """Whether FSDP shards the parameters."""
        return self.layout in ('ZeRO-2', 'ZeRO-3')

    def describe(self) -> str:
        """Return such as 'FSDP (ZeRO-3), 2 replicas, context parallel 2'."""
        replicas = self.mesh.size(0) if self.fsdp and self.mesh.ndim == 2 else 1
        return (
            (f'FSDP ({self.layout})' if self.fsdp else self.layout)
            + (f', {replicas} replicas' if replicas > 1 else '')
            + (f', context parallel {self.ring.size}' if self.ring else '')
        )


def read_environment() -> tuple:
    """Return (rank, local rank, world size, processes on this machine), as torchrun says it in the
    environment. Raises UserError.
    """

    def number(name, default, low, high):
        text = os.environ.get(name, str(default))
        if not (text.isascii() and text.isdecimal() and low <= int(text[:10]) <= high):
            raise UserError(
                f'the environment says {name}={text!r}, expected a whole number from {low} to'
                f' {high}: start several processes with torchrun, or type `unset RANK LOCAL_RANK'
                ' WORLD_SIZE LOCAL_WORLD_SIZE`'
            )
        return int(text)

    size = number('WORLD_SIZE', 1, 1, 10**6)
    rank, local_rank = number('RANK', 0, 0, size - 1), number('LOCAL_RANK', 0, 0, size - 1)
    here = number('LOCAL_WORLD_SIZE', local_rank + 1, local_rank + 1, size)
    if size > 1 and not dist.is_initialized():
        number('MASTER_PORT', '', 1, 65535)
        host = os.environ.get('MASTER_ADDR', '')
        try:
            if not host:
                raise OSError('it is not set')
            socket.getaddrinfo(host, None)
        except OSError as error:
            raise UserError(
                f'the environment says WORLD_SIZE={size}, and MASTER_ADDR={host!r} cannot be found'
                f' ({error}): start several processes with torchrun'
            ) from None
    return rank, local_rank, size, here


def is_rank_0() -> bool:
    """Return whether this process is the main rank, as far as the environment can be read."""
    return os.environ.get('RANK', '0') in ('0', '') or os.environ.get('WORLD_SIZE', '1') == '1'


def start(
    device: str | None = None,
    backend: str | None = None,
    timeout_minutes: float = 10.0,
    out_dir: str | None = None,
) -> 'World':
    """Join the processes that torchrun started, or be the only one, and take a device.

    device: 'cpu' | 'cuda' | 'cuda:1' | None (a GPU where there is one); backend: 'nccl' | 'gloo' |
    None (what fits). timeout_minutes: how long a rank waits for another in training before it gives
    up; out_dir: where each rank then writes what it was exchanging. Raises UserError for a device
    or backend that this machine does not have.
    """
    rank, local_rank, size, here = read_environment()
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    match = re.fullmatch(r'cpu|cuda(?::(\d+))?', device)
    if not match:
        raise UserError(f"device={device!r} is not one of 'cpu', 'cuda', 'cuda:N'")
    device_type = device.split(':')[0]
    if device_type == 'cuda' and not torch.cuda.is_available():
        raise UserError(
            f'device={device!r} was asked for, but torch {torch.__version__} sees no GPU here: type'
            ' --device=cpu'
        )
    if match[1] and size > 1:
        raise UserError(
            f'device={device!r} names one GPU, but torchrun started {size} processes, which take'
            ' one each: type --device=cuda'
        )
    # every rank sees it, so that the main one can say it
    if device_type == 'cuda' and here > torch.cuda.device_count():
        raise UserError(
            f'{here} processes were started on this machine, which has {torch.cuda.device_count()}'
            ' GPUs: lower --nproc_per_node'
        )
    backend = backend or ('nccl' if device_type == 'cuda' else 'gloo')
    if backend not in ('nccl', 'gloo') or backend == 'nccl' and device_type == 'cpu':
        raise UserError(
            f'backend={backend!r} does not serve device={device_type!r}: type'
            f' --backend={"nccl" if device_type == "cuda" else "gloo"}'
        )
    if device_type == 'cuda':
        index = local_rank if size > 1 else int(match[1] or 0)
        if index >= torch.cuda.device_count():
            raise UserError(
                f'device={device!r}: there are {torch.cuda.device_count()} GPUs, the first is'
                ' cuda:0'
            )
        chosen = torch.device('cuda', index)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device('cpu')
        _keep_freed_memory()
    world = World(rank, size, chosen, local_size=here, local_rank=local_rank)
    raise_limit()
    if size > 1:
        if backend == 'nccl' and out_dir:
            record_collectives(out_dir)
        join(world, backend, datetime.timedelta(minutes=timeout_minutes))
    return world


def record_collectives(out_dir: str):
    """Have torch's flight recorder write the last collectives of each rank to
    out_dir/nccl_trace_rank_* when one of them times out.

    `torchfrtrace` compares them. What the environment says already stays.
    """
    for name, value in (
        ('TORCH_FR_BUFFER_SIZE', '2000'),
        ('TORCH_NCCL_DUMP_ON_TIMEOUT', '1'),
        ('TORCH_FR_DUMP_TEMP_FILE', os.path.join(os.path.abspath(out_dir), 'nccl_trace_rank_')),
    ):
        os.environ.setdefault(name, value)


def shares_torchruns_store() -> bool:
    """Return whether processes meet in the store of torchrun, which outlives them; else rank 0 has
    one of its own.
    """
    return os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'


def rendezvous(store: Any, rank: int, size: int, timeout: Any):
    """Return a store for the processes that start together, within `store`, which holds what those
    of earlier starts wrote.

    timeout: datetime.timedelta that a process waits for the others. Nothing that a process is told
    says which start it belongs to: torchrun on each machine counts its own restarts, so that after
    the loss of a machine the counts differ. So rank 0 makes up a name, and each other rank joins it
    once; a name under which its rank has been counted before, or that nobody answers, is of an
    earlier start. Raises UserError after `timeout`.
    """
    deadline, tried, pause = time.monotonic() + timeout.total_seconds(), set(), 0.02
    late = UserError(
        f'not all of the {size} processes came within {timeout.total_seconds() / 60:g} minutes'
        f' (this is rank {rank}): start all with the same --nnodes and --nproc_per_node, or wait'
        ' longer with --timeout_minutes'
    )
    if rank == 0:
        name = uuid.uuid4().hex
        mine = dist.PrefixStore(name, store)
        store.set('newest start', name)
        try:
            mine.wait([f'rank {other}' for other in range(1, size)], timeout)
        except dist.DistError:
            raise late from None
        mine.set('complete', '')
        return mine
    while time.monotonic() < deadline:
        if (
            store.check(['newest start'])
            and (name := store.get('newest start').decode()) not in tried
        ):
            tried.add(name)
            found = dist.PrefixStore(name, store)
            if found.add(f'rank {rank}', 1) == 1:
                while time.monotonic() < deadline and store.get('newest start').decode() == name:
                    if found.check(['complete']):
                        return found
                    time.sleep(pause)
                    pause = min(1.5 * pause, 1.0)
        time.sleep(0.1)
    raise late


def join(world: 'World', backend: str, timeout: Any):
    """Join the process group of all ranks, or make one of a single process."""
    global _store, _slow_group, _timeout, _heartbeat
    world.backend = backend
    if not dist.is_initialized():
        _slow_group, _timeout, _heartbeat = None, timeout, None
        if world.size == 1:
            store = dist.HashStore()
        else:
            torchruns = shares_torchruns_store()
            store = dist.TCPStore(
                os.environ['MASTER_ADDR'],
                int(os.environ['MASTER_PORT']),
                world.size,
                is_master=world.is_main and not torchruns,
            )
            store = _store = (
                rendezvous(store, world.rank, world.size, timeout) if torchruns else store
            )
            _heartbeat = Heartbeat(store, world.rank, world.size, timeout.total_seconds())
        # tensors of the CPU go through gloo in any case: parameters that fsdp_offload keeps there
        dist.init_process_group(
            backend='cpu:gloo,cuda:nccl' if backend == 'nccl' else backend,
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
        )
        if _heartbeat:
            _heartbeat.start()
    world.group = dist.group.WORLD
    _slow_group = _slow_group or dist.new_group(backend='gloo', timeout=SLOW_TIMEOUT)
    world.slow_group = _slow_group


def _keep_freed_memory():
    """Ask glibc to keep the big buffers of a step instead of returning them to the kernel and
    faulting them in again.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to set
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def report_error(error: str) -> None:
    """Print what is wrong with the input, once for all ranks: from the main rank, or from one that
    meets it alone.
    """
    where = ''
    if _store is None:  # before the ranks met: one for each machine
        if os.environ.get('WORLD_SIZE', '1') != '1' and os.environ.get('LOCAL_RANK', '0') not in (
            '0',
            '',
        ):
            return
    else:
        rank = int(os.environ.get('RANK', 0))
        if rank != 0:
            for _ in range(30):
                if was_reported():
                    return
                time.sleep(0.1)
            where = f' (rank {rank} on {os.uname().nodename})'
        _store.set('told', '')
    print(f'error{where}: {redact(str(error))}', file=sys.stderr, flush=True)


def rendezvous_store():
    """Return the store in which the processes of this start met; None for a single one."""
    return _store


def was_reported():
    """Return whether some rank reported what is wrong with the input and left: then the errors of
    others, which miss it, say nothing.
    """
    return _store is not None and _store.check(['told'])


def run_and_exit(main: Callable):
    """End the process with the exit code of main(), and after an error of the program with 1."""
    try:
        code = main()
    except BaseException:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        if _heartbeat:
            _heartbeat.report_unresponsive()
        sys.stderr.flush()
        _join_saver()
        sys.stdout.flush()
        os._exit(1)
    leave(code)


def _join_saver():
    """Wait for a save of this process that is under way, but no longer than processes wait for each
    other in training.

    A save that all take part in comes to its end, and one that waits for a process that hangs does
    not hold up the job.
    """
    deadline = time.monotonic() + _timeout.total_seconds()
    for thread in threading.enumerate():
        if thread.name == SAVER_THREAD:  # the compiler has threads too, which never end
            thread.join(max(0.0, deadline - time.monotonic()))


def leave(code: Any):
    """End the process with exit code `code`.

    gloo's threads make a normal interpreter exit abort at random ("terminate called without an
    active exception"), so a distributed process collects, waits for the others, destroys the group,
    flushes and leaves without further ado.
    """
    signals.ignore_signals()  # all is done: a late signal may not change the code
    if dist.is_initialized():
        _join_saver()
        gc.collect()
        if code == 0:
            dist.barrier()
        if _heartbeat:
            _heartbeat.end()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
