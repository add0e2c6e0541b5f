"""Copies elsewhere are verified, survive kills and a server that is down, and a bare machine
continues from them to the same bits.
"""

import glob
import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
from conftest import TINY, end_all, equal, losses, records, run_process, start_process, weights
from fsspec.implementations.local import LocalFileSystem

import checkpoints
from onetrain.checkpoint import fault_injection, shared_upload, store, uploader
from onetrain.distributed import collectives, processes
from onetrain.files import open_url


@pytest.fixture(params=['file', 's3'])
def url(request, tmp_path):
    """A place for copies: a folder, then a bucket."""
    if request.param == 'file':
        return f'file://{tmp_path / "elsewhere"}'
    request.getfixturevalue('s3')
    return f's3://bucket/{tmp_path.name}'


def test_checkpoints_and_logs_are_copied_while_training_and_complete_in_the_end(
    train, tmp_path, url, capsys
):
    out = tmp_path / 'out'
    assert (
        train(
            out,
            '--max_iters=30',
            '--eval_interval=10',
            '--keep_all_checkpoints=True',
            f'--upload_to={url}',
        )
        == 0
    )
    output = capsys.readouterr().out
    assert all(f'copied step {step} to' in output for step in (10, 20, 30)), output
    fs, root, step, rejected = uploader.find_run(url, 'full')
    assert (step, rejected) == (30, []) and store.steps(root, fs) == [10, 20, 30]
    for step in (10, 20, 30):
        local, there = store.path_of(str(out), step), store.path_of(root, step)
        assert sorted(os.listdir(local)) == sorted(
            path.rsplit('/', 1)[1] for path in fs.find(there)
        )
        for name in os.listdir(local):
            assert open(f'{local}/{name}', 'rb').read() == fs.cat_file(f'{there}/{name}'), name
    (log,) = glob.glob(f'{out}/run_*.jsonl')
    copied = fs.cat_file(f'{root}/{os.path.basename(log)}').decode().splitlines()
    assert copied == open(log).read().splitlines() and json.loads(copied[-1])['type'] == 'end'


def test_a_bare_machine_continues_to_the_same_bits(train, tmp_path, url, capsys):
    assert train(tmp_path / 'calm', '--max_iters=30', '--eval_interval=10', '--dropout=0.1') == 0
    a, b = tmp_path / 'machine_1' / 'out', tmp_path / 'machine_2' / 'out'
    assert (
        train(a, '--max_iters=20', '--eval_interval=10', '--dropout=0.1', f'--upload_to={url}') == 0
    )
    os.rename(a, tmp_path / 'gone')
    assert (
        train(
            b, '--init_from=resume', f'--resume_from={url}', f'--upload_to={url}', '--max_iters=30'
        )
        == 0
    )
    assert 'continuing at iter 20' in capsys.readouterr().out
    assert losses(b) == losses(tmp_path / 'calm') and [r['iter'] for r in records(b)] == list(
        range(1, 31)
    )
    assert equal(weights(b, 30), weights(tmp_path / 'calm', 30))
    # one command line for any machine
    c = tmp_path / 'machine_3' / 'out'
    assert (
        train(
            c,
            '--auto_resume=True',
            f'--upload_to={url}',
            '--max_iters=40',
            '--eval_interval=10',
            '--dropout=0.1',
        )
        == 0
    )
    assert 'continuing at iter 30' in capsys.readouterr().out and sorted(losses(c)) == list(
        range(1, 41)
    )
    # and the machine that has an older state fetches the newer one
    assert (
        train(
            b,
            '--auto_resume=True',
            f'--upload_to={url}',
            '--max_iters=50',
            '--eval_interval=10',
            '--dropout=0.1',
        )
        == 0
    )
    assert 'continuing at iter 40' in capsys.readouterr().out
    assert len(records(b)) == 50 and len(glob.glob(f'{b}/*.jsonl.before_fetch')) == 1
    # a certain step
    run = uploader.find_run(url)[1]
    place = run if url.startswith('file') else f's3://{run}'
    assert (
        train(
            tmp_path / 'd',
            '--init_from=resume',
            f'--resume_from={place}/checkpoints/step_00000020',
            '--max_iters=22',
        )
        == 0
    )
    assert 'continuing at iter 20' in capsys.readouterr().out and max(losses(tmp_path / 'd')) == 22


def test_a_copy_that_is_damaged_gives_way_to_the_one_before(train, tmp_path, url, capsys):
    assert train(tmp_path / 'a', '--max_iters=20', '--eval_interval=10', f'--upload_to={url}') == 0
    fs, root, step, _ = uploader.find_run(url)
    path = f'{root}/checkpoints/step_00000020/__0_0.distcp'
    data = bytearray(fs.cat_file(path))
    data[1000] ^= 1
    fs.pipe_file(path, bytes(data))
    assert (
        train(tmp_path / 'b', '--init_from=resume', f'--resume_from={url}', '--max_iters=12') == 0
    )
    output = capsys.readouterr().out
    assert (
        'step_00000020: __0_0.distcp does not have the checksum' in output
        and 'continuing at iter 10' in output
    )
    assert checkpoints.main([url]) == 1
    assert 'BROKEN' in capsys.readouterr().out


def test_a_kill_during_the_copy_leaves_no_half_checkpoint(dataset, tmp_path, url, train):
    """The process dies with some files of step 20 copied; the run that continues completes the
    copy.
    """
    out = tmp_path / 'out'
    code, output = run_process(
        'train.py',
        f'--dataset={dataset}',
        f'--out_dir={out}',
        *TINY,
        '--max_iters=20',
        '--eval_interval=10',
        f'--upload_to={url}',
        env={'ONETRAIN_FAULT': 'upload:20'},
    )
    assert code == fault_injection.EXIT_CODE, output
    fs, root, step, rejected = uploader.find_run(url)
    assert rejected and 'manifest.json is missing' in rejected[0][1]  # files, but no checkpoint
    assert step in (None, 10)
    assert train(out, '--auto_resume=True', '--max_iters=30', '--eval_interval=10') == 0
    fs, root, step, rejected = uploader.find_run(url, 'full')
    assert (step, rejected) == (30, []) and store.corruption_reason(
        f'{root}/checkpoints/step_00000020', 'full', fs
    ) is None


def test_a_server_that_is_down_blocks_no_step_and_gets_all_in_the_end(
    s3, dataset, tmp_path, monkeypatch
):
    url, out = f's3://bucket/{tmp_path.name}', tmp_path / 'out'
    process = start_process(
        'train.py',
        f'--dataset={dataset}',
        f'--out_dir={out}',
        *TINY,
        '--max_iters=200',
        '--eval_interval=100',
        f'--upload_to={url}',
        '--log_interval=5',
        env=s3.environment,
    )
    output, stopped, started = '', False, False
    try:
        for line in process.stdout:
            output += line
            if line.startswith('iter 5/') and not stopped:
                s3.stop()
                stopped = True
            if 'copying to' in line and not started:  # training is over, nothing could be copied
                assert 'NOT COPIED to' in output and 'copied step' not in output, output
                s3.start()
                started = True
        assert process.wait(120) == 0, output
    finally:
        end_all(process)
        if stopped and not started:
            s3.start()
    assert 'works again' in output and 'copied step 200' in output
    fs, root, step, rejected = uploader.find_run(url, 'full')
    assert (step, rejected) == (200, []) and fs.size(
        f'{root}/{os.path.basename(root)}.jsonl'
    ) > 5000


def test_killed_while_the_server_is_down_then_resumed_from_the_bucket_on_an_empty_folder(
    s3, dataset, tmp_path, train
):
    """The whole story: a kill during the copy, the server away and back, another machine."""
    url, args = f's3://bucket/{tmp_path.name}', ['--eval_interval=10', '--dropout=0.1']
    assert train(tmp_path / 'calm', '--max_iters=60', *args) == 0
    out = tmp_path / 'out'
    common = [
        f'--dataset={dataset}',
        f'--out_dir={out}',
        *TINY,
        *args,
        '--auto_resume=True',
        f'--upload_to={url}',
    ]
    # the last, which stays
    code, output = run_process(
        'train.py', *common, '--max_iters=40', env={**s3.environment, 'ONETRAIN_FAULT': 'upload:40'}
    )
    assert code == fault_injection.EXIT_CODE, output
    s3.stop()
    try:
        process = start_process('train.py', *common, '--max_iters=100000', env=s3.environment)
        for line in process.stdout:
            if line.startswith('iter 45/'):
                os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(30) == 143
    finally:
        end_all(process)
        s3.start()
    stopped = store.newest_whole(str(out))[0]
    code, output = run_process('train.py', *common, f'--max_iters={stopped}', env=s3.environment)
    assert code == 0 and uploader.find_run(url, 'full')[2:] == (stopped, []), output
    shutil.rmtree(out)
    assert (
        train(
            tmp_path / 'bare',
            '--init_from=resume',
            f'--resume_from={url}',
            f'--max_iters={max(60, stopped)}',
        )
        == 0
    )
    expected = losses(tmp_path / 'calm')
    assert {k: v for k, v in losses(tmp_path / 'bare').items() if k <= 60} == expected


def test_local_ones_go_only_when_asked_and_only_when_copied(train, tmp_path, url):
    assert (
        train(
            tmp_path / 'a',
            '--max_iters=50',
            '--eval_interval=10',
            '--keep_all_checkpoints=True',
            '--upload_keep_local=2',
            f'--upload_to={url}',
        )
        == 0
    )
    assert store.steps(str(tmp_path / 'a')) == [40, 50]
    fs, root, step, rejected = uploader.find_run(url, 'full')
    assert store.steps(root, fs) == [10, 20, 30, 40, 50]


def test_the_listing(train, tmp_path, url, capsys):
    assert train(tmp_path / 'a', '--max_iters=20', '--eval_interval=10') == 0
    evaluated = records(tmp_path / 'a', 'eval')
    capsys.readouterr()
    assert checkpoints.main([str(tmp_path / 'a'), f'--copy_to={url}']) == 0
    assert 'copied step 20' in capsys.readouterr().out
    for place in (str(tmp_path / 'a'), url):
        assert checkpoints.main([place]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert (
            lines[0].split() == ['step', 'train', 'loss', 'val', 'loss', 'size', 'saved', 'state']
            and len(lines) == 3
        )
        assert (
            lines[2].split()[:3]
            == ['20', f'{evaluated[2]["train_loss"]:.4f}', f'{evaluated[2]["val_loss"]:.4f}']
            and 'whole, best' in lines[2]
        )
    with open(os.path.join(store.path_of(str(tmp_path / 'a'), 10), '.metadata'), 'ab') as f:
        f.write(b'x')
    assert checkpoints.main([str(tmp_path / 'a'), '--verify=size']) == 1
    assert '.metadata has' in capsys.readouterr().out
    assert checkpoints.main([str(tmp_path)]) == 1  # a folder of runs
    assert (
        checkpoints.main([str(tmp_path / 'nowhere')]) == 2
        and 'nowhere: no such folder' in capsys.readouterr().err
    )


def test_places_that_cannot_be_used(train, tmp_path, capsys):
    assert train(tmp_path / 'a', '--max_iters=2', '--upload_to=nothing://x') == 2
    assert "'nothing://x' cannot be opened" in capsys.readouterr().err
    assert train(tmp_path / 'b', '--init_from=resume', f'--resume_from={tmp_path}/nowhere') == 2
    assert 'has no checkpoint that can be used' in capsys.readouterr().err
    assert train(tmp_path / 'b', f'--resume_from={tmp_path}') == 2
    assert 'needs --init_from=resume or --auto_resume=True' in capsys.readouterr().err
    for name in 'cd':
        assert train(tmp_path / name, '--max_iters=2', '--eval_interval=2') == 0
        time.sleep(1.1)  # runs are named by the second
    assert train(tmp_path / 'd', '--init_from=resume', f'--resume_from={tmp_path / "c"}') == 2
    assert 'give another --out_dir' in capsys.readouterr().err


def test_an_earlier_step_of_the_same_folder(train, tmp_path, capsys):
    assert (
        train(tmp_path, '--max_iters=30', '--eval_interval=10', '--keep_all_checkpoints=True') == 0
    )
    reference = losses(tmp_path)
    assert train(tmp_path, '--init_from=resume', '--resume_from=25') == 2
    assert 'has steps [10, 20, 30]' in capsys.readouterr().err
    assert train(tmp_path, '--init_from=resume', '--resume_from=10', '--max_iters=20') == 0
    assert store.steps(str(tmp_path)) == [10, 20] and sorted(losses(tmp_path)) == list(range(1, 21))
    assert {k: v for k, v in reference.items() if k <= 20} == losses(tmp_path)
    assert sorted(
        name for name in os.listdir(tmp_path / 'checkpoints') if name.startswith('superseded')
    ) == ['superseded_step_00000020', 'superseded_step_00000030']


def test_a_file_that_arrives_damaged_is_copied_again(train, tmp_path, monkeypatch):
    """The first time that each file of tensors is put there, a bit flips on the way."""
    assert train(tmp_path / 'a', '--max_iters=10', '--eval_interval=10') == 0
    transfer, damaged = uploader._transfer, []

    def unreliable(fs, here, to_fs, there):
        transfer(fs, here, to_fs, there)
        if there.endswith('.distcp') and not damaged:
            damaged.append(there)
            with open(there, 'r+b') as f:
                f.seek(500)
                f.write(b'#')

    monkeypatch.setattr(uploader, '_transfer', unreliable)
    # which has no log
    copies = uploader.Uploader(f'file://{tmp_path / "there"}', str(tmp_path / 'a'), 'run_x')
    assert copies.finish(30)
    news = copies.take_messages()
    assert (
        damaged
        and any('__0_0.distcp reads back differently' in line for line in news)
        and any('copied step 10' in line for line in news)
    ), news
    assert (
        store.corruption_reason(f'{tmp_path / "there"}/a/run_x/checkpoints/step_00000010') is None
    )


def test_a_copy_that_is_there_has_its_log(train, tmp_path, monkeypatch):
    """The log goes before the manifest: what can be resumed has its lines."""
    assert train(tmp_path / 'a', '--max_iters=10', '--eval_interval=10') == 0
    written = []
    write = uploader._write
    monkeypatch.setattr(
        uploader,
        '_write',
        lambda fs, path, data: (written.append(os.path.basename(path)), write(fs, path, data)),
    )
    run_name = os.path.basename(glob.glob(f'{tmp_path / "a"}/run_*.jsonl')[0]).removesuffix(
        '.jsonl'
    )
    assert uploader.Uploader(f'file://{tmp_path / "there"}', str(tmp_path / 'a'), run_name).finish(
        30
    )
    assert written[:5] == [
        f'{run_name}.jsonl',
        f'{run_name}.log',
        f'{run_name}.json',
        'manifest.json',
        'evaluation.json',
    ]


def test_who_went_back_stays_on_the_new_branch(train, tmp_path, url, capsys):
    """The bucket still has the later checkpoints of the branch that was left."""
    out, copies = tmp_path / 'out', f'--upload_to={url}'
    assert (
        train(out, '--max_iters=30', '--eval_interval=10', '--keep_all_checkpoints=True', copies)
        == 0
    )
    assert (
        train(
            out,
            '--init_from=resume',
            '--resume_from=10',
            '--max_iters=20',
            '--learning_rate=5e-4',
            copies,
        )
        == 0
    )
    branch = losses(out)
    assert (
        train(
            out,
            '--auto_resume=True',
            '--max_iters=25',
            '--learning_rate=5e-4',
            '--eval_interval=10',
            copies,
        )
        == 0
    )
    assert (
        'continuing at iter 20' in capsys.readouterr().out
        and {k: v for k, v in losses(out).items() if k <= 20} == branch
    )
    bare = tmp_path / 'bare' / 'out'
    assert (
        train(
            bare,
            '--auto_resume=True',
            '--max_iters=26',
            '--learning_rate=5e-4',
            '--eval_interval=10',
            copies,
        )
        == 0
    )
    assert (
        'continuing at iter 25' in capsys.readouterr().out
        and {k: v for k, v in losses(bare).items() if k <= 20} == branch
    )


def test_runs_share_a_url_without_meeting(train, tmp_path, url, capsys):
    """Another out_dir is another run: it neither continues nor overwrites the first; a fork has a
    place of its own.
    """
    a, b, fork, copies = tmp_path / 'a', tmp_path / 'b', tmp_path / 'fork', f'--upload_to={url}'
    assert train(a, '--max_iters=20', '--eval_interval=10', copies) == 0
    fs, root, *_ = uploader.find_run(url)
    before = {path: fs.cat_file(path) for path in fs.find(root)}
    assert (
        train(
            b,
            '--auto_resume=True',
            '--max_iters=10',
            '--eval_interval=10',
            '--learning_rate=5e-4',
            copies,
        )
        == 0
    )
    assert 'continuing' not in capsys.readouterr().out
    assert (
        train(
            fork,
            '--init_from=resume',
            f'--resume_from={a}/checkpoints/step_00000010',
            '--max_iters=20',
            '--eval_interval=10',
            '--learning_rate=5e-4',
            copies,
        )
        == 0
    )
    assert {path: fs.cat_file(path) for path in fs.find(root)} == before
    assert uploader.find_run(f'{url}/fork')[2] == 20
    assert (
        train(tmp_path / 'c', '--init_from=resume', f'--resume_from={url}', '--max_iters=20') == 2
    )
    assert 'has runs of a, b, fork: add the one to continue to the URL' in capsys.readouterr().err


def test_a_run_that_ends_before_all_is_copied_says_how_to_copy_it(
    train, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(uploader.Uploader, 'finish', lambda self, *how: False)
    url = f'file://{tmp_path / "there"}'
    code = train(tmp_path / 'a', '--max_iters=10', '--eval_interval=10', f'--upload_to={url}')
    assert code == 4
    assert (
        f'NOT EVERYTHING IS COPIED: `python checkpoints.py {tmp_path / "a"} --copy_to={url}` does'
        in capsys.readouterr().out
    )


def test_a_broken_one_does_not_hold_up_the_others(train, tmp_path, capsys):
    out, url = tmp_path / 'a', f'file://{tmp_path / "there"}'
    assert train(out, '--max_iters=30', '--eval_interval=10', '--keep_all_checkpoints=True') == 0
    with open(os.path.join(store.path_of(str(out), 30), 'state.json'), 'a') as f:
        f.write('  ')
    assert checkpoints.main([str(out), f'--copy_to={url}']) == 1
    output = capsys.readouterr().out
    assert (
        'NOT COPIED, as it is not whole' in output
        and 'copied step 20' in output
        and 'copied step 10' in output
    )


def test_automatic_with_a_place_to_begin_from_goes_there_only_once(train, tmp_path, capsys):
    assert train(tmp_path / 'a', '--max_iters=10', '--eval_interval=10') == 0
    for last, begins in ((20, 10), (30, 20)):
        assert (
            train(
                tmp_path / 'b',
                '--auto_resume=True',
                '--init_from=resume',
                f'--resume_from={tmp_path / "a"}',
                f'--max_iters={last}',
                '--eval_interval=10',
            )
            == 0
        )
        assert f'continuing at iter {begins}' in capsys.readouterr().out
    assert (
        train(
            tmp_path / 'b',
            '--init_from=resume',
            '--max_iters=40',
            '--upload_to=s4://x',
            '--resume_from=20',
        )
        == 2
    )
    assert store.steps(str(tmp_path / 'b')) == [20, 30]  # nothing was renamed


def test_damage_here_is_mended_from_the_copy(train, tmp_path, capsys):
    out, url = tmp_path / 'a', f'--upload_to=file://{tmp_path / "there"}'
    assert train(out, '--max_iters=20', '--eval_interval=10', url, '--upload_keep_local=1') == 0
    with open(os.path.join(store.path_of(str(out), 20), '__0_0.distcp'), 'r+b') as f:
        f.seek(5000)
        f.write(b'X')
    assert train(out, '--auto_resume=True', '--max_iters=30', '--eval_interval=10', url) == 0
    assert 'continuing at iter 20' in capsys.readouterr().out and sorted(losses(out)) == list(
        range(1, 31)
    )


def test_a_checkpoint_that_gets_its_name_while_it_is_looked_at_is_not_broken(
    train, tmp_path, monkeypatch
):
    assert train(tmp_path / 'a', '--max_iters=10', '--eval_interval=10') == 0
    real, asked = store.corruption_reason, []

    def corruption_reason(path, *args):
        asked.append(path)
        return 'there is no such checkpoint' if len(asked) == 1 else real(path, *args)

    monkeypatch.setattr(store, 'corruption_reason', corruption_reason)
    copies = uploader.Uploader(f'file://{tmp_path / "there"}', str(tmp_path / 'a'), 'run_x')
    assert (
        copies.finish(30)
        and any('copied step 10' in line for line in copies.take_messages())
        and len(asked) >= 2
    )


def test_a_bucket_is_asked_for_its_checksum_instead_of_every_byte(s3, tmp_path, monkeypatch):
    """Of a file sent whole and of one in pieces; one that arrives differently is found too."""
    monkeypatch.setattr(uploader, 'PIECE', 5 * 2**20)
    read, sha256 = [], store.sha256
    monkeypatch.setattr(
        store,
        'sha256',
        lambda path, fs=store.LOCAL: (read.append(path), sha256(path, fs))[1],
    )
    fs, there = open_url(f's3://bucket/{tmp_path.name}')
    files = {}
    for name, size in {'whole': 100, 'pieces': 12 * 2**20, 'nothing': 0}.items():
        (tmp_path / name).write_bytes(os.urandom(size))
        files[name] = {'size': size, 'sha256': sha256(str(tmp_path / name))}
    here = str(tmp_path / 'step_00000001')
    os.symlink(tmp_path, here)
    uploader.copy_files(store.LOCAL, here, fs, there, files)
    assert [path.rsplit('/', 1)[1] for path in read] == ['nothing']
    assert fs.info(f'{there}/pieces')['ETag'].strip('"').endswith('-3')
    assert all(fs.cat_file(f'{there}/{name}') == (tmp_path / name).read_bytes() for name in files)
    for name in ('whole', 'pieces'):
        fs.rm_file(f'{there}/{name}')
    transfer = uploader._transfer

    def unreliable(fs, here, to_fs, there):
        transfer(fs, here, to_fs, there)
        data = to_fs.cat_file(there)
        to_fs.pipe_file(there, data[:50] + bytes([data[50] ^ 1]) + data[51:])

    monkeypatch.setattr(uploader, '_transfer', unreliable)
    for name in ('whole', 'pieces'):
        with pytest.raises(ValueError, match=f'{name} reads back differently'):
            uploader.copy_files(store.LOCAL, here, fs, there, {name: files[name]})


def test_only_what_is_new_in_a_log_is_sent(url, tmp_path, monkeypatch):
    """And all of it where it was cut, or where its copy is not as it was left."""
    fs, there = open_url(url)
    here, log, sent, wholes = str(tmp_path / 'run'), tmp_path / 'run' / 'run_x.jsonl', {}, []
    os.makedirs(here)
    write = uploader._write
    monkeypatch.setattr(
        uploader,
        '_write',
        lambda fs, path, data: (wholes.append(os.path.basename(path)), write(fs, path, data)),
    )

    def copy_of(text, mode='a'):
        with open(log, mode) as f:
            f.write(text)
        uploader.copy_logs(store.LOCAL, here, fs, there, 'run_x', sent)
        return fs.cat_file(f'{there}/run_x.jsonl').decode()

    first = 'x' * 99 + '\n'
    assert copy_of(first * 60_000 + 'half a line') == first * 60_000
    assert copy_of(' of it\nand half') == first * 60_000 + 'half a line of it\n'
    assert copy_of('') == copy_of('\n')[: -len('and half\n')] and wholes == ['run_x.jsonl']
    # a run that went back, and is longer by now
    shorter = first * 50_000 + 'another line\n' * 100_000
    assert copy_of(shorter, 'w') == shorter and len(wholes) == 2
    for number, change in enumerate(
        (
            lambda: write(fs, f'{there}/run_x.jsonl', b'of another'),
            lambda: fs.rm(there, recursive=True),
            lambda: write(
                fs, f'{there}/run_x.jsonl', fs.cat_file(f'{there}/run_x.jsonl')[:-3] + b'xx\n'
            ),
        )
    ):
        change()
        assert copy_of('end\n') == shorter + 'end\n' * (number + 1) and len(wholes) == 3 + number
    if isinstance(fs, LocalFileSystem):
        os.rename(f'{there}/run_x.jsonl', tmp_path / 'moved')
        os.symlink(tmp_path / 'moved', f'{there}/run_x.jsonl')
        assert copy_of('end\n') == shorter + 'end\n' * 4 and not os.path.islink(
            f'{there}/run_x.jsonl'
        )
        del wholes[-1]
    (tmp_path / 'run' / 'run_x.json').write_text('{}')
    copy_of('')
    copy_of('')
    assert wholes[5:] == ['run_x.json'] and fs.cat_file(f'{there}/run_x.json') == b'{}'


def test_machines_copy_together_and_say_what_failed(tmp_path, monkeypatch):
    """Two of a job in which ranks 0 and 1 are on the first, 2 and 3 on the second. What the second
    copied to a place of its own, or never, the first copies.
    """
    copied, there = [], str(tmp_path / 'there')
    second_does = 'fail'

    def copy_files(fs, here, to_fs, there, files):
        second = threading.current_thread().name == 'copies'
        copied.append((second, sorted(files)))
        if second and second_does == 'fail':
            raise OSError('the disk of the second machine')
        if second and second_does == 'hang':
            time.sleep(1.5)
        os.makedirs(there, exist_ok=True)
        for name in files if not second or second_does == 'copy' else ():
            with open(f'{there}/{name}', 'w') as f:
                f.write('x')

    hashes = torch.distributed.HashStore()
    monkeypatch.setattr(collectives, 'all_gather_objects', lambda value, world: [0, 1, 0, 1])
    monkeypatch.setattr(
        collectives, 'broadcast_from_main', lambda work, world: 'copies of this run'
    )
    monkeypatch.setattr(processes, 'rendezvous_store', lambda: hashes)
    monkeypatch.setattr(shared_upload, 'copy_files', copy_files)
    first, second = (
        shared_upload.Machines(processes.World(rank, 4, torch.device('cpu')), f'file://{tmp_path}')
        for rank in (0, 2)
    )
    second.serve()
    names = ['.metadata', 'state.json', *(f'__{rank}_0.distcp' for rank in range(4))]
    files = dict.fromkeys(names, {'size': 1, 'sha256': ''})
    with pytest.raises(ValueError, match='OSError: the disk of the second machine'):
        first.copy('here', there, files)
    second_does = 'copy'
    first.copy('here', there, files)
    theirs = ['__2_0.distcp', '__3_0.distcp']
    shares = [(False, ['.metadata', '__0_0.distcp', '__1_0.distcp', 'state.json']), (True, theirs)]
    assert (
        sorted(copied[:2]) == shares
        and sorted(copied[2:4]) == shares
        and copied[4:] == [(False, [])]
    )
    del copied[:]
    for second_does in ('elsewhere', 'hang'):
        shutil.rmtree(there)
        monkeypatch.setattr(shared_upload, 'PATIENCE_S', 0.5)
        first.copy('here', there, files)
        assert copied[-1] == (False, theirs) and sorted(os.listdir(there)) == sorted(names), (
            second_does
        )
    second.close()
