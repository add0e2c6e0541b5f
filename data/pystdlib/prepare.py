"""
Prepare the source of Python's standard library, without a network.

A byte-level BPE is trained on the library that is installed here, and kept
in tokenizer/. Every file is a document, in the order of the paths, and every
20th goes to val. Tests, tables and installers are left out; 8 to 9 MB of
source are left.

    python data/pystdlib/prepare.py
    python train.py config/demo_pystdlib.py
"""

import os
import sys
import sysconfig
import tokenize

from onetrain.data.token_file import TokenFileWriter
from onetrain.prepare import cli
from onetrain.tokenizers.train import train_bpe

FOLDER = os.path.dirname(os.path.abspath(__file__))

VAL_EVERY = 20
# tests, data in the shape of source, other projects' code that is bundled, and what belongs to this
# installation
LEFT_OUT_FOLDERS = {
    '__pycache__',
    'site-packages',
    'dist-packages',
    'test',
    'tests',
    'idle_test',
    'idlelib',
    'lib2to3',
    'encodings',
    'ensurepip',
    '_bundled',
    'pydoc_data',
    'turtledemo',
    'lib-dynload',
    '__phello__',
}
LEFT_OUT_FILES = ('_sysconfigdata', '_sysconfig_vars', '__phello__')


def source_files(root: str) -> list[str]:
    """Return paths of the .py files below `root` that are read, relative to it, sorted."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if name not in LEFT_OUT_FOLDERS and not name.startswith('config-')
        ]
        paths += [
            os.path.relpath(os.path.join(folder, name), root)
            for name in names
            if name.endswith('.py') and not name.startswith(LEFT_OUT_FILES)
        ]
    return sorted(paths)


def read_documents(root: str) -> list[tuple]:
    """Return (split, text) of every source file that is not empty."""
    documents = []
    for path in source_files(root):
        with tokenize.open(os.path.join(root, path)) as f:  # obeys the coding cookie
            text = f.read()
        if text:
            documents.append(
                ('val' if len(documents) % VAL_EVERY == VAL_EVERY - 1 else 'train', text)
            )
    return documents


def main(argv: list[str] | None = None) -> None:
    """Prepare the data set; argv as in sys.argv[1:]. Raises UserError for what the user got
    wrong.
    """
    parser = cli.argument_parser(__doc__, FOLDER)
    parser.add_argument(
        '--vocab_size',
        type=int,
        default=2048,
        help='of the tokenizer that is trained, default: 2048',
    )
    args = parser.parse_args(argv)

    documents = read_documents(sysconfig.get_paths()['stdlib'])
    tokenizer = train_bpe([text for split, text in documents if split == 'train'], args.vocab_size)
    version = '.'.join(map(str, sys.version_info[:3]))
    with TokenFileWriter(
        args.output,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer=tokenizer,
        split=f'every {VAL_EVERY}th file is val',
        extra={'source': f'standard library of Python {version}'},
    ) as writer:
        for split, text in documents:
            writer.write(split, [*tokenizer.encode(text).tolist(), tokenizer.eot_id])
    cli.report(writer, FOLDER, 'config/demo_pystdlib.py')


if __name__ == '__main__':
    cli.run(main)
