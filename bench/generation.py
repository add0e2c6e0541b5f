"""Time to the first token, and tokens per second from then on: with the cache of keys and values,
without it (anew), compiled, and by transformers from the same folder; in turns, greedily.

python bench/generation.py --out_dir=out-demo --ways cached anew
python bench/generation.py --hf=FOLDER --ways cached transformers --batch=8 --prompt_tokens=200
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable

import torch

from load import add_model_arguments, load
from onetrain.command_line import run_command, whole
from onetrain.generation import generate

WAYS = {'cached': {}, 'anew': {'cached': False}, 'compiled': {'compiled': True}}


def peer(folder: str, dtype: torch.dtype, device: torch.device) -> Callable:
    """Return write(prompts, n) by transformers, with weights in `dtype`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def write(prompts, n):
        with torch.inference_mode():
            idx = torch.tensor(prompts, device=device)
            ids = model.generate(
                idx,
                attention_mask=torch.ones_like(idx),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
            )
        return ids[:, idx.size(1) :].tolist()

    return write


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    ways = [*WAYS, 'transformers']
    parser.add_argument('--ways', nargs='+', choices=ways, default=['cached', 'anew'])
    parser.add_argument('--prompt_tokens', type=whole(), default=4)
    parser.add_argument('--new_tokens', type=whole(2), default=128)
    parser.add_argument('--rounds', type=whole(), default=5)
    parser.add_argument('--batch', type=whole(), default=1)
    args = parser.parse_args()
    if 'transformers' in args.ways and not args.hf:
        parser.error('transformers reads a folder of its own: give --hf')
    model, _, source, _, world, autocast = load(args)
    prompts = torch.randint(
        model.config.vocab_size,
        (args.batch, args.prompt_tokens),
        generator=torch.Generator().manual_seed(0),
    ).tolist()

    def ours(prompts, n, **how):
        with autocast:
            return generate(model, prompts, n, temperature=0, **how)

    write = {way: functools.partial(ours, **how) for way, how in WAYS.items()}
    if 'transformers' in args.ways:
        dtype = model.lm_head.weight.dtype
        write['transformers'] = peer(args.hf, dtype, world.device)
    times = {(way, n): [] for way in args.ways for n in (1, args.new_tokens)}
    written = {}
    for turn in range(args.rounds + 1):
        for way in args.ways[:: 1 if turn % 2 else -1]:
            for n in (1, args.new_tokens):
                started = time.perf_counter()
                written[way] = write[way](prompts, n)
                # the first is warm-up
                times[way, n] += [time.perf_counter() - started] * (turn > 0)
    print(
        f'{source}, {model.config.describe()}, context {model.config.block_size},'
        f' {str(model.lm_head.weight.dtype).removeprefix("torch.")}, {args.batch} x'
        f' ({args.prompt_tokens} + {args.new_tokens}) tokens, medians of {args.rounds}'
    )
    first = args.ways[0]
    for way in args.ways:
        begin = statistics.median(times[way, 1])
        rest = [all_ - one for all_, one in zip(times[way, args.new_tokens], times[way, 1])]
        rate = args.batch * (args.new_tokens - 1) / statistics.median(rest)
        same = sum(a == b for x, y in zip(written[way], written[first]) for a, b in zip(x, y))
        print(
            f'{way:>12}: first token after {1000 * begin:7.1f} ms, then {rate:8.1f} tokens/s;'
            f' {100 * same / (args.batch * args.new_tokens):.0f} % of the tokens as {first}'
        )


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
