"""Tokens per second of writing with the cache of keys and values and without it, alternating, and
whether both write the same.

python bench/generation.py --out_dir=out-demo --new_tokens=512 --rounds=5
"""

import argparse
import statistics
import sys
import time

from load import add_model_arguments, load
from onetrain.command_line import run_command, whole
from onetrain.generation import generate


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument('--new_tokens', type=whole(), default=512)
    parser.add_argument('--rounds', type=whole(), default=5)
    parser.add_argument('--batch', type=whole(), default=1)
    parser.add_argument('--compile', action='store_true', help='time compiled decoding too')
    args = parser.parse_args()
    model, tokenizer, source, _, _, autocast = load(args)
    prompts = [tokenizer.encode('def ').tolist()] * args.batch
    ways = {
        'cached': dict(),
        'anew': dict(cached=False),
        **({'compiled': dict(compiled=True)} if args.compile else {}),
    }
    times, written = {way: [] for way in ways}, {}
    for turn in range(args.rounds + 1):
        for way in [*ways][:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            with autocast:
                written[way] = generate(model, prompts, args.new_tokens, temperature=0, **ways[way])
            times[way] += [time.perf_counter() - start] * (turn > 0)  # the first is warm-up
    print(
        f'{source}, {model.config.describe()}, context {model.config.block_size}, {args.batch} x'
        f' {args.new_tokens} tokens, greedy, medians of {args.rounds}'
    )
    for way, seconds in times.items():
        middle = statistics.median(seconds)
        print(
            f'{way:>9}: {args.batch * args.new_tokens / middle:8.1f} tokens/s, {middle:6.2f} s,'
            f' same text: {written[way] == written["anew"]}'
        )
    print(
        'ratio anew / cached:'
        f' {statistics.median(a / c for a, c in zip(times["anew"], times["cached"])):.1f}'
    )


if __name__ == '__main__':
    sys.exit(run_command(lambda _: main()))
