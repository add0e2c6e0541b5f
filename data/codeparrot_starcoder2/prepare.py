"""
CodeParrot-clean, Python files of GitHub, in StarCoder2's tokens (49152).

    hf download bigcode/starcoder2-3b --include "tokenizer*" --local-dir starcoder2_tokenizer
    python data/codeparrot_starcoder2/prepare.py  # from the Hugging Face hub, 54 .json.gz files
    python data/codeparrot_starcoder2/prepare.py --input FOLDER  # from its files on this machine
    python train.py config/moe_60m.py

Every 2000th document is val. Each is closed by the tokenizer's eos, <|endoftext|>.
"""

import os

from onetrain.prepare import cli

FOLDER = os.path.dirname(os.path.abspath(__file__))


def main(argv: list[str] | None = None) -> None:
    """Prepare the data set; argv as in sys.argv[1:]. Raises UserError for what the user got
    wrong.
    """
    parser = cli.corpus_parser(
        __doc__,
        FOLDER,
        source=['hf://datasets/codeparrot/codeparrot-clean'],
        tokenizer='starcoder2_tokenizer',
        text_field='content',
        val_fraction=0.0005,
    )
    cli.prepare_corpus(
        parser.parse_args(argv),
        FOLDER,
        tokenizer_from='bigcode/starcoder2-3b',
        eot='<|endoftext|>',
        config='config/moe_60m.py',
    )


if __name__ == '__main__':
    cli.run(main)
