"""Saving goes on beside training: what is staged is the state of its step, a save that fails harms
nothing, and a death at any point leaves a whole checkpoint.
"""

import os
import resource
import subprocess
import threading

import pytest
import torch
from conftest import TINY, losses, records, run_process

from onetrain.checkpoint import fault_injection, resume, store
from onetrain.checkpoint.async_writer import Saver
from onetrain.distributed.processes import World

ONE = World(0, 1, torch.device('cpu'))


def tensors(value):
    return {
        'model.a': torch.full((300, 7), float(value)),
        'model.t': torch.full((4, 6), float(value)).t(),
        'optimizer.step.a': torch.tensor(float(value)),
    }


def test_what_is_saved_is_the_state_at_start_although_training_goes_on(tmp_path):
    saver, state = Saver(str(tmp_path), ONE), tensors(1)
    for step in range(1, 6):
        saver.start(step, state, {})
        saver.wait_staged()
        for tensor in state.values():
            tensor.add_(1)
        outcome = saver.wait()
        into = tensors(0)
        store.load(outcome.path, into)
        assert outcome.error is None and all((tensor == step).all() for tensor in into.values())


def test_staging_is_awaited_and_writing_is_not(tmp_path, monkeypatch):
    """wait_staged() returns when the copies are made, while nothing is on disk yet."""
    may_stage, may_write = threading.Event(), threading.Event()
    stage, write = Saver._stage, Saver._write
    monkeypatch.setattr(
        Saver, '_stage', lambda self, *args: may_stage.wait(10) and stage(self, *args)
    )
    monkeypatch.setattr(
        Saver, '_write', lambda self, *args: may_write.wait(10) and write(self, *args)
    )
    saver = Saver(str(tmp_path), ONE)
    saver.start(1, tensors(1), {})
    assert not saver.staged.wait(0.2) and saver.poll() is None
    threading.Timer(0.3, may_stage.set).start()
    assert saver.wait_staged() > 0.2
    assert store.steps(str(tmp_path)) == [] and saver.poll() is None
    may_write.set()
    outcome = saver.wait()
    assert (
        outcome.error is None
        and outcome.stall_s > 0.2
        and outcome.total_s >= outcome.stall_s
        and outcome.size == 8500
    )
    assert store.newest_whole(str(tmp_path)) == (1, []) and saver.wait() is None


def test_the_training_threads_are_not_called_for_copies(tmp_path):
    """Tensors in order are copied by memmove; others, such as transposed ones, come out right as
    well.
    """
    saver = Saver(str(tmp_path), ONE)
    odd = {
        'model.t': torch.arange(12.0).view(3, 4).t(),
        'model.b': torch.arange(6, dtype=torch.bfloat16),
    }
    saver.start(1, odd, {})
    into = {name: torch.zeros_like(tensor) for name, tensor in odd.items()}
    store.load(saver.wait().path, into)
    assert all(torch.equal(into[name], odd[name]) for name in odd)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    saver = Saver(str(tmp_path), ONE)
    for bad in (float('nan'), float('inf'), -float('inf')):
        state = tensors(1)
        state['model.a'][5, 3] = bad
        saver.start(1, state, {})
        outcome = saver.wait()
        assert outcome.not_finite and outcome.error == 'a is not finite'
    state = tensors(1)
    state['optimizer.step.a'].fill_(float('inf'))  # of no harm to a model
    saver.start(1, state, {})
    assert saver.wait().error is None


def test_every_rank_writes_its_share():
    sizes = {'a': 100, 'b': 60, 'c': 50, 'd': 1}
    assert store.assign_files(sizes, 1) == dict.fromkeys('abcd', 0)
    assert store.assign_files(sizes, 2) == {'a': 0, 'b': 1, 'c': 1, 'd': 0}


# ---- a save that fails


def test_too_little_space_is_known_before_writing(tmp_path, monkeypatch):
    saver = Saver(str(tmp_path), ONE)
    saver.start(1, tensors(1), {})
    assert saver.wait().error is None
    monkeypatch.setattr(
        'onetrain.checkpoint.async_writer.shutil.disk_usage',
        lambda path: os.terminal_size((1, 1)) and type('usage', (), {'free': 1_000_000})(),
    )
    saver.start(2, tensors(2), {})
    error = saver.wait().error
    assert 'MB free, the checkpoint and a margin take 1.1 MB' in error
    assert os.listdir(tmp_path / 'checkpoints') == ['step_00000001'] and store.newest_whole(
        str(tmp_path)
    ) == (1, [])


def test_a_write_that_fails_leaves_the_older_one_and_the_next_try_works(tmp_path):
    """The kernel refuses to let files grow, as a quota does."""
    saver = Saver(str(tmp_path), ONE, keep=1)
    saver.start(1, tensors(1), {})
    assert saver.wait().error is None
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        saver.start(2, tensors(2), {})
        error = saver.wait().error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 'File too large' in error
    assert os.listdir(tmp_path / 'checkpoints') == ['step_00000001'] and store.newest_whole(
        str(tmp_path)
    ) == (1, [])
    saver.start(3, tensors(3), {})
    assert saver.wait().error is None and store.steps(str(tmp_path)) == [3]


def test_what_the_disk_garbles_is_noticed_before_older_ones_go(tmp_path, monkeypatch):
    saver = Saver(str(tmp_path), ONE, keep=1)
    saver.start(1, tensors(1), {})
    assert saver.wait().error is None
    real = store.sha256
    monkeypatch.setattr(
        store,
        'sha256',
        lambda path, fs=store.LOCAL: 'other' if path.endswith('.distcp') else real(path, fs),
    )
    saver.start(2, tensors(2), {})
    assert 'does not read back: __0_0.distcp does not have the checksum' in saver.wait().error
    monkeypatch.undo()
    assert store.newest_whole(str(tmp_path)) == (1, [])


def test_a_run_goes_on_while_saves_fail(train, tmp_path, capsys, monkeypatch):
    """Under the kernel's limit for the size of a file, which needs no rights: logs fit, tensors do
    not. At the start it is refused.
    """
    assert train(tmp_path, '--max_iters=10', '--eval_interval=10', '--save_log_to_json=False') == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        assert train(tmp_path, '--init_from=resume', '--max_iters=30', '--log_interval=10') == 2
        assert (
            'no file may be larger than 200,000 bytes here (ulimit -f)' in capsys.readouterr().err
            and max(losses(tmp_path)) == 10
        )
        monkeypatch.setattr(resume, '_largest_file', lambda: 10**9)
        code = train(tmp_path, '--init_from=resume', '--max_iters=30', '--log_interval=10')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    output = capsys.readouterr().out
    assert (
        code == 4
        and output.count('CHECKPOINT NOT SAVED at iter') == 2
        and 'File too large' in output
    )
    assert max(losses(tmp_path)) == 30 and store.newest_whole(str(tmp_path)) == (10, [])
    assert train(tmp_path, '--init_from=resume', '--max_iters=30') == 0
    assert store.newest_whole(str(tmp_path)) == (30, []) and sorted(losses(tmp_path)) == list(
        range(1, 31)
    )


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own of 2 MB."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    if (
        subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'none', folder], capture_output=True
        ).returncode
        != 0
    ):
        pytest.skip('needs the right to mount a disk')
    yield folder
    subprocess.run(['umount', '-l', folder], check=True)


def test_a_full_and_a_read_only_disk_do_not_stop_the_run(train, small_disk, capsys, monkeypatch):
    out = small_disk / 'out'
    assert train(out, '--max_iters=10', '--eval_interval=10') == 0
    with open(small_disk / 'ballast', 'wb') as f:
        f.write(bytes(1_250_000))
    assert train(out, '--init_from=resume', '--max_iters=30', '--log_interval=10') == 4
    output = capsys.readouterr().out
    assert (
        output.count('CHECKPOINT NOT SAVED at iter') == 2
        and 'MB free, the checkpoint and a margin take' in output
        and 'THE LAST CHECKPOINT WAS NOT SAVED' in output
    )
    assert [r['iter'] for r in records(out, 'save_failed')] == [20, 30] and max(losses(out)) == 30
    assert store.newest_whole(str(out)) == (10, [])
    # the check is only an estimate: let the disk run full in the middle of writing
    monkeypatch.setattr(
        'onetrain.checkpoint.async_writer.shutil.disk_usage',
        lambda path: type('usage', (), {'free': 10**12})(),
    )
    with open(small_disk / 'more', 'wb') as f:
        f.write(bytes(100_000))
    assert train(out, '--init_from=resume', '--max_iters=20', '--log_interval=10') == 4
    assert 'No space left on device' in capsys.readouterr().out and store.newest_whole(
        str(out)
    ) == (10, [])
    os.remove(small_disk / 'ballast')
    # it works again: what was not saved is trained again
    assert train(out, '--init_from=resume', '--max_iters=30', '--log_interval=10') == 0
    assert store.newest_whole(str(out)) == (30, [])
    subprocess.run(['mount', '-o', 'remount,ro', small_disk], check=True)
    saver = Saver(str(out), ONE)
    saver.start(40, tensors(1), {})
    assert 'Read-only file system' in saver.wait().error and store.newest_whole(str(out)) == (
        30,
        [],
    )
    subprocess.run(['mount', '-o', 'remount,rw', small_disk], check=True)


# ---- death at a named point


def die_at(point, dataset, out, *args, step=20):
    return run_process(
        'train.py',
        f'--dataset={dataset}',
        f'--out_dir={out}',
        *TINY,
        '--eval_interval=10',
        '--keep_checkpoints=1',
        '--auto_resume=True',
        *args,
        env={'ONETRAIN_FAULT': f'{point}:{step}'},
    )


@pytest.fixture(scope='module')
def undisturbed(dataset, tmp_path_factory):
    from conftest import run_train

    out = tmp_path_factory.mktemp('undisturbed')
    assert run_train(dataset, out, '--max_iters=40', '--eval_interval=10') == 0
    return losses(out)


@pytest.mark.parametrize('point', [point for point in fault_injection.POINTS if point != 'upload'])
def test_after_death_at_any_point_the_run_continues_to_the_same_bits(
    point, dataset, tmp_path, train, undisturbed
):
    code, output = die_at(
        point,
        dataset,
        tmp_path,
        '--max_iters=40',
        '--checkpoint_interval=10',
        step=10 if point == 'retention' else 20,
    )
    assert code == fault_injection.EXIT_CODE, output
    step, rejected = store.newest_whole(str(tmp_path))
    # 10 is the best until 20 is evaluated
    assert (step, rejected) == ({'after_rename': 20, 'retention': 30}.get(point, 10), [])
    # none half removed
    assert all(
        store.corruption_reason(store.path_of(str(tmp_path), s)) is None
        for s in store.steps(str(tmp_path))
    )
    assert (
        train(
            tmp_path,
            '--auto_resume=True',
            '--max_iters=40',
            '--eval_interval=10',
            '--keep_checkpoints=1',
        )
        == 0
    )
    assert losses(tmp_path) == undisturbed
    # what death left is gone
    assert [name for name in os.listdir(tmp_path / 'checkpoints') if name.startswith('.')] == []


def test_a_fault_that_names_no_point_is_refused(dataset, tmp_path):
    code, output = die_at('nowhere', dataset, tmp_path)
    assert (
        code == 2
        and 'ONETRAIN_FAULT=nowhere:20 is not POINT or POINT:STEP with POINT one of staging'
        in output
    )


def test_foreground_and_background_write_the_same(train, tmp_path):
    for name, background in (('a', True), ('b', False)):
        assert (
            train(
                tmp_path / name,
                '--max_iters=10',
                '--eval_interval=5',
                f'--checkpoint_async={background}',
            )
            == 0
        )
    files = [
        [os.path.join(store.path_of(str(tmp_path / name), 10), '__0_0.distcp')] for name in 'ab'
    ]
    contents = [open(f[0], 'rb').read() for f in files]
    assert contents[0] == contents[1]
    for record in records(tmp_path / 'a', 'checkpoint'):
        assert 0 < record['stall_ms'] <= record['total_ms'] and record['bytes'] > 26_560 * 12
