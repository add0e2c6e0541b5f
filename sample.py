"""
Writes text with a trained model.

    python sample.py --out_dir=out-demo --start="def " --num_samples=3
    python sample.py --out_dir=out-demo --start=FILE:prompt.txt --temperature=0.8 --top_k=50
    python sample.py --hf=path/or/hub-id --start="Once upon a time"

`--out_dir` is the folder of a run; the checkpoint with the best validation loss is taken (`--step` chooses another).
Text goes through the tokenizer of the run's data set. With `--hf`, a Hugging Face folder or hub id, through its own.
"""
import argparse
import contextlib
import os
import sys

import torch

import huggingface
from data.tokenfile import read_meta
from data.tokenizer import load_tokenizer, tokenizer_of
from engine import checkpoint, parallel
from engine.attention import choose_backend
from engine.configurator import ConfigError
from model import Model, resolve_shape

ROOT = os.path.dirname(os.path.abspath(__file__))


def load_run(out_dir, step, device, dtype):
    """(model, tokenizer, what was loaded) of a run's checkpoint; step None: the best, else the newest whole one."""
    if step is None:
        step = checkpoint.best_step(out_dir)
        if step is None or checkpoint.why_broken(checkpoint.path_of(out_dir, step)):
            step, _ = checkpoint.newest_whole(out_dir)
    path = checkpoint.path_of(out_dir, step or 0)
    if step is None or step not in checkpoint.steps(out_dir):
        raise ConfigError(f'no checkpoint to sample from: {path if step is not None else checkpoint.folder_of(out_dir)} does not exist or is not whole; '
                          f'give the --out_dir of a run' + (f' and one of the steps {checkpoint.steps(out_dir)}' if checkpoint.steps(out_dir) else ''))
    if reason := checkpoint.why_broken(path):
        raise ConfigError(f'{path} cannot be used: {reason}')
    state = checkpoint.read_state(path)
    config = state['config']
    shape = resolve_shape(config)
    model = build(shape, device, dtype, config['attention_backend'])
    checkpoint.load(path, {f'model.{name}': p.detach() for name, p in model.named_parameters()})
    folder = os.path.join(ROOT, 'data', config['dataset'])
    meta = read_meta(folder)
    if meta.get('fingerprint', {}).get('train') not in (None, state['data']['train']['fingerprint']):
        print(f'Note: {folder} is not the data that this model was trained with; the text is nonsense if its tokenizer is another', file=sys.stderr)
    return model, tokenizer_of(folder, meta), path


def load_huggingface(source, device, dtype):
    """(model, tokenizer, folder) of a Hugging Face folder or hub id."""
    folder = huggingface.fetch(source)
    shape = resolve_shape(huggingface.read_settings(folder))
    model = build(shape, device, dtype, 'sdpa')
    model.fill(huggingface.weights(folder, shape))
    return model, load_tokenizer(folder), folder


def build(shape, device, dtype, backend):
    backend, _ = choose_backend(backend, device.type, dtype, shape.head_dim)
    return Model.on_meta(shape, backend).allocate(device).eval()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out_dir', default='out', help='folder of a run')
    parser.add_argument('--hf', help='a Hugging Face folder or hub id instead of a run')
    parser.add_argument('--step', type=int, help='step of the checkpoint; default: the best validation loss')
    parser.add_argument('--start', default='\n', help='prompt, or FILE:name of a file that holds it')
    parser.add_argument('--num_samples', type=int, default=3)
    parser.add_argument('--max_new_tokens', type=int, default=200)
    parser.add_argument('--temperature', type=float, default=0.8, help='0: always the most likely token')
    parser.add_argument('--top_k', type=int, help='only the k most likely tokens')
    parser.add_argument('--top_p', type=float, help='only the most likely tokens that add up to this probability')
    parser.add_argument('--seed', type=int, default=1337)
    parser.add_argument('--device', help="'cpu' | 'cuda'; default: a GPU if there is one")
    parser.add_argument('--dtype', choices=('float32', 'bfloat16', 'float16'), help='default: bfloat16 on a GPU that has it (else float16), float32 on a CPU')
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ConfigError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2


def run(args):
    for name, low in (('num_samples', 1), ('max_new_tokens', 1), ('temperature', 0)):
        if not getattr(args, name) >= low:
            raise ConfigError(f'--{name}={getattr(args, name)} must be at least {low}')
    if args.top_k is not None and args.top_k < 1 or args.top_p is not None and not 0 < args.top_p <= 1:
        raise ConfigError('--top_k must be at least 1, --top_p above 0 and at most 1')
    start = args.start
    if start.startswith('FILE:'):
        if not os.path.isfile(start[5:]):
            raise ConfigError(f'--start={start}: no such file')
        with open(start[5:], encoding='utf-8') as f:
            start = f.read()
    device = parallel.start(args.device).device
    dtype = args.dtype or ('float32' if device.type == 'cpu' else 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16')
    torch_dtype = getattr(torch, dtype)
    model, tokenizer, source = (load_huggingface(args.hf, device, torch_dtype) if args.hf else load_run(args.out_dir, args.step, device, torch_dtype))
    ids = tokenizer.encode(start)
    if len(ids) == 0:
        if tokenizer.eot_id is None:
            raise ConfigError('--start is empty, and this tokenizer has no end-of-text token to start from: give some text')
        ids = [tokenizer.eot_id]
    print(f'{source}, {model.config.describe()}, {model.parameter_counts()["total"]:,} parameters\n')
    prompt = torch.tensor(list(map(int, ids)), device=device)[None]
    generator = torch.Generator(device).manual_seed(args.seed)
    autocast = contextlib.nullcontext() if dtype == 'float32' else torch.autocast(device.type, dtype=torch_dtype)
    for _ in range(args.num_samples):
        with autocast:
            text = model.generate(prompt, args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator)[0]
        print(tokenizer.decode(text.tolist()))
        print('-' * 15, flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
