"""
Lists checkpoints, in a folder or a bucket, and copies them there.

    python checkpoints.py out-demo                              step, losses, size, and whether every byte is as it was written
    python checkpoints.py s3://bucket/runs --verify=size        of every run there; only the sizes
    python checkpoints.py out-demo --copy_to=s3://bucket/runs   what is whole and not there yet, verified after the copy

Exit codes: 0 all are whole, 1 one is not, 2 something given cannot be used.
"""
import argparse
import sys

from engine import checkpoint, copier
from engine.configurator import ConfigError


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('place', help="a run's folder, or a folder of runs, here or at a URL that fsspec knows")
    parser.add_argument('--verify', choices=('full', 'size'), default='full', help='every byte (default), or only the sizes')
    parser.add_argument('--copy_to', metavar='URL', help='copy the checkpoints and logs of a local run there')
    args = parser.parse_args(argv)
    try:
        return copy(args) if args.copy_to else show(args)
    except ConfigError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2


def show(args):
    fs, root = copier.open_url(args.place)
    root, found, broken = root.rstrip('/'), 0, 0
    try:
        runs = copier.runs(fs, root)
    except Exception as error:  # each backend has its own
        raise ConfigError(f'{args.place} cannot be read ({type(error).__name__}: {str(error)[:300]})') from None
    for run in runs:
        best = checkpoint.best_step(run, fs)
        for step in checkpoint.steps(run, fs):
            if not found:
                print(f"{'step':>8}  {'train loss':>10}  {'val loss':>8}  {'size':>10}  {'saved':<25}  state")
            path = checkpoint.path_of(run, step)
            reason = checkpoint.why_broken(path, args.verify, fs)
            found, broken = found + 1, broken + (reason is not None)
            if reason:
                print(f"{step:>8}  {'':>10}  {'':>8}  {'':>10}  {'':<25}  BROKEN: {path}: {reason}", flush=True)
                continue
            losses, state, size = checkpoint.read_evaluation(path, fs) or {}, checkpoint.read_state(path, fs), checkpoint.tensor_bytes(path, fs)
            train, val = (f'{losses[key]:.4f}' if losses.get(key) is not None else '' for key in ('train', 'val'))
            readable = f'{size / 1e9:.2f} GB' if size >= 1e9 else f'{size / 1e6:.2f} MB'
            whole = {'full': 'whole', 'size': 'sizes match'}[args.verify]
            print(f"{step:>8}  {train:>10}  {val:>8}  {readable:>10}  {state.get('time', ''):<25}  {whole}{', best' if step == best else ''}  {path}", flush=True)
    if not found:
        raise ConfigError(f'{args.place} has no checkpoints: expected a run\'s folder (with checkpoints/ in it) or a folder of runs')
    return 1 if broken else 0


def copy(args):
    step, _ = checkpoint.newest_whole(args.place, 'size')
    if step is None:
        raise ConfigError(f'{args.place} has no whole checkpoint to copy: expected the folder of a run on this machine')
    run_name = checkpoint.read_state(checkpoint.path_of(args.place, step))['run_name']
    copies = copier.Copier(args.copy_to, args.place, run_name)
    whole = None
    while whole is None:
        whole = copies.finish(patience=float('inf'))
        for line in copies.news():
            print(line, flush=True)
    print(f"all {'' if whole else 'whole '}checkpoints of {run_name} are at {copies.root}")
    return 0 if whole else 1


if __name__ == '__main__':
    sys.exit(main())
