"""
C4, the English part, in StarCoder2's tokens (49152), with its own validation split.

    hf download bigcode/starcoder2-3b --include "tokenizer*" --local-dir starcoder2_tokenizer
    python data/c4_starcoder2/prepare.py                              # from the Hugging Face hub
    python data/c4_starcoder2/prepare.py --input FOLDER  # from its files on this machine
    python train.py config/moe_60m.py --dataset=c4_starcoder2

Each document is closed by the tokenizer's eos, <|endoftext|>.
"""

import os

from onetrain.prepare import cli

FOLDER = os.path.dirname(os.path.abspath(__file__))


def main(argv: list[str] | None = None) -> None:
    """Prepare the data set; argv as in sys.argv[1:]. Raises UserError for what the user got
    wrong.
    """
    parser = cli.corpus_parser(
        __doc__, FOLDER, source=['hf://datasets/allenai/c4/en'], tokenizer='starcoder2_tokenizer'
    )
    cli.prepare_corpus(
        parser.parse_args(argv),
        FOLDER,
        published=True,
        tokenizer_from='bigcode/starcoder2-3b',
        eot='<|endoftext|>',
    )


if __name__ == '__main__':
    cli.run(main)
