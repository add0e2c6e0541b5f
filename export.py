"""
Write a trained model as a Hugging Face folder for transformers and vLLM.

    python export.py --out_dir=out-demo --to=hf-demo
    python export.py --out_dir=out-demo --to=hf-demo --dtype=bfloat16
    python export.py --out_dir=out-demo --to=hf-demo --push_to_hub=me/my-model

The folder gets config.json, safetensors files, the tokenizer of the run's
data set and a model card with the facts of the training. Afterwards the
weights are read back: where transformers is installed, it must compute the
same logits from them as this project does.
"""

import argparse
from typing import TYPE_CHECKING

from onetrain.command_line import ArgumentParser, importing, run_command

if __name__ == '__main__':
    imported = importing('torch')

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile

import torch

from load import build, load_state, tokenizer_of_run
from model import Model
from onetrain import huggingface
from onetrain.config import UserError
from onetrain.files import is_whole, replacing
from onetrain.logs.run_json import read_records
from onetrain.tokenizers.base import TEMPLATES, TEXTS
from onetrain.tokenizers.export import save_for_transformers
from onetrain.training.startup_report import size_of

if TYPE_CHECKING:
    from onetrain.model_config import ModelConfig
    from onetrain.tokenizers.base import Tokenizer


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('--out_dir', default='out', help='folder of a run')
    parser.add_argument(
        '--step', type=int, help='step of the checkpoint; default: the best validation loss'
    )
    parser.add_argument('--to', required=True, help='folder to write')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32')
    parser.add_argument('--shard_size', default='5GB', help='largest size of one safetensors file')
    parser.add_argument(
        '--push_to_hub',
        metavar='ORG/NAME',
        help='upload the folder to the hub too (log in with `hf auth login` first)',
    )
    parser.add_argument('--no_check', action='store_true', help='do not compare with transformers')
    return run_command(lambda argv: run(parser.parse_args(argv)), argv)


def run(args: argparse.Namespace) -> int:
    """Export what the parsed `args` name; returns the exit code. Raises UserError."""
    huggingface.require_safetensors(writing=True)
    check_folder(args.to)
    if not re.fullmatch(r'[1-9]\d*(\.\d+)? ?[KMGT]?B', args.shard_size, re.ASCII | re.IGNORECASE):
        raise UserError(
            f'--shard_size={args.shard_size} is no size: type a number and a unit, such as 5GB'
        )
    shape, tensors, path, state = load_state(args.out_dir, args.step)
    kind = huggingface.architecture_of(shape)
    if args.push_to_hub:
        hub(args.push_to_hub)  # known to fail before anything is written
    tokenizer, _, elsewhere = tokenizer_of_run(state)
    if elsewhere:
        raise UserError(f'{elsewhere}, so its tokenizer may be another: prepare it as it was')
    try:
        prompt = (
            'Once'
            if not hasattr(tokenizer, 'stoi') or {*'Once'} <= {*tokenizer.stoi}
            else max(tokenizer.stoi, key=str.isalpha)
        )
        readme = card(
            shape, state, facts(args.out_dir, state['run_name'], state['step']), kind, prompt
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f'{path}/state.json does not say what a model card needs ({type(error).__name__}:'
            f' {error}): it is not the checkpoint of a run'
        ) from None
    print(f'{path} as {kind}, {args.dtype}')
    os.makedirs(args.to, exist_ok=True)
    # first: by it this command knows its folders
    with replacing(os.path.join(args.to, 'README.md'), 'w') as f:
        f.write(readme)
    huggingface.write_model(
        args.to, shape, tensors, getattr(torch, args.dtype), tokenizer.eot_id, args.shard_size
    )
    clear_leftovers(args.to)
    for note in save_for_transformers(tokenizer, args.to):
        print(f'WARNING: the exported tokenizer may give other ids than sentencepiece for {note}')
    keep_generation_settings(tokenizer, args.to, shape.vocab_size)
    if not args.no_check:
        print(check(args.to, shape, tokenizer))
    if args.push_to_hub:
        upload(args.push_to_hub, args.to)
        print(f'uploaded to https://huggingface.co/{args.push_to_hub}')
    print(
        f"wrote {args.to}: AutoModelForCausalLM.from_pretrained('{args.to}') opens it, lm_eval run"
        f' --model hf --model_args pretrained={args.to} scores it'
    )
    return 0


def check_folder(folder: str) -> None:
    """Raise UserError where nothing can be written to `folder`."""
    if not folder or '://' in folder:
        raise UserError(
            f'--to={folder} is no folder: give the name of one on this machine, which is made if it'
            ' is not there'
        )
    try:
        new = not os.path.exists(folder)
        os.makedirs(folder, exist_ok=True)
        others = [name for name in sorted(os.listdir(folder)) if not name.startswith('.')]
        if others and not is_export(folder):
            raise UserError(
                f'--to={folder} holds {", ".join(others[:3])}{" and more" * (len(others) > 3)},'
                ' which no export wrote: give a new folder'
            )
        for name in (
            'config.json',
            'generation_config.json',
            'model.safetensors',
            'tokenizer.json',
            'tokenizer_config.json',
            'README.md',
        ):
            if os.path.isdir(os.path.join(folder, name)):
                raise IsADirectoryError(0, f'{name} there is a folder')
        if links := [
            name
            for name in sorted(os.listdir(folder))
            if os.path.islink(os.path.join(folder, name))
        ]:
            raise UserError(
                f'--to={folder} holds the link {links[0]}, and what it leads to would be written'
                ' over: give a new folder'
            )
        tempfile.TemporaryFile(dir=folder).close()
        if new:
            os.rmdir(folder)  # nothing is there before there is something to write
    except OSError as error:
        raise UserError(
            f'--to={folder} cannot be written to ({error.strerror}): give another folder'
        ) from None


def is_export(folder: str) -> bool:
    """Return whether this command wrote what is in `folder`, as its model card says, and nothing
    there is of a run, a data set or the project.
    """
    path = os.path.join(folder, 'README.md')
    if any(
        os.path.exists(os.path.join(folder, name))
        for name in ('train.py', 'checkpoints', 'meta.pkl')
    ) or not os.path.isfile(path):
        return False
    with open(path, encoding='utf-8', errors='replace') as f:
        return TITLE in f.read(2000)


TITLE = '# A language model trained with onetrain'
# what an export before, or another program, may have left in the folder, and what readers would
# take for part of this model
LEFTOVERS = (
    'special_tokens_map.json',
    'added_tokens.json',
    'chat_template.jinja',
    'chat_template.json',
    'adapter_config.json',
    'adapter_model.safetensors',
    'processor_config.json',
    'preprocessor_config.json',
    'tokenizer.model',
    'spiece.model',
    'vocab.json',
    'merges.txt',
    'tekken.json',
    'tiktoken.model',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
    'params.json',
    'consolidated.safetensors',
    'evaluation.json',
)
SAMPLING = ('do_sample', 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')


def clear_leftovers(folder: str) -> None:
    """Remove files of LEFTOVERS and templates of conversations from `folder`."""
    for name in LEFTOVERS:
        if os.path.isfile(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
    shutil.rmtree(os.path.join(folder, TEMPLATES), ignore_errors=True)


def keep_generation_settings(tokenizer: 'Tokenizer', folder: str, vocab_size: int) -> None:
    """Add to generation_config.json what the one beside the tokenizer says of sampling and of ids
    that end a text.
    """
    theirs = (
        tokenizer._settings('generation_config.json') if hasattr(tokenizer, '_settings') else {}
    )
    path = os.path.join(folder, 'generation_config.json')
    with open(path, encoding='utf-8') as f:
        config = json.load(f)
    config.update(
        {key: theirs[key] for key in SAMPLING if isinstance(theirs.get(key), (bool, int, float))}
    )
    ends = theirs.get('eos_token_id')
    ends = [
        i for i in (ends if isinstance(ends, list) else [ends]) if is_whole(i, 0, vocab_size - 1)
    ]
    if tokenizer.eot_id is not None and {*ends} - {tokenizer.eot_id}:
        config['eos_token_id'] = list(dict.fromkeys([tokenizer.eot_id, *ends]))
    with replacing(path, 'w') as f:
        json.dump(config, f, indent=2)


def check(folder: str, shape: 'ModelConfig', tokenizer: 'Tokenizer') -> str:
    """Return what was found when transformers read `folder`. Raises UserError if its logits or
    token ids are others than ours.
    """
    # which transformers imports, and which complains of kernels that no check needs
    os.environ.setdefault('TORCHAO_FORCE_SKIP_LOADING_SO_FILES', '1')
    try:
        import transformers
    except ImportError:
        return 'not compared: transformers is not installed'
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = build(shape, torch.device('cpu'), torch.float32, 'sdpa')
    ours.fill(huggingface.read_weights(folder, shape))
    idx = torch.randint(
        shape.vocab_size, (1, min(shape.block_size, 64)), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        a, b = theirs(idx).logits, ours(idx)
    difference = (a - b).abs().max().item() / max(1.0, a.abs().max().item())
    if not difference <= 1e-4:
        raise UserError(
            f'{folder}: transformers computes other logits from it (largest difference'
            f' {difference:.1e}); do not use it, and report this, please'
        )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    if len(theirs) > shape.vocab_size:
        raise UserError(
            f'{folder}: its tokenizer has {len(theirs)} ids, more than the {shape.vocab_size} of'
            ' the model; the weights are right, bring a tokenizer.json of your own'
        )
    for text in TEXTS:
        text = (
            ''.join(c for c in text if c in tokenizer.stoi) if hasattr(tokenizer, 'stoi') else text
        )
        ids = tokenizer.encode(text).tolist()
        if theirs(text)['input_ids'] != ids or theirs.decode(ids) != tokenizer.decode(ids):
            raise UserError(
                f'{folder}: its tokenizer gives other ids or another text than that of the data set'
                f' for {text!r}; the weights are right, bring a tokenizer.json of your own'
            )
    return (
        f'compared with transformers {transformers.__version__}: largest difference of logits'
        f' {difference:.1e}, token ids are the same'
    )


def facts(out_dir: str, run_name: str, step: int) -> dict:
    """Return {'val_loss', 'hours', 'hardware', ...} of the run up to `step`, from its log; what is
    not there is left out.
    """
    found = {}
    with contextlib.suppress(OSError):
        for line in read_records(os.path.join(out_dir, f'{run_name}.jsonl')):
            if line['type'] == 'header':
                startup = line.get('startup_info')
                hardware = startup.get('hardware') if isinstance(startup, dict) else None
                found['hardware'] = hardware if isinstance(hardware, dict) else {}
            elif line.get('iter', step + 1) <= step:
                if line['type'] == 'iter' and 'wall_s' in line:
                    found['hours'] = line['wall_s'] / 3600
                elif line['type'] == 'eval' and line['val_loss'] is not None:
                    found['val_loss'], found['evaluated'] = line['val_loss'], line['iter']
    return found


def card(shape: 'ModelConfig', state: dict, log: dict, kind: str, prompt: str = 'Once') -> str:
    """Return the text of a model card; prompt: a text that its tokenizer knows."""
    table = '\n'.join(f'| {name} | {value} |' for name, value in card_rows(shape, state, log, kind))
    return (
        f'---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n{TITLE}\n\n| |'
        f' |\n|---|---|\n{table}\n\n'
        '```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\nname ='
        " 'THIS_FOLDER'\ntokenizer, model = AutoTokenizer.from_pretrained(name),"
        ' AutoModelForCausalLM.from_pretrained(name)\n'
        f"ids = tokenizer({prompt!r}, return_tensors='pt',"
        ' return_token_type_ids=False)\nprint(tokenizer.decode(model.generate(**ids,'
        f' max_new_tokens={max(1, min(50, shape.block_size - 8))})[0]))\n```\n'
    )


def card_rows(shape: 'ModelConfig', state: dict, log: dict, kind: str) -> list[tuple]:
    """Return [(name, value)] of a model and its training, texts."""
    c, hardware = state['config'], log.get('hardware')
    fingerprint = state['data']['train']['fingerprint']
    with torch.device('meta'):
        counts = Model(shape).parameter_counts()
    active = f', {counts["active"]:,} active per token' if shape.num_experts else ''
    rows = [
        ('architecture', f'{shape.describe()} ({kind})'),
        ('parameters', f'{size_of(counts["total"])} ({counts["total"]:,}){active}'),
        ('context', f'{shape.block_size} tokens'),
        ('data set', f'{os.path.basename(c["dataset"])}, fingerprint {fingerprint}'),
        (
            'training tokens',
            f'{state["tokens"]:,} in {state["step"]:,} iterations of {state["tokens_per_step"]:,}',
        ),
        (
            'optimizer',
            f'{state["optimizer"]}, learning rate {c["learning_rate"]:g} to'
            f' {c["min_lr"] if c["decay_lr"] else c["learning_rate"]:g}, weight decay'
            f' {c["weight_decay"]:g}, betas {c["beta1"]:g} and {c["beta2"]:g}, clipping'
            f' {c["grad_clip"]:g}',
        ),
        ('precision', f'{c["dtype"]}, float32 weights'),
    ]
    if 'val_loss' in log:
        loss = f'{log["val_loss"]:.4f} nats per token at iteration {log["evaluated"]}'
        rows.append(('validation loss', loss))
    if hardware:
        gpus = f'{hardware.get("num_gpus", 1)} x {hardware.get("gpu_name")}'
        device = gpus if hardware.get('gpu_name') else hardware.get('cpu_name', 'CPU')
        rows.append(('hardware', device))
    if 'hours' in log:
        rows.append(('time', f'{log["hours"]:.2f} hours'))
    versions = state['versions']
    software = f'onetrain {versions.get("onetrain", "before 0.9")}, torch {versions["torch"]}'
    return [*rows, ('software', software)]


def hub(name: str):
    """Return the hub, if it can be written to under `name`. Raises UserError."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
    except Exception as error:  # the hub's own errors, and any of the network's
        raise UserError(
            f'--push_to_hub={name} cannot be written to ({type(error).__name__}): log in with `hf'
            ' auth login`, check the name and the network, or leave it out'
        ) from None
    return api


def upload(name: str, folder: str):
    """Upload the files of `folder` to the hub under `name`. Raises UserError."""
    try:
        hub(name).upload_folder(repo_id=name, folder_path=folder)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f'{folder} is written, but could not be uploaded to {name} ({type(error).__name__}):'
            f' `hf upload {name} {folder}` tries again'
        ) from None


if __name__ == '__main__':
    imported()
    sys.exit(main())
