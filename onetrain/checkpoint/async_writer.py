"""Writes checkpoints while training goes on.

    step k ends ── start() ── forward, backward of step k + 1 ── wait_staged() ── optimizer ── ...
                     └─ thread: copy the tensors aside ──────────┘
                                check space, write, sync, read back, manifest, rename,
                                remove older ones, hand to the uploader

The copies live in memory that is taken once (pinned for a GPU, whose copies run on a stream of
their own). Of tensors that every rank has in full, each copies and writes its share; of those that
are split (DTensor), its part; and reads back what it wrote. The thread talks to those of the other
ranks over a gloo group of its own, so that it never stands in the way of training's collectives. A
save that fails is an SaveResult with an error, the same on every rank; what was on disk before
stays as it was.
"""

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from onetrain.checkpoint import fault_injection, store
from onetrain.distributed import collectives, processes

if TYPE_CHECKING:
    from onetrain.checkpoint.uploader import Uploader
    from onetrain.distributed.processes import World


@dataclass
class SaveResult:
    """What became of one save: `error` is None, or a sentence; stall_s of training's time, total_s
    from start to end.
    """

    step: int
    path: str
    error: str | None = None
    not_finite: bool = False
    stall_s: float = 0.0
    total_s: float = 0.0
    size: int = 0
    notes: tuple = ()


class _NotFinite(Exception):
    """The weights hold a NaN or an infinity: never saved, the older checkpoints are worth more."""


class Saver:
    """Saves checkpoints of one run under out_dir; every rank has one and calls it alike.

    keep, keep_every, keep_all: see store.remove_old(). background=False: start() returns when all
    is done. before_commit: called on the main rank when the tensors are on disk, before the
    checkpoint gets its name. uploader: an uploader.Uploader, or None.
    """

    def __init__(
        self,
        out_dir: str,
        world: 'World',
        *,
        keep: int = 2,
        keep_every: int = 0,
        keep_all: bool = False,
        background: bool = True,
        before_commit: Callable = lambda: None,
        uploader: 'Uploader | None' = None,
    ):
        self.out_dir, self.world, self.background = out_dir, world, background
        self.keep, self.keep_every, self.keep_all = keep, keep_every, keep_all
        self.before_commit, self.uploader = before_commit, uploader
        self.thread: threading.Thread | None = None
        self.outcome: SaveResult | None = None
        self.staged = threading.Event()
        self.staged.set()
        self.copies, self.stream = {}, None
        self.copied: torch.cuda.Event | None = None
        self.stall_s, self.started = 0.0, 0.0
        self.planner = _Planner()
        self.device_wait: tuple | None = (
            None  # events of a GPU before and after its wait for the copy
        )

    def reserve(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take the memory for the copies of `tensors` now: pinning it takes seconds, and too little
        of it should be known before training.
        """
        if self.background:
            pin = self.world.device.type == 'cuda'
            self.copies = {
                name: torch.zeros_like(tensor, device='cpu', pin_memory=pin)
                for name, tensor in self._share(tensors).items()
            }

    def _share(self, tensors):
        split = {
            name: tensor.nbytes for name, tensor in tensors.items() if isinstance(tensor, DTensor)
        }
        owners = store.assign_files(
            {name: tensor.nbytes for name, tensor in tensors.items() if name not in split},
            self.world.size,
        )
        replicas = (
            self.world.mesh.size(0)
            if self.world.mesh is not None and self.world.mesh.ndim == 2
            else 1
        )
        replica = self.world.mesh.get_local_rank(0) if replicas > 1 else 0
        # of groups that each have all parts of a split tensor (hybrid sharding), one writes it
        writing = store.assign_files(split, replicas)
        return {
            name: tensor
            for name, tensor in tensors.items()
            if (writing[name] == replica if name in split else owners[name] == self.world.rank)
        }

    def start(
        self, step: int, tensors: dict[str, torch.Tensor], state: dict, due: float | None = None
    ) -> None:
        """Begin to save `tensors` ({name: tensor}) and `state` (JSON builtins) as checkpoint
        `step`; a save in flight must have been taken by wait().

        Until wait_staged() returns, the tensors must not change. due: since when training waits
        (perf_counter), now by default.
        """
        assert self.thread is None, 'one save at a time'
        self.started = due or time.perf_counter()
        self.outcome = SaveResult(step, store.path_of(self.out_dir, step))
        self.staged.clear()
        if self.background and not self.copies:
            self.reserve(tensors)
        size = sum(tensor.nbytes for tensor in tensors.values())
        mine = self._share(tensors)
        if self.world.device.type == 'cuda':
            self.copied = torch.cuda.Event()
            # the point in training's stream at which the tensors are those of this step
            self.copied.record()
        # not a daemon: an error elsewhere lets it finish
        self.thread = threading.Thread(
            target=self._run, args=(step, mine, state, size), name=processes.SAVER_THREAD
        )
        self.thread.start()
        if not self.background:
            self.thread.join()
        self.stall_s = time.perf_counter() - self.started

    def wait_staged(self) -> float:
        """Return when the tensors of the save in flight may change, and the seconds that took; a
        GPU waits by itself, the host goes on.
        """
        if self.thread is None or self.staged.is_set() and self.copied is None:
            return 0.0
        waiting = time.perf_counter()
        self.staged.wait()
        if self.copied is not None:
            self.device_wait = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.device_wait[0].record()
            torch.cuda.current_stream().wait_event(self.copied)
            self.device_wait[1].record()
            self.copied = None
        waited = time.perf_counter() - waiting
        self.stall_s += waited
        return waited

    def poll(self) -> 'SaveResult | None':
        """Return the SaveResult of the save in flight if it has ended, else None. Each is returned
        once.
        """
        return self.wait() if self.thread is not None and not self.thread.is_alive() else None

    def wait(self) -> 'SaveResult | None':
        """Return the SaveResult of the save in flight when it has ended; None if there is none."""
        if self.thread is None:
            return None
        self.thread.join()
        self.thread, self.copied = None, None
        if self.device_wait:
            self.device_wait[1].synchronize()
            self.stall_s += self.device_wait[0].elapsed_time(self.device_wait[1]) / 1000
            self.device_wait = None
        self.outcome.stall_s = self.stall_s
        return self.outcome

    # ---- in the thread

    def _run(self, step, tensors, state, size):
        outcome = self.outcome
        if self.background:
            with contextlib.suppress(OSError):
                # of this thread alone: training comes first
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        if self.world.device.type == 'cuda':
            torch.cuda.set_device(self.world.device)  # a new thread begins on the first GPU
            self.stream = self.stream or torch.cuda.Stream(self.world.device)
        # a stream of its own around all: torch's writer waits for the current one, and the default
        # one is training's
        with torch.cuda.stream(self.stream):
            if self.stream is not None:
                self.stream.wait_event(self.copied)  # the tensors are those of this step
            self._save(outcome, step, tensors, state, size)
        outcome.total_s = time.perf_counter() - self.started

    def _save(self, outcome, step, tensors, state, size):
        try:
            try:
                tensors = self._stage(step, tensors) if self.background else tensors
            finally:
                self.staged.set()
            self._together(lambda: self._check_finite(tensors))
            self._write(step, tensors, state, size)
            outcome.size = size
        except _NotFinite as error:
            outcome.error, outcome.not_finite = str(error), True
        except (
            Exception,
            dcp.api.CheckpointException,
        ) as error:  # whatever it is, training goes on and the user is told
            outcome.error = (
                f'{type(error).__name__}: {error}' if not isinstance(error, _Failed) else str(error)
            )
            # on every rank: what one remembers and another does not would not fit together
            self.planner = _Planner()

    def _stage(self, step, tensors):
        """Return copies of this rank's tensors in host memory, as they were at start()."""
        cuda = self.world.device.type == 'cuda'
        if cuda:
            for name, tensor in tensors.items():
                _check_alike(name, _local(self.copies[name]), _local(tensor))
                _local(self.copies[name]).copy_(_local(tensor), non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self.copied = copied
            self.staged.set()
            copied.synchronize()
        else:
            for name, tensor in tensors.items():
                _copy(name, _local(self.copies[name]), _local(tensor))
        fault_injection.maybe_crash('staging', step)
        return self.copies

    def _check_finite(self, tensors):
        for name, tensor in tensors.items():
            if (
                name.startswith('model.')
                and tensor.is_floating_point()
                and not _finite(_local(tensor))
            ):
                raise _NotFinite(f'{name.removeprefix("model.")} is not finite')

    def _write(self, step, tensors, state, size):
        folder = store.folder_of(self.out_dir)
        final = store.path_of(self.out_dir, step)
        temporary = os.path.join(folder, f'.writing_step_{step:08d}')
        main, files = self.world.is_main, _Files(step)
        try:
            self._together(lambda: self._make_room(temporary, size) if main else None)
            writer = dcp.FileSystemWriter(temporary)
            writer.fs = files
            self._together(lambda: self._write_tensors(tensors, writer))
            self._together(lambda: self._read_back(temporary, files.entries))
            written = {
                name: entry
                for entries in collectives.all_gather_objects(files.entries, self.world)
                for name, entry in entries.items()
            }
            self._together(
                lambda: self._commit(step, temporary, final, state, written) if main else None
            )
        except BaseException:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)  # room for the next try
            raise
        if main:
            try:
                notes = [] if self.keep_all else self._retain(step)
            except OSError as error:
                notes = [f'older checkpoints could not be removed: {_sentence(error)}']
            if self.uploader:
                self.uploader.add(step)
            self.outcome.notes = tuple(notes)

    def _make_room(self, temporary, size):
        store.clean_partial(self.out_dir)
        os.makedirs(temporary)
        free, needed = shutil.disk_usage(temporary).free, int(1.01 * size) + 2**20
        if free < needed:
            raise _Failed(
                f'{os.path.dirname(temporary)} has {free / 1e6:,.1f} MB free, the checkpoint and a'
                f' margin take {needed / 1e6:,.1f} MB'
            )

    def _write_tensors(self, tensors, writer):
        # a tenth of the work, and the manifest has better checksums
        torch.serialization.set_crc32_options(False)
        try:
            dcp.save(
                tensors,
                storage_writer=writer,
                planner=self.planner,
                process_group=self.world.slow_group,
                no_dist=self.world.size == 1,
            )
        except BaseException:
            # what the disk said; torch's own error says where in its archive that was
            if writer.fs.error:
                raise writer.fs.error from None
            raise

    def _read_back(self, temporary, entries):
        """Raise _Failed unless the files that this rank handed to the disk read back as they
        were.
        """
        if reason := store.wrong_checksum(temporary, entries):
            raise _Failed(f'what was written does not read back: {reason}')

    def _commit(self, step, temporary, final, state, written):
        text = json.dumps({'format': store.FORMAT, 'step': step, **state}, indent=1).encode()
        store.replace_file(os.path.join(temporary, 'state.json'), text)
        written['state.json'] = {'size': len(text), 'sha256': hashlib.sha256(text).hexdigest()}
        fault_injection.maybe_crash('before_manifest', step)
        config_hash = hashlib.sha256(
            json.dumps(state.get('config'), sort_keys=True).encode()
        ).hexdigest()
        manifest = {
            'format': store.FORMAT,
            'step': step,
            'config_sha256': config_hash,
            'files': dict(sorted(written.items())),
        }
        store.replace_file(os.path.join(temporary, 'manifest.json'), store.add_checksum(manifest))
        store.sync_folder(temporary)
        # each rank has read back its own files
        if reason := store.corruption_reason(temporary, 'size'):
            raise _Failed(f'what was written does not read back: {reason}')
        self.before_commit()
        fault_injection.maybe_crash('before_rename', step)
        replaced = os.path.join(os.path.dirname(final), f'.replaced_{os.path.basename(final)}')
        if os.path.exists(final):
            os.rename(final, replaced)
        os.rename(temporary, final)
        store.sync_folder(os.path.dirname(final))
        store.sync_folder(self.out_dir)
        fault_injection.maybe_crash('after_rename', step)
        shutil.rmtree(replaced, ignore_errors=True)

    def _retain(self, step):
        with self.uploader.lock if self.uploader else contextlib.nullcontext():
            copying = {self.uploader.current} if self.uploader else ()
            return store.remove_old(
                self.out_dir, step, keep=self.keep, keep_every=self.keep_every, also=copying
            )

    def _together(self, work):
        """Do `work` on every rank; raise on all if it failed on any."""
        error = None
        try:
            work()
        except (Exception, dcp.api.CheckpointException) as raised:
            error = raised
        mine = error and (
            isinstance(error, dcp.api.CheckpointException),
            isinstance(error, _NotFinite),
            _sentence(error),
        )
        failed = [e for e in collectives.all_gather_objects(mine, self.world) if e]
        if failed:
            # the rank that failed knows the reason better than those it let down
            _, not_finite, sentence = min(failed)
            raise (_NotFinite if not_finite else _Failed)(sentence) from error


class _Planner(dcp.DefaultSavePlanner):
    """Remembers which rank writes what where: worked out by rank 0 once, and not for each save."""

    made = itertools.count()

    def __init__(self):
        super().__init__(enable_plan_caching=True)
        # torch keeps the plans of all planners in one place, by this name
        self._cached_plans_key = f'saver {next(self.made)}'


class _Failed(Exception):
    """A save that did not work, with a sentence for the user."""


def _sentence(error):
    # one traceback for each rank; the user wants the reason
    if isinstance(error, dcp.api.CheckpointException):
        error = next((e[0] for e in error.failures.values()), error)
    return (
        ': '.join(filter(None, (error.strerror, error.filename)))
        if isinstance(error, OSError) and error.strerror
        else f'{error}' or type(error).__name__
    )


class _Files(dcp.filesystem.FileSystem):
    """Where torch.distributed.checkpoint writes: notes size and SHA-256 of each file as it is
    handed to the disk.
    """

    def __init__(self, step):
        super().__init__()
        self.step, self.entries, self.error = step, {}, None

    def create_stream(self, path, mode):
        return _Stream(self, path, mode)

    def rename(self, path, new_path):
        super().rename(path, new_path)
        self.entries[os.path.basename(new_path)] = self.entries.pop(os.path.basename(path))


class _Stream:
    """A file that only grows, with its checksum."""

    def __init__(self, files, path, mode):
        self.files, self.path, self.file = files, path, open(path, mode)
        self.digest, self.size = hashlib.sha256(), 0

    def write(self, data):
        self.digest.update(data)
        self.size += len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.files.error = error
            raise

    def tell(self):
        return self.size

    def flush(self):
        self.file.flush()

    def fileno(self):  # asked for by fsync, which sees only what has left Python's buffer
        self.file.flush()
        return self.file.fileno()

    def close(self):
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()
        self.files.entries[os.path.basename(self.path)] = {
            'size': self.size,
            'sha256': self.digest.hexdigest(),
        }
        if str(self.path).endswith('.distcp'):
            fault_injection.maybe_crash('after_shard', self.files.step)


def _local(tensor):
    """Return the part of a tensor that is in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _check_alike(name, target, source):
    """Raise ValueError unless a copy of `source` fits into `target` exactly: its memory was taken
    for a tensor of that shape.
    """
    if target.shape != source.shape or target.dtype != source.dtype:
        raise ValueError(
            f'{name} has the shape {tuple(source.shape)} in {source.dtype}, its copy'
            f' {tuple(target.shape)} in {target.dtype}'
        )


def _copy(name, target, source):
    """Copy a CPU tensor with the one thread that calls: torch's copy would call on the threads that
    training computes with.
    """
    _check_alike(name, target, source)
    if source.is_contiguous() and target.is_contiguous():
        # lets other threads run
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        target.copy_(source)


def _finite(tensor):
    """Return whether all elements are finite, by one thread: a sum in fp64 is, exactly if all terms
    are (they are fp32 or smaller).
    """
    if tensor.device.type != 'cpu' or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        return bool(tensor.isfinite().all())
    with np.errstate(invalid='ignore'):  # inf - inf
        return bool(np.isfinite(tensor.numpy().sum(dtype=np.float64)))
