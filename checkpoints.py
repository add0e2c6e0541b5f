"""
Lists checkpoints, in a folder or a bucket, and copies them from anywhere to anywhere.

    python checkpoints.py out-demo                                  step, losses, size, and whether every byte is as it was written
    python checkpoints.py s3://bucket/runs --verify=size            of every run there; only the sizes
    python checkpoints.py out-demo --copy_to=s3://bucket/runs       all that are whole, verified after the copy
    python checkpoints.py s3://bucket/runs --copy_to=back --step=2000   the way back, one step

A copy of a run is at COPY_TO/NAME/RUN, where NAME is that of its out_dir; there `python sample.py --out_dir=` reads it if its
data set is one of data/ by its name. What is there already is verified and not copied again, so the same command goes on where
it was interrupted.
Exit codes: 0 all are whole, 1 one is not, 2 something given cannot be used, 130 Ctrl-C.
"""
from engine.command_line import run_command  # first: until main() takes over, a Ctrl-C ends the process quietly

import argparse
import os
import sys
import time

from fsspec.implementations.local import LocalFileSystem

from engine import checkpoint, copier
from engine.configurator import ConfigError
from engine.files import open_url, redact, sentence

TRIES = 4


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('place', help="a run's folder, or a folder of runs, here or at a URL that fsspec knows")
    parser.add_argument('--verify', choices=('full', 'size'), default='full', help='every byte (default), or only the sizes')
    parser.add_argument('--copy_to', metavar='PLACE', help='a folder or URL to which checkpoints and logs are copied')
    parser.add_argument('--step', type=int, help='only the checkpoints of this step')
    return run_command(lambda argv: run(parser.parse_args(argv)), argv)


def run(args):
    if '' in (args.place, args.copy_to):
        raise ConfigError('an empty name is no place: give a folder or a URL')
    return show(args) if args.copy_to is None else copy(args)


def runs_of(args):
    """Return (file system, folders of the runs at args.place). Raises ConfigError where none has a checkpoint, or none the step."""
    fs, root = open_url(args.place)
    try:
        runs = copier.runs(fs, root.removesuffix('/checkpoints'))
        found = [run for run in runs if (args.step is None and checkpoint.steps(run, fs)) or args.step in checkpoint.steps(run, fs)]
    except Exception as error:  # each backend has its own
        raise ConfigError(f'{redact(args.place)} cannot be read ({type(error).__name__}: {sentence(error)})') from None
    if not found:
        which = 'checkpoints' if args.step is None else f'checkpoint of step {args.step}'
        raise ConfigError(f"{redact(args.place)} has no {which}: expected a run's folder (with checkpoints/ in it) or a folder of runs")
    return fs, found


def steps_of(run, fs, args):
    return [step for step in checkpoint.steps(run, fs) if args.step in (None, step)]


def show(args):
    fs, runs = runs_of(args)
    broken = 0
    print(f"{'step':>8}  {'train loss':>10}  {'val loss':>8}  {'size':>10}  {'saved':<25}  state")
    for run in runs:
        best = checkpoint.best_step(run, fs)
        for step in steps_of(run, fs, args):
            path = checkpoint.path_of(run, step)
            reason = checkpoint.why_broken(path, args.verify, fs)
            if reason:
                broken += 1
                print(f"{step:>8}  {'':>10}  {'':>8}  {'':>10}  {'':<25}  BROKEN: {redact(path)}: {reason}", flush=True)
                continue
            losses, state, size = checkpoint.read_evaluation(path, fs) or {}, checkpoint.read_state(path, fs), checkpoint.tensor_bytes(path, fs)
            train, val = (f'{losses[key]:.4f}' if losses.get(key) is not None else '' for key in ('train', 'val'))
            readable = f'{size / 1e9:.2f} GB' if size >= 1e9 else f'{size / 1e6:.2f} MB'
            whole = {'full': 'whole', 'size': 'sizes match'}[args.verify]
            print(f"{step:>8}  {train:>10}  {val:>8}  {readable:>10}  {state.get('time', ''):<25}  {whole}{', best' if step == best else ''}  {redact(path)}", flush=True)
    return 1 if broken else 0


def copy(args):
    fs, runs = runs_of(args)
    to_fs, to_root = open_url(args.copy_to)
    copied = there = broken = 0
    for run in runs:
        names = set()
        for step in reversed(steps_of(run, fs, args)):
            path = checkpoint.path_of(run, step)
            started, reason = time.monotonic(), tried(lambda: checkpoint.why_broken(path, 'size', fs), args.place)
            if reason is None and (run_name := checkpoint.read_state(path, fs).get('run_name')) is None:
                reason = 'its state.json has no run_name'
            if reason:
                broken += 1
                print(f'NOT COPIED, as it is not whole: {redact(path)}: {reason}', flush=True)
                continue
            names.add(run_name)
            target = place_of_copy(run, run_name, to_root)
            if isinstance(fs, LocalFileSystem) and isinstance(to_fs, LocalFileSystem) and f'{os.path.realpath(target)}/'.startswith(f'{os.path.realpath(run)}/'):
                raise ConfigError(f'--copy_to={args.copy_to} would put the copy of {run} into itself: give another folder')
            try:
                new = tried(lambda: copy_one(fs, run, step, to_fs, target, run_name), args.copy_to)
            except ConfigError:  # the place cannot be reached, which says nothing of the checkpoint
                raise
            except ValueError as error:  # its bytes are not what its manifest says
                broken += 1
                print(f'NOT COPIED, as it is not whole: {redact(path)}: {error}', flush=True)
                continue
            copied, there = copied + new, there + (not new)
            if new:
                print(f'copied step {step} to {redact(target)} in {time.monotonic() - started:.1f} s, verified', flush=True)
        for run_name in sorted(names):
            target = place_of_copy(run, run_name, to_root)
            tried(lambda: copier.copy_logs(fs, run, to_fs, target, run_name), args.copy_to)
            print(f'{run_name} is at {redact(target)}', flush=True)
    print(f'{copied} checkpoint{"s" * (copied != 1)} copied' + (f', {there} there already, verified' if there else '') + (f', {broken} not whole' if broken else ''))
    return 1 if broken else 0


def place_of_copy(run, run_name, to_root):
    """Return the folder of the copy of a run: run is its out_dir, or a copy of it, whose folder has the name of the run."""
    folder, name = os.path.split(run.rstrip('/'))
    return f'{copier.place_of(to_root, folder if name == run_name else run)}/{run_name}'


def copy_one(fs, run, step, to_fs, target, run_name):
    """Copy a checkpoint and the logs of its run; return whether it was not there."""
    there = checkpoint.path_of(target, step)
    new = copier.copy_checkpoint(fs, checkpoint.path_of(run, step), to_fs, there, lambda: copier.copy_logs(fs, run, to_fs, target, run_name), again=True)
    if isinstance(to_fs, LocalFileSystem):
        checkpoint.mark_fetched(there, redact(run))
    return new


def tried(work, place):
    """Return work(), tried again a few times where the network or a disk fails. Raises ConfigError after the last."""
    for turn in range(TRIES):
        try:
            return work()
        except ValueError:
            raise
        except Exception as error:  # each backend has its own
            if turn + 1 == TRIES:
                raise ConfigError(f'{redact(place)}: {type(error).__name__}: {sentence(error)}: nothing more was copied; '
                                  f'the same command goes on where this one stopped') from None
            print(f'{redact(place)}: {type(error).__name__}: {sentence(error)}: trying again', file=sys.stderr, flush=True)
            time.sleep(2.0 ** turn)


if __name__ == '__main__':
    sys.exit(main())
