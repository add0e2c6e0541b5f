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

The text is that of .txt, .jsonl, .json.gz, .parquet and so on (data/documents.py). Of more than
--max_mb of it evenly spaced documents are taken, so that memory stays bounded. The id 0 ends a text
in bpe, 2 in the others.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if __name__ == '__main__':
    sys.path[0] = ROOT  # where data and engine are

# First: until main() takes over, a Ctrl-C ends the process quietly
from data import command, documents  # noqa: E402

# isort: split

import errno  # noqa: E402
import json  # noqa: E402

from data.tokenizer import EOT, HuggingFaceTokenizer, load_tokenizer  # noqa: E402
from engine.command_line import ArgumentParser  # noqa: E402

GPT2, LLAMA3 = 'gpt2', 'llama3'
PATTERNS = {
    GPT2: None,
    LLAMA3: (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
    ),
}


def main(argv=None):
    """Train and write; argv as in sys.argv[1:]. Raises ValueError for what the user got wrong."""
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
        raise ValueError(
            f'--vocab_size {args.vocab_size} is too small for 256 bytes and the special tokens:'
            f' type {least} or more'
        )
    if args.vocab_size > 2**24:
        raise ValueError(
            f'--vocab_size {args.vocab_size} is more than any text has use for: type {2**24:,} or'
            ' less'
        )
    if not 0 < args.max_mb < 1e9:
        raise ValueError(f'--max_mb {args.max_mb} must be above 0 and below 1e9')
    command.check_output(args.output)
    if args.kind != 'bpe' and args.pattern != GPT2:
        raise ValueError(
            f'--pattern {args.pattern} has no meaning with --kind {args.kind}: leave it out'
        )
    texts = Texts(args.input, args.text_field, args.max_mb * 1e6)
    os.makedirs(args.output, exist_ok=True)
    if args.kind == 'bpe':
        for name, content in train_bpe(texts, args.vocab_size, args.pattern).files.items():
            with open(os.path.join(args.output, name), 'wb') as f:
                f.write(content)
    else:
        train_sentencepiece(texts, args)
    if not texts.bytes:
        raise ValueError(f'--input {" ".join(args.input)}: there is no text in these files')
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

    def __init__(self, inputs, text_field, max_bytes):
        self.units = list(documents.units_of_files(documents.find_files(inputs)))
        self.text_field, self.every = (
            text_field,
            max(1.0, sum(unit.size for unit in self.units) / max_bytes),
        )

    def __iter__(self):
        self.bytes = self.count = 0
        number = wanted = 0.0
        for unit in self.units:
            for row in documents.read(unit, self.text_field):
                if isinstance(row.content, str) and row.content:
                    number += 1
                    if number > wanted:
                        wanted += self.every
                        self.bytes, self.count = (
                            self.bytes + len(row.content.encode('utf-8', 'replace')),
                            self.count + 1,
                        )
                        yield row.content


def train_bpe(texts, vocab_size, pattern=GPT2):
    """A HuggingFaceTokenizer: byte-level BPE of `texts` with `vocab_size` ids, of which 0 ends a
    text. Raises ValueError for a size below 257.
    """
    if vocab_size < 257:
        raise ValueError(
            f'--vocab_size {vocab_size} is too small for 256 bytes and the end of text: type 257 or'
            ' more'
        )
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError(
            'byte-level BPE is trained with the library tokenizers, which is not installed: type'
            ' `pip install tokenizers`'
        ) from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if PATTERNS[pattern]:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERNS[pattern]), 'isolated'),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=sys.stderr.isatty(),
        ),
    )
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'eos_token': EOT,
        'clean_up_tokenization_spaces': False,
    }
    return HuggingFaceTokenizer(
        {
            'tokenizer.json': tokenizer.to_str(pretty=True).encode(),
            'tokenizer_config.json': json.dumps(config, indent=2).encode(),
        },
        'the tokenizer trained here',
    )


def train_sentencepiece(texts, args):
    import sentencepiece

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split('\n') if line.strip()),
            model_prefix=os.path.join(args.output, 'tokenizer'),
            model_type='unigram' if args.kind == 'unigram' else 'bpe',
            vocab_size=args.vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name='identity',
            remove_extra_whitespaces=False,
            split_digits=args.kind == 'sp_bpe',
            max_sentence_length=2**20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        text = ' '.join(str(error).split())
        advice = (
            'a larger'
            if 'smaller than required' in text or 'Increase vocab_size' in text
            else 'a smaller'
        )
        raise ValueError(
            f'sentencepiece cannot make {args.vocab_size} pieces of this text ({text[-200:]}): type'
            f' {advice} --vocab_size'
        ) from None
    # the library does not say that a disk is full
    with open(os.path.join(args.output, 'tokenizer.model'), 'rb') as f:
        os.fsync(f.fileno())
    if not os.path.getsize(os.path.join(args.output, 'tokenizer.model')):
        raise OSError(
            errno.ENOSPC,
            'the model could not be written',
            os.path.join(args.output, 'tokenizer.model'),
        )


if __name__ == '__main__':
    command.run(main)
