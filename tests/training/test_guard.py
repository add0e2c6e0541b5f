"""A step with a loss or gradient that is not finite changes nothing, on any rank; a row of them
stops the run with the last good state.
"""

import math
import re

import pytest
import torch
from conftest import TINY, losses, records, run_ranks, torchrun, weights

from onetrain.checkpoint import store
from onetrain.training import optim

PLANT = '''
"""train.py with a NaN planted: argv[1] = rank, argv[2] = iterations; the rest is train.py's."""
import os, sys
import torch
import train
from onetrain.distributed import processes
from onetrain.training import optim
rank, bad = int(sys.argv[1]), {int(k) for k in sys.argv[2].split(',')}
build, backwards = optim.build_adamw, [0]
def planted(named, **options):
    def poison(gradient):
        backwards[0] += 1
        if backwards[0] + START in bad and int(os.environ.get('RANK', 0)) == rank:
            gradient = gradient.clone()
            gradient.view(-1)[3] = float('nan')
        return gradient
    dict(named)['transformer.h.1.mlp.c_fc.weight'].register_hook(poison)
    return build(named, **options)
optim.build_adamw = planted
START = 0
if __name__ == '__main__':
    processes.leave(train.main(sys.argv[3:]))
'''


@pytest.fixture
def plant(tmp_path):
    path = tmp_path / 'plant.py'
    path.write_text(PLANT)
    return str(path)


def test_a_nan_on_one_rank_changes_no_weight_on_any(dataset, tmp_path, plant):
    """Iteration 5 of 2 ranks: the checkpoint after it equals the one before it, and the replicas
    stay equal to the end.
    """
    args = [
        f'--dataset={dataset}',
        *TINY,
        '--eval_interval=100',
        '--checkpoint_interval=1',
        '--keep_all_checkpoints=True',
        '--max_iters=8',
    ]
    code, output = run_ranks(2, '1', '5', *args, f'--out_dir={tmp_path / "bad"}', script=plant)
    assert (
        code == 0
        and 'SKIPPED 1 updates since the last line (loss or gradient not finite), 1 in all'
        in output
    ), output
    before, after, later = (weights(tmp_path / 'bad', step) for step in (4, 5, 6))
    assert all(torch.equal(before[name], after[name]) for name in before) and not torch.equal(
        after['model.transformer.wte.weight'], later['model.transformer.wte.weight']
    )
    code, output = run_ranks(2, '1', '99', *args, f'--out_dir={tmp_path / "good"}', script=plant)
    good, bad = losses(tmp_path / 'good'), losses(tmp_path / 'bad')
    # the loss of 5 was good, its gradient not
    assert code == 0 and [good[k] == bad[k] for k in range(1, 9)] == [True] * 5 + [False] * 3
    assert bad[6] < good[1] and all(math.isfinite(loss) for loss in bad.values())
    assert [r['gradients']['global_norm'] for r in records(tmp_path / 'bad')][4] is None


def test_three_in_a_row_on_one_of_two_ranks_stop_the_run_with_the_last_good_state(
    dataset, tmp_path, plant, train, capsys
):
    args = [
        f'--dataset={dataset}',
        *TINY,
        '--eval_interval=100',
        '--max_iters=60',
        '--log_interval=10',
        '--checkpoint_interval=7',
        f'--out_dir={tmp_path / "a"}',
    ]
    code, output = torchrun(2, '0', ','.join(map(str, range(13, 40))), *args, script=plant)
    assert code == 1 and 'exitcode  : 3' in output, output
    assert (
        'not finite at 3 iterations in a row, 13 to 15, sequences 96 to 119 of the stream: stopping'
        ' with the weights of iter 12' in output
    )
    assert re.search(r'begin at tokens \[\d+(, \d+){7}\] of train.bin', output)
    assert store.newest_whole(str(tmp_path / 'a')) == (12, [])
    state = store.read_state(store.path_of(str(tmp_path / 'a'), 12))
    assert state['position'] == 12 * 8 and state['tokens'] == 12 * 8 * 16
    # without the NaN it goes on as if nothing had been; one process with two micro-steps takes the
    # place of the two ranks
    assert (
        train(
            tmp_path / 'a',
            '--init_from=resume',
            '--gradient_accumulation_steps=2',
            '--max_iters=20',
        )
        == 0
    )
    assert (
        train(
            tmp_path / 'b',
            '--gradient_accumulation_steps=2',
            '--max_iters=20',
            '--eval_interval=100',
            '--log_interval=10',
        )
        == 0
    )
    a, b = losses(tmp_path / 'a'), losses(tmp_path / 'b')
    assert max(a) == 20 and a[20] == pytest.approx(b[20], rel=1e-5)


def run_guard(norms, losses=None, **options):
    """The values of one parameter after each step with gradient 1, for given norms; and the
    guard.
    """
    p = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = optim.build_adamw(
        {'p': p}, learning_rate=0.1, betas=(0.9, 0.95), weight_decay=0.1, device_type='cpu'
    )
    guard = optim.NonFiniteGuard(
        [p], torch.amp.GradScaler('cpu', enabled=False), options.pop('max_bad', 3), **options
    )
    values = []
    for step, norm in enumerate(norms, 1):
        p.grad = torch.ones(2, 2)
        guard.step(
            optimizer,
            step,
            torch.tensor(losses[step - 1] if losses else 1.0),
            torch.tensor(float(norm)),
        )
        values.append(p[0, 0].item())
    return values, guard, optimizer.state[p]


def test_a_skipped_step_leaves_weights_moments_and_step_count():
    nan = float('nan')
    values, guard, state = run_guard([1, 1, nan, 1, 1])
    calm, _, calm_state = run_guard([1, 1, 1, 1])
    assert values[2] == values[1] and values == [*calm[:2], calm[1], *calm[2:]]
    assert state['step'] == 4 and torch.equal(state['exp_avg_sq'], calm_state['exp_avg_sq'])
    assert guard.counts() == {'row': 0, 'first': 0, 'bad': 1, 'spikes': 0}
    for bad in (nan, math.inf):  # a loss alone is enough
        assert run_guard([1, 1, 1], losses=[1.0, bad, 1.0])[0][1] == calm[0]


def test_after_the_row_nothing_moves_until_the_host_looks():
    nan = float('nan')
    values, guard, _ = run_guard([1, nan, 1, nan, nan, nan, 1, 1, 1], max_bad=3)
    assert values[3:] == [values[2]] * 6
    assert guard.counts() == {'row': 6, 'first': 4, 'bad': 4, 'spikes': 0}


def test_spikes_are_skipped_once_the_median_is_known_and_are_no_fault():
    norms = [1.0] * 16 + [2.9, 3.1, 1.0] + [50.0] * 5 + [1.0]
    values, guard, _ = run_guard(norms, spike_factor=3.0)
    moved = [a != b for a, b in zip([0.0, *values], values)]
    assert moved == [True] * 17 + [False, True] + [False] * 5 + [True]
    assert guard.counts() == {'row': 0, 'first': 0, 'bad': 0, 'spikes': 6}
    early = [100.0] + [1.0] * 14 + [100.0]
    # 15 norms are no median yet
    assert run_guard(early, spike_factor=3.0)[1].counts()['spikes'] == 0
    # a level that stays is no spike any more when half of the window has it
    assert run_guard([1.0] * 100 + [10.0] * 120, spike_factor=3.0)[1].counts()['spikes'] < 110
    assert run_guard(norms)[1].counts()['spikes'] == 0  # off by default


def test_overflows_under_fp16_are_the_scalers_and_no_fault():
    scaler = torch.amp.GradScaler('cpu', enabled=True, init_scale=4.0)
    p = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = optim.build_adamw(
        {'p': p}, learning_rate=0.1, betas=(0.9, 0.95), weight_decay=0.0, device_type='cpu'
    )
    guard, values, scales = optim.NonFiniteGuard([p], scaler, 3), [], []
    for step, (gradient, loss) in enumerate(
        [(4.0, 1.0), (math.inf, 1.0), (4.0, 1.0), (4.0, math.nan), (4.0, 1.0)], 1
    ):
        optimizer.zero_grad()
        scaler.scale(p.sum()).backward()
        p.grad = torch.full((2, 2), gradient)
        guard.unscale()
        guard.step(optimizer, step, torch.tensor(loss), p.grad.norm())
        values.append(p[0, 0].item())
        scales.append(scaler.get_scale())
    assert [a != b for a, b in zip([0.0, *values], values)] == [True, False, True, False, True]
    assert guard.counts()['bad'] == 1 and scales[:2] == [4.0, 2.0]


def test_spike_guard_and_its_window_survive_a_resume(train, tmp_path):
    args = ['--eval_interval=100', '--spike_factor=1.05', '--learning_rate=1e-2']
    assert train(tmp_path / 'calm', '--max_iters=50', *args) == 0
    skipped = [r['skipped']['spikes'] for r in records(tmp_path / 'calm')]
    assert (
        skipped[-1] > skipped[25] > 0
        and [r['skipped']['bad'] for r in records(tmp_path / 'calm')] == [0] * 50
    )
    assert train(tmp_path / 'two', '--max_iters=25', *args) == 0
    assert train(tmp_path / 'two', '--max_iters=50', '--init_from=resume', *args) == 0
    assert (
        losses(tmp_path / 'two') == losses(tmp_path / 'calm')
        and [r['skipped']['spikes'] for r in records(tmp_path / 'two')] == skipped
    )


def test_a_learning_rate_that_is_far_too_high(train, tmp_path, capsys):
    assert (
        train(
            tmp_path,
            '--max_iters=100',
            '--eval_interval=10',
            '--learning_rate=1e30',
            '--grad_clip=0',
        )
        == 3
    )
    assert 'in a row' in capsys.readouterr().out
    step, rejected = store.newest_whole(str(tmp_path))
    assert step < 10 and not rejected and max(losses(tmp_path)) > step


def test_weights_that_are_not_finite_are_never_saved(train, tmp_path, capsys):
    """Weight decay that overflows: loss and gradient of that step were good."""
    assert train(tmp_path, '--max_iters=10', '--eval_interval=5') == 0
    assert (
        train(
            tmp_path,
            '--init_from=resume',
            '--max_iters=40',
            '--learning_rate=1e38',
            '--weight_decay=1e30',
            '--decay_lr=False',
            '--eval_interval=11',
        )
        == 3
    )
    output = capsys.readouterr().out
    assert (
        'CHECKPOINT NOT SAVED at iter 11' in output
        and 'is not finite. It would be of no use' in output
    )
    assert store.newest_whole(str(tmp_path)) == (10, [])
