"""Token files: the format that every prepare.py writes and the trainer reads.

A data set is a folder with `train.bin` and `val.bin` (token ids, raw little-endian, uint16 where every possible id
fits and uint32 where not) and `meta.pkl`, a dict of plain builtins:

    vocab_size    number of ids, added tokens included          dtype         'uint16' | 'uint32'
    eot_id        id that ends a document, or None               tokenizer     {'kind': ..., ...}, see tokenizer.py
    tokens        {'train': int, 'val': int}                     documents     the same, in documents
    max_id        {'train': int, 'val': int}, largest id seen    split         one sentence: what went to val
    fingerprint   {'train': hex, 'val': hex}, see fingerprint()

`meta.pkl` is optional when reading: nanoGPT's files have none, or one without a dtype, and mean uint16.
Only numpy is needed here, so the trainer can read data on a machine without any tokenizer library.
"""
import hashlib
import io
import os
import pickle

import numpy as np

SPLITS = ('train', 'val')


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, strings, bytes and numbers, and nothing that could run code."""
    allowed = {'set', 'frozenset', 'complex', 'bytearray'}

    def find_class(self, module, name):
        if module == 'builtins' and name in self.allowed:
            return getattr(__import__('builtins'), name)
        raise pickle.UnpicklingError(f'meta.pkl asks for {module}.{name}; only builtin containers, strings and numbers are admitted')


def read_meta(folder):
    """The dict in `folder`/meta.pkl, or {} where there is no such file. Raises ValueError for a file that is no plain pickle."""
    path = os.path.join(folder, 'meta.pkl')
    if not os.path.exists(path):
        return {}
    with open(path, 'rb') as f:
        content = f.read()
    try:
        meta = _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f'{path} cannot be read: {error}') from None
    if not isinstance(meta, dict):
        raise ValueError(f'{path} holds a {type(meta).__name__}, expected a dict')
    return meta


def token_dtype(meta):
    """numpy dtype of the token files that `meta` describes; uint16 where it does not say, as nanoGPT writes."""
    name = str(meta.get('dtype', 'uint16'))
    if name not in ('uint16', 'uint32'):
        raise ValueError(f"meta.pkl says dtype {name!r}; token files are 'uint16' or 'uint32'")
    return np.dtype(name).newbyteorder('<')


def fingerprint(path, blocks=256, block_bytes=4096):
    """SHA-256 (hex) of a file's size and of `blocks` evenly spaced blocks of it.

    Reads at most 1 MiB, so it is checked at every start even for files of terabytes: it tells another file, another
    order or another length, not a single flipped bit.
    """
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, 'rb') as f:
        for i in range(blocks):
            f.seek(max(0, (size - block_bytes)) * i // max(1, blocks - 1))
            digest.update(f.read(block_bytes))
            if size <= block_bytes:
                break
    return digest.hexdigest()


class TokenFileWriter:
    """Streams token ids into `folder`/train.bin and val.bin and describes them in meta.pkl.

    Use as a context manager. Everything is written under `*.tmp` names; the final names appear when the block ends
    without an error, train.bin last, so an interrupted prepare leaves nothing that looks finished.

        with TokenFileWriter(folder, vocab_size=50257, eot_id=50256, tokenizer={'kind': 'tiktoken', 'name': 'gpt2'},
                             split='every 2000th document is val') as writer:
            writer.write('train', ids)     # ids of one document: a list or integer array

    `vocab_size` is the size of the whole id space (added tokens too): it decides the dtype. `tokenizer` is the dict for
    meta.pkl, or a tokenizer of tokenizer.py, which then writes its files into the folder when the data set is published.
    `extra` holds further plain-builtin entries for meta.pkl (nanoGPT's stoi and itos, for instance).
    Raises ValueError for an id outside [0, vocab_size), and when a split stayed empty.
    """

    def __init__(self, folder, *, vocab_size, eot_id, tokenizer, split, extra=None):
        self.folder = folder
        self.meta = {'vocab_size': int(vocab_size), 'eot_id': None if eot_id is None else int(eot_id),
                     'dtype': 'uint16' if vocab_size <= 2**16 else 'uint32', 'tokenizer': tokenizer, 'split': split,
                     'tokens': dict.fromkeys(SPLITS, 0), 'documents': dict.fromkeys(SPLITS, 0),
                     'max_id': dict.fromkeys(SPLITS, -1), **(extra or {})}
        self.dtype = token_dtype(self.meta)

    def __enter__(self):
        os.makedirs(self.folder, exist_ok=True)
        self.files = {split: open(self._tmp(f'{split}.bin'), 'wb') for split in SPLITS}
        return self

    def write(self, split, ids, ends_document=True):
        """Append the `ids` (1-D, any integer type) of a document to `split`; an empty list counts as no document.

        A document may come in pieces: `ends_document` is True for its last one.
        """
        ids = np.asarray(ids)
        if ids.size == 0:
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.meta['vocab_size']:
            raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {self.meta['vocab_size']}")
        self.files[split].write(ids.astype(self.dtype).tobytes())
        self.meta['tokens'][split] += int(ids.size)
        self.meta['documents'][split] += bool(ends_document)
        self.meta['max_id'][split] = max(self.meta['max_id'][split], high)

    def __exit__(self, error_type, error, traceback):
        try:
            for f in self.files.values():
                f.flush()
                os.fsync(f.fileno())
                f.close()
            if error_type is None:
                self._publish()
        finally:
            for name in (*(f'{split}.bin' for split in SPLITS), 'meta.pkl'):
                if os.path.exists(self._tmp(name)):
                    os.remove(self._tmp(name))

    def _publish(self):
        empty = [split for split in SPLITS if not self.meta['tokens'][split]]
        if empty:
            raise ValueError(f"no tokens for {' and '.join(empty)}: the input is too small for this split ({self.meta['split']})")
        self.meta['fingerprint'] = {split: fingerprint(self._tmp(f'{split}.bin')) for split in SPLITS}
        # train.bin goes first and comes last: a folder with a train.bin is whole, whenever this is interrupted
        if os.path.exists(self._final('train.bin')):
            os.remove(self._final('train.bin'))
        if not isinstance(self.meta['tokenizer'], dict):
            self.meta['tokenizer'] = self.meta['tokenizer'].describe(self.folder)
        with open(self._tmp('meta.pkl'), 'wb') as f:
            pickle.dump(self.meta, f)
            f.flush()
            os.fsync(f.fileno())
        for name in ('meta.pkl', 'val.bin', 'train.bin'):
            os.replace(self._tmp(name), self._final(name))

    def _tmp(self, name):
        return os.path.join(self.folder, name + '.tmp')

    def _final(self, name):
        return os.path.join(self.folder, name)

    def report(self):
        """Lines for the terminal: what was written and where."""
        for split in SPLITS:
            path = self._final(f'{split}.bin')
            print(f"{path}: {self.meta['tokens'][split]:,} tokens of {self.meta['documents'][split]:,} documents, "
                  f"{os.path.getsize(path) / 1e6:.1f} MB {self.meta['dtype']}")
