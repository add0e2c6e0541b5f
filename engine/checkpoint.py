"""Checkpoints as files: their format, whether they are whole, which of them stay.

    out_dir/checkpoints/step_00001000/
        __0_0.distcp, .metadata   tensors, by torch.distributed.checkpoint: model.<name>, optimizer.<key>.<name>, guard.<name>
        state.json                step, position in the data, tokens, best loss, configuration, versions, world size
        manifest.json             size and SHA-256 of every file above, and of itself; written last
        evaluation.json           losses at this step, added when they are known; carries its own SHA-256

engine/saver.py writes them: into a temporary folder, synced to disk, read back, renamed; only then are older ones removed.
What looks at checkpoints takes an fsspec file system `fs`, so that it works on a bucket as on a folder. No pickle from a
checkpoint is executed: tensors are read with weights_only, the metadata by an unpickler that admits torch's own plain classes.
"""
import contextlib
import datetime
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import warnings

import torch
import torch.distributed.checkpoint as dcp
from fsspec.implementations.local import LocalFileSystem

from engine import faults

FORMAT = 2
LOCAL = LocalFileSystem()
warnings.filterwarnings('ignore', category=UserWarning, message='torch.distributed is disabled')  # said of every run with one process


def folder_of(out_dir):
    return os.path.join(out_dir, 'checkpoints')


def path_of(out_dir, step):
    return os.path.join(folder_of(out_dir), f'step_{step:08d}')


def steps(out_dir, fs=LOCAL):
    """Steps that have a checkpoint folder under out_dir, ascending, whole or not."""
    folder = folder_of(out_dir)
    names = [path.rstrip('/').rsplit('/', 1)[-1] for path in fs.ls(folder, detail=False)] if fs.isdir(folder) else []
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r'step_(\d{8}|[1-9]\d{8,})', name)))


# ---- is it whole?

def why_broken(path, level='full', fs=LOCAL):
    """None if the checkpoint folder `path` is what its manifest says, else one sentence naming the file that is not.

    level: 'full' reads every byte and compares checksums; 'size' compares the sizes of the files with tensors and reads the small ones.
    """
    try:
        return _damage(path, level, fs)
    except OSError as error:
        if fs is not LOCAL:  # a server that is away says nothing about the checkpoint
            raise
        return f'{error.filename or path} cannot be read ({error.strerror or error})'


def _damage(path, level, fs):
    if not fs.exists(path):
        return 'there is no such checkpoint'
    try:
        manifest = unseal(_read(fs, f'{path}/manifest.json'))
        expected = {name: (entry['size'], entry['sha256']) for name, entry in manifest['files'].items()}
        step = manifest['step']
    except FileNotFoundError:
        return 'manifest.json is missing (the checkpoint was not written to the end)'
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f'manifest.json is damaged ({error})'
    if {'state.json', '.metadata'} - expected.keys():
        return 'manifest.json lists no state.json or no .metadata'
    if (name := path.rstrip('/').rsplit('/', 1)[-1]).startswith('step_') and int(name.removeprefix('step_')) != step:
        return f'manifest.json is that of step {step}'
    for name, (size, checksum) in expected.items():
        file = f'{path}/{name}'
        if not fs.isfile(file):
            return f'{name} is missing'
        if fs.size(file) != size:
            return f'{name} has {fs.size(file)} bytes, expected {size}'
        if (level == 'full' or name == 'state.json') and sha256(file, fs) != checksum:
            return f'{name} does not have the checksum of the manifest'
    try:
        read_evaluation(path, fs)
    except ValueError as error:
        return f'evaluation.json is damaged ({error})'
    return None


def newest_whole(out_dir, level='full', fs=LOCAL, wanted=None):
    """(step, rejected): the newest checkpoint that verifies (or `wanted`, if that does), or None, and [(path, reason)] of the newer ones."""
    rejected = []
    for step in newest_first(out_dir, fs) if wanted is None else [wanted]:
        reason = why_broken(path_of(out_dir, step), level, fs)
        if reason is None:
            return step, rejected
        rejected.append((path_of(out_dir, step), reason))
    return None, rejected


def sha256(path, fs=LOCAL):
    digest = hashlib.sha256()
    with fs.open(path, 'rb') as f:
        while block := f.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def seal(value):
    """A dict as the bytes of a JSON file that carries the SHA-256 of its other content."""
    digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    return json.dumps({**value, 'sha256': digest}, indent=1).encode() + b'\n'


def unseal(data):
    """The dict in bytes made by seal(). Raises ValueError if a single byte is another."""
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError('it holds no object')
    value.pop('sha256', None)
    if seal(value) != data:
        raise ValueError('it does not have the checksum that it carries')
    return value


# ---- which is the newest?

def new_branch():
    """Name of a stretch of training that begins anew or from a checkpoint that was not the newest; later ones sort after earlier ones."""
    return datetime.datetime.now(datetime.timezone.utc).strftime('%Y%m%dT%H%M%S.%fZ')


def age(path, fs=LOCAL):
    """(branch, step) of a checkpoint, which is larger for the one to continue: a run that went back is newer than what it left.

    Raises ValueError, KeyError, TypeError or OSError if its state.json cannot be read.
    """
    state = read_state(path, fs)
    return state['branch'], state['step']


def newest_first(out_dir, fs=LOCAL):
    """The steps under out_dir by age(); one whose state.json cannot be read counts to the newest branch, so that it is told of."""
    branches = {}
    for step in steps(out_dir, fs):
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
            branches[step] = age(path_of(out_dir, step), fs)[0]
    newest = max(branches.values(), default='')
    return sorted(steps(out_dir, fs), key=lambda step: (branches.get(step, newest), step), reverse=True)


# ---- what it holds

def read_state(path, fs=LOCAL):
    """The dict in a checkpoint's state.json."""
    return json.loads(_read(fs, f'{path}/state.json'))


def tensor_bytes(path, fs=LOCAL):
    """Bytes of all files that the manifest of checkpoint `path` lists."""
    return sum(entry['size'] for entry in unseal(_read(fs, f'{path}/manifest.json'))['files'].values())


def load(path, tensors, world_size=1, group=None):
    """Read the tensors named in `tensors` ({name: tensor}) from the checkpoint `path` into them, in place; of a DTensor its part, however it was written.

    Raises torch.distributed.checkpoint.CheckpointException for a name or shape that the checkpoint does not have, pickle.UnpicklingError for metadata that name more than plain classes.
    """
    reader = _Reader(path)
    reader.read_metadata()  # torch 2.11 passes over what is wrong with them
    dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=world_size == 1)


def record_evaluation(path, losses):
    """Note `losses` ({'train': float, 'val': float, 'data': fingerprint of the validation split}) in checkpoint `path`, if there is one."""
    if os.path.isdir(path):
        replace_file(os.path.join(path, 'evaluation.json'), seal(losses))


def read_evaluation(path, fs=LOCAL):
    """The losses noted in checkpoint `path`, or None. Raises ValueError for a damaged file."""
    file = f'{path}/evaluation.json'
    return unseal(_read(fs, file)) if fs.isfile(file) else None


def best_step(out_dir, fs=LOCAL):
    """Step of the checkpoint with the lowest recorded validation loss on the data evaluated last, the newest of equals; None where none is recorded."""
    found = {}
    for step in steps(out_dir, fs):
        with contextlib.suppress(ValueError, OSError):  # why_broken() tells of it
            if evaluation := read_evaluation(path_of(out_dir, step), fs):
                found[step] = evaluation
    found = {step: e['val'] for step, e in found.items() if e.get('data') == found[max(found)].get('data') and e['val'] is not None and math.isfinite(e['val'])}
    return min(found, key=lambda step: (found[step], -step)) if found else None


# ---- which stay

def retain(out_dir, newest, *, keep, keep_every=0, also=()):
    """Remove the checkpoints before `newest` that no rule keeps; returns one sentence for each that could not be removed.

    Kept: the `keep` newest, each whose step is a multiple of keep_every (0: none), the one with the best validation loss, steps in `also`.
    """
    before = [step for step in steps(out_dir) if step < newest]
    kept = {best_step(out_dir), *also, *before[max(0, len(before) - (keep - 1)):]} | {step for step in before if keep_every and step % keep_every == 0}
    problems = []
    for step in sorted(set(before) - kept):
        try:
            remove(path_of(out_dir, step), step)
        except OSError as error:
            problems.append(f'{path_of(out_dir, step)} could not be removed: {error.strerror or error}')
    return problems


def remove(path, step):
    """Remove a checkpoint so that one killed half-way does not look like a broken checkpoint. Raises OSError."""
    going = os.path.join(os.path.dirname(path), f'.removing_{os.path.basename(path)}')
    shutil.rmtree(going, ignore_errors=True)
    os.rename(path, going)
    for number, name in enumerate(sorted(os.listdir(going))):
        os.remove(os.path.join(going, name))
        if number == 0:
            faults.reach('retention', step)
    os.rmdir(going)


def tidy(out_dir):
    """Remove what an interrupted save or removal left behind, and put back what it was about to replace."""
    folder = folder_of(out_dir)
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        if name.startswith('.replaced_') and not os.path.exists(final := os.path.join(folder, name.removeprefix('.replaced_'))):
            os.rename(path, final)
        elif name.startswith(('.replaced_', '.writing_', '.removing_', '.fetching_')):
            shutil.rmtree(path, ignore_errors=True)


def rename_aside(path, prefix):
    """Rename a checkpoint, so that later ones of the same step do not meet it; returns the new path."""
    folder, name = os.path.split(path)
    target = free_name(os.path.join(folder, f'{prefix}_{name}'))
    os.rename(path, target)
    return target


def set_aside_all(out_dir, name):
    """Rename out_dir/checkpoints to out_dir/checkpoints_<name> and return the new path."""
    target = free_name(os.path.join(out_dir, f'checkpoints_{name}'))
    os.rename(folder_of(out_dir), target)
    return target


def free_name(path):
    """`path`, or path_2, path_3, ... where it is taken."""
    number, free = 1, path
    while os.path.exists(free):
        number += 1
        free = f'{path}_{number}'
    return free


# ---- files

def replace_file(path, data):
    """Write bytes to `path` so that a reader sees the old file or the new one, and the new one is on disk."""
    with open(f'{path}.tmp', 'wb') as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f'{path}.tmp', path)


def sync_folder(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(fs, path):
    with fs.open(path, 'rb') as f:
        return f.read()


class _MetadataUnpickler(pickle.Unpickler):
    """Admits the plain classes that torch.distributed.checkpoint writes into .metadata."""
    allowed = {
        ('torch.distributed.checkpoint.metadata', name) for name in
        ('Metadata', 'MetadataIndex', 'TensorStorageMetadata', 'BytesStorageMetadata', 'ChunkStorageMetadata', 'TensorProperties',
         'StorageMeta', '_MEM_FORMAT_ENCODING')
    } | {
        ('torch.distributed.checkpoint.filesystem', '_StorageInfo'), ('torch', 'Size'), ('torch.serialization', '_get_layout'),
        ('collections', 'OrderedDict'), ('pathlib', 'PosixPath'),
    } | {('torch', str(d).removeprefix('torch.')) for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64,
                                                          torch.int32, torch.uint8, torch.bool)}

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f'checkpoint metadata asks for {module}.{name}, which is not admitted')
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args, **kwargs):
        with open(os.path.join(self.path, '.metadata'), 'rb') as f:
            metadata = _MetadataUnpickler(f).load()
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
