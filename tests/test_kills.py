"""Real processes are killed at random moments and continue by themselves to the same bits. bench/kill_resume.py does the same for longer."""
import os
import random
import signal
import sys
import time

import pytest
from conftest import ROOT, TINY, end_all, losses, records, start_process

from engine import checkpoint

sys.path.insert(0, os.path.join(ROOT, 'bench'))
import kill_resume  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize('options', [['--kills=6', '--longest=7', '--max_iters=700'], ['--kills=5', '--processes=2', '--longest=12', '--max_iters=500'],
                                     ['--kills=2', '--processes=2', '--signal=TERM', '--longest=14', '--max_iters=1000']], ids=['one process', 'two ranks', 'SIGTERM to two ranks'])
def test_killed_at_random_moments(options, capsys):
    kill_resume.main([*options, f'--seed={random.randrange(10**6)}'])
    assert 'losses, evaluations and weights equal to the last bit' in capsys.readouterr().out


def workers(torchrun_pid):
    """Process ids of torchrun's workers."""
    found = []
    for name in filter(str.isdigit, os.listdir('/proc')):
        try:
            with open(f'/proc/{name}/stat') as f, open(f'/proc/{name}/cmdline') as g:
                if int(f.read().rsplit(')', 1)[1].split()[1]) == torchrun_pid and 'train.py' in g.read():
                    found.append(int(name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_torchrun_restarts_the_workers_and_they_continue(dataset, tmp_path, train):
    """One rank is killed, twice; --max-restarts starts both again, on a store that still holds the keys of the first attempt."""
    process = start_process('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=3', 'train.py', f'--dataset={dataset}', f'--out_dir={tmp_path}', *TINY,
                            '--auto_resume=True', '--max_iters=1500', '--eval_interval=500', '--checkpoint_interval=50', env={'OMP_NUM_THREADS': '1'})
    output, kills = '', 0
    try:
        for line in process.stdout:
            output += line
            if line.startswith(('iter 130:', 'iter 330:')) and kills < 2:
                os.kill(workers(process.pid)[kills], signal.SIGKILL)
                kills += 1
                time.sleep(0.5)
        assert process.wait(120) == 0 and kills == 2, output
    finally:
        end_all(process)
    assert output.count('continuing at iter') == 2 and [r['iter'] for r in records(tmp_path)] == list(range(1, 1501))
    assert checkpoint.newest_whole(str(tmp_path)) == (1500, [])
    assert len(losses(tmp_path)) == 1500
