"""Read the log of a run, for the plotting commands: a .jsonl, a .json, several of them, or the out_dir that holds them.

The .jsonl is the truth and is preferred where both lie in a folder. Several logs of one out_dir are one run that was
stopped and resumed: they are joined so that curves never fork. Logs of the older system (JSON only, `mfu` a number, no lr,
tokens or wall time) are read too; what they lack is computed from time_ms and the batch in their config, or stays nan.
"""
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SECTIONS = {'iter': 'training_iterations', 'eval': 'eval_steps', 'checkpoint': 'checkpoints', 'resume': 'resumes'}


class LogError(Exception):
    """What the user named is not a readable log; the message is one sentence for them."""


@dataclass
class Run:
    """One run, joined over its resumes. Every array has one entry per record, nan where a record lacks the value.

    columns holds every number of the iteration records by its dotted name ('loss', 'memory.allocated_gb',
    'gradients.global_norm', ...), and always: tokens_seen, wall_s (seconds), tokens_per_sec, mfu_percent.
    """
    path: Path                  # the newest log file
    name: str                   # its run_name
    label: str                  # name of its folder
    config: dict
    startup_info: dict
    metadata: dict
    iters: np.ndarray
    columns: dict
    eval_iters: np.ndarray
    eval_val_loss: np.ndarray
    eval_tasks: dict            # {name of a multiple-choice task: acc_norm at each of eval_iters}
    checkpoints: np.ndarray     # iterations
    resumes: np.ndarray         # iterations after which a resumed process went on
    mfu_unknown: bool           # MFU was logged as null: the device's peak is not known
    notes: list = field(default_factory=list)

    def column(self, name):
        """The values named `name`, one per entry of iters; all nan if the run did not log them."""
        return self.columns.get(name, np.full(len(self.iters), np.nan))

    def has(self, *names):
        """Whether any of these columns holds a finite number other than 0, which is the GPU memory of a run on CPU."""
        return any((np.isfinite(values) & (values != 0)).any() for values in map(self.column, names))

    def each(self, pattern):
        """The columns whose whole name the regular expression `pattern` matches, in the order of the numbers in their names."""
        names = [name for name in self.columns if re.fullmatch(pattern, name)]
        return [self.columns[name] for name in sorted(names, key=lambda name: [int(digits) for digits in re.findall(r'\d+', name)])]

    def last(self, name):
        """The last finite value of a column, nan if there is none."""
        values = self.column(name)
        values = values[np.isfinite(values)]
        return values[-1] if len(values) else np.nan


def load_run(paths):
    """Read the logs at `paths` (files or folders, all of one run) into a Run. Raises LogError."""
    files = find_logs(paths)
    logs = sorted((read_log(path) for path in files), key=start_order)
    if not any(log['training_iterations'] for log in logs):
        raise LogError(f'no iterations logged in {", ".join(str(path) for path in files)}')
    used = [log for log in logs if log['training_iterations'] or log['eval_steps']]
    notes = [f"{log['path'].name} holds no iterations; left out" for log in logs if not (log['training_iterations'] or log['eval_steps'])]
    joined = used[0]
    for later in used[1:]:
        joined, note = join(joined, later)
        notes += note
    return build_run(joined, notes)


def find_logs(paths):
    """The log files at `paths`; of a run that lies there as .jsonl and .json, the .jsonl. Raises LogError."""
    found = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = [*path.glob('run_*.json'), *path.glob('run_*.jsonl')]
            if not files:
                raise LogError(f'no run in {path}: expected a run_*.jsonl or run_*.json there, as in the out_dir of a training run')
        elif not path.exists():
            raise LogError(f'no such file or folder: {path}')
        elif path.suffix not in ('.json', '.jsonl'):
            raise LogError(f'{path} is not a log: give a run_*.jsonl, a run_*.json or the folder that holds them')
        else:
            files = [path]
        for file in files:
            run = file.resolve().with_suffix('')
            if run not in found or file.suffix == '.jsonl':
                found[run] = file
    return list(found.values())


def read_log(path):
    """One log file as a dict in the schema of the .json, with 'path' and 'resumes' added. Raises LogError."""
    text = path.read_text(encoding='utf-8', errors='replace')
    log = parse_jsonl(text, path) if path.suffix == '.jsonl' else parse_json(text, path)
    log['path'] = path
    for section in SECTIONS.values():
        # by iteration, so that a record written again after a resume replaces the first
        by_iter = {record['iter']: record for record in log.get(section) or [] if 'iter' in record}
        log[section] = [by_iter[it] for it in sorted(by_iter)]
    return log


def parse_json(text, path):
    try:
        log = json.loads(text)
    except json.JSONDecodeError as error:
        raise LogError(f'{path} is not valid JSON: {error}') from None
    if not isinstance(log, dict):
        raise LogError(f'{path} is not the log of a run: expected one JSON object, found a {type(log).__name__}')
    return log


def parse_jsonl(text, path):
    log = {section: [] for section in SECTIONS.values()}
    lines = [(number, line) for number, line in enumerate(text.split('\n'), 1) if line.strip()]
    for number, line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == lines[-1][0]:
                break       # a kill cut it
            raise LogError(f'{path} line {number} is not valid JSON: {error}') from None
        if not isinstance(record, dict):
            raise LogError(f'{path} line {number} is not a record: expected a JSON object, found a {type(record).__name__}')
        kind = record.get('type')
        if kind in ('header', 'end'):
            log.update(record)
        elif kind in SECTIONS:
            if kind == 'resume':    # what lies beyond the resumed iteration was not part of what went on
                for section in SECTIONS.values():
                    log[section] = [old for old in log[section] if old['iter'] <= record['iter']]
            log[SECTIONS[kind]].append(record)
    return log


def start_order(log):
    """Key that sorts logs by their start: the digits of start_time, or of a name like run_20261121_021500."""
    digits = re.sub(r'\D', '', log.get('start_time') or log['path'].stem)
    return digits[:14], log['path'].stem


def join(earlier, later):
    """`earlier` up to where `later` begins, then `later`, as one log; and a list of notes for the user."""
    records = later['training_iterations']
    start = min([record['iter'] for record in records[:1]] + [record['iter'] + 1 for record in later['resumes'][:1]], default=np.inf)
    kept = [record for record in earlier['training_iterations'] if record['iter'] < start]
    if start <= 1 or not kept:
        note = f"{later['path'].name} starts from scratch and replaces {earlier['path'].name}"
        return later, [note] if earlier['training_iterations'] else []
    joined = {**earlier, **later}
    for section in ('eval_steps', 'checkpoints', 'resumes'):
        by_iter = {record['iter']: record for record in earlier[section] if record['iter'] < start}
        by_iter.update((record['iter'], record) for record in later[section])
        joined[section] = [by_iter[it] for it in sorted(by_iter)]
    if records:
        last_wall, first_wall = kept[-1].get('wall_s'), records[0].get('wall_s')
        if last_wall is not None and first_wall is not None and first_wall < last_wall:     # its clock began again
            records = [{**record, 'wall_s': record['wall_s'] + last_wall} for record in records]
        if not later['resumes']:
            joined['resumes'] = joined['resumes'] + [{'iter': kept[-1]['iter']}]
    joined['training_iterations'] = kept + records
    return joined, []


def build_run(log, notes):
    """The Run of a joined log: its arrays, with what the older system did not log computed where that is possible."""
    records = log['training_iterations']
    iters = np.array([record['iter'] for record in records])
    columns = {}
    for row, record in enumerate(records):
        for name, value in numbers(record):
            if name not in columns:
                columns[name] = np.full(len(records), np.nan)
            columns[name][row] = value

    path = log['path']
    run = Run(path=path, name=log.get('run_name') or path.stem, label=path.resolve().parent.name, config=log.get('config') or {},
              startup_info=log.get('startup_info') or {}, metadata=log.get('metadata') or {}, iters=iters, columns=columns,
              eval_iters=np.array([record['iter'] for record in log['eval_steps']]),
              eval_val_loss=np.array([record.get('val_loss') for record in log['eval_steps']], dtype=float),
              eval_tasks={name: np.array([((record.get('tasks') or {}).get(name) or {}).get('acc_norm', np.nan) for record in log['eval_steps']], dtype=float)
                          for name in sorted({name for record in log['eval_steps'] for name in record.get('tasks') or ()})},
              checkpoints=np.array([record['iter'] for record in log['checkpoints']]),
              resumes=np.array([record['iter'] for record in log['resumes']]),
              mfu_unknown=any(isinstance(record.get('mfu'), dict) and record['mfu'].get('mfu') is None for record in records), notes=notes)

    zero_based = int(iters[0] == 0)
    gaps = np.diff(iters)
    # a first record at 1010 of a run that logs every 10 iterations is a resumed one: it stands for 10 iterations
    first_gap = min([iters[0] + zero_based, *gaps])
    batch = tokens_per_iter(run)
    columns['tokens_seen'] = first_known(run.column('tokens_seen'), (iters + zero_based) * batch)
    columns['tokens_per_sec'] = first_known(run.column('tokens_per_sec'), run.column('mfu.tokens_per_sec'),
                                            1000 * batch / run.column('time_ms'))
    if not run.has('wall_s') or np.isnan(columns['wall_s']).any():
        columns['wall_s'] = np.cumsum(np.array([first_gap, *gaps]) * run.column('time_ms')) / 1000
    scalar = run.column('mfu')
    warmed_up = np.where(scalar < 0, np.nan, scalar)    # -100.0 means: still warming up
    columns['mfu_percent'] = 100 * first_known(run.column('mfu.mfu'), warmed_up)
    return run


def numbers(record, prefix=''):
    """Every number in a record and the dicts and lists within it, as pairs of dotted name (of a list: the index) and float."""
    for key, value in record.items() if isinstance(record, dict) else enumerate(record):
        if isinstance(value, (dict, list)):
            yield from numbers(value, f'{prefix}{key}.')
        elif isinstance(value, (int, float)):
            yield f'{prefix}{key}', float(value)


def first_known(*choices):
    """Per entry, the first of the choices that is not nan."""
    values = choices[0]
    for other in choices[1:]:
        values = np.where(np.isnan(values), other, values)
    return values


def tokens_per_iter(run):
    """Tokens of one optimizer step, all ranks together; nan if the log does not say."""
    world_size = run.metadata.get('world_size') or (run.startup_info.get('hardware') or {}).get('num_gpus')
    factors = [run.config.get('batch_size'), run.config.get('block_size'), run.config.get('gradient_accumulation_steps'), world_size]
    return np.nan if None in factors else float(np.prod(factors))
