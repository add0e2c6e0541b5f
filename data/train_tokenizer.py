"""
A tokenizer of your own text, as a folder that prepare.py, sample.py and export.py take with
--tokenizer.

    python data/train_tokenizer.py --input corpus/ --vocab_size 32000 --output my_tokenizer
    python data/train_tokenizer.py --input corpus/ --kind unigram --vocab_size 8000 --output mine
    python data/own_text/prepare.py --input corpus/ --tokenizer my_tokenizer --output data/mybooks

--kind
    bpe         byte-level BPE as GPT-2's, which can write any text (default)
    unigram     sentencepiece's unigram model, with bytes for characters that it does not know
    sp_bpe      sentencepiece's BPE as LLaMA-2's, likewise

The text is that of .txt, .jsonl, .json.gz, .parquet and so on (onetrain/prepare/documents.py). Of
more than --max_mb of it evenly spaced documents are taken, so that memory stays bounded. The id 0
ends a text in bpe, 2 in the others.
"""

import argparse
import os

from onetrain.command_line import ArgumentParser
from onetrain.config import UserError
from onetrain.prepare import cli, documents
from onetrain.tokenizers.base import load_tokenizer
from onetrain.tokenizers.train import GPT2, PATTERNS, train_bpe, train_sentencepiece


def arguments(argv: list[str]) -> argparse.Namespace:
    """Return the parsed `argv`. Raises UserError."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        '--input', nargs='+', required=True, metavar='PATH', help='files, folders, patterns or URLs'
    )
    parser.add_argument('--output', required=True, metavar='FOLDER', help='of the tokenizer')
    parser.add_argument('--kind', default='bpe', choices=('bpe', 'unigram', 'sp_bpe'))
    parser.add_argument(
        '--vocab_size', type=int, default=32000, help='number of ids, default: 32000'
    )
    parser.add_argument(
        '--pattern',
        default=GPT2,
        choices=tuple(PATTERNS),
        help=(
            'how bpe cuts a text before it merges: as GPT-2, or as LLaMA-3 (numbers by three'
            ' digits)'
        ),
    )
    parser.add_argument(
        '--text_field', default='text', help='where JSON and parquet have the text, default: text'
    )
    parser.add_argument(
        '--max_mb', type=float, default=1000, help='of text that is looked at, default: 1000'
    )
    args = parser.parse_args(argv)
    least = 257 if args.kind == 'bpe' else 300
    if args.vocab_size < least:
        raise UserError(
            f'--vocab_size {args.vocab_size} is too small for 256 bytes and the special tokens:'
            f' type {least} or more'
        )
    if args.vocab_size > 2**24:
        raise UserError(
            f'--vocab_size {args.vocab_size} is more than any text has use for: type {2**24:,} or'
            ' less'
        )
    if not 0 < args.max_mb < 1e9:
        raise UserError(f'--max_mb {args.max_mb} must be above 0 and below 1e9')
    cli.check_output(args.output)
    if args.kind != 'bpe' and args.pattern != GPT2:
        raise UserError(
            f'--pattern {args.pattern} has no meaning with --kind {args.kind}: leave it out'
        )
    return args


def main(argv: list[str] | None = None) -> None:
    """Train and write; argv as in sys.argv[1:]. Raises UserError for what the user got wrong."""
    args = arguments(argv)
    texts = Texts(args.input, args.text_field, args.max_mb * 1e6)
    os.makedirs(args.output, exist_ok=True)
    if args.kind == 'bpe':
        for name, content in train_bpe(texts, args.vocab_size, args.pattern).files.items():
            with open(os.path.join(args.output, name), 'wb') as f:
                f.write(content)
    else:
        train_sentencepiece(texts, args.output, args.kind, args.vocab_size)
    if not texts.bytes:
        raise UserError(f'--input {" ".join(args.input)}: there is no text in these files')
    path = args.output if args.kind == 'bpe' else os.path.join(args.output, 'tokenizer.model')
    tokenizer = load_tokenizer(path)
    seen = ids = 0
    for text in Texts(args.input, args.text_field, min(args.max_mb, 1) * 1e6):
        ids, seen = ids + len(tokenizer.encode(text)), seen + len(text.encode())
    print(
        f'{path}: {tokenizer.vocab_size:,} ids of {texts.bytes / 1e6:,.1f} MB in {texts.count:,}'
        f' documents; {seen / max(1, ids):.2f} bytes per token'
    )
    print(
        f'next: python data/own_text/prepare.py --input {" ".join(args.input)} --tokenizer {path}'
        ' --output data/mine'
    )


class Texts:
    """Iterates over the texts of `inputs`; of more than max_bytes of source evenly spaced ones.
    bytes, count: of what was given out.
    """

    def __init__(self, inputs: list[str], text_field: str, max_bytes: float):
        self.units = list(documents.units_of_files(documents.find_files(inputs)))
        self.text_field = text_field
        self.every = max(1.0, sum(unit.size for unit in self.units) / max_bytes)

    def __iter__(self):
        self.bytes = self.count = 0
        number = wanted = 0.0
        for unit in self.units:
            for row in documents.read(unit, self.text_field):
                if isinstance(row.content, str) and row.content:
                    number += 1
                    if number > wanted:
                        wanted += self.every
                        self.bytes = self.bytes + len(row.content.encode('utf-8', 'replace'))
                        self.count = self.count + 1
                        yield row.content


if __name__ == '__main__':
    cli.run(main)
