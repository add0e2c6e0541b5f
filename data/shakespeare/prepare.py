"""
Tiny Shakespeare in GPT-2's tokens: nanoGPT's data set for finetuning (301,966 and 36,059 tokens),
one text without an end of text.

    python data/shakespeare/prepare.py
    python train.py config/finetune_shakespeare.py
"""

import os

from onetrain.data.token_file import TokenFileWriter
from onetrain.prepare import cli, tinyshakespeare
from onetrain.tokenizers.base import load_tokenizer

FOLDER = os.path.dirname(os.path.abspath(__file__))


def main(argv: list[str] | None = None):
    """Prepare the data set; argv as in sys.argv[1:]. Raises UserError for what the user got
    wrong.
    """
    parser = cli.argument_parser(__doc__, FOLDER)
    tinyshakespeare.add_input(parser)
    parser.add_argument(
        '--tokenizer', default='gpt2', help='gpt2 unless given; see onetrain/tokenizers/base.py'
    )
    args = parser.parse_args(argv)

    tokenizer = load_tokenizer(args.tokenizer)
    train, val = tinyshakespeare.read(args.input, args.output)
    with TokenFileWriter(
        args.output,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer=tokenizer,
        split=tinyshakespeare.SPLIT,
    ) as writer:
        writer.write('train', tokenizer.encode(train))
        writer.write('val', tokenizer.encode(val))
    cli.report(writer, FOLDER, 'config/finetune_shakespeare.py')


if __name__ == '__main__':
    cli.run(main)
