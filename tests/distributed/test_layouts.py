"""The same run on any layout: losses and gradient norms of one process, on 2 and 4 gloo ranks, from
scratch and continued from one another's checkpoints.
"""

import itertools
import shutil

import pytest
import torch
from conftest import equal, losses, records, run_process, run_ranks, weights
from layout_runs import FAMILIES, LAYOUTS, arguments, close, norms, run
from ranks import ranks
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.tensor.debug import CommDebugMode

from onetrain.model_config import resolve_shape

WORK = {  # micro-steps per iteration and what is computed again
    'plain': ['--batch_size=8', '--eval_iters=1'],
    'accumulated': ['--batch_size=4'],
    'recomputed': ['--batch_size=8', '--eval_iters=1', '--activation_checkpointing=full'],
    'accumulated and recomputed': ['--batch_size=4', '--activation_checkpointing=selective'],
}


@pytest.fixture(scope='module')
def single(dataset, tmp_path_factory):
    """single(family): the folder of the run in one process that the others are compared with."""
    made = {}

    def get(family):
        if family not in made:
            out = tmp_path_factory.mktemp(family)
            run(1, *arguments(dataset, out, *FAMILIES[family], '--gradient_log_interval=10'))
            made[family] = out
        return made[family]

    return get


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('family', FAMILIES)
def test_two_ranks_equal_one(single, dataset, tmp_path, family, layout):
    # two kinds of work each, such that every kind is done under every layout
    turn = [*FAMILIES].index(family) + [*LAYOUTS].index(layout)
    for name in [name for number, name in enumerate(WORK) if number % 2 == turn % 2]:
        work, out = WORK[name], tmp_path / name
        run(
            2,
            *arguments(
                dataset,
                out,
                *FAMILIES[family],
                *LAYOUTS[layout],
                *work,
                '--gradient_log_interval=10',
            ),
        )
        assert close(losses(single(family)), losses(out), 1e-5) and close(
            norms(single(family)), norms(out), 1e-4
        ), name
        for a, b in zip(records(single(family), 'eval'), records(out, 'eval'), strict=True):
            assert a['val_loss'] == pytest.approx(b['val_loss'], abs=1e-5) and a[
                'train_loss'
            ] == pytest.approx(b['train_loss'], abs=1e-5)
        for a, b in zip(records(single(family)), records(out), strict=True):
            assert a['tokens_seen'] == b['tokens_seen'] and a['gradients'] == pytest.approx(
                b['gradients'], rel=1e-3, abs=1e-5
            )
        final = weights(single(family), 20), weights(out, 20)
        assert final[0].keys() == final[1].keys() and all(
            (final[0][name] - final[1][name]).abs().max() < 1e-4 for name in final[0]
        )


TOGETHER = {
    'context and ZeRO-1': ['--context_parallel=2', '--use_zero1=True'],
    'context and hybrid': ['--context_parallel=4', '--use_fsdp=True', '--fsdp_replicas=2'],
}


@pytest.mark.parametrize('layout', [*LAYOUTS, *TOGETHER])
def test_four_ranks_equal_one_and_repeat_bitwise(single, dataset, tmp_path, layout):
    for name in 'ab' if layout in LAYOUTS else 'a':
        run(
            4,
            *arguments(
                dataset,
                tmp_path / name,
                *FAMILIES['llama3'],
                *{**LAYOUTS, **TOGETHER}[layout],
                '--batch_size=4',
                '--eval_iters=2',
                '--activation_checkpointing=selective',
            ),
        )
    assert close(losses(single('llama3')), losses(tmp_path / 'a'), 1e-5) and close(
        norms(single('llama3')), norms(tmp_path / 'a'), 1e-4
    )
    if layout in LAYOUTS:
        assert losses(tmp_path / 'a') == losses(tmp_path / 'b') and equal(
            weights(tmp_path / 'a', 20), weights(tmp_path / 'b', 20)
        )
    header = records(tmp_path / 'a', 'header')[0]
    assert header['metadata']['world_size'] == 4
    assert header['startup_info']['hardware']['parallelism'] == {
        'hybrid': 'FSDP (ZeRO-3), 2 replicas',
        'context': 'DDP, context parallel 2',
        'ZeRO-2': 'FSDP (ZeRO-2)',
        'ZeRO-3': 'FSDP (ZeRO-3)',
        'context and ZeRO-1': 'ZeRO-1, context parallel 2',
        'context and hybrid': 'FSDP (ZeRO-3), 2 replicas, context parallel 4',
    }.get(layout, layout)


def test_a_sequence_that_does_not_divide_into_chunks_is_filled_up(dataset, tmp_path):
    for name, size, extra in (('one', 1, []), ('two', 2, LAYOUTS['context'])):
        run(
            size,
            *arguments(
                dataset,
                tmp_path / name,
                *FAMILIES['gpt2'],
                '--block_size=18',
                '--total_batch_size=144',
                *extra,
            ),
        )
    assert close(losses(tmp_path / 'one'), losses(tmp_path / 'two'), 1e-5)
    assert records(tmp_path / 'one', 'eval')[-1]['val_loss'] == pytest.approx(
        records(tmp_path / 'two', 'eval')[-1]['val_loss'], abs=1e-5
    )


def test_context_parallel_turns_by_the_length_of_the_whole_sequence(dataset, tmp_path):
    """Dynamic RoPE depends on it; a rank has half of the tokens."""
    for name, size, extra in (('one', 1, []), ('two', 2, LAYOUTS['context'])):
        run(
            size,
            *arguments(
                dataset,
                tmp_path / name,
                '--arch_preset=llama',
                '--rope_scaling=dynamic',
                '--rope_original_block_size=8',
                '--max_iters=4',
                *extra,
            ),
        )
    assert close(losses(tmp_path / 'one'), losses(tmp_path / 'two'), 1e-5)


@pytest.mark.parametrize('layout', ['DDP', 'ZeRO-3', 'context'])
def test_samples_while_training_are_those_of_one_process(dataset, tmp_path, layout):
    args = ['--sample_interval=10', '--sample_start=the']
    one = run(1, *arguments(dataset, tmp_path / 'one', *args))
    two = run(2, *arguments(dataset, tmp_path / 'two', *args, *LAYOUTS[layout]))

    def samples(output):
        return [part.split('\n----')[0] for part in output.split('---- sample ')[1:]]

    assert samples(one) == samples(two) and len(samples(one)) == 2
    assert close(losses(tmp_path / 'one'), losses(tmp_path / 'two'), 1e-5)


def traffic(options, micro_steps):
    """[(gathers, sums)] of each micro-step of an iteration: how often this rank asked for
    parameters and for sums of gradients.
    """
    import train as trainer
    from model import Model
    from onetrain.distributed import layouts, processes

    world = processes.start('cpu')
    layouts.choose_layout(world, trainer.Config(block_size=16, **options), [])
    model = Model.on_meta(
        resolve_shape(
            dict(arch_preset='llama', n_layer=3, n_head=2, n_embd=16, block_size=16, vocab_size=32)
        ),
        ring=world.ring,
    )
    layouts.shard(model, world, torch.float32, torch.float32, False)
    model.allocate('cpu').init_weights(0)
    _, train_model = layouts.wrap(model, world, False, micro_steps)
    sums = [0]
    if hasattr(train_model, 'register_comm_hook'):

        def count(state, bucket):
            sums[0] += 1
            return default_hooks.allreduce_hook(None, bucket)

        train_model.register_comm_hook(None, count)
    x, y = torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.int64)
    counts = []
    for micro_step in range(micro_steps):
        with (
            CommDebugMode() as seen,
            layouts.gradient_sync_context(train_model, micro_step == micro_steps - 1, world),
        ):
            train_model(x, y).backward()
        by_name = {str(operator): number for operator, number in seen.get_comm_counts().items()}
        counts.append(
            (
                sum(
                    number
                    for name, number in by_name.items()
                    if 'allgather' in name or 'all_gather' in name
                ),
                sum(number for name, number in by_name.items() if 'reduce_scatter' in name)
                + sums[0],
            )
        )
    return counts


def test_traffic_of_the_micro_steps():
    """DDP sums in the last alone; ZeRO-2 gathers in the first alone, ZeRO-3 in each, for the
    backward pass again what is not at hand; both sum in each.
    """
    # three blocks, the table, norm and head together, and nothing left for the model as a whole
    units = 6
    ddp, zero2, zero3 = (
        ranks(2)(traffic, options, 3)[0]
        for options in ({}, {'use_fsdp': True, 'fsdp_reshard': False}, {'use_fsdp': True})
    )
    assert [sums for _, sums in ddp[:2]] == [0, 0] and ddp[2][1] >= 1, ddp
    assert [gathers for gathers, _ in zero2] == [units - 1, 0, 0] and all(
        sums == units - 1 for _, sums in zero2
    ), zero2
    # forward all but the model as a whole; backward the same, but for the head, which stays
    assert zero3 == [(2 * (units - 1) - 1, units - 1)] * 3


@pytest.fixture(scope='module')
def halves(single, dataset, tmp_path_factory):
    """halves(layout): a run of 2 ranks under that layout that ended at iteration 10 of 20."""
    made = {}

    def get(layout):
        if layout not in made:
            out = tmp_path_factory.mktemp('half') / 'run'
            run(
                2,
                *arguments(
                    dataset,
                    out,
                    *FAMILIES['llama3'],
                    *LAYOUTS[layout],
                    '--batch_size=8',
                    '--eval_iters=1',
                    '--max_iters=10',
                    '--lr_decay_iters=20',
                ),
            )
            made[layout] = out
        return made[layout]

    return get


OFF = {
    '--use_zero1': 'False',
    '--use_fsdp': 'False',
    '--fsdp_reshard': 'True',
    '--fsdp_replicas': '1',
    '--context_parallel': '1',
}
PAIRS = [
    *itertools.product(LAYOUTS, [(1, 'DDP')] + [(2, to) for to in LAYOUTS]),
    *(
        (layout, (4, to))
        for number, layout in enumerate(LAYOUTS)
        for to in ([*LAYOUTS][number - 1], [*LAYOUTS][number - 3])
    ),
]


@pytest.fixture(scope='module')
def unbroken(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp('unbroken')
    run(1, *arguments(dataset, out, *FAMILIES['llama3'], '--lr_decay_iters=20'))
    return out


@pytest.mark.parametrize(
    'saved,to', PAIRS, ids=[f'{saved} on 2, then {to} on {size}' for saved, (size, to) in PAIRS]
)
def test_resumes_on_another_layout_and_number_of_ranks(
    halves, unbroken, dataset, tmp_path, saved, to
):
    size, layout = to
    shutil.copytree(halves(saved), tmp_path / 'run')
    keys = {**OFF, **dict(argument.split('=') for argument in LAYOUTS[layout])}
    output = run(
        size,
        f'--out_dir={tmp_path}/run',
        f'--dataset={dataset}',
        '--device=cpu',
        '--init_from=resume',
        '--max_iters=20',
        *(f'{key}={value}' for key, value in keys.items()),
        f'--batch_size={16 // size}',
    )
    assert 'continuing at iter 10' in output
    assert close(losses(unbroken), losses(tmp_path / 'run'), 1e-5)
    if (size, layout) == (2, saved):  # the same again: not a bit is lost
        run(
            2,
            f'--out_dir={halves(saved)}',
            f'--dataset={dataset}',
            '--device=cpu',
            '--init_from=resume',
            '--max_iters=20',
        )
        again = losses(halves(saved)), weights(halves(saved), 20)
        # as it was for those that follow
        shutil.rmtree(halves(saved) / 'checkpoints' / 'step_00000020')
        assert again[0] == losses(tmp_path / 'run') and equal(
            again[1], weights(tmp_path / 'run', 20)
        )


def test_micro_batch_and_processes_do_not_matter_to_dropout(dataset, tmp_path):
    """Masks are drawn by the position of a micro-batch in the stream."""
    for name, size, batch in (('one', 1, 4), ('two', 2, 4), ('FSDP', 2, 4)):
        run(
            size,
            *arguments(
                dataset,
                tmp_path / name,
                '--dropout=0.1',
                f'--batch_size={batch}',
                *LAYOUTS['ZeRO-3'] * (name == 'FSDP'),
            ),
        )
    assert close(losses(tmp_path / 'one'), losses(tmp_path / 'two'), 1e-5) and close(
        losses(tmp_path / 'one'), losses(tmp_path / 'FSDP'), 1e-5
    )


def test_micro_batch_does_not_matter(dataset, tmp_path):
    for name, sizes in (
        ('a', ('--batch_size=8',)),
        ('b', ('--batch_size=2', '--gradient_accumulation_steps=4')),
        ('c', ('--batch_size=4', '--total_batch_size=128')),
    ):
        run(1, *[a for a in arguments(dataset, tmp_path / name) if 'total' not in a], *sizes)
    assert close(losses(tmp_path / 'a'), losses(tmp_path / 'b'), 1e-5) and close(
        losses(tmp_path / 'a'), losses(tmp_path / 'c'), 1e-5
    )
    assert records(tmp_path / 'c', 'header')[0]['config']['gradient_accumulation_steps'] == 2


def test_without_total_batch_size_accumulation_counts_on_each_rank(dataset, tmp_path):
    args = [a for a in arguments(dataset, tmp_path) if 'total' not in a]
    output = run(2, *args, '--gradient_accumulation_steps=3', '--max_iters=1')
    assert '4 sequences x 16 tokens x 3 micro-steps x 2 ranks; 384 tokens per iteration' in output


def test_compiled_equals_eager(dataset, tmp_path):
    common = ['--max_iters=8', '--arch_preset=llama3', '--num_key_value_heads=1']
    run(1, *arguments(dataset, tmp_path / 'eager', *common))
    # FSDP: tests/ops/test_experts.py
    for name, processes, extra in (
        ('compiled', 1, []),
        ('context', 2, [*LAYOUTS['context'], '--eval_at_start=False', '--eval_interval=100']),
    ):
        args = [*arguments(dataset, tmp_path / name, *common, *extra), '--compile=True']
        code, output = run_process('train.py', *args) if processes == 1 else run_ranks(2, *args)
        assert code == 0 and 'Compile: on' in output, output
        assert close(losses(tmp_path / 'eager'), losses(tmp_path / name), 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu_batches_are_pinned_and_resume_is_bitwise(dataset, tmp_path):
    from onetrain.data.dataset import open_dataset
    from onetrain.data.loader import TrainLoader
    from onetrain.data.order import WindowOrder

    file = open_dataset(dataset, '/')[0]
    loader = TrainLoader(
        file,
        WindowOrder(len(file), 16, 0),
        batch_size=2,
        rank=0,
        world_size=1,
        position=0,
        device=torch.device('cuda'),
    )
    assert loader.queue.get(timeout=30).is_pinned()
    loader.close()
    for name, last in (('a', 24), ('b', 16)):
        run(
            1,
            *arguments(
                dataset,
                tmp_path / name,
                f'--max_iters={last}',
                '--lr_decay_iters=24',
                '--total_batch_size=2048',
                '--device=cuda',
                '--block_size=512',
                '--dropout=0.1',
            ),
        )
    run(
        1,
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}/b',
        '--init_from=resume',
        '--max_iters=24',
        '--device=cuda',
    )
    assert losses(tmp_path / 'a') == losses(tmp_path / 'b')


def test_bfloat16_keeps_float32_weights(dataset, tmp_path):
    """Matmuls in bf16 move the losses a little; weights and moments stay fp32."""
    for dtype in ('float32', 'bfloat16'):
        run(1, *arguments(dataset, tmp_path / dtype, f'--dtype={dtype}', '--arch_preset=llama'))
    a, b = losses(tmp_path / 'float32'), losses(tmp_path / 'bfloat16')
    assert a != b and close(a, b, 0.02)
    changed = weights(tmp_path / 'bfloat16', 20)['model.transformer.h.0.mlp.c_fc.weight']
    assert changed.dtype == torch.float32 and not torch.equal(changed, changed.bfloat16().float())


def test_bfloat16_under_fsdp_gathers_in_it_and_sums_in_float32(dataset, tmp_path):
    for family in ('qwen3', 'gpt2', 'neox'):  # tied and untied, with both norms, with biases
        for name, size, extra in (
            ('one', 1, []),
            ('two', 2, LAYOUTS['ZeRO-3']),
            ('low', 2, [*LAYOUTS['ZeRO-3'], '--fsdp_reduce_dtype=bfloat16', '--fsdp_offload=True']),
        ):
            run(
                size,
                *arguments(
                    dataset,
                    tmp_path / family / name,
                    f'--arch_preset={family}',
                    '--dtype=bfloat16',
                    *extra,
                ),
            )
        one, two, low = (losses(tmp_path / family / name) for name in ('one', 'two', 'low'))
        assert close(one, two, 0.01) and close(one, low, 0.02) and two != low
        assert (
            weights(tmp_path / family / 'two', 20)['model.transformer.wte.weight'].dtype
            == torch.float32
        )


def test_offload_to_the_cpu_changes_nothing(single, dataset, tmp_path):
    """On a CPU the parameters are there already; what is proven is that the trainer goes through
    FSDP's offload policy.
    """
    output = run(
        2,
        *arguments(
            dataset, tmp_path, *FAMILIES['llama3'], '--use_fsdp=True', '--fsdp_offload=True'
        ),
    )
    assert 'parameters and optimizer state in the memory of the CPU' in output
    assert close(losses(single('llama3')), losses(tmp_path), 1e-5) and close(
        norms(single('llama3')), norms(tmp_path), 1e-4
    )


def start_of(settings, options, folder=None):
    """All parameters of a fresh model on this rank's layout, gathered."""
    import train as trainer
    from model import Model
    from onetrain import huggingface
    from onetrain.distributed import layouts, processes
    from onetrain.model_config import resolve_shape

    world = processes.start('cpu')
    layouts.choose_layout(world, trainer.Config(**options), [])
    model = Model.on_meta(resolve_shape(settings), ring=world.ring)
    layouts.shard(model, world, torch.float32, torch.float32, False)
    model.allocate('cpu')
    if folder:
        model.fill(huggingface.read_weights(folder, model.config))
    else:
        model.init_weights(7)
    return {
        name: p.detach().full_tensor() if world.fsdp else p.detach()
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize('family', ['gpt2', 'llama3', 'neox'])
def test_weights_start_alike_on_every_layout(tmp_path, family):
    """Drawn from the seed or read from a Hugging Face folder, to the last bit; 3 rows over 4 ranks
    leave one without any.
    """
    from model import Model
    from onetrain import huggingface

    settings = dict(
        arch_preset=family, n_layer=2, n_head=3, n_embd=24, d_ff=10, block_size=3, vocab_size=31
    )
    expected = start_of(settings, {})
    model = Model(resolve_shape(settings))
    model.init_weights(8)
    huggingface.write_model(str(tmp_path), model.config, model.state_dict())
    from_folder = dict(model.named_parameters())
    for size, options in (
        (2, {'use_fsdp': True}),
        (4, {'use_fsdp': True, 'fsdp_reshard': False}),
        (4, {'use_fsdp': True, 'fsdp_replicas': 2}),
        (2, {'use_zero1': True}),
    ):
        for rank in ranks(size)(start_of, settings, options):
            assert equal(rank, expected)
        if family == 'gpt2':
            continue  # its folder has biases, which this model has not
        for rank in ranks(size)(start_of, settings, options, str(tmp_path)):
            assert rank.keys() == from_folder.keys() and all(
                torch.equal(rank[name], from_folder[name]) for name in rank
            )


def gathered(family):
    """dtypes under FSDP in bf16 of what the first block gets, of its matmul's weight, of the token
    table and of the loss.
    """
    import train as trainer
    from model import Model
    from onetrain.distributed import layouts, processes

    world = processes.start('cpu')
    layouts.choose_layout(world, trainer.Config(block_size=16, use_fsdp=True), [])
    model = Model.on_meta(
        resolve_shape(
            dict(arch_preset=family, n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=32)
        )
    )
    layouts.shard(model, world, torch.bfloat16, torch.float32, False)
    model.allocate('cpu').init_weights(0)
    seen = []
    model.transformer.h[0].mlp.c_fc.register_forward_hook(
        lambda module, inputs, output: seen.append(module.weight.dtype)
    )
    model.transformer.h[0].ln_1.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].dtype)
    )
    model.transformer.wte.register_forward_hook(
        lambda module, inputs, output: seen.append(module.weight.dtype)
    )
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = model(torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.int64))
    return [str(dtype) for dtype in (*seen, loss.dtype)]


@pytest.mark.parametrize('family', ['gpt2', 'llama'])
def test_fsdp_in_bfloat16_keeps_the_table_and_the_residual_in_float32(family):
    for rank in ranks(2)(gathered, family):
        assert rank == ['torch.float32', 'torch.float32', 'torch.bfloat16', 'torch.float32']
