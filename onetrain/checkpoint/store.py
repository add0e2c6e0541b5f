"""Checkpoints as files: their format, whether they are whole, which of them stay.

    out_dir/checkpoints/step_00001000/
        __0_0.distcp      tensors by torch.distributed.checkpoint, a file for each rank:
        .metadata         model.<name>, optimizer.<key>.<name>, guard.<name>; where each lies
        state.json        step, position in the data, tokens, best loss, configuration, versions
        manifest.json     size and SHA-256 of every file above, and of itself; written last
        evaluation.json   losses at this step, added when known; carries its own SHA-256

onetrain/checkpoint/async_writer.py writes them: into a temporary folder, synced to disk, read back,
renamed; only then are older ones removed. What looks at checkpoints takes an fsspec file system
`fs`, so that it works on a bucket as on a folder.

A checkpoint may come from anywhere, so nothing in it is trusted. Its metadata are read by
onetrain/checkpoint/dcp_metadata.py, tensors with weights_only, and an entry of any other kind is an
error; every name in it is one of its own files; every field of its JSON files has a known type. One
that was fetched from a URL or another folder carries fetched.json, and read_state() leaves out the
keys of its configuration that reach outside its out_dir.
"""

import contextlib
import datetime
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.tensor import DTensor

from onetrain.checkpoint import dcp_metadata, fault_injection
from onetrain.config import UserError
from onetrain.distributed import collectives
from onetrain.files import (
    add_checksum,
    check_regular,
    is_whole,
    parse_json,
    plain_name,
    replacing,
    sentence,
    verify_checksum,
)

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from onetrain.distributed.processes import World

FORMAT = 2
# beside those that a manifest lists
OWN_FILES = ('manifest.json', 'evaluation.json', 'fetched.json')
LOCAL = LocalFileSystem()
# said of every run with one process
warnings.filterwarnings('ignore', category=UserWarning, message='torch.distributed is disabled')


def folder_of(out_dir: str) -> str:
    """Return the folder of all checkpoints of a run."""
    return os.path.join(out_dir, 'checkpoints')


def path_of(out_dir: str, step: int) -> str:
    """Return the folder of the checkpoint of iteration `step`."""
    return os.path.join(folder_of(out_dir), f'step_{step:08d}')


def steps(out_dir: str, fs: 'AbstractFileSystem' = LOCAL) -> list[int]:
    """Return steps that have a checkpoint folder under out_dir, ascending, whole or not."""
    folder = folder_of(out_dir)
    names = (
        [path.rstrip('/').rsplit('/', 1)[-1] for path in fs.ls(folder, detail=False)]
        if fs.isdir(folder)
        else []
    )
    return sorted(
        int(m[1]) for name in names if (m := re.fullmatch(r'step_(\d{8}|[1-9]\d{8,})', name))
    )


# ---- is it whole?


def corruption_reason(path: str, level: str = 'full', fs: 'AbstractFileSystem' = LOCAL) -> str:
    """None if the checkpoint folder `path` is what its manifest says, else one sentence naming the
    file that is not.

    level: 'full' reads every byte and compares checksums; 'size' compares the sizes of the files
    with tensors and reads the small ones.
    """
    try:
        return _damage(path, level, fs)
    except OSError as error:
        # a server that is away says nothing about the checkpoint
        if not isinstance(fs, LocalFileSystem):
            raise
        return f'{error.filename or path} cannot be read ({error.strerror or error})'


def _damage(path, level, fs):
    if not fs.exists(path):
        return 'there is no such checkpoint'
    try:
        manifest = read_manifest(path, fs)
    except FileNotFoundError:
        return 'manifest.json is missing (the checkpoint was not written to the end)'
    except ValueError as error:
        return f'manifest.json is damaged ({error})'
    step = manifest['step']
    if (name := path.rstrip('/').rsplit('/', 1)[-1]).startswith('step_') and int(
        name.removeprefix('step_')
    ) != step:
        return f'manifest.json is that of step {step}'
    for name, entry in manifest['files'].items():
        file = f'{path}/{name}'
        if not fs.isfile(file):
            return f'{name} is missing'
        if fs.size(file) != entry['size']:
            return f'{name} has {fs.size(file)} bytes, expected {entry["size"]}'
    hashed = manifest['files'] if level == 'full' else ('state.json', '.metadata')
    if reason := wrong_checksum(path, {name: manifest['files'][name] for name in hashed}, fs):
        return reason
    for name, read in (
        ('state.json', read_state),
        ('.metadata', read_metadata),
        ('evaluation.json', read_evaluation),
    ):
        try:
            found = read(path, fs)
        except ValueError as error:
            return f'{name} is damaged ({error})'
        if name == 'state.json' and found.get('step') != step:
            return f'state.json is that of step {found.get("step")}'
    return None


def wrong_checksum(
    path: str, files: dict[str, dict], fs: 'AbstractFileSystem' = LOCAL
) -> str | None:
    """Return a sentence that names the first of `files` ({name: entry of a manifest}) without the
    checksum stated there, or None.
    """
    for name, entry in files.items():
        if sha256(f'{path}/{name}', fs) != entry['sha256']:
            return f'{name} does not have the checksum of the manifest'
    return None


def corruption_reasons(path: str, world: 'World', level: str = 'full') -> str:
    """corruption_reason() of a local checkpoint by all ranks together, with the same answer on
    each: every rank hashes its share of the bytes.
    """

    def small():
        reason = corruption_reason(path, 'size')
        return reason, {} if reason else read_manifest(path)['files']

    reason, files = collectives.broadcast_from_main(small, world)
    if reason or level != 'full':
        return reason
    owners = assign_files(
        {
            name: entry['size']
            for name, entry in files.items()
            if name not in ('state.json', '.metadata')
        },
        world.size,
    )
    try:
        reason = wrong_checksum(
            path, {name: files[name] for name, owner in owners.items() if owner == world.rank}
        )
    except OSError as error:
        reason = f'{error.filename or path} cannot be read ({error.strerror or error})'
    return next(filter(None, collectives.all_gather_objects(reason, world)), None)


def assign_files(sizes: dict[str, int], hands: int) -> dict[str, int]:
    """Return {name: number below `hands`} for {name: size}: the largest first, each to the one with
    the least so far.
    """
    load, owners = [0] * hands, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners


def read_manifest(path: str, fs: 'AbstractFileSystem' = LOCAL) -> dict:
    """Return the dict in a checkpoint's manifest.json: 'step' and 'files', {plain name: {'size',
    'sha256'}}.

    Raises ValueError for a file that is none, or of a later format; OSError if it cannot be read.
    """
    manifest = verify_checksum(_read(fs, f'{path}/manifest.json'))
    _check_fields(
        manifest, {'format': _FORMAT, 'step': _WHOLE, 'files': _DICT, 'config_sha256': _TEXT}
    )
    files = manifest.get('files')
    if 'step' not in manifest or not files or not files.keys() >= {'state.json', '.metadata'}:
        raise ValueError('it lists no step, no state.json or no .metadata')
    for name, entry in files.items():
        if plain_name(name, 'it') in OWN_FILES:
            raise ValueError(f'it lists {name}')
        if (
            not isinstance(entry, dict)
            or not is_whole(entry.get('size'))
            or not isinstance(entry.get('sha256'), str)
        ):
            raise ValueError(f'it has no size and checksum of {name}')
    return manifest


def newest_whole(
    out_dir: str, level: str = 'full', fs: 'AbstractFileSystem' = LOCAL, wanted: int | None = None
) -> tuple:
    """Return (step, rejected): the newest checkpoint that verifies (or `wanted`, if that does), or
    None, and [(path, reason)] of the newer ones.
    """
    candidates = newest_first(out_dir, fs) if wanted is None else [wanted]
    return first_whole(out_dir, candidates, lambda path: corruption_reason(path, level, fs))


def first_whole(out_dir: str, candidates: list[int], why: Callable) -> tuple:
    """Return (the first of the steps `candidates` whose path has why(path) None, or None; [(path,
    reason)] of those before it).
    """
    rejected = []
    for step in candidates:
        path = path_of(out_dir, step)
        reason = why(path)
        if reason is None:
            return step, rejected
        rejected.append((path, reason))
    return None, rejected


def sha256(path: str, fs: 'AbstractFileSystem' = LOCAL) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with fs.open(path, 'rb') as f:
        while block := f.read(2**22):
            digest.update(block)
    return digest.hexdigest()


# what the fields of state.json, manifest.json and evaluation.json may hold: (test, in words)
_WHOLE = (lambda value: is_whole(value, 0, 2**53), 'a whole number from 0 to 2**53')
_NUMBER = (
    lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    'a number',
)
_LOSS = (lambda value: value is None or _NUMBER[0](value), 'a number or null')
_TEXT = (
    lambda value: (
        isinstance(value, str)
        and len(value) < 4096
        and not re.search(r'[\x00-\x1f\x7f-\x9f]', value)
    ),
    'a text of one line',
)
_TEXT_OR_NULL = (lambda value: value is None or _TEXT[0](value), 'a text or null')
_DICT = (lambda value: isinstance(value, dict), 'an object')
_FLAG = (lambda value: isinstance(value, bool), 'true or false')
_LINEAGE = (
    lambda value: isinstance(value, str) and bool(re.fullmatch(r'\d{8}T\d{6}\.\d{6}Z', value)),
    'a time such as 20261125T101500.000000Z',
)
_FORMAT = (
    lambda value: is_whole(value, 1, FORMAT),
    f'1 to {FORMAT}; a later one needs a later version of onetrain',
)
_STATE = {
    'format': _FORMAT,
    'step': _WHOLE,
    'run_name': _TEXT,
    'branch': _LINEAGE,
    'position': _WHOLE,
    'tokens': _WHOLE,
    'tokens_per_step': _WHOLE,
    'threads': _WHOLE,
    'world_size': _WHOLE,
    'config': _DICT,
    'best_val_loss': _LOSS,
    'scaler': _DICT,
    'data': _DICT,
    'windows': _TEXT,
    'tokenizer': _TEXT_OR_NULL,
    'token_ids': _TEXT_OR_NULL,
    'optimizer': _TEXT,
    'time': _TEXT,
    'versions': _DICT,
}
# keys of the configuration that commands read, beside those of the model's shape, which
# model_config.resolve_shape() checks
_CONFIG = {
    'dataset': _TEXT,
    'max_iters': _WHOLE,
    'total_batch_size': _WHOLE,
    'learning_rate': _NUMBER,
    'min_lr': _NUMBER,
    'weight_decay': _NUMBER,
    'beta1': _NUMBER,
    'beta2': _NUMBER,
    'grad_clip': _NUMBER,
    'decay_lr': _FLAG,
    'document_mask': _FLAG,
    'dtype': _TEXT,
    'attention_backend': _TEXT,
    'optimizer': _TEXT,
}


def _check_fields(value, expected):
    """Raise ValueError unless each field of the dict `value` that `expected` knows holds what it
    says.
    """
    for name, (test, words) in expected.items():
        if name in value and not test(value[name]):
            raise ValueError(f'{name} is {json.dumps(value[name])[:60]}, expected {words}')


# ---- which is the newest?

_LINEAGE_TIME = '%Y%m%dT%H%M%S.%fZ'


def new_lineage(known: Iterable[str] = ()) -> str:
    """Return the name of a stretch of training that begins anew or from a checkpoint that was not
    the newest.

    It sorts after each of `known`, the lineages there are, whatever the clock of this machine says.
    Raises UserError where none can.
    """
    now = datetime.datetime.now(datetime.timezone.utc).strftime(_LINEAGE_TIME)
    last = max(known, default='')
    if last < now:
        return now
    try:
        return (
            datetime.datetime.strptime(last, _LINEAGE_TIME) + datetime.timedelta(microseconds=1)
        ).strftime(_LINEAGE_TIME)
    except (ValueError, OverflowError):
        raise UserError(
            f'a checkpoint has the lineage {last!r}, after which no other can come: its state.json'
            ' is damaged; start from its weights with export.py and --init_from=FOLDER'
        ) from None


def lineages(out_dir: str, fs: 'AbstractFileSystem' = LOCAL) -> set[str]:
    """Return the lineages of all checkpoints under out_dir, those that were set aside among
    them.
    """
    folder = folder_of(out_dir)
    states = _each(
        fs.ls(folder, detail=False) if fs.isdir(folder) else [], 'state.json', parse_state, fs
    )
    return {state.get('branch', '') for state in states.values()}


def lineage_order(path: str, fs: 'AbstractFileSystem' = LOCAL) -> tuple:
    """Return (lineage, step) of a checkpoint, which is larger for the one to continue: a run that
    went back is newer than what it left.

    Raises ValueError or OSError if its state.json cannot be read.
    """
    state = read_state(path, fs)
    return state.get('branch', ''), state.get('step', -1)


def newest_first(out_dir: str, fs: 'AbstractFileSystem' = LOCAL) -> list[int]:
    """Return the steps under out_dir by lineage_order(); one whose state.json cannot be read counts
    to the newest branch, so that it is told of.
    """
    paths = {path_of(out_dir, step): step for step in steps(out_dir, fs)}
    branches = {
        paths[path]: state.get('branch', '')
        for path, state in _each(paths, 'state.json', parse_state, fs).items()
    }
    newest = max(branches.values(), default='')
    return sorted(paths.values(), key=lambda step: (branches.get(step, newest), step), reverse=True)


# ---- what it holds


def read_state(path: str, fs: 'AbstractFileSystem' = LOCAL) -> dict:
    """Return the dict in a checkpoint's state.json, each field of the type that it must have.

    Of a fetched checkpoint, 'config' is without the keys that reach outside of out_dir; these are
    in 'not_taken_over'. Raises ValueError for a field of another type, or a later format; OSError
    if the file cannot be read.
    """
    state = parse_state(_read(fs, f'{path}/state.json'))
    config, state['not_taken_over'] = state.get('config', {}), {}
    if fs is LOCAL and os.path.lexists(f'{path}/fetched.json'):
        state['not_taken_over'] = {
            key: value for key, value in config.items() if is_external_key(key, value)
        }
        state['config'] = {
            key: value for key, value in config.items() if key not in state['not_taken_over']
        }
    return state


def parse_state(data: bytes) -> dict:
    """Return the dict in the bytes of a state.json, all of it. Raises ValueError as read_state()
    does.
    """
    state = parse_json(data)
    if not isinstance(state, dict):
        raise ValueError('it holds no object')
    _check_fields(state, _STATE)
    if 'run_name' in state:
        plain_name(state['run_name'], 'it')
    for split, what in state.get('data', {}).items():
        if (
            not isinstance(what, dict)
            or not isinstance(what.get('fingerprint'), str)
            or not is_whole(what.get('tokens'))
        ):
            raise ValueError(f'data.{split} has no fingerprint and number of tokens')
    if odd := [
        key for key, value in state.get('versions', {}).items() if not isinstance(value, str)
    ]:
        raise ValueError(f'versions.{odd[0]} is no text')
    config = state.get('config', {})
    if config and (
        missing := [
            key
            for key in ('arch_preset', 'n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')
            if key not in config
        ]
    ):
        raise ValueError(f'config has no {missing[0]}')
    _check_fields(config, _CONFIG)
    for key, value in config.items():
        if (
            not (value is None or isinstance(value, (bool, int, float, str)))
            or isinstance(value, str)
            and '\0' in value
        ):
            raise ValueError(
                f'config.{key} is {json.dumps(value)[:60]}, expected a number, a text, true, false'
                ' or null'
            )
    return state


def is_external_key(key: str, value: Any) -> bool:
    """Return whether a run with this key of its configuration reads, writes or sends something
    outside of its out_dir.
    """
    if key == 'sample_start':
        return str(value).startswith('FILE:')
    if key == 'dataset':  # a name is a folder of data/, a path may be anything
        return bool(re.search(r'[/\\]|\.\.', str(value)))
    return value not in (None, False) and key in (
        'upload_to',
        'upload_keep_local',
        'data_url',
        'eval_tasks',
        'notify',
        'wandb_log',
        'wandb_project',
        'wandb_run_name',
    )


def mark_fetched(path: str, source: str) -> None:
    """Note in the checkpoint folder `path` that it came from `source`, a URL or a folder without
    secrets: its author may be anybody.
    """
    replace_file(os.path.join(path, 'fetched.json'), json.dumps({'source': source}).encode())


def read_metadata(path: str, fs: 'AbstractFileSystem' = LOCAL):
    """Return the Metadata of a checkpoint: the shapes of its tensors, and in which of its files
    they lie.

    Raises ValueError for anything that does not describe tensors in its own files.
    """
    return dcp_metadata.parse(_read(fs, f'{path}/.metadata'), read_manifest(path, fs)['files'])


def tensor_bytes(path: str, fs: 'AbstractFileSystem' = LOCAL) -> int:
    """Return the bytes of all files that the manifest of checkpoint `path` lists."""
    return sum(entry['size'] for entry in read_manifest(path, fs)['files'].values())


def load(path: str, tensors: dict[str, torch.Tensor], world: 'World | None' = None) -> None:
    """Read the tensors named in `tensors` ({name: tensor}) from the checkpoint `path` into them, in
    place.

    world: the processes.World whose ranks all call this, or None for one process. Of a DTensor each
    rank reads its part, however it was written; a tensor that all have in full is read by the main
    rank and sent to the others. Raises UserError for metadata that describe anything but tensors
    in the files of the checkpoint, for a name or shape that it does not have, and for tensors that
    are not what the metadata say.
    """
    if world is None or world.size == 1:
        _load(path, tensors)
        return
    split = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    whole = {name: tensor for name, tensor in tensors.items() if name not in split}
    collectives.broadcast_from_main(lambda: _load(path, whole), world)
    collectives.broadcast_tensors(whole.values(), world)
    if split:
        _load(path, split, world)


def read_tensors(path: str, kind: str = '') -> dict[str, torch.Tensor]:
    """Return {name: tensor} of all that the checkpoint `path` holds whose name begins with `kind`,
    such as 'model.'. Raises UserError.
    """
    try:
        stored = read_metadata(path).state_dict_metadata
    except ValueError as error:
        raise UserError(
            f'{path}/.metadata is damaged ({error}): nothing was read from it; take another'
            ' checkpoint'
        ) from None
    tensors = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(kind)
    }
    load(path, tensors)
    return tensors


def _load(path, tensors, world=None):
    try:
        metadata = read_metadata(path)
    except ValueError as error:
        raise UserError(
            f'{path}/.metadata is damaged ({error}): nothing was read from it; take another'
            ' checkpoint'
        ) from None
    for name, tensor in tensors.items():
        stored = metadata.state_dict_metadata.get(name)
        if stored is None or tuple(stored.size) != tuple(tensor.shape):
            raise UserError(
                f'{path} has {f"{name} of shape {tuple(stored.size)}" if stored else f"no {name}"},'
                f' and the model of its settings has {name} of shape {tuple(tensor.shape)}: it is'
                ' not the checkpoint of such a run; take another'
            )
    try:
        dcp.load(
            tensors,
            storage_reader=_Reader(path, metadata),
            planner=_TensorPlanner(),
            process_group=world and world.slow_group,
            no_dist=world is None,
        )
    except dcp.api.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise UserError(
            f'{path} cannot be read ({type(reason).__name__}: {sentence(reason)}): take another'
            ' checkpoint'
        ) from None


def record_evaluation(path: str, losses: dict) -> None:
    """Note `losses` ({'train': float, 'val': float, 'data': loader.evaluation_identity() of the
    windows}) in checkpoint `path`, if there is one.
    """
    if os.path.isdir(path):
        replace_file(os.path.join(path, 'evaluation.json'), add_checksum(losses))


def read_evaluation(path: str, fs: 'AbstractFileSystem' = LOCAL) -> dict | None:
    """Return the losses noted in checkpoint `path`, or None. Raises ValueError for a damaged
    file.
    """
    file = f'{path}/evaluation.json'
    return parse_evaluation(_read(fs, file)) if fs.isfile(file) else None


def parse_evaluation(data: bytes) -> dict:
    """Return the losses in the bytes of an evaluation.json. Raises ValueError for a damaged one."""
    losses = verify_checksum(data)
    _check_fields(
        losses, {'train': _LOSS, 'val': _LOSS, 'data': _TEXT, 'tasks': _DICT, 'sources': _DICT}
    )
    if 'val' not in losses:
        raise ValueError('it has no val')
    return losses


def best_step(out_dir: str, fs: 'AbstractFileSystem' = LOCAL) -> int | None:
    """Step of the checkpoint with the lowest recorded validation loss on the data evaluated last,
    the newest of equals; None where none is recorded.
    """
    paths = {path_of(out_dir, step): step for step in steps(out_dir, fs)}
    found = {
        paths[path]: evaluation
        for path, evaluation in _each(paths, 'evaluation.json', parse_evaluation, fs).items()
    }
    found = {
        step: e['val']
        for step, e in found.items()
        if e.get('data') == found[max(found)].get('data')
        and e['val'] is not None
        and math.isfinite(e['val'])
    }
    return min(found, key=lambda step: (found[step], -step)) if found else None


# ---- which stay


def remove_old(
    out_dir: str, newest: int, *, keep: int, keep_every: int = 0, also: set | tuple = ()
) -> list:
    """Remove the checkpoints before `newest` that no rule keeps; returns one sentence for each that
    could not be removed.

    Kept: the `keep` newest, each whose step is a multiple of keep_every (0: none), the one with the
    best validation loss, steps in `also`.
    """
    before = [step for step in steps(out_dir) if step < newest]
    kept = {best_step(out_dir), *also, *before[max(0, len(before) - (keep - 1)) :]} | {
        step for step in before if keep_every and step % keep_every == 0
    }
    problems = []
    for step in sorted(set(before) - kept):
        try:
            remove(path_of(out_dir, step), step)
        except OSError as error:
            problems.append(
                f'{path_of(out_dir, step)} could not be removed: {error.strerror or error}'
            )
    return problems


def remove(path: str, step: int) -> None:
    """Remove a checkpoint so that one killed half-way does not look like a broken checkpoint.
    Raises OSError.

    Of a link to one only the link goes, and a folder without a manifest, which is none, stays.
    """
    if os.path.islink(path):
        os.remove(path)
        return
    if not os.path.isfile(os.path.join(path, 'manifest.json')):
        raise OSError(0, 'it has no manifest.json, so it is not known to be a checkpoint')
    going = os.path.join(os.path.dirname(path), f'.removing_{os.path.basename(path)}')
    shutil.rmtree(going, ignore_errors=True)
    os.rename(path, going)
    for number, name in enumerate(sorted(os.listdir(going))):
        os.remove(os.path.join(going, name))
        if number == 0:
            fault_injection.maybe_crash('retention', step)
    os.rmdir(going)


def clean_partial(out_dir: str) -> None:
    """Remove what an interrupted save or removal left behind, and put back what it was about to
    replace.
    """
    folder = folder_of(out_dir)
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        if name.startswith('.replaced_') and not os.path.exists(
            final := os.path.join(folder, name.removeprefix('.replaced_'))
        ):
            os.rename(path, final)
        elif name.startswith(('.replaced_', '.writing_', '.removing_', '.fetching_')):
            shutil.rmtree(path, ignore_errors=True)


def rename_aside(path: str, prefix: str) -> str:
    """Rename a checkpoint, so that later ones of the same step do not meet it; returns the new
    path.
    """
    folder, name = os.path.split(path)
    target = free_name(os.path.join(folder, f'{prefix}_{name}'))
    os.rename(path, target)
    return target


def rename_all_aside(out_dir: str, name: str) -> str:
    """Rename out_dir/checkpoints to out_dir/checkpoints_<name> and return the new path."""
    target = free_name(os.path.join(out_dir, f'checkpoints_{name}'))
    os.rename(folder_of(out_dir), target)
    return target


def free_name(path: str) -> str:
    """Return `path`, or path_2, path_3, ... where it is taken."""
    number, free = 1, path
    while os.path.exists(free):
        number += 1
        free = f'{path}_{number}'
    return free


# ---- files


def replace_file(path: str, data: bytes) -> None:
    """Write bytes to `path` so that a reader sees the old file or the new one, and the new one is
    on disk.
    """
    with replacing(path, sync=True) as f:
        f.write(data)


def sync_folder(path: str) -> None:
    """Make the names in a folder outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _each(paths, name, parse, fs):
    """Return {path: parse(bytes of the file `name` in it)} of the checkpoints `paths` where that
    can be read; corruption_reason() tells of the others.

    A server is asked for all of them together: a run may keep a thousand checkpoints.
    """
    files = {f'{path}/{name}': path for path in paths}
    if isinstance(fs, LocalFileSystem):
        contents = {}
        for file in files:
            with contextlib.suppress(ValueError, OSError):
                contents[file] = _read(fs, file)
    else:
        # cat() would take [ for a pattern
        contents = dict(
            zip(files, fs.cat_ranges([*files], None, None, on_error='return') if files else ())
        )
        for error in filter(lambda content: isinstance(content, Exception), contents.values()):
            if not isinstance(error, (OSError, ValueError)):
                # such as of a server that is away: that says nothing about a checkpoint
                raise error
        contents = {
            file: content for file, content in contents.items() if isinstance(content, bytes)
        }
    found = {}
    for file, data in contents.items():
        with contextlib.suppress(ValueError, KeyError):
            found[files[file]] = parse(data)
    return found


def _read(fs, path):
    if isinstance(fs, LocalFileSystem):
        check_regular(path)
    with fs.open(path, 'rb') as f:
        return f.read()


class _Reader(dcp.FileSystemReader):
    """Reads the tensors of a checkpoint whose metadata were checked."""

    def __init__(self, path, metadata):
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args, **kwargs):
        self.metadata.storage_meta = self.metadata.storage_meta or StorageMeta()
        self.metadata.storage_meta.load_id = self.load_id
        return self.metadata


class _TensorPlanner(dcp.DefaultLoadPlanner):
    """Refuses what torch would unpickle: an entry of bytes, which may be any object."""

    def load_bytes(self, read_item, value):
        raise UserError(
            f'the checkpoint holds {read_item.dest_index.fqn} as bytes, not as a tensor: nothing'
            ' was read from it; take another checkpoint'
        )
