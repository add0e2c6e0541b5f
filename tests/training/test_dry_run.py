"""A run is known before it starts: what it would be, where each value comes from, and whether it
fits.
"""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, run_process, run_train

import train as trainer
from onetrain.config import choices_of, described, help_text, resolve
from onetrain.data.dataset import NotPrepared, open_dataset
from onetrain.training import memory

RECIPES = sorted(name for name in os.listdir(os.path.join(ROOT, 'config')) if name.endswith('.py'))


# these two need a model of the hub
@pytest.mark.parametrize(
    'recipe', [name for name in RECIPES if name not in ('eval_gpt2.py', 'finetune_shakespeare.py')]
)
def test_every_recipe(recipe, tmp_path):
    """For a GPU that is not here and data that need not be."""
    code, output = run_process(
        'train.py',
        f'config/{recipe}',
        '--dry_run=True',
        '--device=cuda',
        f'--out_dir={tmp_path}/out',
    )
    assert (
        code == 0
        and re.search(r'^Memory: +[\d.]+ GB predicted for a step$', output, re.M)
        and '1 GPU (assumed)' in output
    ), output
    assert (
        f'  config/{recipe}:\n' in output
        and f'  command line:\n    out_dir={tmp_path}/out, device=cuda\n' in output
        and not os.listdir(tmp_path)
    )
    assert (
        max(
            len(line)
            for line in output.splitlines()
            if not line.startswith(('Note', 'WARNING')) and str(tmp_path) not in line
        )
        <= 100
    )


def test_eight_billion_parameters_take_less_than_a_gigabyte():
    # started by a small process: until it runs the program, a child counts as large as what it was
    # forked from
    code = (
        'import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True,'
        ' stdout=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)'
    )
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            code,
            sys.executable,
            'train.py',
            'config/full_llama3_8b.py',
            '--dry_run=True',
            '--device=cuda',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and 10**5 < int(done.stdout) < 10**6, done  # kilobytes


def test_of_data_that_are_there_and_of_a_checkpoint(dataset, tmp_path, capsys):
    assert run_train(dataset, tmp_path / 'run', '--max_iters=4', '--arch_preset=llama') == 0
    before = sorted((path, os.stat(path).st_mtime_ns) for path in (tmp_path / 'run').rglob('*'))
    capsys.readouterr()
    assert (
        trainer.main(
            [
                f'--out_dir={tmp_path}/run',
                '--init_from=resume',
                '--device=cpu',
                '--max_iters=9',
                '--dry_run=True',
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        'Weights:     checkpoint of iteration 4' in said
        and ', 20,000 training tokens' in said
        and f'  data set {dataset}:\n    vocab_size=' in said
    ), said
    origin = {
        key: source
        for source, keys in re.findall(r'^  (\S.*):\n((?:    .*\n?)+)', said, re.M)
        for key in re.findall(r'(\w+)=', keys)
    }
    assert (
        origin['max_iters'] == 'command line'
        and origin['n_layer'] == 'checkpoint'
        and origin['beta1'] == 'default'
    )
    assert set(origin) == {field for field in trainer.Config.__dataclass_fields__} - {'dry_run'}
    assert before == sorted(
        (path, os.stat(path).st_mtime_ns) for path in (tmp_path / 'run').rglob('*')
    )


def test_a_step_that_does_not_fit_is_refused(dataset, tmp_path, monkeypatch, capsys):
    """Before anything is allocated, with what would make it fit; not where the user says so."""
    monkeypatch.setattr(memory, 'available_memory', lambda device: 60 * 10**6)
    large = [
        '--n_embd=256',
        '--n_head=4',
        '--block_size=256',
        '--batch_size=8',
        '--max_iters=1',
        '--eval_iters=1',
        '--dtype=float32',
    ]
    assert run_train(dataset, tmp_path / 'a', *large) == 2
    error = capsys.readouterr().err
    found = re.search(
        r'error: ([\d.]+) GB predicted for a step \(parameters .*\), and 0.1 GB are free: (.*);'
        r' --ignore_memory=True starts all the same',
        error,
    )
    assert found and not os.path.exists(tmp_path / 'a'), error
    assert (
        '--batch_size=2 --gradient_accumulation_steps=4 takes 0.0' in found[2]
        and '--use_fsdp=True' not in found[2]  # on a CPU
        and 'activation_checkpointing' not in found[2]
    ), error
    # far too large: the largest that fits is found all the same
    assert run_train(dataset, tmp_path / 'b', *large, '--batch_size=65536') == 2
    assert '--batch_size=2 --gradient_accumulation_steps=32768' in capsys.readouterr().err
    assert run_train(dataset, tmp_path / 'b', *large, '--total_batch_size=2048') == 2
    assert '--batch_size=2 takes' in capsys.readouterr().err
    # recomputing alone does not suffice, nor does a smaller batch
    monkeypatch.setattr(memory, 'available_memory', lambda device: 100 * 10**6)
    assert run_train(dataset, tmp_path / 'b', *large, '--n_layer=6') == 2
    assert (
        'free: --activation_checkpointing=full --batch_size=2 --gradient_accumulation_steps=4 takes'
        in capsys.readouterr().err
    )
    monkeypatch.setattr(memory, 'available_memory', lambda device: 60 * 10**6)
    assert run_train(dataset, tmp_path / 'b', *large, '--ignore_memory=True') == 0
    capsys.readouterr()
    assert run_train(dataset, tmp_path / 'c', *large, '--dry_run=True') == 0
    assert (
        'WARNING: 0.' in (said := capsys.readouterr().out)
        and 'GB are free: ' in said
        and not os.path.exists(tmp_path / 'c')
    )


def test_what_costs_days_is_warned_of(dataset, tmp_path, capsys):
    assert (
        run_train(
            dataset,
            tmp_path,
            '--max_iters=4',
            '--lr_decay_iters=4',
            '--warmup_iters=6',
            '--eval_iters=100',
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        'WARNING: the learning rate never leaves its warm-up' in said
        and 'WARNING: the validation set has 249 sequences, fewer than the 400' in said
    )
    assert (
        run_train(dataset, tmp_path, '--init_from=resume', '--max_iters=1300', '--dry_run=True')
        == 0
    )
    capsys.readouterr()
    assert (
        run_train(
            dataset,
            tmp_path,
            '--init_from=resume',
            '--max_iters=1250',
            '--lr_decay_iters=4',
            '--eval_only=False',
            '--max_time=0.0001',
        )
        == 75
    )
    said = capsys.readouterr().out
    assert (
        'WARNING: all 1,246 iterations run at min_lr=6e-05' in said
        and 'WARNING: 4.0 epochs of the data' in said
    )
    lines = said.splitlines()
    start = lines[
        : next(i for i, line in enumerate(lines) if line.startswith(('iter ', '----', 'stopped')))
    ]
    assert start[-1].startswith('WARNING: ') or 'stopped' in lines[len(start)]


def test_a_learning_rate_that_jumps_is_warned_of(dataset, tmp_path, capsys):
    schedule = ['--lr_decay_iters=20', '--warmup_iters=2', '--min_lr=1e-4']
    assert run_train(dataset, tmp_path, '--max_iters=20', *schedule) == 0
    for more, expected in (
        (['--lr_decay_iters=80'], True),
        (['--learning_rate=5e-3', '--min_lr=1e-3'], True),
        ([], False),
        (['--min_lr=1.1e-4'], False),
    ):
        capsys.readouterr()
        assert (
            run_train(
                dataset, tmp_path, '--init_from=resume', '--max_iters=30', *more, '--dry_run=True'
            )
            == 0
        )
        assert (
            run_train(
                dataset, tmp_path, '--init_from=resume', '--max_iters=30', *more, '--eval_only=True'
            )
            == 0
        )
        assert ('WARNING: the learning rate goes from 1.' in capsys.readouterr().out) == expected, (
            more
        )


def test_a_small_model_with_a_huge_batch_is_refused_too(dataset, tmp_path, capsys):
    assert run_train(dataset, tmp_path, '--max_iters=1', '--batch_size=1000000') == 2
    error = capsys.readouterr().err
    assert 'GB predicted for a step' in error and re.search(
        r'--batch_size=\d+ --gradient_accumulation_steps=\d+ takes', error
    ), error


def test_help_has_the_values_of_a_recipe_and_fits(capsys):
    config, _ = resolve(trainer.Config, ['config/moe_60m.py'], trainer.ALIASES)
    assert help_text(trainer.Config, vars(config), width=10)
    for width in (60, 80, 120):
        every_day = help_text(trainer.Config, vars(config), width=width)
        everything = help_text(trainer.Config, vars(config), everything=True, width=width)
        for text in (every_day, everything):
            assert max(
                len(line) for line in text.splitlines() if not line.startswith('  --')
            ) <= max(width, 76)
    assert f'--n_layer={config.n_layer} ' in every_day and '(default: 12)' in every_day
    assert all(f'\n  --{key}=' in every_day for key in trainer.Config.COMMON) and every_day.count(
        '\n  --'
    ) == len(trainer.Config.COMMON)
    fields = trainer.Config.__dataclass_fields__
    assert everything.count('\n  --') == len(fields)
    hints = __import__('typing').get_type_hints(trainer.Config)
    flat = ' '.join(everything.split())
    for key in fields:
        choices = choices_of(hints[key])
        assert not choices or f'[{" | ".join(choices)}]' in flat, key
    for _, keys in described(trainer.Config):
        for key, text in keys.items():
            assert re.fullmatch(r"['A-Z].*[.]", text), (key, text)  # a sentence


def without_torch(*words):
    """(exit code, output) of train.py in a Python of its own that has no torch."""
    blocked = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['train.py', *sys.argv[1:]];"
        " runpy.run_path('train.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, '-c', blocked, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    'words, message',
    [
        (['--max_iters', '20'], "--max_iters '20' are two words, did you mean --max_iters=20"),
        (
            ['config/train_shakespeare.py'],
            "no such file, did you mean 'config/train_shakespeare_char.py'",
        ),
        (['--eval_only'], 'did you mean --eval_only=True'),
        (['--batch-size=4'], 'did you mean --batch_size=4'),
        (['--compile=yes'], 'expected True | False'),
        (['--compile', 'config/demo_pystdlib.py'], 'did you mean --compile=True'),
        (['--optimizer=muno'], "not one of 'adamw' | 'muon', did you mean 'muon'"),
    ],
)
def test_typing_errors_are_told_before_torch_is_imported(words, message):
    code, output = without_torch(*words)
    assert code == 2 and message in output


def test_version_and_help_are_quick():
    for word, expected in (('--version', 'onetrain '), ('--help', 'usage: python train.py')):
        code, output = without_torch(word)
        assert code == 0 and expected in output


def test_a_reader_that_leaves_is_no_error():
    for word in ('--help=all', '--version'):
        done = subprocess.run(
            f'{sys.executable} train.py {word} | true',
            shell=True,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stderr == ''
    done = subprocess.run(
        f'{sys.executable} train.py --help > /dev/full',
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith('error: the disk is full')
        and 'Traceback' not in done.stderr
    )


def test_a_run_into_a_pipe(dataset, tmp_path):
    """As a process of its own, with what torch prints at its end."""
    done = subprocess.run(
        [
            sys.executable,
            'train.py',
            f'--dataset={dataset}',
            f'--out_dir={tmp_path}',
            *TINY,
            '--max_iters=2',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 0
        # told where it takes long
        and done.stderr.replace('importing torch\n', '') == ''
        and 'iter 2/2:' in done.stdout
        and '\r' not in done.stdout
    )


@pytest.mark.parametrize(
    'name, told', [('a:0.5,b', 'is no mixture'), ('data/books', 'is taken within data/')]
)
def test_a_dry_run_tells_a_wrong_data_set_from_one_that_is_not_prepared(
    name, told, tmp_path, capsys
):
    """The latter is assumed; the former is an error, as it is without --dry_run."""
    small = ['--dry_run=True', '--device=cpu', '--n_layer=1', '--n_head=2', '--n_embd=16']
    if told == 'is no mixture':
        assert trainer.main([f'--dataset={name}', *small]) == 2
        assert told in capsys.readouterr().err
    else:
        os.makedirs(tmp_path / 'data' / 'books')
        with pytest.raises(NotPrepared, match=f'{told}: type --dataset=books'):
            open_dataset(name, str(tmp_path))
    assert trainer.main(['--dataset=openwebtext', *small]) == 0
