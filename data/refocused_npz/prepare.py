"""
A corpus that was tokenized before: tokenized_cleaned_*.npz files with an array input_ids of
integers.

    python data/refocused_npz/prepare.py --input FOLDER --tokenizer gpt2
    python data/refocused_npz/prepare.py --input s3://BUCKET/PREFIX --tokenizer ./my_tokenizer

--tokenizer is the one that made the ids: it says how many there are and which one ends a text.
A row of a two-dimensional array is a document, or all of a one-dimensional one; ids are taken as
they are, each once, without windows that overlap, and no end of text is added. Every 200th
document is val.
"""

import os

from onetrain.prepare import cli

FOLDER = os.path.dirname(os.path.abspath(__file__))


def main(argv: list[str] | None = None) -> None:
    """Prepare the data set; argv as in sys.argv[1:]. Raises UserError for what the user got
    wrong.
    """
    parser = cli.corpus_parser(__doc__, FOLDER, val_fraction=0.005)
    cli.prepare_corpus(parser.parse_args(argv), FOLDER, endings=('.npz',))


if __name__ == '__main__':
    cli.run(main)
