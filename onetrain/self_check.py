"""
Check in about a minute, on a CPU, that this copy keeps its promises on this machine.

    python3 start.py check

Trains a small model for 20 iterations; trains it again, kills the process, lets it continue and
compares losses and weights to the last bit; exports the model and compares it with transformers,
if that is installed.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time

from onetrain.command_line import ROOT, run_command
from onetrain.logs.run_json import read_records

ITERATIONS, KILLED_AFTER = 20, 11
SIZES = [
    '--device=cpu', '--compile=False', '--arch_preset=llama3', '--n_layer=2', '--n_head=4',
    '--num_key_value_heads=2', '--n_embd=64', '--block_size=64', '--batch_size=8', '--dropout=0.1',
    '--gradient_accumulation_steps=1', f'--max_iters={ITERATIONS}',
    f'--lr_decay_iters={ITERATIONS}', '--warmup_iters=2', '--learning_rate=1e-3',
    '--eval_interval=10', '--eval_iters=4', '--checkpoint_interval=5',
    '--keep_all_checkpoints=True',
]  # fmt: skip


def python(*words, **options):
    """Return a Popen of `python words` in the project's folder, whose output is read together."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(what: str, *words) -> None:
    """Run `python words` to its end. Raises ValueError with its output if it fails."""
    process = python(*words)
    output = process.communicate(timeout=600)[0]
    if process.returncode != 0:
        raise ValueError(f'{what} ended with exit code {process.returncode}:\n{output}')


def losses(folder: str) -> dict[int, float]:
    """Return {iteration: loss} of the only run in `folder`."""
    (name,) = (name for name in os.listdir(folder) if name.endswith('.jsonl'))
    return {
        r['iter']: r['loss']
        for r in read_records(os.path.join(folder, name))
        if r['type'] == 'iter'
    }


def step(text: str, begun: float) -> None:
    """Print what was checked and how long it took."""
    print(f'{time.monotonic() - begun:5.1f} s  {text}', flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the check; returns the exit code 0. Raises ValueError with what is wrong."""
    import torch

    from onetrain.checkpoint import store

    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        text, data = os.path.join(folder, 'text.txt'), os.path.join(folder, 'data')
        with open(text, 'w') as f:
            f.writelines(
                f'{i} times {i} is {i * i}, and {i} and {i} is {2 * i}.\n' for i in range(3000)
            )
        finish(
            'data/own_text/prepare.py',
            'data/own_text/prepare.py',
            '--input',
            text,
            '--tokenizer=bytes',
            f'--output={data}',
        )
        step('a data set is prepared', begun)
        train = ['train.py', f'--dataset={data}', *SIZES]
        calm, killed = os.path.join(folder, 'calm'), os.path.join(folder, 'killed')
        finish('train.py', *train, f'--out_dir={calm}')
        step(f'{ITERATIONS} iterations are trained', begun)
        process = python(*train, f'--out_dir={killed}', '--auto_resume=True')
        for line in process.stdout:
            if line.startswith(f'iter {KILLED_AFTER}/'):
                process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise ValueError('a run that was to be killed ended by itself')
        step(f'the same again was killed after iteration {KILLED_AFTER}', begun)
        finish('train.py', *train, f'--out_dir={killed}', '--auto_resume=True')
        if losses(calm) != losses(killed):
            raise ValueError('the run that was killed has other losses than the one that was not')
        a, b = (store.read_tensors(store.path_of(out, ITERATIONS)) for out in (calm, killed))
        kept = [name for name in a if name.startswith(('model.', 'optimizer.'))]
        different = [name for name in kept if not torch.equal(a[name], b[name])]
        if different or a.keys() != b.keys():
            raise ValueError(f'the run that was killed has other weights: {different[:3]}')
        step('it continued: losses and weights are the same to the last bit', begun)
        exported = importlib.util.find_spec('safetensors') is not None
        if not exported:
            step("the export is not checked: pip install -e '.[hf]' first", begun)
        else:
            compared = importlib.util.find_spec('transformers') is not None
            how = [] if compared else ['--no_check']
            finish('export.py', 'export.py', f'--out_dir={calm}', f'--to={folder}/export', *how)
            what = (
                'and computes what transformers does'
                if compared
                else 'not compared, without transformers'
            )
            step(f'it is exported, {what}', begun)
    print('all checks passed' if exported else 'the checks passed; the export was not checked')
    return 0


if __name__ == '__main__':
    sys.exit(run_command(main))
