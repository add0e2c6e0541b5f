"""
Ends a run again and again at random moments and lets it continue by itself; the result must be, to
the last bit, that of a run that nobody disturbed.

    export PYTHONPATH=.:tests
    python bench/kill_resume.py --kills=100                                  SIGKILL, one process
    # SIGKILL of all processes of a torchrun with two ranks
    python bench/kill_resume.py --kills=100 --processes=2
    # SIGTERM to torchrun's process group
    python bench/kill_resume.py --kills=20 --processes=2 --signal=TERM --compile=True

Each start is the same command, with --auto_resume=True. SIGKILL falls at a random moment of the
process's life: import, set-up, training, staging, writing, evaluation. After SIGTERM the processes
must be gone within 30 s, with a whole checkpoint of the step at which they stopped. Checked in the
end: losses of every iteration, the weights and the optimizer's state, no line of the JSONL lost or
doubled.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

from conftest import end_all, losses, make_dataset, records, weights

from onetrain.checkpoint import store
from onetrain.command_line import number, run_command, whole

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def command(out_dir, dataset, args):
    start = (
        [sys.executable]
        if args.processes == 1
        else [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            f'--nproc_per_node={args.processes}',
        ]
    )
    return [
        *start,
        os.path.join(ROOT, 'train.py'),
        f'--out_dir={out_dir}',
        f'--dataset={dataset}',
        '--auto_resume=True',
        '--device=cpu',
        f'--compile={args.compile}',
        '--n_layer=2',
        '--n_head=2',
        '--n_embd=32',
        '--block_size=16',
        '--batch_size=4',
        '--gradient_accumulation_steps=2',
        '--dropout=0.1',
        '--learning_rate=1e-3',
        '--warmup_iters=10',
        f'--max_iters={args.max_iters}',
        f'--lr_decay_iters={args.max_iters}',
        '--eval_interval=50',
        '--eval_iters=20',
        '--log_interval=1',
        '--checkpoint_interval=7',
        '--keep_every=500',
        '--save_log_to_json=False',
        *args.options,
    ]


def launch(out_dir, dataset, args, console):
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'passive'}
    return subprocess.Popen(
        command(out_dir, dataset, args),
        cwd=ROOT,
        env=environment,
        stdout=console,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def result(out_dir, max_iters):
    """What must be equal: losses by iteration, evaluations, bytes of the last checkpoint's
    tensors.
    """
    reason = store.corruption_reason(store.path_of(out_dir, max_iters))
    assert reason is None, reason
    steps = [r['iter'] for r in records(out_dir)]
    assert steps == list(range(1, max_iters + 1)), (
        f'a line of the JSONL is lost or doubled: {len(steps)} lines'
    )
    evaluations = [(r['iter'], r['train_loss'], r['val_loss']) for r in records(out_dir, 'eval')]
    assert [e[0] for e in evaluations] == list(range(0, max_iters + 1, 50)), evaluations
    return (
        losses(out_dir),
        evaluations,
        {name: tensor.numpy().tobytes() for name, tensor in weights(out_dir, max_iters).items()},
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kills', type=whole(0), default=100)
    parser.add_argument('--processes', type=whole(), default=1)
    parser.add_argument('--signal', choices=('KILL', 'TERM', 'USR1'), default='KILL')
    parser.add_argument('--compile', choices=('True', 'False'), default='False')
    parser.add_argument('--max_iters', type=whole(), default=2000)
    parser.add_argument(
        '--longest',
        type=number(),
        default=12.0,
        help='a start is ended after 0 to this many seconds',
    )
    parser.add_argument('--seed', type=whole(0), default=0)
    parser.add_argument('options', nargs='*', help='more keys for train.py')
    args = parser.parse_args(argv)
    chance = random.Random(args.seed)
    chosen = getattr(signal, f'SIG{args.signal}')
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(os.path.join(folder, 'data'))
        calm, out = os.path.join(folder, 'calm'), os.path.join(folder, 'out')
        console = open(os.path.join(folder, 'console'), 'w+')
        started = time.monotonic()
        code = launch(calm, dataset, args, console).wait(1800)
        assert code == 0, open(console.name).read()
        print(
            f'undisturbed: {args.max_iters} iterations in {time.monotonic() - started:.0f} s',
            flush=True,
        )
        kills, lives, slowest, moments = 0, 0, 0.0, {}
        while True:
            console.seek(0)
            console.truncate()
            before = store.newest_whole(out)[0] or 0
            process = launch(out, dataset, args, console)
            lives += 1
            try:
                code = process.wait(
                    chance.uniform(0.0, args.longest) if kills < args.kills else 1800
                )
            except subprocess.TimeoutExpired:
                kills += 1
                asked = time.monotonic()
                if args.signal == 'KILL':
                    end_all(process)
                    process.wait()
                else:
                    os.killpg(process.pid, chosen)
                    try:
                        code = process.wait(30)
                    except subprocess.TimeoutExpired:
                        end_all(process)
                        raise AssertionError(
                            'not gone within 30 s:\n' + open(console.name).read()
                        ) from None
                    slowest = max(slowest, time.monotonic() - asked)
                text = open(console.name).read()
                shown = [
                    line
                    for line in text.splitlines()
                    if line.startswith(('iter ', 'saved ', 'stopped ', 'onetrain '))
                ]
                moment = (
                    'training'
                    if any(line.startswith('iter ') for line in shown)
                    else 'set-up or compiling'
                    if shown
                    else 'starting'
                )
                moments[moment] = moments.get(moment, 0) + 1
                found = store.steps(out)
                step, rejected = store.newest_whole(out)
                assert not rejected, rejected
                assert (step or 0) >= before, (before, step)
                if args.signal != 'KILL' and moment == 'training':
                    done = max(losses(out), default=0)
                    stopped = 'nothing had to be saved' in text or done == 0
                    assert stopped or step == done, (step, done, text[-3000:])
                if kills % 10 == 0 or kills == args.kills:
                    print(
                        f'{kills} ended, {moments}; newest checkpoint {step}, on disk {len(found)}',
                        flush=True,
                    )
                continue
            assert code == 0, open(console.name).read()[-5000:]
            if kills >= args.kills:
                break
            # the run came to its end before enough kills: it is as good as the other; begin again
            # with what is left
            assert result(out, args.max_iters) == result(calm, args.max_iters), (
                'losses, evaluations or weights differ'
            )
            out += '+'
        assert result(out, args.max_iters) == result(calm, args.max_iters), (
            'losses, evaluations or weights differ'
        )
        print(
            f'{kills} times SIG{args.signal} in {lives} lives of {args.processes} process(es),'
            f' {moments}: losses, evaluations and weights equal to the last bit'
            + (f'; slowest exit {slowest:.1f} s' if args.signal != 'KILL' else '')
        )


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
