"""Read and write ranges of many files with few open ones.

A data set may lie in tens of thousands of files, and a process may often have a thousand open. So a
file is opened when a range of it is asked for, and the one that was used longest ago is closed.
Reads name their offset (pread): processes that were forked from one another share no position, and
a file that became shorter is an error, not the end of the process.
"""

import collections
import contextlib
import os
import threading
from typing import Any

from onetrain.config import UserError

MOST = 128  # open at a time


class Descriptors:
    """The open files of a process."""

    def __init__(self, most: int = MOST):
        self.most, self.lock, self.open = most, threading.Lock(), collections.OrderedDict()

    def unlock(self) -> None:
        """Take a new lock, in a process in which the thread that held the old one is not."""
        self.lock = threading.Lock()

    def _of(self, path, flags):
        key = path, flags
        if key in self.open:
            self.open.move_to_end(key)
        else:
            while len(self.open) >= self.most:
                os.close(self.open.popitem(last=False)[1])
            # what is written to is a local copy, which is no link
            self.open[key] = os.open(
                path, flags | os.O_CLOEXEC | (os.O_NOFOLLOW if flags & os.O_RDWR else 0)
            )
        return self.open[key]

    def read_into(self, path: str, wanted: list[tuple]) -> tuple:
        """Fill each array of `wanted`, [(contiguous array, offset)], with the bytes of the file
        from its offset on; returns the file's version().

        Raises OSError where the file ends before.
        """
        with self.lock:  # so that no other thread closes it meanwhile
            descriptor = self._of(path, os.O_RDONLY)
            for array, offset in wanted:
                count = os.preadv(descriptor, [array], offset)
                if count != array.nbytes:
                    self._rest(
                        path, descriptor, memoryview(array).cast('B')[count:], offset + count
                    )
            return version(os.fstat(descriptor))

    def _rest(self, path, descriptor, view, offset):
        while view.nbytes:
            count = os.preadv(descriptor, [view], offset)
            if not count:
                raise OSError(f'{path} has become shorter: it ends at byte {offset:,}')
            view, offset = view[count:], offset + count

    def read(self, path: str, count: int, offset: int) -> bytes:
        """Return `count` bytes from `offset` on, fewer where the file ends."""
        with self.lock:
            return os.pread(self._of(path, os.O_RDWR), count, offset)

    def write(self, path: str, data: bytes, offset: int) -> None:
        """Write bytes at `offset`."""
        with self.lock:
            descriptor = self._of(path, os.O_RDWR)
            while data:
                count = os.pwrite(descriptor, data, offset)
                data, offset = data[count:], offset + count

    def forget(self, path: str) -> None:
        """Close a file that was read, so that the next read opens the one that has its name
        then.
        """
        with self.lock:
            if (path, os.O_RDONLY) in self.open:
                os.close(self.open.pop((path, os.O_RDONLY)))

    def close(self) -> None:
        """Close all; the next read opens its file again."""
        with self.lock:
            while self.open:
                os.close(self.open.popitem()[1])


FILES = Descriptors()
# a process that is forked while another thread reads would inherit a lock that nobody releases
os.register_at_fork(after_in_child=FILES.unlock)


class ChangedFile(UserError):
    """A file is another than the one that was opened, or was written to."""

    def __init__(self, path: str):
        super().__init__(f'{path} was changed while it was read: wait until nothing writes to it')


def version(status: Any) -> tuple:
    """Return what is another once a file was replaced or written to, from its os.stat_result."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def raise_limit() -> None:
    """Let this process open as many files as the system admits: each process of a job needs some
    for every other.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
