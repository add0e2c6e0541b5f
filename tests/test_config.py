"""Defaults <- file <- command line; every unknown key and wrong type is an error that helps;
nanoGPT's files run unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from onetrain.config import UserError, resolve
from train import ALIASES, Config


@dataclass
class Schema:
    # sizes
    n_layer: int = 12  # layers
    rate: float = 1e-3
    d_ff: int | None = None  # None: derived
    # switches
    fast: bool = False
    kind: Literal['a', 'b'] | None = None
    name: str = 'x'


def given(tmp_path, text, *words, schema=Schema, aliases=None):
    path = tmp_path / 'c.py'
    path.write_text(text)
    return resolve(schema, [str(path), *words], aliases)


def test_order_of_precedence(tmp_path):
    config, sources = given(tmp_path, 'n_layer = 3\nrate = 2\n', '--rate=0.5', '--fast=True')
    assert (config.n_layer, config.rate, config.fast, config.d_ff) == (3, 0.5, True, None)
    assert (
        sources['rate'] == 'command line'
        and sources['n_layer'].endswith('c.py')
        and 'd_ff' not in sources
    )


def test_types(tmp_path):
    config, _ = resolve(
        Schema, ['--rate=1', '--d_ff=None', '--kind=b', '--name=123', '--fast=false']
    )
    assert (
        config.rate == 1.0
        and isinstance(config.rate, float)
        and config.name == '123'
        and config.kind == 'b'
        and config.fast is False
    )
    assert (
        resolve(Schema, ['--name=2024_01_05'])[0].name == '2024_01_05'
        and resolve(Schema, ['--n_layer=1e1'])[0].n_layer == 10
    )
    for word, message in (
        ('--rate=1e999', 'is not a finite number'),
        ('--n_layer=1.5', 'n_layer=1.5 is a float, expected int'),
        ('--n_layer=True', 'is a bool, expected int'),
        ('--n_layer=None', 'is None, expected int'),
        ('--fast=1', 'is an int, expected True | False'),
        ('--rate=abc', 'is a str, expected float'),
        ('--d_ff=x', r'expected int \| None'),
        ('--kind=aa', "not one of 'a' | 'b' | None, did you mean 'a'"),
        ('--n_layer', 'expected --key=value'),
    ):
        with pytest.raises(
            UserError, match=message.replace('|', r'\|') if r'\|' not in message else message
        ):
            resolve(Schema, [word])


def test_unknown_keys_name_the_nearest(tmp_path):
    with pytest.raises(
        UserError, match="command line: unknown key 'n_layers', did you mean 'n_layer'"
    ):
        resolve(Schema, ['--n_layers=2'])
    with pytest.raises(UserError, match="c.py: unknown key 'nlayer', did you mean 'n_layer'"):
        given(tmp_path, 'nlayer = 2\n')


def test_a_file_may_compute(tmp_path):
    text = (
        'import time\nfrom math import sqrt\n_half = 3\ndef _f(): return 2\nn_layer = _half *'
        ' _f()\nname = str(sqrt(4)) + str(rate)\n'
    )
    config, _ = given(tmp_path, text)
    assert config.n_layer == 6 and config.name == '2.00.001'
    (tmp_path / 'base.py').write_text('n_layer = 7\n')
    for line in (
        f'exec(open({str(tmp_path / "base.py")!r}).read())',
        "globals()['n_layer'] = 7",
        'def _f():\n    global n_layer\n    n_layer = 7\n_f()',
    ):
        assert given(tmp_path, line)[0].n_layer == 7
    with pytest.raises(UserError, match='n_layer=.* expected int'):
        given(tmp_path, 'n_layer = int')
    # a file may assign to a key what the key holds already
    assert given(tmp_path, 'n_layer = 12\n')[1] == {'n_layer': str(tmp_path / 'c.py')}


@pytest.mark.parametrize(
    'text',
    [
        'n_layer = = 2',
        'n_layer = 1 / 0',
        'raise SystemError("no")',
        'import no_such_module',
        'import sys; sys.exit()',
    ],
)
def test_broken_files(tmp_path, text):
    with pytest.raises(UserError, match='cannot read the config file'):
        given(tmp_path, text)
    with pytest.raises(UserError, match='no such file'):
        resolve(Schema, ['config/nowhere.py'])


def test_aliases():
    assert resolve(Config, ['--intermediate_size=99', '--flash_attn=True'], ALIASES)[0].d_ff == 99
    assert resolve(Config, ['--flash_attn=True'], ALIASES)[0].attention_backend == 'flash_attn_2'
    for word in ('--intermediate_size=wide', '--flash_attn=maybe'):
        with pytest.raises(UserError, match='expected int|is not one of'):
            resolve(Config, [word], ALIASES)


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        resolve(Config, ['--help=all'])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for key in Config.__dataclass_fields__:
        assert f'--{key}=' in text
    assert 'Tokens per sequence.' in text


def test_files_of_nanogpt_run_unchanged(tmp_path):
    # the assignments of nanoGPT's own config files, the keys and forms that its users have
    finetune = (
        "import time\nout_dir = 'out-shakespeare'\neval_interval = 5\neval_iters = 40\nwandb_log ="
        " False\nwandb_project = 'shakespeare'\nwandb_run_name = 'ft-' + str(time.time())\ndataset"
        " = 'shakespeare'\ninit_from = 'gpt2-xl'\nalways_save_checkpoint = False\nbatch_size ="
        ' 1\ngradient_accumulation_steps = 32\nmax_iters = 20\nlearning_rate = 3e-5\ndecay_lr ='
        ' False\n'
    )
    config, _ = given(tmp_path, finetune, schema=Config, aliases=ALIASES)
    assert (
        config.init_from == 'gpt2-xl'
        and config.wandb_run_name.startswith('ft-')
        and config.decay_lr is False
    )
    pretrain = (
        'wandb_log = True\nbatch_size = 12\nblock_size = 1024\ngradient_accumulation_steps = 5 *'
        ' 8\nmax_iters = 600000\nlr_decay_iters = 600000\neval_interval = 1000\neval_iters ='
        " 200\nlog_interval = 10\nweight_decay = 1e-1\ndevice = 'cpu'\ncompile = False\nbackend ="
        " 'nccl'\ndtype = 'float16'\nbias = False\n"
    )
    assert (
        given(tmp_path, pretrain, schema=Config, aliases=ALIASES)[0].gradient_accumulation_steps
        == 40
    )


@pytest.mark.parametrize('key', ['activation_checkpointing', 'position_encoding', 'rope_scaling'])
def test_none_is_a_choice_where_it_is_one(key):
    """'none' turns it off, and None leaves it to the preset where that may be."""
    config, _ = resolve(Config, [f'--{key}=none'], ALIASES)
    assert getattr(config, key) == 'none'
    if key != 'activation_checkpointing':
        config, _ = resolve(Config, [f'--{key}=None'], ALIASES)
        assert getattr(config, key) is None
