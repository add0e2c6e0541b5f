"""
Text of your own as a data set: .txt, .jsonl (also .jsonl.gz, and .json with an object on each line) and .parquet files.

    python data/own_text/prepare.py --input book.txt --tokenizer char
    python data/own_text/prepare.py --input corpus/ 'more/*.jsonl' --tokenizer gpt2 --output data/mybooks
    python train.py config/own_text.py --dataset=mybooks

--tokenizer: char, bytes, a tiktoken encoding (gpt2, cl100k_base, ...), a Hugging Face folder with a tokenizer.json, or a
sentencepiece .model file. The data set keeps what it needs of it.

A JSON line or a parquet row is a document, and every k-th, k = round(1 / val_fraction), goes to val. A .txt is one document
whose last val_fraction goes to val, cut at a line end where one is near. Documents are closed by the tokenizer's end of text
where it has one. A .txt of up to 16 MB is tokenized whole; a larger one in pieces that end at line ends. Nothing is held in
memory but the piece at hand. Rows without a text are left out and counted; more than 1 % of them stop the run.
"""
import os
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(FOLDER)))

from data import command
from data.documents import DocumentReader, find_files, write_pieces
from data.tokenfile import TokenFileWriter
from data.tokenizer import load_tokenizer


def main(argv=None):
    """Prepare the data set; argv as in sys.argv[1:]. Raises ValueError for what the user got wrong."""
    parser = command.argument_parser(__doc__, FOLDER)
    parser.add_argument('--input', nargs='+', required=True, metavar='PATH', help='files, folders or patterns')
    parser.add_argument('--tokenizer', default='gpt2', help='char, bytes, a tiktoken name, a folder or a .model file, default: gpt2')
    parser.add_argument('--text_field', default='text', help='where .jsonl and .parquet have the text, default: text')
    parser.add_argument('--val_fraction', type=float, default=0.05, help='share that goes to val, default: 0.05')
    args = parser.parse_args(argv)
    if not 0 < args.val_fraction <= 0.5:
        raise ValueError(f'--val_fraction {args.val_fraction} is not a share for val: type a number above 0 and up to 0.5')
    files = find_files(args.input)

    def read(activity):
        return DocumentReader(files, val_every=round(1 / args.val_fraction), txt_val_fraction=args.val_fraction,
                              text_field=args.text_field, activity=activity)

    reader = read('tokenizing')
    tokenizer = load_tokenizer(args.tokenizer, (piece.text for piece in read('collecting characters')))
    split = (f'every {reader.val_every}th line of .jsonl and row of .parquet is val, and the last {args.val_fraction:g} of each .txt, '
             f'cut at a line end where one is near')
    extra = {'stoi': tokenizer.stoi, 'itos': tokenizer.itos} if args.tokenizer == 'char' else {}
    with TokenFileWriter(args.output, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id, tokenizer=tokenizer,
                         split=split, extra=extra) as writer:
        write_pieces(writer, reader, tokenizer)
        tokens = writer.meta['tokens']
        if not tokens['train'] + tokens['val']:
            raise ValueError(f"--input {' '.join(args.input)}: there is no text in {'this file' if len(files) == 1 else 'these files'}")
        if not tokens['val']:
            raise ValueError(f'{reader.documents:,} documents are too few for every {reader.val_every}th to go to val: '
                             f'give more, or type a larger share, such as --val_fraction 0.5')
    if reader.broken:
        print(reader.left_out())
    if tokenizer.eot_id is None and args.tokenizer != 'char':
        print(f'{args.tokenizer} names no end of text, so documents follow each other without one')
    command.report(writer, FOLDER, 'config/own_text.py')


if __name__ == '__main__':
    command.run(main)
