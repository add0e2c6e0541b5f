"""Proves that plots/ reads every kind of log (old, cut, resumed), draws its true numbers, and
refuses bad input with exit code 2.
"""

import json
import subprocess
import sys
from pathlib import Path

import compare_runs
import matplotlib
import numpy as np
import plot_single_run
import pytest
from matplotlib.image import imread

from onetrain.logs import read_log
from onetrain.logs.read_log import load_run

PLOTS = Path(__file__).resolve().parent.parent / 'plots'

CONFIG = {
    'arch_preset': 'llama',
    'n_layer': 2,
    'n_head': 4,
    'n_embd': 64,
    'd_ff': 256,
    'dataset': 'shakespeare',
    'block_size': 32,
    'batch_size': 4,
    'gradient_accumulation_steps': 2,
}
BATCH = 4 * 32 * 2 * 2  # of CONFIG on two ranks


def header(name='run_20261121_021500', **more):
    start = f'{name[4:8]}-{name[8:10]}-{name[10:12]}T{name[13:15]}:{name[15:17]}:{name[17:19]}'
    return {
        'type': 'header',
        'format': 1,
        'run_name': name,
        'start_time': start,
        'config': CONFIG,
        'metadata': {'world_size': 2},
        'startup_info': {
            'model': {'total_params': 1_294_159_104},
            'hardware': {'gpu_name': 'H100', 'num_gpus': 2},
        },
        **more,
    }


def record(it, loss=None, **more):
    return {
        'type': 'iter',
        'iter': it,
        'loss': 3 + 8 / it if loss is None else loss,
        'lr': 1e-3 / it,
        'tokens_seen': it * BATCH,
        'time_ms': 500.0,
        'tokens_per_sec': 2.0 * BATCH,
        'data_wait_ms': 1.0,
        'wall_s': 0.5 * it,
        'mfu': {'mfu': 0.41, 'mfu_percent': 41.0},
        'gradients': {'global_norm': 1.0 + 1 / it},
        'memory': {
            'allocated_gb': 2.0,
            'reserved_gb': 3.0,
            'max_allocated_gb': 4.0,
            'max_reserved_gb': 5.0,
        },
        **more,
    }


def evaluation(it, val_loss):
    return {'type': 'eval', 'iter': it, 'train_loss': val_loss, 'val_loss': val_loss}


def write_jsonl(folder, records, name='run_20261121_021500', tail=''):
    folder.mkdir(exist_ok=True)
    path = folder / f'{name}.jsonl'
    path.write_text(''.join(json.dumps(entry) + '\n' for entry in [header(name), *records]) + tail)
    return path


def write_json(folder, iterations, name='run_20261121_021500', **sections):
    folder.mkdir(exist_ok=True)
    path = folder / f'{name}.json'
    path.write_text(json.dumps({'run_name': name, 'training_iterations': iterations, **sections}))
    return path


def axes_named(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc='left').startswith(title))


def line(axes, label):
    return next(drawn for drawn in axes.lines if drawn.get_label().startswith(label))


def exit_message(command, argv, capsys):
    assert command.main([str(arg) for arg in argv]) == 2
    message = capsys.readouterr().err
    assert message.startswith('error: ') and message.count('\n') == 1, message
    return message


def test_jsonl_json_and_folder_give_the_same_run(tmp_path):
    records = [record(it) for it in range(1, 31)]
    evals = [evaluation(10, 4.5), evaluation(20, 4.0)]
    jsonl = write_jsonl(
        tmp_path / 'a',
        [*records, *evals, {'type': 'checkpoint', 'iter': 20}, {'type': 'unheard of', 'iter': 5}],
    )
    sections = {key: header()[key] for key in ('config', 'metadata', 'startup_info')}
    whole = write_json(
        tmp_path / 'b', records, eval_steps=evals, checkpoints=[{'iter': 20}], **sections
    )
    for path in (jsonl, whole, tmp_path / 'a', tmp_path / 'b'):
        run = load_run([path])
        assert run.iters.tolist() == list(range(1, 31))
        assert run.column('gradients.global_norm')[1] == 1.5
        assert (run.column('mfu_percent') == 41).all() and not run.mfu_unknown
        assert run.eval_iters.tolist() == [10, 20] and run.eval_val_loss.tolist() == [4.5, 4.0]
        assert run.checkpoints.tolist() == [20]
        assert run.label in ('a', 'b') and run.name == 'run_20261121_021500'
        assert np.isnan(run.column('never.logged')).all() and len(run.column('never.logged')) == 30


def test_jsonl_is_preferred_where_both_exist(tmp_path):
    write_json(tmp_path, [record(1, loss=9.0)])
    write_jsonl(tmp_path, [record(1, loss=5.0), record(2, loss=4.0)])
    for paths in (
        [tmp_path],
        sorted(tmp_path.glob('run_*')),
        sorted(tmp_path.glob('run_*'), reverse=True),
    ):
        assert load_run(paths).column('loss').tolist() == [5.0, 4.0]


def test_a_line_that_cannot_be_read_costs_that_line_and_is_told(tmp_path):
    path = write_jsonl(tmp_path, [record(1), record(2)], tail='{"type": "iter", "iter": 3, "lo')
    # a kill cut it
    assert load_run([path]).iters.tolist() == [1, 2] and load_run([path]).notes == []
    with path.open('ab') as log:
        log.write(
            b'\n'
            + json.dumps(record(4)).encode()
            + b'\n'
            + bytes(40)
            + b'\n[1]\n{"type": "iter", "iter": "5"}\n'
            + b'[' * 10**5
            + b'\n'
        )
        log.write(json.dumps(record(6, loss=10**400, lr='x')).encode() + b'\n')
    run = load_run([path])
    assert run.iters.tolist() == [1, 2, 4, 6] and np.isnan(run.column('loss')[-1])
    assert run.notes == [
        f'{path.name}: 5 records that cannot be read left out, the first is line 4'
    ]


ODD = [None, 'x', [1], 10**400, 1e308, float('nan'), -1, {'a': 1}, True]


@pytest.mark.parametrize(
    'key',
    [
        'iter',
        'loss',
        'time_ms',
        'tokens_per_sec',
        'mfu',
        'wall_s',
        'memory',
        'tokens_seen',
        'val_loss',
        'tasks',
        'type',
        'config',
        'startup_info',
        'metadata',
        'start_time',
        'run_name',
    ],
)
def test_an_odd_value_costs_no_more_than_its_place(tmp_path, key):
    """In the header, an iteration, an evaluation and a resume; all are read, one for each key is
    drawn.
    """
    header = write_jsonl(tmp_path, []).read_text()
    records = [record(it) for it in range(1, 9)] + [
        evaluation(4, 5.0),
        {'type': 'resume', 'iter': 8},
    ]
    path = tmp_path / 'run_20261121_021500.jsonl'
    for odd in ODD:
        spoiled = [
            {**json.loads(header), key: odd},
            *({**r, key: odd} if r['iter'] in (3, 4) else r for r in records),
        ]
        path.write_text('\n'.join(map(json.dumps, spoiled)) + '\n')
        run = load_run([path])
        assert (
            len(run.iters) >= 6
            and plot_single_run.describe(run) is not None
            and compare_runs.table([run], ['a'])
        ), odd
        if odd == 1e308 and key in ('loss', 'tokens_per_sec', 'wall_s'):
            plot_single_run.save(plot_single_run.draw_run(run), tmp_path / 'x.png')
            plot_single_run.save(compare_runs.draw_comparison([run], ['a']), tmp_path / 'y.png')


def test_logs_of_several_models_are_drawn_each(tmp_path, capsys):
    for number, layers in enumerate((2, 3, 4)):
        path = write_jsonl(tmp_path, [record(1), record(2)], name=f'run_2026112{number}_000000')
        header, *rest = path.read_text().splitlines()
        header = json.loads(header)
        header['config'] = {**header['config'], 'n_layer': layers}
        path.write_text('\n'.join([json.dumps(header), *rest]) + '\n')
    files = [str(path) for path in sorted(tmp_path.glob('run_*.jsonl'))]
    assert plot_single_run.main(files) == 0
    out = capsys.readouterr().out
    assert (
        out.splitlines() == [file.replace('.jsonl', '.png') for file in files]
        and 'replaces' not in out
    )
    assert 'logs of 3 models' in exit_message(
        plot_single_run, [*files, '--output', tmp_path / 'x.png'], capsys
    )
    run = load_run([tmp_path])
    assert run.config['n_layer'] == 4 and [
        note for note in run.notes if 'run_20261120_000000 is of another model and left out' in note
    ]


def test_resume_within_a_log_drops_what_did_not_go_on(tmp_path):
    records = [
        *(record(it, loss=5.0) for it in range(1, 9)),
        evaluation(8, 5.0),
        {'type': 'resume', 'iter': 4},
        record(5, loss=4.0),
    ]
    run = load_run([write_jsonl(tmp_path, records)])
    assert run.iters.tolist() == [1, 2, 3, 4, 5]
    assert run.column('loss').tolist() == [5.0] * 4 + [4.0]
    assert len(run.eval_iters) == 0 and run.resumes.tolist() == [4]


def test_resumed_runs_are_joined_without_a_fork(tmp_path):
    # the later run's file name sorts first: start_time decides
    write_jsonl(
        tmp_path,
        [
            *(record(it, loss=5.0) for it in range(10, 101, 10)),
            evaluation(50, 5.0),
            evaluation(100, 5.0),
        ],
    )
    later = [record(it, loss=4.0, wall_s=it - 60) for it in range(70, 131, 10)]
    named = write_jsonl(
        tmp_path, [*later, evaluation(100, 4.0)], name='run_20261122_000000'
    ).rename(tmp_path / 'run_0.jsonl')
    run = load_run([tmp_path])
    assert run.path == named and run.name == 'run_20261122_000000'
    assert run.iters.tolist() == list(range(10, 131, 10))
    assert run.column('loss').tolist() == [5.0] * 6 + [4.0] * 7
    assert run.eval_iters.tolist() == [50, 100] and run.eval_val_loss.tolist() == [5.0, 4.0]
    assert run.resumes.tolist() == [60]
    # the second clock began at 0
    assert run.column('wall_s')[5:8].tolist() == [30.0, 40.0, 50.0]
    assert run.notes == []


def test_a_restart_from_scratch_replaces_the_earlier_run(tmp_path, capsys):
    # counted from 0
    write_json(
        tmp_path,
        [{'iter': it, 'loss': 5.0} for it in (0, 10, 20)],
        eval_steps=[evaluation(0, 11.0)],
    )
    write_jsonl(tmp_path, [record(it, loss=4.0) for it in (1, 10)], name='run_20261122_000000')
    write_jsonl(tmp_path, [], name='run_20261123_000000')
    plot_single_run.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert (
        'note: run_20261122_000000.jsonl starts from scratch and replaces run_20261121_021500.json'
        in printed
    )
    assert 'note: run_20261123_000000.jsonl holds no iterations' in printed
    run = load_run([tmp_path])
    assert run.column('loss').tolist() == [4.0, 4.0] and len(run.eval_iters) == 0


@pytest.mark.parametrize('as_object', [False, True])
def test_old_logs_plot_and_lacking_columns_are_computed(tmp_path, as_object):
    def old(it, mfu):
        return {
            'iter': it,
            'loss': 5.0,
            'time_ms': 100.0,
            'mfu': {'mfu': mfu, 'mfu_percent': 100 * mfu} if as_object and mfu > 0 else mfu,
        }

    path = write_json(
        tmp_path,
        [old(0, -100.0), old(10, 0.4), old(20, 0.42)],
        config=CONFIG,
        metadata={'world_size': 2},
    )
    run = load_run([path])
    np.testing.assert_allclose(run.column('mfu_percent'), [np.nan, 40, 42])
    assert run.column('tokens_seen').tolist() == [BATCH, 11 * BATCH, 21 * BATCH]
    np.testing.assert_allclose(run.column('wall_s'), [0.1, 1.1, 2.1])
    np.testing.assert_allclose(run.column('tokens_per_sec'), 10 * BATCH)
    figure = plot_single_run.draw_run(run)
    titles = [axes.get_title(loc='left') for axes in figure.axes if axes.get_title(loc='left')]
    assert titles == ['Loss', 'Throughput and MFU']  # no empty panel

    # every other section is missing
    run = load_run([write_json(tmp_path, [old(0, -100.0), old(10, 0.4)])])
    assert (
        np.isnan(run.column('tokens_seen')).all() and np.isnan(run.column('tokens_per_sec')).all()
    )
    figure = plot_single_run.draw_run(run)
    assert [axes.get_ylabel() for axes in figure.axes] == ['loss (nats per token)', 'MFU (%)']


def test_null_mfu_has_no_curve_and_the_title_says_so(tmp_path):
    unknown = [record(it, mfu={'mfu': None, 'mfu_percent': None}) for it in (1, 2)]
    figure = plot_single_run.draw_run(load_run([write_jsonl(tmp_path, unknown)]))
    assert (
        axes_named(figure, 'Throughput').get_title(loc='left')
        == 'Throughput (MFU unknown for this device)'
    )
    assert not any('MFU' in axes.get_ylabel() for axes in figure.axes)


def test_panels_show_the_logged_numbers_with_units(tmp_path):
    norms = {
        'global_norm': 2.0,
        'mean_layer_norm': 1.0,
        'min_layer_norm': 0.5,
        'max_layer_norm': 1.5,
    }
    records = [record(it, **({'gradients': norms} if it % 50 == 0 else {})) for it in range(1, 201)]
    extra = [
        evaluation(0, 11.0),
        *(evaluation(it, 3 + 9 / it) for it in range(40, 201, 40)),
        {'type': 'checkpoint', 'iter': 80},
    ]
    resumed = [*records[:120], {'type': 'resume', 'iter': 120}, *records[120:]]
    figure = plot_single_run.draw_run(
        load_run([write_jsonl(tmp_path, [*resumed, *extra])]), window=5
    )
    loss = axes_named(figure, 'Loss')
    smoothed = line(loss, 'train (mean of 5').get_ydata()
    expected = np.array([3 + 8 / it for it in range(1, 201)])
    np.testing.assert_allclose(smoothed[100], expected[98:103].mean())
    np.testing.assert_allclose(smoothed[0], expected[:3].mean())
    np.testing.assert_allclose(loss.lines[0].get_ydata(), expected)
    assert line(loss, 'validation').get_ydata()[0] == 11.0
    # the first loss is 11
    assert loss.get_ylim()[1] < 5 and loss.get_ylim()[0] < expected.min()

    perplexity = loss.child_axes[0]
    assert perplexity.get_ylabel() == 'perplexity' and len(perplexity.get_yticks()) >= 3
    for at, label in zip(perplexity.get_yticks(), perplexity.get_yticklabels()):
        assert np.exp(at) == pytest.approx(float(label.get_text().replace(',', '')))
    assert {text.get_text() for text in loss.get_legend().get_texts()} >= {
        'validation',
        'resume',
        'checkpoint',
    }
    for panel in ('Loss', 'Learning rate', 'Memory'):
        marks = [
            tuple(segment[:, 0])
            for lines in axes_named(figure, panel).collections
            for segment in lines.get_segments()
        ]
        assert (120, 120) in marks and (80, 80) in marks

    np.testing.assert_allclose(axes_named(figure, 'Learning rate').lines[0].get_ydata()[9], 1e-4)
    grad_norm = axes_named(figure, 'Gradient norm')
    assert line(grad_norm, 'layers: mean').get_xdata().tolist() == [50, 100, 150, 200]
    assert line(axes_named(figure, 'Memory'), 'reserved, peak').get_ydata()[0] == 5.0
    assert (
        next(axes for axes in figure.axes if axes.get_ylabel() == 'MFU (%)').lines[0].get_ydata()[0]
        == 41
    )
    title = figure.get_suptitle()
    assert all(
        part in title
        for part in (
            'llama',
            '2L-4H-64D-256ff',
            '1.29 B parameters',
            'shakespeare',
            '2 × H100',
            f'{plot_single_run.count(200 * BATCH)} tokens',
        )
    )


def test_smooth_averages_exactly_the_window_and_skips_what_is_not_finite():
    values = np.arange(10.0)
    assert plot_single_run.smooth(values, 4)[5] == values[3:7].mean()
    values[6] = np.inf
    smoothed = plot_single_run.smooth(values, 5)
    assert np.isnan(smoothed[6]) and smoothed[5] == np.mean([3, 4, 5, 7])


def test_a_steep_gradient_norm_is_drawn_on_a_log_axis_only_then(tmp_path):
    flat = plot_single_run.draw_run(
        load_run([write_jsonl(tmp_path, [record(it) for it in range(1, 101)])])
    )
    steep = [record(it, gradients={'global_norm': 100.0 / it}) for it in range(1, 101)]
    steep = plot_single_run.draw_run(load_run([write_jsonl(tmp_path, steep)]))
    assert [axes_named(figure, 'Gradient norm').get_yscale() for figure in (flat, steep)] == [
        'linear',
        'log',
    ]


def test_zero_memory_and_a_diverged_loss(tmp_path):
    records = [
        record(it, loss=float('nan') if it > 20 else 5.0, memory={'allocated_gb': 0.0})
        for it in range(1, 31)
    ]
    figure = plot_single_run.draw_run(load_run([write_jsonl(tmp_path, records)]))
    assert not any(axes.get_ylabel() == 'memory (GB)' for axes in figure.axes)
    low, high = axes_named(figure, 'Loss').get_ylim()
    assert low < 5 < high


@pytest.mark.parametrize('records', [1, 60])
def test_the_picture_is_drawn(tmp_path, capsys, records):
    path = write_jsonl(tmp_path, [record(it) for it in range(1, records + 1)])
    plot_single_run.main([str(path)])
    picture = tmp_path / 'run_20261121_021500.png'
    assert capsys.readouterr().out.strip() == str(picture)
    pixels = imread(picture)[..., :3]
    height, width, _ = pixels.shape
    assert height > 600 and width > 1200
    # left of the legend
    within_loss = pixels[height // 10 : height * 3 // 10, width // 20 : width * 3 // 4]
    blue = np.abs(within_loss - matplotlib.colors.to_rgb(plot_single_run.BLUE)).max(axis=-1) < 0.02
    assert blue.sum() > (20 if records == 1 else 400)


def test_compare_draws_every_run_over_each_axis(tmp_path):
    paths = [
        write_jsonl(
            tmp_path / name, [*(record(it, loss=loss) for it in range(1, 41)), evaluation(20, loss)]
        )
        for name, loss in (('out-a', 5.0), ('out-b', 4.0))
    ]
    runs = [load_run([path]) for path in paths]
    for x, label, last in (
        ('iters', 'iteration', 40),
        ('tokens', 'tokens seen (thousands)', 40 * BATCH / 1000),
        ('time', 'wall time (seconds)', 20.0),
    ):
        figure = compare_runs.draw_comparison(runs, ['a', 'b'], x)
        assert [axes.get_xlabel() for axes in figure.axes] == [label] * 4
        for axes in figure.axes:
            assert [drawn.get_label() for drawn in axes.lines] == ['a', 'b']
        for drawn, loss in zip(axes_named(figure, 'Train loss').lines, (5.0, 4.0)):
            assert drawn.get_xdata()[-1] == pytest.approx(last) and drawn.get_ydata()[-1] == loss
        assert axes_named(figure, 'Validation').lines[1].get_xdata().tolist() == pytest.approx(
            [last / 2]
        )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['a', 'b']


def test_compare_prints_the_table_and_leaves_out_what_has_no_axis(tmp_path, capsys):
    good = write_jsonl(
        tmp_path / 'out-a',
        [*(record(it) for it in range(1, 5)), evaluation(2, 4.25), evaluation(4, 4.5)],
    )
    old = write_json(tmp_path / 'old', [{'iter': 1, 'loss': 5.0}])
    output = tmp_path / 'both.png'
    compare_runs.main([str(good), str(old), '--x', 'tokens', '--output', str(output)])
    head, first, second, note, saved = capsys.readouterr().out.splitlines()
    assert head.split()[0] == 'run'
    assert first.split() == [
        'out-a',
        '1.29',
        'B',
        '4',
        '2.05',
        'k',
        '5.0000',
        '4.2500',
        '(2)*',
        '1,024',
        '41.0',
        '%',
        '0.00',
    ]
    assert second.split() == ['old', '-', '1', '-', '5.0000', '-', '-', '-', '-']
    assert (
        note
        == 'note: old did not log tokens_seen, nor what it can be computed from; left out of the'
        ' picture'
    )
    assert saved == str(output) and imread(output).shape[1] > 1200


@pytest.mark.parametrize(
    'files, labels',
    [
        (['x/out-a/run_1', 'x/out-b/run_1'], ['out-a', 'out-b']),
        (['x/out/run_1', 'y/out/run_1'], ['x/out', 'y/out']),
        (['x/out/run_1', 'x/out/run_2'], ['run_1', 'run_2']),
        (['x/out/run_1', 'x/out/run_2', 'x/new/run_1'], ['out/run_1', 'out/run_2', 'new/run_1']),
        (['x/out/run_1', 'x/out/run_1'], ['1 run_1', '2 run_1']),
    ],
)
def test_labels_are_the_shortest_that_differ(tmp_path, files, labels):
    runs = []
    for file in files:
        folder = tmp_path / Path(file).parent
        folder.mkdir(parents=True, exist_ok=True)
        runs.append(load_run([write_json(folder, [record(1)], name=Path(file).name)]))
    assert compare_runs.name_runs(runs) == labels


@pytest.mark.parametrize('command', [plot_single_run, compare_runs])
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys, command):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken.json').write_text('{"training_iterations": [')
    (tmp_path / 'list.json').write_text('[]')
    (tmp_path / 'run.log').write_text('iter 1')
    write_jsonl(tmp_path / 'header_only', [])
    good = write_jsonl(tmp_path / 'good', [record(1)])
    for name, message in (
        ('nowhere', 'no such file or folder'),
        ('empty', 'no run in'),
        ('broken.json', 'is not valid JSON'),
        ('list.json', 'expected one JSON object'),
        ('run.log', 'is not a log'),
        ('header_only', 'no iterations logged'),
    ):
        assert message in exit_message(command, [tmp_path / name], capsys)
    assert 'no such folder' in exit_message(
        command, [good, '--output', tmp_path / 'no' / 'x.png'], capsys
    )
    assert '.png' in exit_message(command, [good, '--output', tmp_path / 'x.jpeg'], capsys)


def test_bad_options_exit_with_code_2(tmp_path, capsys):
    good = write_jsonl(tmp_path, [record(1)])
    old = write_json(tmp_path / 'old', [{'iter': 1, 'loss': 5.0}])
    assert '--smooth' in exit_message(plot_single_run, [good, '--smooth', 0], capsys)
    assert '--labels names 2 runs, but 1' in exit_message(
        compare_runs, [good, '--labels', 'a,b'], capsys
    )
    assert 'try --x iters' in exit_message(
        compare_runs, [old, '--x', 'time', '--labels', 'old'], capsys
    )


@pytest.mark.parametrize(
    'folder, script',
    [
        (PLOTS.parent, 'plots/plot_single_run.py'),
        (PLOTS, 'plot_single_run.py'),
        (PLOTS, 'compare_runs.py'),
    ],
)
def test_commands_run_from_the_repository_and_from_plots(tmp_path, folder, script):
    path = write_jsonl(tmp_path, [record(1), record(2)])
    output = tmp_path / 'x.png'
    subprocess.run([sys.executable, script, path, '--output', output], cwd=folder, check=True)
    assert output.stat().st_size > 10_000


def test_plots_import_neither_the_trainer_nor_torch():
    code = (
        'import sys, plot_single_run, compare_runs; print([name for name in ("torch", "train",'
        ' "onetrain.checkpoint.store", "model", "matplotlib.pyplot") if name in sys.modules])'
    )
    assert (
        subprocess.run(
            [sys.executable, '-c', code], cwd=PLOTS, check=True, capture_output=True, text=True
        ).stdout
        == '[]\n'
    )


def routed(it):
    layers = [
        {
            'layer': layer,
            'utilization': [0.5, 0.25, 0.25, 0.0],
            'load_score': 10.0 * layer + it,
            'bias_min': -0.01 * it,
            'bias_max': 0.02 * it,
            'entropy': 1.2,
            'dropped': 0,
        }
        for layer in (1, 2)
    ]
    return record(
        it, moe={'load_score': 15.0 + it, 'aux_loss': 1.1, 'z_loss': 2.0, 'layers': layers}
    )


def test_experts_and_tasks_have_panels(tmp_path):
    tasks = {
        'hellaswag': {'acc': 0.2, 'acc_norm': 0.25, 'items': 8},
        'piqa': {'acc': 0.5, 'acc_norm': 0.6, 'items': 8},
    }
    run = load_run(
        [
            write_jsonl(
                tmp_path / 'moe',
                [routed(1), routed(2), {**evaluation(2, 3.0), 'tasks': tasks}, routed(3)],
            )
        ]
    )
    figure = plot_single_run.draw_run(run)
    load, shares, router, scores = (
        axes_named(figure, title)
        for title in (
            'Experts: load score (0 tokens dropped)',
            'Experts: share of the tokens at iteration 3',
            'Experts: balancing bias',
            'Multiple-choice tasks',
        )
    )
    assert line(load, 'mean').get_ydata().tolist() == [16, 17, 18] and len(load.lines) == 3
    assert np.allclose(shares.images[0].get_array(), [[2, 1, 1, 0]] * 2) and [
        label.get_text() for label in shares.get_yticklabels()
    ] == ['1', '2']
    assert router.get_ylim()[0] <= -0.03 and router.get_ylim()[1] >= 0.06
    assert line(scores, 'piqa').get_ydata().tolist() == [60.0] and line(
        scores, 'hellaswag'
    ).get_ydata().tolist() == [25.0]
    plain = load_run([write_jsonl(tmp_path / 'dense', [record(1), record(2)])])
    assert not any(
        'Experts' in axes.get_title(loc='left') or 'tasks' in axes.get_title(loc='left')
        for axes in plot_single_run.draw_run(plain).axes
    )


def result(folder, step, loss, **tasks):
    folder.mkdir(exist_ok=True)
    name = 'evaluation.json' if step is None else f'evaluation_{step:08d}.json'
    (folder / name).write_text(
        json.dumps(
            {
                'model': 'x',
                'step': step,
                'architecture': '2L',
                'loss': {
                    'dataset': 'text',
                    'split': 'val',
                    'loss': loss,
                    'bits_per_byte': loss / 2,
                },
                'tasks': {
                    name: {'acc': 0.1, 'acc_norm': acc, 'items': 9} for name, acc in tasks.items()
                },
            }
        )
    )
    return folder / name


def test_evaluations_are_drawn_along_steps_and_beside_each_other(tmp_path, capsys):
    import compare_evaluations

    result(tmp_path / 'a', 100, 4.0, piqa=0.5)
    result(tmp_path / 'a', 200, 3.0, piqa=0.75)
    other = result(tmp_path / 'b', None, 2.5)
    compare_evaluations.main([str(tmp_path / 'a'), str(other), '--output', str(tmp_path / 'x.png')])
    out = capsys.readouterr().out
    assert out.count('\n') == 5 and (tmp_path / 'x.png').stat().st_size > 10000
    rows = [row.split() for row in out.splitlines()]
    assert (
        rows[1][:2] == ['a', '100']
        and rows[2][-1] == '75'
        and rows[3][0] == 'b'
        and rows[3][-1] == '-'
    )
    figure = compare_evaluations.draw(
        [compare_evaluations.load(tmp_path / 'a'), compare_evaluations.load(other)]
    )
    assert line(axes_named(figure, 'piqa'), 'a').get_ydata().tolist() == [50.0, 75.0] and line(
        axes_named(figure, 'text val: loss'), 'b'
    ).get_ydata().tolist() == [2.5]
    bars = compare_evaluations.draw(
        [
            compare_evaluations.load(tmp_path / 'a' / 'evaluation_00000200.json'),
            compare_evaluations.load(other),
        ]
    )
    assert [patch.get_width() for patch in axes_named(bars, 'text val: loss').patches] == [3.0, 2.5]
    for args, message in (
        ([str(tmp_path)], 'holds no evaluation*.json: run python evaluate.py'),
        ([str(tmp_path / 'x.png')], 'is not a result of evaluate.py'),
    ):
        assert message in exit_message(compare_evaluations, args, capsys)


def test_a_long_log_is_thinned_and_loses_no_spike(tmp_path, monkeypatch):
    """Extremes of the iterations between are drawn, the last iteration stays, and what a resume
    took back is gone.
    """
    monkeypatch.setattr(read_log, 'KEPT', 50)
    losses = {it: 4.0 - it / 1000 for it in range(1, 1001)}
    losses[517], losses[333], losses[812] = 9.0, 0.5, 11.0
    records = [record(it, loss=loss) for it, loss in losses.items()]
    path = write_jsonl(
        tmp_path,
        [
            *records[:900],
            {'type': 'resume', 'iter': 800},
            *[record(it, loss=3.0) for it in range(801, 1006)],
        ],
    )
    run = load_run([path])
    assert (
        len(run.iters) < 100
        and run.iters[-1] == 1005
        and run.last('loss') == 3.0
        and (np.diff(run.iters) > 0).all()
    )
    iters, values = run.raw('loss')
    assert (
        values.max() == 9.0
        and iters[values.argmax()] == 517
        and values.min() == 0.5
        and (values[iters > 800] == 3.0).all()
    )
    assert len(iters) < 400 and (np.diff(iters) >= 0).all()
    assert any('one of 22 logged iterations is drawn' in note for note in run.notes)
    axes = axes_named(plot_single_run.draw_run(run), 'Loss')
    assert max(drawn.get_ydata().max() for drawn in axes.lines[:1]) == 9.0
    whole = json.loads(path.read_text().splitlines()[0]) | {'training_iterations': records}
    path.unlink()
    path.with_suffix('.json').write_text(json.dumps(whole))
    run = load_run([path.with_suffix('.json')])
    assert len(run.iters) < 100 and run.raw('loss')[1].max() == 11.0


def test_reading_holds_a_bounded_number_of_records(tmp_path, monkeypatch):
    monkeypatch.setattr(read_log, 'KEPT', 50)
    path, held = write_jsonl(tmp_path, []), []
    with open(path, 'a') as f:
        f.writelines(json.dumps(record(it)) + '\n' for it in range(1, 5001))
    add = read_log.Thinned.add
    monkeypatch.setattr(
        read_log.Thinned,
        'add',
        lambda self, entry: (add(self, entry), held.append(len(self.kept) + len(self.between)))[0],
    )
    quick = load_run([path])
    assert len(held) == 50 and max(held) <= 200  # of the others only a few numbers are read
    compact = tmp_path / 'compact.jsonl'
    compact.write_text(
        ''.join(
            json.dumps(json.loads(text), separators=(',', ':')) + '\n'
            for text in path.read_text().splitlines()
        )
    )
    parsed = load_run([compact])  # every line in whole: it does not look like the project's own
    assert len(held) == 5050
    for name in read_log.EXTREMES:
        assert all((a == b).all() for a, b in zip(quick.raw(name), parsed.raw(name), strict=True))


def test_shares_of_experts_are_those_logged_last(tmp_path):
    entries = [routed(it) for it in (1, 2, 3)]
    for layer in entries[2]['moe']['layers']:
        del layer['utilization']
    entries[1]['moe']['layers'][0]['utilization'] = [0.25, 0.25, 0.25, 0.25]
    run = load_run([write_jsonl(tmp_path, entries)])
    assert run.shares_at == 2 and run.expert_shares.tolist() == [[0.25] * 4, [0.5, 0.25, 0.25, 0.0]]
    assert not run.each(r'.*utilization.*')
    axes_named(plot_single_run.draw_run(run), 'Experts: share of the tokens at iteration 2')
    for entry in entries:
        for layer in entry['moe']['layers']:
            layer.pop('utilization', None)
    figure = plot_single_run.draw_run(load_run([write_jsonl(tmp_path, entries)]))
    assert axes_named(figure, 'Experts: load score') and not any(
        'share of the tokens' in axes.get_title(loc='left') for axes in figure.axes
    )


def test_the_jsonl_beside_a_json_is_read(tmp_path):
    """The .json of a run that goes on lags behind."""
    lagging = write_json(tmp_path, [record(1)])
    write_jsonl(tmp_path, [record(1), record(2)])
    assert load_run([lagging]).iters.tolist() == [1, 2]


def run_of(folder, name, losses, **config):
    """A folder with the log of a run that had these validation losses."""
    folder.mkdir()
    with open(folder / f'{name}.jsonl', 'w') as f:
        header = {
            'type': 'header',
            'run_name': name,
            'start_time': '2026-01-01T00:00:00+00:00',
            'config': {'n_layer': 2, **config},
            'startup_info': {},
            'metadata': {},
        }
        f.write(json.dumps(header) + '\n')
        for i, loss in enumerate(losses, 1):
            f.write(
                json.dumps(
                    {
                        'type': 'iter',
                        'iter': i,
                        'loss': loss,
                        'time_ms': 1.0,
                        'tokens_per_sec': 100.0,
                        'mfu': None,
                        'memory': {},
                        'tokens_seen': i,
                        'wall_s': i,
                    }
                )
                + '\n'
            )
            f.write(
                json.dumps(
                    {
                        'type': 'eval',
                        'iter': i,
                        'train_loss': loss,
                        'val_loss': loss,
                        'timestamp': '',
                        'lr': 0.1,
                    }
                )
                + '\n'
            )
    return str(folder)


def test_runs_are_named_by_what_differs_and_sorted_by_their_best(tmp_path, capsys):
    paths = [
        run_of(tmp_path / 'a', 'run_20260101_000001', [3.0, 2.5], learning_rate=0.1, out_dir='a'),
        run_of(
            tmp_path / 'b', 'run_20260101_000003', [3.0, 2.0, 2.2], learning_rate=0.2, out_dir='b'
        ),
        run_of(tmp_path / 'c', 'run_20260101_000002', [], learning_rate=0.3),
        run_of(tmp_path / 'd', 'run_20260101_000004', [3.0], learning_rate=0.4, out_dir='d'),
    ]
    output = ['--output', str(tmp_path / 'x.png')]
    assert compare_runs.main([*paths, *output]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('note: ') and 'c/' in lines[0] and lines[0].endswith('; left out')
    assert [line.split()[0] for line in lines[2:5]] == [
        'learning_rate=0.2',
        'learning_rate=0.1',
        'learning_rate=0.4',
    ]
    assert '2.0000 (2)*' in lines[2] and not any('*' in line for line in lines[3:5])
    assert compare_runs.main([*paths, *output, '--latest', '2']) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]] == [
        'learning_rate=0.2',
        'learning_rate=0.4',
    ]
    assert compare_runs.main([*paths, *output, '--labels', 'A,B,C,D']) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:5]] == [
        'B',
        'A',
        'D',
    ]
    assert compare_runs.main([paths[2], *output]) == 2


def test_the_best_evaluation_is_marked_with_its_value(tmp_path):
    run = load_run([run_of(tmp_path / 'a', 'run_20260101_000001', [3.0, 2.0, 2.2])])
    figure = plot_single_run.draw_run(run)
    assert [text.get_text() for text in axes_named(figure, 'Loss').texts] == ['best 2.0000 at 2']
    assert not any('Tokens seen' in axes.get_title(loc='left') for axes in figure.axes)
    first = figure.axes[0].get_subplotspec()
    assert (first.colspan.start, first.colspan.stop) == (0, 2)
