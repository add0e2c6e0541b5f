"""Real processes are killed at random moments and continue by themselves to the same bits. bench/kill_resume.py does the same for longer."""
import os
import random
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, 'bench'))
import kill_resume  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize('options', [['--kills=2', '--longest=6', '--max_iters=400'], ['--kills=1', '--processes=2', '--longest=10', '--max_iters=300']], ids=['one process', 'two ranks'])
def test_killed_at_random_moments(options, capsys):
    kill_resume.main([*options, f'--seed={random.randrange(10**6)}'])
    assert 'losses, evaluations and weights equal to the last bit' in capsys.readouterr().out
