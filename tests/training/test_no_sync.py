"""A step takes nothing from the device: numbers are fetched at log points only."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onetrain.logs.terminal import Terminal
from onetrain.training import optim


class CountFetches(TorchDispatchMode):
    """Counts the operator behind .item(), float(tensor), bool(tensor) and the like."""

    fetches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.fetches += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    'options', [[], ['--arch_preset=qwen3', '--dropout=0.1', '--gradient_accumulation_steps=2']]
)
def test_fetches_do_not_grow_with_the_steps_between_log_points(train, tmp_path, options):
    counts = []
    for iterations in (10, 40):
        with CountFetches() as counter:
            assert (
                train(
                    tmp_path / str(iterations),
                    f'--max_iters={iterations}',
                    '--log_interval=1000',
                    '--eval_interval=1000',
                    *options,
                )
                == 0
            )
        counts.append(counter.fetches)
    # logged are the first iteration and the last, evaluated is once
    assert counts[0] == counts[1] and counts[0] > 0


def between_log_points(monkeypatch, begin, end):
    """Call begin() where train.py begins each step but the first, which is logged, and end() where
    it has done it; returns the list of the steps so watched.
    """
    steps, set_learning_rate, progress = [], optim.set_learning_rate, Terminal.advance

    def watched(optimizer, lr):
        set_learning_rate(optimizer, lr)
        steps.append(len(steps) + 1)
        if len(steps) > 1:
            begin()

    def done(log, step):
        end()
        progress(log, step)

    monkeypatch.setattr(optim, 'set_learning_rate', watched)
    monkeypatch.setattr(Terminal, 'advance', done)
    return steps


OPTIONS = {
    'dense': [],
    'accumulation, dropout, spikes': [
        '--dropout=0.1',
        '--gradient_accumulation_steps=2',
        '--spike_factor=5',
    ],
    'chunks': ['--loss_chunk=20'],
    'muon': ['--optimizer=muon'],
    'experts': ['--arch_preset=moe', '--num_experts=4', '--n_dense_layers=1', '--dtype=bfloat16'],
}


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_a_step_fetches_nothing(options, train, tmp_path, monkeypatch):
    """On a CPU: no operator that hands a number to the host. (fused AdamW there reads its step
    count from memory of the host, which is none.)
    """
    counter = CountFetches()
    steps = between_log_points(
        monkeypatch,
        counter.__enter__,
        lambda: counter.__exit__(None, None, None) if len(steps) > 1 else None,
    )
    assert (
        train(tmp_path, '--max_iters=6', '--log_interval=1000', '--eval_interval=1000', *options)
        == 0
    )
    assert len(steps) == 6 and counter.fetches == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize(
    'options',
    [
        *OPTIONS.values(),
        ['--use_cuda_graphs=True', '--gradient_accumulation_steps=2'],
        ['--compile=True'],
    ],
    ids=[*OPTIONS, 'graphs', 'compiled'],
)
def test_a_step_on_a_gpu_does_not_wait(options, train, tmp_path, monkeypatch):
    """Whatever waits for the device is an error there."""
    steps = between_log_points(
        monkeypatch,
        lambda: torch.cuda.set_sync_debug_mode('error'),
        lambda: torch.cuda.set_sync_debug_mode('default'),
    )
    try:
        assert (
            train(
                tmp_path,
                '--max_iters=6',
                '--log_interval=1000',
                '--eval_interval=1000',
                '--device=cuda',
                *options,
            )
            == 0
        )
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert len(steps) == 6
