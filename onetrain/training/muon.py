"""Muon for the matrices of the layers, AdamW for all else, as one optimizer.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) averages gradients as SGD with
Nesterov momentum does, and takes of the average, a matrix, the nearest one whose singular values
are all about 1: each direction of it weighs the same. Five steps of a Newton-Schulz iteration come
close enough. An update is scaled by 0.2 sqrt(the larger side), the typical size of AdamW's (Liu et
al., "Muon is Scalable for LLM Training", 2025), so that both go by one learning rate and one weight
decay. torch.optim.Muon computes the same; it knows nothing of a bad step that is to be skipped on
the device.

On several ranks each matrix is made orthogonal by one of them: the others send it their rows in
bf16, in which it works anyway, and get theirs back. Matrices are taken together as on one process,
so the bits are those of one process, too.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from onetrain import cpu
from onetrain.distributed.layouts import rank_rows

COEFFICIENTS = 3.4445, -4.7750, 2.0315
# elements up to which matrices of one shape are made orthogonal in one go: small ones take most of
# their time to launch
MAX_BATCH_NUMEL = 2**22


class Muon(torch.optim.Optimizer):
    """groups: dicts of 'params', 'weight_decay' and 'muon' (True: matrices, of which gradients are
    orthogonalized; False: AdamW). momentum: of Muon. ranks: how many processes hold all of the
    parameters in full and step together. Where found_inf, a tensor of one number, is 1, step()
    leaves parameters and state alone, as torch's fused AdamW does.

    State: of a matrix 'momentum', else 'step', 'exp_avg' and 'exp_avg_sq'; fp32 tensors of the
    parameter's shape (step: a scalar).
    """

    found_inf = None

    def __init__(
        self, groups: list, lr: float, betas: tuple, momentum: float = 0.95, ranks: int = 1
    ):
        super().__init__(
            groups, dict(lr=lr, betas=betas, momentum=momentum, eps=1e-8, fused=True, muon=False)
        )
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update all parameters. closure: not used, as torch calls it."""
        for group in self.param_groups:
            with_gradients = [p for p in group['params'] if p.grad is not None]
            for p in with_gradients:
                self.state[p] = self.state[p] or optimizer_state(p, group['muon'])
            if group['muon'] and with_gradients:
                self._step_of_matrices(with_gradients, group)
            elif with_gradients:
                of = [self.state[p] for p in with_gradients]
                adamw(
                    with_gradients,
                    [p.grad for p in with_gradients],
                    [s['exp_avg'] for s in of],
                    [s['exp_avg_sq'] for s in of],
                    [],
                    [s['step'] for s in of],
                    fused=True,
                    amsgrad=False,
                    beta1=group['betas'][0],
                    beta2=group['betas'][1],
                    lr=group['lr'],
                    weight_decay=group['weight_decay'],
                    eps=group['eps'],
                    maximize=False,
                    found_inf=self.found_inf,
                )

    def _step_of_matrices(self, matrices, group):
        mesh = matrices[0].device_mesh if isinstance(matrices[0], DTensor) else None
        ranks = mesh.size(-1) if mesh is not None else self.ranks
        # in a round each rank has as much to do as the others
        together = sorted(group_by_shape(matrices), key=multiplications, reverse=True)
        for first in range(0, len(together), ranks):
            turn = together[first : first + ranks]
            averaged = [self._average(same, group) for same in turn]
            updates = [updates for _, _, updates in averaged]
            if ranks == 1:
                directions = [newton_schulz(torch.stack(updates[0]))]
            elif mesh is None:
                directions = _orthogonalize_replicated(updates)
            else:
                directions = _orthogonalize_sharded(updates, [same[0].shape for same in turn], mesh)
            for same, (local, averages, _), found in zip(turn, averaged, directions):
                self._apply(same, local, averages, found, group)

    def _average(self, matrices, group):
        """Return [(momentum, parameter, gradient)], what is in this process of each; the momentum
        after this step; and what is to be made orthogonal.
        """
        local = [
            [
                t.to_local() if isinstance(t, DTensor) else t
                for t in (self.state[p]['momentum'], p, p.grad)
            ]
            for p in matrices
        ]
        averages = [buffer.lerp(gradient, 1 - group['momentum']) for buffer, _, gradient in local]
        return (
            local,
            averages,
            [
                gradient.lerp(average, group['momentum'])
                for (_, _, gradient), average in zip(local, averages)
            ],
        )

    def _apply(self, matrices, local, averages, directions, group):
        for p, (buffer, old, _), average, direction in zip(matrices, local, averages, directions):
            new = (old * (1 - group['lr'] * group['weight_decay'])).add_(
                direction, alpha=-group['lr'] * update_scale(p.shape)
            )
            for was, now in ((buffer, average), (old, new)):
                was.copy_(
                    now
                    if self.found_inf is None
                    else torch.where(self.found_inf.to(was.device) != 0, was, now)
                )


def _orthogonalize_replicated(updates):
    """Return the orthogonal of each list of matrices, which all ranks have in full: rank i does the
    i-th and sends it to the others.
    """
    found, sent = [], []
    for owner, of_owner in enumerate(updates):
        if owner == dist.get_rank():
            found.append(newton_schulz(torch.stack(of_owner)).contiguous())
        else:
            found.append(
                torch.empty(
                    len(of_owner),
                    *of_owner[0].shape,
                    dtype=torch.bfloat16,
                    device=of_owner[0].device,
                )
            )
    for owner, result in enumerate(found):
        sent.append(dist.broadcast(result.view(torch.uint8), src=owner, async_op=True))
    for work in sent:
        work.wait()
    return found


def _exchange(parts, sizes, device, group):
    """Send the i-th of `parts` (lists of bf16 matrices) to rank i; return from rank i as many
    elements as sizes[i].
    """
    sent = [
        (
            torch.cat([part.flatten() for part in of_rank])
            if of_rank
            else torch.empty(0, dtype=torch.bfloat16, device=device)
        )
        for of_rank in parts
    ]
    received = torch.empty(sum(sizes), dtype=torch.bfloat16, device=device)
    dist.all_to_all_single(
        received.view(torch.uint8),
        torch.cat(sent).view(torch.uint8),
        [2 * size for size in sizes],
        [2 * part.numel() for part in sent],
        group=group,
    )
    return received.split(sizes)


def _orthogonalize_sharded(updates, shapes, mesh):
    """Return the same for matrices of `shapes` of which every rank of the mesh's last dimension has
    some rows: rows in, rows out.
    """
    ranks, rank, device = mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1), updates[0][0].device
    group = mesh.get_group(mesh.ndim - 1)
    # of a matrix of each owner, by rank
    rows = [[rank_rows(shape[0], ranks, r) for r in range(ranks)] for shape in shapes]

    def elements(owner, r):
        """Of what `owner` works on, those that rank r has."""
        if owner >= len(updates):
            return 0
        of = rows[owner][r]
        return len(updates[owner]) * (of.stop - of.start) * shapes[owner][1]

    mine = rank < len(updates)
    parts = [[update.bfloat16() for update in of_owner] for of_owner in updates] + [[]] * (
        ranks - len(updates)
    )
    sizes = [elements(rank, r) if mine else 0 for r in range(ranks)]
    arrived = _exchange(parts, sizes, device, group)
    back = [[]] * ranks
    if mine:
        number, shape = len(updates[rank]), shapes[rank]
        whole = torch.cat(
            [
                part.view(number, of.stop - of.start, shape[1])
                for part, of in zip(arrived, rows[rank])
            ],
            dim=1,
        )
        found = newton_schulz(whole)
        back = [[found[:, rows[rank][r]]] for r in range(ranks)]
    sizes = [elements(owner, rank) for owner in range(ranks)]
    returned = _exchange(back, sizes, device, group)
    here = [of_owner[rank] for of_owner in rows]
    return [
        part.view(len(of_owner), of.stop - of.start, shape[1])
        for part, of_owner, of, shape in zip(returned, updates, here, shapes)
    ]


def multiplications(matrices: list[torch.Tensor]) -> int:
    """Return what it takes to make matrices of one shape orthogonal, in the order of
    multiplications.
    """
    shape = matrices[0].shape
    return len(matrices) * min(shape) ** 2 * max(shape)


def group_by_shape(parameters: list[torch.Tensor]) -> Iterator:
    """Yield lists of those that have one shape, MAX_BATCH_NUMEL elements at most or one
    parameter.
    """
    shapes = {}
    for p in parameters:
        shapes.setdefault(p.shape, []).append(p)
    for shape, same in shapes.items():
        number = max(1, MAX_BATCH_NUMEL // shape.numel())
        yield from (same[first : first + number] for first in range(0, len(same), number))


def optimizer_state(
    p: torch.Tensor, muon: bool, step_device: Any = None
) -> dict[str, torch.Tensor]:
    """Return what an optimizer keeps of the parameter `p` before its first step: of a matrix of
    Muon's the momentum, else AdamW's three tensors; zeros.
    """
    if muon:
        return {'momentum': torch.zeros_like(p, memory_format=torch.preserve_format)}
    return {
        'step': torch.zeros((), dtype=torch.float32, device=step_device or p.device),
        **{
            key: torch.zeros_like(p, memory_format=torch.preserve_format)
            for key in ('exp_avg', 'exp_avg_sq')
        },
    }


def update_scale(shape: tuple) -> float:
    """Return what an orthogonal matrix of `shape` is multiplied with to be as large as an update of
    AdamW.
    """
    return 0.2 * math.sqrt(max(shape))


def newton_schulz(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U V^T of each of the `matrices` U S V^T, (k, m, n): singular values between 0.7 and
    1.2, in bf16.

    A CPU without instructions for bf16 takes ten times as long in it as in float32, and then
    computes in that.
    """
    x = matrices.bfloat16()
    if matrices.device.type == 'cpu' and not cpu.has_bfloat16():
        x = x.float()
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / torch.stack([matrix.norm() for matrix in x]).clamp(min=1e-7)[:, None, None]
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).bfloat16()
