"""Proves that a sweep makes every run once, goes on where it was killed, stops the worse half, and
ranks what it made.
"""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import TINY, end_all, run_process, start_process

import sweep
from onetrain.config import UserError
from onetrain.logs.read_log import load_run
from onetrain.sweep.runs import Sweep, combinations


@pytest.fixture
def words(dataset, tmp_path):
    """What a small sweep of three learning rates is asked for with."""
    keys = [word for word in TINY if not word.startswith('--learning_rate')]
    keys += [f'--dataset={dataset}', '--max_iters=30', '--eval_interval=10', '--decay_lr=False']
    return [*keys, '--learning_rate=1e-5,1e-2,1e-3', f'--sweep_dir={tmp_path / "sweep"}']


def results(tmp_path):
    return json.loads((tmp_path / 'sweep' / 'sweep.json').read_text())['runs']


def test_killed_in_the_middle_and_finished(words, tmp_path):
    process = start_process('sweep.py', *words)
    second = tmp_path / 'sweep' / 'learning_rate=0.01'
    try:
        for _ in range(600):
            if list(second.glob('run_*.jsonl')):
                break
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        end_all(process)
    code, said = run_process('sweep.py', *words)
    assert code == 0, said
    assert 'learning_rate=1e-05: finished before' in said and 'Picture:' in said
    found = results(tmp_path)
    assert [run['state'] for run in found] == ['finished'] * 3
    losses = [run['val_loss'] for run in found]
    assert losses == sorted(losses) and found[-1]['values'] == {'learning_rate': 1e-5}
    for run in found:
        # one that was killed before its first checkpoint began again, with a new log
        log = load_run([max(Path(run['folder']).glob('run_*.jsonl'))])
        assert run['val_loss'] == log.eval_val_loss[-1] and log.iters.tolist() == [*range(1, 31)]
    assert (tmp_path / 'sweep' / 'sweep.png').stat().st_size > 10000
    lines = [line for line in said.splitlines() if line[:3].strip(' .').isdigit()]
    assert len(lines) == 3 and f'{losses[0]:.4f}' in lines[0]
    assert sweep.main([*words[:-2], '--learning_rate=1e-5,2', words[-1]]) == 2  # another sweep


def test_the_worse_half_is_stopped(words, tmp_path, capsys):
    assert sweep.main([*words, '--halve_at=10']) == 0
    found = results(tmp_path)
    assert [run['state'] for run in found] == ['finished', 'finished', 'worse half']
    assert found[2]['values'] == {'learning_rate': 1e-5} and found[2]['evaluated'] == 10
    assert 'worse half' in capsys.readouterr().out
    assert sweep.main([*words, '--halve_at=10']) == 0  # nothing is begun again
    assert 'begins' not in capsys.readouterr().out and results(tmp_path) == found
    # one that is cut after the comparison is not compared again, with fewer
    (tmp_path / 'sweep' / 'sweep.json').write_text(
        (tmp_path / 'sweep' / 'sweep.json').read_text().replace('finished', 'waiting')
    )
    assert sweep.main([*words, '--halve_at=10']) == 0
    assert [run['state'] for run in results(tmp_path)] == [run['state'] for run in found]


def test_a_run_that_fails_is_a_line_of_the_table(words, tmp_path, capsys):
    words = [word for word in words if not word.startswith('--learning_rate')]
    assert sweep.main([*words, '--n_head=2,5', '--parallel=2']) == 1
    said = capsys.readouterr().out
    first, second = results(tmp_path)
    assert (first['state'], second['state']) == ('finished', 'failed')
    assert 'n_embd=32 is not divisible by n_head=5' in second['reason'] and second['reason'] in said


def test_what_is_swept():
    files, axes, fixed = combinations(
        [
            '--learning_rate=1e-3,3e-3',
            '--dataset=a:0.7,b:0.3',
            '--optimizer=adamw,muon',
            '--n_layer=2',
        ]
    )
    assert axes == {'learning_rate': [1e-3, 3e-3], 'optimizer': ['adamw', 'muon']} and not files
    assert fixed == ['--dataset=a:0.7,b:0.3', '--n_layer=2']
    made = Sweep(files, axes, fixed, 'nowhere')
    _, axes, _ = combinations(['--activation_checkpointing=none,full'])
    assert axes == {'activation_checkpointing': ['none', 'full']}
    assert len(made.trials) == 4 and made.trials[1].name == 'learning_rate=0.001,optimizer=muon'
    assert math.isnan(made.trials[0].loss)


@pytest.mark.parametrize(
    'words, expected',
    [
        ([], 'no key has several values'),
        (['--learning_rate=1e-3'], 'no key has several values'),
        (['--learning_rat=1,2'], "did you mean 'learning_rate'"),
        (['--learning_rate=1e-3,a'], 'expected float'),
        (['--n_layer=1,1'], 'names a value twice'),
        (['--n_layer=1,2', '--out_dir=x'], 'does not go with a sweep'),
        (['--n_layer=1,2', '--halve_at=20,10'], 'rising iterations'),
        (['--n_layer=1,2', 'config/nothing.py'], 'no such file'),
        (['--n_layer=' + ','.join(map(str, range(1, 2000)))], 'are more than 1,000'),
    ],
)
def test_bad_input_is_one_sentence(words, expected, tmp_path, capsys):
    assert sweep.main([*words, f'--sweep_dir={tmp_path / "sweep"}']) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: ') and said.count('\n') == 1 and expected in said
    assert not (tmp_path / 'sweep').exists()


def test_a_folder_of_something_else(words, tmp_path):
    (tmp_path / 'sweep').mkdir()
    (tmp_path / 'sweep' / 'mine').write_text('')
    assert sweep.main(words) == 2
    for text in ('', '[]', '{"files": []}'):
        (tmp_path / 'sweep' / 'sweep.json').write_text(text)
        with pytest.raises(UserError, match='is no file of a sweep'):
            Sweep([], {'n_layer': [1, 2]}, [], str(tmp_path / 'sweep')).make()
