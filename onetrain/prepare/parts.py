"""A part: the ids of some MB of a corpus, made by one process in one go and read again when the
data set is put together.

    parts-DIGEST/000000.bin     the ids of all its documents, one behind the other
                 000000.docs    a DOCUMENT for each
                 000000.json    its record, with a checksum of its own, written last: with it
                                the part is finished

Memory holds one document. Whoever makes a part, it is the same.
"""

import collections
import hashlib
import os
import time
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from onetrain.config import UserError
from onetrain.data.token_file import check_ids, token_dtype
from onetrain.files import add_checksum, is_whole, replacing, verify_checksum
from onetrain.prepare import documents

if TYPE_CHECKING:
    from onetrain.prepare.documents import Unit
    from onetrain.tokenizers.base import Tokenizer

# a document, or a piece of one; last: it ends here; hash 0: not to be compared
DOCUMENT = np.dtype([('tokens', '<u8'), ('last', '?'), ('hash', '<u8', 2)])
EVERY_S = 0.2


class Part(NamedTuple):
    """A finished part: its number, the folder where it is, and its record, see make_part()."""

    number: int
    folder: str
    record: dict

    def path(self, kind: str) -> str:
        """Return the path of a file of this part: kind 'bin', 'docs' or 'json'."""
        return part_path(self.folder, self.number, kind)


def part_path(folder: str, index: int, kind: str) -> str:
    """Return the path of a file of part `index`: kind 'bin', 'docs' or 'json'."""
    return os.path.join(folder, f'{index:06d}.{kind}')


def make_part(
    folder: str,
    index: int,
    units: 'list[Unit]',
    tokenizer: 'Tokenizer',
    *,
    text_field: str = 'text',
    limit: int | None = None,
    advance: Callable = lambda done, tokens, texts: None,
) -> dict:
    """Tokenize the `units` of part `index` into `folder`, at most `limit` documents; advance() is
    told now and then of more bytes of source, tokens and documents. Returns the record, a dict:

    tokens, documents, max_id; ids_sha256 (hex) and size of the ids, docs_sha256 and number of
    pieces, of each unit too; encoder of the tokenizer; lines of each unit; rows that are not blank,
    broken ones among them, the first (unit, line, problem) or None; characters that were decoded
    again, those of them that were lost, examples of these; modified: times of the files. Raises
    UserError for a file that cannot be read and for ids beyond the vocabulary.
    """
    dtype = token_dtype({'dtype': 'uint16' if tokenizer.vocab_size <= 2**16 else 'uint32'})
    rows, progress, losses = _Rows(units, text_field), _Progress(advance), _Losses(tokenizer)
    digest, table, pieces = hashlib.sha256(), [], [0] * len(units)
    tokens = texts = max_id = 0
    modified = [_modified(unit.path) for unit in units]
    # the checksum in the record vouches for it, not fsync()
    with replacing(part_path(folder, index, 'bin'), tidy=False) as f:
        for unit, content in rows:
            ids = _ids(unit, content, tokenizer, dtype)
            losses.look(content)
            if len(ids):
                f.write(ids.data)
                digest.update(ids.data)
                max_id = max(max_id, int(ids.max()))
            table.append(len(ids).to_bytes(8, 'little') + bytes([unit.last]) + _key(unit, content))
            pieces[len(rows.lines) - 1] += 1
            tokens, texts = tokens + len(ids), texts + unit.last
            progress(rows.done, tokens, texts)
            if texts == limit:
                break
    progress(sum(unit.size for unit in units), tokens, texts, wait=0)
    docs = b''.join(table)
    with replacing(part_path(folder, index, 'docs'), tidy=False) as f:
        f.write(docs)
    record = {
        'tokens': tokens,
        'documents': texts,
        'pieces': sum(pieces),
        'unit_pieces': pieces,
        'max_id': max_id,
        'size': tokens * dtype.itemsize,
        'ids_sha256': digest.hexdigest(),
        'docs_sha256': hashlib.sha256(docs).hexdigest(),
        'encoder': tokenizer.encoder,
        **rows.record(),
        **losses.record(),
        'modified': modified,
    }
    with replacing(part_path(folder, index, 'json'), tidy=False) as f:
        f.write(add_checksum(record))
    return record


def read_part(folder: str, index: int, units: 'list[Unit] | None' = None) -> 'Part | None':
    """Return the Part `index` in `folder`, or None where it is not whole; with `units`, their files
    must not have changed since either.
    """
    try:
        with open(part_path(folder, index, 'json'), 'rb') as f:
            record = verify_checksum(f.read())
        sizes = [os.path.getsize(part_path(folder, index, kind)) for kind in ('bin', 'docs')]
    except (OSError, ValueError):
        return None
    if not all(
        is_whole(record.get(key))
        for key in (
            'tokens',
            'documents',
            'pieces',
            'max_id',
            'size',
            'rows',
            'broken',
            'characters',
            'lost',
        )
    ):
        return None
    if sum(record.get('unit_pieces', ())) != record['pieces']:
        return None  # of an earlier version
    if sizes != [record['size'], record['pieces'] * DOCUMENT.itemsize]:
        return None
    if units is not None and record.get('modified') != [_modified(unit.path) for unit in units]:
        return None
    whole = all(
        _sha256(part_path(folder, index, kind)) == record.get(key)
        for kind, key in (('bin', 'ids_sha256'), ('docs', 'docs_sha256'))
    )
    return Part(index, folder, record) if whole else None


def _sha256(file):
    digest = hashlib.sha256()
    with open(file, 'rb') as f:
        while block := f.read(2**22):
            digest.update(block)
    return digest.hexdigest()


class _Losses:
    """Counts characters that a tokenizer cannot write: those of a text that are not in it any more
    once its ids are decoded.

    It looks at the first CHARACTERS of each document until ALL of them, then of each EVERY-th.
    Case, accents and compatible forms do not count, nor does white space: what a normalizer changes
    on purpose.
    """

    CHARACTERS, ALL, EVERY, MOST_EXAMPLES = 2000, 64, 8, 8

    def __init__(self, tokenizer):
        self.tokenizer, self.documents = tokenizer, 0
        self.characters = self.lost = 0
        self.examples = ''

    def look(self, content):
        """Count in a document, or a piece of one; ids that were made elsewhere are not looked
        at.
        """
        if isinstance(content, np.ndarray) or self.tokenizer.lossless:
            return
        self.documents += 1
        if self.documents > self.ALL and self.documents % self.EVERY:
            return
        text = content[: self.CHARACTERS]
        missing = _letters(text) - _letters(self.tokenizer.decode(self.tokenizer.encode(text)))
        self.characters, self.lost = self.characters + len(text), self.lost + missing.total()
        self.examples = (self.examples + ''.join(c for c in missing if c not in self.examples))[
            : self.MOST_EXAMPLES
        ]

    def record(self):
        """Return what is kept of the counts."""
        return {
            'characters': self.characters,
            'lost': self.lost,
            'lost_examples': self.examples,
        }


def _letters(text):
    """Return a Counter of the characters of a text, without what normalizers change on purpose."""
    folded = unicodedata.normalize('NFKD', text).casefold()
    return collections.Counter(
        c
        for c in folded
        if not c.isspace() and unicodedata.category(c) not in ('Mn', 'Cc', 'Cf', 'Cn', 'Co')
    )


class _Rows:
    """Iterates over (unit, content) of all rows with content of `units`, and counts what it meets:
    lines of each unit so far, rows that are not blank, broken ones, the first of these as (unit,
    line, problem). done: bytes of source.
    """

    def __init__(self, units, text_field):
        self.units, self.text_field = units, text_field
        self.lines, self.count, self.broken, self.first, self.done = [], 0, 0, None, 0

    def __iter__(self):
        before = 0
        for unit in self.units:
            self.lines.append(0)
            for content, problem, read in documents.read(unit, self.text_field):
                self.lines[-1] += 1
                self.count += content is not None or problem is not None
                self.done = before + min(read, unit.size)
                if problem:
                    self._note(unit, problem)
                elif content is not None and len(content):
                    yield unit, content
            before += unit.size

    def record(self):
        """Return what is kept of the counts."""
        return {
            'lines': self.lines,
            'rows': self.count,
            'broken': self.broken,
            'first': self.first,
        }

    def _note(self, unit, problem):
        self.broken += 1
        self.first = self.first or (len(self.lines) - 1, self.lines[-1], problem)
        if self.broken == self.count == 1000:
            raise UserError(
                '1,000 of 1,000 rows have no text, so nothing was written; the last is in'
                f' {unit.path} ({problem}): correct the file, or name the field that holds the text'
                ' with --text_field'
            )


class _Progress:
    """Tells advance() what was added since it was told last, every EVERY_S seconds."""

    def __init__(self, advance):
        self.advance, self.told, self.at = advance, (0, 0, 0), time.monotonic()

    def __call__(self, *now, wait=EVERY_S):
        if time.monotonic() - self.at >= wait:
            self.advance(*(a - b for a, b in zip(now, self.told)))
            self.told, self.at = now, time.monotonic()


def _ids(unit, content, tokenizer, dtype):
    """Return the ids of a document or a piece of one, with that which ends it; content may be ids
    already.
    """
    made = isinstance(content, np.ndarray)
    try:
        ids = content if made else tokenizer.encode(content)
        ids = (check_ids(ids, tokenizer.vocab_size) if len(ids) else ids).astype(dtype)
    except ValueError as error:
        raise UserError(f'{unit.path}: {error}') from None
    if made or not unit.last or tokenizer.eot_id is None:
        return ids
    return np.concatenate([ids, np.array([tokenizer.eot_id], dtype)])


def _key(unit, content):
    """Return 16 bytes that tell documents apart; zeros for ids and for pieces."""
    if (
        isinstance(content, np.ndarray)
        or not unit.last
        or unit.begin
        and unit.path.lower().endswith(documents.TEXT_ENDINGS)
    ):
        return bytes(16)
    return hashlib.blake2b(content.encode('utf-8', 'replace'), digest_size=16).digest()


def _modified(path):
    return None if documents.is_url(path) else os.stat(path).st_mtime_ns
