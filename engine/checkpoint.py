"""Checkpoints: whole or absent, verified before use.

    out_dir/checkpoints/step_00001000/
        __0_0.distcp, .metadata   tensors, by torch.distributed.checkpoint: model.<name>, optimizer.<key>.<name>
        state.json                step, position in the data, tokens, best loss, configuration, versions, world size
        manifest.json             size and SHA-256 of every file above; written last
        evaluation.json           losses at this step, added when they are known; not needed to resume

A checkpoint is written into a temporary folder, synced to disk, and renamed. Only then are older ones removed. No pickle
from a checkpoint is executed: tensors are read with weights_only, the metadata by an unpickler that admits torch's own
plain classes.
"""
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings

import torch
import torch.distributed.checkpoint as dcp

from engine import parallel
from engine.configurator import ConfigError

FORMAT = 1


def folder_of(out_dir):
    return os.path.join(out_dir, 'checkpoints')


def steps(out_dir):
    """Steps that have a checkpoint folder under out_dir, ascending, verified or not."""
    folder = folder_of(out_dir)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r'step_(\d{8,})', name)))


def path_of(out_dir, step):
    return os.path.join(folder_of(out_dir), f'step_{step:08d}')


def save(out_dir, step, tensors, state, world, keep=2, keep_all=False):
    """Write checkpoint `step` of `tensors` ({name: tensor}, in full on every rank or sharded) and `state` (JSON builtins).

    Called by all ranks. Afterwards the `keep` newest checkpoints and the one with the best validation loss remain.
    Returns the path. An OSError (disk full, no permission) leaves what was there before untouched.
    """
    final = path_of(out_dir, step)
    temporary = os.path.join(folder_of(out_dir), f'.writing_step_{step:08d}')
    if world.main:
        tidy(out_dir)
        os.makedirs(temporary)
    parallel.barrier(world)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', category=UserWarning, module='torch.distributed')  # "assuming a single process"
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary), no_dist=world.size == 1)
    if world.main:
        write_json(os.path.join(temporary, 'state.json'), {'format': FORMAT, 'step': step, **state})
        files = {name: {'size': os.path.getsize(p), 'sha256': sha256(p)}
                 for name in sorted(os.listdir(temporary)) for p in [os.path.join(temporary, name)]}
        config_hash = hashlib.sha256(json.dumps(state.get('config'), sort_keys=True).encode()).hexdigest()
        write_json(os.path.join(temporary, 'manifest.json'), {'format': FORMAT, 'step': step, 'config_sha256': config_hash, 'files': files})
        sync_folder(temporary)
        replaced = os.path.join(folder_of(out_dir), f'.replaced_step_{step:08d}')
        if os.path.exists(final):
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
        os.rename(temporary, final)
        sync_folder(folder_of(out_dir))
        shutil.rmtree(replaced, ignore_errors=True)
        if not keep_all:
            remove_old(out_dir, step, keep)
    parallel.barrier(world)
    return final


def remove_old(out_dir, newest, keep):
    """Delete all checkpoints before `newest`, which was just written, but `keep` - 1 and the one with the best validation loss."""
    before = [step for step in steps(out_dir) if step < newest]
    for step in set(before[:len(before) - (keep - 1)]) - {best_step(out_dir)}:
        shutil.rmtree(path_of(out_dir, step), ignore_errors=True)


def tidy(out_dir):
    """Remove what an interrupted save left behind, and put back what it was about to replace."""
    folder = folder_of(out_dir)
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        if name.startswith('.replaced_') and not os.path.exists(final := os.path.join(folder, name.removeprefix('.replaced_'))):
            os.rename(path, final)
        elif name.startswith(('.replaced_', '.writing_')):
            shutil.rmtree(path, ignore_errors=True)


def set_aside_rejected(paths):
    """Rename checkpoints that do not verify to rejected_step_..., so that later ones of the same steps do not meet them."""
    for path in paths:
        folder, name = os.path.split(path)
        os.rename(path, free_name(os.path.join(folder, f'rejected_{name}')))


def record_evaluation(out_dir, step, losses):
    """Note `losses` ({'train': float, 'val': float}) beside checkpoint `step`, if there is one."""
    if os.path.isdir(path_of(out_dir, step)):
        write_json(os.path.join(path_of(out_dir, step), 'evaluation.json'), losses)


def read_evaluation(out_dir, step):
    """The losses noted beside checkpoint `step`, or None."""
    path = os.path.join(path_of(out_dir, step), 'evaluation.json')
    if not os.path.exists(path):
        return None
    with open(path) as f:
        return json.load(f)


def best_step(out_dir):
    """Step of the checkpoint with the lowest recorded validation loss, the newest of equals; None where none is recorded."""
    losses = {step: evaluation['val'] for step in steps(out_dir) if (evaluation := read_evaluation(out_dir, step))}
    return min(losses, key=lambda step: (losses[step], -step)) if losses else None


def why_broken(path):
    """None if the checkpoint folder `path` is what its manifest says, else one sentence naming the file that is not."""
    try:
        with open(os.path.join(path, 'manifest.json')) as f:
            files = json.load(f)['files']
        expected = {name: (entry['size'], entry['sha256']) for name, entry in files.items()}
    except FileNotFoundError:
        return 'it has no manifest.json (it was not written to the end)'
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f'its manifest.json is damaged ({error})'
    for name, (size, checksum) in expected.items():
        file = os.path.join(path, name)
        if not os.path.isfile(file):
            return f'{name} is missing'
        if os.path.getsize(file) != size:
            return f'{name} has {os.path.getsize(file)} bytes, expected {size}'
        if sha256(file) != checksum:
            return f'{name} does not have the checksum of the manifest'
    if 'state.json' not in expected or '.metadata' not in expected:
        return 'its manifest.json lists no state.json or no .metadata'
    return None


def newest_whole(out_dir):
    """(step, rejected): the newest checkpoint that verifies, or None, and [(path, reason)] of newer ones that do not."""
    rejected = []
    for step in reversed(steps(out_dir)):
        reason = why_broken(path_of(out_dir, step))
        if reason is None:
            return step, rejected
        rejected.append((path_of(out_dir, step), reason))
    return None, rejected


def read_state(path):
    """The dict in a checkpoint's state.json."""
    with open(os.path.join(path, 'state.json')) as f:
        return json.load(f)


def load(path, tensors, world_size=1):
    """Read the tensors named in `tensors` ({name: tensor}) from the checkpoint `path` into them, in place.

    Raises torch.distributed.checkpoint.CheckpointException for a name or shape that the checkpoint does not have.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', category=UserWarning, module='torch.distributed')
        dcp.load(tensors, storage_reader=_Reader(path), no_dist=world_size == 1)


def read_nanogpt(path):
    """nanoGPT's ckpt.pt as {'model': state dict, 'optimizer': {'exp_avg.<name>': tensor, ...}, 'config', 'step', 'best_val_loss'}.

    Read with weights_only, so no code in it runs. Raises ConfigError for a file that is none.
    """
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
        sizes, trained = content['model_args'], content['config']
        model = {name.removeprefix('_orig_mod.'): tensor for name, tensor in content['model'].items()}
        step, best = content['iter_num'], float(content['best_val_loss'])
        states = content['optimizer']['state']
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f'{path} is not a checkpoint of nanoGPT: {type(error).__name__}: {str(error)[:200]}') from None
    model = {name: tensor for name, tensor in model.items() if not re.search(r'\.attn\.(bias|masked_bias)$', name)}
    # nanoGPT numbers its parameters: first those with two dimensions or more, then the rest, each in the model's order
    names = [name for name in model if name != 'lm_head.weight']
    numbered = [n for n in names if model[n].dim() >= 2] + [n for n in names if model[n].dim() < 2]
    optimizer = {f'{key}.{name}': torch.as_tensor(states[i][key]) for i, name in enumerate(numbered) for key in ('step', 'exp_avg', 'exp_avg_sq')}
    shape = {key: sizes[key] for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')}
    # nanoGPT computes the exact GELU, unlike GPT-2
    trained = {key: value for key, value in trained.items() if key not in ('dtype', 'compile')}  # of the machine it ran on
    if trained.keys() >= {'gradient_accumulation_steps', 'batch_size'}:  # nanoGPT counts the micro-steps of all its processes
        trained['total_batch_size'] = trained['gradient_accumulation_steps'] * trained['batch_size'] * shape['block_size']
    config = {**trained, **shape, 'bias': sizes.get('bias', True), 'arch_preset': 'gpt2', 'activation': 'gelu'}
    return {'model': model, 'optimizer': optimizer, 'config': config, 'step': step, 'best_val_loss': best}


def set_aside(out_dir, name):
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


def sha256(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def write_json(path, value):
    """Write `value` to `path` so that a reader sees the old file or the new one, and the new one is on disk."""
    temporary = f'{path}.tmp'
    with open(temporary, 'w') as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def sync_folder(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
