"""A run that is asked to stop does so at a safe point with a whole checkpoint, whatever it is
doing, and continues to the same bits.
"""

import os
import signal
import time

import pytest
from conftest import TINY, end_all, losses, records, run_process, start_process

from onetrain import signals
from onetrain.checkpoint import store

LONG = ['--max_iters=100000', '--eval_interval=100000', '--eval_at_start=False']


def stop_at(text, number, dataset, out, *args, again=None, script='train.py'):
    """Start train.py, send `number` to its process group when it prints `text`, once more after
    `again` seconds; (exit code, output, seconds).
    """
    process = start_process(script, f'--dataset={dataset}', f'--out_dir={out}', *TINY, *args)
    output, asked = '', None
    try:
        for line in process.stdout:
            output += line
            if text in line and asked is None:
                asked = time.monotonic()
                os.killpg(process.pid, number)
                if again:
                    time.sleep(again)
                    os.killpg(process.pid, number)
        return process.wait(30), output, time.monotonic() - asked
    finally:
        end_all(process)


@pytest.mark.parametrize(
    'number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_each_signal_saves_and_has_its_exit_code(dataset, tmp_path, train, number, code):
    found, output, _ = stop_at('iter 33/', number, dataset, tmp_path, *LONG)
    assert (
        found == code and '--init_from=resume continues' in output and 'Traceback' not in output
    ), output
    step = store.newest_whole(str(tmp_path))[0]
    assert step == max(losses(tmp_path)) >= 33


def test_a_signal_before_the_first_iteration_ends_at_once(dataset, tmp_path):
    """During set-up, compilation and the first evaluation nothing can be lost."""
    code, output, seconds = stop_at(
        'onetrain ',
        signal.SIGTERM,
        dataset,
        tmp_path,
        '--max_iters=100',
        '--eval_at_start=True',
        '--eval_iters=100000',
    )
    assert (
        code == 143
        and 'nothing had to be saved' in output
        and seconds < 5
        and 'iter 0/' not in output
    ), output
    code, output, seconds = stop_at(
        'onetrain ', signal.SIGTERM, dataset, tmp_path / 'b', *LONG, '--compile=True', '--n_layer=6'
    )
    assert (
        code == 143
        and 'nothing had to be saved' in output
        and seconds < 10
        and 'iter 1/' not in output
    ), output


def test_eval_only_ends_at_once(dataset, tmp_path, train):
    assert train(tmp_path, '--max_iters=2', '--eval_interval=2') == 0
    code, output, seconds = stop_at(
        'onetrain ',
        signal.SIGINT,
        dataset,
        tmp_path,
        '--init_from=resume',
        '--eval_only=True',
        '--eval_iters=1000000',
        '--batch_size=1',
    )
    assert code == 130 and 'Traceback' not in output, output


def test_a_second_signal_ends_without_a_checkpoint(dataset, tmp_path):
    """The first is honoured only after the step, which takes a minute here."""
    script = tmp_path / 'slow_step.py'
    script.write_text(
        'import sys, time\nimport train\nfrom onetrain.training import optim\nclip ='
        ' optim.clip_gradients\ncount = [0]\ndef slow(*args):\n    count[0] += 1\n    if count[0] >'
        ' 40:\n        print("slow now", flush=True)\n        [time.sleep(0.1) for _ in'
        ' range(600)]\n    return clip(*args)\noptim.clip_gradients ='
        ' slow\nsys.exit(train.main())\n'
    )
    code, output, seconds = stop_at(
        'slow now', signal.SIGTERM, dataset, tmp_path / 'out', *LONG, again=1.5, script=str(script)
    )
    assert (
        code == 143 and 'SIGTERM again: stopped without a checkpoint' in output and seconds < 10
    ), output
    assert store.steps(str(tmp_path / 'out')) == []


def test_a_signal_during_evaluation_does_not_wait_for_its_end(dataset, tmp_path, train):
    code, output, seconds = stop_at(
        'iter 50/',
        signal.SIGTERM,
        dataset,
        tmp_path,
        '--max_iters=100',
        '--eval_interval=50',
        '--eval_at_start=False',
        '--eval_iters=1000000',
        '--batch_size=1',
        '--keep_checkpoints=5',
    )
    assert code == 143 and seconds < 20, output
    assert store.newest_whole(str(tmp_path)) == (50, []) and records(tmp_path, 'eval') == []
    assert train(tmp_path, '--init_from=resume', '--eval_iters=2', '--batch_size=1') == 0
    assert [r['iter'] for r in records(tmp_path, 'eval')] == [50, 100]  # made again


def test_a_signal_while_waiting_for_data(dataset, tmp_path):
    """A worker process hangs in its file system from the 40th batch on."""
    script = tmp_path / 'hanging.py'
    script.write_text(
        'import sys, time\nimport train\nfrom onetrain.data import loader\nget ='
        ' loader.TrainLoader.__getitem__\ndef hang(self, micro):\n    if micro > 40:\n       '
        ' time.sleep(1000)\n    return get(self, micro)\nloader.TrainLoader.__getitem__ ='
        ' hang\nsys.exit(train.main())\n'
    )
    code, output, seconds = stop_at(
        'iter 41/',
        signal.SIGTERM,
        dataset,
        tmp_path / 'out',
        *LONG,
        '--use_dataloader=True',
        '--dataloader_num_workers=2',
        script=str(script),
    )
    assert code == 143 and seconds < 15, output
    assert store.newest_whole(str(tmp_path / 'out')) == (41, [])


def test_a_step_that_is_given_up_is_made_again(dataset, tmp_path, train):
    """A signal between two micro-steps: the gradients so far are dropped, the batches come again
    after the resume.
    """
    assert (
        train(
            tmp_path / 'calm',
            '--max_iters=45',
            '--eval_interval=100',
            '--gradient_accumulation_steps=6',
            '--dropout=0.1',
        )
        == 0
    )
    import train as trainer

    loader_next, calls = trainer.TrainLoader.next, []

    def signalled(self, interrupted):
        calls.append(1)
        if len(calls) == 6 * 30 + 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return loader_next(self, interrupted)

    trainer.TrainLoader.next = signalled
    try:
        assert (
            train(
                tmp_path / 'b',
                '--max_iters=45',
                '--eval_interval=100',
                '--gradient_accumulation_steps=6',
                '--dropout=0.1',
            )
            == 138
        )
    finally:
        trainer.TrainLoader.next = loader_next
    assert store.newest_whole(str(tmp_path / 'b')) == (30, []) and max(losses(tmp_path / 'b')) == 30
    assert train(tmp_path / 'b', '--init_from=resume', '--gradient_accumulation_steps=6') == 0
    assert losses(tmp_path / 'b') == losses(tmp_path / 'calm')


def test_max_time_saves_and_leaves_with_its_code(dataset, tmp_path, train):
    code, output = run_process(
        'train.py',
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}',
        *TINY,
        *LONG,
        f'--max_time={12 / 3600}',
    )
    assert code == signals.TIME_IS_UP == 75 and '--init_from=resume continues' in output, output
    step = store.newest_whole(str(tmp_path))[0]
    assert step == max(losses(tmp_path))
    # the limit was of the other process
    assert train(tmp_path, '--init_from=resume', f'--max_iters={step + 3}') == 0
    assert max(losses(tmp_path)) == step + 3


def test_one_command_line_starts_continues_and_has_nothing_left_to_do(train, tmp_path, capsys):
    assert train(tmp_path, '--auto_resume=True', '--max_iters=10', '--eval_interval=5') == 0
    assert 'continuing' not in capsys.readouterr().out
    assert train(tmp_path, '--auto_resume=True', '--max_iters=20', '--eval_interval=5') == 0
    assert 'continuing at iter 10' in capsys.readouterr().out
    assert train(tmp_path, '--auto_resume=True', '--max_iters=20', '--eval_interval=5') == 0
    assert sorted(losses(tmp_path)) == list(range(1, 21)) and [
        r['iter'] for r in records(tmp_path, 'eval')
    ] == [0, 5, 10, 15, 20]
    # a run whose checkpoints are all broken is not started anew
    for step in store.steps(str(tmp_path)):
        os.remove(os.path.join(store.path_of(str(tmp_path), step), 'state.json'))
    assert train(tmp_path, '--auto_resume=True', '--max_iters=20') == 2
    assert 'state.json is missing' in capsys.readouterr().err


def test_two_processes_never_write_in_one_folder(dataset, tmp_path):
    first = start_process('train.py', f'--dataset={dataset}', f'--out_dir={tmp_path}', *TINY, *LONG)
    try:
        for line in first.stdout:
            if line.startswith('iter 5/'):
                break
        code, output = run_process(
            'train.py',
            f'--dataset={dataset}',
            f'--out_dir={tmp_path}',
            *TINY,
            *LONG,
            '--auto_resume=True',
        )
        assert code == 2 and f'{tmp_path} is in use by process {first.pid} on' in output, output
    finally:
        end_all(first)
        first.communicate()
    # a SIGKILL gives the lock back
    code, output = run_process(
        'train.py', f'--dataset={dataset}', f'--out_dir={tmp_path}', *TINY, '--max_iters=3'
    )
    assert code == 0, output


def test_the_codes_of_a_request():
    request = signals.StopRequest(verbose=False)
    try:
        assert request.code() == 0
        request.max_hours = 1e-9
        assert request.code() == 75
        request.requested_code = 3
        assert request.code() == 3
        request.exit_immediately = False
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.code() == 143
        os.kill(os.getpid(), signal.SIGTERM)  # within a second: the same signal on two ways
        assert request.code() == 143
    finally:
        request.restore()


def test_a_run_that_died_before_its_first_checkpoint_begins_again_in_the_same_log(
    dataset, tmp_path, train
):
    args = ['--max_iters=400', '--eval_interval=400']
    process = start_process(
        'train.py',
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}',
        *TINY,
        *args,
        '--auto_resume=True',
    )
    for line in process.stdout:
        if line.startswith('iter 9/'):
            process.kill()
    process.wait()
    assert store.steps(str(tmp_path)) == [] and max(losses(tmp_path)) >= 9
    assert train(tmp_path, *args, '--auto_resume=True') == 0
    assert [r['iter'] for r in records(tmp_path)] == list(range(1, 401)) and [
        r['iter'] for r in records(tmp_path, 'eval')
    ] == [0, 400]
    assert train(tmp_path / 'other', *args) == 0
    assert losses(tmp_path) == losses(tmp_path / 'other')


def test_another_run_does_not_take_the_log_of_one_that_died(tmp_path, train):
    (tmp_path / 'run_20200101_000000.jsonl').write_text(
        '{"type": "header", "start_time": "then", "config": {"learning_rate": 1}}\n{"type": "eval",'
        ' "iter": 0, "val_loss": 1.0}\n'
    )
    before = (tmp_path / 'run_20200101_000000.jsonl').read_text()
    assert train(tmp_path, '--max_iters=2', '--auto_resume=True') == 0
    assert (tmp_path / 'run_20200101_000000.jsonl').read_text() == before and len(
        [n for n in os.listdir(tmp_path) if n.startswith('run_') and n.endswith('.jsonl')]
    ) == 2


def test_the_last_evaluation_that_is_cut_short_is_made_by_the_next_start(dataset, tmp_path, train):
    code, output, seconds = stop_at(
        'iter 50/',
        signal.SIGTERM,
        dataset,
        tmp_path,
        '--max_iters=50',
        '--eval_interval=50',
        '--eval_at_start=False',
        '--eval_iters=1000000',
        '--batch_size=1',
    )
    assert code == 143 and seconds < 20 and store.newest_whole(str(tmp_path)) == (50, []), output
    assert (
        train(tmp_path, '--auto_resume=True', '--eval_iters=2', '--batch_size=1', '--max_iters=50')
        == 0
    )
    (evaluated,) = records(tmp_path, 'eval')
    noted = store.read_evaluation(store.path_of(str(tmp_path), 50))
    assert evaluated['iter'] == 50 and noted['val'] == evaluated['val_loss']


def test_a_repeat_is_expected_under_torchrun_only(monkeypatch):
    """torchrun hands on the signal that Slurm has sent to its workers already."""
    left = []
    monkeypatch.setattr(signals.os, '_exit', left.append)
    for under_torchrun, exits in ((False, [[143], [143, 143]]), (True, [[], [143]])):
        left.clear()
        (
            monkeypatch.setenv('TORCHELASTIC_RUN_ID', '1')
            if under_torchrun
            else monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
        )
        request = signals.StopRequest(verbose=False)
        request.exit_immediately = False
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            for expected in exits:
                request.received -= 3.0  # three seconds later
                os.kill(os.getpid(), signal.SIGTERM)
                assert left == expected, (under_torchrun, left)
        finally:
            request.restore()


def test_the_clock_of_max_time_runs_on_over_restarts(monkeypatch):
    """Under torchrun it is torchrun's, the parent's: workers that it starts again get no new
    limit.
    """
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    script = (
        'import sys, time; from onetrain import signals; time.sleep(1);'
        ' print(signals.seconds_running())'
    )
    alone = float(run_process('-c', script)[1])
    handed = float(run_process('-c', script, env={'TORCHELASTIC_RUN_ID': '1'})[1])
    # this process is the parent
    assert 1 <= alone < 20 and abs(handed - signals.seconds_running()) < 5 and handed > alone


def test_a_signal_while_sampling_cuts_the_sample_short(train, tmp_path, capsys, monkeypatch):
    import train as trainer

    generate, lengths = trainer.generate, []

    def signalled(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        texts = generate(*args, **options)
        lengths.append(len(texts[0]))
        return texts

    monkeypatch.setattr(trainer, 'generate', signalled)
    assert (
        train(
            tmp_path,
            '--max_iters=20',
            '--eval_interval=100',
            '--sample_interval=10',
            '--sample_start=the',
        )
        == 143
    )
    assert lengths == [0] and store.newest_whole(str(tmp_path)) == (10, [])
