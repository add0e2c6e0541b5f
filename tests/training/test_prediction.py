"""Proves that the memory of a step is predicted, and that find_batch_size takes the largest that
fits.
"""

import contextlib
import os
from unittest import mock

import memory_prediction
import pytest
import ranks
import torch
from conftest import TINY, losses, records, run_train

from model import Model
from onetrain.checkpoint.store import path_of, read_state
from onetrain.model_config import resolve_shape
from onetrain.training import memory


def test_predicted_is_what_is_measured(capsys):
    for _model, ratio in memory_prediction.compare(
        [
            'gpt2:3:384:6:256:4:30000:none',
            'llama:4:384:6:256:4:8192:full',
            'moe:2:256:4:256:8:4096:selective',
        ]
    ).items():
        assert ratio == pytest.approx(1, abs=0.1), capsys.readouterr().out


def predict(batch_size, layout='single', ranks=1, **settings):
    shape = resolve_shape(
        dict(arch_preset='llama', n_layer=3, n_head=4, n_embd=64, block_size=32, vocab_size=500)
    )
    return memory.step_memory(
        lambda: Model(shape), batch_size, 32, 'cpu', contextlib.nullcontext(), **settings
    ).per_rank(layout, ranks)


def test_what_the_layout_shares_out_and_what_grows_with_the_batch():
    one, total = (
        predict(4),
        4
        * sum(
            p.numel()
            for p in Model(
                resolve_shape(
                    dict(
                        arch_preset='llama',
                        n_layer=3,
                        n_head=4,
                        n_embd=64,
                        block_size=32,
                        vocab_size=500,
                    )
                )
            ).parameters()
        ),
    )
    assert (one.parameters, one.gradients, one.optimizer) == (
        total,
        total,
        2 * total,
    ) and one.total == 4 * total + one.activations
    # gradients are not there yet when most activations are
    assert 1.9 < (predict(16).activations + total) / (predict(8).activations + total) < 2.1
    assert predict(4, accumulation=3).total >= one.total + total / 2 and predict(
        4, accumulation=9
    ) == predict(4, accumulation=2)
    assert predict(4, muon=True).optimizer == 2 * total - sum(
        4 * p.numel()
        for name, p in Model(
            resolve_shape(
                dict(
                    arch_preset='llama',
                    n_layer=3,
                    n_head=4,
                    n_embd=64,
                    block_size=32,
                    vocab_size=500,
                )
            )
        ).named_parameters()
        if '.h.' in name and p.dim() == 2
    )
    for layout, expected in (
        ('DDP', (total, total, 2 * total)),
        ('ZeRO-1', (total, total, total / 2)),
        ('ZeRO-2', (total / 4, total / 4, total / 2)),
        ('ZeRO-3', (total / 4, total / 4, total / 2)),
    ):
        found = predict(4, layout=layout, ranks=4)
        assert (found.parameters, found.gradients, found.optimizer) == pytest.approx(
            expected, abs=1
        ) and found.activations >= one.activations, layout


def test_nothing_real_is_made_and_no_number_drawn():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    predict(4)
    assert torch.equal(state, torch.get_rng_state())


def test_the_largest_that_fits():
    asked = []

    def predicted(size):
        asked.append(size)
        return memory.Prediction(10, 10, 20, 60 * size)

    # 90 % of it
    for room, size in ((10**6, 48), (3245, 48), (3000, 24), (1000, 12), (1150, 16), (112, 1)):
        assert memory.find_batch_size(predicted, 48, room) == size, room
    assert memory.find_batch_size(predicted, 7, 400) == 1 and set(asked) <= {
        1,
        2,
        3,
        4,
        6,
        7,
        8,
        12,
        16,
        24,
        48,
    }
    with pytest.raises(
        ValueError,
        match=(
            'even one sequence does not fit into 90% of 0.0 GB: 0.00 GB predicted'
            ' .*activation_checkpointing=full'
        ),
    ):
        memory.find_batch_size(predicted, 48, 110)


def test_a_run_finds_its_batch_size_and_keeps_the_batch(dataset, tmp_path, monkeypatch, capsys):
    wanted = ['--n_embd=128', '--dtype=float32', '--max_iters=4', '--eval_interval=2']
    wanted += ['--find_batch_size=True']
    room = []
    monkeypatch.setattr(memory, 'available_memory', lambda device: room[0])
    monkeypatch.setattr('onetrain.training.startup_report.available_memory', lambda device: room[0])
    sizes = {}
    for name, free in (('much', 10**9), ('little', 12 * 10**6)):
        room[:] = [free]
        assert run_train(dataset, tmp_path / name, *wanted, '--total_batch_size=1024') == 0
        sizes[name] = read_state(path_of(str(tmp_path / name), 4))['config']['batch_size']
        assert (
            f'batch_size={sizes[name]}, with {64 // sizes[name]} micro-steps an iteration, is the'
            f' largest that fits: {free / 1e9:.1f} GB are free' in capsys.readouterr().out
        )
    assert sizes['much'] == 64 and 1 <= sizes['little'] < 64
    assert losses(tmp_path / 'much') == pytest.approx(losses(tmp_path / 'little'), abs=1e-5)
    assert records(tmp_path / 'little')[0]['tokens_seen'] == 1024
    room[:] = [10**9]  # who goes on takes the batch_size of the run: another would round otherwise
    assert (
        run_train(
            dataset,
            tmp_path / 'little',
            '--n_embd=128',
            '--max_iters=6',
            '--init_from=resume',
            f'--batch_size={sizes["little"]}',
        )
        == 0
    )
    assert (
        read_state(path_of(str(tmp_path / 'little'), 6))['config']['batch_size'] == sizes['little']
    )
    assert (
        run_train(dataset, tmp_path / 'accumulated', *wanted, '--gradient_accumulation_steps=3')
        == 0
    )
    assert (
        read_state(path_of(str(tmp_path / 'accumulated'), 4))['config']['batch_size'] == 12
        and records(tmp_path / 'accumulated')[0]['tokens_seen'] == 3 * 64
    )
    room[:] = [10**5]
    assert (
        run_train(dataset, tmp_path / 'none', *wanted) == 2
        and 'even one sequence does not fit' in capsys.readouterr().err
    )


def test_what_cannot_be_predicted_is_said(dataset, tmp_path, capsys):
    loop = [
        '--arch_preset=moe',
        '--expert_dispatch=loop',
        '--n_embd=128',
        '--n_head=4',
        '--num_experts=4',
        '--max_iters=1',
        '--eval_iters=1',
    ]
    assert (
        run_train(dataset, tmp_path / 'a', *loop) == 0
        and 'Note: the memory of a step cannot be predicted (' in capsys.readouterr().out
    )
    assert (
        run_train(dataset, tmp_path / 'b', *loop, '--find_batch_size=True') == 2
        and 'error: the memory of a step cannot be predicted (' in capsys.readouterr().err
    )


def test_what_is_told(dataset, tmp_path, capsys):
    assert (
        run_train(
            dataset, tmp_path, '--n_embd=256', '--n_head=4', '--max_iters=1', '--eval_iters=1'
        )
        == 0
    )
    said = capsys.readouterr().out
    told = records(tmp_path, 'header')[0]['startup_info']['memory']
    assert (
        f'Memory:      {told["total"] / 1e9:.2f} GB predicted for a step; ' in said
        and f'{told["total"] / 1e9:.2f} GB predicted for its tensors\n' in said
    )
    assert (
        told['total']
        == told['parameters'] + told['gradients'] + told['optimizer'] + told['activations']
        > 16 * 10**6
    )


def train_with(rooms, arguments):
    """train.py on this rank, to which rooms[rank] bytes seem to be free."""
    rank = int(os.environ['RANK'])
    with mock.patch('onetrain.training.memory.available_memory', lambda device: rooms[rank]):
        return ranks._train(arguments)


@pytest.mark.parametrize('rooms', [(10**9, 12 * 10**6), (12 * 10**6, 10**9)])
def test_ranks_take_what_fits_on_each(rooms, dataset, tmp_path):
    arguments = [
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}',
        *TINY,
        '--n_embd=128',
        '--max_iters=3',
        '--find_batch_size=True',
        '--total_batch_size=1024',
    ]
    answers = ranks.ranks(2)(train_with, rooms, arguments)
    assert [code for code, _ in answers] == [0, 0], answers
    size = read_state(path_of(str(tmp_path), 3))['config']['batch_size']
    assert (
        f'batch_size={size}, with {32 // size} micro-steps an iteration, is the largest that fits'
        in answers[0][1]
        and 1 <= size < 32
    )
    alone = tmp_path / 'alone'
    assert (
        run_train(
            dataset,
            alone,
            '--n_embd=128',
            '--max_iters=3',
            '--total_batch_size=1024',
            '--batch_size=16',
        )
        == 0
    )
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=1e-5)
