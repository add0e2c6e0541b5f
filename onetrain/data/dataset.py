"""Data sets: what a name in `dataset` stands for, opened and checked.

name            the folder data/name with train.bin and val.bin, or with the files that its
                meta.pkl names, which are read as one
a:0.7,b:0.3     a mixture: of 10 sequences 7 are the next ones of a and 3 of b, each in the order
                that it would have alone
with data_url   files in object storage, read as they are needed and kept in data/name/copy
"""

import contextlib
import fractions
import hashlib
import itertools
import json
import math
import os

import numpy as np
import torch

from onetrain.config import UserError, nearest
from onetrain.data.remote import RemoteFile, Storage, read_together
from onetrain.data.token_file import SPLITS, fingerprint_of_files, read_meta, token_dtype
from onetrain.descriptors import FILES, ChangedFile, version
from onetrain.files import check_regular, inside, is_whole, parse_json, redact, replacing, sentence
from onetrain.tokenizers.base import is_tokenizer_file
from onetrain.tokenizers.matching import same_ids

MAX_CYCLE = 100_000  # sequences after which the shares of a mixture are met to the last one


class NotPrepared(UserError):
    """The data set is not there yet; the message says which command makes it."""


class LocalFile:
    """Tokens of a file on this machine: len() and slices as of an array. size: in bytes.

    A slice raises ChangedFile once the file is another than the one that look() saw.
    """

    def __init__(self, path: str, dtype: torch.dtype):
        self.path, self.dtype = path, dtype
        self.look()
        self.size = self.version[2]

    def look(self) -> None:
        """Take the file of this name as it is now for the right one."""
        FILES.forget(self.path)
        self.version = version(os.stat(self.path))

    def __len__(self):
        return self.size // self.dtype.itemsize

    def __getitem__(self, part):
        ids = np.empty(max(0, part.stop - part.start), self.dtype)
        self.fill([(ids, part.start)])
        return ids

    def fill(self, wanted: list[tuple]) -> None:
        """Fill each array of `wanted`, [(array of the dtype, number)], with the tokens from its
        number on.
        """
        width = self.dtype.itemsize
        if (
            FILES.read_into(self.path, [(ids, first * width) for ids, first in wanted])
            != self.version
        ):
            raise ChangedFile(self.path)

    def max(self) -> int:
        """Return the largest id, which reads the whole file."""
        return max(
            int(self[at : min(at + 2**24, len(self))].max()) for at in range(0, len(self), 2**24)
        )


class Tokens:
    """One split of a data set. `len()` is the number of tokens.

    path: for messages; pieces: LocalFiles or RemoteFiles of tokens, one behind the other;
    fingerprint: hex that tells it from others; max_id: largest id, to which every token that is
    read is held, or None.
    """

    def __init__(self, path: str, split: str, pieces: list, fingerprint: str, max_id: int | None):
        self.path = path
        self.split = split
        self.pieces = pieces
        self.fingerprint = fingerprint
        self.max_id = max_id
        self.remote = isinstance(pieces[0], RemoteFile)
        self.firsts = np.cumsum([0, *map(len, pieces)])
        self.sources = [self]

    def __len__(self):
        return int(self.firsts[-1])

    def parts(self, start: int, end: int) -> list:
        """Return [(piece, begin, end)] that make up the tokens start .. end."""
        found, number = [], int(np.searchsorted(self.firsts, start, 'right')) - 1
        while start < end:
            stop = min(end, int(self.firsts[number + 1]))
            if stop > start:
                found.append(
                    (
                        self.pieces[number],
                        start - int(self.firsts[number]),
                        stop - int(self.firsts[number]),
                    )
                )
            start, number = stop, number + 1
        return found

    def slice(self, start: int, end: int) -> np.ndarray:
        """Return the tokens start .. end: an array of the file's dtype."""
        found = self._unchanged(lambda: self._read(self.parts(start, end)))
        return self._checked(
            found[0]
            if len(found) == 1
            else np.concatenate(found)
            if found
            else np.empty(0, np.uint16)
        )

    def windows(self, starts: np.ndarray, block_size: int) -> torch.Tensor:
        """Return the windows that begin at `starts` ((B,) array): (B, block_size + 1) int64 tensor.
        Raises UserError for an id beyond max_id.
        """
        starts, width = np.asarray(starts), block_size + 1
        rows = np.empty((len(starts), width), self.pieces[0].dtype)
        numbers = np.asarray(np.searchsorted(self.firsts, starts, 'right') - 1)
        places = zip(numbers.tolist(), (starts - self.firsts[numbers]).tolist())
        crossing = starts + width > self.firsts[numbers + 1]
        wanted = {}  # {piece: [(where to, its first token)]}
        for row, (number, first), start, crosses in zip(
            rows, places, starts.tolist(), crossing.tolist()
        ):
            if not crosses:
                wanted.setdefault(self.pieces[number], []).append((row, first))
                continue
            for piece, begin, end in self.parts(start, start + width):
                wanted.setdefault(piece, []).append((row[: end - begin], begin))
                row = row[end - begin :]
        self._unchanged(lambda: self._fill(wanted))
        return torch.from_numpy(self._checked(rows).astype(np.int64))

    def _fill(self, wanted):
        if not self.remote:
            for piece, places in wanted.items():
                piece.fill(places)
            return
        places = [
            (piece, first, ids) for piece, several in wanted.items() for ids, first in several
        ]
        for (_, _, ids), found in zip(
            places,
            read_together([(piece, first, first + len(ids)) for piece, first, ids in places]),
        ):
            ids[:] = found

    def _read(self, parts):
        return (
            read_together(parts)
            if self.remote
            else [piece[begin:end] for piece, begin, end in parts]
        )

    def _unchanged(self, read):
        """Return read(). Raises UserError where a file was changed since it was opened."""
        try:
            return read()
        except ChangedFile:  # or only touched: its bytes tell
            for piece in self.pieces:
                piece.look()
            if fingerprint_of_pieces(self.pieces) != self.fingerprint:
                raise UserError(
                    f'{self.path} was changed while it was read: a run that goes on would learn'
                    ' from a mixture of both; put the file back that was there, and continue with'
                    ' --init_from=resume'
                ) from None
            return self._unchanged(read)

    def _checked(self, ids):
        """Return `ids`, an array of tokens of this split. Raises UserError for one beyond max_id,
        which no table of embeddings has a row for.
        """
        if self.max_id is not None and ids.size and (largest := int(ids.max())) > self.max_id:
            raise UserError(
                f'{self.path} holds token id {largest}, and {self.max_id} is the largest that it is'
                ' known to have: the file was changed or damaged; run the prepare.py of this data'
                ' set again'
            )
        return ids

    def evaluation_starts(self, block_size: int, count: int) -> np.ndarray:
        """Return where the windows of evaluation begin: `count`, or as many as there are, evenly
        spaced and never overlapping.
        """
        available = (len(self) - 1) // block_size
        count = min(count, available)
        return np.arange(count) * available // max(1, count) * block_size

    def sources_of(self, starts: np.ndarray) -> np.ndarray:
        """Return the number of the source that each window begins in: 0."""
        return np.zeros(len(starts), dtype=np.int64)


def fingerprint_of_pieces(pieces: list) -> str:
    """Return the fingerprint of a split that lies in `pieces`, from their bytes."""
    if isinstance(pieces[0], LocalFile):
        return fingerprint_of_files([piece.path for piece in pieces])
    by_name = {piece.name: piece for piece in pieces}
    return fingerprint_of_files([*by_name], lambda name, blocks: by_name[name].fingerprint(blocks))


class Mixture:
    """A split of several data sets, as if one lay behind the other. shares: fractions.Fraction of
    each, which add up to 1.
    """

    def __init__(self, sources: 'list[Tokens]', shares: list):
        self.sources, self.shares, self.split = sources, shares, sources[0].split
        self.path = ' and '.join(source.path for source in sources)
        self.firsts = np.cumsum([0, *map(len, sources)])
        self.max_id = max(source.max_id for source in sources)
        self.remote = any(source.remote for source in sources)
        self.fingerprint = hashlib.sha256(
            json.dumps(
                [[str(share), source.fingerprint] for share, source in zip(shares, sources)]
            ).encode()
        ).hexdigest()

    def __len__(self):
        return int(self.firsts[-1])

    def windows(self, starts: np.ndarray, block_size: int) -> torch.Tensor:
        """As of Tokens; no window of a source may reach into the next."""
        starts, rows = (
            np.asarray(starts),
            torch.empty(len(starts), block_size + 1, dtype=torch.int64),
        )
        which = self.sources_of(starts)
        for number in np.unique(which):
            here = np.flatnonzero(which == number)
            rows[here] = self.sources[number].windows(
                starts[here] - self.firsts[number], block_size
            )
        return rows

    def sources_of(self, starts: np.ndarray) -> np.ndarray:
        """Return the number of the source that each window begins in."""
        return np.asarray(np.searchsorted(self.firsts, starts, 'right') - 1)

    def evaluation_starts(self, block_size: int, count: int) -> np.ndarray:
        """As of Tokens, of each source as many as its share."""
        edges = [round(edge * count) for edge in itertools.accumulate(self.shares, initial=0)]
        counts = np.diff(edges)  # `count` in all
        return np.concatenate(
            [
                first + source.evaluation_starts(block_size, n)
                for first, source, n in zip(self.firsts, self.sources, counts)
            ]
        )


def parse_mixture(dataset: str) -> list[tuple]:
    """Return [(name, share)] of a `dataset`: one with the share 1, or those of a mixture such as
    a:0.7,b:0.3. Raises UserError.
    """
    words = [word.strip() for word in dataset.split(',')]
    pairs = [word.rpartition(':') for word in words]
    if len(words) == 1 and not (pairs[0][1] and _number(pairs[0][2])):
        return [(dataset, fractions.Fraction(1))]
    if not all(name and _number(weight) for name, _, weight in pairs):
        raise UserError(
            f'dataset={dataset!r} is no mixture: type names and weights as in --dataset=a:0.7,b:0.3'
        )
    weights = [fractions.Fraction(weight) for _, _, weight in pairs]
    if min(weights) <= 0 or len({name for name, _, _ in pairs}) < len(pairs):
        raise UserError(f'dataset={dataset!r}: weights must be above 0 and names different')
    shares = [weight / sum(weights) for weight in weights]
    if mixture_period(shares) > MAX_CYCLE:
        raise UserError(
            f'dataset={dataset!r}: these weights repeat after {mixture_period(shares):,} sequences'
            ' only: round them'
        )
    return [(name, share) for (name, _, _), share in zip(pairs, shares)]


def mixture_period(shares: list) -> int:
    """Return the number of sequences after which the shares are met exactly."""
    return math.lcm(*(share.denominator for share in shares))


def _number(word):
    try:
        fractions.Fraction(word)
        return True
    except (ValueError, ZeroDivisionError):
        return False


def folder_of(dataset: str, root: str) -> str:
    """Return the folder of a data set under `root`/data, of a mixture that of its first: where its
    tokenizer lies.
    """
    return os.path.join(root, 'data', parse_mixture(dataset)[0][0])


def open_dataset(dataset: str, root: str, url: str | None = None) -> tuple:
    """Return (train, val, meta) of `dataset` under `root`/data; url: where its files are instead.
    Raises UserError, naming the command that prepares it.
    """
    named = parse_mixture(dataset)
    if url and len(named) > 1:
        raise UserError(
            f'data_url={redact(url)} holds one data set, not the mixture {dataset}: leave one of'
            ' them out'
        )
    found = [_open_url(name, root, url) if url else _open(name, root) for name, _ in named]
    if len(found) == 1:
        return found[0]
    first, shares = found[0][2], [share for _, share in named]
    for (name, _), (_, _, meta) in zip(named[1:], found[1:]):
        folders = [os.path.join(root, 'data', each) for each in (named[0][0], name)]
        # both as nanoGPT writes them
        unstated = not any(
            stated.get(key) for stated in (first, meta) for key in ('tokenizer', 'stoi')
        )
        same = all(meta.get(key) == first.get(key) for key in ('eot_id', 'vocab_size')) and (
            unstated or same_ids(*folders)
        )
        if not same:
            raise UserError(
                f'{named[0][0]} and {name} were made with different tokenizers'
                + (', or with one that cannot be loaded here' if same is None else '')
                + ': prepare them with the same one'
                + (
                    ' (char makes its own for each text: take bytes, or one of'
                    ' data/train_tokenizer.py)'
                    if 'stoi' in first and 'stoi' in meta
                    else ''
                )
            )
    meta = {
        **first,
        'tokens': {split: sum(len(one[i]) for one in found) for i, split in enumerate(SPLITS)},
    }
    return *(Mixture([one[i] for one in found], shares) for i in range(2)), meta


def _open(name, root):
    folder = os.path.join(root, 'data', name)
    try:
        meta = read_meta(folder)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not meta and (
        beside := [
            file
            for file in ('train.ends', 'tokenizer', 'tokenizer.model')
            if os.path.exists(os.path.join(folder, file))
        ]
    ):
        raise UserError(
            f'{folder} has no meta.pkl, which prepare.py wrote beside {beside[0]}: put it back or'
            ' prepare the data set again, since without it '
            f"train.bin would be read as GPT-2's tokens"
        )
    files = meta.get('files') or {split: [(f'{split}.bin', None)] for split in SPLITS}
    missing = [
        file
        for split in SPLITS
        for file, _ in files[split]
        if not os.path.isfile(os.path.join(folder, file))
    ]
    if missing:
        if os.path.isfile(os.path.join(folder, 'prepare.py')):
            options = ' --input YOUR.txt --tokenizer char' if name == 'own_text' else ''
            raise NotPrepared(
                f'data set {name!r} is not prepared ({folder} has no'
                f' {" and no ".join(missing[:3])}): run'
                f' `python data/{name}/prepare.py{options}` first'
            )
        if meta.get('files'):
            raise UserError(
                f'{folder} has no {missing[0]}, which its meta.pkl names: copy it there, or prepare'
                ' the data set again'
            )
        raise NotPrepared(_unknown(name, root))
    try:
        return *(_open_split(folder, split, files[split], meta) for split in SPLITS), meta
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def _unknown(name, root):
    """Return the sentence about a data set that there is not."""
    base = os.path.join(root, 'data')
    inner = name.strip('/').removeprefix('./').removeprefix('data/')
    if inner != name and os.path.isdir(os.path.join(base, inner)):
        return f'dataset={name!r} is taken within data/: type --dataset={inner}'

    def holding(*files):
        return sorted(
            d
            for d in os.listdir(base)
            if any(os.path.isfile(os.path.join(base, d, file)) for file in files)
        )

    prepared = holding('meta.pkl', 'train.bin')
    begin = f'no data set {name!r} in {base}'
    if near := nearest(name, holding('prepare.py', 'meta.pkl', 'train.bin')):
        return f'{begin}{near}'
    return (
        f'{begin}; prepared are {", ".join(prepared) or "none"}; for text of your own run `python'
        f' data/own_text/prepare.py --input FILE --output data/{inner}`'
    )


def _open_split(folder, split, files, meta):
    """Return tokens of local files. Raises UserError for one that cannot be what meta says."""
    dtype, paths, pieces = token_dtype(meta), [os.path.join(folder, name) for name, _ in files], []
    for path, (_, tokens) in zip(paths, files):
        size = os.path.getsize(path)
        if size == 0 or size % dtype.itemsize or tokens not in (None, size // dtype.itemsize):
            raise UserError(
                f'{path} has {size} bytes, which is not'
                f' {"a whole number of" if tokens is None else f"{tokens:,}"} {dtype.name} tokens:'
                ' the file is damaged or its dtype is another; run the prepare.py of this data set'
                ' again'
            )
        pieces.append(LocalFile(path, dtype))
    path = paths[0] if len(paths) == 1 else f'{os.path.join(folder, split)}_*.bin'
    known, stated = fingerprint_of_pieces(pieces), meta.get('fingerprint', {}).get(split)
    if stated and stated != known:
        raise UserError(
            f'{path} is not the file that its meta.pkl describes (fingerprint {known[:12]}, '
            f'expected {stated[:12]}): run the prepare.py of this data set again'
        )
    if 'dtype' not in meta and _looks_like_uint32(pieces[0]):
        raise UserError(
            f'{path} looks like uint32 tokens (every second 16-bit number is tiny), but no meta.pkl'
            ' says so, '
            f"which means uint16: write a meta.pkl with dtype 'uint32', or prepare the data set"
            f' again'
        )
    max_id = meta.get('max_id', {}).get(split) if stated else None
    return Tokens(
        path, split, pieces, known, _largest_id(folder, pieces, known) if max_id is None else max_id
    )


def _largest_id(folder, pieces, fingerprint):
    """Return the largest id of files whose meta.pkl does not say it: read once, and noted in the
    folder's max_id.json under their fingerprint.
    """
    path, noted = os.path.join(folder, 'max_id.json'), {}
    check_regular(path)
    with contextlib.suppress(OSError, ValueError):
        with open(path, 'rb') as f:
            noted = parse_json(f.read())
    noted = noted if isinstance(noted, dict) else {}
    if is_whole(noted.get(fingerprint), 0, 2**32):
        return noted[fingerprint]
    size = sum(piece.size for piece in pieces)
    if size > 2**31:
        print(
            f'{folder}: reading {size / 1e9:.1f} GB once for the largest token id, which no'
            ' meta.pkl states',
            flush=True,
        )
    largest = max(piece.max() for piece in pieces)
    # a folder that cannot be written to is read again
    with contextlib.suppress(OSError), replacing(path) as f:
        f.write(json.dumps({**noted, fingerprint: largest}).encode())
    return largest


def _looks_like_uint32(tokens):
    head = tokens[0 : min(len(tokens), 65536)]
    return len(head) >= 64 and int(head[1::2].max()) <= 4 < int(head[0::2].max())


def _open_url(name, root, url):
    folder = os.path.join(root, 'data', name)
    if (
        os.path.isfile(os.path.join(folder, 'train.bin'))
        or not os.path.isdir(os.path.join(folder, 'copy'))
        and os.path.isfile(os.path.join(folder, 'meta.pkl'))
    ):
        raise UserError(
            f'{folder} holds a data set already, so it cannot keep the copy of'
            f' data_url={redact(url)}: leave --data_url out, or give another --dataset name'
        )
    place = f'data_url={redact(url)}'
    try:
        storage = Storage(url)
        listed = storage.list()
        meta = _fetch_meta(storage, listed, folder, place)
        splits = [_remote_split(storage, listed, meta, split, folder, place) for split in SPLITS]
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    except Exception as error:  # each file system has its own
        raise UserError(
            f'{place} cannot be reached ({type(error).__name__}: {sentence(error)})'
        ) from None
    return *splits, meta


def _fetch_meta(storage, listed, folder, place):
    """Copy meta.pkl and the tokenizer to `folder`; returns what meta.pkl says. listed: {file there:
    (size, version)}.
    """
    if 'meta.pkl' not in listed:
        raise UserError(
            f'{place} has no meta.pkl: copy the whole folder of a prepared data set there'
        )
    os.makedirs(os.path.join(folder, 'copy'), exist_ok=True)
    _copy(storage, folder, ['meta.pkl'], place)
    meta = read_meta(folder)
    stated = meta.get('tokenizer')
    path = stated.get('path') if isinstance(stated, dict) else None
    wanted = [
        file
        for file in listed
        if path == 'tokenizer.model' == file or path == 'tokenizer' and is_tokenizer_file(file)
    ]
    _copy(storage, folder, wanted, place)
    if missing := [key for key in ('fingerprint', 'max_id', 'tokens') if key not in meta]:
        raise UserError(
            f'{place}: its meta.pkl states no {missing[0]}: prepare the data set anew and copy its'
            ' folder there'
        )
    return meta


def _remote_split(storage, listed, meta, split, folder, place):
    """Return the Tokens of a split whose files lie in `storage`, with a copy in `folder`."""
    dtype = token_dtype(meta)
    files = meta.get('files', {}).get(split) or [(f'{split}.bin', meta['tokens'][split])]
    for file, tokens in files:
        size = listed[file][0] if file in listed else 'no'
        if size != tokens * dtype.itemsize:
            raise UserError(
                f'{place}: {file} has {size} bytes, its meta.pkl says {tokens * dtype.itemsize}:'
                ' copy the folder there again'
            )
    stated, copies = meta['fingerprint'][split], os.path.join(folder, 'copy')
    pieces = [
        RemoteFile(
            storage,
            file,
            *listed[file],
            inside(copies, f'{stated[:8]}_{file.replace("/", "_")}', place),
            dtype,
        )
        for file, _ in files
    ]
    found = fingerprint_of_pieces(pieces)
    if found != stated:
        raise UserError(
            f'{place}: the files of {split} are not those that its meta.pkl describes (fingerprint'
            f' {found[:12]}, expected {stated[:12]}): copy the folder there again'
        )
    name = f'{place.removeprefix("data_url=")}/{split}'
    return Tokens(name, split, pieces, stated, meta['max_id'][split])


def _copy(storage, folder, names, source):
    for name in names:
        path = inside(folder, name, source)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with replacing(path) as f:
            f.write(storage.read(name))


def check_vocab_and_length(file: 'Mixture | Tokens', vocab_size: int, block_size: int) -> None:
    """Raise UserError unless `file` has ids for this vocabulary and tokens for one block."""
    for source in file.sources:
        if source.max_id >= vocab_size:
            raise UserError(
                f'{source.path} holds token id {source.max_id}, beyond vocab_size={vocab_size}:'
                f' type --vocab_size={source.max_id + 1} or more, or prepare the data with the'
                ' tokenizer of this model'
            )
        if len(source) < 2:
            raise UserError(
                f'{source.path} has {len(source)} token{"s" * (len(source) != 1)}, and nothing to'
                ' predict: prepare more text, or give the split a larger share'
            )
        if len(source) < block_size + 1:
            raise UserError(
                f'{source.path} has {len(source)} tokens, too few for one block of'
                f' block_size={block_size} and its target: type --block_size={len(source) - 1} or'
                ' less, or prepare more text'
            )
