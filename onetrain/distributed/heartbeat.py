"""Notice a process that hangs, whatever the others wait for.

Collectives of training have a time limit, but a wait for a checkpoint has none: disks may be slow.
So each process shows every few seconds that it lives, as a count in the store where the processes
met, and looks at the others' counts. A thread does it: a process whose main thread waits for a disk
is alive; one that was stopped, or whose machine is gone, is not.
"""

import os
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

LEFT = b'left'


class Heartbeat:
    """That of process `rank` of `size`.

    store: torch's Store that all share; timeout: seconds of silence after which one is lost.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: Any):
        self.store = store.clone()  # a connection of its own: another may be waiting for an answer
        self.rank, self.size, self.timeout = rank, size, timeout
        self.pause = min(2.0, timeout / 6)
        self.store.set(f'host {rank}', os.uname().nodename)
        self.store.set(f'beat {rank}', '0')
        self.seen = {}  # {rank: (what it last showed, when that was new)}
        self.ended = threading.Event()

    def start(self):
        """Begin, once all processes have made theirs."""
        self.thread = threading.Thread(target=self._run, daemon=True, name='heartbeat')
        self.thread.start()

    def _run(self):
        count, last, looked = 0, time.monotonic(), time.monotonic()
        try:
            while not self.ended.wait(self.pause):
                now = time.monotonic()
                if now - last > self.timeout / 2:
                    self.seen = {}  # this process was stopped itself, perhaps with all others
                last, count = now, count + 1
                self.store.set(f'beat {self.rank}', str(count))
                if now - looked >= self.timeout / 6:
                    looked = now
                    if silent := self.unresponsive(self.timeout):
                        self._report(silent)
                        os._exit(1)
        except dist.DistError:
            pass  # the store was with one that is gone: what is being exchanged with it fails

    def unresponsive(self, seconds: float):
        """Return the ranks that have shown nothing new for `seconds`, though they did not end."""
        now = time.monotonic()
        shown = self.store.multi_get([f'beat {rank}' for rank in range(self.size)])
        for rank, value in enumerate(shown):
            if self.seen.get(rank, (None,))[0] != value:
                self.seen[rank] = value, now
        return [
            rank
            for rank, (value, since) in self.seen.items()
            if value != LEFT and rank != self.rank and now - since >= seconds
        ]

    def end(self):
        """Say that this process ends by itself, and look no longer."""
        self.ended.set()
        self.thread.join(5)
        try:
            self.store.set(f'beat {self.rank}', LEFT)
        except dist.DistError:
            pass

    def report_unresponsive(self):
        """End as end() does, after an error, and print which processes do not answer."""
        self.end()
        self.seen, patience = {}, 2.5 * self.pause
        try:
            self.unresponsive(patience)
            time.sleep(patience)
            self._report(self.unresponsive(patience))
        except dist.DistError:
            pass

    def _report(self, silent):
        """Print, from one of the processes that are left, which are silent."""
        if not silent or self.rank != min(set(range(self.size)) - set(silent)):
            time.sleep(1)  # so that the one that prints is not ended before
            return
        names = ', '.join(
            f'rank {rank} on {self.store.get(f"host {rank}").decode()}' for rank in silent
        )
        print(
            f'error: {names} did not answer: '
            f'{"they hang or were" if silent[1:] else "it hangs or was"} killed',
            file=sys.stderr,
            flush=True,
        )
