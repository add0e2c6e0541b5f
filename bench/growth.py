"""
Measures what grows with the length of a run, the size of its data and the number of its processes,
and draws it.

    python bench/growth.py measure --out=after.jsonl                          every part, in minutes
    # the same of another version
    python bench/growth.py measure --code=OTHER_CHECKOUT --out=before.jsonl
    python bench/growth.py measure --only log parts --out=after.jsonl
    python bench/growth.py draw before.jsonl after.jsonl --output=bench/growth.png

Each point is a process of its own, so that its peak memory is its own; one that takes longer than
--limit seconds is given up and noted. A line of the output is {"part", "x", "seconds", "peak_mb"}.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

POINTS = {  # part: (values of x, what x is)
    'log': ((1_000, 10_000, 100_000, 1_000_000), 'iterations logged, with the .json'),
    'log_experts': ((100, 1_000, 10_000), 'iterations logged, 48 layers of 128 experts'),
    'resume': ((1_000, 10_000, 100_000, 1_000_000), 'iterations in a log that is continued'),
    'plot': ((1_000, 10_000, 100_000, 1_000_000), 'iterations in a log that is drawn'),
    'stated': ((1, 10, 50), 'GB of tokens opened, with a meta.pkl'),
    'unstated': ((1, 10, 50), 'GB of tokens opened again, without a meta.pkl'),
    'parts': ((100, 1_000, 10_000, 60_000), 'files of a data set opened, 1,024 descriptors'),
    'agreement': ((2, 4, 8, 16), 'ranks that agree beside a micro-step of 50 ms'),
    'open_files': ((2, 4, 8, 16), 'ranks, each with so many open files'),
    'save': ((1, 2, 4, 8), 'ranks that save a checkpoint of 1 GB'),
    'save_mb': ((256, 512, 1024, 2048), 'MB of a checkpoint that 2 ranks save'),
    'verify': ((1, 2, 4, 8), 'ranks that verify a checkpoint of 1 GB'),
    'verify_mb': ((256, 512, 1024, 2048), 'MB of a checkpoint that 2 ranks verify'),
    'muon': ((1, 2, 4, 8), 'ranks that take a step of Muon, 48 matrices'),
    'prepare': ((100, 1_000, 10_000), 'text files of 300 bytes that are prepared'),
}


def iteration(step, experts=0):
    """The fields of a logged iteration, as train.py gives them."""
    mfu = {
        'mfu': 0.41,
        'mfu_percent': 41.0,
        'flops_achieved': 4.1e14,
        'flops_per_token': 8.9e9,
        'tokens_per_sec': 46112.5,
        'hardware_peak_flops': 9.89e14,
        'hardware_peak_tflops': 989.0,
        'achieved_tflops': 405.5,
        'gpu_name': 'NVIDIA H100',
        'precision': 'bfloat16',
        'num_gpus': 1,
        'attention_flops_per_layer': 1.1e8,
        'ffn_flops_per_layer': 2.2e8,
        'attention_to_ffn_ratio': 0.5,
        'architecture': '18L-18H-2304D-RoPE-RMS-SwiGLU-PreNorm',
    }
    fields = dict(
        iter=step,
        loss=3.0 + 8.0 / step,
        lr=3e-4,
        tokens_seen=step * 524288,
        time_ms=301.25,
        tokens_per_sec=46112.5,
        data_wait_ms=0.01,
        comm_wait_ms=None,
        wall_s=0.3 * step,
        mfu=mfu,
        memory={
            'allocated_gb': 20.5,
            'reserved_gb': 30.5,
            'max_allocated_gb': 60.5,
            'max_reserved_gb': 70.5,
        },
        gradients={'global_norm': 0.512345},
        skipped={'bad': 0, 'spikes': 0},
    )
    if experts:
        import torch

        from onetrain.ops import experts as of_experts

        routing = torch.rand(48, 128 + of_experts.STATISTICS)
        every = of_experts.routing_report.__code__.co_argcount > 5
        shares = (step % 100 == 1,) if every else ()
        fields['moe'] = of_experts.routing_report(
            routing, range(48), [torch.zeros(128)] * 48, 4096, 8, *shares
        )
    return fields


def log(count, folder, experts=0):
    from onetrain.logs.run_log import RunLog

    run = RunLog(folder, 'run_20260101_000000', {'config': {}, 'startup_info': {}, 'metadata': {}})
    fields = iteration(1, experts)
    with_shares, without = fields, iteration(2, experts)
    for step in range(1, count + 1):
        run.event('iter', **{**(with_shares if step % 100 == 1 else without), 'iter': step})
    run.close()


def written_log(count, folder):
    """A log of `count` iterations that was not ended, made without the code that is measured."""
    with open(os.path.join(folder, 'run_20260101_000000.jsonl'), 'w') as f:
        f.write(
            json.dumps(
                {
                    'type': 'header',
                    'format': 1,
                    'run_name': 'run_20260101_000000',
                    'start_time': '2026-01-01T00:00:00+00:00',
                    'config': {},
                    'startup_info': {},
                    'metadata': {},
                }
            )
            + '\n'
        )
        for step in range(1, count + 1):
            f.write(json.dumps({'type': 'iter', **iteration(step)}) + '\n')
        f.flush()
        os.fsync(f.fileno())


def resume(count, folder):
    from onetrain.logs.run_log import RunLog

    RunLog(
        folder,
        'run_20260101_000000',
        {'config': {}, 'startup_info': {}, 'metadata': {}},
        resume_step=count - 10,
        save_json=False,
    )


def plot(count, folder):
    import plot_single_run

    plot_single_run.main([folder])


def token_files(gigabytes, folder, stated):
    from onetrain.data.token_file import fingerprint_of_files

    for split, size in (('train', gigabytes * 2**30), ('val', 2**20)):
        with open(os.path.join(folder, f'{split}.bin'), 'wb') as f:
            f.truncate(size)
    if stated:
        paths = {split: os.path.join(folder, f'{split}.bin') for split in ('train', 'val')}
        meta = {
            'vocab_size': 50257,
            'dtype': 'uint16',
            'max_id': dict.fromkeys(paths, 0),
            'tokens': {split: os.path.getsize(path) // 2 for split, path in paths.items()},
            'fingerprint': {split: fingerprint_of_files([path]) for split, path in paths.items()},
        }
        with open(os.path.join(folder, 'meta.pkl'), 'wb') as f:
            pickle.dump(meta, f)


def open_data(folder):
    from onetrain.data.dataset import open_dataset

    train, _, _ = open_dataset(folder, '/')
    train.windows([0, 5000], 1024)


def part_files(count, folder):
    import numpy as np

    from onetrain.data.token_file import TokenFileWriter

    ids = np.arange(2000, dtype=np.uint16)
    with TokenFileWriter(
        folder, vocab_size=50257, eot_id=None, tokenizer={'kind': 'none'}, split='all', sharded=True
    ) as writer:
        for _ in range(count):
            writer.append('train', ids, [len(ids)])
        writer.append('val', ids, [len(ids)])


def on_rank(function, rank, size, port, answers, *args):
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    from onetrain.distributed import collectives, processes

    world = processes.start('cpu')
    answer = function(world, *args)
    if world.is_main:
        answers.put(answer)
    collectives.barrier(world)
    os._exit(0)


def on_ranks(size, function, *args):
    """What function(world, *args) returns on the main one of `size` gloo ranks, which are started
    for it.
    """
    import socket

    import torch.multiprocessing as multiprocessing

    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context('spawn')
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=on_rank, args=(function, rank, size, port, answers, *args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    answer = answers.get()
    for process in processes:
        process.join()
    return answer


def agree(world):
    """The median over 60 micro-steps of the seconds that agreeing adds."""
    from onetrain.distributed import collectives

    beside = collectives.Agreement(world) if hasattr(collectives, 'Agreement') else None
    collectives.barrier(world)
    waited = []
    for _ in range(60):
        begun = time.perf_counter()
        if beside:
            beside.begin(0)
            time.sleep(0.05)
            beside.end()
        else:
            collectives.all_reduce_max(0, world)
            time.sleep(0.05)
        waited.append(time.perf_counter() - begun - 0.05)
    return sorted(waited)[30]


def open_files(world):
    """The open files of a rank that takes part in a job and does nothing yet."""
    return len(os.listdir('/proc/self/fd'))


def save(world, folder, megabytes, and_verify):
    """Seconds in which the ranks save a checkpoint of theirs, or verify it."""
    import torch

    from onetrain.checkpoint import store
    from onetrain.checkpoint.async_writer import Saver
    from onetrain.distributed import collectives

    saver = Saver(folder, world, background=False)
    tensors = {f'model.{i}': torch.full((megabytes * 2**14,), float(i)) for i in range(16)}
    collectives.barrier(world)
    begun = time.perf_counter()
    saver.start(1, tensors, {})
    outcome = saver.wait()
    assert outcome.error is None, outcome.error
    collectives.barrier(world)
    if not and_verify:
        return time.perf_counter() - begun
    begun, path = time.perf_counter(), store.path_of(folder, 1)
    if hasattr(store, 'corruption_reasons'):
        assert store.corruption_reasons(path, world) is None
    else:
        assert collectives.broadcast_from_main(lambda: store.corruption_reason(path), world) is None
    return time.perf_counter() - begun


def muon(world):
    """The median over five steps of Muon's seconds, where every rank has all matrices in full."""
    import inspect

    import torch

    from onetrain.distributed import collectives
    from onetrain.training.muon import Muon

    generator = torch.Generator().manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(1024, 512, generator=generator)) for _ in range(48)]
    for matrix in matrices:
        matrix.grad = torch.randn(1024, 512, generator=generator)
    shared = {'ranks': world.size} if 'ranks' in inspect.signature(Muon).parameters else {}
    optimizer = Muon(
        [{'params': matrices, 'weight_decay': 0.1, 'muon': True}], 0.01, (0.9, 0.95), **shared
    )
    taken = []
    for _ in range(6):
        collectives.barrier(world)
        begun = time.perf_counter()
        optimizer.step()
        collectives.barrier(world)
        taken.append(time.perf_counter() - begun)
    return sorted(taken[1:])[2]


def text_files(count, folder):
    words = ' '.join(str(i) for i in range(20_000))
    for i in range(count):
        with open(os.path.join(folder, f'{i:06d}.txt'), 'w') as f:
            f.write(words[7 * i : 7 * i + 300])


def prepare(code, folder):
    subprocess.run(
        [
            sys.executable,
            os.path.join(code, 'data', 'own_text', 'prepare.py'),
            '--input',
            folder,
            '--tokenizer=bytes',
            f'--output={folder}/set',
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def one(part, x, folder, code):
    """Measure a point in this process: prints its seconds and peak memory as JSON."""
    import resource

    if part in ('resume', 'plot'):
        written_log(x, folder)
    elif part in ('stated', 'unstated'):
        token_files(x, folder, part == 'stated')
        if part == 'unstated':
            open_data(folder)
    elif part == 'parts':
        part_files(x, folder)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    elif part == 'prepare':
        text_files(x, folder)
    if part in ('log', 'log_experts', 'resume'):
        import onetrain.logs.run_log  # noqa: F401 (what it takes to import is not measured)
    if part in ('log_experts', 'stated', 'unstated', 'parts'):
        import onetrain.data.dataset  # noqa: F401
    work = {  # those that measure for themselves return seconds
        'log': lambda: log(x, folder),
        'log_experts': lambda: log(x, folder, experts=128),
        'resume': lambda: resume(x, folder),
        'plot': lambda: plot(x, folder),
        'stated': lambda: open_data(folder),
        'unstated': lambda: open_data(folder),
        'parts': lambda: open_data(folder),
        'agreement': lambda: on_ranks(x, agree),
        'open_files': lambda: on_ranks(x, open_files),
        'save': lambda: on_ranks(x, save, folder, 1024, False),
        'verify': lambda: on_ranks(x, save, folder, 1024, True),
        'save_mb': lambda: on_ranks(2, save, folder, x, False),
        'verify_mb': lambda: on_ranks(2, save, folder, x, True),
        'muon': lambda: on_ranks(x, muon),
        'prepare': lambda: prepare(code, folder),
    }
    begun = time.perf_counter()
    seconds = work[part]()
    seconds = time.perf_counter() - begun if seconds is None else seconds
    print(
        json.dumps(
            {
                'part': part,
                'x': x,
                'seconds': seconds,
                'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            }
        )
    )


def measure(args):
    for part in args.only:
        for x in POINTS[part][0]:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                code = os.path.abspath(args.code)
                environment = {**os.environ, 'PYTHONPATH': f'{code}:{code}/plots'}
                command = [
                    sys.executable,
                    os.path.abspath(__file__),
                    'one',
                    part,
                    str(x),
                    '--folder',
                    folder,
                    '--code',
                    code,
                ]
                try:
                    done = subprocess.run(
                        command,
                        capture_output=True,
                        text=True,
                        timeout=args.limit,
                        env=environment,
                    )
                    lines = done.stdout.strip().splitlines()
                    result = (
                        json.loads(lines[-1])
                        if done.returncode == 0
                        else {
                            'part': part,
                            'x': x,
                            'failed': done.stderr.strip().splitlines()[-1][:200],
                        }
                    )
                except subprocess.TimeoutExpired:
                    result = {'part': part, 'x': x, 'failed': f'more than {args.limit:g} s'}
            print(json.dumps(result), flush=True)
            with open(args.out, 'a') as f:
                f.write(json.dumps(result) + '\n')
            if 'failed' in result and 'more than' in result['failed']:
                break  # a larger one takes longer


def draw(args):
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot, ticker

    runs = []
    for path in args.logs:
        with open(path) as f:
            runs.append(
                (os.path.splitext(os.path.basename(path))[0], [json.loads(line) for line in f])
            )
    parts = [
        part
        for part in POINTS
        if any(r['part'] == part and 'seconds' in r for _, results in runs for r in results)
    ]
    columns = 3
    figure, axes = pyplot.subplots(
        -(-len(parts) // columns),
        columns,
        figsize=(14, 3.6 * -(-len(parts) // columns)),
        layout='constrained',
        squeeze=False,
    )
    for place in axes.flat[len(parts) :]:
        place.remove()
    for place, part in zip(axes.flat, parts):
        for (name, results), color in zip(runs, ('#d1603d', '#2f6690', '#4a8c5c')):
            found = sorted(
                (r['x'], r['seconds']) for r in results if r['part'] == part and 'seconds' in r
            )
            if found:
                place.plot(*zip(*found), 'o-', color=color, label=name)
            for r in results:
                if r['part'] == part and 'failed' in r:
                    place.plot([r['x']], [place.get_ylim()[1]], 'x', color=color, markersize=10)
        place.set(
            xscale='log',
            yscale='log',
            title=part,
            xlabel=POINTS[part][1],
            ylabel='open files' if part == 'open_files' else 'seconds',
        )
        place.set_xticks(POINTS[part][0], [f'{x:,}' for x in POINTS[part][0]])
        place.xaxis.set_minor_formatter(ticker.NullFormatter())
        place.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        place.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f'{value:g}'))
        place.yaxis.set_minor_formatter(ticker.NullFormatter())
        place.grid(True, which='both', color='#e8e8e8')
        place.legend()
    figure.suptitle('What grows: seconds by size (a cross: failed, or given up)')
    figure.savefig(args.output, dpi=110)
    print(args.output)


def seconds(text):
    """The `type` of --limit. The project's own are not imported here: --code says which version of
    it is.
    """
    if not text.replace('.', '', 1).isdecimal() or not 0 < float(text) < 1e6:
        raise argparse.ArgumentTypeError(f'{text!r} is no number of seconds')
    return float(text)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    of_measure = commands.add_parser('measure', help='measure and append the results to a file')
    of_measure.add_argument(
        '--only',
        nargs='+',
        choices=POINTS,
        default=list(POINTS),
        help='parts to measure (default: all)',
    )
    of_measure.add_argument(
        '--code',
        default=ROOT,
        metavar='FOLDER',
        help='the checkout that is measured (default: this one)',
    )
    of_measure.add_argument(
        '--out', required=True, metavar='FILE', help='.jsonl to which the results are appended'
    )
    of_measure.add_argument(
        '--limit',
        type=seconds,
        default=300.0,
        metavar='SECONDS',
        help='after which a point is given up (default: 300)',
    )
    of_measure.add_argument(
        '--folder',
        default=None,
        metavar='FOLDER',
        help='where temporary files go (default: that of the system)',
    )
    of_one = commands.add_parser('one', help='measure one point in this process')
    of_one.add_argument('part', choices=POINTS)
    of_one.add_argument('x', type=int)
    of_one.add_argument('--folder', required=True)
    of_one.add_argument('--code', default=ROOT)
    of_draw = commands.add_parser('draw', help='draw the results of one or more versions')
    of_draw.add_argument('logs', nargs='+', metavar='FILE')
    of_draw.add_argument('--output', default='growth.png', metavar='FILE')
    args = parser.parse_args(argv)
    if args.command == 'one':
        one(args.part, args.x, args.folder, args.code)
    else:
        {'measure': measure, 'draw': draw}[args.command](args)
    return 0


if __name__ == '__main__':
    sys.exit(main())
