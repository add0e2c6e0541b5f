"""A copy of the run elsewhere, at any URL that fsspec knows (file://, s3://, gs://, hf://), and the
way back.

    URL/NAME/run_20261121_101500/       NAME is that of out_dir, so runs may share a URL
        run_20261121_101500.jsonl, .log and .json
        checkpoints/step_00001000/      as on disk; manifest.json comes last, so that an
                                        interrupted copy is no checkpoint

A thread of the main rank copies whole checkpoints, the newest first, and compares every file's
checksum with the manifest: by the one that a bucket names, or else by reading the file back. It
tries again until it works, waiting longer each time. On several machines each copies the files of
its own processes (shared_upload.py). Nothing at URL is ever removed; only a run that went back
replaces its own checkpoint of the same iteration.
"""

import hashlib
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fsspec.implementations.local import LocalFileSystem

from onetrain.checkpoint import fault_injection, store
from onetrain.config import UserError
from onetrain.files import check_own, no_link, open_url, redact, replacing, sentence

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from onetrain.checkpoint.shared_upload import Machines

LONGEST_WAIT = 60.0  # seconds between two tries
LOGS = ('jsonl', 'log', 'json')
# bytes in which a file goes to a bucket; one of more than 10,000 of them in larger ones
PIECE = 64 * 2**20
# bytes from which a bucket can take more without sending again what it has
APPENDED_FROM = 5 * 2**20


def check_writable(url: str, out_dir: str, patience: float = 60.0) -> None:
    """Write, read back and remove a small file where the copies of out_dir go. Raises UserError,
    with the reason, if that fails.

    patience: seconds after which a server that does not answer counts as a failure.
    """
    result, content = [], secrets.token_bytes(16)

    def work():
        try:
            fs, root = open_url(url)
            path = f'{place_of(root, out_dir)}/.probe_{secrets.token_hex(4)}'
            _write(fs, path, content)
            fs.rm_file(path)
            result.append(None)
        except Exception as error:  # each backend has its own
            result.append(f'{type(error).__name__}: {sentence(error)}')

    thread = threading.Thread(target=work, daemon=True, name='probe')
    thread.start()
    thread.join(4)
    if thread.is_alive():
        print(f'waiting for an answer of {redact(url)}', flush=True)
        thread.join(patience - 4)
    reason = result[0] if result else f'no answer within {patience:.0f} s'
    if reason:
        raise UserError(
            f'upload_to={redact(url)} cannot be written to ({reason}): correct the URL, its'
            ' credentials or their rights, or leave --upload_to out'
        )


def copy_checkpoint(
    fs: 'AbstractFileSystem',
    here: str,
    to_fs: 'AbstractFileSystem',
    there: str,
    before_manifest: Callable = lambda: None,
    again: bool = False,
    copy: Callable | None = None,
) -> bool:
    """Copy the checkpoint folder `here` of the file system fs to `there` of to_fs; return False if
    it was there already.

    Every file is compared with the manifest, which comes last. before_manifest: called when all
    else is there. again: whether the files of a copy that is there are read too, and those that are
    damaged copied. copy: called instead of copy_files() with (here, there, files). Raises
    ValueError for what arrives differently, and what the file systems raise.
    """
    expected = store.read_manifest(here, fs)['files']
    manifest = fs.cat_file(f'{here}/manifest.json')
    new = not _equals(to_fs, f'{there}/manifest.json', manifest)
    if again and not new:
        new = not all(_has(to_fs, f'{there}/{name}', entry) for name, entry in expected.items())
    if new:
        # of a lineage that this run left: no mixture may look whole
        if to_fs.isfile(f'{there}/manifest.json'):
            to_fs.rm_file(f'{there}/manifest.json')
        if copy:
            copy(here, there, expected)
        else:
            copy_files(fs, here, to_fs, there, expected)
        before_manifest()
        _write(to_fs, f'{there}/manifest.json', manifest)
    if fs.isfile(f'{here}/evaluation.json'):
        _write(to_fs, f'{there}/evaluation.json', fs.cat_file(f'{here}/evaluation.json'))
    return new


def copy_files(
    fs: 'AbstractFileSystem',
    here: str,
    to_fs: 'AbstractFileSystem',
    there: str,
    files: dict[str, dict],
) -> None:
    """Copy `files` ({name: entry of the manifest}) from the folder `here` to `there`, but for those
    that are there. Raises ValueError for one that arrives differently.
    """
    for number, (name, entry) in enumerate(files.items()):
        if not _has(to_fs, f'{there}/{name}', entry):
            _transfer(fs, f'{here}/{name}', to_fs, f'{there}/{name}')
            if not _arrived(fs, f'{here}/{name}', to_fs, f'{there}/{name}', entry):
                raise ValueError(f'{name} reads back differently')
        if number == 0:
            fault_injection.maybe_crash('upload', int(here.rsplit('_', 1)[1]))


def copy_logs(
    fs: 'AbstractFileSystem',
    here: str,
    to_fs: 'AbstractFileSystem',
    there: str,
    run_name: str,
    sent: dict | None = None,
) -> None:
    """Copy the logs of a run from the folder `here` to the folder `there`, without a line that is
    being written.

    sent: a dict for the next call with the same folders, which then sends what is new where `there`
    can take that alone.
    """
    for ending in LOGS:
        name = f'{run_name}.{ending}'
        path, to_path = f'{here}/{name}', f'{there}/{name}'
        if isinstance(fs, LocalFileSystem):
            check_own(path)
        if not fs.isfile(path):
            continue
        if ending == 'json' or sent is None:
            version = fs.info(path).get('mtime'), fs.size(path)
            if sent is None or sent.get(name) != version:
                data = fs.cat_file(path)
                _write(to_fs, to_path, data if ending == 'json' else data[: data.rfind(b'\n') + 1])
            if sent is not None:
                sent[name] = version
        else:
            # sent whole after an error
            sent[name] = _append(path, to_fs, to_path, *sent.pop(name, (0, b'')))


def _append(path, to_fs, to_path, size, end):
    """Bring the copy of a local log up to date, of which `size` bytes were sent, with `end` as the
    last; returns the two as they are now.
    """
    with open(path, 'rb') as f:
        f.seek(size - len(end))
        grown = f.read(len(end)) == end  # else it was cut: its run went back
        f.seek(size if grown else 0)
        new = f.read()
    new = new[: new.rfind(b'\n') + 1]
    if not grown or size == 0:
        _write(to_fs, to_path, new)
        return len(new), new[-4096:]
    if new and _takes_more(to_fs, size) and _is_as_left(to_fs, to_path, size, end):
        with (
            open(to_path, 'ab', opener=no_link)
            if isinstance(to_fs, LocalFileSystem)
            else to_fs.open(to_path, 'ab')
        ) as f:
            f.write(new)
        if to_fs.cat_file(to_path, start=size) != new:
            raise ValueError(f'{to_path} reads back differently')
    elif new:
        with open(path, 'rb') as f:
            _write(to_fs, to_path, f.read(size) + new)
    return size + len(new), (end + new)[-4096:]


def _takes_more(fs, size):
    """Return whether a file of `size` bytes in `fs` grows by sending only what is new: a bucket of
    S3 copies the rest itself, if that is one piece.
    """
    return (
        isinstance(fs, LocalFileSystem)
        or _names_checksums(fs)
        and APPENDED_FROM <= size < 5 * 2**30
    )


def _is_as_left(fs, path, size, end):
    """Return whether the file at `path` is one of `size` bytes that ends with `end`."""
    link = isinstance(fs, LocalFileSystem) and os.path.islink(path)
    return (
        not link
        and fs.isfile(path)
        and fs.size(path) == size
        and fs.cat_file(path, start=size - len(end)) == end
    )


def _transfer(fs, path, to_fs, to_path):
    if isinstance(to_fs, LocalFileSystem):
        os.makedirs(os.path.dirname(to_path), exist_ok=True)
        with fs.open(path, 'rb') as source, replacing(to_path) as target:
            shutil.copyfileobj(source, target, 2**22)
        return
    if isinstance(fs, LocalFileSystem):
        if _names_checksums(to_fs):
            to_fs.put_file(path, to_path, chunksize=_piece(os.path.getsize(path)))
        else:
            to_fs.put_file(path, to_path)
        return
    with fs.open(path, 'rb') as source, to_fs.open(to_path, 'wb') as target:
        shutil.copyfileobj(source, target, 2**22)


def _has(fs, path, entry):
    return (
        fs.isfile(path)
        and fs.size(path) == entry['size']
        and store.sha256(path, fs) == entry['sha256']
    )


def _arrived(fs, path, to_fs, to_path, entry):
    """Return whether the copy of a file is as the manifest says: by the checksum that a bucket made
    of what it received, else by reading all of it.
    """
    if isinstance(fs, LocalFileSystem) and _names_checksums(to_fs):
        found = to_fs.info(to_path)
        sha256, etag = _checksums(path)
        if (found['size'], sha256) == (entry['size'], entry['sha256']) and str(
            found.get('ETag')
        ).strip('"') == etag:
            return True
    return _has(to_fs, to_path, entry)  # an encrypted object has an ETag of another kind


def _names_checksums(fs):
    """Return whether `fs` is a bucket of S3, whose ETag is the MD5 of a file sent whole, and of the
    MD5s of one sent in pieces.
    """
    return 's3' in fs.protocol


def _piece(size):
    """Return bytes in which a file of `size` bytes goes to a bucket."""
    return max(1, size) if size < 2 * PIECE else max(PIECE, -(-size // 10_000))


def _checksums(path):
    """Return (SHA-256, ETag) of a file that _transfer() sends."""
    sha256, pieces = hashlib.sha256(), []
    with open(path, 'rb') as f:
        while piece := f.read(_piece(os.path.getsize(path))):
            sha256.update(piece)
            pieces.append(hashlib.md5(piece, usedforsecurity=False))
    if len(pieces) == 1:
        return sha256.hexdigest(), pieces[0].hexdigest()
    whole = hashlib.md5(b''.join(piece.digest() for piece in pieces), usedforsecurity=False)
    return sha256.hexdigest(), f'{whole.hexdigest()}-{len(pieces)}'


def _equals(fs, path, data):
    return fs.isfile(path) and fs.cat_file(path) == data


def _write(fs, path, data):
    if not _equals(fs, path, data):
        if isinstance(fs, LocalFileSystem):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with replacing(path) as f:
                f.write(data)
        else:
            fs.pipe_file(path, data)
        if not _equals(fs, path, data):
            raise ValueError(f'{path} reads back differently')


class Uploader:
    """Copies what add() names while training goes on; finish() waits for the rest.

    keep_local: how many checkpoints stay on this machine once they are copied, beside the best,
    None = as many as the run keeps anyway. machines: shared_upload.Machines that share the work,
    or None.
    """

    def __init__(
        self,
        url: str,
        out_dir: str,
        run_name: str,
        keep_local: int | None = None,
        machines: 'Machines | None' = None,
    ):
        self.url = url
        self.out_dir = out_dir
        self.run_name = run_name
        self.keep_local = keep_local
        self.machines = machines
        self.fs, root = open_url(url)
        self.root = f'{place_of(root, out_dir)}/{run_name}'
        self.sent = {}  # of logs, see copy_logs()
        self.lock = threading.Lock()  # held while a checkpoint is chosen to be copied or removed
        self.pending = set(store.steps(out_dir))
        self.current = None
        self.done = set()
        self.broken = set()
        self.tries = {}
        self.last_success = time.monotonic()
        self.messages, self.wake, self.closing = [], threading.Event(), False
        self.thread = threading.Thread(target=self._run, daemon=True, name='copies')
        self.thread.start()

    def add(self, step: int | None) -> None:
        """Copy checkpoint `step`, or what is new in it."""
        with self.lock:
            self.pending.add(step)
        self.wake.set()

    def take_messages(self) -> list[str]:
        """Return what happened since the last call, as lines of text."""
        messages, self.messages = self.messages, []
        return messages

    def finish(self, patience: int, interrupted: Callable = lambda: False) -> bool | None:
        """Wait up to 20 s for what is left, and the logs: True if all is there, None if it goes on,
        False once `patience` seconds passed without success or interrupted() is true.
        """
        if not self.closing:
            self.last_success = time.monotonic()
            self.add(None)  # the logs, as they are at the end
            self.closing = True
            self.wake.set()
        until = time.monotonic() + 20
        while self.thread.is_alive() and time.monotonic() < until:
            self.thread.join(0.1)
            if interrupted() or time.monotonic() - self.last_success > patience:
                return False
        return None if self.thread.is_alive() else not self.broken

    def _run(self):
        failures = 0
        while True:
            with self.lock:
                # the newest first, but what failed after what was not tried; the logs last
                step = max(
                    self.pending,
                    key=lambda s: (-self.tries.get(s, 0), -1 if s is None else s),
                    default='none',
                )
                self.current = step if isinstance(step, int) else None
                self.pending.discard(step)
            if step == 'none':
                if self.closing:
                    return
                self.wake.wait()
                self.wake.clear()
                continue
            try:
                started = time.monotonic()
                path = None if step is None else store.path_of(self.out_dir, step)
                if path and store.corruption_reason(path, 'size'):
                    if not os.path.isdir(path):
                        continue  # it was removed since, or is being saved, and then comes again
                    # once more: it may have got its name meanwhile
                    if reason := store.corruption_reason(path, 'size'):
                        self.broken.add(step)
                        self.messages.append(f'NOT COPIED, as it is not whole: {path}: {reason}')
                        continue
                new = self._copy(step) if step is not None else bool(self._copy_logs())
                self.done.add(step)
                self.broken.discard(step)
                self.last_success = time.monotonic()
                if new:
                    self.messages.append(
                        f'copied step {step} to {self.root} in {time.monotonic() - started:.1f} s,'
                        ' verified'
                    )
                if failures:
                    self.messages.append(f'{redact(self.url)} works again')
                failures = 0
                self._prune_local()
            except Exception as error:  # each backend has its own; none of them may stop the run
                if step is not None and not os.path.isdir(store.path_of(self.out_dir, step)):
                    continue
                failures += 1
                with self.lock:
                    self.pending.add(step)
                    self.tries[step] = self.tries.get(step, 0) + 1
                if failures in (1, 2, 5) or failures % 10 == 0:
                    self.messages.append(
                        f'NOT COPIED to {redact(self.url)} ({type(error).__name__}:'
                        f' {sentence(error)}): try {failures}, trying again'
                    )
                self.wake.clear()
                self.wake.wait(min(LONGEST_WAIT, 2.0 ** min(failures - 1, 10)))

    def _copy(self, step):
        """Copy one checkpoint; False if it was there already."""
        here = store.path_of(self.out_dir, step)
        there = f'{self.root}/checkpoints/step_{step:08d}'
        # a checkpoint that is there has its log
        return copy_checkpoint(
            store.LOCAL,
            here,
            self.fs,
            there,
            self._copy_logs,
            copy=self.machines and self.machines.copy,
        )

    def _copy_logs(self):
        copy_logs(store.LOCAL, self.out_dir, self.fs, self.root, self.run_name, self.sent)

    def _prune_local(self):
        if self.keep_local is None:
            return
        with self.lock:
            here = store.steps(self.out_dir)
            for step in set(here[: -self.keep_local]) - {store.best_step(self.out_dir)}:
                if step in self.done and step not in self.pending:
                    try:
                        store.remove(store.path_of(self.out_dir, step), step)
                    except OSError as error:
                        self.messages.append(
                            f'{store.path_of(self.out_dir, step)} could not be removed: {error}'
                        )


def place_of(url: str, out_dir: str) -> str:
    """Return where the copies of the runs in out_dir are, given upload_to."""
    return f'{url.rstrip("/")}/{os.path.basename(os.path.abspath(out_dir))}'


def runs(fs: 'AbstractFileSystem', root: str) -> list[str]:
    """Return folders of runs, those with checkpoints/ in them, at `root` or up to two levels below:
    a run, the runs of an out_dir, those of several.
    """
    level, found = [root], []
    for _ in range(3):
        found += [path for path in level if fs.isdir(f'{path}/checkpoints')]
        level = [
            child.rstrip('/')
            for path in level
            if path not in found and fs.isdir(path)
            for child in fs.ls(path, detail=False)
        ]
    return sorted(found)


def lineages(place: str) -> set[str]:
    """Return the lineages of all checkpoints of the runs at the URL `place`. Raises UserError if
    it cannot be read.
    """
    fs, root = open_url(place)
    try:
        return set().union(*(store.lineages(run, fs) for run in runs(fs, root)))
    except Exception as error:  # each backend has its own
        raise _unreadable(place, error) from None


def _newest_lineage(run, fs):
    """Return (newest lineage of a run's checkpoints, the run's folder): the run of a folder that
    was begun or went back last has the largest.
    """
    return max(store.lineages(run, fs), default=''), run


def _unreadable(source, error):
    return UserError(f'{redact(source)} cannot be read ({type(error).__name__}: {sentence(error)})')


def find_run(source: str, level: str = 'size') -> tuple:
    """Return (fs, folder of the run, step, rejected) of the checkpoint to continue at `source`, or
    of the one that it names.

    source: URL or folder of a checkpoint, of a run, or of the runs of one out_dir, the newest of
    which counts. step is None where there is none. Raises UserError if the place cannot be read,
    or holds the runs of several out_dirs.
    """
    fs, root = open_url(source)
    root = root.removesuffix('/checkpoints')
    try:
        name = root.rsplit('/', 1)[-1]
        if re.fullmatch(r'step_\d{8,}', name):
            root = root.rsplit('/', 2)[0]
            return (
                fs,
                root,
                *store.newest_whole(root, level, fs, int(name.removeprefix('step_'))),
            )
        found = runs(fs, root)
        # several runs of one out_dir are one story, which the newest lineage goes on with; runs of
        # several are not
        stories = sorted(
            {path.rsplit('/', 1)[0] if re.search(r'/run_[^/]*$', path) else path for path in found}
        )
        if len(stories) > 1:
            raise UserError(
                f'{redact(source)} has runs of'
                f' {", ".join(path.rsplit("/", 1)[-1] for path in stories)}: add the one to'
                ' continue to the URL'
            )
        root = (
            found[0]
            if len(found) == 1
            else max((_newest_lineage(run, fs) for run in found), default=('', root))[1]
        )
        return fs, root, *store.newest_whole(root, level, fs)
    except UserError:
        raise
    except Exception as error:  # each backend has its own
        raise _unreadable(source, error) from None


def fetch_run(source: str, out_dir: str) -> tuple:
    """Copy the newest whole checkpoint at `source` (see find_run()), its run's logs with it, into
    out_dir; returns (step, rejected).

    Every byte is verified after the copy; a checkpoint that fails gives way to the one before. What
    out_dir holds of the same run and step is used as it is; logs that are replaced are renamed to
    *.before_fetch. The copy is marked as fetched. Raises UserError if there is none, or if
    out_dir holds another run.
    """
    fs, root, step, rejected = find_run(source)
    try:
        while step is not None:
            there = store.path_of(root, step)
            run_name = store.read_state(there, fs).get('run_name')
            reason = (
                'its state.json has no run_name'
                if run_name is None
                else _fetch_one(fs, root, step, source, out_dir, run_name)
            )
            if reason is None:
                break
            rejected.append((there, reason))
            order = [] if re.search(r'step_\d+/?$', source) else store.newest_first(root, fs)
            older = order[order.index(step) + 1 :] if order else []
            step = next(
                (
                    s
                    for s in older
                    if store.corruption_reason(store.path_of(root, s), 'size', fs) is None
                ),
                None,
            )
    except UserError:
        raise
    except Exception as error:  # each backend has its own
        raise _unreadable(source, error) from None
    if step is None:
        raise UserError(
            f'{redact(source)} has no checkpoint that can be used'
            + ''.join(f'; {path}: {reason}' for path, reason in rejected)
        )
    return step, rejected


def _fetch_one(fs, root, step, source, out_dir, run_name):
    """Copy a checkpoint and the logs of its run into out_dir, unless they are there. Return why it
    cannot be used, or None.
    """
    there, here = store.path_of(root, step), store.path_of(out_dir, step)
    for local in reversed(store.steps(out_dir)):
        path = store.path_of(out_dir, local)
        if (
            not store.corruption_reason(path, 'size')
            and (name := store.read_state(path).get('run_name')) != run_name
        ):
            raise UserError(
                f'{redact(source)} is {run_name}, but {out_dir} holds {name}: give another'
                ' --out_dir'
            )
    if (
        os.path.isdir(here)
        and not store.corruption_reason(here)
        and store.lineage_order(here) == store.lineage_order(there, fs)
    ):
        _fetch_logs(fs, root, run_name, out_dir, only_missing=True)
        return None
    temporary = os.path.join(store.folder_of(out_dir), f'.fetching_step_{step:08d}')
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    for name in (*store.read_manifest(there, fs)['files'], 'manifest.json', 'evaluation.json'):
        if name != 'evaluation.json' or fs.isfile(f'{there}/{name}'):
            fs.get_file(f'{there}/{name}', f'{temporary}/{name}')
    reason = store.corruption_reason(temporary)
    if reason is not None:
        shutil.rmtree(temporary)
        return reason
    store.mark_fetched(temporary, redact(source))
    if os.path.isdir(here):
        store.rename_aside(here, 'rejected')
    # before the rename: a checkpoint that is here has its log
    _fetch_logs(fs, root, run_name, out_dir)
    os.rename(temporary, here)
    return None


def _fetch_logs(fs, root, run_name, out_dir, only_missing=False):
    for name in (f'{run_name}.jsonl', f'{run_name}.log'):
        log = os.path.join(out_dir, name)
        if isinstance(fs, LocalFileSystem):
            check_own(f'{root}/{name}')
        if not fs.isfile(f'{root}/{name}') or only_missing and os.path.exists(log):
            continue
        with fs.open(f'{root}/{name}', 'rb') as source, replacing(log) as target:
            shutil.copyfileobj(source, target, 2**22)
            if os.path.lexists(log):
                os.rename(log, store.free_name(f'{log}.before_fetch'))
