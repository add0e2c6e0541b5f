"""dtype=None on a CPU: bfloat16 where it trains the model faster, the same whenever a run starts
anew, and what a run had where it continues.
"""

import glob
import json

import pytest
import torch

from onetrain import cpu
from onetrain.ops import kernels

CPU = torch.device('cpu')


@pytest.mark.parametrize(
    'speedup, width, name, expected',
    [
        (2.0, 128, None, 'bfloat16'),
        (2.0, 127, None, 'float32'),
        (1.2, 1024, None, 'float32'),
        (2.0, 1024, 'float32', 'float32'),
        (0.0, 32, 'bfloat16', 'bfloat16'),
        (2.0, 0, None, 'float32'),  # not a training run
    ],
)
def test_a_cpu_takes_bfloat16_where_it_is_faster(speedup, width, name, expected, monkeypatch):
    monkeypatch.setattr(kernels, 'bfloat16_speedup', lambda: speedup)
    assert kernels.precision(name, CPU, width) == getattr(torch, expected)


def test_the_trial(monkeypatch):
    """Leaves the threads alone; without the instructions there is none."""
    threads = torch.get_num_threads()
    found = kernels.bfloat16_speedup.__wrapped__()
    assert (found > 0) == cpu.has_bfloat16()
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(cpu, 'has_bfloat16', lambda: False)
    monkeypatch.setattr(torch, 'set_num_threads', None)
    assert kernels.bfloat16_speedup.__wrapped__() == 0


@pytest.mark.parametrize('first, then', [(2.0, 0.0), (0.0, 2.0)])
def test_a_run_keeps_what_it_began_with(first, then, train, tmp_path, monkeypatch, capsys):
    options = '--n_embd=128', '--n_head=4', '--eval_interval=2'
    monkeypatch.setattr(kernels, 'bfloat16_speedup', lambda: first)
    assert train(tmp_path, *options, '--max_iters=2') == 0
    monkeypatch.setattr(kernels, 'bfloat16_speedup', lambda: then)
    assert train(tmp_path, *options, '--init_from=resume', '--max_iters=4') == 0
    said = capsys.readouterr().out
    kept = ('bfloat16', 'blocks') if first else ('float32', 'sdpa')
    (path,) = glob.glob(str(tmp_path / 'run_*.jsonl'))
    with open(path) as f:
        headers = [entry for entry in map(json.loads, f) if 'config' in entry]
    assert len(headers) == 2 and all(
        (entry['config']['dtype'], entry['config']['attention_backend']) == kept
        for entry in headers
    )
    assert said.count(f'Attention backend: {kept[1]}') == 2
    assert said.count('this CPU multiplies 2.0 times as fast in it') == (first == 2.0)


def test_matmuls_of_float32_are_as_exact_as_asked_for(train, tmp_path, monkeypatch, capsys):
    told, told_torch = torch.set_float32_matmul_precision, []
    monkeypatch.setattr(
        torch, 'set_float32_matmul_precision', lambda name: (told_torch.append(name), told(name))
    )
    for number, (options, said) in enumerate(
        (
            (['--float32_matmul_precision=high'], 'float32, matmul precision high'),
            ([], 'float32; Compile'),
            (
                ['--float32_matmul_precision=high', '--dtype=bfloat16'],
                'float32_matmul_precision=high has no effect with dtype=bfloat16',
            ),
        )
    ):
        out = tmp_path / str(number)
        assert train(out, '--max_iters=1', '--dtype=float32', *options) == 0
        assert said in capsys.readouterr().out
    assert told_torch == ['high', 'highest', 'highest']
    told('highest')
