"""Proves what plan.py says: the figures that the shipped recipes come from, memory as the trainer
predicts it, time and money, laws that are found again, and what it refuses.
"""

import dataclasses
import json
import math
import os
import subprocess

import numpy as np
import pytest
import torch
from conftest import TINY, records, run_train

import plan
from model import Model
from onetrain.config import UserError, resolve
from onetrain.distributed.processes import World
from onetrain.model_config import resolve_shape
from onetrain.ops import kernels
from onetrain.planning import budget, machines, scaling_laws, time_and_cost
from onetrain.planning.memory_table import RECOMPUTATIONS, MemoryTable, layouts_of
from onetrain.training.batch_plan import ModelOptions
from train import ALIASES, Config

SMALL = [
    '--arch_preset=llama',
    '--n_layer=3',
    '--n_head=4',
    '--n_embd=64',
    '--vocab_size=500',
    '--block_size=64',
    '--batch_size=4',
    '--gradient_accumulation_steps=8',
]


@pytest.fixture
def recipe(tmp_path):
    """An empty recipe: what it holds is typed."""
    (tmp_path / 'recipe.py').write_text('')
    return str(tmp_path / 'recipe.py')


@pytest.fixture
def planned(capsys):
    """planned(*words): the JSON of plan.py."""

    def run(*words):
        capsys.readouterr()
        assert plan.main([*words, '--json']) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize(
    'words, parameters, shape, tokens, loss, flops',
    [
        (['llama3', '--as_guide'], 1544628224, (18, 2048, 128, 7168), 101.909, 2.335120, 8.76e20),
        (
            ['llama3', '--as_guide', '--chinchilla'],
            2224154624,
            (30, 2048, 128, 7168),
            61.545,
            2.351059,
            8.17e20,
        ),
        (
            ['qwen3', '--as_guide', '--layers=24,32', '--ratio=3.0'],
            1830395904,
            (24, 2048, 128, 6144),
            81.727,
            2.339658,
            8.44e20,
        ),
        (['llama3'], 2009418240, (16, 2560, 64, 8960), 122.60, 2.291855, 1.36e21),
        (['llama3', '--chinchilla'], 2968108032, (18, 3072, 64, 10752), 80.94, 2.296962, 1.36e21),
    ],
)
def test_what_the_shipped_models_come_from(planned, words, parameters, shape, tokens, loss, flops):
    found = planned('--budget=1.36e21', f'--preset={words[0]}', *words[1:])
    best = found['best']
    assert best['parameters'] == parameters
    assert tuple(best[key] for key in ('n_layer', 'n_embd', 'head_dim', 'd_ff')) == shape
    assert round(best['tokens'] / 1e9, 3 if '--as_guide' in words else 2) == tokens
    assert round(best['loss'], 6) == loss
    assert float(f'{best["flops"]:.3g}') == flops
    if words == ['llama3', '--as_guide']:
        assert (found['tried'], found['kept']) == (504, 51)


def test_sizes_of_a_grid_are_those_of_the_models():
    grid = budget.Grid('qwen3', [5], 3.0)
    shape, (parameters, flops) = next(iter(grid.sizes().items()))
    model = Model.on_meta(resolve_shape(grid.keys(*shape)))
    assert parameters == sum(p.numel() for p in model.parameters())
    assert flops == model.flops().total


def test_a_budget_becomes_a_recipe_that_train_reads(planned, tmp_path):
    target, picture = str(tmp_path / 'mine.py'), str(tmp_path / 'mine.png')
    best = planned('--budget=1e19', '--preset=llama', f'--to={target}', f'--plot={picture}')['best']
    config, _ = resolve(Config, [target], ALIASES)
    model = Model.on_meta(resolve_shape(dataclasses.asdict(config)))
    assert model.parameter_counts()['total'] == best['parameters']
    tokens = config.max_iters * config.total_batch_size
    assert best['tokens'] <= tokens < best['tokens'] + config.total_batch_size
    assert config.max_iters == config.lr_decay_iters and os.path.getsize(picture) > 10000
    assert plan.main(['--budget=1e19', '--preset=llama', f'--to={target}']) == 2  # it exists


def test_a_budget_of_a_machine_takes_what_fits(planned):
    grid = '--preset=llama3', '--layers=2,4,8'
    words = *grid, '--mfu=0.4'
    found = planned(*words, '--gpus=1xRTX-4090', '--hours=10000')
    assert found['budget'] == pytest.approx(165e12 * 0.4 * 36e6)
    best, unbound = found['best'], planned(f'--budget={found["budget"]}', *grid)['best']
    assert 16 * best['parameters'] < 0.9 * 24e9 < 16 * unbound['parameters']
    assert best['loss'] > unbound['loss']
    two = planned(*words, '--gpus=2xRTX-4090', '--hours=5000')
    assert two['budget'] == found['budget'] and two['best']['loss'] < best['loss']
    dollars = planned(*words, '--gpus=2xRTX-4090', '--dollars=10000', '--price=1')
    assert dollars['budget'] == pytest.approx(two['budget'])
    assert plan.main([*grid, '--gpus=1x2GB', '--budget=1e20']) == 2  # nothing fits
    for more in ('--hours=3', '--tokens=1e9', '--mfu=0.3', '--price=2', '--gpus=1xH100,1xH200'):
        assert plan.main(['--budget=1e20', *grid, more]) == 2


def options(c, shape, layout, how):
    c = dataclasses.replace(
        c, device='cpu', attention_backend='sdpa', activation_checkpointing=how, **layout.keys
    )
    cpu = torch.device('cpu')
    chosen, _ = kernels.select_kernels(c, shape, cpu, torch.bfloat16)
    world = World(0, 4, cpu, layout=layout.kind)
    return ModelOptions(c, shape, chosen, None, torch.bfloat16, world, 'cuda')


def test_memory_is_what_the_trainer_predicts():
    """In every cell of the table, and no larger batch fits."""
    c, _ = resolve(Config, SMALL, ALIASES)
    shape, machine = resolve_shape(dataclasses.asdict(c)), machines.Machine(4, 'x', 6e6, None)
    table = MemoryTable(c, shape)
    cells = table.fill(machine, lambda context: 32 * context)
    assert len(cells) == 3 * len(layouts_of(machine, c)) == 21
    sizes = {}
    for cell in cells:
        keys = cell.layout.keys
        step = options(c, shape, cell.layout, cell.recomputation)

        def taken(batch_size, step=step, cell=cell, keys=keys):
            measured = step.step_memory(batch_size, 2)
            ranks = 4 // keys['fsdp_replicas']
            return measured.per_rank(cell.layout.kind, ranks, keys['fsdp_offload']).total

        exact = taken(max(1, cell.batch_size))  # a sum of kinks, above which the line lies
        assert 0.99 * exact <= cell.bytes <= 1.1 * exact
        larger = cell.batch_size * 2 or 1
        most = 32 * keys['context_parallel']
        assert larger > most or taken(larger) > 0.87 * machine.memory
        sizes[cell.layout.name, cell.recomputation] = cell.batch_size
    assert len(set(sizes.values())) > 3 and sizes['DDP', 'full'] > sizes['DDP', 'none']
    assert sizes['ZeRO-3', 'none'] > sizes['DDP', 'none']
    best, why = table.best(cells, machine, lambda context: 32 * context)
    assert best.bytes <= 0.9 * machine.memory and why


def test_the_best_is_computed_once_and_sends_little():
    c, _ = resolve(Config, [*SMALL, '--block_size=4096', '--batch_size=1'], ALIASES)
    table = MemoryTable(c, resolve_shape(dataclasses.asdict(c)))

    def best(memory):
        machine = machines.Machine(4, 'x', memory, None)
        found, _ = table.best(table.fill(machine, lambda _: 8), machine, lambda _: 8)
        return found.layout.name, found.recomputation

    found = [best(memory) for memory in (1e9, 66e6, 40e6)]
    assert found == [('DDP', how) for how in RECOMPUTATIONS]
    tiny = machines.Machine(4, 'x', 1e5, None)
    assert table.best(table.fill(tiny, lambda _: 8), tiny, lambda _: 8) is None


def test_time_and_money(planned, recipe):
    found = planned(
        recipe, *SMALL, '--iters=100000', '--iters_per_hour=2500', '--price_per_hour=7.92'
    )
    assert found['estimates'][0]['hours'] == pytest.approx(40.0)
    assert found['estimates'][0]['dollars'] == pytest.approx(316.80)
    words = recipe, *SMALL, '--eval_iters=1', '--gpus=8xA100-80', '--mfu=0.4', '--price=2'
    by_tokens = planned(*words, '--tokens=1e9')
    (estimate,) = by_tokens['estimates']
    rate = 8 * 312e12 * 0.4 / by_tokens['flops_per_token']
    assert estimate['tokens_per_sec'] == pytest.approx(rate)
    assert 1 < estimate['hours'] / (1e9 / rate / 3600) < 1.01  # evaluations
    assert estimate['dollars'] == pytest.approx(16 * estimate['hours'])
    for other in (f'--hours={estimate["hours"]}', f'--dollars={estimate["dollars"]}'):
        assert planned(*words, other)['tokens'] == pytest.approx(1e9)
    assert planned(*words, '--tokens=1B')['tokens'] == 1e9
    slowest = planned(recipe, *SMALL, '--gpus=H100', '--hours=1')  # at which the time suffices
    assert slowest['tokens'] == slowest['estimates'][0]['tokens']
    assert [e['speed']['mfu'] for e in planned(recipe, *SMALL, '--gpus=H100')['estimates']] == [
        0.3,
        0.4,
        0.5,
    ]


def test_checkpoints_data_and_loss(planned, recipe):
    words = recipe, *SMALL, '--max_iters=100', '--vocab_size=70000', '--keep_checkpoints=3'
    found = planned(*words)
    count = found['parameters']['total']
    roles = ('embedding', 'attention', 'feed_forward', 'head', 'norms')
    assert sum(found['parameters'][role] for role in roles) == count
    assert found['checkpoint_bytes'] == 12 * count and found['checkpoints_kept'] == 4
    assert found['tokens'] == 100 * 4 * 8 * 64 and found['data_bytes'] == 4 * found['tokens']
    assert found['loss'] == pytest.approx(
        1.69 + 406.4 * count**-0.34 + 410.7 * found['tokens'] ** -0.28
    )
    assert planned(*words, '--vocab_size=500')['data_bytes'] == 2 * found['tokens']
    assert planned(*words, '--keep_every=10')['checkpoints_kept'] == 14


def test_what_is_printed_fits_a_terminal_and_starts_in_a_shell(capsys, recipe, monkeypatch):
    monkeypatch.chdir(os.path.dirname(recipe))
    keys = [word.removeprefix('--').split('=') for word in SMALL]
    lines = [f'{key} = {value if value.isdecimal() else repr(value)}' for key, value in keys]
    recipe = os.path.basename(recipe)
    with open(recipe, 'w') as f:
        f.write('\n'.join(lines))
    words = ['--use_fsdp=True', '--tokens=1e9', '--price=1.8']
    assert plan.main([recipe, '--gpus=8xA100-80', *words]) == 0
    lines = capsys.readouterr().out.rstrip('\n').split('\n')
    assert len(lines) <= 25 and max(map(len, lines)) <= 80
    begin = next(i for i, line in enumerate(lines) if line.startswith('Start:'))
    shell = '\n'.join(lines[begin:]).removeprefix('Start:')
    stand_in = 'torchrun() { printf "%s\\n" "$*"; }; sbatch() { printf "sbatch %s\\n" "$*"; }\n'
    said = subprocess.run(
        ['bash', '-euc', stand_in + shell], capture_output=True, text=True, timeout=20, check=True
    ).stdout.splitlines()
    assert [line.split()[0] for line in said] == ['--standalone', '--nnodes=2', 'sbatch']
    for line in said:
        keys = line[line.index(recipe) :].split()
        config, _ = resolve(Config, keys, ALIASES)
        assert config.max_iters * config.total_batch_size >= 1e9
        ranks = 16 if 'nnodes' in line else 8
        assert config.total_batch_size % (config.batch_size * config.block_size * ranks) == 0
    assert plan.main([recipe, '--gpus=8xA100-80,2x24GB,4xH200', *words]) == 0
    lines = capsys.readouterr().out.rstrip('\n').split('\n')
    assert len(lines) <= 12 and max(map(len, lines)) <= 80
    assert [line[:11].strip() for line in lines[-3:]] == ['8 x A100-80', '2 x 24GB', '4 x H200']
    assert all(line.split()[-2:] != ['-', '-'] for line in lines[-3::2])


def test_what_is_typed_survives_the_shell(capsys, recipe, tmp_path):
    """Spaces, quotes and substitutions, and a key that the plan sets otherwise."""
    odd = ['--out_dir=my run\'s $(touch mine) "a"', '--activation_checkpointing=full']
    assert plan.main([recipe, *SMALL, '--gpus=2xH100', *odd]) == 0
    said = capsys.readouterr().out
    shell = said[said.index('Start:') :].removeprefix('Start:')
    stand_in = 'torchrun() { printf "%s\\0" "$@"; exit; }\n'
    words = subprocess.run(
        ['bash', '-euc', stand_in + shell],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
        cwd=tmp_path,
    ).stdout.split('\0')
    assert odd[0] in words and not (tmp_path / 'mine').exists()
    config, _ = resolve(Config, words[words.index('train.py') + 1 : -1], ALIASES)
    assert config.activation_checkpointing == 'none' and config.out_dir.startswith('my run')


def test_recomputation_that_an_old_key_asks_for(planned, recipe):
    """The layout and the recomputation of the command are those of the star."""
    odd = '--use_fsdp=True', '--fsdp_activation_checkpointing=True', '--block_size=65536'
    found = planned(recipe, *SMALL, *odd, '--n_embd=256', '--gpus=2x1GB')
    assert found['best']['activation_checkpointing'] == 'full'
    words = ' '.join(found['command'])
    assert '--activation_checkpointing=full' in words
    assert '--fsdp_activation_checkpointing=None' in words


def test_a_vocabulary_that_is_assumed_is_said(capsys, recipe, dataset, tmp_path):
    words = [recipe, *(word for word in SMALL if 'vocab' not in word)]
    assert plan.main([*words, '--dataset=nothing']) == 0
    assert 'a vocabulary of 32,000, which is assumed' in ' '.join(capsys.readouterr().out.split())
    assert run_train(dataset, tmp_path / 'run', '--max_iters=3') == 0
    capsys.readouterr()
    assert plan.main([*words, '--dataset=nothing', f'--like={tmp_path / "run"}', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['parameters']['embedding'] == 64 * 41


def test_like_takes_the_speed_of_a_run(planned, dataset, tmp_path, recipe):
    assert run_train(dataset, tmp_path / 'run', '--max_iters=20') == 0
    rates = [record['tokens_per_sec'] for record in records(tmp_path / 'run')][10:]
    found = planned(recipe, *TINY[2:], f'--dataset={dataset}', f'--like={tmp_path / "run"}')
    (estimate,) = found['estimates']
    assert estimate['tokens_per_sec'] == pytest.approx(np.median(rates), rel=1e-6)
    assert plan.main([recipe, '--gpus=H100', f'--like={tmp_path / "run"}']) == 2  # it has no MFU


def test_like_takes_the_mfu_of_a_gpu(tmp_path):
    with open(tmp_path / 'run_1.jsonl', 'w') as f:
        for record in [
            {'type': 'header', 'startup_info': {'model': {'flops_per_token': 1e9}}},
            *(
                {
                    'type': 'iter',
                    'iter': n,
                    'loss': 3.0,
                    'tokens_per_sec': 1e5,
                    'mfu': {'mfu': 0.1 if n < 5 else 0.37},
                }
                for n in range(10)
            ),
        ]:
            print(json.dumps(record), file=f)
    machine = machines.parse_machines('8xH100')[0]
    speed = time_and_cost.measured_speed(str(tmp_path), machine, 'bfloat16')
    assert speed.mfu == pytest.approx(0.37)
    assert speed.flops_per_sec == pytest.approx(8 * 989e12 * 0.37)
    alone = time_and_cost.measured_speed(str(tmp_path), None, 'bfloat16')
    assert alone.flops_per_sec == pytest.approx(1e14)


def test_a_law_is_found_again(planned, tmp_path):
    law = scaling_laws.LAWS['hoffmann']
    noise = np.random.default_rng(0)
    folders = []
    for parameters in (1e6, 1e7, 1e8):
        for tokens in (2e8, 1e9, 5e9, 2e10):
            folder = tmp_path / f'{parameters:g}-{tokens:g}'
            folder.mkdir()
            loss = law.loss(parameters, tokens) * (1 + 1e-3 * noise.standard_normal())
            start = {'type': 'header', 'startup_info': {'model': {'total_params': parameters}}}
            steps = [
                {'type': 'iter', 'iter': n, 'loss': loss, 'tokens_seen': n / 10 * tokens}
                for n in range(1, 11)
            ]
            last = {'type': 'eval', 'iter': 10, 'val_loss': loss}
            lines = [json.dumps(record) for record in (start, *steps, last)]
            (folder / 'run_1.jsonl').write_text('\n'.join(lines) + '\n')
            folders.append(str(folder))
    target, picture = str(tmp_path / 'law.json'), str(tmp_path / 'law.png')
    found = planned('--fit', *folders, f'--to={target}', f'--plot={picture}')
    for name in ('E', 'alpha', 'beta'):
        low, high = found['intervals'][name]
        assert 0.95 * low <= getattr(law, name) <= 1.05 * high
        assert getattr(law, name) == pytest.approx(found['law'][name], rel=0.15)
    assert found['largest_deviation'] < 0.005 and len(found['runs']) == 12
    assert os.path.getsize(picture) > 10000
    read = scaling_laws.read_law(target)
    assert read.covers(1e7, 1e9) and not read.covers(1e9, 1e9) and not read.covers(1e7, 1e11)
    assert math.isclose(read.loss(1e7, 1e9), law.loss(1e7, 1e9), rel_tol=3e-3)
    assert plan.main(['--fit', *folders[:5]]) == 2
    assert plan.main(['--fit', *folders[:4], *folders[:4]]) == 2  # one size


def test_names_of_gpus():
    for text, name, gigabytes in (
        ('8xA100-80', 'A100-80', 80),
        ('a100', 'A100-80', 80),
        ('2 x A100-40GB', 'A100-40', 40),
        ('RTX 4090', 'RTX-4090', 24),
        ('3090', 'RTX-3090', 24),
        ('NVIDIA RTX A6000', 'A6000', 48),
        ('16xh100-80gb', 'H100', 80),
        ('4x96GB', '96GB', 96),
    ):
        (machine,) = machines.parse_machines(text)
        assert (machine.name, machine.memory) == (name, gigabytes * 1e9), text
        assert (machine.peak('bfloat16') is None) == (name == '96GB')
    assert [m.nodes for m in machines.parse_machines('1xH100,8xH100,32xB200')] == [1, 1, 4]


@pytest.mark.parametrize(
    'words, expected',
    [
        (['--gpus=8xA1000'], "no GPU 'A1000' is known"),
        (['--gpus=12xH100'], 'type 8xH100 or 16xH100'),
        (['--gpus=0xH100'], 'from 1 to 10,000'),
        (['--gpus='], '--gpus= is empty'),
        (['--gpu=H100'], "did you mean '--gpus'"),
        (['--batchsize=3'], "did you mean '--batch_size'"),
        (['--tokens=1e9', '--iters=3'], 'say the same thing'),
        (['--tokens=-1'], 'no number above 0'),
        (['--hours=3'], 'needs a speed'),
        (['--dollars=3', '--gpus=H100'], '--dollars needs --price'),
        (['--mfu=0.4'], '--mfu needs --gpus'),
        (['--mfu=40', '--gpus=H100'], 'no number above 0 and up to 1'),
        (['--mfu=0.4', '--gpus=2x24GB'], 'is not known'),
        (['--like=/nowhere'], '/nowhere'),
        (['--law=nothing'], 'no such law'),
        (['--to=x.py'], '--to does not go with a recipe'),
        (['--ratio=5'], '--ratio does not go with a recipe'),
        (['--like='], 'is empty'),
        (['--gpus=H100', '--device=cpu'], 'device=cpu does not go'),
        (['--gpus=H100', '--price=1,2'], '2 prices for 1 kinds'),
        (['--iters=0.5'], 'no whole number'),
        (['--gpus=8xH100', '--total_batch_size=1000'], '--total_batch_size=512 or 1024'),
        (['--n_head=3'], 'n_embd=64 is not divisible'),
        (['--budget=1e20'], 'does not go with --budget'),
        (['--init_from=resume'], 'a plan is made of a recipe'),
    ],
)
def test_bad_input_is_one_sentence(capsys, recipe, words, expected):
    try:
        code = plan.main([recipe, *SMALL, *words])
    except SystemExit as left:
        code = left.code
    said = capsys.readouterr()
    assert code == 2 and said.err.count('\n') == 1 and said.err.startswith('error: ')
    assert expected in said.err and not said.out


def test_what_fits_nowhere_is_said(capsys, recipe):
    assert plan.main([recipe, *SMALL, '--gpus=2x1GB', '--block_size=262144', '--n_embd=256']) == 0
    assert 'nothing fits: a sequence takes' in capsys.readouterr().out


def test_a_law_of_a_file_that_is_none(tmp_path):
    for text in (
        '',
        '[1]',
        '{"E": 1}',
        '{"E": -1, "A": 1, "B": 1, "alpha": 1, "beta": 1, "sizes": [1, 2], "lengths": [1, 2]}',
        '{"E": 1, "A": 1, "B": 1, "alpha": 1, "beta": 1, "sizes": [1], "lengths": 2}',
    ):
        (tmp_path / 'law.json').write_text(text)
        with pytest.raises(UserError):
            scaling_laws.read_law(str(tmp_path / 'law.json'))
