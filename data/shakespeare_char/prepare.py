"""
Tiny Shakespeare as characters: nanoGPT's data set, with its vocabulary of 65 and its split
(1,003,854 and 111,540 tokens).

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char.py
"""

import os

from onetrain.data.token_file import TokenFileWriter
from onetrain.prepare import cli, tinyshakespeare
from onetrain.tokenizers.base import load_tokenizer

FOLDER = os.path.dirname(os.path.abspath(__file__))


def main(argv: list[str] | None = None) -> None:
    """Prepare the data set; argv as in sys.argv[1:]. Raises UserError for what the user got
    wrong.
    """
    parser = cli.argument_parser(__doc__, FOLDER)
    tinyshakespeare.add_input(parser)
    args = parser.parse_args(argv)

    train, val = tinyshakespeare.read(args.input, args.output)
    tokenizer = load_tokenizer('char', [train, val])
    with TokenFileWriter(
        args.output,
        vocab_size=tokenizer.vocab_size,
        eot_id=None,
        tokenizer=tokenizer,
        split=tinyshakespeare.SPLIT,
        extra={'stoi': tokenizer.stoi, 'itos': tokenizer.itos},
    ) as writer:
        writer.write('train', tokenizer.encode(train))
        writer.write('val', tokenizer.encode(val))
    cli.report(writer, FOLDER, 'config/train_shakespeare_char.py')


if __name__ == '__main__':
    cli.run(main)
