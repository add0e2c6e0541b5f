"""Real processes are killed at random moments and continue by themselves to the same bits.
bench/kill_resume.py does the same for longer.
"""

import random

import kill_resume
import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [
        ['--kills=3', '--longest=6', '--max_iters=150'],
        ['--kills=2', '--processes=2', '--longest=10', '--max_iters=100'],
        ['--kills=1', '--processes=2', '--signal=TERM', '--longest=12', '--max_iters=150'],
    ],
    ids=['one process', 'two ranks', 'SIGTERM to two ranks'],
)
def test_killed_at_random_moments(options, capsys):
    kill_resume.main([*options, f'--seed={random.randrange(10**6)}'])
    assert 'losses, evaluations and weights equal to the last bit' in capsys.readouterr().out
