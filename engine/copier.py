"""A copy of the run elsewhere, at any URL that fsspec knows (file://, s3://, gs://, hf://), and the way back.

    URL/run_20261121_101500/
        run_20261121_101500.jsonl, run_20261121_101500.log
        checkpoints/step_00001000/      as on disk; manifest.json comes last, so an interrupted copy is no checkpoint

A thread of the main rank copies whole checkpoints, the newest first, reads every file back and compares its checksum with
the manifest, and tries again until it works, waiting longer each time. Nothing at URL is ever removed.
"""
import os
import re
import shutil
import threading
import time

import fsspec

from engine import checkpoint, faults
from engine.configurator import ConfigError

LONGEST_WAIT = 60.0  # seconds between two tries


def open_url(url):
    """(fsspec file system, path in it) of a URL or a local folder. Raises ConfigError for a scheme that is not known or not installed."""
    try:
        local = '://' not in url or url.startswith(('file://', 'local://'))
        return fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **({'auto_mkdir': True} if local else {}))
    except (ImportError, ValueError) as error:
        raise ConfigError(f'{url!r} cannot be opened: {error}; expected a folder or a URL such as s3://bucket/folder') from None


class Copier:
    """Copies what add() names while training goes on; close() waits for the rest.

    keep_local: how many checkpoints stay on this machine once they are copied, None = as many as the run keeps anyway.
    say(text): called by news(), in the caller's thread.
    """

    def __init__(self, url, out_dir, run_name, keep_local=None):
        self.url, self.out_dir, self.run_name, self.keep_local = url, out_dir, run_name, keep_local
        self.fs, root = open_url(url)
        self.root = f"{root.rstrip('/')}/{run_name}"
        self.lock = threading.Lock()  # held while a checkpoint is chosen to be copied or removed
        self.pending, self.current, self.done = set(checkpoint.steps(out_dir)), None, set()
        self.messages, self.wake, self.closing = [], threading.Event(), False
        self.thread = threading.Thread(target=self._run, daemon=True, name='copies')
        self.thread.start()

    def add(self, step):
        """Copy checkpoint `step`, or what is new in it."""
        with self.lock:
            self.pending.add(step)
        self.wake.set()

    def news(self):
        """What happened since the last call, as lines of text."""
        messages, self.messages = self.messages, []
        return messages

    def close(self, patience, interrupted=lambda: False):
        """Copy what is left, and the logs, until `patience` seconds pass without success or interrupted() is true; True if all is there."""
        self.closing = True
        self.add(None)  # the logs, as they are at the end
        deadline, done = time.monotonic() + patience, -1
        while self.thread.is_alive() and time.monotonic() < deadline and not interrupted():
            self.thread.join(0.1)
            if len(self.done) > done:
                deadline, done = time.monotonic() + patience, len(self.done)
        return not self.thread.is_alive()

    def _run(self):
        tries = 0
        while True:
            with self.lock:
                steps = self.pending - {None}
                self.current = max(steps) if steps else None
                step, idle = self.current, not self.pending
                self.pending.discard(step)
            if idle:
                if self.closing:
                    return
                self.wake.wait()
                self.wake.clear()
                continue
            try:
                started = time.monotonic()
                new = self._copy(step) if step is not None else self._copy_logs()
                self.done.add(step)
                if new:
                    self.messages.append(f'copied step {step} to {self.root} in {time.monotonic() - started:.1f} s, verified')
                if tries:
                    self.messages.append(f'{self.url} works again')
                tries = 0
                self._thin_out()
            except Exception as error:  # each backend has its own; none of them may stop the run
                if step is not None and not os.path.isdir(checkpoint.path_of(self.out_dir, step)):
                    continue  # removed since, there is a newer one
                with self.lock:
                    self.pending.add(step)
                tries += 1
                if tries in (1, 2, 5) or tries % 10 == 0:
                    self.messages.append(f'NOT COPIED to {self.url} ({type(error).__name__}: {str(error)[:300]}): try {tries}, trying again')
                self.wake.clear()
                self.wake.wait(min(LONGEST_WAIT, 2.0 ** min(tries - 1, 10)))

    def _copy(self, step):
        """Copy one checkpoint; False if it was there already."""
        here, there = checkpoint.path_of(self.out_dir, step), f'{self.root}/checkpoints/step_{step:08d}'
        if checkpoint.why_broken(here, 'size'):
            raise ValueError(f'{here}: {checkpoint.why_broken(here, "size")}')
        with open(f'{here}/manifest.json', 'rb') as f:
            manifest = f.read()
        new = not self._equals(f'{there}/manifest.json', manifest)
        if new:
            for number, (name, entry) in enumerate(checkpoint.unseal(manifest)['files'].items()):
                if not self._has(f'{there}/{name}', entry):
                    self.fs.put_file(f'{here}/{name}', f'{there}/{name}')
                    if not self._has(f'{there}/{name}', entry):
                        raise ValueError(f'{name} reads back differently')
                if number == 0:
                    faults.reach('upload', step)
            self._copy_logs()  # before the manifest: a checkpoint that is there has its log
            self._write(f'{there}/manifest.json', manifest)
        if os.path.isfile(f'{here}/evaluation.json'):
            with open(f'{here}/evaluation.json', 'rb') as f:
                self._write(f'{there}/evaluation.json', f.read())
        return new

    def _copy_logs(self):
        for name in (f'{self.run_name}.jsonl', f'{self.run_name}.log'):
            if os.path.isfile(log := os.path.join(self.out_dir, name)):
                with open(log, 'rb') as f:
                    data = f.read()
                self._write(f'{self.root}/{name}', data[:data.rfind(b'\n') + 1])  # without a line that is being written
        return False

    def _has(self, path, entry):
        return self.fs.isfile(path) and self.fs.size(path) == entry['size'] and checkpoint.sha256(path, self.fs) == entry['sha256']

    def _equals(self, path, data):
        return self.fs.isfile(path) and self.fs.cat_file(path) == data

    def _write(self, path, data):
        if not self._equals(path, data):
            self.fs.pipe_file(path, data)
            if not self._equals(path, data):
                raise ValueError(f'{path} reads back differently')

    def _thin_out(self):
        if self.keep_local is None:
            return
        with self.lock:
            here = checkpoint.steps(self.out_dir)
            for step in here[:-self.keep_local]:
                if step in self.done:
                    try:
                        checkpoint.remove(checkpoint.path_of(self.out_dir, step), step)
                    except OSError as error:
                        self.messages.append(f'{checkpoint.path_of(self.out_dir, step)} could not be removed: {error}')


def find(source, level='size'):
    """(fs, folder of the run, step, rejected) of the newest whole checkpoint at `source`, or of the one that it names.

    source: URL or folder of a checkpoint, of a run, or of several runs, the newest of which counts. step is None where there
    is none. Raises ConfigError if the place cannot be read.
    """
    fs, root = open_url(source)
    root = root.rstrip('/')
    try:
        name = root.rsplit('/', 1)[-1]
        if re.fullmatch(r'step_\d{8,}', name):
            return fs, root.rsplit('/', 2)[0], *checkpoint.newest_whole(root.rsplit('/', 2)[0], level, fs, int(name.removeprefix('step_')))
        if not fs.isdir(f'{root}/checkpoints'):
            children = sorted(path.rstrip('/') for path in fs.ls(root, detail=False)) if fs.isdir(root) else []
            runs = [path for path in children if re.search(r'/run_[^/]*$', path) and fs.isdir(f'{path}/checkpoints')]
            root = runs[-1] if runs else root
        return fs, root, *checkpoint.newest_whole(root, level, fs)
    except ConfigError:
        raise
    except Exception as error:  # each backend has its own
        raise ConfigError(f'{source} cannot be read ({type(error).__name__}: {str(error)[:300]})') from None


def fetch(source, out_dir):
    """Copy the newest whole checkpoint at `source` (see find()), its run's logs with it, into out_dir; returns (step, rejected).

    Every byte is verified after the copy; a checkpoint that fails gives way to the one before. What out_dir holds of the same
    run and step is used as it is; logs that are replaced are renamed to *.before_fetch.
    Raises ConfigError if there is none, or if out_dir holds another run.
    """
    fs, root, step, rejected = find(source)
    while step is not None:
        there, here = checkpoint.path_of(root, step), checkpoint.path_of(out_dir, step)
        run_name = checkpoint.read_state(there, fs)['run_name']
        for local in reversed(checkpoint.steps(out_dir)):
            if not checkpoint.why_broken(path := checkpoint.path_of(out_dir, local), 'size') and (name := checkpoint.read_state(path)['run_name']) != run_name:
                raise ConfigError(f'{source} is {run_name}, but {out_dir} holds {name}: give another --out_dir')
        if os.path.isdir(here) and not checkpoint.why_broken(here):
            break
        temporary = os.path.join(checkpoint.folder_of(out_dir), f'.fetching_step_{step:08d}')
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        names = [*checkpoint.unseal(fs.cat_file(f'{there}/manifest.json'))['files'], 'manifest.json', 'evaluation.json']
        for name in names:
            if name != 'evaluation.json' or fs.isfile(f'{there}/{name}'):
                fs.get_file(f'{there}/{name}', f'{temporary}/{name}')
        reason = checkpoint.why_broken(temporary)
        if reason is None:
            if os.path.isdir(here):
                checkpoint.rename_aside(here, 'rejected')
            os.rename(temporary, here)
            for name in (f'{run_name}.jsonl', f'{run_name}.log'):
                if fs.isfile(f'{root}/{name}'):
                    log = os.path.join(out_dir, name)
                    if os.path.exists(log):
                        os.rename(log, checkpoint.free_name(f'{log}.before_fetch'))
                    fs.get_file(f'{root}/{name}', log)
            break
        rejected.append((there, reason))
        shutil.rmtree(temporary)
        older = [s for s in checkpoint.steps(root, fs) if s < step]
        if source.rstrip('/').endswith(f'step_{step:08d}') or not older:
            step = None
        else:
            step = next((s for s in reversed(older) if checkpoint.why_broken(checkpoint.path_of(root, s), 'size', fs) is None), None)
    if step is None:
        raise ConfigError(f'{source} has no checkpoint that can be used' + ''.join(f'; {path}: {reason}' for path, reason in rejected))
    return step, rejected
