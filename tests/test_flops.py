"""FLOPs from the structure equal what torch counts, for every family; peaks are looked up, never
guessed.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import Experts, Model
from onetrain.flops import peak_flops, utilization
from onetrain.model_config import resolve_shape

FAMILIES = [
    dict(arch_preset='gpt2'),
    dict(arch_preset='gpt2', bias=True, weight_tying=False),
    dict(arch_preset='llama'),
    dict(arch_preset='llama3', num_key_value_heads=2),
    dict(arch_preset='qwen3', num_key_value_heads=1, head_dim=24),
    dict(arch_preset='neox'),
    dict(arch_preset='moe', num_experts=4, expert_d_ff=48, n_dense_layers=1),
    dict(arch_preset='gpt_oss', num_experts=4, num_experts_per_tok=3, sliding_window=0),
]


@pytest.mark.parametrize('settings', FAMILIES, ids=lambda s: '-'.join(map(str, s.values())))
def test_equal_to_flop_counter(settings):
    shape = resolve_shape(
        dict(n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=101, **settings)
    )
    # matmuls in the open; fused kernels recompute some of them in the backward pass
    model = Model(shape, backend='manual', dispatch='loop')
    model.init_weights(0)
    idx = torch.randint(101, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(idx, idx).backward()
    assert counter.get_total_flops() == model.flops().total * 2 * 32


@pytest.mark.parametrize('settings', FAMILIES, ids=lambda s: '-'.join(map(str, s.values())))
def test_both_conventions_of_attention(settings):
    shape = resolve_shape(
        dict(n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=101, **settings)
    )
    with torch.device('meta'):
        flops = Model(shape).flops()
    scores = 12 * shape.n_layer * shape.n_head * shape.head_dim * shape.block_size
    assert flops.total - flops.causal == scores / 2
    with torch.device('meta'):
        linear = sum(
            m.weight.numel() for m in Model(shape).modules() if isinstance(m, torch.nn.Linear)
        )
        chosen = sum(
            m.weight[: shape.num_experts_per_tok].numel()
            for m in Model(shape).modules()
            if isinstance(m, Experts)
        )
    assert flops.total == 6 * (linear + chosen) + scores


def test_a_window_costs_no_more_than_it_sees():
    sizes = dict(arch_preset='llama', n_layer=4, n_head=4, n_embd=64, block_size=32, vocab_size=101)
    with torch.device('meta'):
        whole, sliding = (
            Model(resolve_shape({**sizes, **more})).flops()
            for more in ({}, dict(sliding_window=8, window_pattern='SSSL'))
        )
    assert whole.total - sliding.total == 12 * 64 * 3 * (32 - 8)


def test_peaks():
    for name, tflops in (
        ('NVIDIA H100 80GB HBM3', 989),
        ('NVIDIA H200', 989),
        ('NVIDIA A100-SXM4-80GB', 312),
        ('NVIDIA B200', 2250),
        ('NVIDIA RTX A6000', 155),
        ('NVIDIA L40S', 362),
        ('NVIDIA GeForce RTX 4090', 165),
        ('NVIDIA GeForce RTX 3090', 71),
    ):
        assert peak_flops(name, 'bfloat16') == tflops * 1e12
    for name in (
        'NVIDIA H100 PCIe',
        'NVIDIA RTX 6000 Ada Generation',
        'NVIDIA GeForce RTX 3090 Ti',
        'Tesla T4',
        'NVIDIA A10G',
        'NVIDIA L40',
        None,
    ):
        assert peak_flops(name, 'bfloat16') is None
    assert peak_flops('NVIDIA H200', 'float32') is None


def test_utilization_divides_all_work_by_all_peaks():
    with torch.device('meta'):
        model = Model(
            resolve_shape(
                dict(
                    arch_preset='llama',
                    n_layer=18,
                    n_head=18,
                    n_embd=2304,
                    d_ff=6144,
                    block_size=2048,
                )
            )
        )
    flops = model.flops()
    common = dict(dtype='bfloat16', architecture='x')
    one = utilization(flops, 50000, device_name='NVIDIA H200', num_devices=1, **common)
    assert (
        one['mfu'] == pytest.approx(flops.total * 50000 / 989e12)
        and one['mfu_percent'] == 100 * one['mfu']
    )
    eight = utilization(flops, 400000, device_name='NVIDIA H200', num_devices=8, **common)
    assert eight['mfu'] == pytest.approx(one['mfu']) and eight['hardware_peak_tflops'] == 8 * 989
    assert one['mfu_causal'] < one['mfu']
    unknown = utilization(flops, 100, device_name=None, num_devices=2, **common)
    assert (
        unknown['mfu'] is None
        and unknown['mfu_percent'] is None
        and unknown['hardware_peak_flops'] is None
        and unknown['flops_achieved'] == flops.total * 100
    )
