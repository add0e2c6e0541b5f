"""
OpenWebText in GPT-2's tokens, as nanoGPT prepares it: about 9.04 B tokens for train (17 GB) and 4.4
M for val.

    # from the Hugging Face hub: 54 GB in its cache, needs `datasets`
    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --input FOLDER  # from local .parquet, .jsonl or .txt files
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

From the hub, `train_test_split(test_size=0.0005, seed=2357, shuffle=True)` makes val, so train.bin
and val.bin are nanoGPT's. From local files every 2000th document is val, and the order is that of
the files. Each document is closed by <|endoftext|>.
"""

import os
from typing import TYPE_CHECKING

from onetrain.config import UserError
from onetrain.data.token_file import TokenFileWriter
from onetrain.prepare import cli
from onetrain.tokenizers.base import load_tokenizer

if TYPE_CHECKING:
    from onetrain.tokenizers.base import Tokenizer

FOLDER = os.path.dirname(os.path.abspath(__file__))


def write_hub(
    writer: TokenFileWriter, tokenizer: 'Tokenizer', revision: str | None, num_proc: int
) -> None:
    """Tokenize the hub's data set in `num_proc` processes and write it."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            'the library datasets, which fetches OpenWebText, is not installed: type `pip install'
            ' datasets`, or name local files with --input'
        ) from None
    try:
        dataset = datasets.load_dataset('openwebtext', revision=revision, num_proc=num_proc)
    except RuntimeError as error:
        raise UserError(
            f'this version of datasets refused OpenWebText ({error}): type'
            ' --revision=refs/convert/parquet, or name local files with --input'
        ) from None
    splits = dataset['train'].train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    splits['val'] = splits.pop('test')

    def tokenize(row):
        return {
            'ids': [
                *tokenizer.encode(row['text']).tolist(),
                *([] if tokenizer.eot_id is None else [tokenizer.eot_id]),
            ]
        }

    for split, rows in splits.items():
        tokenized = rows.map(
            tokenize, remove_columns=['text'], num_proc=num_proc, desc=f'tokenizing {split}'
        )
        for batch in tokenized.iter(batch_size=1000):
            for ids in batch['ids']:
                writer.write(split, ids)


def main(argv: list[str] | None = None):
    """Prepare the data set; argv as in sys.argv[1:]. Raises UserError for what the user got
    wrong.
    """
    parser = cli.corpus_parser(__doc__, FOLDER, source=[], val_fraction=0.0005)
    parser.add_argument(
        '--revision',
        help=(
            "of the hub's data set; refs/convert/parquet for versions of datasets that run no"
            ' scripts'
        ),
    )
    args = parser.parse_args(argv)
    if args.input or args.merge:
        if args.revision:
            raise UserError('--revision has no meaning with --input: leave it out')
        return cli.prepare_corpus(args, FOLDER, config='config/train_gpt2.py')
    for option in ('text_field', 'val_fraction', 'limit', 'dedup', 'max_broken', 'shard'):
        if getattr(args, option) != parser.get_default(option):
            raise UserError(f'--{option} has no meaning without --input: leave it out')
    tokenizer = load_tokenizer(args.tokenizer)
    with TokenFileWriter(
        args.output,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer=tokenizer,
        split='train_test_split(test_size=0.0005, seed=2357, shuffle=True)',
    ) as writer:
        write_hub(writer, tokenizer, args.revision, args.num_proc or 8)
    cli.report(writer, FOLDER, 'config/train_gpt2.py')


if __name__ == '__main__':
    cli.run(main)
