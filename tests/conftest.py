"""What the tests share: a small data set made on the spot, tiny settings, and ways to run the
trainer.
"""

import contextlib
import functools
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys

# before torch is imported: in several processes, threads that wait by spinning leave the cores
# little time for anything else
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import numpy as np
import pytest
import torch
from forks import Forked

from model import Model
from onetrain.checkpoint import store
from onetrain.data.token_file import TokenFileWriter
from onetrain.model_config import resolve_shape

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# processes that the tests start import this checkout, whichever is installed
os.environ['PYTHONPATH'] = ROOT

torch.set_num_threads(2)

# in the source of a test or its fixtures: processes that it starts, runs that it trains
_LONG = re.compile(
    r'\b(start_process|run_process|run_ranks|ranks\(|run_train|torchrun|subprocess|spawn|main\(|train\('
    r'|prepare\(|fastest_backend|time\.sleep)|torch\.compile|compile=True'
)
_LONG_FIXTURES = {'train', 'ranks', 's3'}


@functools.cache
def _is_long(code):
    return bool(_LONG.search(inspect.getsource(code)))


def pytest_addoption(parser):
    parser.addoption(
        '--quick', action='store_true', help='leave out tests that train or start processes'
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption('--quick'):
        return
    quick = []
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs
        sources = [item.function, *(found[-1].func for found in fixtures.values())]
        own = [code for code in sources if code.__module__ not in ('conftest', 'ranks')]
        own = [code for code in own if inspect.getsourcefile(code).startswith(ROOT)]
        long = (
            '/distributed/' in str(item.path)
            or _LONG_FIXTURES & fixtures.keys()
            or any(map(_is_long, own))
        )
        if not long:
            quick.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in quick])
    items[:] = quick


TEXT = (
    'the quick brown fox jumps over the lazy dog; 0123456789 sphinx of black quartz, judge my'
    ' vow!\n'
)


def write_dataset(folder, train, val, vocab_size=64, **changes):
    """A data set of the given ids, char-like unless `changes` say otherwise."""
    chars = sorted(set(TEXT))
    settings = dict(
        vocab_size=vocab_size,
        eot_id=None,
        tokenizer={'kind': 'char'},
        split='as given',
        extra={'stoi': {c: i for i, c in enumerate(chars)}, 'itos': dict(enumerate(chars))},
    )
    with TokenFileWriter(folder, **{**settings, **changes}) as writer:
        writer.write('train', train)
        writer.write('val', val)
    return folder


def write_shards(folder, train, val, sizes=(700, 1, 16, 300), vocab_size=5000):
    """The same set as write_dataset() makes, in files of these sizes, again and again."""
    with TokenFileWriter(
        str(folder),
        vocab_size=vocab_size,
        eot_id=None,
        tokenizer={'kind': 'bytes'},
        split='by hand',
        sharded=True,
    ) as writer:
        for split, ids in (('train', train), ('val', val)):
            first = turn = 0
            while first < len(ids):
                size = sizes[turn % len(sizes)]
                writer.append(
                    split,
                    np.asarray(ids[first : first + size], dtype=writer.dtype),
                    [min(size, len(ids) - first)],
                )
                first, turn = first + size, turn + 1
    return str(folder)


def make_dataset(folder):
    """A data set of 20,000 + 4,000 characters of repetitive text; its absolute path serves as
    --dataset.
    """
    chars = sorted(set(TEXT))
    generator = np.random.default_rng(0)
    ids = np.array([chars.index(c) for c in ' '.join(generator.choice(TEXT.split(' '), 6000))])
    return write_dataset(folder, ids[:20000], ids[20000:24000], vocab_size=len(chars))


@pytest.fixture(scope='session')
def dataset(tmp_path_factory):
    """make_dataset()'s, once for all tests."""
    return make_dataset(str(tmp_path_factory.mktemp('data') / 'tiny'))


TINY = [
    '--device=cpu',
    '--compile=False',
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=32',
    '--block_size=16',
    '--batch_size=4',
    '--gradient_accumulation_steps=1',
    '--learning_rate=1e-3',
    '--warmup_iters=2',
    '--eval_iters=2',
    '--log_interval=1',
]


def run_train(dataset, out_dir, *args):
    """train.py in this process with tiny settings; returns its exit code."""
    import train

    deterministic = torch.are_deterministic_algorithms_enabled()
    code = train.main([f'--dataset={dataset}', f'--out_dir={out_dir}', *TINY, *args])
    torch.use_deterministic_algorithms(deterministic)
    return code


@pytest.fixture
def train(dataset):
    """train(out_dir, *args): run_train on the small data set."""
    return lambda out_dir, *args: run_train(dataset, out_dir, *args)


def start_process(*command, env=None):
    """A command of the project as a user would start it, output captured as text."""
    # as many threads as in this process: sums over another number of them round differently
    environment = {**os.environ, 'PYTHONUNBUFFERED': '1', 'OMP_NUM_THREADS': '2', **(env or {})}
    if command[0] != '-c':
        return Forked([str(word) for word in command], ROOT, environment)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def end_all(process):
    """SIGKILL a process of start_process() and all that it started: torchrun gives each worker a
    session of its own.
    """
    children, found = {process.pid}, True
    while found:
        parents = {}
        for name in filter(str.isdigit, os.listdir('/proc')):
            with contextlib.suppress(OSError, IndexError):
                with open(f'/proc/{name}/stat') as f:
                    parents[int(name)] = int(f.read().rsplit(')', 1)[1].split()[1])
        found = {pid for pid, parent in parents.items() if parent in children} - children
        children |= found
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run_process(*command, timeout=240, env=None):
    """(exit code, output) of a command."""
    process = start_process(*command, env=env)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end_all(process)
        output, _ = process.communicate()
        raise AssertionError(f'{command} took more than {timeout} s:\n{output}') from None
    return process.returncode, output


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def torchrun(processes, *args, timeout=240, script='train.py'):
    """(exit code, output) of train.py, or of another script, under torchrun with gloo on this
    machine.
    """
    return run_process(
        '-m',
        'torch.distributed.run',
        '--nproc_per_node',
        str(processes),
        '--master_addr',
        '127.0.0.1',
        '--master_port',
        str(free_port()),
        script,
        *args,
        timeout=timeout,
        env={'OMP_NUM_THREADS': '1'},
    )


def rank_environments(size):
    """What torchrun would add to the environment of each of `size` processes."""
    common = {
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': str(free_port()),
        'WORLD_SIZE': str(size),
        'LOCAL_WORLD_SIZE': str(size),
    }
    return [{**common, 'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in range(size)]


def run_ranks(processes, *args, timeout=240, script='train.py'):
    """(largest exit code, output) of a script in processes with the environment that torchrun gives
    them, but without its start of an interpreter for each.
    """
    started = [
        start_process(script, *args, env={'OMP_NUM_THREADS': '1', **of_rank})
        for of_rank in rank_environments(processes)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                end_all(process)
    return max(process.returncode % 256 for process in started), ''.join(outputs)


def records(out_dir, kind='iter'):
    """The records of one type in the only JSONL of out_dir."""
    logs = [n for n in os.listdir(out_dir) if n.startswith('run_') and n.endswith('.jsonl')]
    assert len(logs) == 1, logs
    with open(os.path.join(out_dir, logs[0])) as f:
        lines = [json.loads(line) for line in f]
    return [record for record in lines if record['type'] == kind]


def losses(out_dir):
    return {record['iter']: record['loss'] for record in records(out_dir)}


def small_gpt2(block_size, vocab_size):
    """A GPT-2 of one layer with biases and the weights of seed 0."""
    sizes = dict(n_layer=1, n_head=2, n_embd=16, block_size=block_size, vocab_size=vocab_size)
    model = Model(resolve_shape(dict(arch_preset='gpt2', bias=True, **sizes)))
    model.init_weights(0)
    return model


def weights(out_dir, step):
    """All tensors of a checkpoint."""
    path = store.path_of(str(out_dir), step)
    config = store.read_state(path)['config']
    model = Model(resolve_shape(config))
    tensors = {f'model.{n}': p.detach() for n, p in model.named_parameters()}
    muon = model.matrices() if config.get('optimizer') == 'muon' else ()
    tensors.update(
        {
            f'optimizer.{key}.{n}': torch.zeros_like(p)
            for n, p in model.named_parameters()
            for key in (('momentum',) if n in muon else ('exp_avg', 'exp_avg_sq'))
        }
    )
    store.load(path, tensors)
    return tensors


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


KEYS = {
    'AWS_ACCESS_KEY_ID': 'test',
    'AWS_SECRET_ACCESS_KEY': 'test',
    'AWS_DEFAULT_REGION': 'us-east-1',
    'AWS_MAX_ATTEMPTS': '1',
}


class Server:
    """An S3-compatible server on loopback, which can be stopped and started with what it holds."""

    def __init__(self):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        self.environment = {
            **KEYS,
            'AWS_ENDPOINT_URL': f'http://127.0.0.1:{self.port}',
            'FSSPEC_S3_ENDPOINT_URL': f'http://127.0.0.1:{self.port}',
        }

    def start(self):
        from moto.server import ThreadedMotoServer

        self.server = ThreadedMotoServer(ip_address='127.0.0.1', port=self.port, verbose=False)
        self.server.start()

    def stop(self):
        self.server.stop()


@pytest.fixture(scope='session')
def s3():
    pytest.importorskip('moto')
    pytest.importorskip('s3fs')
    server = Server()
    server.start()
    os.environ.update(server.environment)
    import fsspec

    fsspec.filesystem('s3', endpoint_url=server.environment['AWS_ENDPOINT_URL']).mkdir('bucket')
    yield server
    server.stop()
    for key in server.environment:
        os.environ.pop(key)
