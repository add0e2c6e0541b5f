"""
Prepare text of your own as a data set.

    python data/own_text/prepare.py --input book.txt --tokenizer char
    python data/own_text/prepare.py --input corpus/ 'more/*.jsonl' \\
        --tokenizer gpt2 --output data/mybooks
    python data/own_text/prepare.py --input s3://bucket/corpus \\
        --tokenizer ./my_tokenizer --output data/mybooks
    python train.py config/own_text.py --dataset=mybooks

It reads .txt, .md, .jsonl, .json with an object on each line (both also .gz
and .zst) and .parquet files. --tokenizer takes char, bytes, a tiktoken
encoding (gpt2, cl100k_base, ...), a Hugging Face folder with a
tokenizer.json, or a sentencepiece .model file; data/train_tokenizer.py makes
one of your text. The data set keeps what it needs of it.

A JSON line or a parquet row is a document, and every k-th,
k = round(1 / val_fraction), goes to val. A .txt is one document whose last
val_fraction goes to val, cut at a line end where one is near. Documents are
closed by the tokenizer's end of text where it has one. A .txt of up to 4 MB
is tokenized whole; a larger one in pieces that end at line ends. Rows
without a text are left out and counted; more than 1 % of them stop the run.
"""

import os

from onetrain.prepare import cli

FOLDER = os.path.dirname(os.path.abspath(__file__))


def main(argv: list[str] | None = None) -> None:
    """Prepare the data set; argv as in sys.argv[1:]. Raises UserError for what the user got
    wrong.
    """
    parser = cli.corpus_parser(__doc__, FOLDER, val_fraction=0.05)
    cli.prepare_corpus(parser.parse_args(argv), FOLDER, cut_txt=True, config='config/own_text.py')


if __name__ == '__main__':
    cli.run(main)
