"""Proves what watch.py shows: the numbers of the log, every state of a run that is killed and
resumed while it is watched, and that nothing in a log does harm.
"""

import json
import os
import shutil
import signal
import statistics
import time

import pytest
from conftest import TINY, end_all, records, run_train, start_process
from rich.console import Console

import watch
from onetrain.config import UserError
from onetrain.logs.read_log import load_run
from onetrain.watch import follow
from onetrain.watch.follow import Follower
from onetrain.watch.terminal_view import view


def shown(*standings, width=80):
    """What a terminal of this width shows."""
    console = Console(width=width, record=True, file=open(os.devnull, 'w'))
    console.print(view(standings, width))
    return console.export_text()


@pytest.fixture(scope='module')
def run(dataset, tmp_path_factory):
    """A finished run of 12 iterations with a price."""
    folder = tmp_path_factory.mktemp('watched') / 'run'
    words = '--max_iters=12', '--eval_interval=5', '--price_per_hour=3600'
    assert run_train(dataset, folder, *words, '--always_save_checkpoint=True') == 0
    return folder


def test_numbers_are_those_of_the_log(run):
    standing = Follower(str(run)).look()
    steps, evaluations = records(run), records(run, 'eval')
    n = standing.numbers
    assert (n['iter'], n['max_iters'], standing.state) == (12, 12, 'finished')
    assert n['loss'] == statistics.median(r['loss'] for r in steps[-10:])
    for key in ('tokens_per_sec', 'time_ms'):
        assert n[key] == statistics.median(r[key] for r in steps)
    assert n['cost'] == steps[-1]['cost'] and n['tokens_seen'] == steps[-1]['tokens_seen']
    assert n['memory_gb'] == steps[-1]['memory']['max_allocated_gb']
    best = min(evaluations, key=lambda r: r['val_loss'])
    assert (n['best_val_loss'], n['best_val_iter']) == (best['val_loss'], best['iter'])
    assert (n['val_loss'], n['val_iter']) == (evaluations[-1]['val_loss'], 12)
    waits = [r['data_wait_ms'] for r in steps]
    assert n['data_wait_percent'] == 100 * statistics.median(waits) / n['time_ms']
    assert standing.curves['loss'].values == [r['loss'] for r in steps]
    assert standing.curves['val_loss'].iters == [r['iter'] for r in evaluations]
    text = shown(standing)
    assert 'iter 12/12' in text and f'val {n["val_loss"]:.4f} at 12' in text
    assert (
        max(map(len, text.splitlines())) == 80
        and max(map(len, shown(standing, width=60).splitlines())) == 60
    )


def test_a_run_that_is_killed_and_resumed(dataset, tmp_path):
    out = tmp_path / 'run'
    words = [f'--dataset={dataset}', f'--out_dir={out}', *TINY, '--max_iters=100000']
    words += ['--eval_interval=20', '--telemetry_interval=0.2']
    watched = None

    def until(state, more=lambda standing: True):
        nonlocal watched
        for _ in range(600):
            if watched is None and out.is_dir():
                watched = Follower(str(out))
            standing = watched and watched.look()
            if standing and standing.state == state and more(standing):
                return standing
            time.sleep(0.1)
        raise AssertionError(standing)

    process = start_process('train.py', *words)
    try:
        first = until('running', lambda s: 'checkpoint_iter' in s.numbers and s.machine)
        assert first.numbers['left_s'] > 0 and 'cpu_percent' in first.machine
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        gone = until('gone')
        assert 'saved at' in gone.why
    finally:
        end_all(process)
    process = start_process('train.py', *words, '--init_from=resume')
    try:
        until('running', lambda s: s.numbers['iter'] > gone.numbers['iter'] + 20)
        os.kill(process.pid, signal.SIGTERM)
        process.wait()
        stopped = until('stopped')
    finally:
        end_all(process)
    last = records(out)[-1]['iter']
    assert f'at iteration {last:,}' == stopped.why
    assert watched.curves['loss'].iters == [r['iter'] for r in records(out)]  # the cut was noticed


def test_states_that_only_time_tells(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / 'run')
    (log,) = (tmp_path / 'run').glob('run_*.jsonl')
    lines = [line for line in log.read_text().splitlines() if '"type": "end"' not in line]
    log.write_text('\n'.join(lines) + '\n')
    assert Follower(str(tmp_path / 'run')).look().state == 'gone'
    monkeypatch.setattr(follow, 'lock_holder', lambda folder: 7)
    assert Follower(str(tmp_path / 'run')).look().state == 'running'
    os.utime(log, (time.time() - 300, time.time() - 300))
    stale = Follower(str(tmp_path / 'run')).look()
    assert stale.state == 'stale' and stale.age_s == pytest.approx(300, abs=5)
    slow = [json.loads(line) for line in lines]
    for record in slow:  # a record each 100 s is no reason to worry after 300
        if record['type'] == 'iter':
            record['wall_s'] = 100.0 * record['iter']
    log.write_text('\n'.join(map(json.dumps, slow)) + '\n')
    os.utime(log, (time.time() - 300, time.time() - 300))
    assert Follower(str(tmp_path / 'run')).look().state == 'running'
    log.write_text(lines[0] + '\n')
    begun = Follower(str(tmp_path / 'run')).look()
    assert begun.state == 'running' and 'before its first' in begun.why
    log.unlink()
    assert Follower(str(tmp_path / 'run')).look().state == 'waiting'


def test_who_holds_a_folder_is_asked_without_taking_it(tmp_path):
    assert follow.lock_holder(str(tmp_path)) is None
    (tmp_path / '.lock').write_text('')
    assert follow.lock_holder(str(tmp_path)) is None
    hold = (
        f'import fcntl, time; f = open({str(tmp_path / ".lock")!r}, "a+");'
        ' fcntl.lockf(f, fcntl.LOCK_EX); print("held", flush=True); time.sleep(60)'
    )
    process = start_process('-c', hold)
    try:
        assert process.stdout.readline().strip() == 'held'
        assert follow.lock_holder(str(tmp_path)) == process.pid
    finally:
        end_all(process)


def test_only_what_is_new_is_read(run, tmp_path):
    """Of a log that grows, in pieces that end within a line, and of a long one."""
    (log,) = run.glob('run_*.jsonl')
    data = log.read_bytes()
    here = tmp_path / log.name
    here.write_bytes(b'')
    follower = Follower(str(tmp_path))
    for end in range(0, len(data) + 1000, 1000):
        with open(here, 'ab') as f:
            f.write(data[here.stat().st_size : end])
        standing = follower.look()
    whole = Follower(str(run)).look()
    assert standing.numbers == whole.numbers and standing.curves['loss'] == whole.curves['loss']
    header, *_ = data.split(b'\n', 1)
    steps = [json.loads(line) for line in data.splitlines() if b'"iter", "iter"' in line]
    with open(here, 'wb') as f:
        f.write(header + b'\n')
        for n in range(1, 30001):
            f.write(json.dumps({**steps[0], 'iter': n, 'loss': 5.0 - n / 1e4}).encode() + b'\n')
            if n % 1000 == 0:
                f.write(json.dumps({'type': 'eval', 'iter': n, 'val_loss': 5 - n / 1e4}).encode())
                f.write(b'\n')
    standing = follower.look()
    assert standing.numbers['iter'] == 30000 and len(standing.curves['val_loss'].iters) == 30
    assert standing.numbers['loss'] == pytest.approx(5 - 3, abs=1e-2)
    assert 1000 < len(standing.curves['loss'].iters) <= 2 * follow.KEPT
    assert standing.curves['loss'].iters == sorted(set(standing.curves['loss'].iters))
    assert standing.curves['loss'].iters[0] < 10 and standing.curves['loss'].iters[-1] > 29900
    run_of_all = load_run([here])
    assert standing.numbers['best_val_loss'] == run_of_all.eval_val_loss.min()
    began = time.perf_counter()
    follower.look()
    assert time.perf_counter() - began < 0.1


def test_at_a_url(run, tmp_path):
    (log,) = run.glob('run_*.jsonl')
    there = tmp_path / 'bucket' / 'name' / log.stem
    there.mkdir(parents=True)
    data = log.read_bytes()
    (there / log.name).write_bytes(data[: len(data) // 2])
    follower = Follower(f'file://{tmp_path}/bucket/name')
    half = follower.look()
    (there / log.name).write_bytes(data)
    whole = follower.look()
    assert half.state == 'running' and 0 < half.numbers['iter'] < 12
    assert whole.state == 'finished' and whole.numbers == Follower(str(run)).look().numbers
    with pytest.raises(UserError, match='holds no run_'):
        Follower(f'file://{tmp_path}/empty').look()


def test_nothing_in_a_log_does_harm(run, tmp_path):
    (log,) = run.glob('run_*.jsonl')
    lines = log.read_bytes().splitlines(keepends=True)
    header = json.loads(lines[0])
    evil = '\x1b]0;mine\x07\x1b[2J[red]x[/nothing]\n\u202e'
    header['startup_info']['model']['architecture'] = evil
    odd = [
        b'{"type": "iter", "iter": 13, "loss": "' + b'x' * 100 + b'", "mfu": 7, "memory": []}\n',
        b'{"type": "iter", "iter": 14, "loss": 1e999, "time_ms": null, "moe": "a"}\n',
        b'{"type": "eval", "iter": 15, "val_loss": -1e308}\n',
        b'{"type": "resume", "iter": 3, "config": [1]}\n',
        b'{"type": "checkpoint", "iter": 3}\n',
        b'[' * 5000 + b'\n',
        b'\xff\xfe\n',
        b'{"type": "iter", "iter": 16',
    ]
    (tmp_path / log.name).write_bytes(
        json.dumps(header).encode() + b'\n' + b''.join([*lines[1:-1], *odd])
    )
    telemetry = {'gpu': 0, 'throttle': [evil], 'power_w': 'much', 'temperature_c': None}
    (tmp_path / 'gpu_metrics.jsonl').write_text(
        json.dumps(telemetry) + '\n{"gpu": []}\n{"machine": 1, "cpu_percent": 1e400}\nnull\n'
    )
    text = shown(Follower(str(tmp_path)).look())
    assert '\x1b' not in text and '\x07' not in text and '\u202e' not in text and 'GPU 0' in text
    for name in ('gpu_metrics.jsonl', '.lock'):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
    assert Follower(str(tmp_path)).look().gpus == []
    (tmp_path / log.name).unlink()
    os.mkfifo(tmp_path / log.name)
    with pytest.raises((UserError, OSError)):
        Follower(str(tmp_path)).look()


def test_the_command(run, tmp_path, capsys):
    assert watch.main([str(run), str(run), '--once']) == 0
    assert capsys.readouterr().out.count('iter 12/12') == 2
    assert watch.main([str(run)]) == 0  # no terminal: once
    (log,) = run.glob('run_*.jsonl')
    assert watch.main([str(log)]) == 0
    capsys.readouterr()
    for words in ([str(tmp_path / 'nothing')], [str(run), '--refresh=0'], []):
        try:
            code = watch.main(words)
        except SystemExit as left:
            code = left.code
        said = capsys.readouterr()
        assert code == 2 and said.err.startswith('error: ') and said.err.count('\n') == 1
