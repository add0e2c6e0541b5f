"""Token files in object storage, read as they are needed: ranges of bytes, kept in a local copy
that fills up.

The copy of a file is a sparse file of its size and, beside it, the checksum of each block that is
there (0: not yet). A block counts only if its checksum is right, so that a copy which a crash left
half-written is fetched again, not trusted. Processes of a machine share it.
"""

import contextlib
import fcntl
import hashlib
import os
import threading
import time
import weakref
import zlib
from collections.abc import Sequence

import numpy as np

from onetrain.data.token_file import fingerprint_blocks
from onetrain.descriptors import FILES, ChangedFile
from onetrain.files import no_link, open_url, redact, sentence

BLOCK = 2**14  # bytes: some windows, since an epoch reads neighbors at other times
TRIES = 6
LOOK_AFTER = 600  # seconds between two questions for the versions of all files


class Storage:
    """The fsspec file system of a URL, made anew after a fork(), which its threads do not
    survive.
    """

    def __init__(self, url: str):
        self.url, self.lock = url.rstrip('/'), threading.Lock()
        self.pid: int | None = None
        self.known, self.looked = {}, time.monotonic()
        self.looking: threading.Thread | None = None
        STORAGES.add(self)

    def __reduce__(self):
        return Storage, (self.url,)

    def connected(self) -> tuple:
        """Return (file system, path there)."""
        with self.lock:
            if self.pid != os.getpid():
                self.fs, self.root = open_url(self.url)
                self.pid = os.getpid()
        return self.fs, self.root

    def list(self) -> dict[str, tuple]:
        """Return {name: (bytes, version)} of what lies there. Raises OSError."""
        fs, root = self.connected()
        fs.invalidate_cache()
        return {
            path[len(root) :].lstrip('/'): (info['size'], _version(info))
            for path, info in fs.find(root, detail=True).items()
        }

    def versions(self) -> dict[str, tuple]:
        """Return {name: version} of what lies there, as it was some minutes ago at most where the
        server answers: asked for by a thread, for all files together.
        """
        if time.monotonic() - self.looked > LOOK_AFTER and (
            self.looking is None or not self.looking.is_alive()
        ):
            self.looked = time.monotonic()
            self.looking = threading.Thread(target=self._look, daemon=True, name='versions')
            self.looking.start()
        return self.known

    def _look(self):
        # no answer says nothing of the files; it is asked again
        with contextlib.suppress(Exception):
            self.known = {name: version for name, (_, version) in self.list().items()}

    def read(self, name: str) -> bytes:
        """Return all bytes of a small file."""
        fs, root = self.connected()
        return fs.cat_file(f'{root}/{name}')

    def ranges(self, wanted: Sequence[tuple]) -> Sequence[bytes]:
        """Return the bytes of each (name, begin, end), fetched together; tried again a few times
        where the network fails.
        """
        fs, root = self.connected()
        for turn in range(TRIES):
            try:
                found = fs.cat_ranges(
                    [f'{root}/{name}' for name, _, _ in wanted],
                    [begin for _, begin, _ in wanted],
                    [end for _, _, end in wanted],
                    on_error='raise',
                )
                if [len(content) for content in found] == [end - begin for _, begin, end in wanted]:
                    return found
                error: Exception = OSError('fewer bytes than asked for')
            except Exception as problem:  # each file system has its own
                error = problem
            if turn + 1 < TRIES:
                time.sleep(min(2.0**turn, 15) * 0.5)
        raise OSError(
            f'{redact(self.url)}/{wanted[0][0]} cannot be read ({type(error).__name__}:'
            f' {sentence(error)})'
        ) from None


STORAGES: weakref.WeakSet[Storage] = weakref.WeakSet()


def _unlock():
    """Give each Storage a new lock: a thread that held the old one does not exist here."""
    for storage in STORAGES:
        storage.lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock)


def _version(info):
    """Return the first of the marks by which a file system tells one content of a file from
    another, with its size; info: of fsspec.
    """
    mark = next(
        (
            info[key]
            for key in (
                'ETag',
                'etag',
                'md5Hash',
                'mtime',
                'LastModified',
                'last_modified',
                'updated',
            )
            if info.get(key)
        ),
        None,
    )
    return info['size'], str(mark).strip('"')


class RemoteFile:
    """Tokens of a file in `storage`: len() and slices as of an array.

    size: in bytes; version: of its content; copy: path of its local copy. A slice that has to be
    fetched raises ChangedFile once the file is another than the one that look() saw, which is asked
    every LOOK_AFTER seconds.
    """

    def __init__(
        self,
        storage: 'Storage',
        name: str,
        size: int,
        version: tuple,
        copy: str,
        dtype: np.dtype,
    ):
        self.storage, self.name, self.size, self.copy, self.dtype = storage, name, size, copy, dtype
        self.version = version
        self.room = True  # on the local disk
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        with (
            open(copy, 'ab', opener=no_link) as data,
            open(f'{copy}.blocks', 'ab', opener=no_link) as blocks,
        ):
            fcntl.flock(data, fcntl.LOCK_EX)  # other ranks begin at the same time
            if os.fstat(data.fileno()).st_size != size:
                data.truncate(0)  # of another file
                data.truncate(size)
                blocks.truncate(0)
            blocks.truncate(-(-size // BLOCK) * 4)
        self.fetched = 0  # bytes

    def __len__(self):
        return self.size // self.dtype.itemsize

    def __getitem__(self, part):
        return read_together([(self, part.start, part.stop)])[0]

    def fingerprint(self, blocks: int) -> str:
        """That of token_file for the file there."""
        digest = hashlib.sha256(str(self.size).encode())
        for content in self.storage.ranges(
            [(self.name, begin, end) for begin, end in fingerprint_blocks(self.size, blocks)]
        ):
            digest.update(content)
        return digest.hexdigest()

    def look(self) -> None:
        """Take the file of this name as it was last seen for the right one; forget its local copy,
        which may have parts of both.
        """
        self.version = self.storage.known.get(self.name, self.version)
        FILES.write(f'{self.copy}.blocks', bytes(-(-self.size // BLOCK) * 4), 0)

    def check(self) -> None:
        """Raise ChangedFile if the file there is another than it was."""
        if self.storage.versions().get(self.name, self.version) != self.version:
            raise ChangedFile(self.name)

    def blocks_of(self, begin: int, end: int):
        """Return numbers of the blocks with the tokens begin .. end."""
        return range(begin * self.dtype.itemsize // BLOCK, -(-end * self.dtype.itemsize // BLOCK))

    def have(self, block: int) -> bytes | None:
        """Return the bytes of a block in the local copy, or None."""
        known = int.from_bytes(FILES.read(f'{self.copy}.blocks', 4, 4 * block), 'little')
        if not known:
            return None
        content = FILES.read(self.copy, BLOCK, block * BLOCK)
        return content if _sum(content) == known else None

    def keep(self, block: int, content: bytes) -> None:
        """Put fetched blocks from `block` on into the local copy, while there is room."""
        self.fetched += len(content)
        if not self.room:
            return
        sums = [_sum(content[i : i + BLOCK]) for i in range(0, len(content), BLOCK)]
        try:
            FILES.write(self.copy, content, block * BLOCK)
            FILES.write(f'{self.copy}.blocks', np.array(sums, '<u4').tobytes(), 4 * block)
        except OSError as error:
            self.room = False
            print(
                f'{self.copy}: no room for a local copy ({error.strerror}); going on without',
                flush=True,
            )


def _sum(content):
    return zlib.crc32(content) or 1


def read_together(wanted: list[tuple]) -> list[np.ndarray]:
    """Return arrays of the tokens begin .. end of each (RemoteFile, begin, end), with what is not
    here fetched at once.
    """
    blocks = {}
    for file, begin, end in wanted:
        for block in file.blocks_of(begin, end):
            if (file, block) not in blocks:
                blocks[file, block] = file.have(block)
    runs = []  # (file, first block, number of blocks) that are missing
    for file, block in sorted(
        (key for key, content in blocks.items() if content is None),
        key=lambda key: (key[0].name, key[1]),
    ):
        if runs and runs[-1][0] is file and runs[-1][1] + runs[-1][2] == block:
            runs[-1][2] += 1
        else:
            runs.append([file, block, 1])
    if runs:
        found = runs[0][0].storage.ranges(
            [
                (file.name, first * BLOCK, min((first + count) * BLOCK, file.size))
                for file, first, count in runs
            ]
        )
        for file in {file for file, _, _ in runs}:
            file.check()
        for (file, first, count), content in zip(runs, found):
            file.keep(first, content)
            for i in range(count):
                blocks[file, first + i] = content[i * BLOCK : (i + 1) * BLOCK]
    result = []
    for file, begin, end in wanted:
        numbers, width = file.blocks_of(begin, end), file.dtype.itemsize
        content = b''.join(blocks[file, block] for block in numbers)
        result.append(
            np.frombuffer(
                content,
                dtype=file.dtype,
                count=end - begin,
                offset=begin * width - (numbers.start * BLOCK if len(numbers) else 0),
            )
        )
    return result
