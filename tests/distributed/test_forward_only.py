"""Proves that a save after forward passes alone (an evaluation, a sample) holds the weights of the
step, under every layout.

FSDP leaves units gathered after a forward pass without a backward one: what is saved then must
still be each rank's part.
"""

import os
import signal

import pytest
import torch
from conftest import TINY, equal, weights
from layout_runs import FAMILIES, LAYOUTS
from ranks import ranks, train

from onetrain.checkpoint import async_writer, store
from onetrain.logs.run_log import RunLog

# a tied table, and none
CASES = [(layout, 'gpt2') for layout in LAYOUTS] + [('ZeRO-2', 'llama3'), ('ZeRO-3', 'llama3')]


def arguments(dataset, out, layout, family, *args):
    return [
        f'--dataset={dataset}',
        f'--out_dir={out}',
        *TINY,
        '--eval_iters=1',
        '--max_iters=4',
        '--save_log_to_json=False',
        *FAMILIES[family],
        *LAYOUTS[layout],
        *args,
    ]


def stopped_after(what, *args):
    """train.py on a rank that gets SIGTERM when it has just evaluated, or written a sample, at
    iteration 2: its exit code.
    """
    import train as trainer

    event, say = RunLog.event, RunLog.say

    def event_then_stop(self, kind, **fields):
        event(self, kind, **fields)
        if kind == what and fields['iter'] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def say_then_stop(self, text='', verbatim=False):
        say(self, text, verbatim)
        if what == 'sample' and text.startswith('---- sample at iter 2'):
            os.kill(os.getpid(), signal.SIGTERM)

    RunLog.event, RunLog.say = event_then_stop, say_then_stop
    try:
        return trainer.main(list(args))
    finally:
        RunLog.event, RunLog.say = event, say
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('layout, family', CASES)
def test_what_is_saved_after_forward_passes_is_the_step(layout, family, dataset, tmp_path):
    calm = tmp_path / 'calm'
    assert (
        train(
            2,
            *arguments(
                dataset,
                calm,
                layout,
                family,
                '--checkpoint_interval=2',
                '--eval_interval=100',
                '--eval_at_start=False',
                '--keep_all_checkpoints=True',
            ),
        )[0]
        == 0
    )

    # a save because the evaluation improved
    out = tmp_path / 'improved'
    assert (
        train(
            2,
            *arguments(
                dataset,
                out,
                layout,
                family,
                '--always_save_checkpoint=False',
                '--eval_interval=2',
                '--keep_all_checkpoints=True',
            ),
        )[0]
        == 0
    )
    assert store.steps(str(out)) == [2, 4] and all(
        equal(weights(out, step), weights(calm, step)) for step in (2, 4)
    )

    # a signal when an evaluation, or a sample, has just ended
    for what, options in (
        ('eval', ['--eval_interval=2']),
        (
            'sample',
            [
                '--sample_interval=2',
                '--sample_start=the',
                '--eval_interval=100',
                '--eval_at_start=False',
            ],
        ),
    ):
        out = tmp_path / what
        codes = ranks(2)(
            stopped_after,
            what,
            *arguments(dataset, out, layout, family, '--checkpoint_interval=3', *options),
        )
        assert (
            codes == [143, 143]
            and store.steps(str(out)) == [2]
            and equal(weights(out, 2), weights(calm, 2))
        ), what


@pytest.mark.parametrize(
    'other', [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(4, 3)]
)
def test_a_copy_of_another_shape_is_refused(other):
    """By copy_() the one would be spread over the other, by memmove() it would end behind it."""
    target = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r'x has the shape .* its copy \(2, 3\)'):
        async_writer._copy('x', target, other)
    assert target.eq(1).all()
