"""The optimizer with its decay groups, clipping, the guard against bad steps, gradient statistics,
and the optimizer's state by parameter name.
"""

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from onetrain.training.muon import Muon, optimizer_state

if TYPE_CHECKING:
    from model import Model


def learning_rate_at(
    step: int,
    *,
    learning_rate: float,
    min_lr: float,
    warmup_iters: int,
    lr_decay_iters: int,
    decay_lr: bool,
) -> float:
    """Return the learning rate of optimizer step `step` (0-based): linear warm-up, cosine down to
    min_lr at lr_decay_iters (as nanoGPT).
    """
    if not decay_lr:
        return learning_rate
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if step >= lr_decay_iters:
        return min_lr
    progress = (step - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def decay_groups(named_parameters: Iterable) -> tuple[list[str], list[str]]:
    """Return (decayed, others): names of the parameters with two dimensions or more that are no
    biases (those of experts have two), which get weight decay, and of the rest.
    """
    decays = {
        name: p.dim() >= 2 and not name.endswith('bias')
        for name, p in named_parameters
        if p.requires_grad
    }
    return [name for name in decays if decays[name]], [name for name in decays if not decays[name]]


def build_optimizer(
    named_parameters: Iterable | dict[str, torch.Tensor],
    *,
    matrices: Sequence[str] = (),
    momentum: float = 0.95,
    learning_rate: float,
    betas: tuple,
    weight_decay: float,
    device_type: str,
    ranks: int = 1,
):
    """AdamW, or with `matrices`, names of parameters, Muon for these and AdamW for the rest; weight
    decay as decay_groups() says. ranks: see Muon.
    """
    if not matrices:
        return build_adamw(
            named_parameters,
            learning_rate=learning_rate,
            betas=betas,
            weight_decay=weight_decay,
            device_type=device_type,
        )
    named, orthogonalized = dict(named_parameters), set(matrices)
    decayed, others = decay_groups(named.items())
    groups = [
        (True, weight_decay, [name for name in decayed if name in orthogonalized]),
        (False, weight_decay, [name for name in decayed if name not in orthogonalized]),
        (False, 0.0, others),
    ]
    return Muon(
        [
            {'params': [named[n] for n in names], 'weight_decay': decay, 'muon': muon}
            for muon, decay, names in groups
            if names
        ],
        learning_rate,
        betas,
        momentum,
        ranks,
    )


def build_adamw(
    named_parameters: Iterable | dict[str, torch.Tensor],
    *,
    learning_rate: float,
    betas: tuple,
    weight_decay: float,
    device_type: str,
) -> torch.optim.Optimizer:
    """Return AdamW over decay_groups(), fused where this torch has it. Moments are fp32 as the
    parameters are.
    """
    named = dict(named_parameters)
    decayed, others = decay_groups(named.items())
    groups: list[dict[str, Any]] = [
        {'params': [named[n] for n in names], 'weight_decay': decay}
        for names, decay in ((decayed, weight_decay), (others, 0.0))
        if names
    ]
    in_groups = {id(p) for group in groups for p in group['params']}
    assert in_groups == {id(p) for p in named.values() if p.requires_grad}, (
        'every trainable parameter is in exactly one group'
    )
    fused = (
        device_type in ('cuda', 'cpu')
        and 'fused' in inspect.signature(torch.optim.AdamW).parameters
    )
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def set_learning_rate(optimizer: Muon | torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group['lr'] = lr


def clip_gradients(parameters: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale the gradients to a global 2-norm of at most max_norm (0: leave them); returns the norm
    before, on the device.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float('inf'))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def gradient_statistics(parameters: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return statistics of the gradients as a dict of scalar tensors on the device: norms per
    parameter tensor and the moments over all elements. Call it on every rank, before clipping and
    before they are zeroed.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    count = sum(g.numel() for g in gradients)
    parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]  # some may be empty
    columns = {
        'squares': torch.stack([g.float().square().sum() for g in parts]),
        'sums': torch.stack([g.sum(dtype=torch.float32) for g in parts]),
        'least': torch.stack([g.min() for g in parts if g.numel()]).min(),
        'most': torch.stack([g.max() for g in parts if g.numel()]).max(),
    }
    if isinstance(gradients[0], DTensor):
        mesh = gradients[0].device_mesh
        for tensor, op in zip(
            columns.values(),
            (dist.ReduceOp.SUM, dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX),
        ):
            dist.all_reduce(tensor, op=op, group=mesh.get_group(mesh.ndim - 1))
    norms, mean = columns['squares'].sqrt(), columns['sums'].sum() / count
    variance = columns['squares'].sum() / count - mean.square()
    return {
        'mean_layer_norm': norms.mean(),
        'max_layer_norm': norms.max(),
        'min_layer_norm': norms.min(),
        'grad_mean': mean,
        'grad_std': variance.clamp(min=0).sqrt(),
        'grad_min': columns['least'],
        'grad_max': columns['most'],
    }


def named_state(
    optimizer: Muon | torch.optim.Optimizer, named_parameters: Iterable | dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the optimizer's tensors keyed by parameter name: {'exp_avg.<name>': tensor,
    'exp_avg_sq.<name>': ..., 'step.<name>': ...}, of a matrix of Muon's {'momentum.<name>':
    tensor}; DTensors where a rank has a part.

    State that does not exist yet is created as zeros, so that a checkpoint can be read into it in
    place. The keys hold no index and no rank: the state can be loaded under another order, layout
    or number of processes.
    """
    matrices = {p for group in optimizer.param_groups if group.get('muon') for p in group['params']}
    tensors = {}
    for name, p in dict(named_parameters).items():
        if not p.requires_grad:
            continue
        if not optimizer.state[p]:
            optimizer.state[p] = optimizer_state(
                p, p in matrices, None if optimizer.defaults.get('fused') else 'cpu'
            )
        for key, tensor in optimizer.state[p].items():
            tensors[f'{key}.{name}'] = tensor
    return tensors


@dataclass
class Optimization:
    """The optimizer and what stands around it.

    named: {name: parameter}, as the model was wrapped; under FSDP these stay the parts of this
    rank, while what the model itself names may be gathered. updated: the same as the optimizer has
    them, under ZeRO-1 the rows of this rank.
    """

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    guard: 'NonFiniteGuard'
    named: dict
    updated: dict

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The parameters of the model."""
        return list(self.named.values())

    def tensors(self, model: 'Model', weights_only: bool = False) -> dict[str, torch.Tensor]:
        """Return what a checkpoint holds, {name: tensor}: the tensors of the model, and unless
        weights_only the state of optimizer and guard.
        """
        tensors = {f'model.{name}': tensor for name, tensor in model.tensors().items()}
        tensors.update({f'model.{name}': p.detach() for name, p in self.named.items()})
        if not weights_only:
            state = named_state(self.optimizer, self.updated)
            tensors.update({f'optimizer.{name}': tensor for name, tensor in state.items()})
            tensors.update({f'guard.{name}': tensor for name, tensor in self.guard.state.items()})
        return tensors


class NonFiniteGuard:
    """Makes the update of a bad step a no-op, on the device, without a wait of the host.

    A step is bad if its loss or the norm of its gradient is not finite. After max_bad bad steps in
    a row every further update is a no-op too, so that the weights stay those of the last good step
    until the host looks (counts()). With spike_factor > 0 a step is also skipped if its norm
    exceeds spike_factor times the median of the last WINDOW finite norms (once MINIMUM are known);
    that is no fault. `state` ({name: tensor}) belongs into a checkpoint.
    """

    WINDOW, MINIMUM = 128, 16

    def __init__(
        self, parameters: list[torch.Tensor], scaler: Any, max_bad: int, spike_factor: float = 0.0
    ):
        # the part of an optimizer that the scaler looks at
        self.graded = SimpleNamespace(param_groups=[{'params': list(parameters)}])
        self.scaler, self.max_bad, self.spike_factor = scaler, max_bad, spike_factor
        device = self.graded.param_groups[0]['params'][0].device
        # bad steps in a row, the first of them, bad steps in all, spikes in all
        self.state = {
            'counts': torch.zeros(4, dtype=torch.int64, device=device),
            'norms': torch.full((self.WINDOW,), math.nan, dtype=torch.float32, device=device),
        }

    def unscale(self) -> None:
        """Divide the gradients by the scale of the loss (fp16; else nothing happens)."""
        self.scaler.unscale_(self.graded)

    def step(
        self,
        optimizer: Muon | torch.optim.Optimizer,
        step: int,
        loss: torch.Tensor,
        norm: torch.Tensor,
    ) -> None:
        """Take the optimizer's step number `step` (from 1), or not. loss and norm: scalar tensors,
        the same on every rank.

        Under fp16 an overflow of the gradient is the scaler's business: it skips by itself, and no
        fault is counted.
        """
        counts, norms, loss = self.state['counts'], self.state['norms'], loss.to(norm.device)
        bad = ~loss.isfinite() if self.scaler.is_enabled() else ~(loss.isfinite() & norm.isfinite())
        skip = bad | (counts[0] >= self.max_bad)
        spike = torch.zeros_like(bad)
        if self.spike_factor:
            known = norms.isfinite().sum() >= self.MINIMUM
            spike = known & norm.isfinite() & (norm > self.spike_factor * norms.nanmedian()) & ~skip
            slot = norms[(step - 1) % self.WINDOW]
            slot.copy_(torch.where(norm.isfinite(), norm, slot))
        counts[1] = torch.where(skip, torch.where(counts[0] == 0, step, counts[1]), 0)
        counts[0] = torch.where(skip, counts[0] + 1, 0)
        counts[2] += bad
        counts[3] += spike
        # the fused kernels leave parameters, moments and step count alone where it is 1
        optimizer.found_inf = (skip | spike).float()
        if self.scaler.is_enabled():
            # what unscale_() found; update() obeys it
            for found in self.scaler._found_inf_per_device(self.graded).values():
                optimizer.found_inf = found.add_(optimizer.found_inf).clamp_(max=1.0)
        optimizer.step()
        self.scaler.update()

    def counts(self) -> dict[str, int]:
        """Return {'row', 'first', 'bad', 'spikes'} as ints; waits for the device."""
        return dict(zip(('row', 'first', 'bad', 'spikes'), self.state['counts'].tolist()))
