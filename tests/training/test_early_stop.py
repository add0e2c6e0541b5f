"""Proves that a run ends when its validation loss no longer improves, with its weights saved, and
neither sooner nor, where it is resumed, again and again.
"""

import math

import pytest
from conftest import records

from onetrain.checkpoint.store import steps
from onetrain.training.early_stop import Patience


@pytest.mark.parametrize(
    'most, losses, over_after',
    [
        (2, [3, 2, 2.5, 2.5, 1], 4),
        (2, [3, 3.1, 2.9, 3, 2.8, 3, math.nan], 7),
        (1, [3, 3], 2),
        (0, [3, 4, 5, 6, 7], None),
        (3, [3, 2, 1], None),
    ],
)
def test_patience(most, losses, over_after):
    said = []
    patience = Patience(most, [], said.append)
    for number, loss in enumerate(losses, 1):
        patience.add(loss)
        if patience.is_over():
            assert number == over_after
            break
    else:
        assert over_after is None
    assert len(said) == (over_after is not None)
    if over_after:
        assert Patience(most, losses[:over_after], said.append).is_over()


def test_a_run_ends_early(train, tmp_path, capsys):
    """Without a learning rate no evaluation improves on the first."""
    words = '--learning_rate=0', '--decay_lr=False', '--eval_interval=5', '--eval_at_start=False'
    words += '--early_stop_patience=2', '--max_iters=100'
    assert train(tmp_path, *words) == 0
    said = capsys.readouterr().out
    assert said.count('has not improved in 2 evaluations') == 1 and 'Done:' in said
    assert [r['iter'] for r in records(tmp_path, 'eval')] == [5, 10, 15]
    assert records(tmp_path)[-1]['iter'] == 15 and steps(str(tmp_path))[-1] == 15
    assert train(tmp_path, *words, '--auto_resume=True') == 0  # it stays ended
    assert records(tmp_path)[-1]['iter'] == 15
    assert train(tmp_path, *words, '--auto_resume=True', '--early_stop_patience=4') == 0
    assert records(tmp_path)[-1]['iter'] == 25
    assert len(records(tmp_path, 'eval')) == 5


def test_saves_that_are_not_at_evaluations(train, tmp_path):
    words = '--learning_rate=0', '--decay_lr=False', '--eval_interval=5', '--max_iters=100'
    words += '--early_stop_patience=1', '--always_save_checkpoint=False', '--checkpoint_interval=50'
    assert train(tmp_path, *words) == 0
    assert steps(str(tmp_path))[-1] == records(tmp_path)[-1]['iter'] == 5
