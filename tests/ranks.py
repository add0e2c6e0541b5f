"""Runs functions on several gloo ranks. The processes stay, so that a hundred small runs do not
start a hundred interpreters.
"""

import contextlib
import io
import os
import time
import traceback

import torch
import torch.multiprocessing as multiprocessing
from conftest import free_port

RUNNING = {}  # {number of ranks: Ranks}


class Ranks:
    """`size` processes that form one process group: ranks(function, *args) -> [what it returned on
    each rank].
    """

    def __init__(self, size):
        port = free_port()
        context = multiprocessing.get_context('spawn')
        pipes = [context.Pipe() for _ in range(size)]
        self.size, self.pipes = size, [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function, *args, timeout=120, **kwargs):
        """Run a function of a module (not a local one) on all ranks. An error on any, or no answer
        in time, is an AssertionError with the traceback.
        """
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        end, answers = time.monotonic() + timeout, {}
        while (
            len(answers) < self.size
            and time.monotonic() < end
            and not any(error for error, _ in answers.values())
        ):
            for rank, pipe in enumerate(self.pipes):
                if rank not in answers and pipe.poll(0.02):
                    answers[rank] = pipe.recv()
        failed = [f'rank {rank}: {error}' for rank, (error, _) in answers.items() if error]
        if failed or len(answers) < self.size:
            self.end()
            raise AssertionError(
                '\n'.join(failed)
                or f'no answer in {timeout} s from ranks {set(range(self.size)) - answers.keys()}'
            )
        return [answers[rank][1] for rank in range(self.size)]

    def threads(self):
        return len(os.listdir(f'/proc/{self.processes[0].pid}/task'))

    def end(self):
        RUNNING.pop(self.size, None)
        for process in self.processes:
            process.kill()


def ranks(size):
    """The Ranks of that size, started when first asked for."""
    # groups of meshes and rings stay as long as the process, each with threads of its own
    if size in RUNNING and RUNNING[size].threads() > 80:
        RUNNING[size].end()
    if size not in RUNNING:
        RUNNING[size] = Ranks(size)
    return RUNNING[size]


def train(size, *args):
    """train.py on `size` ranks: (exit code, what the ranks printed). One rank runs in this
    process.
    """
    if size == 1:
        return _train(args)
    answers = ranks(size)(_train, args)
    assert len({code for code, _ in answers}) == 1, answers
    return answers[0][0], ''.join(output for _, output in answers)


def _train(args):
    import train

    deterministic, output = torch.are_deterministic_algorithms_enabled(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = train.main(list(args))
    torch.use_deterministic_algorithms(deterministic)
    return code, output.getvalue()


def _serve(rank, size, port, pipe):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)  # conftest, imported above, takes two
    from onetrain.distributed import processes

    processes.start('cpu')
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((None, function(*args, **kwargs)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
