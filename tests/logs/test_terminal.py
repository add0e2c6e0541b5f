"""What a person sees of a run: no line wraps, nothing is silent, the end says what to type next."""

import re
import subprocess

import pytest
from conftest import ROOT, TINY, records, run_process, run_train

from onetrain.logs import terminal
from onetrain.logs.terminal import Terminal, duration, progress_line, short_number
from onetrain.training.startup_report import group_lines


@pytest.mark.parametrize('width', [40, 60, 79, 120])
@pytest.mark.parametrize(
    'step, total, mfu, left, more',
    [
        (1, 10, None, None, []),
        (599_999, 600_000, 41.23, 300_000.0, []),
        (250, 1000, 41.2, 65.0, ['load 97']),
        (999_999_999, 1_000_000_000, 100.0, 9e9, ['load 100']),
    ],
)
def test_a_line_of_progress_fits(width, step, total, mfu, left, more):
    line = progress_line(step, total, 10.8214, 3e-4, 123.456, 1_112_345.6, mfu, left, more, width)
    assert len(line) <= width and line.startswith(f'iter {step}/{total}:'[:width])
    if width == 120 and total < 10**9:
        assert 'loss 10.8214' in line and 'lr 3.00e-04' in line and '1.11M tok/s' in line
        assert ('mfu' in line, ' left' in line) == (mfu is not None, left is not None)
        assert all(word in line for word in more)
    if width == 79 and total < 10**9:
        assert 'loss 10.8214' in line and 'tok/s' in line and (mfu is None or 'mfu 41.2%' in line)


def test_numbers_and_times_are_short():
    assert [short_number(n) for n in (935, 9_999, 46_112, 1_112_345, 2.5e9)] == [
        '935',
        '9,999',
        '46.1k',
        '1.11M',
        '2.50G',
    ]
    assert [duration(s) for s in (0.4, 99, 100, 3_599, 3_600, 172_000, 300_000)] == [
        '0 s',
        '99 s',
        '1:40 min',
        '59:59 min',
        '1 h 00 min',
        '47 h 47 min',
        '3 d 11 h',
    ]


def test_a_group_breaks_between_phrases():
    phrases = [f'phrase number {i} of some length' for i in range(9)]
    lines = group_lines('Title', phrases)
    assert (
        len(lines) > 2
        and max(map(len, lines)) <= 100
        and lines[0].startswith('Title:       phrase number 0')
    )
    assert (
        all(any(phrase in line for line in lines) for phrase in phrases)
        and lines[1][:13] == ' ' * 13
    )


class Clock:
    """time, as far as terminal needs it, that only goes on when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


def test_long_work_is_named_once_and_again(monkeypatch, capsys):
    clock, seen = Clock(), Terminal()
    monkeypatch.setattr(terminal, 'time', clock)
    seen.last_line = clock.now
    seen.ended.set()  # no thread: it is asked here
    said = []

    def look(seconds):
        clock.now += seconds
        said.append(seen.look())

    monkeypatch.setattr(
        terminal.threading,
        'Thread',
        lambda **options: type('None', (), {'start': lambda self: None})(),
    )
    with seen.doing('evaluating', 400) as work:
        look(4)
        work.done = 40
        look(2)
        look(20)
        look(11)
        seen.say('a line')
        look(4)
        work.done = 400
        look(2)
    look(60)
    assert said == [
        None,
        'evaluating 40/400, about 54 s left',
        None,
        'evaluating 40/400, about 5:33 min left',
        None,
        'evaluating 400/400, about 0 s left',
        None,
    ]


def test_a_slow_step_and_a_slow_evaluation_are_not_silent(dataset, tmp_path):
    """In a file, with limits of a second instead of 5 and 30."""
    (tmp_path / 'slow.py').write_text("""
import sys, time
import train
from onetrain.data import loader
from onetrain.logs import terminal
terminal.QUIET_S, terminal.AGAIN_S = 0.6, 1.0
windows = loader.TrainLoader.windows
loader.TrainLoader.windows = lambda self, micro: (time.sleep(0.7), windows(self, micro))[1]
read_batch = loader.read_batch
loader.read_batch = lambda *args: (time.sleep(0.3), read_batch(*args))[1]
if __name__ == '__main__':
    train.processes.run_and_exit(lambda: train.main(sys.argv[1:]))
""")
    code, output = run_process(
        str(tmp_path / 'slow.py'),
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}/out',
        *TINY,
        '--max_iters=2',
        '--gradient_accumulation_steps=3',
        '--eval_iters=4',
    )
    assert (
        code == 0
        and re.search(r'^iter 1/2: micro-step \d/3', output, re.M)
        and re.search(r'^evaluating \d/8, about \d s left', output, re.M)
    ), output
    (log,) = (tmp_path / 'out').glob('*.log')
    assert 'evaluating' not in log.read_text()


def test_start_and_end_of_a_run(dataset, tmp_path, capsys):
    assert (
        run_train(
            dataset, tmp_path / 'a', '--max_iters=7', '--eval_interval=3', '--arch_preset=llama3'
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    start = lines[: lines.index(next(line for line in lines if line.startswith('----')))]
    assert (
        start[0].startswith('onetrain ')
        and len([line for line in start if not line.startswith('Note')]) <= 15
    )
    assert [line for line in start if line.startswith('Weights:')] == [
        'Weights:     initialized with seed 1337'
    ]
    summary = records(tmp_path / 'a', 'end')[0]['summary']
    evaluations = records(tmp_path / 'a', 'eval')
    assert [r['iter'] for r in evaluations] == [0, 3, 6, 7]  # the final weights are evaluated
    assert summary['final_val_loss'] == evaluations[-1]['val_loss'] and summary[
        'best_val_loss'
    ] == min(r['val_loss'] for r in evaluations)
    assert sum('*best*' in line for line in lines) == sum(
        r['val_loss'] < min(e['val_loss'] for e in evaluations[:i])
        for i, r in enumerate(evaluations)
        if i
    )
    end = '\n'.join(lines[next(i for i, line in enumerate(lines) if line.startswith('Done:')) :])
    for words in (
        'Done:        7 iterations in ',
        '448 tokens',
        'Validation:  loss ',
        f'Run folder:  {tmp_path}/a',
        ' sample.py --out_dir=',
        ' plots/plot_single_run.py ',
        ' export.py --out_dir=',
    ):
        assert words in end, end
    assert (
        max(
            map(
                len,
                (line.replace(str(tmp_path), '') for line in lines if not line.startswith('Note')),
            )
        )
        <= 100
    )
    for line in lines[-3:]:  # each can be typed as it stands
        words = line.removeprefix('Next:').split()
        assert (
            subprocess.run(
                [
                    *words,
                    *(['--num_samples=1', '--max_new_tokens=5'] if 'sample.py' in line else []),
                ],
                cwd=ROOT,
                capture_output=True,
                timeout=120,
            ).returncode
            == 0
        ), line
