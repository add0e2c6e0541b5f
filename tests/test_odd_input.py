"""Throws a few hundred odd command lines and files at every command: each ends by itself, with one
sentence where it fails, and never with a traceback.

In this process, since a new one takes seconds to import torch; KeyboardInterrupt and arguments that
are not UTF-8 are in test_hostile.py.
"""

import argparse
import importlib.util
import json
import os
import pickle
import shutil
import sys

import compare_evaluations
import compare_runs
import plot_single_run
import pytest
from conftest import TINY, run_train

import checkpoints
import evaluate
import export
import sample
import train as trainer
from data import train_tokenizer
from data.own_text import prepare as own_text
from data.refocused_npz import prepare as refocused
from data.shakespeare_char import prepare as shakespeare_char
from onetrain import command_line
from onetrain.checkpoint import store
from onetrain.prepare import cli

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

HUGE = '1' + '0' * 400
NUMBERS = [
    '',
    'abc',
    '-1',
    '0',
    '1e38',
    '1e-300',
    'nan',
    'inf',
    '-inf',
    HUGE,
    '²',
    '٣',
    'None',
    '[]',
    '{}',
    'True',
    '1' * 5000,
    '(' * 200,
]
KEYS = [
    'batch_size',
    'block_size',
    'n_layer',
    'n_head',
    'n_embd',
    'vocab_size',
    'learning_rate',
    'weight_decay',
    'dropout',
    'beta1',
    'seed',
    'gradient_accumulation_steps',
    'rope_theta',
    'norm_eps',
    'max_time',
    'eval_iters',
    'max_bad_steps',
    'head_dim',
    'd_ff',
    'num_experts',
    'rope_factor',
    'spike_factor',
    'keep_every',
    'context_parallel',
    'loss_chunk',
]
WORDS = [
    ['--resume_from=²'],
    ['--flash_attn=[]'],
    ['--flash_attn={}'],
    ['--init_from=resume', '--resume_from=ftp://127.0.0.1:9/x'],
    ['--init_from=resume', '--resume_from=zip://a.zip'],
    ['--init_from=resume', '--resume_from=github://a'],
    ['--upload_to=/dev/null'],
    ['--upload_to=://'],
    ['--upload_to=zip://x'],
    ['--out_dir=/dev/null'],
    ['--out_dir='],
    ['--out_dir=ftp://x/y'],
    ['--out_dir=/proc/x'],
    ['--dataset='],
    ['--dataset=a:b'],
    ['--dataset=../../etc'],
    ['--dataset=' + 'x' * 5000],
    ['--data_url=ftp://127.0.0.1:9/x'],
    ['--data_url=/nowhere'],
    ['--data_url=zip://x'],
    ['--init_from=/dev/null'],
    ['--init_from=' + 'x' * 300],
    ['--device=tpu'],
    ['--device='],
    ['--dtype=float8'],
    ['--=5'],
    ['--'],
    ['---'],
    ['-x'],
    ['nofile.py'],
    ['/dev/null'],
    ['.'],
    ['--sample_interval=1', '--sample_start=FILE:/proc/self/mem'],
    ['--sample_interval=1', '--sample_start=Ü'],
    ['--eval_tasks=piqa:/proc/self/mem'],
    ['--eval_tasks=:'],
    ['--eval_tasks=piqa:/'],
    ['--n_embd=2147483648'],
    ['--vocab_size=1000000000'],
    ['--n_layer=1000000000'],
    ['--dataloader_num_workers=2147483648', '--use_dataloader=True'],
    ['--total_batch_size=100000000000000'],
    ['--learning_rate=' + HUGE],
    ['--min_lr=nan'],
    ['--rope_beta_fast=1e308', '--arch_preset=llama', '--rope_scaling=yarn'],
]


@pytest.fixture(scope='module')
def made(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp('odd')
    assert run_train(dataset, folder / 'run', '--max_iters=2', '--eval_interval=2') == 0
    assert export.main([f'--out_dir={folder}/run', f'--to={folder}/hf', '--no_check']) == 0
    (folder / 'latin1.txt').write_bytes('Größe'.encode('latin1'))
    (folder / 'utf16.txt').write_text('the', encoding='utf-16')
    (folder / 'empty').write_bytes(b'')
    (folder / 'file.txt').write_text('the quick brown fox ' * 50)
    return folder


def tame(capsys, main, args, codes=(0, 1, 2)):
    """Run a command; the exit code, which is one of `codes`. A failure says one sentence."""
    capsys.readouterr()
    try:
        code = main([str(word) for word in args])
    except SystemExit as stop:  # argparse, in its own words
        assert stop.code in (0, 2), args
        return stop.code
    error = capsys.readouterr().err
    assert code in codes, (args, code, error)
    if code == 2:
        assert error.startswith('error: ') and error.count('\n') == 1 and len(error) < 2000, (
            args,
            error,
        )
    return code


@pytest.mark.parametrize('key', KEYS)
def test_numbers_of_the_trainer(key, tmp_path, capsys, monkeypatch):
    """What can be run is not: only the beginning is."""
    monkeypatch.setattr(trainer, 'TrainLoader', None)
    for value in NUMBERS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.layouts, 'shard', stop_here)
            assert (
                tame(
                    capsys,
                    trainer.main,
                    [
                        f'--out_dir={tmp_path}/out',
                        '--dataset=nowhere',
                        *TINY[:2],
                        f'--{key}={value}',
                    ],
                )
                == 2
            ), (key, value)


def stop_here(*args):
    raise command_line.UserError('that can be run')


@pytest.mark.parametrize('args', WORDS, ids=lambda args: args[0][:40])
def test_words_of_the_trainer(args, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer.layouts, 'shard', stop_here)
    monkeypatch.chdir(tmp_path)
    assert (
        tame(
            capsys,
            trainer.main,
            [f'--out_dir={tmp_path}/out', f'--dataset={dataset}', *TINY, *args],
        )
        == 2
    )


@pytest.mark.parametrize(
    'content',
    [
        'raise BaseException',
        'import sys; sys.exit(3)',
        '1/0',
        'del max_iters\nx = 1',
        'out_dir = "a\\0b"',
        'learning_rate = 10**400',
        'seed = [1]',
        '\0',
        'def',
        'class A(BaseException): pass\nraise A()',
        'max_iters = 10**5000',
        'dataset = "\\udcff"',
    ],
    ids=repr,
)
def test_config_files(content, tmp_path, capsys):
    (tmp_path / 'c.py').write_text(content)
    assert tame(capsys, trainer.main, [tmp_path / 'c.py', '--dataset=nowhere', '--device=cpu']) == 2


def test_commands_that_read_a_run(made, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run, hf = f'--out_dir={made}/run', f'--hf={made}/hf'
    for option, values in {
        'temperature': NUMBERS,
        'top_k': NUMBERS,
        'top_p': NUMBERS,
        'min_p': NUMBERS,
        'repetition_penalty': NUMBERS,
        'num_samples': [*NUMBERS, '2147483648'],
        'seed': NUMBERS,
        'step': NUMBERS,
        'block_size': NUMBERS,
        'rope_factor': NUMBERS,
        'max_new_tokens': ['0', '-1', 'x', HUGE],
        'stop': [''],
        'device': ['tpu', ''],
        'hf': ['', '/dev/null', str(made), 'x/y' * 200],
        'out_dir': ['', '/dev/null', '/nowhere', 'ftp://x'],
        'start': [
            f'FILE:{made}/latin1.txt',
            f'FILE:{made}/utf16.txt',
            'FILE:/proc/self/mem',
            'FILE:/',
            'FILE:',
            'Ü',
            '',
        ],
    }.items():
        for value in values:
            tame(
                capsys,
                sample.main,
                [
                    run,
                    '--device=cpu',
                    '--max_new_tokens=2',
                    '--num_samples=1',
                    f'--{option}={value}',
                ],
            )
    for args in (
        ['--temperature=1e-38'],
        ['--top_p=1e-300'],
        ['--temperature=1e-300'],
        ['--min_p=1'],
    ):
        assert (
            tame(
                capsys,
                sample.main,
                [
                    run,
                    '--device=cpu',
                    '--max_new_tokens=2',
                    '--num_samples=1',
                    '--start=the',
                    *args,
                ],
            )
            == 0
        )
    for args in (
        ['--json=/'],
        [f'--json={made}'],
        ['--json=/dev/full'],
        ['--json=' + 'x' * 300],
        ['--json=ftp://x/y'],
        ['--tokens=-1'],
        ['--limit=0'],
        ['--prompts=/proc/self/mem'],
        [f'--prompts={made}/latin1.txt'],
        ['--tasks=piqa:/proc/self/mem'],
        ['--tasks=x'],
        ['--dataset=nowhere'],
        ['--dataset=a:1,b:1'],
        ['--batch_size=0'],
        ['--data_url=ftp://127.0.0.1:9/'],
    ):
        assert tame(capsys, evaluate.main, [run, '--device=cpu', *args]) == 2, args
    assert not os.path.exists(f'{made}.tmp')
    for to in (
        '',
        f'{made}/file.txt',
        f'{made}/file.txt/x',
        '/dev/null',
        '/proc/x',
        'x' * 300,
        's3://x',
    ):
        assert tame(capsys, export.main, [run, f'--to={to}']) == 2
    assert tame(capsys, export.main, [run, f'--to={tmp_path}/hf', '--shard_size=²GB']) == 2
    for args in (
        [''],
        ['/dev/null'],
        ['/nowhere'],
        ['ftp://127.0.0.1:9/x'],
        ['zip://x'],
        ['github://x'],
        [f'{made}/run', '--copy_to='],
        [f'{made}/run', '--copy_to=zip://x'],
        [f'{made}/run', '--step=7'],
        ['://'],
    ):
        assert tame(capsys, checkpoints.main, args) == 2, args
    assert (
        tame(
            capsys,
            sample.main,
            [hf, '--device=cpu', '--max_new_tokens=2', '--num_samples=1', '--start=the'],
        )
        == 0
    )


@pytest.mark.parametrize(
    'file, contents',
    [
        ('config.json', ['', '[]', '5', 'null', '"x"', '[' * 100_000, '{', '{}', '\xff']),
        ('tokenizer.json', ['', '{}', '[]', '[' * 100_000]),
        (
            'tokenizer_config.json',
            [
                '[]',
                '5',
                '{',
                '{"eos_token": 5}',
                '{"eos_token": {"content": 5}}',
                '{"eos_token": []}',
                '[' * 100_000,
            ],
        ),
        ('special_tokens_map.json', ['[]', '{"eos_token": true}']),
        ('model.safetensors', ['', 'x' * 100]),
    ],
)
def test_files_of_a_hugging_face_folder(file, contents, made, tmp_path, capsys):
    for content in contents:
        shutil.rmtree(tmp_path / 'hf', ignore_errors=True)
        shutil.copytree(made / 'hf', tmp_path / 'hf')
        (tmp_path / 'hf' / file).write_text(content, encoding='latin1')
        tame(
            capsys,
            sample.main,
            [
                f'--hf={tmp_path}/hf',
                '--device=cpu',
                '--max_new_tokens=2',
                '--num_samples=1',
                '--start=the',
            ],
        )


@pytest.mark.parametrize(
    'key',
    [
        'n_layer',
        'n_head',
        'n_embd',
        'vocab_size',
        'n_positions',
        'n_inner',
        'layer_norm_epsilon',
        'activation_function',
        'tie_word_embeddings',
    ],
)
def test_values_of_a_config_json(key, made, tmp_path, capsys):
    shutil.copytree(made / 'hf', tmp_path / 'hf')
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    for value in (None, 'x', [1], {}, -1, 0, 1.5, True, 10**9, 10**30, float('nan')):
        (tmp_path / 'hf' / 'config.json').write_text(json.dumps({**config, key: value}))
        tame(
            capsys,
            sample.main,
            [
                f'--hf={tmp_path}/hf',
                '--device=cpu',
                '--max_new_tokens=1',
                '--num_samples=1',
                '--start=the',
            ],
        )


def test_preparing(made, tmp_path, capsys, monkeypatch):
    def run(script):
        return lambda args: command_line.run_command(lambda argv: script(argv) and None, args)

    text = f'{made}/file.txt'
    (tmp_path / 'empty.model').write_bytes(b'')
    (tmp_path / 'odd.npz').write_bytes(b'PK\x05\x06' + bytes(18))
    (tmp_path / 'a.npz').write_text('x')
    monkeypatch.chdir(tmp_path)
    for args in (
        ['--tokenizer', 'empty.model'],
        ['--tokenizer', 'nowhere'],
        ['--tokenizer', ''],
        ['--val_fraction', '5e-324'],
        ['--val_fraction', 'nan'],
        ['--val_fraction', '2'],
        ['--max_broken', 'nan'],
        ['--max_lost', '-1'],
        ['--num_proc', '0'],
        ['--limit', '-1'],
        ['--shard', '²/²'],
        ['--shard', '1'],
        ['--shard', '2/1'],
        ['--output', ''],
        ['--output', '/dev/null'],
        ['--output', text],
        ['--output', '/proc/x'],
        ['--output', 's3://x'],
        ['--input', ''],
        ['--input', 'ftp://127.0.0.1:9/a.txt'],
        ['--input', 'zip://a.txt'],
        ['--input', 'github://x/a.txt'],
        ['--input', f'{made}/latin1.txt'],
        ['--input', f'{made}/utf16.txt'],
        ['--input', '/proc/self/mem'],
        ['--merge', 'nowhere'],
    ):
        assert (
            tame(
                capsys,
                run(own_text.main),
                ['--input', text, '--tokenizer', 'bytes', '--output', tmp_path / 'set', *args],
            )
            == 2
        ), args
    for name in ('odd.npz', 'a.npz'):
        assert (
            tame(
                capsys,
                run(refocused.main),
                ['--input', name, '--tokenizer', 'bytes', '--output', tmp_path / 'set'],
            )
            == 2
        )
    for path in ('', '/nowhere', f'{made}/latin1.txt', '/'):
        assert (
            tame(
                capsys, run(shakespeare_char.main), ['--input', path, '--output', tmp_path / 'set']
            )
            == 2
        )
    for args in (
        ['--max_mb', '0'],
        ['--max_mb', 'nan'],
        ['--max_mb', '-1'],
        ['--vocab_size', '100000000000000'],
        ['--vocab_size', '1'],
        ['--output', ''],
        ['--output', text],
    ):
        assert (
            tame(
                capsys,
                run(train_tokenizer.main),
                ['--input', text, '--output', tmp_path / 'tokenizer', *args],
            )
            == 2
        ), args
    assert cli.check_output(str(tmp_path / 'a' / 'b')) is None


def test_plots(made, tmp_path, capsys):
    log = next((made / 'run').glob('run_*.jsonl'))
    (tmp_path / 'run_1.jsonl').mkdir()
    os.symlink('/nowhere', tmp_path / 'run_2.jsonl')
    for name, content in (
        ('a.jsonl', b''),
        ('b.jsonl', b'\0' * 1000),
        ('c.json', b'[' * 100_000),
        ('d.json', b'5'),
        ('e.jsonl', b'\xff' * 50 + b'\n'),
    ):
        (tmp_path / name).write_bytes(content)
    for main in (plot_single_run.main, compare_runs.main):
        for args in (
            ['/nowhere'],
            ['/dev/null'],
            *(
                [tmp_path / name]
                for name in (
                    'run_1.jsonl',
                    'run_2.jsonl',
                    'a.jsonl',
                    'b.jsonl',
                    'c.json',
                    'd.json',
                    'e.jsonl',
                )
            ),
            [tmp_path],
            [log, '--output', '/'],
            [log, '--output', 'x.txt'],
            [log, '--output', '/nowhere/x.png'],
        ):
            assert tame(capsys, main, args) == 2, args
    assert tame(capsys, plot_single_run.main, [log, '--smooth', '9' * 30]) == 2
    for content in ('5', '[]', '{"architecture": 1, "step": "x"}', '[' * 100_000):
        (tmp_path / 'evaluation.json').write_text(content)
        assert (
            tame(
                capsys,
                compare_evaluations.main,
                [tmp_path / 'evaluation.json', '--output', tmp_path / 'x.png'],
            )
            == 2
        )
    for odd in (5, 'x', [1], {'a': 5}, None):
        (tmp_path / 'evaluation.json').write_text(
            json.dumps({'architecture': 'a', 'step': 1, 'loss': odd, 'tasks': odd, 'losses': odd})
        )
        tame(
            capsys,
            compare_evaluations.main,
            [tmp_path / 'evaluation.json', '--output', tmp_path / 'x.png'],
        )


def test_odd_lines_in_the_log_of_a_run_that_continues(made, dataset, tmp_path, capsys):
    shutil.copytree(made / 'run', tmp_path / 'run')
    log = next((tmp_path / 'run').glob('run_*.jsonl'))
    good = log.read_text().splitlines()
    record = next(json.loads(line) for line in good if '"iter"' in line and '"loss"' in line)
    odd = [
        {**record, key: value}
        for key in ('iter', 'loss', 'time_ms', 'mfu', 'memory', 'wall_s', 'type')
        for value in ('x', [1], None, -1, 10**401, {})
    ]
    lines = [json.dumps(line) for line in odd] + [
        'null',
        '5',
        '\0' * 30,
        '[' * 100_000,
        '{"type": "eval", "iter": 1, "val_loss": [1]}',
        'x',
    ]
    log.write_text('\n'.join([*good, *lines]) + '\n')
    assert (
        run_train(
            dataset, tmp_path / 'run', '--init_from=resume', '--max_iters=4', '--eval_interval=2'
        )
        == 0
    )
    assert (
        'Traceback' not in capsys.readouterr().err and store.steps(str(tmp_path / 'run'))[-1] == 4
    )


def test_a_pickle_as_meta(dataset, tmp_path, capsys):
    for content in (
        b'',
        b'\x80',
        b'x',
        pickle.dumps(5),
        pickle.dumps([1]),
        pickle.dumps({}),
        pickle.dumps({'tokenizer': 5}),
        pickle.dumps({'vocab_size': 1}),
    ):
        shutil.rmtree(tmp_path / 'set', ignore_errors=True)
        shutil.copytree(dataset, tmp_path / 'set')
        (tmp_path / 'set' / 'meta.pkl').write_bytes(content)
        tame(
            capsys,
            trainer.main,
            [f'--dataset={tmp_path}/set', f'--out_dir={tmp_path}/out', *TINY, '--eval_only=True'],
        )


@pytest.mark.parametrize(
    'name',
    sorted(
        path[:-3]
        for path in os.listdir(os.path.join(ROOT, 'bench'))
        if path.endswith('.py')
        and path
        not in (
            'step.py',
            'step_parts.py',
            'memory_per_rank.py',
            'fastest_settings.py',
            'throughput.py',
        )
    ),
)
def test_numbers_of_the_benches(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(os.path.join(ROOT, 'bench'))
    # one is named as a module of the project
    spec = importlib.util.spec_from_file_location(
        f'bench_{name}', os.path.join(ROOT, 'bench', f'{name}.py')
    )
    module = importlib.util.module_from_spec(spec)
    parsers = []
    parse = argparse.ArgumentParser.parse_args
    spec.loader.exec_module(module)

    def caught(self, *args, **kwargs):
        parsers.append(self)
        raise SystemExit(0)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, 'parse_args', caught)
        patch.setattr(sys, 'argv', [name])
        with pytest.raises(SystemExit):
            module.main()
    options = [action for action in parsers[0]._actions if action.type and action.option_strings]
    if name == 'generation':  # it has some of sample.py's
        options = [
            action for action in options if action.type.__module__ == 'onetrain.command_line'
        ]
    for action in options:
        for odd in ('x', '', 'nan', '-5', '1e400', '9' * 30, '0.0.0', '\u0663'):
            with pytest.raises(SystemExit) as left:
                parse(parsers[0], [action.option_strings[0], odd])
            assert left.value.code == 2 and 'Traceback' not in capsys.readouterr().err
