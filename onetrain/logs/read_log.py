"""Read the log of a run, for the plotting commands: a .jsonl, a .json, several of them, or the
out_dir that holds them.

The .jsonl is the truth and is preferred where both lie in a folder; the .json may lag behind it.
Several logs of one out_dir are one run that was stopped and resumed: they are joined so that curves
never fork. Logs of the older system (JSON only, `mfu` a number, no lr, tokens or wall time) are
read too; what they lack is computed from time_ms and the batch in their config, or stays nan.

Of a log of more than 2 * KEPT iterations every so-and-so-many-th is kept, and of those between, the
lowest and the highest value of each of EXTREMES: a million iterations take no more memory than ten
thousand, and no spike is lost.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onetrain.config import UserError, nearest_path
from onetrain.files import check_regular, is_whole, parse_json

# what tells models apart
MODEL = (
    'arch_preset',
    'n_layer',
    'n_head',
    'n_embd',
    'd_ff',
    'vocab_size',
    'block_size',
    'dataset',
)
LARGEST = 1e200  # a number beyond it cannot be drawn
SECTIONS = {
    'iter': 'training_iterations',
    'eval': 'eval_steps',
    'checkpoint': 'checkpoints',
    'resume': 'resumes',
}
KEPT = 10_000  # iterations of a longer log, or up to twice as many
EXTREMES = ('loss', 'gradients.global_norm', 'tokens_per_sec')


class LogError(UserError):
    """What the user named is not a readable log; the message is one sentence for them."""


class NothingLogged(LogError):
    """Logs that are whole, and of a run that made no iteration."""


@dataclass
class Run:
    """One run, joined over its resumes. Every array has one entry per record, nan where a record
    lacks the value.

    columns holds every number of the iteration records by its dotted name ('loss',
    'memory.allocated_gb', 'gradients.global_norm', ...), and always: tokens_seen, wall_s (seconds),
    tokens_per_sec, mfu_percent.
    """

    path: Path  # the newest log file
    name: str  # its run_name
    label: str  # name of its folder
    config: dict
    startup_info: dict
    metadata: dict
    iters: np.ndarray
    columns: dict
    eval_iters: np.ndarray
    eval_val_loss: np.ndarray
    eval_tasks: dict  # {name of a multiple-choice task: acc_norm at each of eval_iters}
    checkpoints: np.ndarray  # iterations
    resumes: np.ndarray  # iterations after which a resumed process went on
    mfu_unknown: bool  # MFU was logged as null: the device's peak is not known
    # (layers, experts), share of the tokens that each got when that was last logged
    expert_shares: np.ndarray
    shares_at: int  # the iteration of that
    # {name of EXTREMES: (iters, values)} of iterations that were left out of `iters`
    extremes: dict
    notes: list = field(default_factory=list)

    def column(self, name: str) -> np.ndarray:
        """Return the values named `name`, one per entry of iters; all nan if the run did not log
        them.
        """
        return self.columns.get(name, np.full(len(self.iters), np.nan))

    def raw(self, name: str) -> tuple:
        """Return (iterations, values) of a column with the lowest and highest values between its
        entries.
        """
        iters, values = self.extremes.get(name, (self.iters[:0], self.iters[:0]))
        iters = np.concatenate([self.iters, iters])
        values = np.concatenate([self.column(name), values])
        order = np.argsort(iters, kind='stable')
        return iters[order], values[order]

    def has(self, *names) -> bool:
        """Return whether any of these columns holds a finite number other than 0, which is the GPU
        memory of a run on CPU.
        """
        return any(
            (np.isfinite(values) & (values != 0)).any() for values in map(self.column, names)
        )

    def each(self, pattern: str) -> list[np.ndarray]:
        """Return the columns whose whole name the regular expression `pattern` matches, in the
        order of the numbers in their names.
        """
        names = [name for name in self.columns if re.fullmatch(pattern, name)]
        return [
            self.columns[name]
            for name in sorted(
                names, key=lambda name: [int(digits) for digits in re.findall(r'\d+', name)]
            )
        ]

    def last(self, name: str) -> float:
        """Return the last finite value of a column, nan if there is none."""
        values = self.column(name)
        values = values[np.isfinite(values)]
        return values[-1] if len(values) else np.nan


def load_run(paths: list) -> 'Run':
    """Read the logs at `paths` (files or folders) into a Run, the newest where they are of several
    models. Raises LogError.
    """
    *others, run = load_runs(paths)
    run.notes += [
        f'{other.name} is of another model and left out; give its file to draw it'
        for other in others
    ]
    return run


def load_runs(paths: list) -> list:
    """Read the logs at `paths` (files or folders) into Runs, one for each model in each folder, the
    newest last. Raises LogError.
    """
    files = find_logs(paths)
    logs = sorted((read_log(path) for path in files), key=start_order)
    if not any(log['training_iterations'] for log in logs):
        raise NothingLogged(f'no iterations logged in {", ".join(str(path) for path in files)}')
    used = [log for log in logs if log['training_iterations'] or log['eval_steps']]
    notes = [
        f'{log["path"].name} holds no iterations; left out'
        for log in logs
        if not (log['training_iterations'] or log['eval_steps'])
    ]
    groups = []
    for log in used:
        group = next((group for group in groups if same_model(group[-1], log)), None)
        if group is None:
            groups.append(group := [])
        group.append(log)
    runs = []
    for first, *later in sorted(groups, key=lambda group: start_order(group[-1])):
        joined, damage = first, list(first['damage'])
        for log in later:
            joined, note = join(joined, log)
            damage += log['damage'] + note
        if joined['training_iterations']:
            runs.append(build_run(joined, damage))
    if not runs:
        raise NothingLogged(f'no iterations logged in {", ".join(str(path) for path in files)}')
    runs[-1].notes[:0] = notes
    return runs


def same_model(a: dict, b: dict) -> bool:
    """Return whether two logs of one folder may be of one model: nothing that both state of it
    differs.
    """
    differing = [
        name
        for name in MODEL
        if None not in (a['config'].get(name), b['config'].get(name))
        and a['config'][name] != b['config'][name]
    ]
    return not differing and a['path'].resolve().parent == b['path'].resolve().parent


def find_logs(paths: list) -> list:
    """Return the log files at `paths`; of a run that lies there as .jsonl and .json, the .jsonl.
    Raises LogError.
    """
    found = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = [*path.glob('run_*.json'), *path.glob('run_*.jsonl')]
            if not files:
                raise LogError(
                    f'no run in {path}: expected a run_*.jsonl or run_*.json there, as in the'
                    ' out_dir of a training run'
                )
        elif not path.exists():
            raise LogError(f'no such file or folder: {path}{nearest_path(str(path))}')
        elif path.suffix not in ('.json', '.jsonl'):
            raise LogError(
                f'{path} is not a log: give a run_*.jsonl, a run_*.json or the folder that holds'
                ' them'
            )
        else:
            beside = path.with_suffix('.jsonl')
            files = [beside if beside.is_file() else path]
        for file in files:
            run = file.resolve().with_suffix('')
            if run not in found or file.suffix == '.jsonl':
                found[run] = file
    return list(found.values())


def read_log(path: Path) -> dict:
    """Return one log file as a dict in the schema of the .json, with 'path', 'resumes' and
    'extremes', 'stride' and 'damage', a list of notes, added. Raises LogError.
    """
    try:
        log, bad = (
            parse_jsonl(path)
            if path.suffix == '.jsonl'
            else parse_json_log(path.read_bytes(), path)
        )
    except OSError as error:
        raise LogError(f'{path} cannot be read ({error.strerror})') from None
    log['path'] = path
    log['damage'] = (
        [
            f'{path.name}: {len(bad)} record{"s" * (len(bad) > 1)} that cannot be read left out,'
            f' the first is {bad[0]}'
        ]
        if bad
        else []
    )
    for key in ('config', 'startup_info', 'metadata'):
        log[key] = cleaned(log.get(key))
    for key in ('run_name', 'start_time'):
        log[key] = log[key] if isinstance(log.get(key), str) else None
    for section in SECTIONS.values():
        # by iteration, so that a record written again after a resume replaces the first
        by_iter = {record['iter']: record for record in log[section]}
        log[section] = [by_iter[it] for it in sorted(by_iter)]
    if log['stride'] > 1:
        log['damage'].append(
            f'{path.name}: one of {log["stride"]} logged iterations is drawn, with the lowest and'
            ' highest values between'
        )
    return log


def cleaned(value: Any) -> dict:
    """Return a dict of settings as those who draw expect it: texts, numbers that can be drawn, and
    dicts of these; {} for anything else.
    """
    if not isinstance(value, dict):
        return {}
    return {
        key: cleaned(inner) if isinstance(inner, dict) else inner
        for key, inner in value.items()
        if isinstance(inner, (str, bool, dict))
        or isinstance(inner, (int, float))
        and abs(inner) < LARGEST
    }


def is_record(record: dict) -> bool:
    """Return whether this is a record of an iteration."""
    return isinstance(record, dict) and is_whole(record.get('iter'), 0, 2**53)


def parse_json_log(data: bytes, path: Path) -> tuple:
    """Return (log, places of records that are none) of a .json."""
    try:
        log = parse_json(data)
    except ValueError as error:
        raise LogError(f'{path} is not valid JSON: {error}') from None
    if not isinstance(log, dict):
        raise LogError(
            f'{path} is not the log of a run: expected one JSON object, found a'
            f' {type(log).__name__}'
        )
    bad = []
    for section in SECTIONS.values():
        records = log.get(section)
        records = records if isinstance(records, list) else []
        bad += [
            f'number {number} of {section}'
            for number, record in enumerate(records, 1)
            if not is_record(record)
        ]
        log[section] = [record for record in records if is_record(record)]
    iterations = Thinned(max(1, len(log['training_iterations']) // KEPT))
    for record in log['training_iterations']:
        iterations.add(record)
    log['training_iterations'], log['extremes'] = iterations.finish()
    log['stride'] = iterations.stride
    return log, bad


def parse_jsonl(path: Path) -> tuple:
    """Return (log, places of lines that are no records) of a .jsonl; a last line without its end
    was cut by a kill.
    """
    log: dict[str, Any] = {section: [] for section in SECTIONS.values()}
    bad = []
    check_regular(str(path))
    with open(path, 'rb') as f:
        lines = sum(block.count(b'\n') for block in iter(lambda: f.read(2**22), b''))
        iterations = Thinned(max(1, lines // KEPT))
        f.seek(0)
        for number, line in enumerate(f, 1):
            if iterations.pass_over(line) or not line.strip():
                continue
            try:
                record = parse_json(line)
            except ValueError:
                record = None
            kind = record.get('type') if isinstance(record, dict) else None
            if kind in ('header', 'end'):
                log.update(
                    {key: value for key, value in record.items() if key not in SECTIONS.values()}
                )
            elif kind == 'iter' and is_record(record):
                iterations.add(record)
            elif isinstance(kind, str) and kind in SECTIONS and is_record(record):
                # what lies beyond the resumed iteration was not part of what went on
                if kind == 'resume':
                    iterations.cut_after(record['iter'])
                    for section in SECTIONS.values():
                        log[section] = [
                            old for old in log[section] if old['iter'] <= record['iter']
                        ]
                log[SECTIONS[kind]].append(record)
            elif (kind in SECTIONS if isinstance(kind, str) else True) and not (
                number == lines + 1 and record is None
            ):
                bad.append(f'line {number}')
    log['training_iterations'], log['extremes'] = iterations.finish()
    log['stride'] = iterations.stride
    return log, bad


# an iteration as onetrain/logs/run_log.py writes it: a line that looks otherwise is parsed
_HEAD = re.compile(rb'\{"type": "iter", "iter": (\d{1,15}), "loss": (-?\d[\d.eE+-]{0,30}|null), ')
_NUMBER = re.compile(rb'-?\d[\d.eE+-]{0,30}(?=[,}])')


class Thinned:
    """Takes the records of iterations one after the other and keeps each `stride`-th, with the
    extremes of those between.
    """

    def __init__(self, stride: int):
        self.stride = stride
        self.kept = []
        self.extremes = []
        self.between = []
        self.last: bytes | dict | None = None
        self.shares = None

    def pass_over(self, line: bytes) -> bool:
        """Return whether the line of a .jsonl records an iteration that is not kept: its numbers
        are found without parsing the rest, in a fifth of the time.
        """
        if (
            len(self.between) + 1 >= self.stride
            or not line.endswith(b'}\n')
            or not (head := _HEAD.match(line))
        ):
            return False
        self.between.append(
            (
                int(head[1]),
                head[2],
                _number_after(line, b'"global_norm": '),
                _number_after(line, b'"tokens_per_sec": '),
            )
        )
        self.last = line
        return True

    def add(self, record: dict) -> None:
        """Take up the record of the next iteration."""
        self.last = record
        if self.stride > 1:
            gradients = record.get('gradients')
            norm = gradients.get('global_norm') if isinstance(gradients, dict) else None
            self.between.append(
                (record['iter'], record.get('loss'), norm, record.get('tokens_per_sec'))
            )
            if len(self.between) < self.stride:
                return
        self._keep(record)

    def _keep(self, record):
        self.kept.append(record)
        self._summarize()
        # the shares of many experts are most of a record: only the newest are drawn
        if any(layer.get('utilization') for layer in layers_of(record)):
            for layer in layers_of(self.shares) if self.shares else ():
                layer.pop('utilization', None)
            self.shares = record

    def _summarize(self):
        for place, name in enumerate(EXTREMES, 1):
            found = [
                (value, entry[0])
                for entry in self.between
                if math.isfinite(value := number(entry[place]))
            ]
            self.extremes += (
                [{'iter': it, name: value} for value, it in {min(found), max(found)}]
                if found
                else []
            )
        self.between = []

    def cut_after(self, step: int) -> None:
        """Forget what lies beyond iteration `step`."""
        self._summarize()
        self.kept = [record for record in self.kept if record['iter'] <= step]
        self.extremes = [record for record in self.extremes if record['iter'] <= step]

    def finish(self) -> tuple:
        """Return (records that were kept, the last among them, and extremes as [{'iter': iteration,
        name: value}]).
        """
        if self.between:
            with contextlib.suppress(ValueError):
                self._keep(parse_json(self.last) if isinstance(self.last, bytes) else self.last)
        return self.kept, self.extremes


def _number_after(line, key):
    """Return the bytes of the number behind `key` in a line, None if there is none."""
    begin = line.find(key) + len(key)
    found = _NUMBER.match(line, begin) if begin >= len(key) else None
    return found[0] if found else None


def layers_of(record: dict) -> list[dict]:
    """Return the dicts of the layers with experts in a record, [] for one without."""
    moe = record.get('moe')
    layers = moe.get('layers') if isinstance(moe, dict) else None
    return (
        [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []
    )


def start_order(log: dict) -> tuple:
    """Return the key that sorts logs by their start: the digits of start_time, or of a name like
    run_20261121_021500.
    """
    digits = re.sub(r'\D', '', log.get('start_time') or log['path'].stem)
    return digits[:14], log['path'].stem


def join(earlier: dict, later: dict) -> tuple:
    """Return `earlier` up to where `later` begins, then `later`, as one log; and a list of notes
    for the user.
    """
    records = later['training_iterations']
    start = min(
        [record['iter'] for record in records[:1]]
        + [record['iter'] + 1 for record in later['resumes'][:1]],
        default=np.inf,
    )
    kept = [record for record in earlier['training_iterations'] if record['iter'] < start]
    if start <= 1 or not kept:
        note = f'{later["path"].name} starts from scratch and replaces {earlier["path"].name}'
        return later, [note] if earlier['training_iterations'] else []
    joined = {**earlier, **later}
    for section in ('eval_steps', 'checkpoints', 'resumes'):
        by_iter = {record['iter']: record for record in earlier[section] if record['iter'] < start}
        by_iter.update((record['iter'], record) for record in later[section])
        joined[section] = [by_iter[it] for it in sorted(by_iter)]
    if records:
        last_wall, first_wall = number(kept[-1].get('wall_s')), number(records[0].get('wall_s'))
        if first_wall < last_wall:  # its clock began again
            records = [
                {**record, 'wall_s': number(record.get('wall_s')) + last_wall} for record in records
            ]
        if not later['resumes']:
            joined['resumes'] = joined['resumes'] + [{'iter': kept[-1]['iter']}]
    joined['training_iterations'] = kept + records
    joined['extremes'] = [
        record for record in earlier['extremes'] if record['iter'] < start
    ] + later['extremes']
    return joined, []


def build_run(log: dict, notes: list[str]) -> 'Run':
    """Return the Run of a joined log: its arrays, with what the older system did not log computed
    where that is possible.
    """
    records, evaluations, path = log['training_iterations'], log['eval_steps'], log['path']
    shares, shares_at = expert_shares(records)
    tasks = {
        name
        for record in evaluations
        if isinstance(record.get('tasks'), dict)
        for name in record['tasks']
    }
    run = Run(
        path=path,
        name=log.get('run_name') or path.stem,
        label=path.resolve().parent.name,
        config=log.get('config') or {},
        startup_info=log.get('startup_info') or {},
        metadata=log.get('metadata') or {},
        iters=np.array([record['iter'] for record in records]),
        columns=columns_of(records),
        eval_iters=np.array([record['iter'] for record in evaluations]),
        eval_val_loss=np.array([number(record.get('val_loss')) for record in evaluations], float),
        eval_tasks={
            name: np.array([accuracy(record, name) for record in evaluations], dtype=float)
            for name in sorted(tasks)
        },
        checkpoints=np.array([record['iter'] for record in log['checkpoints']]),
        resumes=np.array([record['iter'] for record in log['resumes']]),
        mfu_unknown=any(
            isinstance(record.get('mfu'), dict) and record['mfu'].get('mfu') is None
            for record in records
        ),
        notes=notes,
        expert_shares=shares,
        shares_at=shares_at,
        extremes={name: extremes_of(log['extremes'], name) for name in EXTREMES},
    )
    fill_columns(run)
    return run


def expert_shares(records: list) -> tuple:
    """Take the shares of the experts out of the records; returns the last, (layers, experts), and
    their iteration.
    """
    shares, shares_at = np.empty((0, 0)), 0
    for record in records:
        found = [
            layer.pop('utilization')
            for layer in layers_of(record)
            if isinstance(layer.get('utilization'), list)
        ]
        if found and len({len(of_layer) for of_layer in found}) == 1:
            shares = np.array([[number(share) for share in of_layer] for of_layer in found])
            shares_at = record['iter']
    return shares, shares_at


def columns_of(records: list) -> dict[str, np.ndarray]:
    """Return {dotted name of a number: its values, NaN where a record has none}."""
    columns = {}
    for row, record in enumerate(records):
        for name, value in numbers(record):
            if name not in columns:
                columns[name] = np.full(len(records), np.nan)
            columns[name][row] = value
    return columns


def extremes_of(records: list[dict], name: str) -> tuple:
    """Return (iterations, values) of the records that have an extreme of this name."""
    pairs = [(record['iter'], record[name]) for record in records if name in record]
    return tuple(np.array(pairs).reshape(-1, 2).T)


def fill_columns(run: Run) -> None:
    """Compute tokens, tokens per second, time and MFU where a log does not have them."""
    iters, columns = run.iters, run.columns
    zero_based = int(iters[0] == 0)
    gaps = np.diff(iters)
    # a first record at 1010 of a run that logs every 10 iterations is a resumed one: it stands for
    # 10 iterations
    first_gap = min([iters[0] + zero_based, *gaps])
    batch = tokens_per_iter(run)
    columns['tokens_seen'] = first_known(run.column('tokens_seen'), (iters + zero_based) * batch)
    columns['tokens_per_sec'] = first_known(
        run.column('tokens_per_sec'),
        run.column('mfu.tokens_per_sec'),
        1000 * batch / run.column('time_ms'),
    )
    if not run.has('wall_s') or np.isnan(columns['wall_s']).any():
        columns['wall_s'] = np.cumsum(np.array([first_gap, *gaps]) * run.column('time_ms')) / 1000
    scalar = run.column('mfu')
    warmed_up = np.where(scalar < 0, np.nan, scalar)  # -100.0 means: still warming up
    columns['mfu_percent'] = 100 * first_known(run.column('mfu.mfu'), warmed_up)


def numbers(record: dict | list[dict], prefix: str = '') -> Iterator:
    """Yield every number in a record and the dicts and lists within it, as pairs of dotted name (of
    a list: the index) and float.
    """
    for key, value in record.items() if isinstance(record, dict) else enumerate(record):
        if isinstance(value, (dict, list)):
            yield from numbers(value, f'{prefix}{key}.')
        elif isinstance(value, (int, float)):
            yield f'{prefix}{key}', number(value)


def number(value: Any) -> float:
    """Return a value of a log as a float, nan for what is no number or too large to draw; a number
    may be in the bytes of its text.
    """
    if isinstance(value, bytes):
        try:
            value = float(value)
        except ValueError:
            return np.nan
    return float(value) if isinstance(value, (int, float)) and abs(value) < LARGEST else np.nan


def accuracy(record: dict, name: str) -> float:
    """Return the accuracy of a task in a record, NaN where it has none."""
    tasks = record.get('tasks')
    score = tasks.get(name) if isinstance(tasks, dict) else None
    return number(score.get('acc_norm')) if isinstance(score, dict) else np.nan


def first_known(*choices) -> np.ndarray:
    """Return per entry, the first of the choices that is not nan."""
    values = choices[0]
    for other in choices[1:]:
        values = np.where(np.isnan(values), other, values)
    return values


def tokens_per_iter(run: Run) -> float:
    """Return tokens of one optimizer step, all ranks together; nan if the log does not say."""
    hardware = run.startup_info.get('hardware')
    world_size = run.metadata.get('world_size') or (
        hardware if isinstance(hardware, dict) else {}
    ).get('num_gpus')
    factors = [
        run.config.get('batch_size'),
        run.config.get('block_size'),
        run.config.get('gradient_accumulation_steps'),
        world_size,
    ]
    return float(np.prod([number(factor) if factor else np.nan for factor in factors]))
