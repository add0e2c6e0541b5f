"""Documents out of files, on this machine or anywhere that fsspec reaches, a stretch at a time.

    .txt, .md       one document, UTF-8; every kind of line end reads as a newline
    .jsonl, .json   (also .gz and .zst) a JSON object on each line, in UTF-8; its `text_field` is a
                    document
    .parquet        a row is a document, in the column `text_field`, of text or of bytes in UTF-8
    .npz            token ids in the array `input_ids`, a row of them is a document, without its
                    padding (attention_mask, sequence_lengths) and what the row before holds
                    already (stride)

A text_field such as meta.text is the field `text` within `meta`.

A Unit is what one process reads in one go: some bytes of a .txt or .jsonl, some row groups of a
.parquet, a compressed file or an .npz whole. Units depend on the files alone, so that whoever reads
them, in whatever order, finds the same documents. A .txt of up to PIECE_BYTES is one unit, so that
its ids are those that the tokenizer's own library gives for that text (for which Hugging Face's
takes 140 bytes of memory per byte of text); a larger one is cut at line ends.
"""

import codecs
import concurrent.futures
import contextlib
import glob
import gzip
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from onetrain.config import UserError
from onetrain.files import redact, sentence

PIECE_BYTES = 4 * 2**20
LINE_BYTES = 2**20  # how far beyond that a piece of a .txt reaches for its line end
UNIT_BYTES = 4 * 2**20  # of a .jsonl, and of row groups

JSON_ENDINGS = tuple(
    f'{name}{packed}' for packed in ('', '.gz', '.zst') for name in ('.jsonl', '.json')
)
TEXT_ENDINGS = ('.txt', '.md')
ENDINGS = (*TEXT_ENDINGS, *JSON_ENDINGS, '.parquet', '.npz')
# in a folder these are more often something else
FOLDER_ENDINGS = tuple(ending for ending in ENDINGS if ending not in ('.json', '.npz', '.md'))
# how publishers name them; test is left out
SPLITS = {
    'train': 'train',
    'validation': 'val',
    'val': 'val',
    'valid': 'val',
    'dev': 'val',
    'test': None,
}
TOKENS = 'input_ids'


class Unit(NamedTuple):
    """A stretch of a file: bytes or row groups begin .. end, or where both are 0 all of it. size:
    bytes of the file that it stands for; split: 'train' or 'val', or None where the number of a
    document says it; last: whether a document that reaches its end is complete.
    """

    path: str
    begin: int
    end: int
    size: int
    split: str | None = None
    last: bool = True


class Row(NamedTuple):
    """What a unit holds, one by one. content: text, or an array of ids, or None with the problem in
    words; read: bytes of the unit read so far, about.
    """

    content: object
    problem: str | None
    read: int


ASKED_AT_ONCE = 16  # files elsewhere


def is_url(path: str) -> bool:
    """Return whether a path is a URL that fsspec opens."""
    return '://' in path


def filesystem(path: str) -> tuple:
    """Return (fsspec filesystem, path there) of a URL. Raises UserError where its library is
    missing, or for a URL that cannot be one.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except Exception as error:  # each backend has its own
        raise UserError(
            f'{redact(path)} cannot be opened ({type(error).__name__}: {sentence(error)}): expected'
            ' a file, a folder or a URL such as s3://bucket/folder'
        ) from None


@contextlib.contextmanager
def errors_as_sentences(path: str):
    """Errors of the network around `path` as ValueErrors that say what to do."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        if not is_url(path):
            raise
        if 'Gated' in type(error).__name__ or '401' in str(error) or '403' in str(error):
            page = (
                f'https://huggingface.co/{"/".join(path.removeprefix("hf://").split("/")[:3])}'
                if path.startswith('hf://')
                else path
            )
            raise UserError(
                f'{path}: no access ({type(error).__name__}): accept its terms at {page}, then type'
                ' `hf auth login`; or name files that you have with --input'
            ) from None
        reason = ' '.join(str(error).split())[:200]
        raise UserError(
            f'{path} cannot be reached ({type(error).__name__}: {reason}): connect this machine, or'
            ' fetch the files and name them with --input'
        ) from None


def size_of(path: str) -> int:
    """Return bytes of a file."""
    if not is_url(path):
        return os.path.getsize(path)
    with errors_as_sentences(path):
        fs, there = filesystem(path)
        return fs.size(there)


@contextlib.contextmanager
def open_source(path: str):
    """A file of bytes, open to read and to seek in."""
    if not is_url(path):
        with open(path, 'rb') as f:
            yield f
        return
    with errors_as_sentences(path):
        fs, there = filesystem(path)
        with fs.open(there, 'rb') as f:
            yield f


def find_files(inputs: list[str], endings: tuple = FOLDER_ENDINGS) -> list[str]:
    """Return the files that `inputs` (paths of files and folders, glob patterns, URLs of them)
    stand for, each once, in that order; a folder's sorted.

    endings: of files that are taken from a folder. Raises UserError for an input that stands for
    no file, and for a file of no known kind.
    """
    found = []
    for given in inputs:
        here = _find_url(given, endings) if is_url(given) else _find_local(given, endings)
        for path in here:
            if not path.lower().endswith(ENDINGS):
                raise UserError(
                    f'--input {path}: expected {", ".join(ENDINGS[:-1])} or {ENDINGS[-1]}; rename'
                    ' it if it is one of these'
                )
        found += sorted(here)
    return list(dict.fromkeys(found))


def _find_local(given, endings):
    if os.path.isdir(given):
        here = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(given)
            for name in names
            if _wanted(name, endings)
        ]
        return here or _nothing(given, endings)
    here = (
        [given]
        if os.path.isfile(given)
        else [path for path in glob.glob(given, recursive=True) if os.path.isfile(path)]
    )
    if not here:
        hub = (
            f'; for the data set of that name on the Hugging Face hub type hf://datasets/{given}'
            if re.fullmatch(r'[\w.-]+/[\w.-]+', given)
            else ''
        )
        raise UserError(
            f'--input {given}: there is no such file or folder, and no file matches it as a'
            f' pattern{hub}'
        )
    return here


def _find_url(given, endings):
    fs, there = filesystem(given)
    with errors_as_sentences(given):
        if any(sign in there for sign in '*?['):
            here = fs.glob(there)
        elif there.lower().endswith(ENDINGS):
            here = [there]
        else:
            here = [path for path in fs.find(there) if _wanted(path.rsplit('/', 1)[-1], endings)]
    return [fs.unstrip_protocol(path) for path in here] or _nothing(given, endings)


def _wanted(name, endings):
    return name.lower().endswith(endings) and not name.startswith('.')


def _nothing(given, endings):
    raise UserError(
        f'--input {given}: this folder holds no'
        f' {", ".join(endings[:-1])}{" or " if len(endings) > 1 else ""}{endings[-1]} file; '
        f"Markdown and .json are taken from patterns: --input '{given.rstrip('/')}/**/*.md'"
    )


def published_split(path: str, given: str) -> str:
    """Return 'train', 'val' or None (to be left out) of a file that --input `given` (a folder,
    pattern or file) stands for, whose publisher names splits in folders or files, as in
    validation/chunk1/a.jsonl.zst, data/test-00000-of-00001.parquet or
    c4-train.00000-of-01024.json.gz; 'train' where nothing is named.
    """
    fixed = re.split(r'[*?[]', given)[0]
    # what the user named says nothing of its files
    base = fixed.rstrip('/') + '/' if fixed == given != path else fixed[: fixed.rfind('/') + 1]
    for word in re.split(r'[/\\._-]+', path.removeprefix(base)):
        if word in SPLITS:
            return SPLITS[word]
    return 'train'


def units_of_files(
    files: list[str], splits: dict[str, str] | None = None, txt_val_fraction: float | None = None
) -> Iterator:
    """Give the units of `files` in their order. splits: {path: split}."""
    for units in _of_each(
        files, lambda path: units_of(path, (splits or {}).get(path), txt_val_fraction)
    ):
        yield from units


def size_of_files(files: list[str]) -> int:
    """Return bytes of all `files` together."""
    return sum(_of_each(files, size_of))


def _of_each(files, what):
    """Give what(path) of all `files`. Files elsewhere are asked some at a time: each answers after
    a round trip or two.
    """
    with concurrent.futures.ThreadPoolExecutor(
        ASKED_AT_ONCE if any(map(is_url, files)) else 1
    ) as pool:
        yield from pool.map(what, files)


def join_path(first: 'Unit', second: 'Unit') -> 'Unit | None':
    """Return one unit for two that follow each other in a file, or None where they do not, or each
    is a document of its own.
    """
    if (
        not first.end
        or first.path.lower().endswith(TEXT_ENDINGS)
        or (first.path, first.split, first.end) != (second.path, second.split, second.begin)
    ):
        return None
    return first._replace(end=second.end, size=first.size + second.size, last=second.last)


def units_of(
    path: str, split: str | None = None, txt_val_fraction: float | None = None
) -> 'list[Unit]':
    """Return the units of a file, in order. txt_val_fraction: the share of a .txt that goes to val,
    its end, cut at a line end where one is near; None: a .txt is one document like others. Raises
    ValueError for a file in UTF-16 or UTF-32, and for JSON that is not an object on each line.
    """
    lower, size = path.lower(), size_of(path)
    if lower.endswith(TEXT_ENDINGS):
        with open_source(path) as f:
            _check_encoding(f.read(4), path)
            f.seek(0)
            return _txt_units(f, path, size, split, txt_val_fraction)
    if lower.endswith(('.jsonl', '.json')):
        with open_source(path) as f:
            _check_json(f.read(2**16).split(b'\n')[0], path)
        return [
            Unit(path, begin, min(begin + UNIT_BYTES, size), min(UNIT_BYTES, size - begin), split)
            for begin in range(0, size, UNIT_BYTES)
        ]
    if lower.endswith('.parquet'):
        with open_source(path) as f:
            return _parquet_units(f, path, size, split)
    return [Unit(path, 0, 0, size, split)]


def _check_encoding(head, path):
    """Raise UserError for a file that begins with the byte order mark of another encoding than
    UTF-8.
    """
    for mark, name in (
        (codecs.BOM_UTF32_LE, 'UTF-32'),
        (codecs.BOM_UTF32_BE, 'UTF-32'),
        (codecs.BOM_UTF16_LE, 'UTF-16'),
        (codecs.BOM_UTF16_BE, 'UTF-16'),
    ):
        if head.startswith(mark):
            raise UserError(
                f'{path} is {name}, as its byte order mark says, expected UTF-8: convert it, `iconv'
                f' -f {name} -t UTF-8 {path} > NEW`'
            )


def _check_json(head, path):
    """Raise UserError for a first line which shows that a file is JSON in another form than an
    object on each line.
    """
    _check_encoding(head, path)
    line = head.removeprefix(codecs.BOM_UTF8).strip()
    if line.startswith(b'['):
        raise UserError(
            f'{path} is one JSON array, expected a JSON object on each line: split it, `jq -c ".[]"'
            f' {path} > NEW.jsonl`'
        )
    if line == b'{':
        raise UserError(
            f'{path} is JSON spread over several lines, expected a JSON object on each line: put it'
            f' on lines, `jq -c . {path} > NEW.jsonl`'
        )


def _txt_units(f, path, size, split, val_fraction):
    start = 3 if f.read(3) == codecs.BOM_UTF8 else 0
    parts = [(split, start, size)]
    if split is None and val_fraction is not None:
        cut = _near_line_end(f, start, size, val_fraction)
        parts = [('train', start, cut), ('val', cut, size)]
    units = []
    for part, begin, end in parts:
        cuts = [begin]
        while end - cuts[-1] > PIECE_BYTES:
            cuts.append(_line_end(f, cuts[-1] + PIECE_BYTES, end))
        cuts += [end] * (cuts[-1] < end)
        units += [Unit(path, a, b, b - a, part, b == end) for a, b in zip(cuts, cuts[1:])]
    return units


def _line_end(f, at, end):
    """Return the end of the line that the byte `at` is in, or where that is far away a place
    between two characters.
    """
    f.seek(at - 1)
    line = f.readline(min(LINE_BYTES, end - at + 1))
    cut = at - 1 + len(line)
    if line.endswith(b'\n') or cut == end:
        return cut
    f.seek(cut - 4)
    around = f.read(5)  # the byte before which is cut is around[4]
    back = next(
        (n for n in range(4) if around[4 - n] & 0xC0 != 0x80 and around[4 - n - 1] != ord('\r')), 0
    )
    return cut - back


def _near_line_end(f, start, size, fraction):
    """Return where the last `fraction` of the bytes start .. size begins: after the nearest
    newline, or else at a character.
    """
    cut = start + int((size - start) * (1 - fraction))
    near = min(4096, (size - cut) // 2)
    before = max(start, cut - near)
    f.seek(before)
    ends = [
        before + i + 1 for i, byte in enumerate(f.read(cut + near - before)) if byte == ord('\n')
    ]
    if ends:
        return min(ends, key=lambda end: abs(end - cut))
    f.seek(cut)
    while cut < size and f.read(1)[0] & 0xC0 == 0x80:  # inside a UTF-8 character
        cut += 1
    return cut


def _parquet_file(f, path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f'{path} needs the library pyarrow, which is not installed: type `pip install pyarrow`'
        ) from None
    try:
        return pyarrow.parquet.ParquetFile(f)
    except (ValueError, OSError) as error:
        raise UserError(f'{path} cannot be read as parquet ({error}): fetch it again') from None


def _parquet_units(f, path, size, split):
    meta = _parquet_file(f, path).metadata
    weights = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
    units, begin = [], 0
    for i in range(len(weights)):
        if sum(weights[begin : i + 1]) >= UNIT_BYTES or i == len(weights) - 1:
            units.append(
                Unit(
                    path,
                    begin,
                    i + 1,
                    size * sum(weights[begin : i + 1]) // max(1, sum(weights)),
                    split,
                )
            )
            begin = i + 1
    return units


def read(unit: 'Unit', text_field: str = 'text') -> Iterator:
    """Yield the Rows of a unit. Raises UserError for a file that is damaged, not UTF-8, or without
    the column.
    """
    lower = unit.path.lower()
    with open_source(unit.path) as f:
        if lower.endswith(TEXT_ENDINGS):
            yield Row(_text(f, unit), None, unit.size)
        elif lower.endswith('.parquet'):
            yield from _parquet_rows(f, unit, text_field)
        elif lower.endswith('.npz'):
            yield from _npz_rows(f, unit)
        elif lower.endswith(('.gz', '.zst')):
            yield from _packed_rows(f, unit, text_field)
        else:
            yield from _json_rows(f, unit, text_field)


def _text(f, unit):
    f.seek(unit.begin)
    content = f.read(unit.end - unit.begin)
    _refuse_utf16(content, unit.path)
    try:
        text = io.IncrementalNewlineDecoder(
            codecs.getincrementaldecoder('utf-8')(), translate=True
        ).decode(content, final=True)
    except UnicodeDecodeError as error:
        raise UserError(
            f'{unit.path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at'
            f' {unit.begin + error.start:,}): convert it, for instance with `iconv -f latin1 -t'
            ' utf-8`'
        ) from None
    controls = len(content) - len(content.translate(None, _CONTROLS))
    if controls > max(8, len(content) // 20):
        raise UserError(
            f'{unit.path} has {100 * controls / len(content):.0f} % control characters, so it is no'
            f' text in UTF-8: convert it, for instance with `iconv -f UTF-16LE -t UTF-8 {unit.path}'
            ' > NEW`'
        )
    return text


# what no text has: not white space, nor what separates fields, strikes over (\b), or begins a
# terminal's colors
_CONTROLS = bytes({*range(28)} - {*b'\b\t\n\r\f\v\x1b'})


def _refuse_utf16(content, path):
    """Raise UserError for bytes that are UTF-16 without a byte order mark, much of which is UTF-8
    as well.

    Every second byte is then that of a script, such as 00 of Latin letters, 04 of Cyrillic or 06 of
    Arabic ones, and 00 of the blanks between them.
    """
    head = np.frombuffer(content, np.uint8, min(len(content), 2**20) // 2 * 2)
    for name, half in (('UTF-16LE', head[1::2]), ('UTF-16BE', head[0::2])):
        often = int(np.bincount(half).argmax()) if len(half) >= 16 else 255
        if (
            often < 16
            and often not in b'\n\r'
            and (half == 0).any()
            and (half == often).sum() > 0.6 * len(half)
        ):
            raise UserError(
                f'{path} has the byte {often:02x} at most {"odd" if name == "UTF-16LE" else "even"}'
                f' places, as {name} without a byte order mark has, expected UTF-8: convert it,'
                f' `iconv -f {name} -t UTF-8 {path} > NEW`'
            )


def _json_rows(f, unit, field):
    at = unit.begin
    if not at:
        at = 3 if f.read(3) == codecs.BOM_UTF8 else 0
        f.seek(at)
    else:  # the line that began before belongs to the unit before
        f.seek(at - 1)
        at += len(f.readline()) - 1
    while at < unit.end:
        line = f.readline()
        if not line:
            break
        at += len(line)
        yield Row(*_text_of(line, field), at - unit.begin)


def _packed_rows(f, unit, field):
    number = 0
    try:
        for line in gzip.open(f) if unit.path.lower().endswith('.gz') else _zst_lines(f, unit.path):
            number += 1
            if number == 1:
                _check_json(line, unit.path)
                line = line.removeprefix(codecs.BOM_UTF8)
            yield Row(*_text_of(line, field), f.tell())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f'{unit.path} is damaged after line {number:,} ({error}): fetch it again'
        ) from None


def _zst_lines(f, path):
    """Yield the lines of a .zst of one frame or more. Raises EOFError for one that is cut short,
    which the library's own reader takes for its end.
    """
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f'{path} needs the library zstandard, which is not installed: type `pip install'
            ' zstandard`'
        ) from None
    frame, rest = None, b''
    try:
        while block := f.read(2**18):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                *lines, rest = (rest + frame.decompress(block)).split(b'\n')
                yield from lines
                block, frame = (frame.unused_data, None) if frame.eof else (b'', frame)
    except zstandard.ZstdError as error:
        raise EOFError(error) from None
    if frame is not None:
        raise EOFError('it ends in the middle')
    if rest:
        yield rest


def _text_of(line, field):
    """Return (text, problem) of a line of JSON; (None, None) of a blank one."""
    if not line or line.isspace():
        return None, None
    try:
        row = json.loads(line.decode('utf-8'))  # of bytes json would guess the encoding
    except UnicodeDecodeError as error:
        return None, f'not UTF-8, byte 0x{line[error.start]:02x} at {error.start:,} of the line'
    except (ValueError, RecursionError) as error:
        return None, f'no JSON object on one line: {error}'
    if not isinstance(row, dict):
        return None, f'no JSON object but a {type(row).__name__}'
    found, known = _field_of(row, field)
    if not isinstance(found, str):
        return None, (
            f'{field!r} is a {type(found).__name__}'
            if known
            else f'no field {field!r}, only {", ".join(list(row)[:9])}'
        )
    # JSON can spell out half a surrogate pair, which no tokenizer takes
    if b'\\u' in line and (b'\\ud' in line or b'\\uD' in line):
        found = found.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return found, None


def _field_of(row, field):
    """Return (value, whether it is there) of a field of a dict; a.b is the field b of the dict
    a.
    """
    if field in row:
        return row[field], True
    for name in field.split('.'):
        if not isinstance(row, dict) or name not in row:
            return None, False
        row = row[name]
    return row, True


def _parquet_rows(f, unit, field):
    import pyarrow.compute

    with _parquet_file(f, unit.path) as file:
        names = file.schema_arrow.names
        path = [field] if field in names else field.split('.')
        kind = file.schema_arrow.field(path[0]).type if path[0] in names else None
        for name in path[1:]:
            kind = (
                kind.field(name).type
                if kind is not None
                and pyarrow.types.is_struct(kind)
                and name in [kind.field(i).name for i in range(kind.num_fields)]
                else None
            )
        if kind is None:
            raise UserError(
                f'{unit.path} has no column {field!r}: name one of {", ".join(names)} with'
                ' --text_field, as a.b for b within a'
            )
        encoded = pyarrow.types.is_dictionary(kind)  # as pandas writes a category
        kind = kind.value_type if encoded else kind
        text = (
            pyarrow.types.is_string(kind)
            or pyarrow.types.is_large_string(kind)
            or pyarrow.types.is_string_view(kind)
        )
        groups = range(unit.begin, unit.end)
        rows, number = sum(file.metadata.row_group(i).num_rows for i in groups), 0
        try:
            for batch in file.iter_batches(
                batch_size=256, row_groups=list(groups), columns=['.'.join(path)]
            ):
                column = batch.column(0)
                for name in path[1:]:
                    column = pyarrow.compute.struct_field(column, name)
                column = column.dictionary_decode() if encoded else column
                column = (
                    column.cast(pyarrow.large_string())
                    if pyarrow.types.is_string_view(kind)
                    else column
                )
                for value in (column.cast(pyarrow.large_binary()) if text else column).to_pylist():
                    number += 1
                    yield Row(*_decoded(value, field), unit.size * number // rows)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(
                f'{unit.path} is damaged after row {number:,}'
                f' ({" ".join(str(error).split())[:200]}): fetch it again'
            ) from None


def _decoded(value, field):
    """Return (text, problem) of a value of a column."""
    if not isinstance(value, bytes):
        return None, f'{field!r} is a {type(value).__name__}'
    try:
        return value.decode('utf-8'), None
    except UnicodeDecodeError as error:
        return None, f'not UTF-8, byte 0x{value[error.start]:02x} at {error.start:,} of {field!r}'


def _npz_rows(f, unit):
    try:
        if not zipfile.is_zipfile(f):
            raise zipfile.BadZipFile('no archive')
        f.seek(0)
        with np.load(f, allow_pickle=False) as archive:
            names = archive.files
            arrays = {
                name: archive[name]
                for name in (TOKENS, 'attention_mask', 'sequence_lengths', 'stride')
                if name in names
            }
    except Exception as error:  # the archive and the headers in it can be damaged in many ways
        raise UserError(
            f'{unit.path} cannot be read as .npz ({type(error).__name__}:'
            f' {" ".join(str(error).split())[:200]}): fetch it again'
        ) from None
    if not isinstance(arrays.get(TOKENS), np.ndarray):
        raise UserError(f'{unit.path} has no array {TOKENS!r}, only {", ".join(names)}')
    ids = arrays[TOKENS]
    if ids.dtype.kind not in 'iu' or ids.ndim not in (1, 2):
        raise UserError(
            f'{unit.path}: {TOKENS} is {ids.ndim}-dimensional {ids.dtype}, expected one or two'
            ' dimensions of integers'
        )
    rows = np.atleast_2d(ids)
    kept = _without_padding(rows, arrays, unit.path)
    skip = _overlap(rows, arrays.get('stride'))
    for number, (row, real) in enumerate(zip(rows, kept), 1):
        if skip and number > 1 and np.array_equal(row[:skip], rows[number - 2][-skip:]):
            real = real & (np.arange(len(row)) >= skip)  # the row before holds these already
        yield Row(row[real], None, unit.size * number // len(rows))


def _without_padding(rows, arrays, path):
    """Return a bool array over `rows`: True where a token is no padding, as attention_mask and
    sequence_lengths say. Raises UserError.
    """
    kept = np.ones(rows.shape, bool)
    if (mask := arrays.get('attention_mask')) is not None:
        if mask.shape not in (rows.shape, arrays[TOKENS].shape) or mask.dtype.kind not in 'biuf':
            raise UserError(
                f'{path}: attention_mask is {mask.dtype} of shape {mask.shape}, expected numbers of'
                f' the shape of {TOKENS}, {rows.shape}'
            )
        kept &= mask.reshape(rows.shape) != 0
    if (lengths := arrays.get('sequence_lengths')) is not None:
        if (
            lengths.size != len(rows)
            or lengths.dtype.kind not in 'iu'
            or lengths.min(initial=0) < 0
            or lengths.max(initial=0) > rows.shape[1]
        ):
            raise UserError(
                f'{path}: sequence_lengths is {lengths.dtype} of shape {lengths.shape}, expected'
                f' {len(rows)} whole numbers from 0 to {rows.shape[1]}'
            )
        kept &= np.arange(rows.shape[1]) < lengths.reshape(-1, 1)
    return kept


def _overlap(rows, stride):
    """Return how many tokens a row repeats of the one before: what the array `stride` leaves of a
    row, or None: what all of the first rows repeat; 0 for none.
    """
    width = rows.shape[1]
    if (
        stride is not None
        and stride.size == 1
        and stride.dtype.kind in 'iu'
        and 0 < int(stride.reshape(-1)[0]) < width
    ):
        return width - int(stride.reshape(-1)[0])
    first = rows[:8]
    if len(first) < 3 or (first == first[0]).all():
        return 0
    return next(
        (
            skip
            for skip in range(width - 1, 15, -1)
            if all(np.array_equal(b[:skip], a[-skip:]) for a, b in zip(first, first[1:]))
        ),
        0,
    )
