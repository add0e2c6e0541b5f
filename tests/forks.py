"""Commands of the project as forks of a process that has imported what all of them import: most of
the time of a short run is that.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from multiprocessing import resource_tracker

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONTEXT = multiprocessing.get_context('forkserver')
# nothing that reads the environment when it is imported, as fsspec does
CONTEXT.set_forkserver_preload(
    ['torch', 'torch.distributed.checkpoint', 'torch.distributed.fsdp', 'torch.distributed.run']
)


class Forked:
    """What subprocess.Popen of `python COMMAND...` would be, with a session of its own and its
    output, both streams, as text in `stdout`: a script, or -m and a module.
    """

    def __init__(self, command, cwd, env):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        self.command = command
        self.process = CONTEXT.Process(target=_become, args=(list(command), cwd, env, theirs))
        self.process.start()
        theirs.close()
        self.pid, self.stdout = self.process.pid, os.fdopen(os.dup(ours.fileno()))
        ours.close()

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.command, timeout)
        return self.process.exitcode

    def communicate(self, timeout=None):
        """(output, None); subprocess.TimeoutExpired leaves what was written for the next call."""
        if not hasattr(self, 'reader'):
            self.output = []
            self.reader = threading.Thread(
                target=lambda: self.output.extend(self.stdout), daemon=True
            )
            self.reader.start()
        self.reader.join(timeout)
        if self.reader.is_alive():
            raise subprocess.TimeoutExpired(self.command, timeout)
        self.wait(timeout)
        return ''.join(self.output), None

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.process.kill()


class ForkedWorker:
    """What torchrun needs of subprocess.Popen, for a worker that is forked from it. The agent's
    output is the worker's.
    """

    def __init__(self, command, env):
        self.command, self.returncode = command, None
        ready, said = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(said)
            os.read(ready, 1)  # b'' once it has a session of its own and closed the pipe
            os.close(ready)
            return
        try:
            os.setsid()
            # as a new interpreter would have it: the agent's connections end with the agent
            os.closerange(3, 4096)
            resource_tracker._resource_tracker._fd = None
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            _become(list(command), os.getcwd(), env)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=None):
        limit = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if limit is not None and time.monotonic() > limit:
                raise subprocess.TimeoutExpired(self.command, timeout)
            time.sleep(0.02)
        return self.returncode


def _fork_workers():
    """Have torchrun, in this process, fork its workers where it would start interpreters."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    handler = subprocess_handler.SubprocessHandler
    start = handler._popen

    def popen(self, args, env):
        if tuple(args[:2]) == (sys.executable, '-u') and self._stdout is self._stderr is None:
            return ForkedWorker(args[2:], env)
        return start(self, args, env)

    handler._popen = popen


def _become(command, cwd, env, output=None):
    """Be the command, as far as a new interpreter could tell."""
    if output is not None:
        os.setsid()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        output.close()
    sys.stdin, sys.stdout, sys.stderr = (
        open(os.devnull),
        *(os.fdopen(stream, 'w', buffering=1, closefd=False) for stream in (1, 2)),
    )
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    multiprocessing.set_start_method(None, force=True)  # the interpreter's own again
    import torch

    # which a new interpreter would read for itself
    torch.set_num_threads(int(env['OMP_NUM_THREADS']))
    atexit._clear()
    module = command[0] == '-m'
    sys.argv = command = command[1:] if module else command
    outside = [
        path
        for path in sys.path
        if path not in ('', ROOT, os.path.join(ROOT, 'tests'), os.path.join(ROOT, 'bench'))
    ]
    sys.path[:] = [
        cwd if module else os.path.dirname(os.path.abspath(command[0])),
        *filter(None, env.get('PYTHONPATH', '').split(':')),
        *outside,
    ]
    code = 1
    try:
        if command[0] == 'torch.distributed.run':
            _fork_workers()
        if module:
            runpy.run_module(command[0], run_name='__main__', alter_sys=True)
        else:
            runpy.run_path(command[0], run_name='__main__')
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)
