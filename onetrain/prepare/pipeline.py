"""From documents to a data set, on any number of processes and machines.

    files ──(documents.py)── units ── Plan ──(workers, parts.py)── parts-DIGEST/000000.bin .docs
                  .json ──(assemble.py)── train.bin val.bin meta.pkl

A Plan groups the units of all files into parts of a few MB, by the files alone. A worker reads and
tokenizes a whole part and writes it down. So no text and no ids travel between processes, a part
that is recorded is never made again, and whoever made it, it is the same.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING

from tqdm import tqdm

from onetrain.config import UserError
from onetrain.files import no_link, replacing
from onetrain.prepare import documents, parts
from onetrain.prepare.documents import Unit

if TYPE_CHECKING:
    from onetrain.prepare.parts import Part
    from onetrain.tokenizers.base import Tokenizer

PART_BYTES = 4 * 2**20, 2**30  # of source: the smallest and the largest part
PARTS = 2000  # about, for a corpus in between
THREADED = {'tokenizers', 'pyarrow', 'fsspec', 'torch', 'gigatoken'}
CORPUS = 2**23  # bytes of source above which it pays to look for a faster tokenizer


@dataclasses.dataclass
class Plan:
    """What is to be tokenized how. parts: lists of Units; tokenizer: of base; text_field:
    of JSON and parquet; limit: documents that are wanted at most, or None.
    """

    parts: list
    tokenizer: 'Tokenizer'
    text_field: str = 'text'
    limit: int | None = None

    @classmethod
    def of_files(
        cls,
        files: list[str],
        tokenizer: 'Tokenizer',
        *,
        txt_val_fraction: float | None = None,
        splits: dict[str, str] | None = None,
        **options,
    ) -> 'Plan':
        """Return a plan for `files` in their order. splits: {path: 'train' or 'val'} where the
        source says it; options: those of Plan.
        """
        part_bytes = min(max(documents.size_of_files(files) // PARTS, PART_BYTES[0]), PART_BYTES[1])
        groups, size = [], part_bytes
        for unit in documents.units_of_files(files, splits, txt_val_fraction):
            if size >= part_bytes:
                groups.append([unit])
                size = 0
            elif longer := documents.join_path(groups[-1][-1], unit):
                groups[-1][-1] = longer
            else:
                groups[-1].append(unit)
            size += unit.size
        return cls(groups, tokenizer, **options)

    def size(self) -> int:
        """Return bytes of source."""
        return sum(unit.size for part in self.parts for unit in part)

    @functools.cached_property
    def digest(self) -> str:
        """Return Hex string that differs where the ids may."""
        known = [self.parts, tokenizer_digest(self.tokenizer), self.text_field, self.limit]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]

    def folder(self, output: str) -> str:
        """Return the folder of the parts of this plan."""
        return os.path.join(output, f'parts-{self.digest}')

    def save(self, output: str) -> None:
        """Write the plan beside its parts, so that --merge finds it."""
        os.makedirs(self.folder(output), exist_ok=True)
        with replacing(os.path.join(self.folder(output), 'plan.json')) as f:
            f.write(
                json.dumps(
                    {
                        'parts': self.parts,
                        'tokenizer': tokenizer_digest(self.tokenizer),
                        'text_field': self.text_field,
                        'limit': self.limit,
                    }
                ).encode()
            )

    @classmethod
    def load(cls, folders: list[str], tokenizer: 'Tokenizer') -> tuple:
        """Return (plan, parts folders) of unfinished work in `folders`, outputs of other machines.
        Raises UserError unless they belong together.
        """
        found = [
            os.path.join(folder, name)
            for folder in folders
            for name in (sorted(os.listdir(folder)) if os.path.isdir(folder) else [])
            if name.startswith('parts-') and os.path.isfile(os.path.join(folder, name, 'plan.json'))
        ]
        if not found:
            raise UserError(
                f'--merge {" ".join(folders)}: there is no parts-… folder: name the output folders'
                ' of the machines that ran --shard'
            )
        if len({os.path.basename(path) for path in found}) > 1:
            raise UserError(
                f'--merge: {", ".join(found)} are parts of different work: delete those that do not'
                ' belong, or name their folders one by one'
            )
        with open(os.path.join(found[0], 'plan.json')) as f:
            saved = json.load(f)
        plan = cls(
            [[Unit(*unit) for unit in part] for part in saved['parts']],
            tokenizer,
            saved['text_field'],
            saved['limit'],
        )
        if saved['tokenizer'] != tokenizer_digest(tokenizer):
            raise UserError(
                f'{found[0]} was made with another tokenizer: give the --tokenizer that the'
                ' machines had'
            )
        return plan, found


def tokenizer_digest(tokenizer: 'Tokenizer') -> str:
    """Return Hex string of all that a tokenizer keeps in a data set."""
    with tempfile.TemporaryDirectory() as folder:
        digest = hashlib.sha256(
            repr(
                (
                    tokenizer.describe(folder),
                    tokenizer.vocab_size,
                    tokenizer.eot_id,
                    getattr(tokenizer, 'itos', None),
                )
            ).encode()
        )
        for where, _, names in sorted(os.walk(folder)):
            for name in sorted(names):
                with open(os.path.join(where, name), 'rb') as f:
                    digest.update(name.encode() + f.read())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def exclusive_lock(plan: 'Plan', output: str, shard: tuple = (1, 1)):
    """Hold the parts folder of a plan and a shard, which is made, so that two runs of one command
    do not make the same parts. Raises UserError where another holds it.
    """
    plan.save(output)
    path = os.path.join(plan.folder(output), f'shard-{shard[0]}-of-{shard[1]}.lock')
    with open(path, 'w', opener=no_link) as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f'{path} is held by another process that makes the same data set: wait for it'
                ) from None
            # a file system without locks
        yield


def tokenize(
    plan: 'Plan', output: str, *, num_proc: int | None = None, shard: tuple = (1, 1)
) -> 'list[Part]':
    """Make those parts of `plan` that are not in `output` yet (which exclusive_lock() holds), in
    num_proc processes (None: one for each core); shard (i, n): only the i-th of n shares. Returns
    the Parts in order, with a limit only as many as it takes. Raises UserError for broken input,
    and when a process dies; what is finished stays for the next call.
    """
    folder = plan.folder(output)
    mine = range(
        len(plan.parts) * (shard[0] - 1) // shard[1], len(plan.parts) * shard[0] // shard[1]
    )
    there = set()
    for name in os.listdir(folder):
        if name[:6].isdigit() and int(name[:6]) in mine:
            if name.endswith('.tmp'):
                os.remove(os.path.join(folder, name))
            there.add(int(name[:6]))
    with _checked(
        sorted(there), lambda index: parts.read_part(folder, index, plan.parts[index])
    ) as checked:
        made = {part.number: part for part in checked if part}
    if made:
        print(f'{len(made)} of {len(mine)} parts are there already')
    sizes = {index: sum(unit.size for unit in plan.parts[index]) for index in mine}
    with tqdm(
        total=sum(sizes.values()),
        initial=sum(sizes[index] for index in made),
        unit='B',
        unit_scale=True,
        desc='tokenizing',
        disable=None,
    ) as bar:
        bar.tokens = bar.documents = 0
        before = time.monotonic()

        def advance(done, tokens, texts):
            bar.tokens, bar.documents = bar.tokens + tokens, bar.documents + texts
            bar.set_postfix_str(
                f'{bar.documents:,} documents, {bar.tokens / 1e6:,.1f} M tokens,'
                f' {bar.tokens / 1e6 / (time.monotonic() - before):.2f} M/s',
                refresh=False,
            )
            bar.update(done)

        missing = [index for index in mine if index not in made]
        if missing and plan.size() > CORPUS:
            plan.tokenizer.accelerate()
        for index, record in _make(
            plan,
            folder,
            missing,
            num_proc or len(os.sched_getaffinity(0)),
            advance,
        ):
            made[index] = parts.Part(index, folder, record)
            if plan.limit is not None and (enough := _first(plan.limit, mine, made)):
                return enough
    return [made[index] for index in mine]


def _first(limit, indices, made):
    """Return the Parts of `made` from the first of `indices` on that have `limit` documents; None
    where one of them is missing.
    """
    first, texts = [], 0
    for index in indices:
        if texts >= limit:
            break
        if index not in made:
            return None
        first.append(made[index])
        texts += made[index].record['documents']
    return first


def find_parts(plan: 'Plan', folders: list[str]) -> 'list[Part]':
    """Return the Parts of `plan` in order, each in the first of `folders` that has it whole. Raises
    ValueError for missing ones.
    """
    made, texts = [], 0
    with _checked(
        range(len(plan.parts)),
        lambda index: next(
            (part for folder in folders if (part := parts.read_part(folder, index))), None
        ),
    ) as checked:
        for index, part in enumerate(checked):
            if part is None:
                missing = [
                    i
                    for i in range(len(plan.parts))
                    if not any(
                        os.path.exists(parts.part_path(folder, i, 'json')) for folder in folders
                    )
                ] or [index]
                raise UserError(
                    f'{len(missing)} of {len(plan.parts)} parts are missing or damaged, the first'
                    f' is {missing[0]}: run each --shard to its end and name all their folders'
                )
            made.append(part)
            texts += part.record['documents']
            if plan.limit is not None and texts >= plan.limit:
                break
    return made


@contextlib.contextmanager
def _checked(indices, read):
    """Give an iterator over read(index) of `indices`, which some threads are ahead of: what they do
    is to read files and to hash them.
    """
    pool = concurrent.futures.ThreadPoolExecutor(max(4, len(os.sched_getaffinity(0))))
    try:
        yield tqdm(
            pool.map(read, indices),
            total=len(indices),
            unit=' parts',
            desc='checking',
            disable=None,
        )
    finally:
        pool.shutdown(cancel_futures=True)


def _make(plan, folder, todo, num_proc, advance):
    """Make the parts `todo`; yields (index, record) of each when it is finished."""
    if min(num_proc, len(todo)) <= 1:
        for index in todo:
            yield index, _make_one(plan, folder, index, plan.parts[index], advance)
        return
    # fork() starts sooner, and cuts off the threads that other libraries have
    context = multiprocessing.get_context(
        'spawn' if THREADED & set(sys.modules) or threading.active_count() > 1 else 'fork'
    )
    counters = context.Array('q', 3)
    seen = [0, 0, 0]

    def look():
        with counters.get_lock():
            now = list(counters)
        advance(*(a - b for a, b in zip(now, seen)))
        seen[:] = now

    os.environ['RAYON_NUM_THREADS'] = '1'  # a thread for each process that is started now
    # a worker is told of the units of a part when it is to make it, not of all there are
    pool = concurrent.futures.ProcessPoolExecutor(
        min(num_proc, len(todo)),
        context,
        _begin,
        (dataclasses.replace(plan, parts=None), folder, counters),
    )
    try:
        waiting, rest = {}, iter(todo)
        while True:
            while len(waiting) < 2 * num_proc and (index := next(rest, None)) is not None:
                waiting[pool.submit(_make_here, index, plan.parts[index])] = index
            if not waiting:
                break
            done, _ = concurrent.futures.wait(
                waiting, timeout=2 * parts.EVERY_S, return_when=concurrent.futures.FIRST_COMPLETED
            )
            look()
            for future in done:
                yield waiting.pop(future), future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            'a process that tokenizes was killed, for want of memory perhaps: what is finished is'
            f' kept in {folder}; type the same command again, with fewer than --num_proc {num_proc}'
            ' if it happens again'
        ) from None
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        # they write under names of their own, so nothing is lost that is finished
        for process in processes:
            process.kill()


def _begin(plan, folder, counters):
    global _work
    _work = plan, folder, counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _make_here(index, units):
    plan, folder, counters = _work

    def advance(*numbers):
        with counters.get_lock():
            for i, number in enumerate(numbers):
                counters[i] += number

    return _make_one(plan, folder, index, units, advance)


def _make_one(plan, folder, index, units, advance):
    return parts.make_part(
        folder,
        index,
        units,
        plan.tokenizer,
        text_field=plan.text_field,
        limit=plan.limit,
        advance=advance,
    )


def remove_parts(plan: 'Plan', output: str) -> None:
    """Remove the parts of a plan from `output`, once the data set is there."""
    shutil.rmtree(plan.folder(output), ignore_errors=True)


def discard(plan: 'Plan', output: str, finished: bool = False) -> None:
    """Remove what work that was given up left in `output`, unless there are finished parts that a
    next call can go on with; `finished`: these too.
    """
    folder = plan.folder(output)
    if os.path.isdir(folder) and (
        finished
        or not any(name[:6].isdigit() and name.endswith('.json') for name in os.listdir(folder))
    ):
        remove_parts(plan, output)
        if not os.listdir(output):
            os.rmdir(output)
