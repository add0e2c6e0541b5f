"""Muon for the matrices of the layers, AdamW for all else, as one optimizer.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) averages gradients as SGD with Nesterov momentum does, and takes of the average, a matrix, the nearest
one whose singular values are all about 1: each direction of it weighs the same. Five steps of a Newton-Schulz iteration come close
enough. An update is scaled by 0.2 sqrt(the larger side), the typical size of AdamW's (Liu et al., "Muon is Scalable for LLM Training", 2025), so that both
go by one learning rate and one weight decay. torch.optim.Muon computes the same; it knows nothing of a bad step that is to be skipped on the device.
"""
import math

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from engine.parallel import rows_of

COEFFICIENTS = 3.4445, -4.7750, 2.0315
TOGETHER = 2**22  # elements up to which matrices of one shape are made orthogonal in one go: small ones take most of their time to launch


class Muon(torch.optim.Optimizer):
    """groups: dicts of 'params', 'weight_decay' and 'muon' (True: matrices, of which gradients are orthogonalised; False: AdamW). momentum: of Muon. Where
    found_inf, a tensor of one number, is 1, step() leaves parameters and state alone, as torch's fused AdamW does.

    State: of a matrix 'momentum', else 'step', 'exp_avg' and 'exp_avg_sq'; fp32 tensors of the parameter's shape (step: a scalar).
    """
    found_inf = None

    def __init__(self, groups, lr, betas, momentum=0.95):
        super().__init__(groups, dict(lr=lr, betas=betas, momentum=momentum, eps=1e-8, fused=True, muon=False))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            with_gradients = [p for p in group['params'] if p.grad is not None]
            for p in with_gradients:
                self.state[p] = self.state[p] or state_of(p, group['muon'])
            if group['muon']:
                for matrices in alike(with_gradients):
                    self._orthogonal(matrices, group)
            elif with_gradients:
                of = [self.state[p] for p in with_gradients]
                adamw(with_gradients, [p.grad for p in with_gradients], [s['exp_avg'] for s in of], [s['exp_avg_sq'] for s in of], [], [s['step'] for s in of], fused=True, amsgrad=False,
                      beta1=group['betas'][0], beta2=group['betas'][1], lr=group['lr'], weight_decay=group['weight_decay'], eps=group['eps'], maximize=False, found_inf=self.found_inf)

    def _orthogonal(self, matrices, group):
        """Update parameters of one shape."""
        local = [[t.to_local() if isinstance(t, DTensor) else t for t in (self.state[p]['momentum'], p, p.grad)] for p in matrices]
        averages = [buffer.lerp(gradient, 1 - group['momentum']) for buffer, _, gradient in local]
        updates = [gradient.lerp(average, group['momentum']) for (_, _, gradient), average in zip(local, averages)]
        if isinstance(matrices[0], DTensor):  # some rows of a matrix cannot be orthogonalised for themselves: every rank works on the whole
            updates = [DTensor.from_local(update, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()).full_tensor() for p, update in zip(matrices, updates)]
        for p, (buffer, old, _), average, update in zip(matrices, local, averages, orthogonal(torch.stack(updates))):
            update = update[rows_of(update, p.device_mesh)] if isinstance(p, DTensor) else update
            new = (old * (1 - group['lr'] * group['weight_decay'])).add_(update, alpha=-group['lr'] * scale(p.shape))
            for was, now in ((buffer, average), (old, new)):
                was.copy_(now if self.found_inf is None else torch.where(self.found_inf.to(was.device) != 0, was, now))


def alike(parameters):
    """Lists of those that have one shape, TOGETHER elements at most or one parameter."""
    shapes = {}
    for p in parameters:
        shapes.setdefault(p.shape, []).append(p)
    for shape, same in shapes.items():
        number = max(1, TOGETHER // shape.numel())
        yield from (same[first:first + number] for first in range(0, len(same), number))


def state_of(p, muon, step_device=None):
    """What an optimizer keeps of the parameter `p` before its first step: of a matrix of Muon's the momentum, else AdamW's three tensors; zeros."""
    if muon:
        return {'momentum': torch.zeros_like(p, memory_format=torch.preserve_format)}
    return {'step': torch.zeros((), dtype=torch.float32, device=step_device or p.device), **{key: torch.zeros_like(p, memory_format=torch.preserve_format) for key in ('exp_avg', 'exp_avg_sq')}}


def scale(shape):
    """What an orthogonal matrix of `shape` is multiplied with to be as large as an update of AdamW."""
    return 0.2 * math.sqrt(max(shape))


def orthogonal(matrices, steps=5):
    """About U V^T of each of the `matrices` U S V^T, (k, m, n): singular values between 0.7 and 1.2, in bf16."""
    x = matrices.bfloat16()
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / torch.stack([matrix.norm() for matrix in x]).clamp(min=1e-7)[:, None, None]
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
