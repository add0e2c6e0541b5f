"""When a run is asked to stop: signals and the clock.

A signal only sets a flag, which the ranks agree on where it is safe to stop (before every
micro-step and every evaluation batch). Until there is something to save, and while only
evaluating, a signal ends the process at once instead.
"""

import os
import signal
import threading
import time

SIGNALS = {signal.SIGTERM: 'SIGTERM', signal.SIGINT: 'Ctrl-C', signal.SIGUSR1: 'SIGUSR1'}
TIME_IS_UP = 75  # EX_TEMPFAIL of sysexits.h: try again later
NOT_FINITE = 3
SAVE_FAILED = 4


def ignore_signals():
    """For worker processes: signals go to the whole process group, and the trainer ends its workers
    itself.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def seconds_running() -> float:
    """Return seconds since this process was started; under torchrun since torchrun was, so that
    restarts do not begin a new limit.
    """
    process = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else os.getpid()
    with open(f'/proc/{process}/stat') as f, open('/proc/uptime') as g:
        # field 22 of proc(5): the start, in clock ticks after boot
        ticks = int(f.read().rsplit(')', 1)[1].split()[19])
        return float(g.read().split()[0]) - ticks / os.sysconf('SC_CLK_TCK')


class StopRequest:
    """Handles SIGTERM, SIGINT and SIGUSR1 from its construction to restore().

    max_hours: the time limit since seconds_running() began, 0 = none. exit_immediately: True as
    long as a signal may end the process without a save. fault: an exit code that the run itself
    asks for. code() is 0, or the exit code of what was asked for: 128 + signal number, fault,
    TIME_IS_UP.
    """

    def __init__(self, verbose: bool = True):
        self.verbose, self.exit_immediately, self.max_hours = verbose, True, 0.0
        self.signal, self.received, self.repeats, self.requested_code = None, 0.0, 0, 0
        self.begun = time.monotonic() - seconds_running()
        # torchrun hands the signal that it got on to its workers, which may have it from the
        # terminal or from Slurm already
        self.expected_repeats = 1 if 'TORCHELASTIC_RUN_ID' in os.environ else 0
        self.before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.writing, False)
        self.wakeup = signal.set_wakeup_fd(self.writing, warn_on_full_buffer=False)
        threading.Thread(
            target=self._watch, args=(self.reading,), daemon=True, name='signals'
        ).start()

    def code(self) -> int:
        """Return the exit code that was asked for, 0 for none."""
        if self.signal is not None:
            return 128 + self.signal
        if self.requested_code:
            return self.requested_code
        return (
            TIME_IS_UP
            if self.max_hours and time.monotonic() - self.begun > 3600 * self.max_hours
            else 0
        )

    def _receive(self, number, frame):
        if self.exit_immediately:
            self._say(f'{SIGNALS[number]}: stopped; nothing had to be saved')
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self.received = number, time.monotonic()
            self._say(
                f'{SIGNALS[number]}: stopping at the next safe point, with a checkpoint (once more:'
                ' at once, without)'
            )
            return
        elapsed = time.monotonic() - self.received
        if elapsed < 1.0:  # the same signal on two ways
            return
        self.repeats += 1
        if elapsed < 15.0 and self.repeats <= self.expected_repeats:
            return
        self._say(f'{SIGNALS[number]} again: stopped without a checkpoint')
        os._exit(128 + number)

    def _watch(self, pipe):
        """End the process at once for a main thread that cannot: it may wait, inside torch, for a
        rank that the same signal ended first.
        """
        while number := os.read(pipe, 1):
            time.sleep(0.3)
            if number[0] in SIGNALS and self.exit_immediately and self.signal is None:
                os._exit(128 + number[0])
        os.close(pipe)

    def _say(self, text):
        if self.verbose:
            os.write(2, f'\n{text}\n'.encode())  # print() is not safe in a signal handler

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup, warn_on_full_buffer=False)
        os.close(self.writing)  # which ends the thread
