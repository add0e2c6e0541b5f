"""
Write text with a trained model.

    python sample.py --out_dir=out-demo --start="def " --num_samples=3
    python sample.py --out_dir=out-demo --start=FILE:prompt.txt
    python sample.py --out_dir=out-demo --interactive
    python sample.py --hf=path/or/hub-id --start="Once upon a time"

--out_dir is the folder of a run; the checkpoint with the best validation
loss is taken, --step takes another. Text goes through the tokenizer of the
run's data set. --hf takes a Hugging Face folder or hub id, with its own
tokenizer. All samples of all prompts are written at once; the first is shown
while it grows.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from onetrain.command_line import ArgumentParser, importing, run_command

if __name__ == '__main__':
    imported = importing('torch')

import sys

import torch

from load import add_model_arguments, load
from onetrain.config import UserError, shortened
from onetrain.distributed import processes
from onetrain.generation import check_prompts, continue_texts, default_start, encode_prompt, text_of

if TYPE_CHECKING:
    from onetrain.tokenizers.base import Tokenizer


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    parser = ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        '--start',
        action='append',
        help='prompt, or FILE:name of a file that holds it; may be given many times',
    )
    parser.add_argument('--num_samples', type=int, default=3, help='of each prompt')
    parser.add_argument('--max_new_tokens', type=int, default=200)
    parser.add_argument(
        '--temperature', type=float, default=0.8, help='0: always the most likely token'
    )
    parser.add_argument('--top_k', type=int, help='only the k most likely tokens')
    parser.add_argument(
        '--top_p', type=float, help='only the most likely tokens that add up to this probability'
    )
    parser.add_argument(
        '--min_p', type=float, help='only tokens at least this fraction as likely as the likeliest'
    )
    parser.add_argument(
        '--repetition_penalty',
        type=float,
        default=1.0,
        help='above 1: what was written already becomes less likely',
    )
    parser.add_argument(
        '--stop',
        action='append',
        default=[],
        help='text that ends a sample; may be given many times',
    )
    parser.add_argument(
        '--ignore_eot', action='store_true', help='write on after the end of a text'
    )
    parser.add_argument('--seed', type=int, default=1337)
    parser.add_argument(
        '--interactive',
        action='store_true',
        help='read prompts from the terminal; each answer sees what was written before',
    )
    parser.add_argument(
        '--compile',
        action='store_true',
        help='compile decoding (with CUDA graphs on a GPU): a slower start, faster tokens',
    )
    return run_command(lambda argv: run(parser.parse_args(argv)), argv, processes.report_error)


def check_bounds(args: argparse.Namespace) -> None:
    """Raise UserError for numbers that mean nothing."""
    for name, low, high in (
        ('num_samples', 1, 10**4),
        ('max_new_tokens', 1, 10**7),
        ('temperature', 0, 1e6),
        ('top_k', 1, 2**31),
        ('top_p', 0, 1),
        ('min_p', 0, 1),
        ('repetition_penalty', 0.01, 100),
        ('seed', 0, 2**63 - 1),
        ('step', 0, 2**53),
    ):
        value = getattr(args, name)
        if value is not None and (not low <= value <= high or name == 'top_p' and value == 0):
            raise UserError(
                f'--{name}={shortened(value)} must be from {low:,} to {high:,}'
                + (', and above 0' if name == 'top_p' else '')
            )
    if '' in args.stop:
        raise UserError(
            '--stop is empty, and every text begins with that: leave it out, or give the text that'
            ' ends a sample'
        )


def run(args: argparse.Namespace) -> int:
    """Write what the parsed `args` ask for; returns the exit code. Raises UserError."""
    check_bounds(args)
    starts = [
        text_of(start[5:], '--start=FILE:') if start.startswith('FILE:') else start
        for start in args.start or []
    ]
    model, tokenizer, source, _, world, autocast = load(args)
    starts = starts or [default_start(tokenizer)]
    generator = torch.Generator(world.device).manual_seed(args.seed)
    print(
        f'{source}, {model.config.describe()}, {model.parameter_counts()["total"]:,} parameters\n',
        flush=True,
    )

    def write(prompts, show=None):
        with autocast:
            return continue_texts(
                model,
                tokenizer,
                prompts,
                args.max_new_tokens,
                stop=args.stop,
                ignore_eot=args.ignore_eot,
                show=show,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                min_p=args.min_p,
                repetition_penalty=args.repetition_penalty,
                generator=generator,
                compiled=args.compile,
            )

    if args.interactive:
        return chat(
            write,
            tokenizer,
            model.config.block_size,
            args.max_new_tokens,
            ''.join(args.start and starts or []),
        )
    prompts = [encode_prompt(start, tokenizer) for start in starts for _ in range(args.num_samples)]
    check_prompts(prompts, model)
    print(starts[0], end='', flush=True)
    texts = write(prompts, lambda text: print(text, end='', flush=True))
    print('\n' + '-' * 15, flush=True)
    for prompt, text in [*zip([start for start in starts for _ in range(args.num_samples)], texts)][
        1:
    ]:
        print(prompt + text)
        print('-' * 15, flush=True)
    return 0


def chat(
    write: Callable, tokenizer: 'Tokenizer', context: int, max_new_tokens: int, history: str
) -> int:
    """Answer prompts from standard input until it ends."""
    room = context - max_new_tokens
    if room < 1:
        raise UserError(
            f'--max_new_tokens={max_new_tokens} leaves no room for a prompt in a context of'
            f' {context} tokens: type --max_new_tokens={context // 2}'
        )
    print(
        'Type a prompt and Enter; the model goes on from all that stands above. An empty line'
        ' forgets it. Ctrl-D ends.\n'
    )
    while True:
        try:
            line = input('> ')
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        except UnicodeDecodeError:
            print('error: that was not UTF-8')
            continue
        if not line:
            history = ''
            continue
        try:
            ids = encode_prompt(history + line, tokenizer)
        except ValueError as error:  # a character that the tokenizer does not know
            print(f'error: {error}')
            continue
        try:
            history += line + write([ids[-room:]], lambda text: print(text, end='', flush=True))[0]
        except KeyboardInterrupt:
            pass
        print('\n', flush=True)


if __name__ == '__main__':
    imported()
    sys.exit(main())
