"""What a run writes about itself.

    run_YYYYMMDD_HHMMSS.jsonl   the truth: one JSON object per line, the header first, appended
                                and flushed
    run_YYYYMMDD_HHMMSS.json    the same as one object, always valid: written aside and renamed,
                                each time that the .jsonl has doubled, and at the end (run_json.py)
    run_YYYYMMDD_HHMMSS.log     the console text

and, where asked for, Weights & Biases, trackio and TensorBoard. Nothing that is written is held in
memory: a record costs the same whether it is the tenth or the millionth. A resumed run cuts its
.jsonl behind the step it resumed from, so that curves never fork. A number that is not finite is
written as null: JSON has no NaN.
"""

import contextlib
import datetime
import errno
import html
import json
import os
import re
import threading
import time

from onetrain.config import UserError
from onetrain.files import check_own, no_link, redact
from onetrain.logs.run_json import (
    Summary,
    finite,
    parse_record,
    read_records,
    summarize,
    write_json,
)
from onetrain.logs.terminal import Terminal

FORMAT = 1


def now() -> str:
    """Return local time with its zone, ISO 8601."""
    return datetime.datetime.now().astimezone().isoformat(timespec='seconds')


def new_run_name(out_dir: str) -> str:
    """Return run_YYYYMMDD_HHMMSS of now, or of the second after the newest run in out_dir where
    this machine's clock is behind it.
    """
    moment = datetime.datetime.now()
    for name in os.listdir(out_dir) if os.path.isdir(out_dir) else ():
        if match := _RUN_FILE.fullmatch(name):
            with contextlib.suppress(ValueError, OverflowError):
                moment = max(
                    moment,
                    datetime.datetime.strptime(match[1], 'run_%Y%m%d_%H%M%S')
                    + datetime.timedelta(seconds=1),
                )
    return moment.strftime('run_%Y%m%d_%H%M%S')


def unsaved_run(out_dir: str, config: dict):
    """Name of the newest run in out_dir if it had this `config` and neither saved a checkpoint nor
    came to its end, else None: it can begin again under its name.
    """
    logs = sorted(name for name in os.listdir(out_dir) if _RUN_FILE.fullmatch(name))
    if not logs:
        return None
    records = read_records(os.path.join(out_dir, logs[-1]))
    header: dict = next(records, {})
    same = header.get('config') == json.loads(json.dumps(finite(config)))
    return (
        logs[-1].removesuffix('.jsonl')
        if same and not any(r['type'] in ('checkpoint', 'end') for r in records)
        else None
    )


_RUN_FILE = re.compile(r'(run_\d{8}_\d{6})\.jsonl', re.ASCII)


class RunLog:
    """Log of one run. Only the main rank has an `active` one; with write=False it only shows text
    on the terminal.

    terminal: terminal.Terminal, None: one of its own. header: {'config', 'startup_info',
    'metadata'}, plain builtins. resume_step: continue the files of `run_name` from there;
    evaluated: the evaluation at that step was finished, so its record stays.
    """

    def __init__(
        self,
        out_dir: str,
        run_name: str | None,
        header: dict,
        *,
        active: bool = True,
        write: bool = True,
        resume_step: int | None = None,
        evaluated: bool = False,
        save_json: bool = True,
        save_interval: int = 100,
        first: int = 0,
        terminal: Terminal | None = None,
    ):
        self.active, self.write = active, active and write
        self.save_json, self.save_interval = save_json, save_interval
        self.path = os.path.join(out_dir, run_name or '')
        self.run = {'run_name': run_name, 'start_time': now(), 'end_time': None, **header}
        self.wall_before, self.started, self.saved_at = 0.0, time.perf_counter(), first
        self.cost_before = 0.0  # dollars, at wall_before, with what is now made again
        self.checkpoints = set()  # iterations of those that are recorded since the one resumed from
        self.sinks, self.text, self.lines, self.lock = [], None, None, threading.Lock()
        self.terminal = terminal or Terminal(active)
        if not self.write:
            return
        try:
            os.makedirs(out_dir, exist_ok=True)
            for ending in ('log', 'jsonl', 'json'):
                check_own(f'{self.path}.{ending}')
            goes_on = resume_step is not None and self._cut_after(resume_step, evaluated)
            self.text = open(f'{self.path}.log', 'a', encoding='utf-8', errors='backslashreplace')
            self.lines = open(f'{self.path}.jsonl', 'ab', buffering=0)
            self.unwritten, self.disk_works = b'', True
        except OSError as error:
            raise UserError(
                f'the log {error.filename or self.path} cannot be written ({error.strerror}): make'
                ' room or move what is in the way, or give another --out_dir'
            ) from None
        self.size = os.path.getsize(f'{self.path}.jsonl')  # bytes that were appended, in all
        self.json_due = 2 * self.size
        if goes_on:
            self.event(
                'resume',
                iter=resume_step,
                timestamp=now(),
                config=header['config'],
                metadata=header['metadata'],
                mfu_constants=header.get('mfu_constants'),
            )
        else:
            beginning = {'type': 'header', 'format': FORMAT, 'run_name': run_name}
            self._append(finite({**beginning, 'start_time': self.run['start_time'], **header}))

    def _cut_after(self, step, evaluated):
        """Drop from the .jsonl what lies beyond `step`, and return whether any record stays.

        Takes time in proportion to what lies beyond the last iteration that stays, not to the whole
        file.
        """
        path = f'{self.path}.jsonl'
        if not os.path.exists(path):
            return False
        with open(path, 'rb+') as f:
            first = parse_record(f.readline())
            begin = _last_iteration(f, step)
            f.seek(begin)
            kept, damaged = [], []
            for line in f:
                record = parse_record(line)
                if record is None:  # the last line of a killed run may be cut
                    damaged.append(line)
                    continue
                if isinstance(cost := record.get('cost'), (int, float)):
                    self.cost_before = max(self.cost_before, cost)
                # a save comes before the evaluation at its step, which may have been cut short and
                # will then be made again
                again = record['type'] == 'eval' and record['iter'] == step and not evaluated
                if record['type'] == 'end' or record.get('iter', 0) > step or again:
                    continue
                kept.append(line.rstrip(b'\n') + b'\n')
                self.wall_before = record.get('wall_s', self.wall_before)
                if record['type'] == 'checkpoint':
                    self.checkpoints.add(record['iter'])
            if damaged:
                with open(f'{path}.damaged', 'ab', opener=no_link) as aside:
                    aside.writelines(damaged)
            # never longer than before: a kill in between leaves a line that was cut
            f.seek(begin)
            f.write(b''.join(kept))
            f.truncate()
            f.flush()
            os.fsync(f.fileno())
        if first and first['type'] == 'header':
            self.run['start_time'] = first['start_time']
        return bool(begin or kept)

    def wall_s(self) -> float:
        """Return seconds that this run has been going, over all its resumptions."""
        return self.wall_before + time.perf_counter() - self.started

    def say(self, text: str = '', verbatim: bool = False) -> None:
        """Show `text` on the terminal and keep it in the .log file, without the secrets of URLs in
        it unless it is `verbatim`.
        """
        if not self.active:
            return
        text = text if verbatim else redact(text)
        self.terminal.say(text)
        if self.write:
            with contextlib.suppress(OSError):  # the terminal has it
                self.text.write(text + '\n')
                self.text.flush()

    def sample(self, step: int, text: str) -> None:
        """Show a text that the model wrote, and send it to the dashboards."""
        self.say(f'---- sample at iter {step}\n{text}\n----', verbatim=True)
        for sink in self.sinks:
            sink('sample', {'iter': step, 'text': text})

    def event(self, kind: str, **fields) -> None:
        """Append one record: 'iter' | 'eval' | 'checkpoint' | 'save_failed' | 'resume' | 'end'."""
        if not self.write:
            return
        record = finite({'type': kind, **fields})
        self._append(record)
        for sink in self.sinks:
            sink(kind, record)
        if kind == 'checkpoint':
            self.checkpoints.add(record['iter'])
        if (
            self.save_json
            and kind == 'iter'
            and record['iter'] - self.saved_at >= self.save_interval
            and self.size >= self.json_due
        ):
            self.saved_at = record['iter']
            self.write_json()

    def _append(self, record):
        line = json.dumps(record).encode() + b'\n'
        self.size += len(line)
        with self.lock:
            self.unwritten += line
            self._write()

    def _write(self):
        """Bring the records to the file; what a full disk refuses stays in memory and comes before
        the next record.
        """
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.lines.write(self.unwritten) :]
            self.disk_works = True
        except OSError as error:
            if self.disk_works:
                self.terminal.say(
                    f'THE LOG CANNOT BE WRITTEN ({error.strerror}): {self.path}.jsonl will be'
                    ' completed when it can'
                )
            self.disk_works = False

    def sync(self) -> None:
        """Bring the records to the disk, so that a checkpoint never outlives the lines before
        it.
        """
        if self.write:
            # the thread that saves calls this, while the main thread writes records
            with self.lock:
                self._write()
                unwritten = self.unwritten
            if unwritten:
                raise OSError(
                    errno.ENOSPC, 'the log before it cannot be written', f'{self.path}.jsonl'
                )
            os.fsync(self.lines.fileno())

    def has_checkpoint(self, step: int) -> bool:
        """Return whether the checkpoint of `step` is recorded: a kill can come between writing it
        and noting so.
        """
        return step in self.checkpoints

    def write_json(self) -> dict:
        """Write the .json, and return the summary of the run."""
        self.json_due = 2 * self.size
        # a full disk: the file stays as it was, the next one is complete again
        with contextlib.suppress(OSError):
            return write_json(f'{self.path}.jsonl', f'{self.path}.json', self.run)
        return self.summarize()

    def summarize(self) -> dict:
        """Return the summary of the run, that of no record where the .jsonl was taken away."""
        try:
            return summarize(f'{self.path}.jsonl')
        except OSError:
            return Summary().as_dict()

    def end(self) -> dict:
        """Write the summary, the last record, and return it; {} where nothing is written."""
        if not self.write:
            return {}
        if self.run['end_time'] is None:
            self.run['end_time'] = now()
            summary = self.write_json() if self.save_json else self.summarize()
            self.event('end', end_time=self.run['end_time'], summary=summary)
            self.summary = summary
        return self.summary

    def close(self) -> None:
        """Write the summary if that was not done, and close the files."""
        if not self.write:
            return
        self.end()
        for sink in self.sinks:
            sink('close', {})
        with contextlib.suppress(OSError):
            self.text.close()
        self.lines.close()

    def to_wandb(self, project: str, name: str) -> None:
        """Send records to Weights & Biases as well (the package `wandb`)."""
        import wandb

        run = wandb.init(
            project=project,
            name=name,
            id=self.run['run_name'],
            resume='allow',
            config=self.run['config'],
            dir=os.path.dirname(self.path),
        )

        def sink(kind, record):
            if kind == 'close':
                run.finish()
            elif kind in ('iter', 'eval'):
                run.log(scalars(kind, record), step=record['iter'])
            elif kind == 'sample':
                run.log(
                    {'sample': wandb.Html(f'<pre>{html.escape(record["text"])}</pre>')},
                    step=record['iter'],
                )

        self.sinks.append(sink)

    def to_trackio(self, project: str, name: str) -> None:
        """Keep records for trackio's dashboard on this machine as well (the package `trackio`,
        which needs no account).
        """
        import trackio

        run = trackio.init(
            project=project,
            name=f'{name}-{self.run["run_name"]}',
            resume='allow',
            config=finite(self.run['config']),
        )
        self.sinks.append(
            lambda kind, record: (
                run.finish()
                if kind == 'close'
                else (
                    run.log(scalars(kind, record), step=record['iter'])
                    if kind in ('iter', 'eval')
                    else None
                )
            )
        )

    def to_tensorboard(self) -> None:
        """Write records as TensorBoard events into out_dir/tensorboard/<run name> as well (the
        package `tensorboard`).
        """
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(
            os.path.join(os.path.dirname(self.path), 'tensorboard', self.run['run_name'])
        )

        def sink(kind, record):
            if kind == 'close':
                writer.close()
            elif kind in ('iter', 'eval'):
                for key, value in scalars(kind, record).items():
                    writer.add_scalar(key, value, record['iter'])
            elif kind == 'sample':
                # as Markdown writes code
                writer.add_text(
                    'sample', '    ' + record['text'].replace('\n', '\n    '), record['iter']
                )

        self.sinks.append(sink)


def _last_iteration(f, step):
    """Return the offset of the last line of the open .jsonl `f` that records an iteration up to
    `step`, 0 if none does.
    """
    end, rest = f.seek(0, os.SEEK_END), b''  # rest: the beginning of a line that ends behind `end`
    while end:
        begin = max(0, end - _BLOCK)
        f.seek(begin)
        lines = (f.read(end - begin) + rest).split(b'\n')
        end, rest = begin, lines[0] if begin else b''
        offset = begin + sum(len(line) + 1 for line in lines)
        for line in reversed(lines[1:] if begin else lines):
            offset -= len(line) + 1
            record = parse_record(line)
            if record and record['type'] == 'iter' and record['iter'] <= step:
                return offset
    return 0


_BLOCK = 2**16  # bytes that are read at a time, from the end


def scalars(kind: str, record: dict) -> dict[str, float]:
    """Return the numbers of a record as one flat dict with names such as train/loss, for
    dashboards.
    """
    flat = {}

    def walk(prefix, value):
        if isinstance(value, (dict, list)):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f'{prefix}/{key}', inner)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix] = value

    for key, value in record.items():
        if key not in ('type', 'timestamp', 'iter') and not (
            key == 'mfu' and not isinstance(value, dict)
        ):
            walk(f'{"train" if kind == "iter" else "eval"}/{key}', value)
    return flat
