"""What many processes do when one of them differs, fails, hangs or dies; and two machines' worth of
them.
"""

import collections
import concurrent.futures
import contextlib
import datetime
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist
from conftest import (
    ROOT,
    TINY,
    end_all,
    equal,
    free_port,
    losses,
    records,
    run_process,
    run_ranks,
    start_process,
    torchrun,
    weights,
)
from ranks import ranks, train

from onetrain.checkpoint import store
from onetrain.config import UserError
from onetrain.distributed import processes

PLANT = '''
"""train.py with a difference on rank 1: argv[1] says which, the rest goes to train.py."""
import os, sys
import train
from onetrain.data import dataset
from onetrain.distributed import processes
what, argv = sys.argv[1], sys.argv[2:]
if __name__ == '__main__':
    if os.environ['RANK'] == '1':
        if what in ('data', 'missing'):
            os.environ['LOCAL_RANK'] = '0'  # the first of a machine, which looks at its files
        if what == 'data':
            dataset.fingerprint_of_files = lambda paths: 'another'
        elif what == 'key':
            argv.append('--learning_rate=5e-3')
        elif what == 'missing':
            from onetrain.training import run_data

            real = run_data.open_dataset
            run_data.open_dataset = lambda name, root, url: real('openwebtext2', root, url)
    processes.leave(train.main(argv))
'''


@pytest.fixture
def plant(tmp_path):
    path = tmp_path / 'plant.py'
    path.write_text(PLANT)
    return str(path)


@pytest.mark.parametrize(
    'what,message',
    [
        (
            'key',
            (
                'error: the configuration differs between processes: learning_rate=0.001 on rank 0,'
                ' 0.005 on rank 1: start all with the same command'
            ),
        ),
        ('data', "error: the data differs between processes: train.bin={'fingerprint': '"),
        ('missing', 'error (rank 1 on '),
    ],
)
def test_ranks_that_differ_stop_at_the_start_with_both_values(
    dataset, tmp_path, plant, what, message
):
    started = time.monotonic()
    args = [f'--out_dir={tmp_path}/out', *TINY, '--max_iters=10']
    if what == 'data':  # a data set without a fingerprint of its own, as nanoGPT's
        os.makedirs(tmp_path / 'data')
        for split in ('train', 'val'):
            os.symlink(f'{dataset}/{split}.bin', tmp_path / 'data' / f'{split}.bin')
        dataset = f'{tmp_path}/data'
    code, output = torchrun(2, what, f'--dataset={dataset}', *args, '--vocab_size=64', script=plant)
    assert code != 0 and 'exitcode  : 2' in output and time.monotonic() - started < 60, output
    # torch puts that before a rank's traceback
    assert not os.path.exists(tmp_path / 'out' / 'checkpoints') and '[rank' not in output, output
    assert output.count('error: ') + output.count('error (') == 1 and message in output, output


def train_with_more_memory_on_rank_1(args):
    import train as trainer
    from onetrain.training import iteration_log

    real = iteration_log.memory_gb
    iteration_log.memory_gb = lambda device: {
        key: value + 1000 * int(os.environ['RANK']) for key, value in real(device).items()
    }
    try:
        return trainer.main(args)
    finally:
        iteration_log.memory_gb = real


def test_the_log_has_the_memory_of_the_worst_rank_and_the_wait_for_gradients(dataset, tmp_path):
    assert ranks(2)(
        train_with_more_memory_on_rank_1,
        [f'--dataset={dataset}', f'--out_dir={tmp_path}', *TINY, '--max_iters=4'],
    ) == [0, 0]
    assert all(value > 1000 for record in records(tmp_path) for value in record['memory'].values())
    # as DDP measured them in an iteration before, which may have been a slower one
    waits = [record['comm_wait_ms'] for record in records(tmp_path)[1:]]
    assert (
        min(waits) >= 0
        and waits[-1] > 0
        and max(waits) < sum(record['time_ms'] for record in records(tmp_path))
    )


def test_collectives_are_recorded_beside_the_run_unless_the_user_says_otherwise(
    monkeypatch, tmp_path
):
    for name in ('TORCH_FR_BUFFER_SIZE', 'TORCH_NCCL_DUMP_ON_TIMEOUT', 'TORCH_FR_DUMP_TEMP_FILE'):
        monkeypatch.setenv(name, 'x')  # so that all is as it was afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv('TORCH_FR_BUFFER_SIZE', '7')
    monkeypatch.chdir(tmp_path)
    processes.record_collectives('out')
    assert (
        os.environ['TORCH_FR_BUFFER_SIZE'] == '7'
        and os.environ['TORCH_NCCL_DUMP_ON_TIMEOUT'] == '1'
    )
    assert os.environ['TORCH_FR_DUMP_TEMP_FILE'] == f'{tmp_path}/out/nccl_trace_rank_'


SLOW_RANK_2 = """
import os, sys, time
import train
from onetrain.data import loader
what, argv = sys.argv[1], sys.argv[2:]
if os.environ['RANK'] == '2':
    if what == 'data':
        next_of = loader.TrainLoader.next
        loader.TrainLoader.windows_of = loader.TrainLoader.windows
        slow = lambda self, micro: (time.sleep(0.05), self.windows_of(micro))[1]
        loader.TrainLoader.windows = slow
    else:
        real = train.ForwardBackward.__call__
        train.ForwardBackward.__call__ = lambda *args: (time.sleep(0.05), real(*args))[1]
if __name__ == '__main__':
    train.processes.run_and_exit(lambda: train.main(argv))
"""


@pytest.mark.parametrize(
    'what,layout', [('data', '--use_fsdp=True'), ('compute', '--use_fsdp=False')]
)
def test_the_slowest_rank_is_named(dataset, tmp_path, what, layout):
    (tmp_path / 'slow.py').write_text(SLOW_RANK_2)
    code, output = run_ranks(
        3,
        what,
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}',
        *TINY,
        '--max_iters=30',
        '--eval_interval=100',
        '--total_batch_size=192',
        layout,
        script=str(tmp_path / 'slow.py'),
    )
    assert code == 0, output
    (line,) = [line for line in output.splitlines() if 'is the slowest' in line]
    assert line.startswith(
        f'rank 2 on {os.uname().nodename} is the slowest: the others wait '
    ) and line.endswith('which waits for its data') == (what == 'data'), line
    named = [
        r
        for r in records(tmp_path)
        if r['slowest_rank'] == 2 and 20 < r['slowest_rank_wait_ms'] < r['time_ms']
    ]
    assert len(named) >= 8, [
        (r['slowest_rank'], r['slowest_rank_wait_ms'], r['time_ms']) for r in records(tmp_path)
    ]


SLOW_DISK = """
import os, sys, time
import train
from onetrain.checkpoint import async_writer as saver
real = saver.Saver._commit
saver.Saver._commit = lambda *args: (time.sleep(8), real(*args))[1]
if __name__ == '__main__':
    train.processes.run_and_exit(lambda: train.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize('where', ['training', 'saving', 'waiting for a save', 'nowhere'])
def test_a_rank_that_hangs_takes_the_job_down_within_the_timeout(dataset, tmp_path, where):
    """Also if the others have begun a save meanwhile, or wait for one; a disk that is slower than
    the timeout does not.
    """
    (tmp_path / 'slow_disk.py').write_text(SLOW_DISK)
    at = {'training': 50, 'saving': 40, 'waiting for a save': 40, 'nowhere': 0}[where]
    slow = where in ('waiting for a save', 'nowhere')
    process = start_process(
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        str(tmp_path / 'slow_disk.py') if slow else 'train.py',
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}',
        *TINY,
        f'--max_iters={100000 if at else 45}',
        '--checkpoint_interval=20',
        '--timeout_minutes=0.1',
        env={'OMP_NUM_THREADS': '1'},
    )
    output = []
    reader = threading.Thread(target=lambda: output.extend(process.stdout), daemon=True)
    try:
        if at:
            for line in process.stdout:
                output.append(line)
                if line.startswith(f'iter {at}/'):
                    os.kill(workers(process.pid)[1], signal.SIGSTOP)
                    stopped = time.monotonic()
                    break
        reader.start()
        if not at:
            assert process.wait(90) == 0, ''.join(output)
            return
        while len(workers(process.pid)) > 1:  # the one that did not hang leaves by itself
            assert time.monotonic() - stopped < 30, ''.join(output)
            time.sleep(0.1)
        assert workers(process.pid), ''.join(output)
        # so that torchrun need not wait half a minute to end it
        os.kill(workers(process.pid)[-1], signal.SIGCONT)
        assert process.wait(60) == 1, ''.join(output)
        reader.join(10)
        assert (
            f'error: rank 1 on {os.uname().nodename} did not answer: it hangs or was killed'
            in ''.join(output)
        )
    finally:
        end_all(process)
    step, rejected = store.newest_whole(str(tmp_path))
    assert not rejected and (step or at) >= 20  # a save may have been under way


def workers(torchrun_pid):
    """Process ids of torchrun's workers, in the order in which they were started."""
    found = []
    for pid in sorted(int(name) for name in os.listdir('/proc') if name.isdigit()):
        with contextlib.suppress(OSError), open(f'/proc/{pid}/stat') as f:
            if int(f.read().rsplit(')', 1)[1].split()[1]) == torchrun_pid:
                found.append(pid)
    return found


@pytest.mark.slow
@pytest.mark.parametrize('layout, deaths', [([], 2), (['--use_fsdp=True'], 1)], ids=['DDP', 'FSDP'])
def test_torchrun_restarts_the_workers_and_they_continue_bitwise(dataset, tmp_path, layout, deaths):
    """One rank is killed, under DDP twice; --max-restarts starts both again, on a store that still
    holds the keys of the first attempt.
    """
    last = 60 if layout else 120
    args = [
        f'--dataset={dataset}',
        *TINY,
        *layout,
        '--auto_resume=True',
        f'--max_iters={last}',
        f'--eval_interval={last // 3}',
        f'--checkpoint_interval={last // 15}',
    ]
    process = start_process(
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        '--max-restarts=3',
        'train.py',
        f'--out_dir={tmp_path}/killed',
        *args,
        env={'OMP_NUM_THREADS': '1'},
    )
    output, kills = '', 0
    try:
        for line in process.stdout:
            output += line
            if line.startswith((f'iter {last // 2}/', f'iter {last * 3 // 4}/')) and kills < deaths:
                os.kill(workers(process.pid)[kills], signal.SIGKILL)
                kills += 1
                time.sleep(0.5)
        assert process.wait(120) == 0 and kills == deaths, output
    finally:
        end_all(process)
    assert output.count('continuing at iter') == deaths and [
        r['iter'] for r in records(tmp_path / 'killed')
    ] == list(range(1, last + 1))
    assert store.newest_whole(str(tmp_path / 'killed')) == (last, [])
    code, _ = train(2, f'--out_dir={tmp_path}/calm', *args)
    assert (
        code == 0
        and losses(tmp_path / 'killed') == losses(tmp_path / 'calm')
        and equal(weights(tmp_path / 'killed', last), weights(tmp_path / 'calm', last))
    )


COPYING = """
import os, sys
import train
from onetrain.checkpoint import uploader as copier
transfer = copier._transfer
def noted(fs, path, *more):
    transfer(fs, path, *more)
    with open('FOLDER/copied', 'a') as f:
        print(os.environ['RANK'], os.path.basename(path), file=f)
copier._transfer = noted
if __name__ == '__main__':
    train.processes.run_and_exit(lambda: train.main(sys.argv[1:]))
"""


def test_two_machines(dataset, tmp_path):
    """Two torchrun agents that meet over TCP, two ranks each, as sbatch starts them; hybrid
    sharding keeps a replica on each. Each copies its own files.
    """
    port = free_port()
    (tmp_path / 'copying.py').write_text(COPYING.replace('FOLDER', str(tmp_path)))
    args = [
        f'--dataset={dataset}',
        *TINY,
        '--max_iters=6',
        '--use_fsdp=True',
        '--fsdp_replicas=2',
        f'--out_dir={tmp_path}/two',
    ]
    command = [
        '-m',
        'torch.distributed.run',
        '--nnodes=2',
        '--nproc_per_node=2',
        '--rdzv_backend=c10d',
        f'--rdzv_endpoint=127.0.0.1:{port}',
        '--rdzv_id=test',
        str(tmp_path / 'copying.py'),
        *args,
        f'--upload_to=file://{tmp_path}/copies',
    ]
    other = start_process(*command, env={'OMP_NUM_THREADS': '1'})
    try:
        code, output = run_process(*command, env={'OMP_NUM_THREADS': '1'})
        output += other.communicate(timeout=60)[0]
    finally:
        end_all(other)
    assert (
        code == 0
        and other.returncode == 0
        and output.count('Batch:       4 sequences x 16 tokens x 1 micro-step x 4 ranks') == 1
    ), output
    by_rank = collections.defaultdict(set)
    for line in (tmp_path / 'copied').read_text().splitlines():
        by_rank[line.split()[0]].add(line.split()[1])
    assert by_rank == {
        '0': {'.metadata', 'state.json', '__0_0.distcp', '__1_0.distcp'},
        '2': {'__2_0.distcp', '__3_0.distcp'},
    }
    (run,) = os.listdir(tmp_path / 'copies' / 'two')
    assert store.newest_whole(str(tmp_path / 'copies' / 'two' / run)) == (6, [])
    code, _ = train(4, *args[:-1], f'--out_dir={tmp_path}/one')
    assert code == 0 and losses(tmp_path / 'one') == losses(tmp_path / 'two')


def rendezvous(address, ranks, size, seconds=20.0):
    """What processes.rendezvous() gives, or raises, to each of these ranks, which start at the
    same time.
    """

    def client():
        return dist.TCPStore(*address, is_master=False, wait_for_workers=False)

    def of(rank):
        try:
            found = processes.rendezvous(client(), rank, size, datetime.timedelta(seconds=seconds))
            found.add('here', 1)
            return found
        except UserError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(of, ranks))


def test_ranks_meet_whatever_earlier_starts_left_behind():
    """Whole starts, one whose rank 0 came alone, one without a rank 0, and one in which the ranks
    were dealt anew.
    """
    address = ('127.0.0.1', free_port())
    server = dist.TCPStore(*address, is_master=True, wait_for_workers=False)

    def whole(ranks):
        found = rendezvous(address, ranks, len(ranks))
        assert [store.add('here', 0) for store in found] == [len(ranks)] * len(ranks), found

    whole([0, 1, 2])
    whole([2, 1, 0])
    # a machine is lost
    assert all(
        'not all of the 3 processes came within 0.0166667 minutes' in str(found)
        for found in rendezvous(address, [0, 1], 3, 1.0)
    )
    # the one with rank 0
    assert all(isinstance(found, UserError) for found in rendezvous(address, [1, 2], 3, 1.0))
    whole([1, 0, 2])
    assert server.num_keys() > 0


def test_a_rank_that_comes_before_rank_0_waits_for_it():
    address = ('127.0.0.1', free_port())
    server = dist.TCPStore(*address, is_master=True, wait_for_workers=False)
    assert not isinstance(rendezvous(address, [0, 1], 2)[1], UserError)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        early = pool.submit(rendezvous, address, [1], 2)  # finds the name of the start before
        time.sleep(0.5)
        assert not early.done()
        found = rendezvous(address, [0], 2) + early.result()
    assert [store.add('here', 0) for store in found] == [2, 2] and server is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    'layout, shared', [([], True), (['--use_fsdp=True'], False)], ids=['DDP', 'FSDP']
)
def test_a_job_on_two_machines_outlives_the_loss_of_one(dataset, tmp_path, layout, shared):
    """Two torchruns: a worker of the second is killed, or that whole machine, in whose place
    another comes; and once more. The losses are those of an undisturbed run. shared: in torchrun's
    own store, with which torchrun does not take in another machine, or in one of rank 0 for each
    start.
    """
    last, port = 240 if not layout else 80, free_port()
    args = [
        f'--dataset={dataset}',
        *TINY,
        *layout,
        '--auto_resume=True',
        f'--max_iters={last}',
        '--eval_interval=1000',
        '--eval_at_start=False',
        f'--checkpoint_interval={last // 20}',
    ]
    environment = {
        'OMP_NUM_THREADS': '1',
        'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '0' if shared else '1',
    }

    def machine():
        return start_process(
            '-m',
            'torch.distributed.run',
            '--nnodes=2',
            '--nproc_per_node=1',
            '--max-restarts=3',
            '--rdzv_backend=c10d',
            '--rdzv_id=lost',
            '--monitor-interval=0.2',
            '--rdzv_conf=keep_alive_interval=1,keep_alive_max_attempt=2',
            f'--rdzv_endpoint=127.0.0.1:{port}',
            'train.py',
            f'--out_dir={tmp_path}/lost',
            *args,
            env=environment,
        )

    def newest():
        return max(
            (
                int(name.removeprefix('step_'))
                for name in os.listdir(f'{tmp_path}/lost/checkpoints')
                if re.fullmatch(r'step_\d+', name)
            ),
            default=0,
        )

    first, second = machine(), None
    output = []
    reader = threading.Thread(target=lambda: output.extend(first.stdout), daemon=True)
    reader.start()
    try:
        while True:  # the machine that comes first has the store in which they meet, and stays
            with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port)):
                break
            time.sleep(0.05)
        second = machine()
        for lost_at in (last // 4, last // 2):
            deadline = time.monotonic() + 90
            while not os.path.isdir(f'{tmp_path}/lost/checkpoints') or newest() < lost_at:
                assert time.monotonic() < deadline and first.poll() is None, ''.join(output)
                time.sleep(0.05)
            if shared:
                os.kill(workers(second.pid)[0], signal.SIGKILL)
            else:
                end_all(second)
                second = machine()
        assert first.wait(120) == 0 and second.wait(60) == 0, ''.join(output)
    finally:
        for process in (first, second):
            if process:
                end_all(process)
    assert [r['iter'] for r in records(tmp_path / 'lost')] == list(range(1, last + 1)) and len(
        records(tmp_path / 'lost', 'resume')
    ) == 2
    code, _ = train(2, f'--out_dir={tmp_path}/calm', *args)
    assert (
        code == 0
        and losses(tmp_path / 'lost') == losses(tmp_path / 'calm')
        and equal(weights(tmp_path / 'lost', last), weights(tmp_path / 'calm', last))
    )


@pytest.mark.slow
def test_the_sbatch_script_stops_queues_again_and_continues(dataset, tmp_path):
    """With stand-ins for srun, which starts the command once for each machine and hands TERM on,
    and for scontrol.
    """
    for name, text in (
        (
            'srun',
            (
                'while [[ $1 == --* ]]; do shift; done; for i in $(seq $SLURM_NNODES); do "$@" &'
                ' pids="$pids $!"; done; trap \'kill -TERM $pids\' TERM; wait; wait\n'
            ),
        ),
        ('scontrol', f'[ "$1" = requeue ] && echo "$2" >> {tmp_path}/queued || echo 127.0.0.1\n'),
    ):
        (tmp_path / name).write_text('#!/bin/bash\n' + text)
        (tmp_path / name).chmod(0o755)

    def start(last):
        port = free_port()
        environment = {
            **os.environ,
            'PATH': f'{tmp_path}:{os.path.dirname(sys.executable)}:{os.environ["PATH"]}',
            'SLURM_NNODES': '2',
            'SLURM_GPUS_ON_NODE': '1',
            'SLURM_JOB_ID': '77',
            'SLURM_JOB_NODELIST': 'here',
            'RDZV_PORT': str(port),
            'OMP_NUM_THREADS': '1',
            'PYTHONUNBUFFERED': '1',
            'STAGE_FROM': dataset,
            'STAGE_TO': f'{tmp_path}/local/tiny',
        }
        return subprocess.Popen(
            [
                'bash',
                'scripts/train.sbatch',
                f'--dataset={tmp_path}/local/tiny',
                f'--out_dir={tmp_path}/run',
                *TINY,
                f'--max_iters={last}',
                '--lr_decay_iters=20',
            ],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    output, told, job = '', False, start(100000)
    try:
        for line in job.stdout:
            output += line
            if line.startswith('iter 30/') and not told:
                os.kill(job.pid, signal.SIGUSR1)
                told = True
        job.wait(60)
    finally:
        end_all(job)
    assert (tmp_path / 'queued').read_text() == '77\n' and 'stopped at iter' in output, output
    step, _ = store.newest_whole(str(tmp_path / 'run'))
    assert step >= 30
    job = start(step + 5)
    try:
        output = job.communicate(timeout=120)[0]
    finally:
        end_all(job)
    assert (
        job.returncode == 0
        and f'continuing at iter {step}' in output
        and max(losses(tmp_path / 'run')) == step + 5
    ), output


@pytest.mark.parametrize(
    'code, seconds, restarts, again',
    [(1, 0, 0, True), (1, 600, 0, False), (1, 0, 20, False), (0, 0, 0, False)],
    ids=['lost', 'at once', 'too often', 'done'],
)
def test_the_sbatch_script_queues_again_when_a_long_job_fails(
    tmp_path, code, seconds, restarts, again
):
    for name, text in (
        ('srun', f'exit {code}\n'),
        ('scontrol', f'[ "$1" = requeue ] && echo "$2" >> {tmp_path}/queued || echo 127.0.0.1\n'),
    ):
        (tmp_path / name).write_text('#!/bin/bash\n' + text)
        (tmp_path / name).chmod(0o755)
    environment = {
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'SLURM_JOB_ID': '77',
        'SLURM_NNODES': '2',
        'REQUEUE_AFTER': str(seconds),
        'SLURM_RESTART_COUNT': str(restarts),
    }
    assert (
        subprocess.run(
            ['bash', 'scripts/train.sbatch', 'config/x.py'], cwd=ROOT, env=environment, timeout=30
        ).returncode
        == code
    )
    assert (tmp_path / 'queued').exists() == again
