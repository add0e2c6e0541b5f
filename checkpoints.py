"""
List checkpoints, look into them, compare them, and copy them.

    python checkpoints.py out-demo
        step, losses, size, and whether every byte is as it was written
    python checkpoints.py out-demo view 1800
        settings, versions, data, losses, and every tensor
    python checkpoints.py out-demo compare 1350 1800
        how settings and weights differ, layer by layer
    python checkpoints.py out-demo status
        which are here, which where --upload_to copies them
    python checkpoints.py s3://bucket/runs --verify=size
        of every run there; only the sizes
    python checkpoints.py out-demo --copy_to=s3://bucket/runs
        all that are whole, verified after the copy
    python checkpoints.py s3://bucket/runs --copy_to=back --step=2000
        the way back, one step

A copy of a run is at COPY_TO/NAME/RUN, where NAME is that of its out_dir;
there `python sample.py --out_dir=` reads it if its data set is one of data/
by its name. What is there already is verified and not copied again, so the
same command goes on where it was interrupted.

Exit codes: 0 all are whole, 1 one is not, 2 something given cannot be used,
130 Ctrl-C.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from onetrain.command_line import ArgumentParser, importing, run_command

if __name__ == '__main__':
    imported = importing('torch')

import json
import os
import re
import sys
import time

from fsspec.implementations.local import LocalFileSystem

from onetrain.checkpoint import store, uploader
from onetrain.config import UserError, nearest_path
from onetrain.files import open_url, redact, sentence
from onetrain.logs.run_json import finite, read_records
from onetrain.training.startup_report import settings_lines

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

TRIES = 4


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        'place', help="a run's folder, or a folder of runs, here or at a URL that fsspec knows"
    )
    parser.add_argument(
        'action',
        nargs='*',
        default=[],
        help='view STEP, compare STEP STEP, or status; none: the list',
    )
    parser.add_argument(
        '--verify',
        choices=('full', 'size'),
        default='full',
        help='every byte (default), or only the sizes',
    )
    parser.add_argument(
        '--copy_to',
        metavar='PLACE',
        help='a folder or URL to which checkpoints and logs are copied',
    )
    parser.add_argument('--step', type=int, help='only the checkpoints of this step')
    parser.add_argument(
        '--json', action='store_true', help='print JSON instead of a table (not with --copy_to)'
    )
    return run_command(lambda argv: run(parser.parse_args(argv)), argv)


def run(args: argparse.Namespace) -> int:
    """Do what the parsed `args` ask for; returns the exit code. Raises UserError."""
    if '' in (args.place, args.copy_to):
        raise UserError('an empty name is no place: give a folder or a URL')
    name, *steps = args.action or ['list']
    wanted = {'list': 0, 'view': 1, 'compare': 2, 'status': 0}
    if args.place in wanted and not os.path.exists(args.place):
        words = [*args.action[:1], args.place, *steps] if args.action else ['FOLDER', args.place]
        raise UserError(f'the folder comes first: type `python checkpoints.py {" ".join(words)}`')
    if (
        name not in wanted
        or len(steps) != wanted[name]
        or not all(step.isascii() and step.isdigit() for step in steps)
    ):
        raise UserError(
            f'{" ".join(args.action)!r} is not understood: type view STEP, compare STEP STEP, or'
            f' status, such as `python checkpoints.py {args.place} view 1000`'
        )
    if args.copy_to is not None:
        if args.action or args.json:
            raise UserError(
                '--copy_to copies, and takes neither --json nor an action: leave one of them out'
            )
        return copy(args)
    if name == 'view':
        return view(args, int(steps[0]))
    if name == 'compare':
        return compare(args, *map(int, steps))
    return status(args) if name == 'status' else show(args)


def runs_of(args: argparse.Namespace) -> tuple:
    """Return (file system, folders of the runs at args.place). Raises UserError where none has a
    checkpoint, or none the step.
    """
    fs, root = open_url(args.place)
    try:
        runs = uploader.runs(fs, root.removesuffix('/checkpoints'))
        found = [
            run
            for run in runs
            if (args.step is None and store.steps(run, fs)) or args.step in store.steps(run, fs)
        ]
    except Exception as error:  # each backend has its own
        raise UserError(
            f'{redact(args.place)} cannot be read ({type(error).__name__}: {sentence(error)})'
        ) from None
    if not found and '://' not in args.place and not os.path.isdir(args.place):
        raise UserError(
            f'{args.place}: no such folder{nearest_path(args.place)}; expected the folder of a run'
            ' (with checkpoints/ in it), a folder of runs, or a URL'
        )
    if not found:
        which = 'checkpoints' if args.step is None else f'checkpoint of step {args.step}'
        raise UserError(
            f"{redact(args.place)} has no {which}: expected a run's folder (with checkpoints/ in"
            ' it) or a folder of runs'
        )
    return fs, found


def steps_of(run: str, fs: 'AbstractFileSystem', args: argparse.Namespace) -> list[int]:
    """Return the steps of a run that `args` mean: --step, or all."""
    return [step for step in store.steps(run, fs) if args.step in (None, step)]


def show(args: argparse.Namespace) -> int:
    """Print a line for each checkpoint; returns the exit code."""
    fs, runs = runs_of(args)
    found = []
    if not args.json:
        print(
            f'{"step":>8}  {"train loss":>10}  {"val loss":>8}  {"size":>10}  {"saved":<25}  state'
        )
    for run in runs:
        best = store.best_step(run, fs)
        for step in steps_of(run, fs, args):
            path = store.path_of(run, step)
            reason = store.corruption_reason(path, args.verify, fs)
            entry = {'step': step, 'path': redact(path), 'broken': reason, 'best': step == best}
            if reason is None:
                losses = store.read_evaluation(path, fs) or {}
                entry.update(
                    {key: losses.get(key) for key in ('train', 'val')},
                    bytes=store.tensor_bytes(path, fs),
                    saved=store.read_state(path, fs).get('time', ''),
                )
            found.append(entry)
            if not args.json:
                print(line_of(entry, args.verify), flush=True)
    if args.json:
        print(json.dumps(found))
    return 1 if any(entry['broken'] for entry in found) else 0


def line_of(entry: dict, level: str) -> str:
    """Return the line of the list for a checkpoint."""
    if entry['broken']:
        return (
            f'{entry["step"]:>8}  {"":>10}  {"":>8}  {"":>10}  {"":<25}  BROKEN: {entry["path"]}:'
            f' {entry["broken"]}'
        )
    train, val = (f'{entry[key]:.4f}' if entry[key] is not None else '' for key in ('train', 'val'))
    whole = {'full': 'whole', 'size': 'sizes match'}[level]
    return (
        f'{entry["step"]:>8}  {train:>10}  {val:>8}  {size(entry["bytes"]):>10} '
        f' {entry["saved"]:<25}  {whole}{", best" if entry["best"] else ""}  {entry["path"]}'
    )


def size(count: int) -> str:
    """Return a number of bytes as text, such as 1.5 GB."""
    return f'{count / 1e9:.2f} GB' if count >= 1e9 else f'{count / 1e6:.2f} MB'


def here(args: argparse.Namespace, *steps) -> list[str]:
    """Return the paths of these checkpoints of the only run at args.place. Raises UserError for a
    URL, several runs, or one that is not whole.
    """
    fs, root = open_url(args.place)
    if not isinstance(fs, LocalFileSystem):
        raise UserError(
            f'{redact(args.place)} is elsewhere, and tensors are read on this machine: copy it with'
            f' --copy_to=FOLDER --step={steps[0]} first'
        )
    runs = [
        run
        for run in uploader.runs(fs, root.removesuffix('/checkpoints'))
        if set(steps) <= set(store.steps(run))
    ]
    if len(runs) != 1:
        there = sorted(
            {
                step
                for run in uploader.runs(fs, root.removesuffix('/checkpoints'))
                for step in store.steps(run)
            }
        )
        raise UserError(
            f'{args.place} has {"several runs with" if runs else "no"} checkpoint of step'
            f' {" and ".join(map(str, steps))}'
            + (
                ': name the folder of one run'
                if runs
                else f'; it has {", ".join(map(str, there[-10:])) or "none"}'
            )
        )
    paths = [store.path_of(runs[0], step) for step in steps]
    for path in paths:
        if reason := store.corruption_reason(path, args.verify):
            raise UserError(f'{path} is not whole: {reason}')
    return paths


def speed(path: str, step: int) -> float | None:
    """Return the tokens per second that the log beside a checkpoint has for its iteration, or
    None.
    """
    folder = os.path.dirname(os.path.dirname(path))
    name = store.read_state(path).get('run_name')
    log = os.path.join(folder, f'{name}.jsonl')
    if not os.path.isfile(log):
        return None
    rates = [
        record['tokens_per_sec']
        for record in read_records(log)
        if record['type'] == 'iter' and record['iter'] <= step
    ]
    return rates[-1] if rates else None


def view(args: argparse.Namespace, step: int) -> int:
    """Print all that a checkpoint holds."""
    (path,) = here(args, step)
    state, losses = store.read_state(path), store.read_evaluation(path) or {}
    tensors = [
        {
            'name': name,
            'shape': list(tensor.shape),
            'dtype': str(tensor.dtype).removeprefix('torch.'),
            'norm': tensor.double().norm().item(),
        }
        for name, tensor in sorted(store.read_tensors(path, 'model.').items())
    ]
    found = {
        'path': path,
        'run': state.get('run_name'),
        'saved': state.get('time'),
        'versions': state.get('versions'),
        'data': state.get('data'),
        'tokens': state.get('tokens'),
        'train': losses.get('train'),
        'val': losses.get('val'),
        'tokens_per_sec': speed(path, step),
        'config': redact(state['config']),
        'tensors': tensors,
    }
    if args.json:
        print(json.dumps(finite(found)))
        return 0
    for key in ('path', 'run', 'saved', 'tokens', 'train', 'val', 'tokens_per_sec'):
        if found[key] is not None:
            print(
                f'{key.replace("_", " ").replace("per sec", "per second")}: {found[key]:,}'
                if isinstance(found[key], int)
                else f'{key}: {found[key]}'
            )
    print(
        'versions: '
        + ', '.join(f'{name} {version}' for name, version in (state.get('versions') or {}).items())
    )
    print(
        'data: '
        + ', '.join(
            f'{split} of {about.get("tokens", 0):,} tokens'
            for split, about in (state.get('data') or {}).items()
        )
    )
    print('config:')
    print('\n'.join(settings_lines(found['config'], 2)))
    print(f'{"norm":>12}  {"dtype":<9} {"shape":<20} tensor')
    for tensor in tensors:
        print(
            f'{tensor["norm"]:>12.5g}  {tensor["dtype"]:<9}'
            f' {"x".join(map(str, tensor["shape"])) or "number":<20} {tensor["name"]}'
        )
    return 0


def compare(args: argparse.Namespace, first: int, second: int) -> int:
    """Print the settings in which two checkpoints differ, and how far their weights are from each
    other.
    """
    paths = here(args, first, second)
    configs = [store.read_state(path)['config'] for path in paths]
    differ = {
        key: redact([config.get(key) for config in configs])
        for key in sorted({*configs[0], *configs[1]})
        if configs[0].get(key) != configs[1].get(key)
    }
    a, b = (store.read_tensors(path, 'model.') for path in paths)
    parts = {}
    for name in sorted(a.keys() & b.keys()):
        if a[name].shape == b[name].shape:
            match = re.match(r'model\.transformer\.(h\.\d+)\.', name)
            parts.setdefault(
                match[1] if match else name.removeprefix('model.').removeprefix('transformer.'), []
            ).append(name)
    rows = []
    for part, names in parts.items():
        was = sum(a[name].double().square().sum().item() for name in names)
        moved = sum((a[name].double() - b[name].double()).square().sum().item() for name in names)
        rows.append(
            {
                'part': part,
                'tensors': len(names),
                'distance': moved**0.5,
                'relative': (moved / was) ** 0.5 if was else None,
            }
        )
    rows.sort(
        key=lambda row: [
            int(word) if word.isdigit() else word for word in re.split(r'(\d+)', row['part'])
        ]
    )
    unlike = sorted(
        name
        for name in {*a, *b}
        if name not in a or name not in b or a[name].shape != b[name].shape
    )
    if args.json:
        print(json.dumps(finite({'config': differ, 'weights': rows, 'unlike': unlike})))
        return 0
    print('settings that differ: ' + ('' if differ else 'none'))
    for key, (one, other) in differ.items():
        print(f'  {key}: {one} -> {other}')
    print(f'{"distance":>12}  {"of its norm":>11}  part')
    for row in rows:
        share = f'{row["relative"]:.2%}' if row['relative'] is not None else ''
        print(
            f'{row["distance"]:>12.5g}  {share:>11}  {row["part"]} ({row["tensors"]}'
            f' tensor{"s" * (row["tensors"] != 1)})'
        )
    for name in unlike:
        print(f'only in one of them, or of another shape: {name}')
    return 0


def status(args: argparse.Namespace) -> int:
    """Print for each checkpoint whether it is here, and where upload_to copies it."""
    fs, runs = runs_of(args)
    found = [entry for run in runs for entry in places_of(run, fs, args)]
    if args.json:
        print(json.dumps(found))
    else:
        print(f'{"step":>8}  {"here":<12}  {"there":<12}  run')
        for entry in found:
            step = '' if entry['step'] is None else entry['step']
            there = 'pending' if entry['pending'] and entry['step'] is not None else entry['there']
            print(f'{step:>8}  {entry["here"]:<12}  {there:<12}  {entry["run"]}')
    broken = any('BROKEN' in (entry['here'], entry['there']) for entry in found)
    return int(broken or any(entry['step'] is None for entry in found))


def places_of(run: str, fs: 'AbstractFileSystem', args: argparse.Namespace) -> list[dict]:
    """Return [{'run', 'step', 'here', 'there', 'pending'}] of the checkpoints of a run; step None:
    its upload_to cannot be read.
    """
    states = {step: store.read_state(store.path_of(run, step), fs) for step in store.steps(run, fs)}
    newest = states[max(states)]
    url, name = newest['config'].get('upload_to'), newest.get('run_name')
    copies, problem = set(), None
    to_fs = target = None
    if url and name:
        try:
            to_fs, root = open_url(url)
            target = f'{uploader.place_of(root, newest["config"].get("out_dir") or run)}/{name}'
            copies = set(store.steps(target, to_fs))
        except Exception as error:  # each backend has its own
            problem = f'{type(error).__name__}: {sentence(error)}'
    found = []
    for step in sorted(states.keys() | copies):
        if args.step not in (None, step):
            continue
        local = step in states and store.corruption_reason(
            store.path_of(run, step), args.verify, fs
        )
        remote = step in copies and store.corruption_reason(
            store.path_of(target, step), args.verify, to_fs
        )
        found.append(
            {
                'run': redact(run),
                'step': step,
                'here': state_of(step in states, local),
                'there': state_of(step in copies, remote) if url else 'no upload_to',
                'pending': bool(url) and step in states and step not in copies,
            }
        )
    if problem:
        there = f'{redact(url)} cannot be read: {problem}'
        found.append(
            {'run': redact(run), 'step': None, 'here': '', 'there': there, 'pending': True}
        )
    return found


def state_of(exists: bool, reason: bool | str | None) -> str:
    """Return 'whole', 'BROKEN' or 'removed' for the table of status()."""
    return 'BROKEN' if exists and reason else 'whole' if exists else 'removed'


def copy(args: argparse.Namespace) -> int:
    """Copy checkpoints and logs to --copy_to; returns the exit code."""
    fs, runs = runs_of(args)
    to_fs, to_root = open_url(args.copy_to)
    copied = there = broken = 0
    for run in runs:
        names = set()
        for step in reversed(steps_of(run, fs, args)):
            path = store.path_of(run, step)
            started = time.monotonic()
            reason = tried(lambda: store.corruption_reason(path, 'size', fs), args.place)
            if reason is None and (run_name := store.read_state(path, fs).get('run_name')) is None:
                reason = 'its state.json has no run_name'
            if reason:
                broken += 1
                print(f'NOT COPIED, as it is not whole: {redact(path)}: {reason}', flush=True)
                continue
            names.add(run_name)
            target = place_of_copy(run, run_name, to_root)
            if (
                isinstance(fs, LocalFileSystem)
                and isinstance(to_fs, LocalFileSystem)
                and f'{os.path.realpath(target)}/'.startswith(f'{os.path.realpath(run)}/')
            ):
                raise UserError(
                    f'--copy_to={args.copy_to} would put the copy of {run} into itself: give'
                    ' another folder'
                )
            try:
                new = tried(lambda: copy_one(fs, run, step, to_fs, target, run_name), args.copy_to)
            except UserError:  # the place cannot be reached, which says nothing of the checkpoint
                raise
            except ValueError as error:  # its bytes are not what its manifest says
                broken += 1
                print(f'NOT COPIED, as it is not whole: {redact(path)}: {error}', flush=True)
                continue
            copied, there = copied + new, there + (not new)
            if new:
                print(
                    f'copied step {step} to {redact(target)} in {time.monotonic() - started:.1f} s,'
                    ' verified',
                    flush=True,
                )
        for run_name in sorted(names):
            target = place_of_copy(run, run_name, to_root)
            tried(lambda: uploader.copy_logs(fs, run, to_fs, target, run_name), args.copy_to)
            print(f'{run_name} is at {redact(target)}', flush=True)
    print(
        f'{copied} checkpoint{"s" * (copied != 1)} copied'
        + (f', {there} there already, verified' if there else '')
        + (f', {broken} not whole' if broken else '')
    )
    return 1 if broken else 0


def place_of_copy(run: str, run_name: str, to_root: str) -> str:
    """Return the folder of the copy of a run: run is its out_dir, or a copy of it, whose folder has
    the name of the run.
    """
    folder, name = os.path.split(run.rstrip('/'))
    return f'{uploader.place_of(to_root, folder if name == run_name else run)}/{run_name}'


def copy_one(
    fs: 'AbstractFileSystem',
    run: str,
    step: int,
    to_fs: 'AbstractFileSystem',
    target: str,
    run_name: str,
) -> bool:
    """Copy a checkpoint and the logs of its run; return whether it was not there."""
    there = store.path_of(target, step)
    new = uploader.copy_checkpoint(
        fs,
        store.path_of(run, step),
        to_fs,
        there,
        lambda: uploader.copy_logs(fs, run, to_fs, target, run_name),
        again=True,
    )
    if isinstance(to_fs, LocalFileSystem):
        store.mark_fetched(there, redact(run))
    return new


def tried(work: Callable, place: str):
    """Return work(), tried again a few times where the network or a disk fails. Raises UserError
    after the last.
    """
    for turn in range(TRIES):
        try:
            return work()
        except ValueError:
            raise
        except Exception as error:  # each backend has its own
            if turn + 1 == TRIES:
                raise UserError(
                    f'{redact(place)}: {type(error).__name__}: {sentence(error)}: nothing more was'
                    ' copied; the same command goes on where this one stopped'
                ) from None
            print(
                f'{redact(place)}: {type(error).__name__}: {sentence(error)}: trying again',
                file=sys.stderr,
                flush=True,
            )
            time.sleep(2.0**turn)


if __name__ == '__main__':
    imported()
    sys.exit(main())
