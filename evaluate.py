"""
Measure a trained model: loss, multiple-choice tasks, speed, samples.

    python evaluate.py --out_dir=out-demo
    python evaluate.py --out_dir=out-demo --tasks=hellaswag --limit=500
    python evaluate.py --hf=path/or/hub-id --dataset=pystdlib --speed
    torchrun --standalone --nproc_per_node=8 evaluate.py --out_dir=out-llama3

Loss, perplexity and bits per byte are over the whole validation split, or
its first --tokens, in windows that do not overlap. Results are added to
evaluation_STEP.json in the folder of the run, which
plots/compare_evaluations.py draws. What is not here, lm-eval measures:

    python export.py --out_dir=out-demo --to=hf-demo
    lm_eval run --model hf --model_args pretrained=hf-demo --tasks=winogrande
"""

import argparse
from typing import TYPE_CHECKING, Any

from onetrain.command_line import ArgumentParser, importing, run_command

if __name__ == '__main__':
    imported = importing('torch')

import json
import math
import os
import tempfile
import time

import numpy as np
import torch

from load import add_model_arguments, load
from onetrain.checkpoint import store
from onetrain.command_line import ROOT
from onetrain.config import UserError
from onetrain.data.dataset import check_vocab_and_length, folder_of, open_dataset, parse_mixture
from onetrain.data.text_bytes import bytes_of
from onetrain.data.token_file import read_meta
from onetrain.distributed import collectives, processes
from onetrain.evaluation import multiple_choice
from onetrain.files import parse_json, redact
from onetrain.generation import cache_for, check_prompts, encode_prompt, generate, lines_of
from onetrain.logs.run_log import now
from onetrain.ops import kernels
from onetrain.ops.cross_entropy import IGNORE
from onetrain.tokenizers.base import decode_after, same_tokenizer, tokenizer_of

if TYPE_CHECKING:
    from model import Model
    from onetrain.data.dataset import Tokens
    from onetrain.distributed.processes import World
    from onetrain.tokenizers.base import Tokenizer


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    parser = ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument('--dataset', help='a folder of data/; default: that of the run')
    parser.add_argument('--split', choices=('train', 'val'), default='val')
    parser.add_argument('--tokens', type=int, default=0, help='how many of the split, 0: all')
    parser.add_argument('--batch_size', type=int, default=8)
    parser.add_argument(
        '--tasks',
        default='',
        help=(
            f'of {", ".join(multiple_choice.TASKS)}: NAME from the hub or NAME:FILE.jsonl,'
            ' separated by commas'
        ),
    )
    parser.add_argument('--limit', type=int, help='first items of each task')
    parser.add_argument(
        '--speed',
        action='store_true',
        help='measure reading and writing for several batches and lengths',
    )
    parser.add_argument(
        '--prompts',
        help='a text file with a prompt on each line: write on, always with the most likely token',
    )
    parser.add_argument('--max_new_tokens', type=int, default=64, help='for --prompts')
    parser.add_argument('--data_url', help='URL of the folder of --dataset, as in training')
    parser.add_argument('--no_loss', action='store_true', help='leave out the data set')
    parser.add_argument(
        '--json',
        help=(
            'file of the results; default: evaluation_STEP.json in the folder of the run,'
            ' evaluation.json in a Hugging Face folder'
        ),
    )
    return run_command(lambda argv: run(parser.parse_args(argv)), argv, processes.report_error)


def run(args: argparse.Namespace) -> int:
    """Measure what the parsed `args` ask for; returns the exit code. Raises UserError."""
    for name in ('batch_size', 'max_new_tokens') + (('limit',) if args.limit is not None else ()):
        if not 1 <= getattr(args, name) <= 2**31:
            raise UserError(f'--{name}={getattr(args, name)} must be at least 1 and at most 2**31')
    if args.tokens < 0:
        raise UserError(f'--tokens={args.tokens} must not be negative')
    loaded = multiple_choice.load_tasks(args.tasks, args.limit)
    prompts = lines_of(args.prompts, '--prompts=') if args.prompts else []
    model, tokenizer, source, state, world, autocast = load(args)
    sources = sources_of(args, state)
    if sources:
        check_tokenizer(args.dataset or state['config']['dataset'], tokenizer)
    tasks = multiple_choice.encode_items(loaded, tokenizer, model.config.block_size)
    prompt_ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    check_prompts(prompt_ids, model)
    results = Results(args, source, model, state, world)
    results.say(
        f'{source}, {model.config.describe()}, {model.parameter_counts()["total"]:,} parameters,'
        f' {world.size} process{"es" * (world.size > 1)}'
    )
    with torch.no_grad(), autocast:
        if sources:
            add_losses(results, sources, model, args, tokenizer, state)
        if tasks:
            add_scores(results, tasks, model, args)
        if args.speed:
            add_speed(results, model)
        if prompts:
            add_texts(results, prompts, prompt_ids, model, args, tokenizer)
    results.say(f'wrote {results.path}')
    return 0


class Results:
    """What is measured of a model, kept in a JSON file as it grows. found: the object of the file;
    conditions: under which it was measured; world: processes.World.

    Raises UserError for a file of other weights or conditions.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        source: str,
        model: 'Model',
        state: dict | None,
        world: 'World',
    ):
        self.path, self.world = place_of_results(args, state), world
        self.found: dict[str, Any] = {
            'model': source,
            'weights': identity(source, state),
            'step': state and state['step'],
            'time': now(),
            'architecture': model.config.describe(),
            'parameters': model.parameter_counts()['total'],
        }
        self.conditions = {
            'block_size': model.config.block_size,
            'rope_scaling': model.config.rope_scaling,
            'rope_factor': model.config.rope_factor,
            'dtype': str(kernels.precision(args.dtype, world.device)).removeprefix('torch.'),
        }
        collectives.broadcast_from_main(
            lambda: check_results(self.path, self.found['weights'], self.conditions), world
        )
        self.keep()

    def keep(self) -> None:
        """Write the file."""
        if self.world.is_main:
            record(self.path, self.found)

    def say(self, line: str) -> None:
        """Print a line, on the main rank."""
        if self.world.is_main:
            print(line)


def sources_of(args: argparse.Namespace, state: dict | None) -> list[tuple]:
    """Return [(name, share)] of the data sets whose loss is asked for. Raises UserError."""
    dataset = args.dataset or state and state['config'].get('dataset')
    if args.no_loss:
        return []
    if not dataset:
        raise UserError('this model names no data set: give --dataset, or --no_loss')
    sources = parse_mixture(dataset)
    if args.data_url and len(sources) > 1:
        raise UserError(
            f'--data_url={redact(args.data_url)} holds one data set, not the mixture {dataset}:'
            ' leave one of them out'
        )
    return sources


def add_losses(
    results: 'Results',
    sources: list[tuple],
    model: 'Model',
    args: argparse.Namespace,
    tokenizer: 'Tokenizer',
    state: dict | None,
) -> None:
    """Measure the loss of each of `sources`, [(name, share)], and that of the mixture."""
    results.found['losses'] = {}
    for name, _ in sources:
        found = losses(model, name, args, tokenizer, results.world, state)
        found['conditions'] = results.conditions
        results.found['losses'][f'{name} {found["split"]}'] = found
        results.say(describe_losses(found))
        if len(sources) == 1:
            results.found['loss'] = found
        results.keep()
    if len(sources) > 1:
        all_found = results.found['losses'].values()
        mean = sum(float(share) * one['loss'] for (_, share), one in zip(sources, all_found))
        dataset = args.dataset or state['config']['dataset']
        results.say(f'{dataset}: loss {mean:.4f}, by the shares of the mixture')


def add_scores(
    results: 'Results', tasks: dict[str, tuple], model: 'Model', args: argparse.Namespace
) -> None:
    """Score multiple-choice tasks."""
    world, files = results.world, dict(multiple_choice.names_and_files(args.tasks))
    results.found['tasks'] = multiple_choice.evaluate(
        tasks,
        model,
        args.batch_size,
        world.device,
        lambda values: collectives.sum_over_ranks(values, world),
        world.rank,
        world.size,
    )
    for name, found in results.found['tasks'].items():
        found.update(file=files.get(name), limit=args.limit, conditions=results.conditions)
        results.say(
            f'{name}: acc {100 * found["acc"]:.2f} %, acc_norm {100 * found["acc_norm"]:.2f} % of'
            f' {found["items"]} items'
        )
    results.keep()


def add_speed(results: 'Results', model: 'Model') -> None:
    """Measure reading and writing."""
    results.found['speed'] = speed(model, results.world.device)
    results.say('batch  length   reading tokens/s   writing tokens/s')
    for row in results.found['speed']:
        results.say(
            f'{row["batch"]:5d}  {row["length"]:6d}  {row["prefill_tokens_per_s"]:17,.0f} '
            f' {row["decode_tokens_per_s"]:17,.0f}'
        )
    results.keep()


def add_texts(
    results: 'Results',
    prompts: list[str],
    prompt_ids: list[list],
    model: 'Model',
    args: argparse.Namespace,
    tokenizer: 'Tokenizer',
) -> None:
    """Continue `prompts`, texts, always with the most likely token."""
    stop_ids = {tokenizer.eot_id} - {None}
    written = generate(model, prompt_ids, args.max_new_tokens, temperature=0, stop_ids=stop_ids)
    results.found['written'] = [
        {'prompt': prompt, 'text': decode_after(tokenizer, before, ids)}
        for prompt, before, ids in zip(prompts, prompt_ids, written)
    ]
    for row in results.found['written']:
        results.say(f'---- {row["prompt"]}\n{row["prompt"]}{row["text"]}')
    results.keep()


def describe_losses(found: dict) -> str:
    """Return the line of the results of losses()."""
    bits = found['bits_per_byte']
    return (
        f'{found["dataset"]} {found["split"]}, {found["tokens"]:,} tokens: loss'
        f' {found["loss"]:.4f}, perplexity {found["perplexity"]:.2f}'
        + (f', {bits:.4f} bits per byte' if bits else '')
        + f' ({found["seconds"]:.1f} s)'
    )


def check_tokenizer(dataset: str, tokenizer: 'Tokenizer') -> None:
    """Raise UserError if the data set was made with another tokenizer than the model's."""
    folder = folder_of(dataset, ROOT)
    meta = read_meta(folder)
    if not meta:
        return  # open_dataset() says what is missing; nanoGPT's old sets state nothing
    same = same_tokenizer(tokenizer_of(folder, meta), tokenizer)
    if not same:
        raise UserError(
            f'the data set {dataset} was made with another tokenizer than the model: prepare it'
            " with the model's (--tokenizer FOLDER), or give another --dataset"
        )


def place_of_results(args: argparse.Namespace, state: dict | None) -> str:
    """Return the file of the results; its folder exists and can be written to, or UserError."""
    path = args.json or (
        os.path.join(args.hf if os.path.isdir(args.hf) else '.', 'evaluation.json')
        if args.hf
        else os.path.join(args.out_dir, f'evaluation_{state["step"]:08d}.json')
    )
    if '://' in path or os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(
            f'--json={path} is a URL, a folder or a device: give the name of a file on this machine'
        )
    folder = os.path.dirname(path) or '.'
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f'{path} cannot be written to ({error.strerror}): give another --json'
        ) from None
    return path


def identity(source: str, state: dict | None) -> str:
    """Return a text that is another one for other weights at the same place."""
    if state:
        return f'{state["run_name"]} step {state["step"]} {state.get("time")}'
    files = sorted(name for name in os.listdir(source) if name.endswith('.safetensors'))
    return ' '.join(
        f'{name} {os.stat(os.path.join(source, name)).st_size}'
        f' {os.stat(os.path.join(source, name)).st_mtime_ns}'
        for name in files
    )


def losses(
    model: 'Model',
    dataset: str,
    args: argparse.Namespace,
    tokenizer: 'Tokenizer',
    world: 'World',
    state: dict | None,
) -> dict:
    """Return the loss per token over windows of the context's length, one behind the other; the
    last one may be shorter.
    """
    url = args.data_url or (state['config'].get('data_url') if state and not args.dataset else None)
    train, val, meta = collectives.once_per_machine(lambda: open_dataset(dataset, ROOT, url), world)
    file, block = train if args.split == 'train' else val, model.config.block_size
    check_vocab_and_length(file, model.config.vocab_size, 1)
    n = min(args.tokens or len(file), len(file)) - 1  # tokens that have one before them
    if n < 1:
        raise UserError(f'{args.split}.bin of {dataset} has too few tokens to predict one')
    started, total = time.perf_counter(), torch.zeros((), dtype=torch.float64, device=world.device)
    starts = range(0, n, block)
    # each rank computes as often as the others
    for first in range(0, len(starts), args.batch_size * world.size):
        mine = starts[
            first + world.rank * args.batch_size : first + (world.rank + 1) * args.batch_size
        ]
        x, y = (torch.full((max(1, len(mine)), block), fill) for fill in (0, IGNORE))
        for row, start in enumerate(mine):
            ids = torch.from_numpy(file.slice(start, min(start + block, n) + 1).astype(np.int64))
            x[row, : len(ids) - 1], y[row, : len(ids) - 1] = ids[:-1], ids[1:]
        total += model(x.to(world.device), y.to(world.device), reduction='sum').double()
    nats = collectives.sum_over_ranks(total, world).item()
    text_bytes = collectives.broadcast_from_main(
        lambda: bytes_of_text(file, n, tokenizer),
        world,
    )
    return {
        'dataset': dataset,
        'split': args.split,
        'fingerprint': file.fingerprint,
        'tokens': n,
        'loss': nats / n,
        'perplexity': math.exp(min(nats / n, 700)),
        'bits_per_byte': nats / math.log(2) / text_bytes if text_bytes else None,
        'bytes': text_bytes,
        'seconds': time.perf_counter() - started,
    }


def bytes_of_text(file: 'Tokens', n: int, tokenizer: 'Tokenizer') -> int | None:
    """Return how many bytes the tokens 1 .. n stand for, None where that cannot be told."""
    total = 0
    for first in range(1, n + 1, 1 << 16):
        ids = file.slice(first, min(first + (1 << 16), n + 1))
        found = bytes_of(ids, tokenizer, file.slice(max(0, first - 4), first))
        if found is None:
            return None
        total += found
    return total


def speed(model: 'Model', device: torch.device, seconds: float = 1.0) -> list[dict]:
    """Return tokens per second of reading a prompt and of writing after it, for batches of 1 and 8
    and up to three lengths; medians of what `seconds` allow.
    """
    rows, block = [], model.config.block_size
    for batch in (1, 8):
        for length in sorted({max(1, min(block - 8, n)) for n in (64, 512, 4096)}):
            idx = torch.zeros(batch, length, dtype=torch.int64, device=device)
            times = {'prefill': [], 'decode': []}
            until = time.perf_counter() + seconds
            while len(times['decode']) < 4 or time.perf_counter() < until:
                cache = cache_for(model, batch, length + 8)
                started = synchronized(device)
                model(idx, last_only=True, cache=cache)
                times['prefill'].append(synchronized(device) - started)
                for _ in range(7):
                    started = synchronized(device)
                    model(idx[:, :1], last_only=True, cache=cache)
                    times['decode'].append(synchronized(device) - started)
            # the first is warm-up
            middle = {
                what: sorted(values[1:])[len(values) // 2 - 1] for what, values in times.items()
            }
            rows.append(
                {
                    'batch': batch,
                    'length': length,
                    'prefill_tokens_per_s': batch * length / middle['prefill'],
                    'decode_tokens_per_s': batch / middle['decode'],
                }
            )
    return rows


def synchronized(device: torch.device) -> float:
    """Return the time in seconds once the device has done its work."""
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def earlier_results(path: str) -> dict:
    """Return the object in the JSON file of earlier results, {} where there is none. Raises
    UserError for a file of another kind.
    """
    if not os.path.exists(path) or os.path.getsize(path) == 0:
        return {}
    try:
        with open(path, 'rb') as f:
            before = parse_json(f.read())
    except ValueError:
        before = None
    if not isinstance(before, dict) or 'weights' not in before:
        raise UserError(
            f'{path} holds something else than results of evaluate.py: give another --json, or move'
            ' it away'
        )
    return before


def check_results(path: str, weights: str, conditions: dict) -> None:
    """Raise UserError where the file of the results has some of the same weights that were
    measured under other conditions.
    """
    before = earlier_results(path)
    for results in (
        (before.get('losses'), before.get('tasks')) if before.get('weights') == weights else ()
    ):
        for name, found in results.items() if isinstance(results, dict) else ():
            # unknown in what earlier versions wrote
            other = found.get('conditions') if isinstance(found, dict) else None
            if isinstance(other, dict) and other != conditions:
                was, now_is = (
                    {key: value for key, value in one.items() if value != two.get(key)}
                    for one, two in ((other, conditions), (conditions, other))
                )
                raise UserError(
                    f'{path} holds {name} measured under other conditions, {was} where this is'
                    f' {now_is}: give another --json, or move it away'
                )


def record(path: str, results: dict) -> None:
    """Add `results` to the JSON file of this checkpoint; what was measured of the same weights
    before and not now stays, other data sets' losses too.
    """
    before = earlier_results(path)
    if before.get('weights') == results['weights']:
        together = {
            key: {**earlier, **results.get(key, {})}
            for key in ('tasks', 'losses')
            if isinstance(earlier := before.get(key, {}), dict)
        }
        results = {**before, **results, **together}
    store.replace_file(path, json.dumps(results, indent=2).encode())


if __name__ == '__main__':
    imported()
    processes.run_and_exit(main)
