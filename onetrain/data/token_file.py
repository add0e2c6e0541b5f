"""Token files: the format that every prepare.py writes and the trainer reads.

A data set is a folder with `train.bin` and `val.bin` (token ids, raw little-endian, uint16 where
every possible id fits and uint32 where not) and `meta.pkl`, a dict of plain builtins:

    vocab_size    number of ids, added tokens included
    dtype         'uint16' | 'uint32'
    eot_id        id that ends a document, or None
    tokenizer     {'kind': ..., ...}, see tokenizers/base.py
    tokens        {'train': int, 'val': int}
    documents     the same, in documents
    max_id        {'train': int, 'val': int}, largest id seen
    split         one sentence: what went to val
    encoder       where it is not the tokenizer's own: the library that gave the ids, with its
                  version (tokenizers/fast_bpe.py)
    fingerprint   {'train': hex, 'val': hex}, see fingerprint()
    ends          {'train': 'train.ends', 'val': 'val.ends'}: files of how many tokens of the split
                  there are up to the end of each document, raw little-endian uint64
    files         only where a split lies in several files, which are read as one:
                  {'train': [('train_000000.bin', tokens), ...], 'val': [...]}

`meta.pkl` is optional when reading: nanoGPT's files have none, or one without a dtype, and mean
uint16. Only numpy is needed here, so the trainer can read data on a machine without any tokenizer
library.
"""

import contextlib
import hashlib
import io
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from onetrain.files import check_regular, inside, is_whole, no_link, refuse_deep_pickle

if TYPE_CHECKING:
    from onetrain.tokenizers.base import Tokenizer

SPLITS = ('train', 'val')


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, strings, bytes and numbers, and nothing that could run code."""

    allowed = {'set', 'frozenset', 'complex', 'bytearray'}

    def find_class(self, module, name):
        if module == 'builtins' and name in self.allowed:
            return getattr(__import__('builtins'), name)
        raise pickle.UnpicklingError(
            f'meta.pkl asks for {module}.{name}; only builtin containers, strings and numbers are'
            ' admitted'
        )


def read_meta(folder: str) -> dict:
    """Return the dict in `folder`/meta.pkl, or {} where there is no such file.

    Raises ValueError for a file that is no plain pickle, and for an entry that is not what the
    table above says.
    """
    path = os.path.join(folder, 'meta.pkl')
    if not os.path.lexists(path):
        return {}
    check_regular(path)
    try:
        with open(path, 'rb') as f:
            content = f.read()
        refuse_deep_pickle(content)
        meta = _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f'{path} cannot be read: {error}') from None
    if not isinstance(meta, dict):
        raise ValueError(f'{path} holds a {type(meta).__name__}, expected a dict')
    for key, (test, expected) in _ENTRIES.items():
        if key in meta and not test(meta[key]):
            raise ValueError(
                f'{path}: {key} is {repr(meta[key])[:60]}, expected {expected}: run the prepare.py'
                ' of this data set again'
            )
    if ('stoi' in meta) != ('itos' in meta):
        raise ValueError(
            f'{path} has only one of stoi and itos: run the prepare.py of this data set again'
        )
    for files in meta.get('files', {}).values():
        for name, _ in files:
            inside(folder, name, path)
    for name in (
        *meta.get('ends', {}).values(),
        *([meta['tokenizer']['path']] if _has_path(meta.get('tokenizer')) else []),
    ):
        inside(folder, name, path)
    if _has_path(meta.get('tokenizer')) and meta['tokenizer']['path'] not in (
        'tokenizer',
        'tokenizer.model',
    ):
        raise ValueError(
            f'{path}: the path of the tokenizer is {repr(meta["tokenizer"]["path"])[:60]}, expected'
            " 'tokenizer' or 'tokenizer.model': run the prepare.py of this data set again"
        )
    return meta


def _has_path(tokenizer):
    return isinstance(tokenizer, dict) and 'path' in tokenizer


def _of_splits(test):
    """Return a test of a dict with an entry for each split."""
    return lambda value: (
        isinstance(value, dict)
        and set(value) == set(SPLITS)
        and all(test(entry) for entry in value.values())
    )


def _a_text(value):
    return isinstance(value, str)


def _some_files(value):
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(
            isinstance(entry, (list, tuple))
            and len(entry) == 2
            and _a_text(entry[0])
            and is_whole(entry[1])
            for entry in value
        )
    )


_ENTRIES = {  # key of meta.pkl: (test, what it must be in words)
    'vocab_size': (lambda value: is_whole(value, 1, 2**32), 'a number of ids'),
    'eot_id': (lambda value: value is None or is_whole(value, 0, 2**32), 'an id or None'),
    'dtype': (lambda value: value in ('uint16', 'uint32'), "'uint16' or 'uint32'"),
    'split': (_a_text, 'a sentence'),
    'tokenizer': (
        lambda value: not isinstance(value, dict) or all(map(_a_text, value.values())),
        'a dict of texts',
    ),
    'tokens': (_of_splits(is_whole), 'the number of tokens of train and val'),
    'documents': (_of_splits(is_whole), 'the number of documents of train and val'),
    'max_id': (
        _of_splits(lambda value: is_whole(value, 0, 2**32)),
        'the largest id of train and val',
    ),
    'fingerprint': (
        _of_splits(lambda value: _a_text(value) and bool(re.fullmatch('[0-9a-f]{64}', value))),
        'hexadecimal fingerprints of train and val',
    ),
    'ends': (_of_splits(_a_text), 'the names of two files'),
    'files': (_of_splits(_some_files), 'names of files and their tokens for train and val'),
    'stoi': (
        lambda value: (
            isinstance(value, dict)
            and all(_a_text(key) and is_whole(i, 0, 2**32) for key, i in value.items())
        ),
        'a dict of characters and ids',
    ),
    'itos': (
        lambda value: (
            isinstance(value, dict)
            and len(value) > 0
            and all(is_whole(i, 0, 2**32) and _a_text(text) for i, text in value.items())
        ),
        'a dict of ids and characters',
    ),
}


def token_dtype(meta: dict):
    """numpy dtype of the token files that `meta` describes; uint16 where it does not say, as
    nanoGPT writes.
    """
    name = str(meta.get('dtype', 'uint16'))
    if name not in ('uint16', 'uint32'):
        raise ValueError(f"meta.pkl says dtype {name!r}; token files are 'uint16' or 'uint32'")
    return np.dtype(name).newbyteorder('<')


def fingerprint_blocks(size: int, blocks: int = 256, block_bytes: int = 4096) -> list[tuple]:
    """Return (begin, end) of the bytes of a file of `size` bytes that its fingerprint looks at."""
    if size <= block_bytes:
        return [(0, size)]
    begins = [(size - block_bytes) * i // max(1, blocks - 1) for i in range(blocks)]
    return [(begin, begin + block_bytes) for begin in begins]


def fingerprint(path: str, blocks: int = 256) -> str:
    """SHA-256 (hex) of a file's size and of `blocks` evenly spaced blocks of it.

    Reads at most 1 MiB, so it is checked at every start even for files of terabytes: it tells
    another file, another order or another length, not a single flipped bit.
    """
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, 'rb') as f:
        for begin, end in fingerprint_blocks(size, blocks):
            f.seek(begin)
            digest.update(f.read(end - begin))
    return digest.hexdigest()


def fingerprint_of_files(paths: list, fingerprint: Callable = fingerprint) -> str:
    """Return the fingerprint of a split that lies in the files `paths`: of the only one its own, of
    several that of theirs, with no more than 256 blocks read in all, but for one of each.
    fingerprint: function of a path and a number of blocks, for files that lie elsewhere.
    """
    if len(paths) == 1:
        return fingerprint(paths[0], 256)
    return hashlib.sha256(
        ''.join(fingerprint(path, max(1, 256 // len(paths))) for path in paths).encode()
    ).hexdigest()


class TokenFileWriter:
    """Streams token ids into `folder`/train.bin and val.bin and describes them in meta.pkl.

    Use as a context manager. Everything is written under `*.tmp` names; the final names appear when
    the block ends without an error, train.bin last, so an interrupted prepare leaves nothing that
    looks finished.

        with TokenFileWriter(folder, vocab_size=50257, eot_id=50256,
                             tokenizer={'kind': 'tiktoken', 'name': 'gpt2'},
                             split='every 2000th document is val') as writer:
            writer.write('train', ids)     # ids of one document: a list or integer array

    `vocab_size` is the size of the whole id space (added tokens too): it decides the dtype.
    `tokenizer` is the dict for meta.pkl, or a tokenizer of tokenizers/base.py, which then writes
    its files into the folder when the data set is published. `extra` holds further plain-builtin
    entries for meta.pkl (nanoGPT's stoi and itos, for instance). sharded: each append() begins a
    file of its own, train_000000.bin and so on; then meta.pkl comes last. Raises ValueError for an
    id outside [0, vocab_size), and when a split stayed empty.
    """

    def __init__(
        self,
        folder: str,
        *,
        vocab_size: int,
        eot_id: int | None,
        tokenizer: 'dict[str, str] | Tokenizer',
        split: str,
        extra: dict | None = None,
        sharded: bool = False,
    ):
        self.folder, self.sharded = folder, sharded
        self.meta = {
            'vocab_size': int(vocab_size),
            'eot_id': None if eot_id is None else int(eot_id),
            'dtype': 'uint16' if vocab_size <= 2**16 else 'uint32',
            'tokenizer': tokenizer,
            'split': split,
            'tokens': dict.fromkeys(SPLITS, 0),
            'documents': dict.fromkeys(SPLITS, 0),
            'max_id': dict.fromkeys(SPLITS, -1),
            'ends': {split: f'{split}.ends' for split in SPLITS},
            **(extra or {}),
        }
        self.dtype = token_dtype(self.meta)

    def __enter__(self):
        os.makedirs(self.folder, exist_ok=True)
        self.written = []  # names of all files, without .tmp
        self.shards = {split: [] for split in SPLITS}  # (name, tokens)
        self.ends = {split: self._open(f'{split}.ends') for split in SPLITS}
        self.files = {} if self.sharded else {split: self._open(f'{split}.bin') for split in SPLITS}
        self.lock = threading.Lock()
        return self

    def _open(self, name):
        self.written.append(name)
        self._remove_left(name)
        return open(self._tmp(name), 'wb', opener=no_link)

    def write(
        self, split: str, ids: Sequence[int] | np.ndarray, ends_document: bool = True
    ) -> None:
        """Append the `ids` (1-D, any integer type) of a document to `split`; an empty list counts
        as no document.

        A document may come in pieces: `ends_document` is True for its last one.
        """
        given = np.asarray(ids)
        if given.size:
            self.append(
                split,
                check_ids(given, self.meta['vocab_size']).astype(self.dtype),
                [given.size] * bool(ends_document),
            )

    def append(self, split: str, ids: np.ndarray, ends: list[int]) -> None:
        """Append `ids` (1-D, of self.dtype, checked) to `split`: documents that end at `ends`
        (ascending, counted from the first of ids).
        """
        if len(ids):
            self.fill(self.place(split, len(ids), ends), ids)

    def place(self, split: str, tokens: int, ends: list[int] | np.ndarray) -> tuple | None:
        """Give `tokens` more ids of `split` their place, which fill() or link_file() must be told:
        in one file in this order, in files of their own in any, by any thread. None for documents
        without ids.
        """
        self.ends[split].write(
            (np.asarray(ends, dtype='<u8') + np.uint64(self.meta['tokens'][split])).tobytes()
        )
        self.meta['tokens'][split] += int(tokens)
        self.meta['documents'][split] += len(ends)
        if not tokens:
            return None
        name = f'{split}_{len(self.shards[split]):06d}.bin' if self.sharded else f'{split}.bin'
        if self.sharded:
            self.shards[split].append((name, int(tokens)))
            self.written.append(name)
        return split, name

    def fill(self, place: tuple, ids: np.ndarray) -> None:
        """Write `ids` (as for append()) where place() said."""
        with self._file(place) as f:
            f.write(np.ascontiguousarray(ids).data)  # tofile() does not say that a disk is full
        self._saw(place, int(ids.max()))

    def link_file(self, place: tuple, path: str, max_id: int) -> None:
        """Fill a place with the ids in the file at `path`, without reading them where the file
        system can give it a second name.
        """
        self._saw(place, max_id)
        if self.sharded:
            self._remove_left(place[1])
            linked = False
            with contextlib.suppress(OSError):  # a file system without links
                os.link(path, self._tmp(place[1]))
                linked = True
            if linked:
                with open(path, 'rb') as f:
                    os.fsync(f.fileno())
                return
        with open(path, 'rb') as source, self._file(place) as target:
            shutil.copyfileobj(source, target, 2**22)

    @contextlib.contextmanager
    def _file(self, place):
        if not self.sharded:
            yield self.files[place[0]]
            return
        self._remove_left(place[1])
        with open(self._tmp(place[1]), 'wb', opener=no_link) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())

    def _remove_left(self, name):
        """Remove what a killed process left of the file `name`, which may be another name of a
        finished part.
        """
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._tmp(name))

    def _saw(self, place, max_id):
        with self.lock:
            self.meta['max_id'][place[0]] = max(self.meta['max_id'][place[0]], max_id)

    def __exit__(self, error_type, error, traceback):
        try:
            for f in (*self.files.values(), *self.ends.values()):
                if error_type is None:
                    _close(f)
                else:
                    with contextlib.suppress(OSError):  # a full disk has been told
                        f.close()
            if error_type is None:
                self._publish()
        finally:
            for name in (*self.written, 'meta.pkl'):
                if os.path.exists(self._tmp(name)):
                    os.remove(self._tmp(name))

    def _publish(self):
        empty = [split for split in SPLITS if not self.meta['tokens'][split]]
        if empty:
            raise ValueError(
                f'no tokens for {" and ".join(empty)}: the input is too small for this split'
                f' ({self.meta["split"]})'
            )
        bins = {
            split: [name for name, _ in self.shards[split]] or [f'{split}.bin'] for split in SPLITS
        }
        self.meta['fingerprint'] = {
            split: fingerprint_of_files([self._tmp(name) for name in bins[split]])
            for split in SPLITS
        }
        if self.sharded:
            self.meta['files'] = self.shards
        before = _names(self.folder)
        # what makes a folder a data set goes first and comes last (train.bin, or meta.pkl where it
        # names files): whenever this is interrupted, it is whole or none
        for name in (
            'train.bin',
            *(
                ['meta.pkl']
                if self.sharded or 'meta.pkl' in before and 'train.bin' not in before
                else []
            ),
        ):
            if os.path.exists(self._final(name)):
                os.remove(self._final(name))
        if not isinstance(self.meta['tokenizer'], dict):
            self.meta['tokenizer'] = self.meta['tokenizer'].describe(self.folder)
        with self._open('meta.pkl') as f:
            pickle.dump(self.meta, f)
            f.flush()
            os.fsync(f.fileno())
        ends = list(self.meta['ends'].values())
        for name in (
            (*ends, *bins['val'], *bins['train'], 'meta.pkl')
            if self.sharded
            else ('meta.pkl', *ends, 'val.bin', 'train.bin')
        ):
            os.replace(self._tmp(name), self._final(name))
        for name in before - _names(self.folder):
            if os.path.exists(self._final(name)):
                os.remove(self._final(name))

    def _tmp(self, name):
        return os.path.join(self.folder, name + '.tmp')

    def _final(self, name):
        return os.path.join(self.folder, name)

    def report(self) -> None:
        """Print what was written and where."""
        for split in SPLITS:
            shards = self.shards[split]
            path = (
                self._final(f'{split}.bin')
                if not shards
                else f'{self._final(shards[0][0])} to {shards[-1][0]}'
            )
            print(
                f'{path}: {self.meta["tokens"][split]:,} tokens of'
                f' {self.meta["documents"][split]:,} documents,'
                f' {self.meta["tokens"][split] * self.dtype.itemsize / 1e6:.1f} MB'
                f' {self.meta["dtype"]}'
            )


def check_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return `ids` (an integer array, not empty). Raises ValueError for one outside [0,
    vocab_size).
    """
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f'token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}'
        )
    return ids


def _names(folder):
    """Return the files of token ids that a data set in `folder` has, and its meta.pkl; of those
    that meta.pkl names only the ones that are named as we name them.
    """
    try:
        shards = {
            name
            for files in read_meta(folder).get('files', {}).values()
            for name, _ in files
            if re.fullmatch(r'(train|val)_\d{6}\.bin', name)
        }
    except ValueError:
        shards = set()
    return {
        name
        for name in (*shards, 'train.bin', 'val.bin', 'meta.pkl')
        if os.path.exists(os.path.join(folder, name))
    }


def _close(f):
    f.flush()
    os.fsync(f.fileno())
    f.close()
