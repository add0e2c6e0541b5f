"""Proves fp8: large linear layers, and no others, round to float8 as its definition says; a run
with it stays near one without, resumes to the same bits, and is refused where it cannot be had.
"""

import importlib.util
import sys

import pytest
import torch
from conftest import equal, losses, run_train, weights

from model import Model
from onetrain.config import UserError
from onetrain.model_config import resolve_shape
from onetrain.ops import fp8

pytest.importorskip('torchao')
LARGE = [
    '--n_layer=1',
    '--n_embd=352',
    '--n_head=2',
    '--vocab_size=64',
    '--eval_interval=2',
    '--eval_iters=1',
    '--gradient_accumulation_steps=1',
    '--batch_size=2',
]


def rounded(x, dtype):
    scale = torch.finfo(dtype).max / x.abs().max().double()
    return (x * scale.float()).to(dtype).float() / scale.float()


def test_a_layer_computes_what_the_definition_says():
    """Weights and inputs in e4m3, gradients in e5m2, one scale for a whole tensor: its largest
    value becomes the largest of the format.
    """
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(48, 1040))
    weight, bias = layers[0].weight, layers[0].bias
    assert (
        fp8.convert_to_float8(layers, 'emulated') == 1
        and layers[0].weight is weight
        and layers[0].bias is bias
    )
    x, g = torch.randn(20, 48, requires_grad=True), torch.randn(20, 1040)
    y = layers(x)
    y.backward(g)
    x8 = rounded(x.detach(), torch.float8_e4m3fn)
    w8 = rounded(weight.detach(), torch.float8_e4m3fn)
    g8 = rounded(g, torch.float8_e5m2)
    for found, expected, plain in (
        (y, x8 @ w8.T + bias, x @ weight.T + bias),
        (x.grad, g8 @ w8, g @ weight),
        (weight.grad, g8.T @ x8, g.T @ x),
        (bias.grad, g.sum(0), g.sum(0)),
    ):
        assert (found - expected).norm() < 1e-6 * expected.norm()
        assert found is bias.grad or (found - plain).norm() > 0.01 * plain.norm()


def test_which_layers():
    shape = resolve_shape(
        dict(
            arch_preset='moe',
            n_layer=2,
            n_head=2,
            n_embd=352,
            block_size=16,
            vocab_size=4096,
            num_experts=1040,
            d_ff=1040,
            expert_d_ff=1040,
            n_dense_layers=1,
            num_shared_experts=1,
        )
    )
    model, plain = Model.on_meta(shape, float8='emulated'), Model.on_meta(shape)
    found = {
        name for name, module in model.named_modules() if type(module).__name__ == 'Float8Linear'
    }
    # not the residual projections, which have few outputs and inputs, nor the router, the experts
    # and the head
    assert (
        found
        == {
            'transformer.h.0.attn.c_attn',
            'transformer.h.1.attn.c_attn',
            'transformer.h.0.mlp.c_fc',
            'transformer.h.1.mlp.shared.c_fc',
        }
        and model.float8_layers == 4
    )
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in plain.named_parameters()
    } and model.flops() == plain.flops()


@pytest.mark.parametrize(
    'inputs, outputs, expected',
    [
        (512, 1024, False),
        (512, 1040, True),
        (4096, 512, False),
        (4112, 512, True),
        (512, 1032, False),
        (1000, 2048, False),
    ],
)
def test_what_pays(inputs, outputs, expected):
    assert fp8.gains_from_float8(torch.nn.Linear(inputs, outputs, device='meta')) is expected


def test_a_run(dataset, tmp_path, capsys):
    assert run_train(dataset, tmp_path / 'plain', *LARGE, '--max_iters=4') == 0
    assert run_train(dataset, tmp_path / 'whole', *LARGE, '--max_iters=4', '--fp8=True') == 0
    said = capsys.readouterr().out
    assert 'float32, 2 linear layers in float8' in said and 'fp8=True is emulated on a CPU' in said
    assert run_train(dataset, tmp_path / 'parts', *LARGE, '--max_iters=2', '--fp8=True') == 0
    assert (
        run_train(dataset, tmp_path / 'parts', *LARGE, '--init_from=resume', '--max_iters=4') == 0
    )
    assert losses(tmp_path / 'whole') == losses(tmp_path / 'parts') and equal(
        weights(tmp_path / 'whole', 4), weights(tmp_path / 'parts', 4)
    )
    pairs = list(zip(losses(tmp_path / 'plain').values(), losses(tmp_path / 'whole').values()))
    assert len(pairs) == 4 and all(a != b and abs(a - b) < 0.02 * a for a, b in pairs)


def test_where_it_cannot_be_had(dataset, tmp_path, monkeypatch, capsys):
    assert run_train(dataset, tmp_path, '--fp8=True') == 2
    assert 'finds no linear layer that would gain' in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'an A100')
    for capability, dtype, told in (
        ((8, 0), torch.bfloat16, 'not an A100: type --fp8=False'),
        ((9, 0), torch.float32, 'not of float32: type --dtype=bfloat16'),
    ):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        with pytest.raises(UserError, match=told):
            fp8.choose_recipe(dtype, torch.device('cuda'))
    assert (
        fp8.choose_recipe(torch.bfloat16, torch.device('cuda')) == 'hardware'
        and fp8.choose_recipe(torch.float32, torch.device('cpu')) == 'emulated'
    )
    monkeypatch.delitem(sys.modules, 'torchao', raising=False)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='pip install torchao'):
        fp8.choose_recipe(torch.bfloat16, torch.device('cuda'))


def test_a_micro_step_whose_tokens_do_not_divide(monkeypatch, train, tmp_path, capsys):
    monkeypatch.setattr(fp8, 'choose_recipe', lambda dtype, device: 'hardware')
    assert train(tmp_path, '--fp8=True', '--block_size=15', '--batch_size=6') == 2
    error = capsys.readouterr().err
    assert 'a multiple of 16 tokens per micro-step, not 90' in error
    assert '--batch_size=16' in error
    with pytest.raises(UserError, match='--batch_size=6,'):
        fp8.check_tokens(5, 24)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason='needs a GPU that multiplies float8',
)
@pytest.mark.parametrize('compiled', [False, True])
def test_on_a_gpu(compiled):
    found = {}
    for kind in ('hardware', 'emulated'):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(1024, 2048)).cuda()
        fp8.convert_to_float8(layers, kind)
        x = torch.randn(4096, 1024, device='cuda', dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast('cuda', dtype=torch.bfloat16):
            y = torch.compile(layers)(x) if compiled else layers(x)
        y.backward(torch.randn_like(y))
        found[kind] = y.detach().float(), x.grad.float(), layers[0].weight.grad
    for a, b in zip(*found.values()):
        assert (a - b).norm() < 0.01 * b.norm()
