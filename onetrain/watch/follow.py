"""Follow the log of a run while it grows, and tell how the run stands.

What was read is not read again: a look takes time in proportion to what is new. A log that was cut,
as a resumed run does, is read anew. At a URL the log is copied to a temporary folder, piece by
piece.
"""

import contextlib
import fcntl
import json
import os
import statistics
import struct
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onetrain.config import UserError, nearest_path
from onetrain.files import check_regular, is_whole, open_url, redact, sentence
from onetrain.logs.read_log import LogError, NothingLogged, load_run, number
from onetrain.logs.run_json import Thinned, parse_record
from onetrain.logs.telemetry import metrics_name

# the curves that are kept, and the column of read_log.py that each is
CURVES = {
    'loss': 'loss',
    'tokens_per_sec': 'tokens_per_sec',
    'grad_norm': 'gradients.global_norm',
    'lr': 'lr',
}
KEPT = Thinned.MOST  # points of a curve, at most
RECENT = 200  # logged iterations that are kept
LATELY = 20  # of these, over which medians of speed and waits are
STALE_INTERVALS = 5  # without a record, after which a run is stale
LEAST_STALE_S = 60.0  # as long as an evaluation may take
LARGEST = 1e9  # number of gpu_metrics.jsonl that is shown
MOST_GPUS = 4096
_TAIL_BYTES = 2**18  # of a file in which its last records are
_SEEN_BYTES = 64  # before what is new, by which a log that was cut is noticed


@dataclass
class Curve:
    """Points (iteration, value) of a curve, thinned where they are many."""

    points: Thinned = field(default_factory=Thinned)

    @property
    def iters(self) -> list[int]:
        """Return the iterations of the points."""
        return [step for step, _ in self.points.items]

    @property
    def values(self) -> list[float]:
        """Return the values of the points."""
        return [value for _, value in self.points.items]

    def add(self, step: int, value: Any) -> None:
        """Add a point; a value that is no finite number is left out."""
        value = number(value)
        if value == value:
            self.points.add((step, value))


@dataclass
class Standing:
    """How a run stands.

    state: 'waiting' for its first record | 'running' | 'stale' | 'gone' without an end | 'stopped'
    | 'finished'; why: a phrase on it; age_s: since the last record; numbers: what can be shown, in
    the units of its names, each there only if known; curves: those of CURVES, and val_loss; gpus,
    machine: the last lines of gpu_metrics.jsonl; log: path of the text that the run showed;
    warnings: (iteration, sentence), the last ones.
    """

    name: str
    state: str
    why: str
    age_s: float
    numbers: dict[str, float]
    curves: dict[str, Curve]
    gpus: list[dict]
    machine: dict
    config: dict
    architecture: str
    log: Path | None
    warnings: list[tuple[int, str]]


class Follower:
    """Reads the newest log in a folder or at a URL, or one file, again and again.

    Raises UserError where there is none.
    """

    def __init__(self, place: str):
        self.place, self.remote = place, None
        self.name = redact(place.rstrip('/'))
        if '://' in place:
            self.remote = _Copy(place)
        elif not os.path.exists(place):
            raise UserError(
                f'{place} does not exist{nearest_path(place)}: type the out_dir of a run'
            )
        elif not os.path.isdir(place) and not place.endswith('.jsonl'):
            raise UserError(f'{place} is no log: type the out_dir of a run or its run_*.jsonl')
        self.path: Path | None = None
        self._forget()

    def look(self) -> Standing:
        """Read what is new, and return how the run stands. Raises UserError for a log that cannot
        be read.
        """
        try:
            path = self._newest()
            if path is None or path != self.path or not self._goes_on(path):
                self._forget()
                self.path = path
            if path is not None:
                self._read(path)
            return self._standing()
        except FileNotFoundError:  # it was there a moment ago
            self._forget()
            self.path = None
            return self._standing()

    def _newest(self):
        if self.remote:
            folder = self.remote.update()
        elif self.place.endswith('.jsonl'):
            return Path(self.place) if os.path.exists(self.place) else None
        else:
            folder = self.place
        logs = sorted(Path(folder).glob('run_*.jsonl'))
        begun = [path for path in logs if path.lstat().st_size]
        return (begun or logs or [None])[-1]

    def _forget(self):
        self.offset, self.seen, self.rest = 0, b'', b''
        self.header: dict = {}
        self.end: dict | None = None
        self.curves = {name: Curve() for name in (*CURVES, 'val_loss')}
        self.best: tuple[float, int] | None = None
        self.evaluation: dict = {}
        self.checkpoint: dict = {}
        self.recent: deque[dict] = deque(maxlen=RECENT)
        self.warnings: deque[tuple[int, str]] = deque(maxlen=20)

    def _goes_on(self, path):
        """Return whether the file still begins with what was read."""
        if os.path.getsize(path) < self.offset:
            return False
        with open(path, 'rb') as f:
            f.seek(self.offset - len(self.seen))
            return f.read(len(self.seen)) == self.seen

    def _read(self, path):
        check_regular(str(path))
        if not self.offset and os.path.getsize(path) > 8 * _TAIL_BYTES:
            self._read_long(path)
        with open(path, 'rb') as f:
            f.seek(self.offset)
            data = self.rest + f.read()
            *lines, self.rest = data.split(b'\n')
            self.offset = f.tell()
            f.seek(max(0, self.offset - _SEEN_BYTES))
            self.seen = f.read(self.offset - f.tell())
        for line in lines:
            if record := parse_record(line):
                self._take(record)

    def _read_long(self, path):
        """Begin with the curves of a long log, thinned, and its last records."""
        try:
            run = load_run([path])
        except NothingLogged:
            return
        except LogError as error:
            raise UserError(str(error)) from None
        size = os.path.getsize(path)
        self.header = {'config': run.config, 'startup_info': run.startup_info}
        tail = max(0, size - _TAIL_BYTES)
        with open(path, 'rb') as f:
            f.seek(tail)
            tail += len(f.readline())  # the rest of a line
            first = next((r for line in f if (r := parse_record(line)) and 'iter' in r), None)
        until = first['iter'] if first else 0
        for name, key in CURVES.items():
            for step, value in zip(run.iters.tolist(), run.column(key).tolist()):
                if step < until:
                    self.curves[name].add(step, value)
        for step, value in zip(run.eval_iters.tolist(), run.eval_val_loss.tolist()):
            if step < until:
                self._evaluated(step, value)
        self.offset = tail

    def _take(self, record):
        kind = record['type']
        if kind == 'header':
            self.header = record
        elif kind == 'iter':
            self.end = None
            for name, key in CURVES.items():
                outer, _, inner = key.partition('.')
                value = record.get(outer)
                if inner:
                    value = value.get(inner) if isinstance(value, dict) else None
                self.curves[name].add(record['iter'], value)
            self.recent.append(record)
        elif kind == 'eval':
            self.evaluation = record
            self._evaluated(record['iter'], record.get('val_loss'))
        elif kind == 'checkpoint':
            self.checkpoint = record
        elif kind == 'warning' and isinstance(record.get('text'), str):
            self.warnings.append((record.get('iter', 0), record['text']))
        elif kind == 'resume':
            self.end = None
            if isinstance(record.get('config'), dict):
                self.header = {**self.header, 'config': record['config']}
        elif kind == 'end':
            self.end = record

    def _evaluated(self, step, value):
        self.curves['val_loss'].add(step, value)
        value = number(value)
        if value == value and (self.best is None or value < self.best[0]):
            self.best = value, step

    def _standing(self):
        folder = str(self.path.parent) if self.path else self.place
        gpus, machine = ([], {}) if self.remote else last_telemetry(folder)
        age = time.time() - os.path.getmtime(self.path) if self.path else 0.0
        state, why = self._state(age, folder)
        model = self.header.get('startup_info')
        model = model.get('model') if isinstance(model, dict) else None
        architecture = model.get('architecture') if isinstance(model, dict) else None
        config = self.header.get('config')
        return Standing(
            self.name,
            state,
            why,
            age,
            self._numbers(),
            self.curves,
            gpus,
            machine,
            config if isinstance(config, dict) else {},
            architecture if isinstance(architecture, str) else '',
            None if self.remote or not self.path else self.path.with_suffix('.log'),
            list(self.warnings),
        )

    def _state(self, age, folder):
        if self.path is None:
            return 'waiting', 'no log yet'
        last = self.recent[-1]['iter'] if self.recent else 0
        if self.end is not None:
            done = last >= self._max_iters() > 0
            return ('finished', '') if done else ('stopped', f'at iteration {last:,}')
        holder = None if self.remote else lock_holder(folder)
        if not self.remote and holder is None:
            saved = self.checkpoint.get('iter')
            goes_on = 'nothing was saved' if saved is None else f'saved at {saved:,}'
            return 'gone', f'its process ended after iteration {last:,}, {goes_on}'
        interval = self._interval()
        if age > max(LEAST_STALE_S, STALE_INTERVALS * interval):
            return 'stale', 'nothing was logged for some time'
        return ('running', '') if self.recent else ('running', 'before its first iteration')

    def _max_iters(self):
        config = self.header.get('config')
        most = number(config.get('max_iters')) if isinstance(config, dict) else 0.0
        return int(most) if most == most else 0

    def _interval(self):
        """Return the seconds between records, 0 where that is not known."""
        walls = [number(record.get('wall_s')) for record in self.recent]
        gaps = [b - a for a, b in zip(walls, walls[1:]) if b > a]
        return statistics.median(gaps) if gaps else 0.0

    def _numbers(self):
        """Return {name: value} of what is known."""
        found: dict[str, Any] = {'max_iters': self._max_iters() or None}
        if self.recent:
            last = self.recent[-1]
            time_ms = self._median('time_ms', LATELY)
            found |= {key: last.get(key) for key in ('iter', 'lr', 'left_s', 'cost', 'cost_total')}
            found |= {
                'loss': self._median('loss', 10),
                'tokens_seen': last.get('tokens_seen'),
                'wall_s': last.get('wall_s'),
                'tokens_per_sec': self._median('tokens_per_sec', LATELY),
                'time_ms': time_ms,
                'mfu_percent': self._median('mfu_percent', LATELY, of='mfu'),
                'memory_gb': self._median('max_allocated_gb', 1, of='memory'),
                'grad_norm': self._median('global_norm', 10, of='gradients'),
                'data_wait_percent': _share(self._median('data_wait_ms', LATELY), time_ms),
                'comm_wait_percent': _share(self._median('comm_wait_ms', LATELY), time_ms),
                'expert_load': self._median('load_score', 10, of='moe'),
                'skipped': self._median('bad', 1, of='skipped'),
            }
        found |= {
            'val_loss': self.evaluation.get('val_loss'),
            'bits_per_byte': self.evaluation.get('bits_per_byte'),
            'val_iter': self.evaluation.get('iter'),
            'checkpoint_iter': self.checkpoint.get('iter'),
            'checkpoint_stall_ms': self.checkpoint.get('stall_ms'),
            'best_val_loss': self.best and self.best[0],
            'best_val_iter': self.best and self.best[1],
        }
        known = {key: number(value) for key, value in found.items()}
        return {key: value for key, value in known.items() if value == value}

    def _median(self, key, over, of=None):
        """Return the median of a number over the last records that have it, None where none has."""
        records = list(self.recent)[-over:]
        if of:
            records = [inner for r in records if isinstance(inner := r.get(of), dict)]
        values = [value for r in records if (value := number(r.get(key))) == value]
        return statistics.median(values) if values else None


def _share(part, whole):
    return None if part is None or not whole else 100 * part / whole


def lock_holder(folder: str) -> int | None:
    """Return the process that holds the folder of a run, None where none does, 0 where that cannot
    be told. The lock is only asked about, never taken.
    """
    # struct flock of 64-bit Linux: type, whence, start, length, process
    form, path = 'hhqqi4x', os.path.join(folder, '.lock')
    if not os.path.isfile(path):
        return None
    try:
        with open(path, 'rb') as f:
            asked = struct.pack(form, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_, process = struct.unpack(form, fcntl.fcntl(f, fcntl.F_GETLK, asked))
    except OSError:  # a file system without locks
        return 0
    return None if kind == fcntl.F_UNLCK else process


def last_telemetry(folder: str) -> tuple[list[dict], dict]:
    """Return (last line of each GPU, that of the machine) of gpu_metrics.jsonl; ([], {}) where
    there is none.
    """
    gpus: dict[int, dict] = {}
    machine: dict = {}
    path = os.path.join(folder, metrics_name())
    if not os.path.isfile(path):  # there is none, or a pipe that would never answer
        return [], {}
    with contextlib.suppress(OSError), open(path, 'rb') as f:
        f.seek(max(0, os.path.getsize(path) - _TAIL_BYTES))
        for line in f:
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if not isinstance(record, dict):
                    continue
                sound = {key: value for key, value in record.items() if _is_sound(value)}
                if is_whole(sound.get('gpu'), 0, MOST_GPUS):
                    reasons = record.get('throttle')
                    sound['throttle'] = reasons if isinstance(reasons, list) else None
                    gpus[sound['gpu']] = sound
                elif 'machine' in record:
                    machine = sound
    return [gpus[number] for number in sorted(gpus)], machine


def _is_sound(value):
    """Return whether a value of gpu_metrics.jsonl is a number that a machine may have."""
    number_of = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number_of and abs(value) < LARGEST


class _Copy:
    """The newest log at a URL, copied to a temporary folder as it grows."""

    def __init__(self, url):
        self.url = url
        self.fs, self.root = open_url(url)
        self.folder = tempfile.TemporaryDirectory()

    def update(self) -> str:
        """Fetch what is new; returns the folder. Raises UserError."""
        try:
            # their listings are kept, and would not show what is new
            self.fs.invalidate_cache()
            found = self.fs.glob(f'{self.root}/run_*.jsonl')
            found = found or self.fs.glob(f'{self.root}/**/run_*.jsonl')
            if not found:
                raise UserError(
                    f'{redact(self.url)} holds no run_*.jsonl: type where a run is copied'
                )
            newest = max(found, key=os.path.basename)
            path = os.path.join(self.folder.name, os.path.basename(newest))
            size = self.fs.size(newest)
            here = os.path.getsize(path) if os.path.exists(path) else 0
            if size < here:
                os.remove(path)
                here = 0
            if size > here:
                with open(path, 'ab') as f:
                    f.write(self.fs.cat_file(newest, start=here, end=size))
        except UserError:
            raise
        except Exception as error:  # whatever a file system may raise
            raise UserError(f'{redact(self.url)} cannot be read: {sentence(error)}') from None
        return self.folder.name
