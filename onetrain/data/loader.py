"""Batches: the windows of evaluation, and those of training, read ahead of the steps."""

import atexit
import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from onetrain import signals
from onetrain.config import UserError
from onetrain.ops.cross_entropy import IGNORE

if TYPE_CHECKING:
    from onetrain.data.dataset import Mixture, Tokens
    from onetrain.data.order import Order
    from onetrain.ops.ring_attention import Ring
    from train import Config

STARTS_AHEAD = 64  # micro-steps


def read_batch(
    file: 'Mixture | Tokens', starts: np.ndarray, block_size: int, ring: 'Ring | None' = None
) -> torch.Tensor:
    """Return the sequences of `file` that begin at `starts`, (B,) array: (B, block_size + 1) int64;
    or of a ring_attention.Ring this rank's part.
    """
    return ring.read_part(file, starts) if ring else file.windows(starts, block_size)


def inputs_and_targets(batch: torch.Tensor) -> tuple:
    """Return (x, y) of a batch of read_batch()."""
    return (batch[0], batch[1]) if batch.dim() == 3 else (batch[:, :-1], batch[:, 1:])


def evaluation_batches(
    file: 'Mixture | Tokens',
    block_size: int,
    batch_size: int,
    n_batches: int,
    rank: int = 0,
    world_size: int = 1,
    ring: 'Ring | None' = None,
) -> Iterator:
    """Yield the fixed evaluation windows of a split as (x, y, source): int64 CPU tensors of shape
    (batch_size, block_size), with a ring_attention.Ring this rank's part of them, and the number of
    the source whose tokens have targets. A batch with windows of several sources comes once for
    each.

    n_batches * batch_size windows (or as many as there are), evenly spaced and never overlapping:
    the same at every evaluation and for every number of ranks; rank r takes each world_size-th
    batch. Every rank gets as many batches of the same shape, since ranks compute together: what
    fills them up has no target (IGNORE).
    """
    starts = file.evaluation_starts(block_size, n_batches * batch_size)
    for first in range(0, len(starts), world_size * batch_size):
        mine = starts[first + rank * batch_size : first + (rank + 1) * batch_size]
        filled = np.resize(mine if len(mine) else starts[:1], batch_size)
        x, y = inputs_and_targets(read_batch(file, filled, block_size, ring))
        y = y.clone()
        y[len(mine) :] = IGNORE
        of_row = torch.from_numpy(file.sources_of(filled))
        # alike on every rank
        for source in np.unique(file.sources_of(starts[first : first + world_size * batch_size])):
            yield x, torch.where((of_row == source)[:, None], y, IGNORE), int(source)


def evaluation_length(
    file: 'Mixture | Tokens', block_size: int, batch_size: int, n_batches: int, world_size: int = 1
) -> int:
    """Return how many batches evaluation_batches() gives to each rank."""
    sources = file.sources_of(file.evaluation_starts(block_size, n_batches * batch_size))
    return sum(
        len(np.unique(sources[first : first + world_size * batch_size]))
        for first in range(0, len(sources), world_size * batch_size)
    )


def evaluation_identity(file: 'Mixture | Tokens', c: 'Config') -> str:
    """Return hex that is another one wherever the evaluation windows of `file` differ, or what a
    token of them sees.

    c: train.Config. Losses under different ones are no rivals.
    """
    starts = file.evaluation_starts(c.block_size, c.eval_iters * c.batch_size)
    return hashlib.sha256(
        f'{file.fingerprint} {c.block_size} {c.document_mask} '.encode()
        + np.asarray(starts, '<i8').tobytes()
    ).hexdigest()


class TrainLoader:
    """Micro-batches of this rank, from `position` on, without end.

    Micro-step m of a step that starts at position p gets, on rank r of w, the sequences from p + (m
    * w + r) * batch_size: one process with accumulation 4 and two with accumulation 2 see the same
    steps. `next()` returns (x, y, position of its first sequence); x and y are (batch_size,
    block_size) int64 on `device`, or with `ring`, a ring_attention.Ring, this rank's part of them.

    On CUDA the windows are gathered into pinned memory by a thread that runs ahead and copied
    without waiting; files that lie elsewhere are read by such a thread too. With `num_workers` > 0
    torch's DataLoader gathers in that many processes, `prefetch_factor` batches ahead each.
    `wait_s` adds up the seconds that next() spent waiting.
    """

    def __init__(
        self,
        file: 'Mixture | Tokens',
        order: 'Order',
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        position: int,
        device: torch.device,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        ring: 'Ring | None' = None,
    ):
        self.file, self.order, self.batch_size, self.ring = file, order, batch_size, ring
        self.rank, self.world_size, self.first = rank, world_size, position
        self.device, self.pin = device, device.type == 'cuda'
        self.wait_s, self.micro = 0.0, 0
        # (number of a run of STARTS_AHEAD micro-steps, where their windows begin)
        self.starts: tuple = None, None
        self.workers, self.queue, self.stopped = None, None, threading.Event()
        self.source = (self.windows(micro) for micro in _EndlessSampler())
        if num_workers:
            self.workers = iter(
                torch.utils.data.DataLoader(
                    self,
                    sampler=_EndlessSampler(),
                    batch_size=None,
                    num_workers=num_workers,
                    prefetch_factor=prefetch_factor,
                    pin_memory=self.pin,
                    worker_init_fn=_ignore_signals,
                )
            )
            self.source = self.workers
            # before multiprocessing waits for workers that ignore its SIGTERM
            atexit.register(self.close)
        if num_workers or self.pin or file.remote:
            self.queue = queue.Queue(maxsize=2 if num_workers else 4)
            threading.Thread(target=self._run_ahead, daemon=True, name='batches').start()

    def position_of(self, micro: int | np.ndarray):
        """Return the position in the stream of the first sequence of this rank's micro-step
        `micro`, counted from the first step.
        """
        return self.first + (micro * self.world_size + self.rank) * self.batch_size

    def __getitem__(self, micro):
        """windows(), for DataLoader, which would make a page of an error: it is the item, and
        raised where that is asked for.
        """
        try:
            return self.windows(micro)
        except (UserError, OSError) as error:
            return error

    def windows(self, micro: int) -> torch.Tensor:
        """Return what read_batch() does for this rank's micro-step `micro`."""
        run = micro // STARTS_AHEAD
        if self.starts[0] != run:  # numpy is quicker with many positions at once
            first = self.position_of(run * STARTS_AHEAD + np.arange(STARTS_AHEAD))
            positions = first[:, None] + np.arange(self.batch_size)
            self.starts = run, self.order.at(positions.ravel()).reshape(positions.shape)
        return read_batch(
            self.file, self.starts[1][micro % STARTS_AHEAD], self.order.block_size, self.ring
        )

    def next(self, interrupted: Callable = lambda: False) -> tuple | None:
        """Return the next (x, y, position), or None if interrupted() became true while waiting
        for it.
        """
        started = time.perf_counter()
        window = self._wait(interrupted) if self.queue else next(self.source)
        self.wait_s += time.perf_counter() - started
        if window is None:
            return None
        position = self.position_of(self.micro)
        self.micro += 1
        return *inputs_and_targets(window.to(self.device, non_blocking=self.pin)), position

    def dummy_batch(self):
        """Return what next() would, with zeros: for a rank that has to take part in a step that
        will be given up.
        """
        shape = (
            (2, self.batch_size, len(self.ring.positions))
            if self.ring
            else (self.batch_size, self.order.block_size + 1)
        )
        return *inputs_and_targets(
            torch.zeros(shape, dtype=torch.int64, device=self.device)
        ), self.position_of(self.micro)

    def _wait(self, interrupted):
        while True:
            try:
                item = self.queue.get(timeout=0.2)
            except queue.Empty:
                if interrupted():
                    return None
                continue
            if isinstance(item, Exception):
                raise item
            return item

    def _run_ahead(self):
        try:
            for item in self.source:
                item = item.pin_memory() if self.pin and not self.workers else item
                while not self.stopped.is_set():
                    try:
                        self.queue.put(item, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if self.stopped.is_set():
                    return
        except Exception as error:  # raised again where the batch is asked for
            self.queue.put(error)

    def close(self) -> None:
        """Stop the thread and the worker processes."""
        self.stopped.set()
        # not left to the garbage collector: a traceback may hold the iterator
        if self.workers is not None:
            workers, self.workers = self.workers, None
            # or torch takes their end for an error
            torch.utils.data._utils.signal_handling._remove_worker_pids(id(workers))
            workers._worker_pids_set = False
            for process in workers._workers:
                process.kill()  # they only read, and one may hang in it
            workers._shutdown_workers()
        self.source = None
        atexit.unregister(self.close)


class _EndlessSampler:
    """0, 1, 2, ... as a sampler."""

    def __iter__(self):
        k = 0
        while True:
            yield k
            k += 1


def _ignore_signals(worker_id):
    signals.ignore_signals()
