"""Proves torch.compile: everything is compiled before the first iteration, which changes nothing,
and where the compiler fails the run goes on without.
"""

import pytest
import torch
from conftest import equal, losses, records, run_train, weights
from torch._dynamo.testing import CompileCounter

from model import Model
from onetrain.evaluation import multiple_choice
from onetrain.generation import generate
from onetrain.model_config import resolve_shape

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
