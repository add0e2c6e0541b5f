"""The log is true and complete: JSONL survives any kill, the JSON has the documented keys and is
always valid, numbers are what they say.
"""

import glob
import json
import math
import os

import pytest
from conftest import losses, records, run_process

from onetrain.logs import run_log
from onetrain.logs.run_json import finite, read_records, write_json
from onetrain.logs.run_log import RunLog, new_run_name, scalars

HEADER = {'config': {'a': 1}, 'startup_info': {}, 'metadata': {}}
ITERATION = dict(
    lr=0.1,
    tokens_seen=10,
    time_ms=5.0,
    tokens_per_sec=100.0,
    data_wait_ms=0.0,
    wall_s=1.0,
    mfu=-100.0,
    memory={'allocated_gb': 1.0},
    gradients={'global_norm': 1.0},
)


@pytest.fixture(scope='module')
def run(dataset, tmp_path_factory):
    """Folder of a run with everything logged."""
    from conftest import run_train

    out = tmp_path_factory.mktemp('run')
    assert (
        run_train(
            dataset,
            out,
            '--max_iters=30',
            '--eval_interval=10',
            '--gradient_log_interval=10',
            '--gradient_accumulation_steps=2',
            '--arch_preset=llama3',
            '--num_key_value_heads=1',
            '--log_save_interval=1',
        )
        == 0
    )
    return out


def read_json(out):
    with open(glob.glob(os.path.join(out, 'run_*.json'))[0]) as f:
        return json.load(f, parse_constant=lambda word: pytest.fail(f'{word} is not JSON'))


def test_schema(run):
    log = read_json(run)
    assert {
        'run_name',
        'start_time',
        'end_time',
        'config',
        'startup_info',
        'training_iterations',
        'training_progress',
        'eval_steps',
        'checkpoints',
        'metadata',
        'summary',
    } <= log.keys()
    info = log['startup_info']
    assert {'timestamp', 'model', 'optimizer', 'config', 'hardware'} <= info.keys()
    assert {'total_params', 'trainable_params', 'non_embedding_params'} <= info['model'].keys()
    assert {'type', 'param_groups'} <= info['optimizer'].keys() and info['optimizer'][
        'fused'
    ] is True
    assert {'gpu_name', 'num_gpus', 'gpu_memory_gb', 'precision', 'parallelism'} <= info[
        'hardware'
    ].keys()
    iteration = log['training_iterations'][20]
    assert {
        'iter',
        'loss',
        'time_ms',
        'mfu',
        'memory',
        'gradients',
        'lr',
        'tokens_seen',
        'wall_s',
        'data_wait_ms',
    } <= iteration.keys()
    assert {
        'mfu',
        'mfu_percent',
        'flops_achieved',
        'flops_per_token',
        'tokens_per_sec',
        'hardware_peak_flops',
        'hardware_peak_tflops',
        'achieved_tflops',
        'gpu_name',
        'precision',
        'num_gpus',
        'attention_flops_per_layer',
        'ffn_flops_per_layer',
        'attention_to_ffn_ratio',
        'architecture',
    } <= iteration['mfu'].keys()
    assert (
        iteration['mfu']['architecture'] == '2L-2H-32D-GQA1-RoPE-RMS-SwiGLU-PreNorm'
        and log['training_iterations'][0]['mfu'] == -100.0
    )
    assert {'allocated_gb', 'reserved_gb', 'max_allocated_gb', 'max_reserved_gb'} == iteration[
        'memory'
    ].keys()
    measured = log['training_iterations'][19]['gradients']
    assert {
        'global_norm',
        'mean_layer_norm',
        'max_layer_norm',
        'min_layer_norm',
        'grad_mean',
        'grad_std',
        'grad_min',
        'grad_max',
    } == measured.keys()
    # no mfu, as the peak of a CPU is not known
    assert {'iter', 'loss', 'tokens_per_sec', 'memory_allocated_gb', 'dt_ms'} == log[
        'training_progress'
    ][3].keys()
    assert sum(entry.get('mfu', 0.0) for entry in log['training_progress']) == 0
    assert {'iter', 'train_loss', 'val_loss', 'timestamp', 'lr'} <= log['eval_steps'][0].keys()
    assert {'iter', 'val_loss', 'path', 'timestamp', 'stall_ms'} <= log['checkpoints'][
        0
    ].keys() and log['checkpoints'][0]['val_loss'] == log['eval_steps'][1]['val_loss']
    assert {'world_size', 'device', 'dtype', 'compile', 'use_zero1', 'use_fsdp'} <= log[
        'metadata'
    ].keys()
    assert {
        'total_iterations',
        'final_iter',
        'final_train_loss',
        'best_val_loss',
        'avg_time_ms',
        'avg_mfu',
        'total_eval_steps',
        'total_checkpoints',
    } <= log['summary'].keys()
    assert (
        log['summary']['final_iter'] == 30
        and log['summary']['total_eval_steps'] == 4
        and log['summary']['total_checkpoints'] == 3
    )


def test_the_effective_values_are_logged(run):
    config = read_json(run)['config']
    assert (
        config['d_ff'] == 112
        and config['rope_theta'] == 500000.0
        and config['normalization'] == 'rmsnorm'
        and config['head_dim'] == 16
    )
    assert (
        config['dtype'] == 'float32'
        and config['device'] == 'cpu'
        and config['vocab_size'] is not None
    )
    assert records(run, 'header')[0]['config'] == config


def test_jsonl_and_json_say_the_same(run):
    log = read_json(run)
    constants = records(run, 'header')[0]['mfu_constants']
    assert {
        'hardware_peak_flops',
        'gpu_name',
        'architecture',
        'flops_per_token',
    } <= constants.keys()
    for record, iteration in zip(records(run), log['training_iterations'], strict=True):
        # what does not change is in the header alone
        assert 'architecture' not in json.dumps(record) and -100.0 not in record.values()
        del record['type']
        record['mfu'] = -100.0 if record['mfu'] is None else {**constants, **record['mfu']}
        assert record == iteration
    assert records(run, 'end')[0]['summary'] == log['summary']


def test_logged_numbers_are_what_they_say(run, train, tmp_path):
    """Loss is the mean over the micro-steps, the norm is that before clipping, tokens and rates fit
    the batch.
    """
    for r in records(run)[1:]:
        assert r['tokens_seen'] == r['iter'] * 2 * 4 * 16
        assert r['tokens_per_sec'] == pytest.approx(128 / (r['time_ms'] / 1000))
    assert train(tmp_path / 'unclipped', '--max_iters=1', '--grad_clip=0') == 0
    assert train(tmp_path / 'clipped', '--max_iters=1', '--grad_clip=0.01') == 0
    norms = [
        records(tmp_path / name)[0]['gradients']['global_norm'] for name in ('unclipped', 'clipped')
    ]
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 0.1
    measured = records(run)[9]['gradients']
    assert (
        measured['min_layer_norm']
        <= measured['mean_layer_norm']
        <= measured['max_layer_norm']
        <= measured['global_norm']
    )
    count = read_json(run)['startup_info']['model']['total_params']
    assert measured['global_norm'] == pytest.approx(
        math.sqrt((measured['grad_std'] ** 2 + measured['grad_mean'] ** 2) * count), rel=1e-3
    )


def test_time_leaves_out_evaluation_and_saving(train, tmp_path, monkeypatch):
    import time

    from onetrain.evaluation import evaluator

    real = evaluator.evaluation_batches

    def slow(*args):
        time.sleep(0.5)
        return real(*args)

    monkeypatch.setattr(evaluator, 'evaluation_batches', slow)
    assert train(tmp_path, '--max_iters=12', '--eval_interval=4') == 0
    assert (
        max(r['time_ms'] for r in records(tmp_path)[1:]) < 500
        and records(tmp_path)[-1]['wall_s'] > 2.0
    )


def test_the_learning_rate_is_the_one_used(run):
    rates = [r['lr'] for r in records(run)]
    assert rates[0] == pytest.approx(1e-3 / 3) and rates[2] == pytest.approx(1e-3)


def test_a_killed_run_keeps_its_lines(tmp_path):
    log = RunLog(str(tmp_path), 'run_1', HEADER)
    log.event('iter', iter=1, loss=2.0, **ITERATION)
    log.event('iter', iter=2, loss=1.5, **ITERATION)
    assert [r['iter'] for r in records(tmp_path)] == [1, 2]  # nothing was closed
    with open(tmp_path / 'run_1.jsonl', 'a') as f:
        f.write('{"type": "iter", "iter": 3, "lo')
    again = RunLog(str(tmp_path), 'run_1', HEADER, resume_step=1)
    again.event('iter', iter=2, loss=1.25, **ITERATION)
    again.close()
    assert losses(tmp_path) == {1: 2.0, 2: 1.25} and len(records(tmp_path, 'header')) == 1
    assert [r['loss'] for r in json.load(open(tmp_path / 'run_1.json'))['training_iterations']] == [
        2.0,
        1.25,
    ]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    assert finite({'a': [math.nan, 1.0, (math.inf,)], 'b': 'nan'}) == {
        'a': [None, 1.0, [None]],
        'b': 'nan',
    }
    log = RunLog(str(tmp_path), 'run_1', HEADER)
    log.event('iter', iter=1, loss=math.nan, **ITERATION)
    log.close()
    assert read_json(tmp_path)['training_iterations'][0]['loss'] is None


def test_run_names_never_collide(tmp_path):
    first = new_run_name(str(tmp_path))
    (tmp_path / f'{first}.jsonl').write_text('')
    assert new_run_name(str(tmp_path)) != first


def test_console_text_is_kept_and_the_progress_bar_is_not(dataset, tmp_path):
    from conftest import TINY

    code, output = run_process(
        'train.py', f'--dataset={dataset}', f'--out_dir={tmp_path}', *TINY, '--max_iters=3'
    )
    text = open(glob.glob(f'{tmp_path}/*.log')[0]).read()
    assert code == 0 and text == output and '\r' not in text and 'it/s' not in text
    for words in (
        'CUDA Graph',
        'DataLoader',
        'Attention backend',
        'tokens per iteration',
        'Parameters: ',
        'System:',
    ):
        assert words in text


def test_dashboards_get_flat_numbers():
    record = {
        'type': 'iter',
        'iter': 3,
        'loss': 1.0,
        'mfu': -100.0,
        'memory': {'allocated_gb': 2.0},
        'timestamp': 'x',
    }
    assert scalars('iter', record) == {'train/loss': 1.0, 'train/memory/allocated_gb': 2.0}


@pytest.mark.parametrize('package', ['wandb', 'trackio'])
def test_dashboards_receive_the_records(train, tmp_path, monkeypatch, package):
    """Through a module that stands in for the package, which is optional."""
    import sys
    import types

    logged = []
    fake = types.ModuleType(package)
    fake.init = lambda **options: types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)),
        finish=lambda: logged.append('finished'),
    )
    monkeypatch.setitem(sys.modules, package, fake)
    assert train(tmp_path, '--max_iters=3', '--eval_interval=3', f'--{package}_log=True') == 0
    assert [entry[0] for entry in logged[:-1]] == [0, 1, 2, 3, 3] and logged[-1] == 'finished'
    assert logged[1][1]['train/loss'] == losses(tmp_path)[1] and 'eval/val_loss' in logged[0][1]


def test_dashboards_get_the_samples(train, tmp_path, monkeypatch):
    """Of W&B and TensorBoard, through stand-ins; as they are on the terminal."""
    import sys
    import types

    written = {'wandb': [], 'tensorboard': []}
    wandb = types.ModuleType('wandb')
    wandb.Html = lambda text: ('html', text)
    wandb.init = lambda **options: types.SimpleNamespace(
        log=lambda values, step: written['wandb'].append((step, values)), finish=lambda: None
    )
    board = types.ModuleType('torch.utils.tensorboard')
    board.SummaryWriter = lambda folder: types.SimpleNamespace(
        add_scalar=lambda *scalar: None,
        close=lambda: None,
        add_text=lambda tag, text, step: written['tensorboard'].append((step, tag, text)),
    )
    for name, module in (
        ('wandb', wandb),
        ('tensorboard', types.ModuleType('tensorboard')),
        ('torch.utils.tensorboard', board),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    # no < in it
    assert (
        train(
            tmp_path,
            '--max_iters=4',
            '--eval_interval=4',
            '--wandb_log=True',
            '--tensorboard_log=True',
            '--sample_interval=4',
            '--sample_start=the <b>',
        )
        == 2
    )
    assert (
        train(
            tmp_path,
            '--max_iters=4',
            '--eval_interval=4',
            '--wandb_log=True',
            '--tensorboard_log=True',
            '--sample_interval=4',
            '--sample_start=the fox',
        )
        == 0
    )
    ((step, values),) = [(step, values) for step, values in written['wandb'] if 'sample' in values]
    assert (
        step == 4
        and values['sample'][0] == 'html'
        and values['sample'][1].startswith('<pre>the fox')
    )
    assert written['tensorboard'] == [
        (
            4,
            'sample',
            '    '
            + values['sample'][1]
            .removeprefix('<pre>')
            .removesuffix('</pre>')
            .replace('\n', '\n    '),
        )
    ]


def test_memory_is_measured(run):
    memory = [r['memory'] for r in records(run)]
    assert all(0.05 < m['allocated_gb'] <= m['max_allocated_gb'] < 100 for m in memory)


def test_a_full_disk_costs_no_record_and_no_run(tmp_path, monkeypatch):
    log = RunLog(str(tmp_path), 'run_1', HEADER)
    file, room = log.lines, [True]

    class Disk:
        def write(self, data):
            if not room[0]:
                raise OSError(28, 'No space left on device')
            return file.write(data[:50])  # a disk may take less than it is given

        def fileno(self):
            return file.fileno()

        def close(self):
            file.close()

    log.lines = Disk()
    log.event('iter', iter=1, loss=2.0, **ITERATION)
    room[0] = False
    log.event('iter', iter=2, loss=1.5, **ITERATION)
    # so the checkpoint after it is not saved either
    with pytest.raises(OSError, match='the log before it cannot be written'):
        log.sync()
    room[0] = True
    log.event('iter', iter=3, loss=1.0, **ITERATION)
    log.sync()
    log.close()
    assert losses(tmp_path) == {1: 2.0, 2: 1.5, 3: 1.0}


def test_a_damaged_line_is_set_aside(tmp_path):
    log = RunLog(str(tmp_path), 'run_1', HEADER)
    for step in (1, 2, 3):
        log.event('iter', iter=step, loss=2.0, **ITERATION)
    text = (tmp_path / 'run_1.jsonl').read_text().splitlines(keepends=True)
    bad = [
        text[2].replace('"type"', '"tyqe"'),
        '[1]\n',
        '{"type": "iter", "iter": "x"}\n',
        'no json\n',
    ]
    (tmp_path / 'run_1.jsonl').write_text(''.join([*text[:2], *bad, text[3]]))
    # what lies behind the last whole line up to there is looked at
    RunLog(str(tmp_path), 'run_1', HEADER, resume_step=2).close()
    assert sorted(losses(tmp_path)) == [1] and (
        tmp_path / 'run_1.jsonl.damaged'
    ).read_text() == ''.join(bad)


def test_a_sync_by_another_thread_doubles_no_record(tmp_path):
    """The thread that saves brings the log to the disk while the main thread is in the middle of a
    write.
    """
    import threading
    import time

    log = RunLog(str(tmp_path), 'run_1', HEADER)
    file = log.lines

    class Slow:
        def write(self, data):
            n = file.write(data)
            time.sleep(0.002)
            return n

        def fileno(self):
            return file.fileno()

        def close(self):
            file.close()

    log.lines, done = Slow(), threading.Event()

    def syncs():
        while not done.is_set():
            log.sync()

    thread = threading.Thread(target=syncs)
    thread.start()
    for step in range(1, 60):
        log.event('iter', iter=step, loss=1.0, **ITERATION)
    done.set()
    thread.join()
    log.close()
    assert [r['iter'] for r in records(tmp_path)] == list(range(1, 60))


def long_log(folder, steps, start=0, **options):
    log = RunLog(str(folder), 'run_1', HEADER, **options)
    for step in range(start + 1, start + steps + 1):
        log.event('iter', iter=step, loss=1.0 / step, **ITERATION)
    return log


def read_bytes():
    """Bytes that this process has asked read() for."""
    with open('/proc/self/io') as f:
        return int(f.readline().split()[1])


def test_the_json_is_written_at_doublings_and_at_the_end(tmp_path, monkeypatch):
    """So that all writes together are in proportion to the log: each reads the .jsonl once."""
    read = []
    monkeypatch.setattr(
        run_log,
        'write_json',
        lambda path, *args: read.append(os.path.getsize(path)) or write_json(path, *args),
    )
    log = long_log(tmp_path, 5000)
    assert 4 <= len(read) <= 7 and sum(read) < 2 * log.size
    assert 2000 < len(read_json(tmp_path)['training_iterations']) < 5000  # valid meanwhile
    log.close()
    assert sum(read) < 3 * log.size and len(read_json(tmp_path)['training_iterations']) == 5000
    read.clear()
    log = long_log(tmp_path, 1000, 5000, resume_step=5000)  # a resume writes none
    assert not read
    log.close()
    assert len(read) == 1 and [
        r['iter'] for r in read_json(tmp_path)['training_iterations']
    ] == list(range(1, 6001))


def test_log_save_interval_is_the_least_distance(tmp_path):
    log = long_log(tmp_path, 999, save_interval=1000)
    assert not (tmp_path / 'run_1.json').exists()
    log.event('iter', iter=1000, loss=0.5, **ITERATION)
    assert len(read_json(tmp_path)['training_iterations']) == 1000
    log.close()


def test_nothing_that_was_written_is_held(tmp_path):
    import tracemalloc

    log = long_log(tmp_path, 100)
    tracemalloc.start()
    for step in range(101, 5000):
        log.event('iter', iter=step, loss=1.0, **ITERATION)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    log.close()
    assert now < 50_000 and peak < 1_000_000 < log.size


@pytest.mark.parametrize('cut', ['', '{"type": "iter", "iter": 5001, "lo'])
def test_a_resume_reads_the_end_of_the_log_only(tmp_path, cut):
    long_log(tmp_path, 5000, save_json=False).lines.close()
    with open(tmp_path / 'run_1.jsonl', 'a') as f:
        f.write(cut)
    before = read_bytes()
    log = RunLog(str(tmp_path), 'run_1', HEADER, resume_step=4900)
    assert read_bytes() - before < 300_000 < log.size
    log.close()
    assert [
        r['iter'] for r in read_records(tmp_path / 'run_1.jsonl') if r['type'] == 'iter'
    ] == list(range(1, 4901))
    assert (tmp_path / 'run_1.jsonl.damaged').exists() == bool(cut)


@pytest.mark.parametrize('evaluated', [True, False])
def test_a_resume_keeps_what_belongs_to_its_step_in_any_order(tmp_path, evaluated):
    """A checkpoint is recorded when it is saved, which may be after the next iterations; lines may
    be longer than what is read at a time.
    """
    log = RunLog(str(tmp_path), 'run_1', HEADER)
    long = {**ITERATION, 'gradients': {'x' * 200_000: 1.0}}
    for step in (1, 2, 3, 4):
        log.event('iter', iter=step, loss=1.0 * step, **long)
        if step == 2:
            log.event('eval', iter=2, val_loss=2.5, train_loss=2.0)
    log.event('checkpoint', iter=2, val_loss=None, path='x')
    log.event('iter', iter=5, loss=5.0, **{**long, 'wall_s': 9.0})
    log.lines.close()
    log = RunLog(str(tmp_path), 'run_1', HEADER, resume_step=2, evaluated=evaluated)
    assert log.has_checkpoint(2) and not log.has_checkpoint(1) and 1.0 <= log.wall_s() < 3.0
    log.close()
    kinds = [(r['type'], r.get('iter')) for r in read_records(tmp_path / 'run_1.jsonl')]
    assert kinds == [
        ('header', None),
        ('iter', 1),
        ('iter', 2),
        *[('eval', 2)] * evaluated,
        ('checkpoint', 2),
        ('resume', 2),
        ('end', None),
    ]
    assert read_json(tmp_path)['checkpoints'][0]['val_loss'] == (2.5 if evaluated else None)


def test_the_log_may_be_taken_away_meanwhile(tmp_path):
    log = long_log(tmp_path, 3)
    os.remove(tmp_path / 'run_1.jsonl')
    log.close()
    assert not (tmp_path / 'run_1.json').exists()
