"""Compose the .json of a run and its summary from the .jsonl, in one pass and constant memory.

    {run_name, start_time, end_time, config, startup_info, metadata,
     training_iterations: [...], eval_steps: [...], checkpoints: [...],
     training_progress: [...], summary: {...}}

The iterations are copied as they are read; only evaluations and checkpoints, which are few, are
held.
"""

import json
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from onetrain.files import check_regular, is_whole, parse_json, replacing

_NUMBER, _MAYBE = (int, float), (int, float, type(None))
# what the readers of a record need of it, beside its 'type'
_NEEDED: dict[str, dict] = {
    'header': {'start_time': str},
    'iter': {
        'iter': int,
        'loss': _MAYBE,
        'time_ms': _NUMBER,
        'tokens_per_sec': _MAYBE,
        'mfu': (int, float, dict, type(None)),
        'memory': dict,
    },
    'eval': {'iter': int, 'val_loss': _MAYBE},
    'checkpoint': {'iter': int, 'val_loss': _MAYBE},
}


def parse_record(line: bytes | str) -> dict | None:
    """Return the record in a line of a .jsonl (text or bytes), None for a line that was cut or
    damaged.
    """
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get('type'), str):
        return None
    if not is_whole(record.get('iter', 0)) or not _fits(record.get('wall_s', 0.0), _NUMBER):
        return None
    needed = _NEEDED.get(record['type'], {})
    whole = all(_fits(record.get(key, ...), kinds) for key, kinds in needed.items())
    return record if whole else None


def _fits(value, kinds):
    too_large = isinstance(value, int) and abs(value) >= 2**63
    return isinstance(value, kinds) and not isinstance(value, bool) and not too_large


def read_records(path: str) -> Iterator:
    """Yield the whole records of a .jsonl; lines that were cut or damaged are left out."""
    for _, record in _lines(path):
        yield record


def _lines(path):
    """Yield (line, record) for the whole records of a .jsonl."""
    check_regular(path)
    with open(path, encoding='utf-8', errors='replace') as f:
        for line in f:
            if record := parse_record(line):
                yield line, record


_TYPE = '{"type": "iter", '


def _without_type(line, record):
    """Return `record` as JSON, its own `line` where that will do: to write a record anew takes
    twice the time.
    """
    if line.startswith(_TYPE) and 'NaN' not in line and 'Infinity' not in line:
        return '{' + line[len(_TYPE) :].rstrip()
    return json.dumps(finite(record))


def finite(value: Any):
    """Return `value`, builtins, with every float that is not finite replaced by None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _with_mfu(text, mfu, constants):
    """Return the JSON of an iteration as readers of the .json know it: its `mfu` with the
    `constants` of the run, -100.0 while warming up.
    """
    if mfu is None:
        return text.replace('"mfu": null', '"mfu": -100.0', 1)
    return text.replace('"mfu": {', f'"mfu": {{{constants}', 1)


class Summary:
    """The `summary` of a run: add() takes its records in their order, as_dict() gives the
    result.
    """

    def __init__(self):
        self.iterations, self.evaluations, self.checkpoints = 0, 0, 0
        self.last, self.first_ms, self.total_ms = None, 0.0, 0.0
        self.mfu = 0.0
        self.mfu_known = 0
        self.best = math.inf
        self.best_iter = None
        self.final = None
        self.rates, self.mfus, self.peak_gb = Thinned(), Thinned(), None

    def add(self, record: dict) -> None:
        """Take up a record of the log."""
        kind = record['type']
        if kind == 'iter':
            if not self.iterations:
                self.first_ms = record['time_ms']
            self.iterations += 1
            self.total_ms += record['time_ms']
            self.last = record
            if (mfu := _mfu(record)) is not None:
                self.mfu, self.mfu_known = self.mfu + mfu, self.mfu_known + 1
                self.mfus.add(mfu)
            if self.iterations > 1 and record['tokens_per_sec'] is not None:
                self.rates.add(record['tokens_per_sec'])
            peak = record['memory'].get('max_allocated_gb')
            if isinstance(peak, _NUMBER):
                self.peak_gb = max(peak, self.peak_gb or 0.0)
        elif kind == 'eval':
            self.evaluations += 1
            self.final = record
            if record['val_loss'] is not None and record['val_loss'] < self.best:
                self.best, self.best_iter = record['val_loss'], record['iter']
        elif kind == 'checkpoint':
            self.checkpoints += 1

    def as_dict(self) -> dict:
        """Return the summary of what was taken up."""
        step = self.last['iter'] if self.last else 0
        # the first iteration, which includes the warm-up, counts only if there is no other
        timed, total = max(1, self.iterations - 1), self.total_ms
        total -= self.first_ms if self.iterations > 1 else 0.0
        return {
            'total_iterations': step,
            'final_iter': step,
            'final_train_loss': self.last['loss'] if self.last else None,
            'best_val_loss': self.best if self.evaluations and self.best < math.inf else None,
            'avg_time_ms': total / timed if self.iterations else None,
            'avg_mfu': self.mfu / self.mfu_known if self.mfu_known else None,
            'total_eval_steps': self.evaluations,
            'total_checkpoints': self.checkpoints,
            'best_val_iter': self.best_iter,
            'final_val_loss': (
                self.final['val_loss'] if self.final and self.final['iter'] == step else None
            ),
            'final_bits_per_byte': (
                self.final.get('bits_per_byte')
                if self.final and self.final['iter'] == step
                else None
            ),
            'median_tokens_per_sec': self.rates.median(),
            'median_mfu': self.mfus.median(),
            'tokens_seen': self.last.get('tokens_seen') if self.last else None,
            'wall_s': self.last.get('wall_s') if self.last else None,
            'peak_memory_gb': self.peak_gb,
        }


@dataclass
class Thinned:
    """Numbers, or points of a curve, of which, once they are MOST, every other stays, and of those
    to come as many: enough for a median or a picture, in constant memory.
    """

    MOST = 4096

    items: list = field(default_factory=list)
    every: int = 1
    seen: int = 0

    def add(self, item: Any) -> None:
        """Take up the next one."""
        if self.seen % self.every == 0:
            self.items.append(item)
        self.seen += 1
        if len(self.items) == self.MOST:
            self.items, self.every = self.items[::2], 2 * self.every

    def median(self):
        """Return the median, None of no numbers."""
        return statistics.median(self.items) if self.items else None


def _mfu(record):
    mfu = record['mfu'].get('mfu') if isinstance(record['mfu'], dict) else None
    return mfu if isinstance(mfu, _NUMBER) else None


def _progress(record):
    """Return the entry of `training_progress` for an iteration, without the keys that have no
    value.
    """
    entry = {
        'iter': record['iter'],
        'loss': record['loss'],
        'mfu': _mfu(record),
        'tokens_per_sec': record['tokens_per_sec'],
        'memory_allocated_gb': record['memory'].get('allocated_gb'),
        'dt_ms': record['time_ms'],
    }
    return {key: value for key, value in entry.items() if value is not None}


def summarize(path: str) -> dict:
    """Return the `summary` of the .jsonl at `path`."""
    summary = Summary()
    for record in read_records(path):
        summary.add(record)
    return summary.as_dict()


def write_json(path: str, target: str, top: dict) -> dict:
    """Write the run in the .jsonl at `path` as one JSON object to `target`, which is replaced;
    return its `summary`.

    top: {key: value} that comes first in the object. Raises OSError, and then `target` is as it
    was.
    """
    summary, losses, evaluations, checkpoints = Summary(), {}, [], []
    folder = os.path.dirname(os.path.abspath(target))
    with (
        replacing(target, 'w') as f,
        tempfile.TemporaryFile('w+', encoding='utf-8', dir=folder) as progress,
    ):
        f.write(json.dumps(finite(top))[:-1] + (', ' if top else '') + '"training_iterations": [')
        comma = constants = ''
        for line, record in _lines(path):
            summary.add(record)
            kind = record.pop('type')
            # of the header, and of each resume
            if isinstance(stated := record.get('mfu_constants'), dict):
                constants = json.dumps(finite(stated))[1:-1] + ', '
            if kind == 'iter':
                f.write(comma + _with_mfu(_without_type(line, record), record['mfu'], constants))
                progress.write(comma + json.dumps(finite(_progress(record))))
                comma = ', '
            elif kind == 'eval':
                losses[record['iter']] = record['val_loss']
                evaluations.append(record)
            elif kind == 'checkpoint':
                checkpoints.append(record)
        for record in checkpoints:  # saved before its evaluation, which knows the loss
            record['val_loss'] = losses.get(record['iter'], record['val_loss'])
        f.write(
            f'], "eval_steps": {json.dumps(finite(evaluations))}, "checkpoints":'
            f' {json.dumps(finite(checkpoints))}'
        )
        f.write(', "training_progress": [')
        progress.seek(0)
        shutil.copyfileobj(progress, f)
        f.write(f'], "summary": {json.dumps(finite(summary.as_dict()))}}}')
    return summary.as_dict()
