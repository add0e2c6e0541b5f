"""Processes, devices and the layout. Every other file asks here for rank, world size and device.

The layouts, and what each rank holds of parameters (P), gradients (G) and optimizer state (S) on n
ranks:

    single                       P      G      S
    DDP                          P      G      S      sums gradients at the last micro-step
    ZeRO-1   use_zero1=True      P      G      S/n    DDP; each rank updates its rows of every
                                                      parameter, then all gather them
    ZeRO-2   use_fsdp=True       P*     G/n    S/n    FSDP2 with fsdp_reshard=False: *in whole from
                                                      first forward to last backward of a step
    ZeRO-3   use_fsdp=True       P/n    G/n    S/n    FSDP2 with fsdp_reshard=True: gathered unit
                                                      by unit where they are needed

fsdp_replicas=r shards over groups of n/r ranks, each group a replica of the others (hybrid
sharding). context_parallel=k splits each sequence over k neighbouring ranks (engine/ring.py); the
layouts above then treat a rank's share of the tokens as they treat its share of the sequences.

Parameters keep their names and their shapes in all of them; a part of one is a DTensor, split by
rows (dimension 0) as torch.chunk splits, or, of experts that the ranks do not divide, along a width
of each (placement()).
"""

import contextlib
import ctypes
import datetime
import gc
import inspect
import math
import os
import re
import socket
import sys
import threading
import time
import traceback
import uuid
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from engine import stopping
from engine.configurator import ConfigError
from engine.descriptors import raise_limit
from engine.files import redact
from engine.heartbeat import Heartbeat
from engine.ring import Ring

# for what waits for disks and networks: a checkpoint may take long to read
PATIENCE = datetime.timedelta(days=1)
# the new name of torch 2.13
gather_rows = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor
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
    group: object = None
    slow_group: object = None
    layout: str = 'single'  # 'single' | 'DDP' | 'ZeRO-1' | 'ZeRO-2' | 'ZeRO-3'
    # DeviceMesh over which parameters or optimizer state are sharded; its last dimension shards
    mesh: object = None
    data_rank: int = 0
    data_size: int = 1
    ring: Ring | None = None
    here: int = 1  # processes on this machine
    local_rank: int = 0  # of these
    # torch.cuda.Stream on which steps are recorded, warmed up and exchange gradients; None without
    # CUDA graphs
    graph_stream: object = None

    @property
    def main(self):
        return self.rank == 0

    @property
    def gpu_name(self):
        """Return the name of the GPU of this rank, None on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else None

    @property
    def ddp(self):
        return self.layout in ('DDP', 'ZeRO-1')

    @property
    def fsdp(self):
        return self.layout in ('ZeRO-2', 'ZeRO-3')

    def describe(self):
        """Such as 'FSDP (ZeRO-3), 2 replicas, context parallel 2'."""
        replicas = self.mesh.size(0) if self.fsdp and self.mesh.ndim == 2 else 1
        return (
            (f'FSDP ({self.layout})' if self.fsdp else self.layout)
            + (f', {replicas} replicas' if replicas > 1 else '')
            + (f', context parallel {self.ring.size}' if self.ring else '')
        )


# ---- processes and device


def read_environment():
    """Return (rank, local rank, world size, processes on this machine), as torchrun says it in the
    environment. Raises ConfigError.
    """

    def number(name, default, low, high):
        text = os.environ.get(name, str(default))
        if not (text.isascii() and text.isdecimal() and low <= int(text[:10]) <= high):
            raise ConfigError(
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
            raise ConfigError(
                f'the environment says WORLD_SIZE={size}, and MASTER_ADDR={host!r} cannot be found'
                f' ({error}): start several processes with torchrun'
            ) from None
    return rank, local_rank, size, here


def is_rank_0():
    """Whether this process is the main rank, as far as the environment can be read."""
    return os.environ.get('RANK', '0') in ('0', '') or os.environ.get('WORLD_SIZE', '1') == '1'


def start(device=None, backend=None, timeout_minutes=10.0, out_dir=None):
    """Join the processes that torchrun started, or be the only one, and take a device.

    device: 'cpu' | 'cuda' | 'cuda:1' | None (a GPU where there is one); backend: 'nccl' | 'gloo' |
    None (what fits). timeout_minutes: how long a rank waits for another in training before it gives
    up; out_dir: where each rank then writes what it was exchanging. Raises ConfigError for a device
    or backend that this machine does not have.
    """
    rank, local_rank, size, here = read_environment()
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    match = re.fullmatch(r'cpu|cuda(?::(\d+))?', device)
    if not match:
        raise ConfigError(f"device={device!r} is not one of 'cpu', 'cuda', 'cuda:N'")
    device_type = device.split(':')[0]
    if device_type == 'cuda' and not torch.cuda.is_available():
        raise ConfigError(
            f'device={device!r} was asked for, but torch {torch.__version__} sees no GPU here: type'
            ' --device=cpu'
        )
    if match[1] and size > 1:
        raise ConfigError(
            f'device={device!r} names one GPU, but torchrun started {size} processes, which take'
            ' one each: type --device=cuda'
        )
    # every rank sees it, so that the main one can say it
    if device_type == 'cuda' and here > torch.cuda.device_count():
        raise ConfigError(
            f'{here} processes were started on this machine, which has {torch.cuda.device_count()}'
            ' GPUs: lower --nproc_per_node'
        )
    backend = backend or ('nccl' if device_type == 'cuda' else 'gloo')
    if backend not in ('nccl', 'gloo') or backend == 'nccl' and device_type == 'cpu':
        raise ConfigError(
            f'backend={backend!r} does not serve device={device_type!r}: type'
            f' --backend={"nccl" if device_type == "cuda" else "gloo"}'
        )
    if device_type == 'cuda':
        index = local_rank if size > 1 else int(match[1] or 0)
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f'device={device!r}: there are {torch.cuda.device_count()} GPUs, the first is'
                ' cuda:0'
            )
        chosen = torch.device('cuda', index)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device('cpu')
        _keep_freed_memory()
    world = World(rank, size, chosen, here=here, local_rank=local_rank)
    raise_limit()
    if size > 1:
        if backend == 'nccl' and out_dir:
            record_collectives(out_dir)
        _join(world, backend, datetime.timedelta(minutes=timeout_minutes))
    return world


def record_collectives(out_dir):
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


def shares_torchruns_store():
    """Whether processes meet in the store of torchrun, which outlives them; else rank 0 has one of
    its own.
    """
    return os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'


def rendezvous(store, rank, size, timeout):
    """Return a store for the processes that start together, within `store`, which holds what those
    of earlier starts wrote.

    timeout: datetime.timedelta that a process waits for the others. Nothing that a process is told
    says which start it belongs to: torchrun on each machine counts its own restarts, so that after
    the loss of a machine the counts differ. So rank 0 makes up a name, and each other rank joins it
    once; a name under which its rank has been counted before, or that nobody answers, is of an
    earlier start. Raises ConfigError after `timeout`.
    """
    deadline, tried, pause = time.monotonic() + timeout.total_seconds(), set(), 0.02
    late = ConfigError(
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


def _join(world, backend, timeout):
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
                is_master=world.main and not torchruns,
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
    _slow_group = _slow_group or dist.new_group(backend='gloo', timeout=PATIENCE)
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


def report_error(error):
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


def store():
    """The store in which the processes of this start met; None for a single one."""
    return _store


def was_reported():
    """Whether some rank told() what is wrong with the input and left: then the errors of others,
    which miss it, say nothing.
    """
    return _store is not None and _store.check(['told'])


def run_and_leave(main):
    """End the process with the exit code of main(), and after an error of the program with 1."""
    try:
        code = main()
    except BaseException:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        if _heartbeat:
            _heartbeat.name_silent()
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


def leave(code):
    """End the process with exit code `code`.

    gloo's threads make a normal interpreter exit abort at random ("terminate called without an
    active exception"), so a distributed process collects, waits for the others, destroys the group,
    flushes and leaves without further ado.
    """
    stopping.ignore()  # all is done: a late signal may not change the code
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


# ---- the layout


def choose_layout(world, c, notes):
    """Decide which layout the keys of `c` ask for and set it in `world`. Raises ConfigError for
    what these ranks cannot be split into.
    """
    k, n = c.context_parallel, world.size
    if c.use_zero1 and c.use_fsdp:
        raise ConfigError(
            'use_zero1=True and use_fsdp=True are two layouts: type --use_zero1=False (FSDP shards'
            ' the optimizer state too) or --use_fsdp=False'
        )
    if n % k:
        raise ConfigError(
            f'context_parallel={k} does not divide the {n} process{"es" * (n > 1)}: start {k} or a'
            ' multiple of it with torchrun --nproc_per_node, or type'
            f' --context_parallel={_divisor(n, k)}'
        )
    if c.block_size % k:
        raise ConfigError(
            f'context_parallel={k} does not divide block_size={c.block_size}: type'
            f' --block_size={-(-c.block_size // k) * k} or'
            f' --context_parallel={math.gcd(n, c.block_size)}'
        )
    if k > 1 and c.dropout:
        raise ConfigError(
            f'context_parallel={k} has no dropout in its attention: type --dropout=0 or'
            ' --context_parallel=1'
        )
    if shares_torchruns_store() and os.environ.get('GROUP_WORLD_SIZE', '1') != '1':
        notes.append(
            'WARNING: if a machine is lost, torchrun will not let another take its place: '
            'type `export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` before torchrun, on every machine'
        )
    replicas = c.fsdp_replicas
    if c.use_fsdp and n % replicas:
        raise ConfigError(
            f'fsdp_replicas={replicas} does not divide the {n} process{"es" * (n > 1)}: type'
            f' --fsdp_replicas={_divisor(n, replicas)}'
        )
    if c.use_fsdp and n == 1:
        notes.append(
            'use_fsdp=True on one process: nothing is shared out, the model runs through FSDP all'
            ' the same'
        )
        _join(world, 'nccl' if world.device.type == 'cuda' else 'gloo', PATIENCE)
    if c.use_fsdp and c.fsdp_min_num_params:
        notes.append(
            f'fsdp_min_num_params={c.fsdp_min_num_params} has no meaning here: FSDP shares out'
            ' block by block'
        )
    if c.use_zero1 and n == 1:
        notes.append(
            'use_zero1=True on one process: there is no other to share the optimizer state with'
        )
    if c.use_fsdp:
        world.layout = 'ZeRO-3' if c.fsdp_reshard else 'ZeRO-2'
        shape, names = (
            ((replicas, n // replicas), ('replicate', 'shard'))
            if replicas > 1
            else ((n,), ('shard',))
        )
        world.mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    elif n > 1:
        world.layout = 'ZeRO-1' if c.use_zero1 else 'DDP'
        world.mesh = (
            init_device_mesh(world.device.type, (n,), mesh_dim_names=('shard',))
            if c.use_zero1
            else None
        )
    world.data_rank, world.data_size = world.rank // k, n // k
    if k > 1:
        timeout = datetime.timedelta(minutes=c.timeout_minutes)
        # every rank makes every group
        groups = [
            dist.new_group(list(range(first, first + k)), timeout=timeout)
            for first in range(0, n, k)
        ]
        world.ring = Ring(groups[world.data_rank], world.rank % k, k, c.block_size, world.device)


def _divisor(number, most):
    """The largest divisor of `number` up to `most`."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


def shard(model, world, dtype, reduce_dtype, offload):
    """Under FSDP, split the parameters of `model` (on the meta device) over the ranks, unit by
    unit; under other layouts do nothing.

    model.sharding_units(): (units, others), lists of modules (or lists of them that are gathered
    together): the weights of the first are gathered in `dtype`, that of the matmuls; those of the
    others (which may lie within a unit), and what is in neither, in float32. Gradients are summed
    in reduce_dtype.
    """
    if not world.fsdp:
        return
    low = (
        MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
        )
        if dtype != torch.float32
        else MixedPrecisionPolicy()
    )
    offloading = (
        CPUOffloadPolicy(pin_memory=world.device.type == 'cuda') if offload else OffloadPolicy()
    )
    units, others = model.sharding_units()
    common = dict(
        mesh=world.mesh,
        offload_policy=offloading,
        shard_placement_fn=lambda parameter: placement(parameter, world.mesh.size(-1)),
    )
    for unit in others + units:  # what lies within another first
        fully_shard(
            unit,
            reshard_after_forward=world.layout == 'ZeRO-3',
            mp_policy=low if unit in units else MixedPrecisionPolicy(),
            **common,
        )
    # what is left is used first and last: it stays gathered in between
    fully_shard(model, reshard_after_forward=False, **common)
    blocks = [unit for unit in units if not isinstance(unit, list)]
    for block, following in zip(blocks, blocks[1:]):
        block.set_modules_to_forward_prefetch([following])


def placement(parameter, ranks):
    """Return along which dimension FSDP splits a parameter, None for the first: the experts of a
    layer, (E, out, in), along another where `ranks` do not divide E.

    Else a rank would hold one whole expert more than another, or none, and each exchange would be
    as large as if there were as many experts as ranks.
    """
    if parameter.dim() != 3 or len(parameter) % ranks == 0:
        return None
    return next((Shard(dim) for dim in (1, 2) if parameter.size(dim) % ranks == 0), None)


def wrap(model, world, compile, accumulation, graphs=False):
    """(what evaluation calls, what training calls): `model`, compiled if asked for, and the same
    under DistributedDataParallel where the layout needs it. accumulation: micro-steps of an
    optimizer step; graphs: whether they will be recorded as CUDA graphs.
    """
    if graphs and world.device.type == 'cuda':
        world.graph_stream = torch.cuda.Stream()
    # FSDP gathers between them, and DDP sends the gradients of one while the next are computed
    in_parts = world.layout != 'single'
    if compile and world.ring:
        world.ring.keep_from_compiler()
    if compile:
        model.keep_from_compiler()
    if compile and in_parts:
        model.compile_units()
    step_model = torch.compile(model) if compile and not in_parts else model
    if not world.ddp:
        return step_model, step_model
    ddp = torch.nn.parallel.DistributedDataParallel
    # the new name of torch 2.13
    no_sync_of_buffers = (
        'forward_sync_buffers'
        if 'forward_sync_buffers' in inspect.signature(ddp).parameters
        else 'broadcast_buffers'
    )
    # gradients arrive on the stream on which DDP is made: a recording sees only its own, and the
    # default one cannot be recorded
    with on_graph_stream(world):
        return step_model, ddp(
            step_model,
            device_ids=[world.device.index] if world.device.type == 'cuda' else None,
            gradient_as_bucket_view=True,
            # torch's does not work with no_sync() in the first step
            static_graph=accumulation == 1,
            **{no_sync_of_buffers: False},
        )


@contextlib.contextmanager
def on_graph_stream(world):
    """Context on world.graph_stream, in step with the current stream: what was queued there comes
    before, what will be comes after.
    """
    if world.graph_stream is None:
        yield
        return
    before = torch.cuda.current_stream()
    world.graph_stream.wait_stream(before)
    with torch.cuda.stream(world.graph_stream):
        yield
    before.wait_stream(world.graph_stream)


@contextlib.contextmanager
def forward_only(model):
    """Context of forward passes of `model` without backward ones: it is in evaluation mode, and
    afterwards as it was.

    FSDP leaves the units gathered that it does not reshard after a forward pass, and expects a
    backward pass to split them again: here that is done at the end.
    """
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def gradient_wait(train_model):
    """{'comm_wait_s': seconds} from the end of a rank's own backward pass until the gradients of
    the others were there, as torch's DDP last measured it (in the steps up to the 10th, then in
    every 100th); {} under a layout that is not measured, or before.
    """
    if not isinstance(train_model, torch.nn.parallel.DistributedDataParallel):
        return {}
    measured = train_model._get_ddp_logging_data()
    if 'backward_comm_time' not in measured:
        return {'comm_wait_s': 0.0}
    return {
        'comm_wait_s': (
            (measured['backward_comm_time'] - measured['backward_compute_comm_overlap_time']) / 1e9
        )
    }


def gradient_sync_context(model, last, world):
    """Context of one micro-step. Under DDP, backward() sums gradients over ranks only if it is the
    `last` of an optimizer step; under ZeRO-2 parameters stay gathered until then. FSDP sums at each
    over the ranks that share the model, so that a rank never holds more gradients than its own, and
    over replicas at the last.
    """
    if world.ddp and not last:
        return model.no_sync()
    if world.layout == 'ZeRO-2':
        model.set_reshard_after_backward(last)
    if world.fsdp and world.mesh.ndim == 2:
        model.set_requires_all_reduce(last)
    return contextlib.nullcontext()


def shard_rows(tensor, mesh):
    """Slice of the rows of `tensor` that this rank has in the sharding dimension of `mesh`, as
    torch.chunk splits: the last may have fewer, or none.
    """
    return rank_rows(len(tensor), mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1))


def rank_rows(length, ranks, rank):
    """Slice of the rows that one of `ranks` has of a tensor of `length` rows."""
    size = -(-length // ranks)
    return slice(min(rank * size, length), min((rank + 1) * size, length))


def copy_into_shard(parameter, tensor):
    """Copy the full `tensor` into a parameter, or into the part of it that this rank holds."""
    if isinstance(parameter, DTensor):
        mesh, dim = parameter.device_mesh, parameter.placements[-1].dim
        mine = rank_rows(tensor.size(dim), mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1))
        parameter.detach().to_local().copy_(tensor[(slice(None),) * dim + (mine,)])
    else:
        parameter.detach().copy_(tensor)


def local_shard(tensor, mesh):
    """This rank's rows of a tensor that every rank holds, as a DTensor that shares its memory."""
    return DTensor.from_local(
        tensor.detach()[shard_rows(tensor, mesh)],
        mesh,
        [Shard(0)],
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def zero1_parameters(named, world):
    """{name: what this rank's optimizer updates} of the parameters `named`: under ZeRO-1 its rows
    of each, else themselves.
    """
    if world.layout != 'ZeRO-1':
        return dict(named)
    return {name: torch.nn.Parameter(local_shard(p, world.mesh)) for name, p in named.items()}


def attach_zero1(optimizer, named, updated, world):
    """Make a step of the optimizer over `updated` = optimized(named) one of the whole model: under
    ZeRO-1, hand it its rows of the gradients before, gather the parameters after.
    """
    if world.layout != 'ZeRO-1':
        return
    pairs = [(p, updated[name]) for name, p in named.items()]

    def before(*_):
        for p, mine in pairs:
            mine.grad = local_shard(p.grad, world.mesh)

    @torch.no_grad()
    def after(*_):
        gathering = []
        for p, mine in pairs:
            mine.grad = None
            p, mine, size = p.detach(), mine.detach().to_local(), -(-len(p) // world.size)
            full = p
            if len(p) % world.size:
                full, padded = (
                    p.new_empty(size * world.size, *p.shape[1:]),
                    p.new_zeros(size, *p.shape[1:]),
                )
                padded[: len(mine)] = mine
                mine = padded
            gathering.append((gather_rows(full, mine, async_op=True), p, full))
        for work, p, full in gathering:
            work.wait()
            if full is not p:
                p.copy_(full[: len(p)])

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


# ---- agreement


def sum_over_ranks(tensor, world):
    """`tensor` summed over all ranks, in place; returns it."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(number, world):
    """The largest of the ranks' small ints, on every rank; agreed on the host, so no GPU waits."""
    if world.size == 1:
        return number
    answer = torch.tensor(number)
    dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=world.group)
    return answer.item()


class Agreement:
    """Finds the largest of the ranks' small ints while they work: all_reduce_max() in two halves,
    of which only the second waits.
    """

    def __init__(self, world):
        self.world, self.answer, self.work = world, None, None

    def begin(self, number):
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

    def end(self):
        """Return the largest of the numbers that were handed in, the same on every rank."""
        if self.world.size == 1:
            return 0
        self.work.wait()
        return self.answer.item()


def gather_numbers(values, world):
    """Return {name: list of the ranks' values} of a dict of floats that has the same names on every
    rank; agreed on the host.
    """
    mine = torch.tensor([*values.values()], dtype=torch.float64)
    table = [mine.clone() for _ in range(world.size)]
    if world.size > 1:
        dist.all_gather(table, mine, group=world.group)
    return dict(zip(values, torch.stack(table, dim=1).tolist()))


def broadcast_from_main(work, world):
    """What work() returns on the main rank (any small builtin), on every rank; a ConfigError that
    it raises, too. It may take long.
    """
    box = [None, None]
    if world.main:
        try:
            box = [work(), None]
        except ConfigError as error:
            box = [None, str(error)]
    if world.size > 1:
        dist.broadcast_object_list(box, src=0, group=world.slow_group)
    if box[1] is not None:
        raise ConfigError(box[1])
    return box[0]


def send_from_main(tensors, world):
    """Overwrite each of `tensors`, which every rank has in full, with that of the main rank."""
    for tensor in tensors if world.size > 1 else ():
        dist.broadcast(tensor, src=0)


def once_per_machine(work, world):
    """Return what work() returns on the main rank (it must pickle). The first rank of each other
    machine does the work too and returns its own, to be compared, so that a hundred processes do
    not all ask for the same ten thousand files. Raises a ConfigError of the main rank on all.
    """
    result = broadcast_from_main(work, world)
    return work() if world.local_rank == 0 and not world.main else result


def all_gather_objects(value, world):
    """Every rank's `value` (any small builtin), in their order, on every rank; over slow_group,
    which a thread may have for itself.
    """
    if world.size == 1:
        return [value]
    values = [None] * world.size
    dist.all_gather_object(values, value, group=world.slow_group)
    return values


def assert_same_on_all_ranks(values, what, world):
    """Raise ConfigError on every rank unless the dict `values` is the same on all, naming the first
    difference.
    """
    everyone = all_gather_objects(values, world)
    for rank, theirs in enumerate(everyone):
        for key in everyone[0]:
            if theirs.get(key) != everyone[0][key]:
                raise ConfigError(
                    f'{what} differs between processes: {key}={everyone[0][key]!r} on rank 0,'
                    f' {theirs.get(key)!r} on rank {rank}: start all with the same command, files'
                    ' and data'
                )


def barrier(world):
    if world.size > 1:
        dist.barrier(group=world.slow_group)
