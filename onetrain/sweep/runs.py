"""The runs of a sweep: which there are, making them, and how they rank."""

import contextlib
import ctypes
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from dataclasses import dataclass, field

from onetrain.command_line import ROOT
from onetrain.config import UserError, check_type, nearest, resolve, typed_value
from onetrain.distributed.topology import named_gpus
from onetrain.files import replacing
from onetrain.logs.terminal import duration, short_number
from onetrain.watch.follow import Follower, Standing, lock_holder

LOOK_S = 0.5  # between looks at the runs
TELL_S = 20.0  # between lines about them
PATIENCE_S = 60.0
MOST_RUNS = 1000
_ENDED = ('finished', 'stopped', 'failed', 'worse half')


def combinations(words: list[str]) -> tuple[list[str], dict[str, list], list[str]]:
    """Return (config files, {key: its values} of the keys with several, words of the others).

    Raises UserError for what no key may be, or where nothing is swept.
    """
    from train import ALIASES, Config

    hints = typing.get_type_hints(Config)
    files = [word for word in words if not word.startswith('-')]
    axes: dict[str, list] = {}
    fixed: list[str] = []
    for word in words:
        if not word.startswith('-'):
            continue
        match = re.fullmatch(r'--([A-Za-z_]\w*)=(.*)', word, re.DOTALL)
        if not match or match[1] not in hints and match[1] not in ALIASES:
            key = word.removeprefix('--').split('=')[0]
            raise UserError(f'unknown option {word.split("=")[0]}{nearest(key, [*hints])}')
        key, text = match[1], match[2]
        if key in ('out_dir', 'init_from', 'auto_resume', 'resume_from', 'dry_run', 'eval_only'):
            raise UserError(f'--{key} does not go with a sweep, which sets it for each run')
        several = _split(key, text, hints)
        if several:
            axes[key] = several
        else:
            fixed.append(word)
    if not axes:
        raise UserError('no key has several values: type such as --learning_rate=3e-4,1e-3,3e-3')
    if (number := math.prod(map(len, axes.values()))) > MOST_RUNS:
        raise UserError(f'{number:,} runs are more than {MOST_RUNS:,}: name fewer values')
    resolve(Config, [*files, *fixed], ALIASES)
    return files, axes, fixed


def _split(key, text, hints):
    """Return the values in the text of a key, [] where it is one. A text with a comma, such as the
    name of a mixture, is one.
    """
    if (
        ',' not in text
        or key not in hints
        or hints[key] is str
        or str in typing.get_args(hints[key])
    ):
        return []
    values = [
        check_type(key, typed_value(word.strip(), hints[key]), hints[key], 'command line')
        for word in text.split(',')
    ]
    if len({repr(value) for value in values}) < len(values):
        raise UserError(f'--{key}={text} names a value twice')
    return values


@dataclass
class Trial:
    """One run of a sweep.

    state: 'waiting' | 'running' | one of _ENDED; loss: of its last evaluation, after `evaluated`
    iterations.
    """

    values: dict
    folder: str
    max_iters: int
    state: str = 'waiting'
    loss: float = math.nan
    best: float = math.nan
    evaluated: int = 0
    rate: float = math.nan
    reason: str = ''
    curve: tuple[list[int], list[float]] = field(default_factory=lambda: ([], []))
    process: subprocess.Popen | None = None
    gpu: int | None = None
    follower: Follower | None = None

    @property
    def name(self) -> str:
        """Return such as 'learning_rate=0.001,seed=1'."""
        return ','.join(f'{key}={value}' for key, value in self.values.items())

    def look(self) -> Standing | None:
        """Read how its run stands; None where it has not begun."""
        if not os.path.isdir(self.folder):
            return None
        self.follower = self.follower or Follower(self.folder)
        standing = self.follower.look()
        curve = standing.curves['val_loss']
        self.curve = curve.iters, curve.values
        n = standing.numbers
        self.loss, self.best = n.get('val_loss', math.nan), n.get('best_val_loss', math.nan)
        self.evaluated = int(n.get('val_iter', 0))
        self.rate = n.get('tokens_per_sec', math.nan)
        return standing


class Sweep:
    """Makes a run for each combination of the values of `axes`.

    files, fixed: config files and words that all have; folder: of the runs; halve_at: iterations,
    separated by commas, from which the better half goes on; parallel: runs at a time, None for one
    on each GPU. Raises UserError.
    """

    def __init__(
        self,
        files: list[str],
        axes: dict[str, list],
        fixed: list[str],
        folder: str,
        halve_at: str | None = None,
        parallel: int | None = None,
    ):
        self.files, self.axes, self.fixed, self.folder = files, axes, fixed, folder
        self.rungs = _rungs(halve_at)
        self.gpus = _gpus()
        self.parallel = parallel or max(1, len(self.gpus))
        from train import ALIASES, Config

        most = resolve(Config, [*files, *fixed], ALIASES)[0].max_iters
        chosen = (dict(zip(axes, values)) for values in itertools.product(*axes.values()))
        self.trials = [
            Trial(values, os.path.join(folder, _folder_name(values)), values.get('max_iters', most))
            for values in chosen
        ]
        self.told = 0.0
        self.halved: list[int] = []  # the rungs at which the worse half was stopped

    def make(self) -> int:
        """Make the runs, and return how many failed."""
        self._open_folder()
        for trial in self.trials:
            trial.look()
            if trial.evaluated >= trial.max_iters and trial.state == 'waiting':
                trial.state = 'finished'
                print(f'{trial.name}: finished before', flush=True)
        try:
            for rung in self.rungs:
                if rung not in self.halved:
                    self._run_until(rung)
                    self._halve(rung)
            self._run_until(None)
        finally:
            self._stop_all()
            self._write()
        return sum(trial.state == 'failed' for trial in self.trials)

    def _open_folder(self):
        """Make the folder, or find the same sweep in it."""
        path = os.path.join(self.folder, 'sweep.json')
        wanted = {'files': self.files, 'axes': self.axes, 'fixed': self.fixed}
        if os.path.exists(path):
            try:
                with open(path, encoding='utf-8') as f:
                    there = json.load(f)
                same = {key: there[key] for key in wanted} == json.loads(json.dumps(wanted))
                states = [(run['values'], run['state']) for run in there['runs']]
                self.halved = [rung for rung in self.rungs if rung in there['halved']]
            except (ValueError, KeyError, TypeError):
                raise UserError(f'{path} is no file of a sweep: type another --sweep_dir') from None
            if not same:
                raise UserError(
                    f'{self.folder} holds another sweep, of {_words(there)}: type another'
                    ' --sweep_dir'
                )
            for trial in self.trials:
                if (json.loads(json.dumps(trial.values)), 'worse half') in states:
                    trial.state = 'worse half'
        elif os.path.isdir(self.folder) and os.listdir(self.folder):
            raise UserError(f'{self.folder} is not empty: type another --sweep_dir')
        os.makedirs(self.folder, exist_ok=True)
        self._write()

    def _run_until(self, rung):
        """Make all that go on run up to iteration `rung`, or to their end (None)."""
        waiting = [
            trial
            for trial in self.trials
            if trial.state not in _ENDED and (rung is None or trial.evaluated < rung)
        ]
        running: list[Trial] = []
        while waiting or running:
            while waiting and len(running) < self.parallel:
                trial = waiting.pop(0)
                self._start(trial, {each.gpu for each in running}, rung)
                running.append(trial)
            time.sleep(LOOK_S)
            for trial in list(running):
                assert trial.process
                code = trial.process.poll()
                trial.look()
                if code is not None:
                    running.remove(trial)
                    self._ended(trial, code, rung)
            self._tell(running)

    def _start(self, trial, taken, rung):
        """Start or continue a run up to iteration `rung`, on a GPU that no other has."""
        environment = dict(os.environ)
        trial.gpu = next((gpu for gpu in self.gpus if gpu not in taken), None)
        if trial.gpu is not None:
            environment['CUDA_VISIBLE_DEVICES'] = str(trial.gpu)
        command = [sys.executable, os.path.join(ROOT, 'train.py'), *self.files, *self.fixed]
        command += [f'--{key}={value}' for key, value in trial.values.items()]
        command += [f'--out_dir={trial.folder}', '--auto_resume=True']
        # the learning rate follows lr_decay_iters, not max_iters
        command += [] if rung is None else [f'--max_iters={min(rung, trial.max_iters)}']
        print(f'{trial.name}: begins', flush=True)
        self.told, trial.state = time.monotonic(), 'running'
        until = time.monotonic() + PATIENCE_S  # for one that a killed sweep left to save
        while lock_holder(trial.folder) and time.monotonic() < until:
            time.sleep(LOOK_S)
        with open(os.path.join(self.folder, f'{os.path.basename(trial.folder)}.txt'), 'ab') as f:
            trial.process = subprocess.Popen(
                command,
                stdout=f,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def _ended(self, trial, code, rung):
        """Take up that the process of a run has ended."""
        trial.process = None
        trial.look()
        if code == 0:
            # one that ended early, as early_stop_patience asks for, has finished too
            done = rung is None or trial.evaluated >= trial.max_iters
            trial.state = 'finished' if done else 'waiting'
        else:
            trial.state = 'failed'
            trial.reason = self._last_line(trial)
        told = trial.reason or (
            'no evaluation' if trial.loss != trial.loss else f'loss {trial.loss:.4f}'
        )
        print(f'{trial.name}: {trial.state} at iteration {trial.evaluated:,}, {told}', flush=True)
        self._write()

    def _last_line(self, trial):
        """Return what a run that failed said last."""
        path = os.path.join(self.folder, f'{os.path.basename(trial.folder)}.txt')
        with contextlib.suppress(OSError), open(path, errors='replace') as f:
            lines = [line.strip() for line in f if line.strip()]
            errors = [line for line in lines if line.startswith('error: ')]
            return (errors or lines or ['it said nothing'])[-1][:200]
        return ''

    def _halve(self, rung):
        """Let the better half of the runs go on that are not finished."""
        open_ = [trial for trial in self.trials if trial.state == 'waiting']
        ranked = sorted(open_, key=lambda trial: (math.isnan(trial.loss), trial.loss))
        for trial in ranked[max(1, math.ceil(len(ranked) / 2)) :]:
            trial.state = 'worse half'
            print(f'{trial.name}: stopped, in the worse half from iteration {rung:,} on')
        self.halved.append(rung)
        self._write()

    def _tell(self, running):
        """Say how the runs stand, once in a while."""
        if time.monotonic() - self.told < TELL_S:
            return
        self.told = time.monotonic()
        for trial in running:
            standing = trial.look()
            n = standing.numbers if standing else {}
            if 'iter' in n:
                left = f', {duration(n["left_s"])} left' if n.get('left_s') else ''
                print(
                    f'{trial.name}: iteration {int(n["iter"]):,} of {int(n["max_iters"]):,}, loss'
                    f' {n["loss"]:.4f}{left}',
                    flush=True,
                )
            else:
                print(f'{trial.name}: starting', flush=True)

    def _stop_all(self):
        """Have what still runs save and end, as after Ctrl-C."""
        left = [trial for trial in self.trials if trial.process]
        for trial in left:
            trial.process.send_signal(signal.SIGTERM)
        for trial in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                trial.process.wait(timeout=60)
            trial.process, trial.state = None, 'waiting'

    def ranked(self) -> list[Trial]:
        """Return the runs, least loss first, those that came to their end before the others."""
        return sorted(
            self.trials,
            key=lambda t: (
                _ENDED.index(t.state) if t.state in _ENDED else 9,
                math.isnan(t.loss),
                t.loss,
            ),
        )

    def _write(self):
        """Write sweep.json."""
        record = {
            'files': self.files,
            'axes': self.axes,
            'fixed': self.fixed,
            'halved': self.halved,
            'runs': [
                {
                    'values': trial.values,
                    'folder': trial.folder,
                    'state': trial.state,
                    'evaluated': trial.evaluated,
                    'val_loss': None if math.isnan(trial.loss) else trial.loss,
                    'best_val_loss': None if math.isnan(trial.best) else trial.best,
                    'tokens_per_sec': None if math.isnan(trial.rate) else trial.rate,
                    'reason': trial.reason,
                }
                for trial in self.ranked()
            ],
        }
        with replacing(os.path.join(self.folder, 'sweep.json')) as f:
            f.write(json.dumps(record, indent=1).encode())

    def table(self) -> list[str]:
        """Return the ranked table."""
        width = max(len(trial.name) for trial in self.trials)
        lines = [f'{"":3} {"":{width}} {"val loss":>9} {"best":>9} {"iter":>8} {"tok/s":>8}']
        for place, trial in enumerate(self.ranked(), 1):
            loss, best = (
                '-' if math.isnan(value) else f'{value:.4f}' for value in (trial.loss, trial.best)
            )
            rate = '-' if math.isnan(trial.rate) else short_number(trial.rate)
            state = '' if trial.state == 'finished' else f'  {trial.state}'
            lines.append(
                f'{place:>2}. {trial.name:{width}} {loss:>9} {best:>9} {trial.evaluated:>8,}'
                f' {rate:>8}{state}'
            )
        return lines

    def draw(self) -> str:
        """Draw the curves, and the last loss over each key with numbers; returns the file."""
        from onetrain.sweep.picture import draw_sweep

        path = os.path.join(self.folder, 'sweep.png')
        draw_sweep(self.ranked(), self.axes, path)
        return path


def _end_with_parent():
    """Have the kernel ask this process to save and end when the sweep dies."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _folder_name(values):
    """Return the name of the folder of a run, which no file system refuses."""
    text = ','.join(f'{key}={value}' for key, value in values.items())
    return re.sub(r'[^A-Za-z0-9_=,.+-]', '_', text)[:200]


def _rungs(text):
    if text is None:
        return []
    try:
        rungs = [int(word) for word in text.split(',')]
    except ValueError:
        rungs = []
    if not rungs or rungs != sorted(set(rungs)) or rungs[0] < 1:
        raise UserError(f'--halve_at={text}: type rising iterations, such as --halve_at=100,200')
    return rungs


def _words(there):
    axes = there.get('axes')
    return ', '.join(axes) if isinstance(axes, dict) else 'other keys'


def _gpus() -> list[int]:
    """Return the numbers of the GPUs that may be used, [] without nvidia-smi."""
    if 'CUDA_VISIBLE_DEVICES' in os.environ:
        return named_gpus() or []
    if not shutil.which('nvidia-smi'):
        return []
    try:
        listed = subprocess.run(
            ['nvidia-smi', '--list-gpus'], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return list(range(len([line for line in listed.splitlines() if line.startswith('GPU ')])))
