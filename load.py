"""Load a model and its tokenizer, from a run or from Hugging Face."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

import torch

from model import Model
from onetrain import huggingface
from onetrain.checkpoint import store
from onetrain.command_line import ROOT
from onetrain.config import UserError, nearest_path
from onetrain.data.dataset import folder_of, parse_mixture
from onetrain.data.token_file import read_meta
from onetrain.distributed import processes
from onetrain.model_config import resolve_shape
from onetrain.ops import experts, kernels, rope
from onetrain.ops.attention import choose_backend
from onetrain.tokenizers.base import ids_digest, load_tokenizer, tokenizer_of
from onetrain.tokenizers.matching import same_digest, tokenizer_identity
from onetrain.training import memory

if TYPE_CHECKING:
    from onetrain.command_line import ArgumentParser
    from onetrain.model_config import ModelConfig


def find_checkpoint(out_dir: str, step: int | None) -> tuple:
    """Return (path, state) of a run's checkpoint; step None: the best, else the newest whole one.
    Raises UserError.
    """
    if step is None:
        step = store.best_step(out_dir)
        if step is None or store.corruption_reason(store.path_of(out_dir, step)):
            step, _ = store.newest_whole(out_dir)
    path = store.path_of(out_dir, step or 0)
    if step is None or step not in store.steps(out_dir):
        if not os.path.isdir(out_dir):
            raise UserError(
                f'no checkpoint to load: there is no folder {out_dir}{nearest_path(out_dir)}'
            )
        raise UserError(
            f'no checkpoint to load: {path if step is not None else store.folder_of(out_dir)}'
            ' does not exist or is not whole; give the --out_dir of a run'
            + (f' and one of the steps {store.steps(out_dir)}' if store.steps(out_dir) else '')
        )
    if reason := store.corruption_reason(path):
        raise UserError(f'{path} cannot be used: {reason}')
    state = store.read_state(path)
    if missing := [key for key in ('config', 'run_name') if key not in state]:
        raise UserError(
            f'{path} cannot be used: its state.json has no {missing[0]}, so it is not the'
            ' checkpoint of a run'
        )
    return path, state


def data_of(config: dict) -> tuple:
    """Return (folder, meta) of a run's data set, which knows its tokenizer. Raises UserError
    where it is not here.
    """
    if 'dataset' not in config:
        raise UserError(
            'the checkpoint was fetched from elsewhere, and its data set is a path there, which is'
            ' not taken over: export it on the machine that trained it, or train on from it with'
            ' --dataset'
        )
    folder = folder_of(config['dataset'], ROOT)
    if not any(os.path.isfile(os.path.join(folder, name)) for name in ('meta.pkl', 'train.bin')):
        raise UserError(
            f'the tokenizer of this run is that of its data set, and {folder} has no meta.pkl:'
            f' prepare {config["dataset"]} here as it was prepared for the training'
        )
    return folder, read_meta(folder)


def tokenizer_of_run(state: dict) -> tuple:
    """Return (tokenizer, meta of its data set, None or a sentence that the data here is other data
    than the run's).
    """
    folder, meta = data_of(state['config'])
    trained_with = state.get('data', {}).get('train', {}).get('fingerprint')
    same = len(parse_mixture(state['config']['dataset'])) > 1 or meta.get('fingerprint', {}).get(
        'train'
    ) in (None, trained_with)
    tokenizer, gave = tokenizer_of(folder, meta), state.get('token_ids')
    same_ids = same_digest(gave, ids_digest(tokenizer) if gave else None)
    if same_ids is None and state.get('tokenizer') not in (None, tokenizer_identity(folder, meta)):
        same = False
    if same_ids is False:
        raise UserError(
            f'{folder} was prepared again, with a tokenizer that gives other ids than the one that'
            ' this model was trained with: prepare it as it was, or give the later data set a'
            ' folder of its own with --output'
        )
    return (
        tokenizer,
        meta,
        None if same else f'{folder} is not the data that this model was trained with',
    )


def load_state(out_dir: str, step: int | None) -> tuple:
    """Return (ModelConfig, {name: tensor} on the CPU, path, state) of a run's checkpoint."""
    path, state = find_checkpoint(out_dir, step)
    shape = resolve_shape(state['config'])
    tensors = Model.on_meta(shape).allocate('cpu').tensors()
    store.load(path, {f'model.{name}': tensor for name, tensor in tensors.items()})
    return shape, tensors, path, state


def load_run(
    out_dir: str,
    step: int | None,
    device: torch.device,
    dtype: torch.dtype,
    changes: dict[str, float] | None = None,
) -> tuple:
    """Return (model, tokenizer, path of the checkpoint, its state) of a run. changes: {key: value}
    of the shape that need no other weights, such as block_size and rope_scaling.
    """
    path, state = find_checkpoint(out_dir, step)
    config = state['config']
    tokenizer, meta, elsewhere = tokenizer_of_run(state)
    backend = config.get('attention_backend') or 'sdpa'
    model = build(
        apply_context_overrides(config, changes),
        device,
        dtype,
        'sdpa' if backend == 'blocks' else backend,  # which is for training
        meta.get('eot_id') if config.get('document_mask') else None,
    )
    store.load(path, {f'model.{name}': tensor for name, tensor in model.tensors().items()})
    if elsewhere:
        print(
            f'Note: {elsewhere}; the text is nonsense if its tokenizer is another', file=sys.stderr
        )
    return model, tokenizer, path, state


def load_huggingface(
    source: str, device: torch.device, dtype: torch.dtype, changes: dict | None = None
) -> tuple:
    """Return (model, tokenizer, folder) of a Hugging Face folder or hub id."""
    folder = huggingface.fetch_source(source)
    shape = apply_context_overrides(huggingface.read_settings(folder), changes)
    model = build(shape, device, dtype, 'sdpa')
    model.fill(huggingface.read_weights(folder, shape))
    return model, load_tokenizer(folder), folder


def apply_context_overrides(settings: dict, changes: dict[str, float] | None) -> 'ModelConfig':
    """Return the ModelConfig of `settings` with `changes`. Raises UserError where they need
    weights that are not there.
    """
    shape = resolve_shape(settings)
    if not changes:
        return shape
    if (
        shape.position_encoding == 'learned_absolute'
        and changes.get('block_size', shape.block_size) != shape.block_size
    ):
        raise UserError(
            f'--block_size={changes["block_size"]}: this model learned {shape.block_size}'
            ' positions, no more and no fewer'
        )
    if 'rope_factor' in changes and changes.get('rope_scaling', shape.rope_scaling) == 'none':
        raise UserError(
            f'--rope_factor={changes["rope_factor"]:g} needs a --rope_scaling, such as yarn'
        )
    if changes.get('rope_scaling', 'none') != 'none':
        changes = {
            'rope_original_block_size': shape.rope_original_block_size,
            'rope_factor': None,
            **changes,
        }
    return resolve_shape({**settings, **changes})


def build(
    shape: 'ModelConfig',
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    document_end: int | None = None,
) -> 'Model':
    """Return a Model of this shape on `device`, in evaluation mode, with memory but no values."""
    backend, _ = choose_backend(
        backend,
        device.type,
        dtype,
        shape.head_dim,
        window=any(shape.windows),
        documents=document_end is not None,
        sinks=shape.attention_sinks,
    )
    dispatch, _ = experts.choose_dispatch(
        'grouped', (shape.n_embd, shape.expert_d_ff), dtype, device.type
    )
    model = Model.on_meta(shape, backend, dispatch=dispatch, document_end=document_end)
    memory.refuse_too_large(model, device)
    return model.allocate(device).eval()


def add_model_arguments(parser: 'ArgumentParser') -> None:
    """What sample.py and evaluate.py ask alike: which model, and how it runs."""
    parser.add_argument('--out_dir', default='out', help='folder of a run')
    parser.add_argument('--hf', help='a Hugging Face folder or hub id instead of a run')
    parser.add_argument(
        '--step', type=int, help='step of the checkpoint; default: the best validation loss'
    )
    parser.add_argument(
        '--block_size',
        type=int,
        help='a context longer (or shorter) than trained; longer ones want a --rope_scaling',
    )
    parser.add_argument('--rope_scaling', choices=('none', *rope.SCALINGS))
    parser.add_argument(
        '--rope_factor',
        type=float,
        help=(
            'how many times longer the context became; default: block_size over that of the'
            ' training'
        ),
    )
    parser.add_argument('--device', help="'cpu' | 'cuda'; default: a GPU if there is one")
    parser.add_argument(
        '--dtype',
        choices=('float32', 'bfloat16', 'float16'),
        help='default: bfloat16 on a GPU that has it (else float16), float32 on a CPU',
    )


def load(args: argparse.Namespace) -> tuple:
    """Return (model, tokenizer, what was loaded, state of the checkpoint or None, processes.World,
    autocast context) for parsed add_model_arguments().
    """
    world = processes.start(args.device)
    device = world.device
    dtype = kernels.precision(args.dtype, device)
    changes = {
        key: getattr(args, key)
        for key in ('block_size', 'rope_scaling', 'rope_factor')
        if getattr(args, key) is not None
    }
    state = None
    if args.hf == '':
        raise UserError('--hf is empty: give a Hugging Face folder or hub id, or leave it out')
    if args.hf:
        model, tokenizer, source = load_huggingface(args.hf, device, dtype, changes)
    else:
        model, tokenizer, source, state = load_run(args.out_dir, args.step, device, dtype, changes)
    if dtype != torch.float32:
        model.cast_matmuls(dtype)
    return model, tokenizer, source, state, world, kernels.autocast(device.type, dtype)
