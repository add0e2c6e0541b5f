"""What a user gets wrong ends with one clear sentence and exit code 2, before any model is built
and before any file is written.
"""

import os

import numpy as np
import pytest
import ranks
import torch
from conftest import TINY, losses, run_process, small_gpt2, write_dataset

import train as trainer


@pytest.fixture
def refused(dataset, tmp_path, monkeypatch, capsys):
    """refused(*args): the error line of a run that must fail before a model is built."""

    def no_model(*args, **kwargs):
        raise AssertionError('a model was built')

    def call(*args):
        monkeypatch.setattr('model.Model.__init__', no_model)
        out = tmp_path / 'out'
        code = trainer.main([f'--dataset={dataset}', f'--out_dir={out}', *TINY, *args])
        error = capsys.readouterr().err
        assert code == 2 and error.startswith('error: ') and error.count('\n') == 1, (code, error)
        assert not out.exists()
        return error

    return call


CASES = {
    'unknown key': (['--n_layrs=2'], "unknown key 'n_layrs', did you mean 'n_layer'"),
    'wrong type': (['--max_iters=many'], "max_iters='many' is a str, expected int"),
    'unreadable config file': (['config/none.py'], "cannot read the config file 'config/none.py'"),
    'not an option': (['-x'], "cannot read '-x', expected --key=value"),
    'n_embd not divisible': (
        ['--n_embd=33'],
        'n_embd=33 is not divisible by n_head=2: type --n_head=',
    ),
    'block_size larger than the data': (
        ['--block_size=30000'],
        'too few for one block of block_size=30000',
    ),
    'id beyond the vocabulary': (['--vocab_size=10'], 'beyond vocab_size=10: type --vocab_size='),
    'resume without a checkpoint': (
        ['--init_from=resume'],
        'has no checkpoint that can be used: type --init_from=scratch',
    ),
    'unknown start': (['--init_from=nowhere'], "init_from='nowhere' is not 'scratch', 'resume'"),
    'unknown preset': (['--arch_preset=lama'], "did you mean 'llama'"),
    'unknown device': (['--device=tpu'], "device='tpu' is not one of"),
    'total_batch_size': (['--total_batch_size=1000'], 'type --total_batch_size=960 or 1024'),
    'two layouts': (
        ['--use_fsdp=True', '--use_zero1=True'],
        'are two layouts: type --use_zero1=False',
    ),
    'more replicas than processes': (
        ['--use_fsdp=True', '--fsdp_replicas=2'],
        'fsdp_replicas=2 does not divide the 1 process: type --fsdp_replicas=1',
    ),
    'context parallel on one process': (
        ['--context_parallel=2'],
        'context_parallel=2 does not divide the 1 process: start 2 or a multiple of it',
    ),
    'timeout': (['--timeout_minutes=0'], 'timeout_minutes=0.0 must be above 0'),
    'nccl on a CPU': (
        ['--backend=nccl'],
        "backend='nccl' does not serve device='cpu': type --backend=gloo",
    ),
    'zero': (['--eval_interval=0'], 'eval_interval=0 must be at least 1'),
    'dropout': (['--dropout=1.0'], 'dropout=1.0 must be at least 0 and below 1'),
    'negative': (['--learning_rate=-1'], 'learning_rate=-1.0 must not be negative'),
    'half precision': (['--dtype=float16'], 'dtype=float16 needs a GPU'),
    'seed': (['--seed=-1'], 'seed=-1 must be at least 0'),
    'share of RoPE': (
        ['--arch_preset=neox', '--rotary_pct=1.5'],
        'rotary_pct=1.5 must be above 0 and at most 1',
    ),
    'base of RoPE': (['--arch_preset=llama', '--rope_theta=0'], 'rope_theta=0.0 above 1'),
    'missing package': (['--wandb_log=True'], 'needs the package wandb: pip install wandb'),
    'prompt outside the vocabulary': (
        ['--sample_interval=1', '--sample_start=\u00e9'],
        "sample_start='\u00e9': ",
    ),
    'empty prompt': (
        ['--sample_interval=1', '--sample_start='],
        'has 0 tokens, expected 1 to block_size=16',
    ),
    'missing data set': (['--dataset=nowhere'], "no data set 'nowhere'"),
}


@pytest.mark.parametrize('case', CASES)
def test_refused(refused, case):
    args, message = CASES[case]
    assert message in refused(*args)


def test_out_dir_that_cannot_be_a_folder(dataset, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    for out in (tmp_path / 'file', tmp_path / 'file' / 'below', ''):
        assert trainer.main([f'--dataset={dataset}', f'--out_dir={out}', *TINY]) == 2
        assert 'cannot be made' in capsys.readouterr().err


def test_preset_that_contradicts_the_weights(dataset, tmp_path, capsys):
    from onetrain import huggingface

    model = small_gpt2(block_size=64, vocab_size=80)
    huggingface.write_model(str(tmp_path / 'hf'), model.config, model.state_dict())
    code = trainer.main(
        [
            f'--init_from={tmp_path / "hf"}',
            '--arch_preset=llama',
            f'--dataset={dataset}',
            f'--out_dir={tmp_path / "out"}',
            '--device=cpu',
        ]
    )
    assert code == 2 and "arch_preset='llama', but" in capsys.readouterr().err


def test_missing_data_set_names_its_prepare_command(refused):
    from conftest import ROOT

    name = next(
        n
        for n in ('openwebtext', 'shakespeare')
        if not os.path.exists(os.path.join(ROOT, 'data', n, 'train.bin'))
    )
    assert f'run `python data/{name}/prepare.py` first' in refused(f'--dataset={name}')
    assert 'n_embd=32 is not divisible by n_head=5' in refused(f'--dataset={name}', '--n_head=5')


def test_token_file_of_odd_size(refused, tmp_path):
    folder = write_dataset(str(tmp_path / 'odd'), np.arange(64), np.arange(64))
    os.remove(os.path.join(folder, 'meta.pkl'))
    assert 'has no meta.pkl, which prepare.py wrote beside train.ends' in refused(
        f'--dataset={folder}'
    )
    os.remove(os.path.join(folder, 'train.ends'))
    with open(os.path.join(folder, 'val.bin'), 'ab') as f:
        f.write(b'x')
    assert 'val.bin has 129 bytes, which is not a whole number of uint16 tokens' in refused(
        f'--dataset={folder}'
    )


def test_meta_that_is_no_plain_pickle(refused, tmp_path):
    folder = write_dataset(str(tmp_path / 'evil'), np.arange(64), np.arange(64))
    with open(os.path.join(folder, 'meta.pkl'), 'wb') as f:
        f.write(b'cos\nsystem\n(S"true"\ntR.')
    assert 'only builtin containers, strings and numbers are admitted' in refused(
        f'--dataset={folder}'
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU here')
def test_cuda_without_a_gpu(refused):
    assert 'sees no GPU here: type --device=cpu' in refused('--device=cuda')


def test_as_a_command():
    code, output = run_process('train.py', '--n_layrs=2')
    assert (
        code == 2
        and output
        == "error: command line: unknown key 'n_layrs', did you mean 'n_layer'; `--help=all` lists"
        ' all keys\n'
    )
    code, output = run_process('train.py', '--help')
    assert code == 0 and '--learning_rate=0.0006' in output.replace('6e-4', '0.0006')


def test_options_that_do_nothing_yet_are_announced(train, tmp_path, capsys):
    assert (
        train(
            tmp_path,
            '--max_iters=1',
            '--use_cuda_graphs=True',
            '--attention_backend=flash_attn_3',
            '--fsdp_min_num_params=5',
            '--fsdp_reshard=False',
            '--fsdp_replicas=3',
            '--fsdp_offload=True',
            '--dataloader_num_workers=3',
        )
        == 0
    )
    output = capsys.readouterr().out
    for text in (
        'Note: use_cuda_graphs=True needs an NVIDIA GPU: running without',
        'CUDA Graphs: off',
        'falls back to sdpa (flash_attn_3: needs an NVIDIA GPU; flash_attn_2: needs an NVIDIA GPU)',
        'fsdp_min_num_params has no effect',
        'fsdp_reshard has no effect without use_fsdp=True',
        'fsdp_replicas has no effect',
        'fsdp_offload has no effect',
        'dataloader_num_workers has no effect without use_dataloader=True',
        'lr_decay_iters=600000 lies beyond max_iters=1',
    ):
        assert output.count(text) == 1, text


ON_TWO_RANKS = {
    'batch': (
        ['--total_batch_size=320'],
        (
            'not a multiple of batch_size 4 x block_size 16 x 2 ranks = 128 tokens: type'
            ' --total_batch_size=256 or 384, or --batch_size=2, or share the sequences of a'
            ' micro-step among 1 ranks'
        ),
    ),
    'two layouts': (
        ['--use_fsdp=True', '--use_zero1=True'],
        'are two layouts: type --use_zero1=False',
    ),
    'replicas': (
        ['--use_fsdp=True', '--fsdp_replicas=3'],
        'fsdp_replicas=3 does not divide the 2 processes: type --fsdp_replicas=2',
    ),
    'ranks': (
        ['--context_parallel=3'],
        (
            'context_parallel=3 does not divide the 2 processes: start 3 or a multiple of it with'
            ' torchrun --nproc_per_node, or type --context_parallel=2'
        ),
    ),
    'sequence': (
        ['--context_parallel=2', '--block_size=15'],
        (
            'context_parallel=2 does not divide block_size=15: type --block_size=16 or'
            ' --context_parallel=1'
        ),
    ),
    'dropout': (
        ['--context_parallel=2', '--dropout=0.1'],
        'context_parallel=2 has no dropout in its attention: type --dropout=0',
    ),
    'nccl': (['--backend=nccl'], "backend='nccl' does not serve device='cpu': type --backend=gloo"),
    'data': (['--dataset=nowhere'], "no data set 'nowhere'"),
}


@pytest.mark.parametrize('case', ON_TWO_RANKS)
def test_refused_on_two_ranks_with_one_message(dataset, tmp_path, case):
    args, message = ON_TWO_RANKS[case]
    code, output = ranks.train(2, f'--dataset={dataset}', f'--out_dir={tmp_path}/out', *TINY, *args)
    assert code == 2 and output.count('error: ') == 1 and message in output, output
    assert not os.path.exists(tmp_path / 'out')


def test_a_layout_that_one_process_has_no_use_for_is_announced(dataset, tmp_path):
    """FSDP runs there, and says so; ZeRO-1 has nothing to share out. In a process of its own, since
    FSDP makes a process group.
    """
    for name, option, note in (
        ('fsdp', '--use_fsdp=True', 'Note: use_fsdp=True on one process: nothing is shared out'),
        ('zero1', '--use_zero1=True', 'Note: use_zero1=True on one process: there is no other'),
        ('none', '--use_fsdp=False', ''),
    ):
        code, output = run_process(
            'train.py',
            f'--dataset={dataset}',
            f'--out_dir={tmp_path}/{name}',
            *TINY,
            '--max_iters=8',
            option,
        )
        assert code == 0 and note in output, output
    assert losses(tmp_path / 'fsdp') == losses(tmp_path / 'none') == losses(tmp_path / 'zero1')
    code, output = run_process(
        'train.py',
        f'--out_dir={tmp_path}/fsdp',
        '--device=cpu',
        '--init_from=resume',
        '--max_iters=12',
        '--fsdp_min_num_params=100000',
        '--fsdp_activation_checkpointing=True',
    )
    assert (
        code == 0
        and 'continuing at iter 8' in output
        and 'fsdp_min_num_params=100000 has no meaning here' in output
    ), output
    assert 'backward computes all of each block again' in output


@pytest.mark.parametrize(
    'script, words, message',
    [
        (
            'sample.py',
            ['--num_sample=3'],
            "unknown option --num_sample, did you mean '--num_samples'",
        ),
        # no abbreviations: what is added later must not change their meaning
        ('sample.py', ['--temp', '0'], 'unknown option --temp'),
        ('sample.py', ['--compile=False'], '--compile takes no value: leave it out'),
        ('sample.py', ['--compile=True'], '--compile takes no value: type --compile alone'),
        (
            'sample.py',
            ['--init_from=gpt2'],
            'unknown option --init_from: --out_dir=RUN reads a run',
        ),
        ('export.py', ['--to=x', '--stpe=3'], "unknown option --stpe, did you mean '--step'"),
        (
            'checkpoints.py',
            ['out', '--copyto=s3://KEY:SECRET@bucket/x'],
            "unknown option --copyto, did you mean '--copy_to'",
        ),
        ('checkpoints.py', ['out', '--verify=s3://KEY:SECRET@bucket/x'], 'invalid choice'),
        ('plots/compare_runs.py', ['a', '--lables=x'], "did you mean '--labels'"),
        ('plots/compare_runs.py', ['conifg'], "conifg, did you mean 'config'"),
        ('checkpoints.py', ['conifg'], "conifg: no such folder, did you mean 'config'"),
        ('evaluate.py', ['out-x'], 'out-x is no option, did you mean --out_dir=out-x'),
        ('start.py', ['demo', '--foo'], 'start.py demo takes no options: --foo'),
        (
            'data/own_text/prepare.py',
            ['--input', 'README.md', '--tokenizer', 'chars', '--output', '/tmp/x'],
            "unknown tokenizer 'chars', did you mean 'char'",
        ),
    ],
)
def test_options_of_the_other_commands(script, words, message):
    code, output = run_process(script, *words)
    assert (
        code == 2
        and message in output
        and output.startswith('error: ')
        and output.count('\n') == 1
        and 'SECRET' not in output
    ), output
