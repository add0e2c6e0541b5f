"""AdamW with the right groups, fused; the schedule and clipping are nanoGPT's; state is keyed by
name.
"""

import math

import pytest
import torch

from model import Model
from onetrain.model_config import resolve_shape
from onetrain.training import optim

RATES = dict(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110, decay_lr=True)


def small_model():
    model = Model(
        resolve_shape(
            dict(arch_preset='neox', n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=30)
        )
    )
    model.init_weights(0)
    return model


def test_schedule():
    assert optim.learning_rate_at(0, **RATES) == pytest.approx(1 / 11) and optim.learning_rate_at(
        9, **RATES
    ) == pytest.approx(10 / 11)
    assert optim.learning_rate_at(10, **RATES) == 1.0 and optim.learning_rate_at(
        60, **RATES
    ) == pytest.approx(0.55)
    assert (
        optim.learning_rate_at(110, **RATES) == 0.1
        and optim.learning_rate_at(10**6, **RATES) == 0.1
    )
    assert optim.learning_rate_at(5, **{**RATES, 'decay_lr': False}) == 1.0
    assert optim.learning_rate_at(10, **{**RATES, 'lr_decay_iters': 10}) == 0.1


def test_groups():
    model = small_model()
    decayed, others = optim.decay_groups(model.named_parameters())
    assert (
        'transformer.wte.weight' in decayed
        and 'transformer.h.0.attn.c_attn.weight' in decayed
        and 'lm_head.weight' in decayed
    )
    assert 'transformer.h.0.attn.c_attn.bias' in others and 'transformer.h.0.ln_1.weight' in others
    assert sorted(decayed + others) == sorted(n for n, _ in model.named_parameters())
    optimizer = optim.build_adamw(
        model.named_parameters(),
        learning_rate=1e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        device_type='cpu',
    )
    assert [g['weight_decay'] for g in optimizer.param_groups] == [0.1, 0.0] and optimizer.defaults[
        'fused'
    ] is True
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_one_step_is_that_of_the_formula():
    p = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = optim.build_adamw(
        {'w': p}, learning_rate=0.1, betas=(0.9, 0.99), weight_decay=0.5, device_type='cpu'
    )
    p.grad = torch.tensor([[0.3, 0.3]])
    optimizer.step()
    assert torch.allclose(p, torch.tensor([[1.0, -2.0]]) * (1 - 0.1 * 0.5) - 0.1, atol=1e-6)


def test_clipping_returns_the_norm_before():
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 3.0)
    assert optim.clip_gradients([p], 1.0) == 6.0 and p.grad.norm() == pytest.approx(1.0, abs=1e-5)
    p.grad = torch.full((4,), 3.0)
    assert optim.clip_gradients([p], 0.0) == 6.0 and p.grad.norm() == 6.0


def test_gradient_statistics():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,))]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    everything = torch.cat([p.grad.flatten() for p in parameters])
    got = {name: value.item() for name, value in optim.gradient_statistics(parameters).items()}
    norms = [p.grad.norm().item() for p in parameters]
    expected = dict(
        mean_layer_norm=sum(norms) / 2,
        max_layer_norm=max(norms),
        min_layer_norm=min(norms),
        grad_mean=everything.mean().item(),
        grad_std=everything.std(unbiased=False).item(),
        grad_min=everything.min().item(),
        grad_max=everything.max().item(),
    )
    assert got == pytest.approx(expected, rel=1e-5)


def test_state_by_name_moves_to_another_optimizer():
    models = small_model(), small_model()
    optimizers = [
        optim.build_adamw(
            reversed(list(m.named_parameters())) if i else m.named_parameters(),
            learning_rate=1e-2,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            device_type='cpu',
        )
        for i, m in enumerate(models)
    ]
    idx = torch.randint(30, (2, 8))

    def step(i):
        loss = models[i](idx, idx)
        loss.backward()
        optimizers[i].step()
        optimizers[i].zero_grad()
        return loss.item()

    for _ in range(3):
        step(0)
    models[1].load_state_dict(models[0].state_dict())
    source, target = (
        optim.named_state(o, m.named_parameters()) for o, m in zip(optimizers, models)
    )
    assert source.keys() == target.keys() and not any(k.split('.')[1].isdigit() for k in source)
    for name, tensor in target.items():
        tensor.copy_(source[name])
    assert [step(0), step(0)] == [step(1), step(1)] and math.isfinite(step(0))
