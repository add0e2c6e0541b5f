"""Proves torch.compile: everything is compiled before the first iteration, which changes nothing,
and where the compiler fails the run goes on without.
"""

import pytest
import torch
from conftest import equal, losses, records, run_train, weights
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model import Model, _selective_policy
from onetrain.evaluation import multiple_choice
from onetrain.generation import generate
from onetrain.model_config import resolve_shape
from onetrain.ops import attention

COMMON = [
    '--compile=True',
    '--dropout=0.1',
    '--max_iters=4',
    '--eval_interval=2',
    '--gradient_accumulation_steps=2',
]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.set_stance('default')
    torch.compiler.reset()


@pytest.mark.parametrize(
    'family',
    [['--arch_preset=gpt2'], ['--arch_preset=moe', '--num_experts=4', '--n_dense_layers=1']],
    ids=['gpt2', 'moe'],
)
def test_it_happens_before_the_first_iteration_and_changes_nothing(
    family, dataset, tmp_path, monkeypatch, capsys
):
    counter, compile_, counts = CompileCounter(), torch.compile, []
    # the graphs that are captured, run as they are
    monkeypatch.setattr(torch, 'compile', lambda model, **_: compile_(model, backend=counter))
    zero_grad = torch.nn.Module.zero_grad
    monkeypatch.setattr(
        torch.nn.Module,
        'zero_grad',
        lambda self, set_to_none=True: (
            counts.append(counter.frame_count),
            zero_grad(self, set_to_none),
        )[1],
    )
    assert run_train(dataset, tmp_path / 'compiled', *COMMON, *family) == 0
    told = records(tmp_path / 'compiled', 'compile')
    assert (
        len(told) == 1
        and told[0]['error'] is None
        and f'compiled in {told[0]["seconds"]:.1f} s' in capsys.readouterr().out
    )
    # after compiling, and after each iteration: none was compiled later
    assert len(counts) == 5 and counts[0] == counts[-1] > 0
    monkeypatch.undo()
    assert run_train(dataset, tmp_path / 'eager', *COMMON, *family, '--compile=False') == 0
    assert losses(tmp_path / 'compiled') == losses(tmp_path / 'eager') and equal(
        weights(tmp_path / 'compiled', 4), weights(tmp_path / 'eager', 4)
    )
    if 'moe' in family[0]:
        assert [record['moe'] for record in records(tmp_path / 'compiled')] == [
            record['moe'] for record in records(tmp_path / 'eager')
        ]


def test_a_compiler_that_fails(dataset, tmp_path, monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError('no such instruction')

    compile_ = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda model, **_: compile_(model, backend=broken))
    assert run_train(dataset, tmp_path / 'broken', *COMMON) == 0
    assert (
        'COMPILING FAILED, so everything runs without: ' in (said := capsys.readouterr().out)
        and 'no such instruction' in said
    )
    assert 'no such instruction' in records(tmp_path / 'broken', 'compile')[0]['error']
    monkeypatch.undo()
    torch.compiler.set_stance('default')
    assert run_train(dataset, tmp_path / 'eager', *COMMON, '--compile=False') == 0
    assert losses(tmp_path / 'broken') == losses(tmp_path / 'eager')


def test_what_has_ever_new_lengths_is_not_compiled():
    """Questions and samples at an evaluation, under a layout that compiles block by block:
    training goes on with the code that it had.
    """
    counter = CompileCounter()
    model = Model(
        resolve_shape(
            dict(arch_preset='llama', n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=64)
        )
    )
    model.init_weights(0)
    for module in (*model.transformer.h, model.lm_head):
        module.compile(backend=counter)
    x = torch.randint(0, 64, (4, 16))
    model(x, x).backward()
    compiled = counter.frame_count
    multiple_choice.log_likelihoods(
        model, [(list(range(n)), 1) for n in range(2, 14)], 2, torch.device('cpu')
    )
    generate(
        model,
        [[1, 2, 3]],
        5,
        generator=torch.Generator().manual_seed(0),
        device=torch.device('cpu'),
    )
    model(x, x).backward()
    assert counter.frame_count == compiled > 0


def test_selective_recomputation_keeps_attention_and_float8_matmuls(monkeypatch):
    """Seen in what the compiler is given to run backward. flex_attention has no backward pass on a
    CPU, which matters to running alone.
    """
    monkeypatch.setattr(flex_attention, '_validate_device', lambda *_: None)
    monkeypatch.setattr(attention, '_compiled', [flex_attention.flex_attention])
    shape = resolve_shape(
        dict(arch_preset='llama', n_layer=1, n_head=2, n_embd=32, block_size=128, vocab_size=64)
    )
    graphs = []

    def seen(graph, inputs):
        graphs.append(' '.join(str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=seen, bw_compiler=seen, partition_fn=min_cut_rematerialization_partition
    )
    x = torch.zeros(1, 128, dtype=torch.int64)
    forward_passes = {}
    for kind in ('full', 'selective'):
        model = Model(shape, 'flex', activation_checkpointing=kind)
        torch.compile(model, backend=backend)(x, x).backward()
        assert 'flex_attention_backward' in graphs[-1]
        forward_passes[kind] = graphs[-1].split().count('flex_attention')
    assert forward_passes == {'full': 1, 'selective': 0}

    calls = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal calls
            calls += function is torch.ops.aten._scaled_mm.default
            return function(*args, **(kwargs or {}))

    eight, one = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(())

    def block(x):
        product = torch._scaled_mm(eight, eight.t(), one, one, out_dtype=torch.bfloat16)
        return (x.sigmoid() * product).sigmoid()

    x = torch.ones(16, 16, dtype=torch.bfloat16, requires_grad=True)
    with Count():
        checkpoint(block, x, use_reentrant=False, context_fn=_selective_policy).sum().backward()
    assert calls == 1
