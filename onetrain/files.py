"""Names, links, URLs, JSON and pickles that come from elsewhere: checked here once, before they are
used.

A name that a manifest, a listing, a meta.pkl or an index gives is joined to a folder only by
inside(), and what somebody else's folder holds is opened after check_own(), and written by
replacing(), which follow no link out of it. A URL is opened by open_url(), and recorded or shown as
redact() leaves it. JSON is read by parse_json(), and by verify_checksum() where it carries a
checksum; a pickle goes through refuse_deep_pickle() before an unpickler that admits few names.
"""

import contextlib
import glob
import hashlib
import json
import os
import pickletools
import re
import secrets
import time
from typing import Any

from onetrain.config import UserError

HIDDEN = '***'  # stands for the part of a URL that redact() takes out


def plain_name(name: str, source: str) -> str:
    """Return `name` if it is the name of one file: text without separators, control characters or
    '..'.

    source: where the name comes from, for the message. Raises UserError for any other value.
    """
    if not (
        isinstance(name, str)
        and 0 < len(name.encode('utf-8', 'replace')) <= 200
        and name not in ('.', '..')
        and not re.search(r'[/\\:\x00-\x1f\x7f-\x9f\ud800-\udfff]', name)
    ):
        shown = repr(name)[:100]
        raise UserError(
            f'{source} names the file {shown}, which is not a plain file name: '
            'nothing was read or written there; get the files from a source that you trust'
        )
    return name


def inside(folder: str, name: str, source: str) -> str:
    """Return the path of the file `name` in `folder`; `name` may lie in folders below, as in
    'tokenizer/vocab.json'.

    source: where the name comes from, for the message. Raises UserError for a name that is
    absolute or climbs.
    """
    parts = name.split('/') if isinstance(name, str) else [name]
    return '/'.join([str(folder), *(plain_name(part, source) for part in parts)])


def check_regular(path: str) -> None:
    """Raise UserError if `path` is something else than a file, such as a pipe or a device, which
    may have no end.
    """
    if os.path.lexists(path) and not os.path.isfile(path):
        kind = (
            'a folder'
            if os.path.isdir(path)
            else 'a pipe or a device'
            if os.path.exists(path)
            else 'a broken link'
        )
        raise UserError(f'{path} is {kind}, expected a file: put one there, or take it away')


def check_own(path: str, root: str | None = None) -> None:
    """check_regular(), and raise UserError for a link that leads out of the folder `root`; None:
    that of `path`.

    It would let whoever made the folder choose a private file to be shown, sent or written to. What
    the hub's client downloaded lies among the blobs of its cache, to which other folders link.
    """
    check_regular(path)
    real, root = os.path.realpath(path), os.path.realpath(root or os.path.dirname(path) or '.')
    if os.path.commonpath([real, root]) != root and not re.search(
        r'/models--[^/]+/blobs/[0-9a-f]{40,64}$', real
    ):
        raise UserError(
            f'{path} is a link out of its folder, to {real}: put a copy there if that is meant'
        )


@contextlib.contextmanager
def replacing(path: str, mode: str = 'wb', sync: bool = False, tidy: bool = True):
    """Give a file to write to, which takes the place of `path` when the block ends without an error
    and is gone otherwise.

    sync: whether it is on the disk before that. A link at `path` is replaced, not followed. tidy:
    whether what a killed process left of the same file is removed, for which the folder is listed.
    """
    for old in glob.glob(f'{glob.escape(path)}.????????.tmp') if tidy else ():
        with contextlib.suppress(OSError):
            if time.time() - os.lstat(old).st_mtime > 3600:
                os.remove(old)
    name = f'{path}.{secrets.token_hex(4)}.tmp'
    try:
        with open(name, mode, encoding=None if 'b' in mode else 'utf-8', opener=no_link) as f:
            yield f
            if sync:
                f.flush()
                os.fsync(f.fileno())
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(name)


def no_link(path: str, flags: int) -> int:
    """Return an opener for open(): follows no link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


_SCHEME = re.compile(r'([a-zA-Z][a-zA-Z0-9+.-]*://)')


def redact(value: Any):
    """Return `value` with the user, the password, the query and the fragment of every URL in it
    replaced by '***'.

    value: text, or dicts and lists that hold some; anything else is returned as it is.
    """
    if isinstance(value, str):
        before, *rest = _SCHEME.split(value)
        return before + ''.join(
            scheme + _without_secrets(url) for scheme, url in zip(rest[::2], rest[1::2])
        )
    if isinstance(value, dict):
        return {key: redact(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(inner) for inner in value]
    return value


def _without_secrets(text):
    """Redact `text`, which begins behind the :// of a URL and may go on behind its end."""
    url = re.match(r'\S*', text)[0]
    text = text[len(url) :]
    authority = re.match(r'[^/?#]*', url)[0]
    # a secret key may hold a / or a ?, and then the user ends at the last @ of all
    user = authority if '@' in authority else url if re.search(r':(?!\d*$)', authority) else ''
    if '@' in user:
        url = f'{HIDDEN}@{url[user.rindex("@") + 1 :]}'
    return re.sub(r'([?#]).*', rf'\1{HIDDEN}', url, count=1, flags=re.DOTALL) + text


def open_url(url: str) -> tuple:
    """Return (fsspec file system, path in it) of a URL or a local folder.

    Nothing of the listings is cached: what others write there is seen. Raises UserError for what
    cannot be opened.
    """
    import fsspec

    if re.match(r'(s3|s3a|gs|gcs)://', url) and HIDDEN + '@' in redact(url):
        raise UserError(
            f'{redact(url)} has a user or a password in it, which no bucket takes: give them in the'
            ' environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and leave them out'
            ' here'
        )
    try:
        local = '://' not in url or url.startswith(('file://', 'local://'))
        fs, root = fsspec.core.url_to_fs(
            url,
            skip_instance_cache=True,
            use_listings_cache=False,
            **({'auto_mkdir': True} if local else {}),
        )
    except Exception as error:  # each backend has its own
        raise UserError(
            f'{redact(url)!r} cannot be opened ({type(error).__name__}: {sentence(error)}): '
            'expected a folder or a URL such as s3://bucket/folder'
        ) from None
    return fs, root.rstrip('/') or '/'


def sentence(error: BaseException) -> str:
    """Return what an exception of a library says as one line without secrets, at most 200
    characters.
    """
    return ' '.join(redact(str(error)).split())[:200]


def refuse_deep_pickle(data: bytes, deepest: int = 100, largest: int = 1000) -> None:
    """Raise ValueError for a pickle, as bytes, of values nested too deeply or of tuples with too
    many items, without building any.

    Keys of a dict are hashed with all that they hold: a tuple within tuples a million deep ends the
    process, and one that holds another twice, which does so too, and so on, takes for ever.
    """
    # of (depth, items of a tuple and of those in it, 1 for anything else)
    stack, memo, mark = [], {}, object()
    for op, argument, _ in pickletools.genops(data):
        if op.name in ('GET', 'BINGET', 'LONG_BINGET'):
            stack.append(memo.get(argument, (0, 1)))
        elif op.name in ('PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
            memo[len(memo) if op.name == 'MEMOIZE' else argument] = (
                stack[-1] if stack and stack[-1] is not mark else (0, 1)
            )
        elif op.name == 'MARK':
            stack.append(mark)
        elif op.name == 'DUP' and stack:
            stack.append(stack[-1])
        else:
            taken = []
            for kind in reversed(op.stack_before):
                if kind is pickletools.stackslice:
                    while stack and stack[-1] is not mark:
                        taken.append(stack.pop())
                elif stack:
                    taken.append(stack.pop())
            taken = [value for value in taken if value is not mark]
            filled = (
                taken.pop()[0]
                if op.name in ('APPEND', 'APPENDS', 'SETITEM', 'SETITEMS', 'ADDITEMS', 'BUILD')
                and taken
                else 0
            )
            depth = max(filled, 1 + max((depth for depth, _ in taken), default=-1))
            size = (
                1 + sum(size for _, size in taken)
                if op.name.startswith(('TUPLE', 'REDUCE', 'FROZENSET'))
                else 1
            )
            stack.extend([(depth, size)] * len(op.stack_after))
            if depth > deepest:
                raise ValueError(f'it is nested more than {deepest} deep')
            if size > largest:
                raise ValueError(f'it has a tuple of more than {largest:,} items')


def parse_json(data: bytes | str):
    """Return the value in `data`, JSON as bytes or text. Raises ValueError, in words, for anything
    else.

    Unlike json.loads, it takes text nested too deeply for an error of the data, not of the program.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError('it is nested too deeply') from None
    except UnicodeDecodeError as error:
        raise ValueError(f'it is not UTF-8 (byte {error.start:,})') from None
    except ValueError as error:
        raise ValueError(f'it is not JSON: {error}') from None


def add_checksum(value: dict) -> bytes:
    """Return a dict as the bytes of a JSON file that carries the SHA-256 of its other content."""
    digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    return json.dumps({**value, 'sha256': digest}, indent=1).encode() + b'\n'


def verify_checksum(data: bytes) -> dict:
    """Return the dict in bytes made by add_checksum(). Raises ValueError if a single byte is
    another.
    """
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError('it holds no object')
    value.pop('sha256', None)
    if add_checksum(value) != data:
        raise ValueError('it does not have the checksum that it carries')
    return value


def is_whole(value: Any, least: int = 0, most: int = 2**62) -> bool:
    """Return whether `value` is an int from `least` to `most`; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
