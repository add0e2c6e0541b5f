"""The same run on any layout: 1 process with accumulation = 2 gloo processes, same batches, losses equal to fp32 rounding."""
import pytest
import torch
from conftest import TINY, losses, records, run_process, torchrun, weights

from engine import checkpoint


def arguments(dataset, out, *args):
    return [f'--dataset={dataset}', f'--out_dir={out}', *TINY, '--max_iters=24', '--eval_interval=8', *args]


def close(a, b, tolerance):
    return a.keys() == b.keys() and max(abs(a[k] - b[k]) for k in a) <= tolerance


@pytest.mark.parametrize('dropout', ['0.0', '0.1'])
def test_accumulation_in_one_process_equals_two_processes(train, dataset, tmp_path, dropout):
    common = ['--max_iters=24', '--eval_interval=8', f'--dropout={dropout}']
    assert train(tmp_path / 'one', *common, '--gradient_accumulation_steps=4') == 0
    code, output = torchrun(2, *arguments(dataset, tmp_path / 'two', f'--dropout={dropout}', '--gradient_accumulation_steps=2'))
    assert code == 0, output
    assert close(losses(tmp_path / 'one'), losses(tmp_path / 'two'), 1e-5)
    for a, b in zip(records(tmp_path / 'one', 'eval'), records(tmp_path / 'two', 'eval')):
        assert a['val_loss'] == pytest.approx(b['val_loss'], abs=1e-5) and a['train_loss'] == pytest.approx(b['train_loss'], abs=1e-5)
    for a, b in zip(records(tmp_path / 'one'), records(tmp_path / 'two')):
        assert a['tokens_seen'] == b['tokens_seen'] and a['gradients']['global_norm'] == pytest.approx(b['gradients']['global_norm'], abs=1e-4)
    header = records(tmp_path / 'two', 'header')[0]
    assert header['metadata']['world_size'] == 2 and header['startup_info']['hardware']['parallelism'] == 'DDP'


def test_micro_batch_does_not_matter(train, tmp_path):
    for name, sizes in (('a', ('--batch_size=8',)), ('b', ('--batch_size=2', '--gradient_accumulation_steps=4')), ('c', ('--batch_size=4', '--total_batch_size=128'))):
        assert train(tmp_path / name, '--max_iters=24', '--eval_interval=100', *sizes) == 0
    assert close(losses(tmp_path / 'a'), losses(tmp_path / 'b'), 1e-5) and close(losses(tmp_path / 'a'), losses(tmp_path / 'c'), 1e-5)
    assert records(tmp_path / 'c', 'header')[0]['config']['gradient_accumulation_steps'] == 2


def test_total_batch_size_fixes_the_batch_for_any_world_size(train, dataset, tmp_path):
    assert train(tmp_path / 'one', '--max_iters=24', '--eval_interval=8', '--total_batch_size=256') == 0
    code, output = torchrun(2, *arguments(dataset, tmp_path / 'two', '--total_batch_size=256'))
    assert code == 0 and '4 sequences x 16 tokens x 2 micro-steps x 2 ranks = 256 tokens' in output, output
    assert close(losses(tmp_path / 'one'), losses(tmp_path / 'two'), 1e-5)


def test_two_processes_repeat_and_resume_bitwise_and_continue_as_one(train, dataset, tmp_path):
    for name in ('a', 'b'):
        code, output = torchrun(2, *arguments(dataset, tmp_path / name, '--total_batch_size=256'))
        assert code == 0, output
    assert losses(tmp_path / 'a') == losses(tmp_path / 'b')
    code, output = torchrun(2, *arguments(dataset, tmp_path / 'c', '--total_batch_size=256', '--max_iters=16'))
    assert code == 0, output
    code, output = torchrun(2, f'--out_dir={tmp_path}/c', '--device=cpu', '--init_from=resume', '--max_iters=24')
    assert code == 0 and 'continuing at iter 16' in output, output
    assert losses(tmp_path / 'c') == losses(tmp_path / 'a')
    # the same checkpoint under another number of processes
    assert checkpoint.steps(str(tmp_path / 'c'))[-1] == 24
    assert train(tmp_path / 'c', '--init_from=resume', '--max_iters=26', '--total_batch_size=256') == 0
    assert sorted(losses(tmp_path / 'c')) == list(range(1, 27))


def test_bad_input_stops_all_processes_with_code_2_and_one_message(dataset, tmp_path):
    code, output = torchrun(2, *arguments(dataset, tmp_path, '--total_batch_size=100'))
    assert code != 0 and output.count('error: total_batch_size=100 is not a multiple') == 1 and 'type --total_batch_size=128' in output
    assert 'exitcode  : 2' in output


def test_compiled_equals_eager(dataset, train, tmp_path):
    assert train(tmp_path / 'eager', '--max_iters=8', '--eval_interval=8', '--arch_preset=llama3', '--num_key_value_heads=1') == 0
    code, output = run_process('train.py', *arguments(dataset, tmp_path / 'compiled', '--arch_preset=llama3', '--num_key_value_heads=1', '--max_iters=8',
                                                      '--compile=True'))
    assert code == 0 and 'Compile: on' in output, output
    assert close(losses(tmp_path / 'eager'), losses(tmp_path / 'compiled'), 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu_batches_are_pinned_and_resume_is_bitwise(train, dataset, tmp_path):
    from engine.loader import TrainLoader, WindowOrder, open_dataset
    file = open_dataset(dataset, '/')[0]
    loader = TrainLoader(file, WindowOrder(len(file), 16, 0), batch_size=2, rank=0, world_size=1, position=0, device=torch.device('cuda'))
    assert next(loader.source).is_pinned()
    loader.close()
    for name, last in (('a', 24), ('b', 16)):
        assert train(tmp_path / name, f'--max_iters={last}', '--eval_interval=8', '--device=cuda', '--dropout=0.1') == 0
    assert train(tmp_path / 'b', '--init_from=resume', '--max_iters=24', '--device=cuda') == 0
    assert losses(tmp_path / 'a') == losses(tmp_path / 'b')


def test_bfloat16_keeps_float32_weights(train, tmp_path):
    """Matmuls in bf16 move the losses a little; weights and moments stay fp32."""
    for dtype in ('float32', 'bfloat16'):
        assert train(tmp_path / dtype, '--max_iters=20', '--eval_interval=100', f'--dtype={dtype}', '--arch_preset=llama') == 0
    a, b = losses(tmp_path / 'float32'), losses(tmp_path / 'bfloat16')
    assert a != b and close(a, b, 0.02)
    changed = weights(tmp_path / 'bfloat16', 20)['model.transformer.h.0.mlp.c_fc.weight']
    assert changed.dtype == torch.float32 and not torch.equal(changed, changed.bfloat16().float())
