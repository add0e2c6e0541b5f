"""
The fastest way to run a recipe on this machine: tries its settings one after the other, in short
runs of train.py, and prints the best command line, a table and a picture.

    python bench/fastest_settings.py config/full_llama_1.36b.py
    python bench/fastest_settings.py config/demo_pystdlib.py --minutes=5 --device=cpu
    python bench/fastest_settings.py config/train_gpt2.py --output=sweep_gpt2.png --iterations=8

Takes all keys of train.py, of which those given are not tried, and those below. In this order,
keeping the best of each: batch_size (the tokens of an iteration stay as they are), compile,
activation checkpointing with twice the batch_size, attention_backend, loss_chunk, CUDA graphs. What
runs out of memory or fails is a line of the table too. Each try is a process of its own on random
ids, and nothing of it is kept. What seems faster than the best so far, or is less than 2 % slower,
is run once more, in turns with it, before it replaces it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from step import ROOT, config_of, device_of, vocabulary_of, write_noise

from onetrain.config import UserError
from onetrain.logs.read_log import load_run
from onetrain.ops import kernels
from onetrain.ops.cross_entropy import choose_chunk


def main(argv=None):
    """Prints; returns (best settings, rows)."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, default, what in (
        ('iterations', 6, 'of each try'),
        ('minutes', 10.0, 'after which no try begins'),
        ('seconds', 180, 'that a try may take'),
        ('output', 'sweep.png', 'the picture'),
    ):
        parser.add_argument(
            f'--{name}', type=type(default), default=default, help=f'{what}, default: {default}'
        )
    own, argv = parser.parse_known_args(argv)
    if all(word.startswith('-') for word in argv):
        raise UserError(
            'no recipe is named: give a config file, such as config/full_llama_1.36b.py'
        )
    if own.iterations < 1 or not own.minutes > 0 or own.seconds < 1:
        raise UserError('--iterations and --seconds must be at least 1, --minutes above 0')
    c = config_of(argv)
    vocabulary = vocabulary_of(c)
    with tempfile.TemporaryDirectory() as folder:
        write_noise(
            os.path.join(folder, 'noise'), vocabulary, max(2_000_000, 2 * c.block_size * 100)
        )
        sweep = Sweep(argv, c, vocabulary, folder, own)
        sweep.run()
    print('\n' + sweep.table())
    if not sweep.speed(sweep.best):
        sys.exit(
            'nothing ran to its end: the lines above say why (--seconds gives each try more time)'
        )
    best = ' '.join(f'--{key}={value}' for key, value in sweep.best.items())
    print(f'\nbest: python train.py {" ".join(argv)} {best}'.rstrip())
    print(
        f'{sweep.speed(sweep.best):,.0f} tokens/s, {sweep.speed(sweep.best) / sweep.speed({}):.2f}'
        ' times the recipe as it stands'
        if sweep.speed({})
        else f'{sweep.speed(sweep.best):,.0f} tokens/s'
    )
    sweep.draw(own.output)
    print(f'wrote {own.output}')
    return sweep.best, sweep.rows


class Sweep:
    """best: settings that differ from the recipe; rows: (settings, tokens per second or None, GB or
    None, what went wrong or '').
    """

    def __init__(self, argv, c, vocabulary, folder, own):
        self.argv, self.c, self.vocabulary, self.folder, self.own = argv, c, vocabulary, folder, own
        self.given = {
            word.removeprefix('--').split('=')[0] for word in argv if word.startswith('--')
        }
        self.best, self.rows, self.ends = {}, [], time.monotonic() + 60 * own.minutes
        self.on_gpu = device_of(c).type == 'cuda'
        self.sequences = (
            (c.total_batch_size // c.block_size)
            if c.total_batch_size
            else c.batch_size * c.gradient_accumulation_steps
        )

    def run(self):
        self.attempt({})
        for name, tries in (
            ('batch_size', self.batch_sizes),
            ('compile', lambda: [{'compile': not self.now('compile')}]),
            ('activation_checkpointing', self.recomputed),
            (
                'attention_backend',
                lambda: [
                    {'attention_backend': backend}
                    for backend in self.backends()
                    if backend != self.now('attention_backend')
                ],
            ),
            ('loss_chunk', lambda: [{'loss_chunk': 0}] if self.in_chunks() else []),
            ('use_cuda_graphs', lambda: [{'use_cuda_graphs': True}] if self.on_gpu else []),
        ):
            if name in self.given:
                continue
            for change in tries():
                if time.monotonic() > self.ends:
                    print(f'{self.own.minutes:g} minutes are over')
                    return
                self.attempt({**self.best, **change})

    def now(self, key):
        return self.best.get(key, getattr(self.c, key))

    def batch(self, size):
        return {
            'batch_size': size,
            **(
                {}
                if self.c.total_batch_size
                else {'gradient_accumulation_steps': self.sequences // size}
            ),
        }

    def batch_sizes(self):
        """Twice as large ones as long as they are faster; if none was, half as large ones."""
        sizes = [size for size in range(1, self.sequences + 1) if self.sequences % size == 0]
        for further in (
            lambda size: min((s for s in sizes if s >= 2 * size), default=None),
            lambda size: max((s for s in sizes if s <= size / 2), default=None),
        ):
            size = further(self.c.batch_size)
            while size:
                yield self.batch(size)
                size = further(size) if self.now('batch_size') == size else None
            if self.best:
                return

    def recomputed(self):
        more = 2 * self.now('batch_size')
        return (
            [
                {'activation_checkpointing': kind, **self.batch(more)}
                for kind in ('selective', 'full')
            ]
            if self.sequences % more == 0
            else []
        )

    def backends(self):
        return (
            [
                'sdpa',
                *(['cudnn'] if not self.c.deterministic else []),
                'flash_attn_2',
                'flash_attn_3',
                'flash_attn_4',
            ]
            if self.on_gpu
            else ['sdpa', 'blocks', 'manual']
        )

    def in_chunks(self):
        return choose_chunk(
            None,
            self.now('batch_size') * self.c.block_size,
            self.vocabulary,
            device_of(self.c).type,
            kernels.precision(self.c.dtype, device_of(self.c), self.c.n_embd or 0),
            self.now('compile'),
        )[0]

    def speed(self, settings):
        found = [speed for tried, speed, _, _ in self.rows if tried == settings and speed]
        return statistics.median(found) if found else 0.0

    def attempt(self, settings):
        """Run with `settings` and keep them if they are the best."""
        self.measure(settings)
        if settings == self.best:
            return
        if 0 < 0.98 * self.speed(self.best) < self.speed(settings):
            self.measure(self.best)
            self.measure(settings)
        if self.speed(settings) > self.speed(self.best):
            self.best = settings

    def measure(self, settings):
        out = tempfile.mkdtemp(dir=self.folder)
        iterations = self.own.iterations
        words = [f'--{key}={value}' for key, value in settings.items()]
        command = [
            sys.executable,
            os.path.join(ROOT, 'train.py'),
            *self.argv,
            *words,
            f'--out_dir={out}',
            f'--dataset={self.folder}/noise',
            f'--vocab_size={self.vocabulary}',
            f'--max_iters={iterations + 1}',
            f'--lr_decay_iters={iterations + 1}',
            '--warmup_iters=0',
            '--eval_interval=1000000',
            '--checkpoint_interval=1000000',
            '--eval_at_start=False',
            '--log_interval=1',
            '--sample_interval=0',
            '--eval_tasks=None',
            '--init_from=scratch',
            '--auto_resume=False',
        ]
        speed = memory = None
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=self.own.seconds, cwd=ROOT
            )
            problem = (
                ''
                if done.returncode == 0
                else (
                    'out of memory'
                    if 'out of memory' in done.stderr.lower() or done.returncode == -9
                    else (done.stderr.strip().splitlines() or ['failed'])[-1][:90]
                )
            )
        except subprocess.TimeoutExpired:
            problem = f'more than {self.own.seconds} s'
        if not problem:
            columns = load_run([out]).columns
            speed = float(statistics.median(columns['tokens_per_sec'][1:]))
            memory = float(columns['memory.max_allocated_gb'].max())
        self.rows.append((settings, speed, memory, problem))
        print(
            f'{" ".join(words) or "as it stands"}: '
            + (f'{speed:,.0f} tokens/s, {memory:.2f} GB' if speed else problem),
            flush=True,
        )

    def table(self):
        lines = [f'{"tokens/s":>12}  {"GB":>7}  settings']
        for settings, speed, memory, problem in sorted(self.rows, key=lambda row: -(row[1] or 0)):
            shown = ' '.join(f'{key}={value}' for key, value in settings.items()) or 'as it stands'
            lines.append(
                f'{speed:12,.0f}  {memory:7.2f}  {shown}'
                if speed
                else f'{"-":>12}  {"-":>7}  {shown}: {problem}'
            )
        return '\n'.join(lines)

    def draw(self, path):
        """A bar for each setting, the recipe as it stands in another color."""
        import matplotlib

        matplotlib.use('Agg')
        from matplotlib import pyplot

        rows = [(settings, speed) for settings, speed, _, _ in self.rows if speed]
        figure, axes = pyplot.subplots(figsize=(9, 1 + 0.4 * len(rows)))
        names = [
            f'{i}.'
            f' {" ".join(f"{key}={value}" for key, value in settings.items()) or "as it stands"}'
            for i, (settings, _) in enumerate(rows, 1)
        ]
        axes.barh(
            names,
            [speed for _, speed in rows],
            color=[
                'tab:green' if settings == self.best else 'tab:gray' if not settings else 'tab:blue'
                for settings, _ in rows
            ],
        )
        axes.invert_yaxis()
        axes.set(xlabel='tokens per second')
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


if __name__ == '__main__':
    from onetrain.command_line import run_command

    sys.exit(run_command(lambda argv: main(argv) and None))
