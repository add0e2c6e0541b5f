"""AdamW with decay groups, clipping, gradient statistics, and the optimizer's state by parameter name."""
import inspect
import math

import torch


def learning_rate_at(step, *, learning_rate, min_lr, warmup_iters, lr_decay_iters, decay_lr):
    """Learning rate of optimizer step `step` (0-based): linear warm-up, cosine down to min_lr at lr_decay_iters (as nanoGPT)."""
    if not decay_lr:
        return learning_rate
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if step >= lr_decay_iters:
        return min_lr
    progress = (step - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


def decay_groups(named_parameters):
    """(decayed, others): names of the parameters with two dimensions or more, which get weight decay, and of the rest."""
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    return [n for n, p in named if p.dim() >= 2], [n for n, p in named if p.dim() < 2]


def build_adamw(named_parameters, *, learning_rate, betas, weight_decay, device_type):
    """AdamW over decay_groups(), fused where this torch has it. Moments are fp32 as the parameters are."""
    named = dict(named_parameters)
    groups = [{'params': [named[n] for n in names], 'weight_decay': decay}
              for names, decay in zip(decay_groups(named.items()), (weight_decay, 0.0)) if names]
    in_groups = {id(p) for group in groups for p in group['params']}
    assert in_groups == {id(p) for p in named.values() if p.requires_grad}, 'every trainable parameter is in exactly one group'
    fused = device_type in ('cuda', 'cpu') and 'fused' in inspect.signature(torch.optim.AdamW).parameters
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group['lr'] = lr


def clip_gradients(parameters, max_norm):
    """Scale the gradients to a global 2-norm of at most max_norm (0: leave them); returns the norm before, on the device."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float('inf'))


@torch.no_grad()
def gradient_statistics(parameters):
    """Statistics of the gradients as a dict of scalar tensors on the device: norms per parameter tensor and the moments
    over all elements. Call it before clipping and before they are zeroed."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    count = sum(g.numel() for g in gradients)
    mean = torch.stack([g.sum(dtype=torch.float32) for g in gradients]).sum() / count
    variance = norms.float().square().sum() / count - mean.square()
    return {
        'mean_layer_norm': norms.mean(), 'max_layer_norm': norms.max(), 'min_layer_norm': norms.min(),
        'grad_mean': mean, 'grad_std': variance.clamp(min=0).sqrt(),
        'grad_min': torch.stack([g.min() for g in gradients]).min(), 'grad_max': torch.stack([g.max() for g in gradients]).max(),
    }


def named_state(optimizer, named_parameters):
    """The optimizer's tensors keyed by parameter name: {'exp_avg.<name>': tensor, 'exp_avg_sq.<name>': ..., 'step.<name>': ...}.

    State that does not exist yet is created as zeros, so that a checkpoint can be read into it in place. The keys hold no
    index and no rank: the state can be loaded under another order, layout or number of processes.
    """
    named = dict(named_parameters)
    tensors = {}
    for name, p in named.items():
        if not p.requires_grad:
            continue
        state = optimizer.state[p]
        if not state:
            fused = optimizer.defaults.get('fused')
            state['step'] = torch.zeros((), dtype=torch.float32, device=p.device if fused else 'cpu')
            state['exp_avg'] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state['exp_avg_sq'] = torch.zeros_like(p, memory_format=torch.preserve_format)
        for key in ('step', 'exp_avg', 'exp_avg_sq'):
            tensors[f'{key}.{name}'] = state[key]
    return tensors
