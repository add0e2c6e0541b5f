"""From documents to a data set, on any number of processes and machines.

    files ── units ── parts ──(workers)── parts-DIGEST/000000.bin .docs .json ──(assemble)── train.bin val.bin meta.pkl

A Plan groups the units of all files into parts of a few MB, by the files alone. A worker reads and tokenizes a whole part and writes it down: the ids of all its
documents in order, how long each is, and last a record with sizes and a checksum. So memory holds one document per process, a part that is recorded
is never made again, and whoever made it, it is the same. assemble() then reads the parts in order, which is where documents get their
numbers: every k-th goes to val, and a repeated one is left out.
"""
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time

import numpy as np
from tqdm import tqdm

from data import documents
from data.documents import Unit
from data.tokenfile import SPLITS, TokenFileWriter, check_ids, token_dtype

PART_BYTES = 4 * 2**20, 2**30  # of source: the smallest and the largest part
PARTS = 2000  # about, for a corpus in between
DOCUMENT = np.dtype([('tokens', '<u8'), ('last', '?'), ('hash', '<u8', 2)])  # a document, or a piece of one; last: it ends here; hash 0: not to be compared
BUCKET = 2**22  # documents that repeated() sorts at once
EVERY_S = 0.2


@dataclasses.dataclass
class Plan:
    """What is to be tokenized how. parts: lists of Units, of one split each; tokenizer: of data.tokenizer; text_field: of JSON and parquet; limit: documents
    that are wanted at most, or None."""
    parts: list
    tokenizer: object
    text_field: str = 'text'
    limit: int | None = None

    @classmethod
    def of_files(cls, files, tokenizer, *, txt_val_fraction=None, splits=None, part_bytes=None, **options):
        """A plan for `files` in their order. splits: {path: 'train' or 'val'} where the source says it; part_bytes: of source, None: by the size of the corpus."""
        units = [unit for path in files for unit in documents.units_of(path, (splits or {}).get(path), txt_val_fraction)]
        total = sum(unit.size for unit in units)
        part_bytes = part_bytes or min(max(total // PARTS, PART_BYTES[0]), PART_BYTES[1])
        parts, size = [], part_bytes
        for unit in units:
            if size >= part_bytes or unit.split != parts[-1][-1].split:
                parts.append([])
                size = 0
            parts[-1].append(unit)
            size += unit.size
        return cls(parts, tokenizer, **options)

    def size(self):
        """Bytes of source."""
        return sum(unit.size for part in self.parts for unit in part)

    def digest(self):
        """Hex string that differs where the ids may."""
        known = [self.parts, tokenizer_digest(self.tokenizer), self.text_field, self.limit]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]

    def folder(self, output):
        return os.path.join(output, f'parts-{self.digest()}')

    def save(self, output):
        os.makedirs(self.folder(output), exist_ok=True)
        _publish(os.path.join(self.folder(output), 'plan.json'), json.dumps(
            {'parts': self.parts, 'tokenizer': tokenizer_digest(self.tokenizer), 'text_field': self.text_field, 'limit': self.limit}).encode())

    @classmethod
    def load(cls, folders, tokenizer):
        """(plan, parts folders) of unfinished work in `folders`, outputs of other machines. Raises ValueError unless they belong together."""
        found = [os.path.join(folder, name) for folder in folders for name in (sorted(os.listdir(folder)) if os.path.isdir(folder) else [])
                 if name.startswith('parts-') and os.path.isfile(os.path.join(folder, name, 'plan.json'))]
        if not found:
            raise ValueError(f"--merge {' '.join(folders)}: there is no parts-… folder: name the output folders of the machines that ran --shard")
        if len({os.path.basename(path) for path in found}) > 1:
            raise ValueError(f"--merge: {', '.join(found)} are parts of different work: delete those that do not belong, or name their folders one by one")
        with open(os.path.join(found[0], 'plan.json')) as f:
            saved = json.load(f)
        plan = cls([[Unit(*unit) for unit in part] for part in saved['parts']], tokenizer, saved['text_field'], saved['limit'])
        if saved['tokenizer'] != tokenizer_digest(tokenizer):
            raise ValueError(f'{found[0]} was made with another tokenizer: give the --tokenizer that the machines had')
        return plan, found


def tokenizer_digest(tokenizer):
    """Hex string of all that a tokenizer keeps in a data set."""
    with tempfile.TemporaryDirectory() as folder:
        digest = hashlib.sha256(repr((tokenizer.describe(folder), tokenizer.vocab_size, tokenizer.eot_id, getattr(tokenizer, 'itos', None))).encode())
        for where, _, names in sorted(os.walk(folder)):
            for name in sorted(names):
                with open(os.path.join(where, name), 'rb') as f:
                    digest.update(name.encode() + f.read())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def alone(plan, output, shard=(1, 1)):
    """Hold the parts folder of a plan and a shard, which is made, so that two runs of one command do not make the same parts. Raises ValueError where another holds it."""
    plan.save(output)
    path = os.path.join(plan.folder(output), f'shard-{shard[0]}-of-{shard[1]}.lock')
    with open(path, 'w') as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ValueError(f'{path} is held by another process that makes the same data set: wait for it') from None
            # a file system without locks
        yield


def tokenize(plan, output, *, num_proc=None, shard=(1, 1)):
    """Make those parts of `plan` that are not in `output` yet (which alone() holds), in num_proc processes (None: one for each core); shard (i, n): only the i-th of n shares. Raises
    ValueError for broken input, and when a process dies; what is finished stays for the next call."""
    folder = plan.folder(output)
    mine = range(len(plan.parts) * (shard[0] - 1) // shard[1], len(plan.parts) * shard[0] // shard[1])
    for name in os.listdir(folder):
        if name.endswith('.tmp') and name[:6].isdigit() and int(name[:6]) in mine:
            os.remove(os.path.join(folder, name))
    records = {index: record for index in mine if (record := read_record(folder, index, plan.parts[index]))}
    todo = [index for index in mine if index not in records]
    if records:
        print(f'{len(records)} of {len(mine)} parts are there already')
    sizes = {index: sum(unit.size for unit in plan.parts[index]) for index in mine}
    with tqdm(total=sum(sizes.values()), initial=sum(sizes[index] for index in records), unit='B', unit_scale=True, desc='tokenizing', disable=None) as bar:
        bar.tokens = bar.documents = 0
        before = time.monotonic()

        def advance(done, tokens, texts):
            bar.tokens, bar.documents = bar.tokens + tokens, bar.documents + texts
            bar.set_postfix_str(f'{bar.documents:,} documents, {bar.tokens / 1e6:,.1f} M tokens, {bar.tokens / 1e6 / (time.monotonic() - before):.2f} M/s', refresh=False)
            bar.update(done)
        for index, record in _make(plan, folder, todo, num_proc or len(os.sched_getaffinity(0)), advance):
            records[index] = record
            if plan.limit is not None and _reached(plan.limit, mine, records):
                break
    return records


def _reached(limit, mine, records):
    """Whether the parts from the first on, without a gap, have `limit` documents."""
    count = 0
    for index in mine:
        if index not in records or count >= limit:
            break
        count += records[index]['documents']
    return count >= limit


def _make(plan, folder, todo, num_proc, advance):
    """Make the parts `todo`; yields (index, record) of each when it is finished."""
    if min(num_proc, len(todo)) <= 1:
        for index in todo:
            yield index, make_part(plan, folder, index, advance)
        return
    context = multiprocessing.get_context('spawn')  # tokenizers have threads, which fork() would cut off
    counters = context.Array('q', 3)
    seen = [0, 0, 0]

    def look():
        with counters.get_lock():
            now = list(counters)
        advance(*(a - b for a, b in zip(now, seen)))
        seen[:] = now
    pool = concurrent.futures.ProcessPoolExecutor(min(num_proc, len(todo)), context, _begin, (plan, folder, counters))
    try:
        waiting, rest = {}, iter(todo)
        while True:
            while len(waiting) < 2 * num_proc and (index := next(rest, None)) is not None:
                waiting[pool.submit(_make_here, index)] = index
            if not waiting:
                break
            done, _ = concurrent.futures.wait(waiting, timeout=2 * EVERY_S, return_when=concurrent.futures.FIRST_COMPLETED)
            look()
            for future in done:
                yield waiting.pop(future), future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise ValueError(f'a process that tokenizes was killed, for want of memory perhaps: what is finished is kept in {folder}; '
                         f'type the same command again, with fewer than --num_proc {num_proc} if it happens again') from None
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:  # they write under names of their own, so nothing is lost that is finished
            process.kill()


def _begin(plan, folder, counters):
    global _work
    os.environ['RAYON_NUM_THREADS'] = '1'  # a thread for each process
    _work = plan, folder, counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _make_here(index):
    plan, folder, counters = _work

    def advance(*numbers):
        with counters.get_lock():
            for i, number in enumerate(numbers):
                counters[i] += number
    return make_part(plan, folder, index, advance)


def make_part(plan, folder, index, advance=lambda done, tokens, texts: None):
    """Tokenize part `index` of a plan into `folder`; returns its record, a dict:

    tokens, documents, max_id; sha256 (hex) and size of the ids; lines of each unit; rows that are not blank, broken ones among them, the first (unit,
    line, problem) or None; modified: times of the files.
    """
    units, tokenizer = plan.parts[index], plan.tokenizer
    dtype = token_dtype({'dtype': 'uint16' if tokenizer.vocab_size <= 2**16 else 'uint32'})
    eot = None if tokenizer.eot_id is None else np.array([tokenizer.eot_id], dtype)
    tokens = texts = rows = broken = done = max_id = 0
    first, lines, table, digest = None, [], [], hashlib.sha256()
    modified = [_modified(unit.path) for unit in units]
    told, at = (0, 0, 0), time.monotonic()
    with _temporary(folder, index, 'bin') as f:
        for number, unit in enumerate(units):
            if plan.limit is not None and texts >= plan.limit:
                break
            lines.append(0)
            for content, problem, read in documents.read(unit, plan.text_field):
                lines[-1] += 1
                rows += content is not None or problem is not None
                if problem:
                    broken += 1
                    first = first or (number, lines[-1], problem)
                    if broken == rows == 1000:
                        raise ValueError(f'1,000 of 1,000 rows have no text, so nothing was written; the last is in {unit.path} ({problem}): '
                                         f'correct the file, or name the field that holds the text with --text_field')
                elif content is not None and len(content):
                    made = isinstance(content, np.ndarray)  # tokens already
                    try:
                        ids = content if made else tokenizer.encode(content)
                        ids = check_ids(ids, tokenizer.vocab_size).astype(dtype) if len(ids) else ids.astype(dtype)
                    except ValueError as error:
                        raise ValueError(f'{unit.path}: {error}') from None
                    if unit.last and eot is not None and not made:
                        ids = np.concatenate([ids, eot])
                    if len(ids):
                        f.write(ids.data)
                        digest.update(ids.data)
                        max_id = max(max_id, int(ids.max()))
                    whole = not made and unit.last and not (unit.begin and unit.path.lower().endswith('.txt'))
                    key = hashlib.blake2b(content.encode('utf-8', 'replace'), digest_size=16).digest() if whole else bytes(16)
                    table.append(len(ids).to_bytes(8, 'little') + bytes([unit.last]) + key)
                    tokens, texts = tokens + len(ids), texts + unit.last
                    if plan.limit is not None and texts >= plan.limit:
                        break
                if time.monotonic() - at > EVERY_S:
                    now = done + min(read, unit.size), tokens, texts
                    advance(*(a - b for a, b in zip(now, told)))
                    told, at = now, time.monotonic()
            done += unit.size
    with _temporary(folder, index, 'docs') as f:
        f.write(b''.join(table))
    advance(*(a - b for a, b in zip((done, tokens, texts), told)))
    record = {'tokens': tokens, 'documents': texts, 'pieces': len(table), 'max_id': max_id, 'size': tokens * dtype.itemsize, 'sha256': digest.hexdigest(), 'lines': lines,
              'rows': rows, 'broken': broken, 'first': first, 'modified': modified}
    _publish(_path(folder, index, 'json'), json.dumps(record).encode())
    return record


def read_record(folder, index, units=None):
    """The record of a finished part, or None where it is not whole; with `units`, their files must not have changed since either."""
    try:
        with open(_path(folder, index, 'json')) as f:
            record = json.load(f)
        sizes = [os.path.getsize(_path(folder, index, kind)) for kind in ('bin', 'docs')]
    except (OSError, ValueError):
        return None
    if sizes != [record['size'], record['pieces'] * DOCUMENT.itemsize]:
        return None
    if units is not None and record['modified'] != [_modified(unit.path) for unit in units]:
        return None
    digest = hashlib.sha256()
    with open(_path(folder, index, 'bin'), 'rb') as f:
        while block := f.read(2**22):
            digest.update(block)
    return record if digest.hexdigest() == record['sha256'] else None


def assemble(plan, folders, output, *, split, val_every=None, dedup=False, max_broken=0.01, sharded=False, extra=None):
    """Make the data set of the finished parts of `plan`, found in any of `folders`; returns (the closed TokenFileWriter, a dict of counts).

    split: one sentence for meta.pkl; val_every: every k-th document of those whose source does not say goes to val, None: none; dedup: leave out a document whose
    text came before; max_broken: fraction of rows that may be without a text; sharded: one file for each part. Raises ValueError for
    missing parts, too many broken rows, and when a split stays empty.
    """
    where, records = {}, []
    for index in range(len(plan.parts)):
        found = next(((folder, record) for folder in folders if (record := read_record(folder, index))), None)
        if found:
            where[index] = found[0]
            records.append((index, found[1]))
        if plan.limit is not None and _reached(plan.limit, range(len(plan.parts)), dict(records)):
            break
        if not found:
            missing = [i for i in range(len(plan.parts)) if not any(os.path.exists(_path(folder, i, 'json')) for folder in folders)] or [index]
            raise ValueError(f'{len(missing)} of {len(plan.parts)} parts are missing or damaged, the first is {missing[0]}: run each --shard to its end and name all their folders')
    counts = count(plan, records, max_broken)
    tables = [_path(where[index], index, 'docs') for index, _ in records]
    dropped = repeated(tables, output) if dedup else None
    tokenizer = plan.tokenizer
    writer = TokenFileWriter(output, vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id, tokenizer=tokenizer, split=split, extra=extra, sharded=sharded)
    number = taken = row = 0  # documents numbered so far, documents taken, rows of tables read
    with writer, tqdm(total=sum(record['size'] for _, record in records), unit='B', unit_scale=True, desc='writing', disable=None) as bar:
        for (index, record), path in zip(records, tables):
            table = np.fromfile(path, dtype=DOCUMENT)
            own = plan.parts[index][0].split
            keep = np.ones(len(table), bool) if dropped is None else ~dropped[row:row + len(table)]
            row += len(table)
            before = np.cumsum(keep & table['last']) - (keep & table['last'])  # documents kept in this part that ended before
            if plan.limit is not None:
                keep &= taken + before < plan.limit
            to_val = np.full(len(table), own == 'val')
            if own is None and val_every:
                to_val = (number + before) % val_every == val_every - 1
            ended = int((keep & table['last']).sum())
            number, taken = number + ended * (own is None), taken + ended
            _write(writer, _path(where[index], index, 'bin'), record, table, {'val': keep & to_val, 'train': keep & ~to_val})
            bar.update(record['size'])
        if not sum(writer.meta['tokens'].values()):
            raise ValueError('there is no text in these files')
        if val_every and number and not writer.meta['tokens']['val']:
            raise ValueError(f'{number:,} documents are too few for every {val_every}th to go to val: give more, or type a larger share, such as --val_fraction 0.5')
    counts['repeated'] = 0 if dropped is None else int(dropped.sum())
    return writer, counts


def count(plan, records, max_broken):
    """{'rows', 'broken', 'left_out': a sentence or ''}. Raises ValueError where more than max_broken of the rows have no text."""
    rows, broken = (sum(record[key] for _, record in records) for key in ('rows', 'broken'))
    said = ''
    if broken:
        index, record = next((index, record) for index, record in records if record['broken'])
        number, line, problem = record['first']
        unit, lines = plan.parts[index][number], 0
        for i, other in records:
            lines += sum(n for u, n in zip(plan.parts[i], other['lines']) if u.path == unit.path and (i, u.begin) < (index, unit.begin))
        kind = 'row' if unit.path.lower().endswith('.parquet') else 'line'
        first = f'{unit.path} {kind} {lines + line:,} ({problem})'
        said = f'{broken:,} of {rows:,} rows have no text and were left out, the first is {first}'
        if broken > max_broken * rows:
            raise ValueError(f'{broken:,} of {rows:,} rows have no text, more than {100 * max_broken:g} %, so nothing was written; the first is {first}: '
                             f'correct the file, or name the field that holds the text with --text_field, or type --max_broken {-(-100 * broken // rows) / 100:g}')
    return {'rows': rows, 'broken': broken, 'left_out': said}


def _write(writer, path, record, table, to):
    """Write the pieces of a part that `to` {split: bool array} names, in order, to their splits."""
    for split in SPLITS:
        if len(table) and to[split].all():
            writer.adopt(split, path, record['tokens'], np.cumsum(table['tokens'])[table['last']], record['max_id'])
            return
    if not record['tokens']:
        return
    ids, edges = np.memmap(path, dtype=writer.dtype, mode='r'), np.concatenate([[0], np.cumsum(table['tokens'])]).astype(np.int64)
    for split in SPLITS:
        wanted = np.flatnonzero(to[split])
        if not len(wanted):
            continue
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1)
        writer.append(split, np.concatenate([ids[edges[run[0]]:edges[run[-1] + 1]] for run in runs]), np.cumsum(table['tokens'][wanted])[table['last'][wanted]])


def repeated(tables, scratch):
    """A bool array (in a file below `scratch` that is gone already) over the rows of all `tables` (.docs files): True for a document that came before. Memory holds
    BUCKET rows: they are dealt by hash to files, each sorted for itself."""
    rows = sum(os.path.getsize(path) // DOCUMENT.itemsize for path in tables)
    buckets = max(1, -(-rows // BUCKET))
    entry = np.dtype([('hash', '<u8', 2), ('row', '<u8')])
    with tempfile.TemporaryDirectory(dir=scratch, prefix='hashes-') as folder:
        first = 0
        for path in tables:
            table = np.fromfile(path, dtype=DOCUMENT)
            entries = np.empty(len(table), entry)
            entries['hash'], entries['row'] = table['hash'], first + np.arange(len(table))
            entries = entries[(table['hash'] != 0).any(axis=1)]
            first += len(table)
            mine = entries['hash'][:, 0] % np.uint64(buckets)
            for bucket in np.unique(mine):
                with open(os.path.join(folder, str(bucket)), 'ab') as f:
                    f.write(entries[mine == bucket].tobytes())
        with tempfile.TemporaryFile(dir=scratch) as f:
            f.truncate(max(1, rows))
            dropped = np.memmap(f, dtype=bool, mode='r+', shape=(max(1, rows),))
        for bucket in range(buckets):
            if os.path.exists(path := os.path.join(folder, str(bucket))):
                entries = np.fromfile(path, dtype=entry)
                entries = entries[np.lexsort((entries['row'], entries['hash'][:, 1], entries['hash'][:, 0]))]
                dropped[entries['row'][1:][(entries['hash'][1:] == entries['hash'][:-1]).all(axis=1)]] = True
    return dropped[:rows]


def clear(plan, output):
    """Remove the parts of a plan from `output`, once the data set is there."""
    shutil.rmtree(plan.folder(output), ignore_errors=True)


def forget(plan, output, finished=False):
    """Remove what work that was given up left in `output`, unless there are finished parts that a next call can go on with; `finished`: these too."""
    folder = plan.folder(output)
    if os.path.isdir(folder) and (finished or not any(name[:6].isdigit() and name.endswith('.json') for name in os.listdir(folder))):
        clear(plan, output)
        if not os.listdir(output):
            os.rmdir(output)


def _path(folder, index, kind):
    return os.path.join(folder, f'{index:06d}.{kind}')


class _temporary:
    """A file that gets its name when the block ends without an error."""

    def __init__(self, folder, index, kind):
        self.path = _path(folder, index, kind)

    def __enter__(self):
        self.file = open(f'{self.path}.{os.getpid()}.tmp', 'wb')
        return self.file

    def __exit__(self, error_type, error, traceback):
        try:
            self.file.close()  # the checksum in the record vouches for it, not fsync()
            if error_type is None:
                os.replace(self.file.name, self.path)
        finally:
            if os.path.exists(self.file.name):
                os.remove(self.file.name)


def _publish(path, content):
    with open(f'{path}.{os.getpid()}.tmp', 'wb') as f:
        f.write(content)
    os.replace(f.name, path)


def _modified(path):
    return None if documents.is_url(path) else os.stat(path).st_mtime_ns
