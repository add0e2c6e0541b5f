"""Where a run continues: which checkpoint, with which settings, and what happens to other
checkpoints in its folder.
"""

import dataclasses
import errno
import fcntl
import math
import os
import shutil
import typing
from typing import TYPE_CHECKING

from onetrain.checkpoint import import_nanogpt, store, uploader
from onetrain.config import UserError, check_type
from onetrain.distributed import collectives
from onetrain.files import HIDDEN, check_own, no_link, redact

if TYPE_CHECKING:
    from onetrain.distributed.processes import World
    from train import Config

# what a resumed run takes from its own command line, never from the checkpoint
NOT_INHERITED = (
    'out_dir',
    'init_from',
    'auto_resume',
    'resume_from',
    'verify_checkpoint',
    'allow_data_change',
    'max_time',
    'eval_only',
    'eval_at_start',
    'device',
    'backend',
    'timeout_minutes',
    'find_batch_size',
)


def is_step(resume_from: str | None) -> bool:
    """Return whether a value of resume_from is an iteration of out_dir; else it is a place, or
    None.
    """
    return (resume_from or '').isdecimal() and resume_from.isascii()


def apply_auto_resume(c: 'Config', world: 'World') -> tuple:
    """Return `c` of a run with auto_resume, set to resume if there is something to continue, else
    as it is; and the path of a checkpoint that was verified, or None.

    The newest checkpoint of out_dir and of what out_dir has at upload_to counts; if there is none,
    resume_from.
    """
    if not c.auto_resume:
        return c, None
    if not c.eval_only:
        collectives.broadcast_from_main(lambda: store.clean_partial(c.out_dir), world)
    step, _ = _newest_whole(c.out_dir, c.verify_checkpoint, world)

    def look():
        if c.upload_to:
            place = uploader.place_of(c.upload_to, c.out_dir)
            try:
                fs, root, there, rejected = uploader.find_run(place)
            except UserError:
                if step is None:
                    raise  # starting anew while the run may be there would fork it
                return 'resume', None
            if there is None and rejected and step is None:
                raise UserError(
                    f'{redact(place)} has no checkpoint that can be used: '
                    + '; '.join(f'{path}: {reason}' for path, reason in rejected)
                )
            if there is not None:
                here = (
                    store.lineage_order(store.path_of(c.out_dir, step))
                    if step is not None
                    else ('', -1)
                )
                if store.lineage_order(store.path_of(root, there), fs) > here:
                    return 'resume', place
        begun = bool(store.steps(c.out_dir)) or os.path.isfile(os.path.join(c.out_dir, 'ckpt.pt'))
        return (
            ('resume', None)
            if begun
            else ('resume', c.resume_from)
            if c.resume_from
            else (c.init_from, None)
        )

    init_from, resume_from = collectives.broadcast_from_main(look, world)
    return dataclasses.replace(
        c, init_from=init_from, resume_from=resume_from
    ), step and store.path_of(c.out_dir, step)


def _newest_whole(out_dir, level, world, wanted=None, verified=None):
    """store.newest_whole() by all ranks together. verified: path of a checkpoint whose bytes
    need not be read once more.
    """
    candidates = collectives.broadcast_from_main(
        lambda: store.newest_first(out_dir) if wanted is None else [wanted], world
    )
    return store.first_whole(
        out_dir,
        candidates,
        lambda path: store.corruption_reasons(path, world, 'size' if path == verified else level),
    )


def find_checkpoint(
    c: 'Config',
    given: dict[str, str],
    shape_keys: list[str],
    world: 'World',
    notes: list,
    verified: str | None = None,
) -> tuple:
    """Return (config, state, nanoGPT's content or None): what c.init_from='resume' means here.
    verified: path of a checkpoint that apply_auto_resume() verified.

    state: the dict of the checkpoint's state.json with 'path'; 'rejected' and 'certain' for
    archive_rejected(); 'chosen' if the user went back. Keys that the user did not set now are taken
    from the checkpoint; shape_keys and the seed cannot be changed. Raises UserError.
    """
    step, rejected, certain, chosen = _choose(c, world, verified)
    if certain and not is_step(c.resume_from):
        notes.append(f'step {step} comes from {redact(c.resume_from)}')
    notes += [f'rejected {path}: {reason}' for path, reason in rejected]
    imported = None
    old = os.path.join(c.out_dir, 'ckpt.pt')
    if step is not None:
        state = _read_state(store.path_of(c.out_dir, step))
    elif os.path.isfile(old) and not c.resume_from:
        imported = import_nanogpt.read_checkpoint(old)
        state = _state_of_nanogpt(imported)
        notes.append(f"imported nanoGPT's {old} at iter {imported['step']}; it stays as it is")
    else:
        why = ''.join(f'; {path}: {reason}' for path, reason in rejected)
        raise UserError(
            f'init_from=resume, but {store.folder_of(c.out_dir)} has no checkpoint that can be'
            f' used{why}: type --init_from=scratch to start, or the --out_dir of the run to'
            ' continue'
        )
    state.update(rejected=[path for path, _ in rejected], certain=certain, chosen=chosen)
    merged = _merged(c, given, state, shape_keys, notes)
    if imported and merged.optimizer != 'adamw':
        raise UserError(
            f'{old} has the state of AdamW: leave --optimizer={merged.optimizer} out, or start from'
            ' these weights with export.py and --init_from=FOLDER'
        )
    return merged, state, imported


def _read_state(path):
    """Return the state of a run's checkpoint, with its path. Raises UserError for one of another
    kind.
    """
    state = {**store.read_state(path), 'path': path}
    for key in (
        'config',
        'run_name',
        'position',
        'tokens_per_step',
        'best_val_loss',
        'scaler',
    ):
        if key not in state:
            raise UserError(
                f'{path}/state.json has no {key}: it is not the checkpoint of a run; take another'
                ' with --resume_from'
            )
    return state


def _state_of_nanogpt(imported):
    """Return the same of nanoGPT's checkpoint, without the keys that reach outside."""
    config = imported['config']
    outside = {key: value for key, value in config.items() if store.is_external_key(key, value)}
    return {
        'step': imported['step'],
        'best_val_loss': imported['best_val_loss'],
        'not_taken_over': outside,
        'config': {key: value for key, value in config.items() if key not in outside},
    }


def _choose(c, world, verified):
    """Return (step or None, [(path, reason)] rejected, whether it was a certain step, whether the
    user chose it).
    """
    if not c.eval_only:
        collectives.broadcast_from_main(lambda: store.clean_partial(c.out_dir), world)
    wanted, rejected, chosen = None, [], False
    if is_step(c.resume_from):
        wanted, chosen = int(c.resume_from), True
    elif c.resume_from:
        wanted, rejected = collectives.broadcast_from_main(
            lambda: uploader.fetch_run(c.resume_from, c.out_dir), world
        )
        verified = store.path_of(c.out_dir, wanted)  # after it was copied
        chosen = not c.auto_resume  # which takes the newest there is
    step, more = _newest_whole(c.out_dir, c.verify_checkpoint, world, wanted, verified)
    if (
        step is None
        and wanted is not None
        and (steps := collectives.broadcast_from_main(lambda: store.steps(c.out_dir), world))
    ):
        raise UserError(
            f'resume_from={c.resume_from}: {more[0][0]}: {more[0][1]}; {c.out_dir} has steps'
            f' {steps}'
        )
    return step, rejected + more, wanted is not None, chosen


def _merged(c, given, state, shape_keys, notes):
    hints = typing.get_type_hints(type(c))
    saved = {
        'optimizer': 'adamw',
        **{
            key: check_type(key, value, hints[key], f'{state.get("path", c.out_dir)}/state.json')
            for key, value in state['config'].items()
            if key in hints and key not in NOT_INHERITED
        },
    }
    _check_untrusted_keys(c, given, state, saved, notes)
    for key, source in given.items():
        value = getattr(c, key)
        if key not in saved or value == saved[key] or value is None and key in shape_keys:
            continue
        if (
            key == 'gradient_accumulation_steps'
            and saved.get('total_batch_size')
            and source != 'command line'
        ):
            continue  # a recipe's value, which total_batch_size overruled when the run began
        if key in shape_keys or key in ('seed', 'optimizer'):
            leave_out = (
                f'leave --{key} out'
                if source == 'command line'
                else f'leave {source} out (the checkpoint holds every key)'
            )
            raise UserError(
                f'{source}: {key}={value!r}, but the checkpoint in {c.out_dir} has'
                f' {key}={saved[key]!r}, which cannot change: {leave_out}, or start in another'
                ' --out_dir'
            )
        was = saved.pop(key)
        if redact(value) != was:
            notes.append(f'{key}={redact(value)} from now on ({source}; it was {was})')
    if (
        given.get('gradient_accumulation_steps') == 'command line'
        and not given.get('total_batch_size')
        and saved.get('total_batch_size')
    ):
        notes.append(
            f'total_batch_size={saved["total_batch_size"]} of the checkpoint gives way to'
            f' gradient_accumulation_steps={c.gradient_accumulation_steps}'
        )
        saved['total_batch_size'] = 0
    return dataclasses.replace(c, **saved)


def _check_untrusted_keys(c, given, state, saved, notes):
    """Note the keys of a fetched checkpoint, or of nanoGPT's, that are not taken over; raise
    UserError for one without which the run cannot go on.

    That is its data set where it is a path, and a URL whose secret part was never recorded.
    """
    for key, value in state.get('not_taken_over', {}).items():
        if key in given or value == getattr(type(c), key, None):
            continue
        said = (
            f'{key}={redact(value)!r} of a checkpoint that anybody may have made is not taken over,'
            f' since it reaches outside of {c.out_dir}'
        )
        if key == 'dataset':
            raise UserError(f'{said}: give the --dataset here')
        notes.append(f'{said}: give --{key} to have it')
    for key, value in saved.items():
        if isinstance(value, str) and HIDDEN in value and '://' in value and key not in given:
            raise UserError(
                f'{key}={value} of the checkpoint had a user, a password or a query, which is never'
                f' recorded: give --{key} again'
            )


def config_record(c: 'Config') -> dict:
    """Return a config as it is recorded in logs and checkpoints, on the terminal and in W&B: a dict
    without the secrets of its URLs, and without `notify`, which is one: it is typed at each start.
    """
    return redact(dataclasses.asdict(dataclasses.replace(c, notify=None)))


def choose_lineage(c: 'Config', resumed: dict | None, place: str | None = None) -> str:
    """Return the lineage of the checkpoints to come: that of the run, or a new one where it begins
    anew or went back.

    A new one sorts after every other: those in out_dir, that of the checkpoint which is left, and
    those at `place`, the URL to which copies go, or None.
    """
    if resumed and 'branch' in resumed and not resumed['chosen']:
        return resumed['branch']
    known = store.lineages(c.out_dir) | (
        {resumed['branch']} if resumed and 'branch' in resumed else set()
    )
    return store.new_lineage(known | (uploader.lineages(place) if place else set()))


def check_upload(c: 'Config', resumed: dict | None, notes: list[str]) -> None:
    """Raise UserError where nothing can be written to upload_to.

    A run that auto_resume continues goes on all the same, and copies when it can: nobody may be
    there to correct it.
    """
    try:
        uploader.check_writable(c.upload_to, c.out_dir)
    except UserError as error:
        if not (resumed and c.auto_resume):
            raise
        notes.append(f'WARNING: {error}; the run goes on, and copies when it can')


def check_data(state: dict, data: dict[str, dict], allowed: bool, notes: list[str]) -> tuple:
    """Return (training split changed, validation split changed) against the checkpoint; both False
    where it tells nothing.

    data: {'train': {'fingerprint': str, 'tokens': int}, 'val': ...} of now. Raises UserError for
    a change that is not `allowed`.
    """
    changed = [
        split
        for split in data
        if split in state.get('data', ()) and state['data'][split] != data[split]
    ]
    if changed and not allowed:
        was, is_now = state['data'][changed[0]], data[changed[0]]
        raise UserError(
            f'{changed[0]}.bin is not the one that this run was trained with ({is_now["tokens"]:,}'
            f' tokens, fingerprint {is_now["fingerprint"][:12]}; it was {was["tokens"]:,} tokens,'
            f' {was["fingerprint"][:12]}): give the --dataset it had, or type'
            ' --allow_data_change=True to go on with other data'
        )
    if 'train' in changed:
        notes.append(
            'the training data is not that of the checkpoint: its stream starts at position 0 (it'
            f' was at {state["position"]})'
        )
    if 'val' in changed:
        notes.append(
            'the validation data is not that of the checkpoint: the best loss so far is forgotten'
        )
    return 'train' in changed, 'val' in changed


def best_loss_so_far(state: dict, windows: str, val_data_changed: bool, notes: list[str]) -> float:
    """Return the best validation loss of a checkpoint, infinity where it was measured under other
    conditions than those to come.

    windows: loader.evaluation_identity() of now; val_data_changed: whether the validation data is
    another, which was noted.
    """
    if state['best_val_loss'] is None or val_data_changed:
        return math.inf
    if state.get('windows') != windows:
        notes.append(
            'the validation loss is measured on other windows than before (eval_iters, batch_size'
            ' or document_mask changed): the best loss so far is forgotten'
        )
        return math.inf
    return state['best_val_loss']


def archive_rejected(c: 'Config', state: dict, world: 'World', notes: list[str]) -> None:
    """Rename the checkpoints that were rejected, and those after the one that resume_from chose:
    what continues must stay the newest.
    """
    if world.is_main:
        for path in state['rejected']:
            if os.path.dirname(path) == store.folder_of(c.out_dir) and os.path.lexists(path):
                store.rename_aside(path, 'rejected')
        if state['certain']:
            notes += [
                f'{path} is now {moved}' for path, moved in archive_newer(c.out_dir, state['step'])
            ]
    collectives.barrier(world)


def archive_newer(out_dir: str, step: int) -> list[tuple]:
    """Rename the checkpoints after `step`, so that it is the newest; returns [(old path, new
    path)].
    """
    newer = [store.path_of(out_dir, s) for s in store.steps(out_dir) if s > step]
    return [(path, store.rename_aside(path, 'superseded')) for path in newer]


def prepare_out_dir(c: 'Config', world: 'World', notes: list[str]) -> None:
    """Before a new run in a folder with checkpoints: set those of a finished run aside; raise
    UserError if the run could go on.
    """

    def look():
        store.clean_partial(c.out_dir)
        found = store.steps(c.out_dir)
        if not found:
            return None
        path = store.path_of(c.out_dir, found[-1])
        if store.corruption_reason(path, 'size') is None:
            state = store.read_state(path)
            if state['step'] >= state.get('config', {}).get('max_iters', float('inf')):
                return state.get('run_name', 'before')
        raise UserError(
            f'{c.out_dir} holds an unfinished run, up to {path}: continue it with'
            ' --init_from=resume (or --auto_resume=True, which starts and continues), start this'
            f' one in another --out_dir, or move {store.folder_of(c.out_dir)} away'
        )

    if name := collectives.broadcast_from_main(look, world):
        moved = collectives.broadcast_from_main(
            lambda: store.rename_all_aside(c.out_dir, name), world
        )
        notes.append(
            f'{c.out_dir} held the finished run {name}: its checkpoints are now in {moved}'
        )


def _largest_file():
    """Return the bytes that a file of this process may have at most."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return math.inf if limit == resource.RLIM_INFINITY else limit
    except ImportError:
        return math.inf


class OutDirLock:
    """The folder of a run, held by its main rank so that no second process writes there."""

    def __init__(self, path: str, world: 'World'):
        self.path, self.world, self.held, self.file = path, world, False, None

    def acquire(self, make: bool = False) -> None:
        """Hold it until this process ends or release() is called; where there is no folder, make it
        or leave it at that.

        Raises UserError where nothing can be written, or if another process holds it. A file
        system without locks is trusted.
        """
        if not self.held:
            self.held = collectives.broadcast_from_main(lambda: self._lock(make), self.world)

    def _lock(self, make):
        if not make and not os.path.isdir(self.path):
            return False
        try:
            os.makedirs(self.path, exist_ok=True)
            self.file = open(os.path.join(self.path, '.lock'), 'a+', opener=no_link)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            # of this process alone: its workers do not inherit it
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self.file.seek(0)
                raise UserError(
                    f'{self.path} is in use by process {self.file.read().strip()}: wait for its'
                    ' end, or give another --out_dir'
                ) from None
        else:
            try:
                self.file.truncate(0)
                self.file.write(f'{os.getpid()} on {os.uname().nodename}\n')
                self.file.flush()
            except OSError as error:
                raise self._unwritable(error) from None
        return True

    def check_room(self, run_name: str, size: int) -> None:
        """Raise UserError where the logs of run_name or a checkpoint of `size` bytes cannot be
        written. To be called on the main rank.
        """
        folder = store.folder_of(self.path)
        probe = os.path.join(folder, '.probe')
        try:
            os.makedirs(folder, exist_ok=True)
            store.replace_file(probe, bytes(4096))
            os.remove(probe)
            for ending in uploader.LOGS:
                name = os.path.join(self.path, f'{run_name}.{ending}')
                check_own(name)
                if os.path.lexists(name):
                    open(name, 'ab').close()
        except OSError as error:
            raise self._unwritable(error) from None
        free, most = shutil.disk_usage(folder).free, _largest_file()
        if most < size:
            raise UserError(
                f'no file may be larger than {most:,} bytes here (ulimit -f), and a checkpoint of'
                f' this run takes {size:,}: type `ulimit -f unlimited`'
            )
        if free < size:
            raise UserError(
                f'{folder} has {free / 1e6:,.1f} MB free, and a checkpoint of this run takes'
                f' {size / 1e6:,.1f} MB: make room, or give an --out_dir on another disk'
            )

    def _unwritable(self, error):
        return UserError(
            f'out_dir={self.path!r} cannot be made or written ({error.strerror}:'
            f' {error.filename or self.path}): make room or move what is in the way, or give'
            ' another --out_dir'
        )

    def release(self) -> None:
        """Let other runs have the folder."""
        if self.file is not None:
            self.file.close()
