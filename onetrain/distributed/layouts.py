"""Layouts: what each rank holds of a model, and how a step runs under each.

Each rank holds of parameters (P), gradients (G) and optimizer state (S) on n
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
sharding). context_parallel=k splits each sequence over k neighboring ranks
(onetrain/ops/ring_attention.py); the layouts above then treat a rank's share of the tokens as they
treat its share of the sequences.

Parameters keep their names and their shapes in all of them; a part of one is a DTensor, split by
rows (dimension 0) as torch.chunk splits, or, of experts that the ranks do not divide, along a width
of each (placement()).
"""

import contextlib
import datetime
import inspect
import math
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from onetrain.config import UserError
from onetrain.distributed import processes
from onetrain.ops.ring_attention import Ring

if TYPE_CHECKING:
    from model import Model
    from onetrain.distributed.processes import World
    from onetrain.training.muon import Muon
    from train import Config

# the new name of torch 2.13
gather_rows = getattr(dist, 'all_gather_single', None) or dist.all_gather_into_tensor


def choose_layout(world: 'World', c: 'Config', notes: list[str]) -> None:
    """Decide which layout the keys of `c` ask for and set it in `world`. Raises UserError for
    what these ranks cannot be split into.
    """
    k, n, replicas = c.context_parallel, world.size, c.fsdp_replicas
    _check_layout(c, n)
    if processes.shares_torchruns_store() and os.environ.get('GROUP_WORLD_SIZE', '1') != '1':
        notes.append(
            'WARNING: if a machine is lost, torchrun will not let another take its place: '
            'type `export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` before torchrun, on every machine'
        )
    if c.use_fsdp and n == 1:
        notes.append(
            'use_fsdp=True on one process: nothing is shared out, the model runs through FSDP all'
            ' the same'
        )
        processes.join(
            world, 'nccl' if world.device.type == 'cuda' else 'gloo', processes.SLOW_TIMEOUT
        )
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


def _check_layout(c, n):
    """Raise UserError for what `n` processes cannot be split into."""
    k, replicas = c.context_parallel, c.fsdp_replicas
    if c.use_zero1 and c.use_fsdp:
        raise UserError(
            'use_zero1=True and use_fsdp=True are two layouts: type --use_zero1=False (FSDP shards'
            ' the optimizer state too) or --use_fsdp=False'
        )
    if n % k:
        raise UserError(
            f'context_parallel={k} does not divide the {n} process{"es" * (n > 1)}: start {k} or a'
            ' multiple of it with torchrun --nproc_per_node, or type'
            f' --context_parallel={_divisor(n, k)}'
        )
    if c.block_size % k:
        raise UserError(
            f'context_parallel={k} does not divide block_size={c.block_size}: type'
            f' --block_size={-(-c.block_size // k) * k} or'
            f' --context_parallel={math.gcd(n, c.block_size)}'
        )
    if k > 1 and c.dropout:
        raise UserError(
            f'context_parallel={k} has no dropout in its attention: type --dropout=0 or'
            ' --context_parallel=1'
        )
    if c.use_fsdp and n % replicas:
        raise UserError(
            f'fsdp_replicas={replicas} does not divide the {n} process{"es" * (n > 1)}: type'
            f' --fsdp_replicas={_divisor(n, replicas)}'
        )


def _divisor(number, most):
    """Return the largest divisor of `number` up to `most`."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


def shard(
    model: 'Model', world: 'World', dtype: torch.dtype, reduce_dtype: torch.dtype, offload: bool
) -> None:
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
            # the head and its norm, a list, end the forward pass and begin the backward one
            reshard_after_forward=world.layout == 'ZeRO-3' and not isinstance(unit, list),
            mp_policy=low if unit in units else MixedPrecisionPolicy(),
            **common,
        )
    # what is left is used first and last: it stays gathered in between
    fully_shard(model, reshard_after_forward=False, **common)
    blocks = [unit for unit in units if not isinstance(unit, list)]
    for block, following in zip(blocks, blocks[1:]):
        block.set_modules_to_forward_prefetch([following])


def placement(parameter: torch.Tensor, ranks: int):
    """Return along which dimension FSDP splits a parameter, None for the first: the experts of a
    layer, (E, out, in), along another where `ranks` do not divide E.

    Else a rank would hold one whole expert more than another, or none, and each exchange would be
    as large as if there were as many experts as ranks.
    """
    if parameter.dim() != 3 or len(parameter) % ranks == 0:
        return None
    return next((Shard(dim) for dim in (1, 2) if parameter.size(dim) % ranks == 0), None)


def wrap(
    model: 'Model', world: 'World', compile: bool, accumulation: int, graphs: bool = False
) -> tuple:
    """Return (what evaluation calls, what training calls): `model`, compiled if asked for, and the
    same under DistributedDataParallel where the layout needs it. accumulation: micro-steps of an
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
def on_graph_stream(world: 'World'):
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
def forward_only(model: nn.Module):
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


def gradient_wait(train_model: nn.Module) -> dict:
    """Return {'comm_wait_s': seconds} from the end of a rank's own backward pass until the
    gradients of the others were there, as torch's DDP last measured it (in the steps up to the
    10th, then in every 100th); {} under a layout that is not measured, or before.
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


def gradient_sync_context(model: nn.Module, last: bool, world: 'World'):
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


def shard_rows(tensor: torch.Tensor, mesh: Any):
    """Return slice of the rows of `tensor` that this rank has in the sharding dimension of `mesh`,
    as torch.chunk splits: the last may have fewer, or none.
    """
    return rank_rows(len(tensor), mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1))


def rank_rows(length: int, ranks: int, rank: int):
    """Return slice of the rows that one of `ranks` has of a tensor of `length` rows."""
    size = -(-length // ranks)
    return slice(min(rank * size, length), min((rank + 1) * size, length))


def copy_into_shard(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy the full `tensor` into a parameter, or into the part of it that this rank holds."""
    if isinstance(parameter, DTensor):
        mesh, dim = parameter.device_mesh, parameter.placements[-1].dim
        mine = rank_rows(tensor.size(dim), mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1))
        parameter.detach().to_local().copy_(tensor[(slice(None),) * dim + (mine,)])
    else:
        parameter.detach().copy_(tensor)


def local_shard(tensor: torch.Tensor, mesh: Any):
    """Return this rank's rows of a tensor that every rank holds, as a DTensor that shares its
    memory.
    """
    return DTensor.from_local(
        tensor.detach()[shard_rows(tensor, mesh)],
        mesh,
        [Shard(0)],
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def zero1_parameters(named: dict[str, torch.Tensor], world: 'World') -> dict[str, torch.Tensor]:
    """Return {name: what this rank's optimizer updates} of the parameters `named`: under ZeRO-1 its
    rows of each, else themselves.
    """
    if world.layout != 'ZeRO-1':
        return dict(named)
    return {name: torch.nn.Parameter(local_shard(p, world.mesh)) for name, p in named.items()}


def attach_zero1(
    optimizer: 'Muon | torch.optim.Optimizer',
    named: dict[str, torch.Tensor],
    updated: dict[str, torch.Tensor],
    world: 'World',
) -> None:
    """Make a step of the optimizer over `updated` = zero1_parameters(named) one of the whole model:
    under ZeRO-1, hand it its rows of the gradients before, gather the parameters after.
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
                full = p.new_empty(size * world.size, *p.shape[1:])
                padded = p.new_zeros(size, *p.shape[1:])
                padded[: len(mine)] = mine
                mine = padded
            gathering.append((gather_rows(full, mine, async_op=True), p, full))
        for work, p, full in gathering:
            work.wait()
            if full is not p:
                p.copy_(full[: len(p)])

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
