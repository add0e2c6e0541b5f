"""The text of tiny Shakespeare, for the two data sets made of it."""

import http.client
import os
import urllib.request
from typing import TYPE_CHECKING

from onetrain.config import UserError
from onetrain.files import replacing

if TYPE_CHECKING:
    from onetrain.command_line import ArgumentParser

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SPLIT = 'the last 10 % of the characters are val'


def add_input(parser: 'ArgumentParser') -> None:
    """Give `parser` the option --input that read() takes."""
    parser.add_argument(
        '--input',
        metavar='FILE',
        help='a local text, default: input.txt in the output folder, downloaded if it is not there',
    )


def read(file: str | None, folder: str) -> tuple:
    """Return (train text, val text): of `file`, or where that is None of `folder`/input.txt,
    downloaded if missing.

    90 % and 10 % of the characters, as nanoGPT splits them. Raises UserError when there is no
    text.
    """
    path = os.path.join(folder, 'input.txt') if file is None else file
    if file is None and not os.path.exists(path):
        _download(path)
    if not os.path.isfile(path):
        raise UserError(f'--input {path}: there is no such file')
    try:
        with open(path, encoding='utf-8') as f:
            text = f.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f'--input {path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at'
            f' {error.start:,}): convert it, for instance with `iconv -f latin1 -t utf-8`'
        ) from None
    cut = int(len(text) * 0.9)
    return text[:cut], text[cut:]


def _download(path):
    print(f'downloading {URL}')
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f'{URL} could not be downloaded ({error}): put the file at {path}, or name it with'
            ' --input FILE'
        ) from None
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with replacing(path) as f:
        f.write(content)
