"""Documents out of a user's files, a piece at a time, so that memory does not grow with the corpus.

    .txt                               one document, UTF-8; every kind of line end reads as a newline
    .jsonl, .json (either also .gz)    a JSON object on each line; its `text_field` is a document
    .parquet                           a row is a document, in the column `text_field`

A document goes to train or val whole, every k-th to val, or a .txt is cut in two. A .txt of up to WHOLE_BYTES is one
piece, so that its ids are those that the tokenizer's own library gives for that text (for which Hugging Face's takes
140 bytes of memory per byte of text); a larger one comes in pieces of about PIECE_BYTES that end at line ends.
"""
import codecs
import glob
import gzip
import io
import json
import os
import zlib
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

WHOLE_BYTES = 16 * 2**20
PIECE_BYTES = 16 * 2**20
LINE_BYTES = 2**20  # how far beyond that a piece reaches for its line end

JSON_ENDINGS = ('.jsonl', '.json', '.jsonl.gz', '.json.gz')
FOLDER_ENDINGS = ('.txt', '.jsonl', '.jsonl.gz', '.parquet')  # a .json in a folder is more often a tokenizer's than a corpus


class Piece(NamedTuple):
    """A document, or a part of one: the split it goes to, its text, and whether the document ends here (in this split)."""
    split: str
    text: str
    last: bool


def find_files(inputs):
    """The files that `inputs` (paths of files and folders, glob patterns) stand for, each once, in that order; a folder's sorted.

    Raises ValueError for an input that stands for no file, and for a file of no known kind.
    """
    found = []
    for given in inputs:
        if os.path.isdir(given):
            here = [os.path.join(folder, name) for folder, _, names in os.walk(given) for name in names
                    if name.lower().endswith(FOLDER_ENDINGS) and not name.startswith('.')]
            if not here:
                raise ValueError(f'--input {given}: this folder holds no {", ".join(FOLDER_ENDINGS[:-1])} or {FOLDER_ENDINGS[-1]} file')
        else:
            here = [given] if os.path.isfile(given) else [path for path in glob.glob(given, recursive=True) if os.path.isfile(path)]
            if not here:
                raise ValueError(f'--input {given}: there is no such file or folder, and no file matches it as a pattern')
        for path in here:
            if not path.lower().endswith(('.txt', '.parquet', *JSON_ENDINGS)):
                raise ValueError(f'--input {path}: expected .txt, .parquet, {", ".join(JSON_ENDINGS)}; rename it if it is one of these')
        found += sorted(here)
    return list(dict.fromkeys(found))


class DocumentReader:
    """Iterates over the pieces of `files`; each iteration reads them again from the start.

    val_every: every val_every-th document goes to val.
    txt_val_fraction: the share of each .txt that goes to val, its end, cut at a line end where one is near;
        None: a .txt counts as one document like the others.
    text_field: where a JSON object or a parquet row has its text.
    activity: what the progress bar on the terminal says; it counts bytes of the files.

    A JSON line or a row without a text is left out and counted in `broken` (of `rows`); `first_broken` names the first.
    Raises ValueError at the end of the iteration where these are more than 1 %, or after 1000 rows when all are; and for
    a file that is damaged, not UTF-8, or without the column.
    """

    def __init__(self, files, *, val_every, txt_val_fraction=None, text_field='text', activity='tokenizing'):
        self.files, self.val_every, self.txt_val_fraction = files, val_every, txt_val_fraction
        self.text_field, self.activity = text_field, activity

    def __iter__(self):
        self.documents = self.rows = self.broken = 0
        self.first_broken = None
        sizes = {path: os.path.getsize(path) for path in self.files}
        with tqdm(total=sum(sizes.values()), unit='B', unit_scale=True, desc=self.activity, disable=None) as bar:
            before = 0
            for path, size in sizes.items():
                for piece, read in self._txt(path) if path.lower().endswith('.txt') else self._rows(path):
                    yield piece
                    bar.update(before + read - bar.n)
                before += size
                bar.update(before - bar.n)
        if self.broken * 100 > self.rows:
            self._refuse()

    def left_out(self):
        """What was left out of the last iteration, in one sentence, or ''."""
        if not self.broken:
            return ''
        return f'{self.broken:,} of {self.rows:,} rows have no text and were left out, the first is {self.first_broken}'

    def _refuse(self):
        raise ValueError(f'{self.broken:,} of {self.rows:,} rows have no text, more than 1 %, so nothing was written; the first is '
                         f'{self.first_broken}: correct the file, or name the field that holds the text with --text_field')

    def _next_split(self):
        self.documents += 1
        return 'train' if self.documents % self.val_every else 'val'

    def _rows(self, path):
        unit, rows = ('row', _parquet_rows) if path.lower().endswith('.parquet') else ('line', _json_rows)
        for number, text, problem, read in rows(path, self.text_field):
            self.rows += 1
            if problem:
                self.broken += 1
                self.first_broken = self.first_broken or f'{path} {unit} {number:,} ({problem})'
                if self.broken == self.rows == 1000:
                    self._refuse()
            elif text:
                yield Piece(self._next_split(), text, True), read

    def _txt(self, path):
        size = os.path.getsize(path)
        with open(path, 'rb') as f:
            start = 3 if f.read(3) == codecs.BOM_UTF8 else 0
            if self.txt_val_fraction is None:
                parts = [(self._next_split(), start, size)]
            else:
                cut = _near_line_end(f, start, size, self.txt_val_fraction)
                parts = [('train', start, cut), ('val', cut, size)]
            for split, begin, end in parts:
                for text in _pieces(f, begin, end, WHOLE_BYTES if size <= WHOLE_BYTES else PIECE_BYTES):
                    yield Piece(split, text, f.tell() == end), f.tell()


def write_pieces(writer, pieces, tokenizer):
    """Tokenize `pieces` (of Piece) into a TokenFileWriter, each document closed by the tokenizer's eot_id where it has one."""
    for split, text, last in pieces:
        ids = tokenizer.encode(text)
        if last and tokenizer.eot_id is not None:
            ids = np.append(ids, np.uint32(tokenizer.eot_id))
        writer.write(split, ids, ends_document=last)


def _near_line_end(f, start, size, fraction):
    """Where the last `fraction` of the bytes start .. size begins: after the nearest newline, or else at a character."""
    cut = start + int((size - start) * (1 - fraction))
    near = min(4096, (size - cut) // 2)
    before = max(start, cut - near)
    f.seek(before)
    ends = [before + i + 1 for i, byte in enumerate(f.read(cut + near - before)) if byte == ord('\n')]
    if ends:
        return min(ends, key=lambda end: abs(end - cut))
    f.seek(cut)
    while cut < size and f.read(1)[0] & 0xC0 == 0x80:  # inside a UTF-8 character
        cut += 1
    return cut


def _pieces(f, begin, end, piece_bytes):
    """The text of the bytes begin .. end, in pieces of `piece_bytes` and what is left of the last line."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder('utf-8')(), translate=True)
    f.seek(begin)
    while (at := f.tell()) < end:
        content = f.read(min(piece_bytes, end - at))
        content += f.readline(min(LINE_BYTES, end - f.tell()))
        try:
            yield decoder.decode(content, final=f.tell() == end)
        except UnicodeDecodeError as error:
            raise ValueError(f'{f.name} is not UTF-8 (byte 0x{error.object[error.start]:02x} at or near {at + error.start:,}): '
                             f'convert it, for instance with `iconv -f latin1 -t utf-8`') from None


def _json_rows(path, field):
    """(line number, text or None, problem or None, bytes of the file read so far) for each line that is not blank."""
    with open(path, 'rb') as raw, gzip.open(raw) if path.lower().endswith('.gz') else raw as f:
        number = 0
        try:
            for line in f:
                number += 1
                if line.strip():
                    yield number, *_text_of(line, field), raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f'{path} is damaged after line {number:,} ({error}): fetch it again') from None


def _text_of(line, field):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return None, f'no JSON object on one line: {error}'
    if not isinstance(row, dict):
        return None, f'no JSON object but a {type(row).__name__}'
    text = row.get(field)
    if not isinstance(text, str):
        return None, f'{field!r} is a {type(text).__name__}' if field in row else f'no field {field!r}, only {", ".join(list(row)[:9])}'
    # JSON can spell out half a surrogate pair, which no tokenizer takes
    return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace'), None


def _parquet_rows(path, field):
    """The same for the rows of a parquet file."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f'{path} needs the library pyarrow, which is not installed: type `pip install pyarrow`') from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise ValueError(f'{path} cannot be read as parquet ({error}): fetch it again') from None
    with file:
        if field not in file.schema_arrow.names:
            raise ValueError(f'{path} has no column {field!r}: name one of {", ".join(file.schema_arrow.names)} with --text_field')
        size, total, number = os.path.getsize(path), file.metadata.num_rows, 0
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            for text in batch.column(0).to_pylist():
                number += 1
                problem = None if isinstance(text, str) else f'{field!r} is a {type(text).__name__}'
                yield number, text, problem, size * number // total
