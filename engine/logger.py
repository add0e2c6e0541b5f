"""What a run writes about itself.

    out_dir/run_YYYYMMDD_HHMMSS.jsonl   the truth: one JSON object per line, the header first, appended and flushed
    out_dir/run_YYYYMMDD_HHMMSS.json    the same as one object, always valid: written aside and renamed
    out_dir/run_YYYYMMDD_HHMMSS.log     the console text

and, where asked for, Weights & Biases and TensorBoard. A resumed run continues its files after dropping what lies beyond
the step it resumed from, so that curves never fork. A number that is not finite is written as null: JSON has no NaN.
"""
import contextlib
import datetime
import errno
import json
import math
import os
import re
import threading
import time

from tqdm import tqdm

from engine.configurator import ConfigError
from engine.files import is_whole, parse_json, redact

FORMAT = 1
_SECTIONS = {'iter': 'training_iterations', 'eval': 'eval_steps', 'checkpoint': 'checkpoints'}


def now():
    """Local time with its zone, ISO 8601."""
    return datetime.datetime.now().astimezone().isoformat(timespec='seconds')


def new_run_name(out_dir):
    """Return run_YYYYMMDD_HHMMSS of now, or of the second after the newest run in out_dir where this machine's clock is behind it."""
    moment = datetime.datetime.now()
    for name in os.listdir(out_dir) if os.path.isdir(out_dir) else ():
        if match := _RUN_FILE.fullmatch(name):
            with contextlib.suppress(ValueError, OverflowError):
                moment = max(moment, datetime.datetime.strptime(match[1], 'run_%Y%m%d_%H%M%S') + datetime.timedelta(seconds=1))
    return moment.strftime('run_%Y%m%d_%H%M%S')


def unsaved_run(out_dir, config):
    """Name of the newest run in out_dir if it had this `config` and neither saved a checkpoint nor came to its end, else None: it can begin again under its name."""
    logs = sorted(name for name in os.listdir(out_dir) if _RUN_FILE.fullmatch(name))
    if not logs:
        return None
    records = read_records(os.path.join(out_dir, logs[-1]))
    same = bool(records) and records[0].get('config') == json.loads(json.dumps(finite(config)))
    return logs[-1].removesuffix('.jsonl') if same and not any(r['type'] in ('checkpoint', 'end') for r in records) else None


def read_records(path):
    """The whole records of a JSONL; lines that were cut or damaged are left out."""
    with open(path, encoding='utf-8', errors='replace') as f:
        return [record for record in map(_record, f) if record]


_RUN_FILE = re.compile(r'(run_\d{8}_\d{6})\.jsonl', re.ASCII)
_NUMBER, _MAYBE = (int, float), (int, float, type(None))
# what the other records need of each, beside 'type'
_NEEDED = {'iter': {'iter': int, 'loss': _MAYBE, 'time_ms': _NUMBER, 'tokens_per_sec': _MAYBE, 'mfu': (int, float, dict, type(None)), 'memory': dict},
           'eval': {'iter': int, 'val_loss': _MAYBE}, 'checkpoint': {'iter': int, 'val_loss': _MAYBE}, 'header': {'start_time': str}}


def _record(line):
    """The record in a line of the JSONL, or None for a line that was cut or damaged."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get('type'), str) or not is_whole(record.get('iter', 0)):
        return None
    def fits(value, kinds):
        return isinstance(value, kinds) and not isinstance(value, bool) and not (isinstance(value, int) and abs(value) >= 2**63)
    whole = all(fits(record.get(key, ...), kinds) for key, kinds in _NEEDED.get(record['type'], {}).items())
    return record if whole and fits(record.get('wall_s', 0.0), _NUMBER) else None


class RunLog:
    """Log of one run. Only the main rank has an `active` one; with write=False it only shows text on the terminal.

    header: {'config', 'startup_info', 'metadata'}, plain builtins. resume_step: continue the files of `run_name` from there;
    evaluated: the evaluation at that step was finished, so its record stays.
    """

    def __init__(self, out_dir, run_name, header, *, active=True, write=True, resume_step=None, evaluated=False, save_json=True, save_interval=100, total=None, first=0):
        self.active, self.write = active, active and write
        self.save_json, self.save_interval = save_json, save_interval
        self.path = os.path.join(out_dir, run_name or '')
        self.run = {'run_name': run_name, 'start_time': now(), 'end_time': None, **header,
                    **{section: [] for section in _SECTIONS.values()}}
        self.wall_before, self.started, self.last_saved = 0.0, time.perf_counter(), first
        self.sinks, self.bar, self.text, self.lines, self.lock = [], None, None, None, threading.Lock()
        if not self.write:
            return
        try:
            os.makedirs(out_dir, exist_ok=True)
            kept = self._keep_until(resume_step, evaluated) if resume_step is not None else []
            self.text = open(f'{self.path}.log', 'a', encoding='utf-8', errors='backslashreplace')
            self.lines, self.unwritten, self.disk_works = open(f'{self.path}.jsonl', 'ab', buffering=0), b'', True
        except OSError as error:
            raise ConfigError(f'the log {error.filename or self.path} cannot be written ({error.strerror}): make room or move what is in '
                              f'the way, or give another --out_dir') from None
        if kept:
            self.event('resume', iter=resume_step, timestamp=now(), config=header['config'], metadata=header['metadata'])
        else:
            self._append({'type': 'header', 'format': FORMAT, 'run_name': run_name, 'start_time': self.run['start_time'], **header})
        self.bar = tqdm(total=total, initial=first, unit='it', disable=None, dynamic_ncols=True, leave=False)

    def _keep_until(self, step, evaluated):
        """Rewrite the JSONL without what lies beyond `step`; the records that stay."""
        kept, damaged = [], []
        if not os.path.exists(f'{self.path}.jsonl'):
            return kept
        with open(f'{self.path}.jsonl', encoding='utf-8', errors='replace') as f:
            for line in f:
                record = _record(line)
                if record is None:  # the last line of a killed run may be cut
                    damaged.append(line)
                    continue
                # a save comes before the evaluation at its step, which may have been cut short and will then be made again
                again = record['type'] == 'eval' and record['iter'] == step and not evaluated
                beyond = record['type'] == 'end' or record.get('iter', 0) > step or again
                if not beyond:
                    kept.append(record)
        if damaged:
            with open(f'{self.path}.jsonl.damaged', 'a', encoding='utf-8') as f:
                f.writelines(damaged)
        with open(f'{self.path}.jsonl.tmp', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(record) + '\n' for record in kept)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f'{self.path}.jsonl.tmp', f'{self.path}.jsonl')
        for record in kept:
            self._remember(record)
            self.wall_before = record.get('wall_s', self.wall_before)
            if record['type'] == 'header':
                self.run['start_time'] = record['start_time']
        return kept

    def wall_s(self):
        """Seconds that this run has been going, over all its resumptions."""
        return self.wall_before + time.perf_counter() - self.started

    def say(self, text='', verbatim=False):
        """Show `text` on the terminal and keep it in the .log file, without the secrets of URLs in it unless it is `verbatim`."""
        if not self.active:
            return
        text = text if verbatim else redact(text)
        tqdm.write(text)
        if self.write:
            with contextlib.suppress(OSError):  # the terminal has it
                self.text.write(text + '\n')
                self.text.flush()

    def event(self, kind, **fields):
        """Append one record: 'iter' | 'eval' | 'checkpoint' | 'save_failed' | 'resume' | 'end'."""
        if not self.write:
            return
        record = finite({'type': kind, **fields})
        self._append(record)
        self._remember(record)
        for sink in self.sinks:
            sink(kind, record)
        if self.save_json and kind != 'resume' and (kind != 'iter' or record['iter'] - self.last_saved >= self.save_interval):
            self.last_saved = record.get('iter', self.last_saved)
            self.write_json()

    def _append(self, record):
        line = json.dumps(finite(record)).encode() + b'\n'
        with self.lock:
            self.unwritten += line
            self._write()

    def _write(self):
        """Bring the records to the file; what a full disk refuses stays in memory and comes before the next record."""
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.lines.write(self.unwritten):]
            self.disk_works = True
        except OSError as error:
            if self.disk_works:
                tqdm.write(f'THE LOG CANNOT BE WRITTEN ({error.strerror}): {self.path}.jsonl will be completed when it can')
            self.disk_works = False

    def _remember(self, record):
        if record['type'] in _SECTIONS:
            self.run[_SECTIONS[record['type']]].append({key: value for key, value in record.items() if key != 'type'})
        if record['type'] in ('eval', 'checkpoint'):  # a save is often finished after the evaluation at its step
            losses = {e['iter']: e['val_loss'] for e in self.run['eval_steps']}
            for saved in self.run['checkpoints'][-3:]:
                saved['val_loss'] = losses.get(saved['iter'], saved['val_loss'])

    def progress(self, step):
        """Move the progress bar, which stays out of the files."""
        if self.bar is not None and not self.bar.disable:
            self.bar.update(step - self.bar.n)

    def sync(self):
        """Bring the records to the disk, so that a checkpoint never outlives the lines before it."""
        if self.write:
            with self.lock:  # the thread that saves calls this, while the main thread writes records
                self._write()
                unwritten = self.unwritten
            if unwritten:
                raise OSError(errno.ENOSPC, 'the log before it cannot be written', f'{self.path}.jsonl')
            os.fsync(self.lines.fileno())

    def has_checkpoint(self, step):
        """Whether the checkpoint of `step` is recorded: a kill can come between writing it and noting so."""
        return any(record['iter'] == step for record in self.run['checkpoints'])

    def summary(self):
        iterations, evaluations = self.run['training_iterations'], self.run['eval_steps']
        known = [r['mfu']['mfu'] for r in iterations if isinstance(r['mfu'], dict) and isinstance(r['mfu'].get('mfu'), (int, float))]
        times = [r['time_ms'] for r in iterations[1:]] or [r['time_ms'] for r in iterations]  # the first includes warm-up
        best = [r['val_loss'] for r in evaluations if r['val_loss'] is not None]
        return {'total_iterations': iterations[-1]['iter'] if iterations else 0, 'final_iter': iterations[-1]['iter'] if iterations else 0,
                'final_train_loss': iterations[-1]['loss'] if iterations else None, 'best_val_loss': min(best, default=None),
                'avg_time_ms': sum(times) / len(times) if times else None, 'avg_mfu': sum(known) / len(known) if known else None,
                'total_eval_steps': len(evaluations), 'total_checkpoints': len(self.run['checkpoints'])}

    def write_json(self):
        progress = []
        for r in self.run['training_iterations']:
            entry = {'iter': r['iter'], 'loss': r['loss'], 'mfu': r['mfu'].get('mfu') if isinstance(r['mfu'], dict) else None,
                     'tokens_per_sec': r['tokens_per_sec'], 'memory_allocated_gb': r['memory'].get('allocated_gb'), 'dt_ms': r['time_ms']}
            progress.append({key: value for key, value in finite(entry).items() if value is not None})  # readers compute with what is there
        text = json.dumps(finite({**self.run, 'training_progress': progress, 'summary': self.summary()}))
        with contextlib.suppress(OSError):  # a full disk: the file stays as it was, the next one is complete again
            with open(f'{self.path}.json.tmp', 'w', encoding='utf-8') as f:
                f.write(text)
            os.replace(f'{self.path}.json.tmp', f'{self.path}.json')

    def end(self):
        """Write the summary, the last record."""
        if self.write and self.run['end_time'] is None:
            self.run['end_time'] = now()
            self.bar.close()
            self.event('end', end_time=self.run['end_time'], summary=self.summary())

    def close(self):
        """Write the summary if that was not done, and close the files."""
        if not self.write:
            return
        self.end()
        for sink in self.sinks:
            sink('close', {})
        with contextlib.suppress(OSError):
            self.text.close()
        self.lines.close()

    def to_wandb(self, project, name):
        """Send records to Weights & Biases as well (the package `wandb`)."""
        import wandb
        run = wandb.init(project=project, name=name, id=self.run['run_name'], resume='allow', config=self.run['config'],
                         dir=os.path.dirname(self.path))
        self.sinks.append(lambda kind, record: run.finish() if kind == 'close' else run.log(scalars(kind, record), step=record['iter'])
                          if kind in ('iter', 'eval') else None)

    def to_tensorboard(self):
        """Write records as TensorBoard events into out_dir/tensorboard/<run name> as well (the package `tensorboard`)."""
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(os.path.join(os.path.dirname(self.path), 'tensorboard', self.run['run_name']))

        def sink(kind, record):
            if kind == 'close':
                writer.close()
            elif kind in ('iter', 'eval'):
                for key, value in scalars(kind, record).items():
                    writer.add_scalar(key, value, record['iter'])
        self.sinks.append(sink)


def scalars(kind, record):
    """The numbers of a record as one flat dict with names such as train/loss, for dashboards."""
    flat = {}

    def walk(prefix, value):
        if isinstance(value, (dict, list)):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f'{prefix}/{key}', inner)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix] = value
    for key, value in record.items():
        if key not in ('type', 'timestamp') and not (key == 'mfu' and not isinstance(value, dict)):
            walk(f"{'train' if kind == 'iter' else 'eval'}/{key}", value)
    return flat


def finite(value):
    """`value` with every float that is not finite replaced by None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
