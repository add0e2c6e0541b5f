"""
One call on a machine with a GPU: is it correct, how fast is every shipped recipe, how much memory,
what do the kernels and the peers do.

    python bench/gpu.py                                  # all
    python bench/gpu.py --only throughput --recipes full_llama_1.36b full_gpt2_1.36b
    # the same in minutes, with tiny models: to see that the script itself works
    python bench/gpu.py --small --device=cpu

Each part is a process of its own that may fail, or take longer than --minutes, without ending the
rest; what it printed goes to the terminal and, all together, to --output (default: gpu.log), and
gpu.json beside it has the figures of the recipes.

Where the package is not installed: PYTHONPATH=. python bench/gpu.py
"""

import argparse
import glob
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

from onetrain.command_line import number, run_command

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

FAMILIES = ('gpt2', 'llama', 'llama3', 'qwen3', 'neox', 'moe')
SMALL = [
    '--n_layer=1',
    '--n_embd=64',
    '--n_head=2',
    '--head_dim=None',
    '--num_key_value_heads=None',
    '--d_ff=128',
    '--expert_d_ff=64',
    '--block_size=64',
    '--batch_size=2',
    '--gradient_accumulation_steps=1',
    '--total_batch_size=0',
    '--compile=False',
]
RECIPES = (
    'full_llama_1.36b',
    *sorted(
        {
            os.path.basename(path).removesuffix('.py')
            for pattern in ('full_*', 'moe_*', 'train_gpt2')
            for path in glob.glob(f'{ROOT}/config/{pattern}.py')
        }
        - {'full_llama_1.36b'}
    ),
)
PARTS = (
    'correctness',
    'resume',
    'tests',
    'shipped',
    'throughput',
    'deterministic',
    'graphs',
    'float8',
    'memory',
    'peers',
    'stall',
    'generation',
)


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def correctness(args):
    """Loss and gradients of each family against attention written out, in eager mode, with all
    logits at once; relative norms of the difference.
    """
    import torch

    from model import Model
    from onetrain.model_config import resolve_shape

    n_layer, n_embd, T, vocabulary = (1, 64, 32, 500) if args.small else (4, 512, 1024, 32000)
    dtype = torch.float32 if args.device == 'cpu' else torch.bfloat16
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    failed = []
    for family in FAMILIES:
        shape = resolve_shape(
            dict(
                arch_preset=family,
                n_layer=n_layer,
                n_head=8,
                n_embd=n_embd,
                block_size=T,
                vocab_size=vocabulary,
            )
        )
        torch.manual_seed(0)
        x, y = (torch.randint(0, vocabulary, (2, T), device=args.device) for _ in range(2))

        def result(backend, chunk, compiled):
            model = Model.on_meta(shape, backend, loss_chunk=chunk).allocate(args.device)
            model.init_weights(0, 'cpu')
            call = torch.compile(model) if compiled else model
            with torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32):
                loss = call(x, y)
            loss.backward()
            return loss.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters()])

        loss, gradient = result('manual', 0, False)
        backends = ['sdpa'] + [
            name
            for name in ('flash_attn_2', 'flash_attn_3', 'flash_attn_4', 'cudnn')
            if args.device == 'cuda' and _installed(name)
        ]
        ways = (
            {name: (name, 0, False) for name in backends}
            | {'chunks': ('sdpa', 2 * T // 4, False)}
            | ({} if args.device == 'cpu' else {'compiled': ('sdpa', 0, True)})
            | (
                {'compiled, chunks': ('sdpa', 2 * T // 4, True)}
                if args.device == 'cuda' and family == 'llama'
                else {}
            )
        )
        for name, way in ways.items():
            found = result(*way)
            off = abs(found[0] - loss).item() / loss.item(), difference(found[1], gradient)
            if max(off) > (0.2 if family == 'moe' and dtype == torch.bfloat16 else tolerance):
                failed.append(f'{family}, {name}')
            print(f'{family:>8}, {name:>18}: loss {off[0]:.1e}, gradient {off[1]:.1e}', flush=True)
    if failed:
        sys.exit(f'above {tolerance} (experts in bfloat16: 0.2): {", ".join(failed)}')
    print(
        f'all within {tolerance} (experts in bfloat16: 0.2, since rounding moves some tokens to'
        ' other experts)'
    )


def _installed(name):
    import torch

    from onetrain.ops.attention import choose_backend

    return choose_backend(name, 'cuda', torch.bfloat16, 64, 0.0)[0] == name


def resume(args):
    """A run that was stopped half-way and continued against one that was not, bit by bit."""
    from step import write_noise

    from onetrain.logs.read_log import load_run

    with tempfile.TemporaryDirectory() as folder:
        write_noise(f'{folder}/noise', 500, 100_000)
        common = [
            f'--dataset={folder}/noise',
            '--arch_preset=llama',
            '--n_layer=2',
            '--n_head=4',
            '--n_embd=128',
            '--block_size=512',
            '--batch_size=4',
            '--gradient_accumulation_steps=2',
            '--warmup_iters=2',
            '--eval_interval=5',
            '--eval_iters=2',
            '--log_interval=1',
            '--lr_decay_iters=10',
            f'--device={args.device}',
            f'--compile={args.device != "cpu"}',
        ]
        for out, steps in (
            ('whole', ['--max_iters=10']),
            ('parts', ['--max_iters=5']),
            ('parts', ['--max_iters=10', '--init_from=resume']),
        ):
            subprocess.run(
                [sys.executable, f'{ROOT}/train.py', *common, f'--out_dir={folder}/{out}', *steps],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        losses = [
            dict(zip(run.iters.tolist(), run.columns['loss'].tolist()))
            for run in (load_run([f'{folder}/{out}']) for out in ('whole', 'parts'))
        ]
    if losses[0] != losses[1]:
        sys.exit(f'the runs differ: {losses}')
    print(
        '10 iterations, stopped and resumed after 5: the same losses to the last bit, the last'
        f' {losses[0][10]}'
    )


def throughput(args):
    """bench/throughput.py for each shipped recipe, with the largest batch_size that is predicted to
    fit, one micro-step an iteration.
    """
    rows = {}
    for path in [f'{ROOT}/config/{name}.py' for name in args.recipes]:
        settings = (
            [*SMALL, '--iterations=2', '--warmup=1']
            if args.small
            else [
                '--total_batch_size=0',
                '--gradient_accumulation_steps=1',
                '--dtype=bfloat16',
                '--compile=True',
                '--iterations=10',
                '--largest',
            ]
        )
        done = subprocess.run(
            [
                sys.executable,
                f'{ROOT}/bench/throughput.py',
                path,
                *settings,
                f'--device={args.device}',
                '--json',
            ],
            capture_output=True,
            text=True,
        )
        print(
            (
                done.stdout.rsplit('\n{', 1)[0]
                if done.returncode == 0
                else (
                    f'{os.path.basename(path)}:'
                    f' {(done.stderr.strip().splitlines() or ["failed"])[-1]}'
                )
            ),
            flush=True,
        )
        if done.returncode == 0:
            rows[os.path.basename(path)] = json.loads(done.stdout.strip().splitlines()[-1])
        with open(args.output.removesuffix('.log') + '.json', 'w') as f:
            json.dump(rows, f, indent=2)
    if not rows:
        sys.exit('no recipe ran')


def shipped(args):
    """The recipe with its own batch_size and accumulation, and where its time goes."""
    path = f'{ROOT}/config/{args.recipes[0]}.py'
    settings = SMALL if args.small else ['--dtype=bfloat16', '--compile=True']
    for script, more in (
        ('throughput', ['--iterations=2' if args.small else '--iterations=5']),
        ('step_parts', []),
    ):
        subprocess.run(
            [
                sys.executable,
                f'{ROOT}/bench/{script}.py',
                path,
                *settings,
                *more,
                f'--device={args.device}',
            ],
            check=True,
        )


def against(args, title, recipe, settings, key):
    """Tokens per second of a recipe with a key False and True, in turns, two rounds."""
    settings = [
        *settings,
        '--total_batch_size=0',
        *(SMALL if args.small else ['--dtype=bfloat16']),
        f'--iterations={2 if args.small else 10}',
        f'--device={args.device}',
        '--json',
    ]
    found = {False: [], True: []}
    for on in (False, True) if args.small else (False, True, True, False):
        if args.device == 'cpu' and key == 'use_cuda_graphs' and on:
            continue
        done = subprocess.run(
            [
                sys.executable,
                f'{ROOT}/bench/throughput.py',
                f'{ROOT}/config/{recipe}',
                *settings,
                f'--{key}={on}',
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(done.stderr)
        found[on].append(json.loads(done.stdout.strip().splitlines()[-1])['tokens_per_sec'])
    middle = {on: sum(speeds) / len(speeds) for on, speeds in found.items() if speeds}
    print(
        f'{title}: '
        + ', '.join(f'{key}={on} {speed:,.0f} tokens/s' for on, speed in middle.items())
        + (f', {middle[True] / middle[False]:.2f} times' if len(middle) == 2 else ''),
        flush=True,
    )


def deterministic(args):
    """What it costs that a run repeats to the last bit."""
    against(
        args,
        '1.36 B, 8 x 2048',
        'full_llama_1.36b.py',
        ['--batch_size=8', '--gradient_accumulation_steps=1', f'--compile={not args.small}'],
        'deterministic',
    )


def graphs(args):
    """CUDA graphs against none, for long and short kernels. That both compute the same is seen by
    the run itself, which refuses graphs otherwise.
    """
    for title, compiled, settings in (
        ('124 M, 12 x 1024', True, []),
        ('124 M, 2 x 1024', True, ['--batch_size=2']),
        ('124 M, 2 x 1024, eager', False, ['--batch_size=2']),
        (
            '11 M, 64 x 256',
            True,
            ['--n_layer=6', '--n_embd=384', '--n_head=6', '--block_size=256', '--batch_size=64'],
        ),
    ):
        against(
            args,
            title,
            'train_gpt2.py',
            [
                '--batch_size=12',
                '--gradient_accumulation_steps=4',
                *settings,
                f'--compile={compiled and not args.small}',
            ],
            'use_cuda_graphs',
        )


def float8(args):
    """float8 matmuls against bfloat16; and their loss on the same batches for a while."""
    from step import write_noise

    from onetrain.logs.read_log import load_run

    if _missing('torchao'):
        sys.exit('the package torchao is not installed: pip install torchao')
    size = (
        [
            '--n_layer=1',
            '--n_embd=352',
            '--n_head=4',
            '--d_ff=1040',
            '--block_size=64',
            '--batch_size=2',
        ]
        if args.small
        else ['--batch_size=16']
    )
    common = [*size, '--gradient_accumulation_steps=1', f'--compile={not args.small}']
    if not args.small:
        against(args, '1.36 B, 16 x 2048', 'full_llama_1.36b.py', common, 'fp8')
    with tempfile.TemporaryDirectory() as folder:
        write_noise(f'{folder}/noise', 32000, 200_000)
        for on in (False, True):
            subprocess.run(
                [
                    sys.executable,
                    f'{ROOT}/train.py',
                    f'{ROOT}/config/full_llama_1.36b.py',
                    f'--dataset={folder}/noise',
                    f'--out_dir={folder}/{on}',
                    *common,
                    f'--n_layer={1 if args.small else 6}',
                    '--total_batch_size=0',
                    '--warmup_iters=5',
                    '--max_iters=20',
                    '--eval_at_start=False',
                    '--eval_interval=1000',
                    '--checkpoint_interval=1000',
                    '--log_interval=1',
                    f'--device={args.device}',
                    f'--fp8={on}',
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        losses = [load_run([f'{folder}/{on}']).columns['loss'] for on in (False, True)]
    print(
        f'loss after 20 iterations {losses[0][-1]:.4f}, in float8 {losses[1][-1]:.4f}; the largest'
        f' relative difference on the way {max(abs(b - a) / a for a, b in zip(*losses)):.1e}'
    )


def generation(args):
    """bench/generation.py with a model of 124 M parameters, trained for an iteration."""
    from step import write_noise

    with tempfile.TemporaryDirectory() as folder:
        write_noise(f'{folder}/noise', 257, 100_000, 'bytes')
        subprocess.run(
            [
                sys.executable,
                f'{ROOT}/train.py',
                f'{ROOT}/config/train_gpt2.py',
                f'--dataset={folder}/noise',
                f'--out_dir={folder}/run',
                *(SMALL if args.small else ['--batch_size=1', '--compile=False']),
                '--gradient_accumulation_steps=1',
                '--max_iters=1',
                '--eval_at_start=False',
                '--eval_interval=1000',
                '--wandb_log=False',
                f'--device={args.device}',
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        subprocess.run(
            [
                sys.executable,
                f'{ROOT}/bench/generation.py',
                f'--out_dir={folder}/run',
                f'--device={args.device}',
                *(
                    ['--new_tokens=8', '--rounds=1']
                    if args.small
                    else ['--new_tokens=512', '--rounds=3']
                ),
                '--ways',
                'cached',
                'anew',
                'compiled',
            ],
            check=True,
        )


def _missing(package):
    import importlib.util

    return importlib.util.find_spec(package) is None


def commands(args):
    """{part: command} of those that are scripts of their own."""
    device, small = f'--device={args.device}', args.small
    return {
        'tests': [
            '-m',
            'pytest',
            '-q',
            '-rs',
            *(
                ['tests/ops/test_cross_entropy.py']
                if small
                else [
                    '-k',
                    'gpu or a_run',
                    *(
                        f'tests/{name}.py'
                        for name in (
                            'training/test_no_sync',
                            'training/test_graphs',
                            'ops/test_fp8',
                            'ops/test_attention',
                            'distributed/test_layouts',
                        )
                    ),
                ]
            ),
        ],
        'memory': [
            'bench/memory_prediction.py',
            device,
            *(
                ['--models', 'gpt2:2:64:2:64:2:500:none']
                if small
                else [
                    '--dtype=bfloat16',
                    '--models',
                    'gpt2:12:768:12:1024:16:50304:none',
                    'llama:24:2048:16:2048:8:32000:none',
                    'llama:24:2048:16:2048:8:32000:selective',
                    'qwen3:8:2048:16:2048:4:151936:full',
                ]
            ),
        ],
        'peers': [
            'bench/peers.py',
            device,
            *(
                [
                    '--n_layer=1',
                    '--n_embd=64',
                    '--n_head=2',
                    '--rounds=1',
                    '--steps=1',
                    '--warmup=1',
                    '--batch_size=1',
                ]
                if small
                else [
                    '--dtype=bfloat16',
                    '--n_layer=12',
                    '--n_head=12',
                    '--n_embd=768',
                    '--block_size=1024',
                    '--batch_size=16',
                    '--steps=10',
                ]
            ),
        ],
        'stall': [
            'bench/checkpoint_stall.py',
            *(
                [
                    '--n_layer=1',
                    '--n_embd=64',
                    '--n_head=2',
                    '--vocab_size=500',
                    '--saves=1',
                    '--steps=2',
                ]
                if small
                else [
                    '--n_layer=18',
                    '--n_embd=2304',
                    '--n_head=18',
                    '--vocab_size=32000',
                    '--batch_size=8',
                    '--block_size=2048',
                    '--saves=2',
                ]
            ),
        ],
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'))
    parser.add_argument('--small', action='store_true', help='tiny models')
    parser.add_argument('--only', nargs='+', choices=PARTS, default=PARTS)
    parser.add_argument(
        '--recipes',
        nargs='+',
        choices=RECIPES,
        default=RECIPES,
        help='of throughput; shipped takes the first',
    )
    parser.add_argument('--minutes', type=number(), default=20, help='that a part may take')
    parser.add_argument('--output', default='gpu.log')
    parser.add_argument('--part', choices=PARTS, help='one process: this part')
    args = parser.parse_args()
    if args.part:
        return {
            'correctness': correctness,
            'resume': resume,
            'shipped': shipped,
            'throughput': throughput,
            'graphs': graphs,
            'deterministic': deterministic,
            'float8': float8,
            'generation': generation,
        }[args.part](args)
    results, begun = {}, time.monotonic()
    with open(args.output, 'w') as log:

        def say(line):
            print(line, flush=True)
            log.write(line + '\n')
            log.flush()

        for part in args.only:
            say(f'\n==== {part}, {time.monotonic() - begun:.0f} s after the start')
            command = commands(args).get(part) or [
                'bench/gpu.py',
                f'--part={part}',
                f'--device={args.device}',
                f'--output={os.path.abspath(args.output)}',
                *['--small'] * args.small,
                '--recipes',
                *args.recipes,
            ]
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            limit = threading.Timer(
                60 * args.minutes,
                lambda group=process.pid: (
                    say(f'{args.minutes:g} minutes are over'),
                    os.killpg(group, signal.SIGKILL),
                ),
            )
            limit.start()
            for line in process.stdout:
                say(line.rstrip())
            results[part] = process.wait()
            limit.cancel()
        say(
            '\n'
            + ', '.join(
                f'{part} {"ok" if code == 0 else f"FAILED ({code})"}'
                for part, code in results.items()
            )
        )
    return max(results.values())


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
