"""From finished parts to a data set: here documents get their numbers, in the order of the corpus.
Every k-th goes to val, and a repeated one is left out.
"""

import collections
import concurrent.futures
import functools
import os
import tempfile
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from onetrain.config import UserError
from onetrain.data.token_file import SPLITS, TokenFileWriter
from onetrain.prepare.parts import DOCUMENT

if TYPE_CHECKING:
    from onetrain.prepare.parts import Part
    from onetrain.prepare.pipeline import Plan

BUCKET = 2**22  # documents that find_repeated() sorts at once


def assemble(
    plan: 'Plan',
    made: 'list[Part]',
    output: str,
    *,
    split: str,
    val_every: int | None = None,
    dedup: bool = False,
    max_broken: float = 0.01,
    max_lost: float = 0.01,
    sharded: bool = False,
    extra: dict | None = None,
) -> tuple:
    """Make the data set of `made`, the Parts of `plan` in order; returns (the closed
    TokenFileWriter, a dict of counts).

    split: one sentence for meta.pkl; val_every: every k-th document of those whose source does not
    say goes to val, None: none; dedup: leave out a document whose text came before; max_broken:
    fraction of rows that may be without a text; max_lost: of characters that the tokenizer may not
    be able to write; sharded: one file for each part. Raises UserError for too many broken rows,
    and when a split stays empty.
    """
    counts = count_rows(plan, made, max_broken)
    counts['lost'] = count_lost(made, max_lost)
    dropped = find_repeated([part.path('docs') for part in made], output) if dedup else None
    tokenizer = plan.tokenizer
    encoders = sorted({part.record.get('encoder') or '' for part in made} - {''})
    writer = TokenFileWriter(
        output,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer=tokenizer,
        split=split,
        extra={**(extra or {}), **({'encoder': ', '.join(encoders)} if encoders else {})},
        sharded=sharded,
    )
    with (
        writer,
        tqdm(
            total=sum(part.record['size'] for part in made),
            unit='B',
            unit_scale=True,
            desc='writing',
            disable=None,
        ) as bar,
    ):
        numbered = _write_parts(plan, made, writer, dropped, val_every, bar)
        if not sum(writer.meta['tokens'].values()):
            raise UserError('there is no text in these files')
        if val_every and numbered and not writer.meta['tokens']['val']:
            raise UserError(
                f'{numbered:,} documents are too few for every {val_every}th to go to val: give'
                ' more, or type a larger share, such as --val_fraction 0.5'
            )
    counts['repeated'] = 0 if dropped is None else int(dropped.sum())
    return writer, counts


def _write_parts(plan, made, writer, dropped, val_every, bar):
    """Write each part where its documents belong; returns how many documents were numbered.
    dropped: (rows of all tables,) bool, documents to leave out, or None.
    """
    number = taken = row = 0  # documents numbered so far, documents taken, rows of tables read
    threads = min(8, len(os.sched_getaffinity(0)))  # each holds the ids of a part
    waiting = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for part in made:
            table = np.fromfile(part.path('docs'), dtype=DOCUMENT)
            own = _own_splits(plan, part)
            keep = np.ones(len(table), bool)
            if dropped is not None:
                keep = ~dropped[row : row + len(table)]
            row += len(table)
            if plan.limit is not None:
                keep &= taken + _before(keep & table['last']) < plan.limit
            numbered = keep & table['last'] & (own == '')
            to_val = own == 'val'
            if val_every:
                turn = (number + _before(numbered)) % val_every
                to_val |= (own == '') & (turn == val_every - 1)
            number += int(numbered.sum())
            taken += int((keep & table['last']).sum())
            places = _places(writer, table, {'val': keep & to_val, 'train': keep & ~to_val})
            waiting.append((part, pool.submit(_write, writer, part, table, places)))
            if len(waiting) > threads:
                _end(*waiting.popleft(), bar)
        while waiting:
            _end(*waiting.popleft(), bar)
    return number


def count_rows(plan: 'Plan', made: 'list[Part]', max_broken: float) -> dict:
    """Return {'rows', 'broken', 'left_out': a sentence or ''}. Raises UserError where more than
    max_broken of the rows have no text.
    """
    rows, broken = (sum(part.record[key] for part in made) for key in ('rows', 'broken'))
    said = ''
    if broken:
        part = next(part for part in made if part.record['broken'])
        number, line, problem = part.record['first']
        unit, lines = plan.parts[part.number][number], 0
        for other in made:
            lines += sum(
                n
                for u, n in zip(plan.parts[other.number], other.record['lines'])
                if u.path == unit.path and (other.number, u.begin) < (part.number, unit.begin)
            )
        kind = 'row' if unit.path.lower().endswith('.parquet') else 'line'
        first = f'{unit.path} {kind} {lines + line:,} ({problem})'
        said = f'{broken:,} of {rows:,} rows have no text and were left out, the first is {first}'
        if broken > max_broken * rows:
            raise UserError(
                f'{broken:,} of {rows:,} rows have no text, more than {100 * max_broken:g} %, so'
                f' nothing was written; the first is {first}: correct the file, or name the field'
                ' that holds the text with --text_field, or type --max_broken'
                f' {-(-100 * broken // rows) / 100:g}'
            )
    return {'rows': rows, 'broken': broken, 'left_out': said}


def count_lost(made: 'list[Part]', max_lost: float) -> str:
    """Return a sentence on the characters that the tokenizer cannot write, or ''. Raises UserError
    where they are more than max_lost of those that were looked at.
    """
    seen, lost = (sum(part.record[key] for part in made) for key in ('characters', 'lost'))
    if not lost:
        return ''
    examples = ''.join(dict.fromkeys(''.join(part.record['lost_examples'] for part in made)))[:8]
    said = (
        f'{lost:,} of {seen:,} characters that were decoded again ({100 * lost / seen:.2g} %, such'
        f' as {examples!r}) are lost: this tokenizer cannot write them'
    )
    if lost > max_lost * seen:
        raise UserError(
            f'{said}, more than {100 * max_lost:g} %, so nothing was written: name another'
            ' --tokenizer, such as one with bytes for what it does not know, or type --max_lost'
            f' {-(-1000 * lost // seen) / 1000:g}'
        )
    return said


def _before(ends):
    """Return how many of a bool array are set before each of them."""
    return np.cumsum(ends) - ends


def _own_splits(plan, part):
    """Return the splits that the source says, '' where it does not, of the pieces of a part."""
    return np.repeat(
        [unit.split or '' for unit in plan.parts[part.number]], part.record['unit_pieces']
    )


def _places(writer, table, to):
    """Give the pieces of a part that `to` ({split: bool array}) names their places in the data set:
    {split: (place, bool array, tokens)}.
    """
    places = {}
    for split in SPLITS:
        tokens = table['tokens'][to[split]].astype(np.int64)
        if place := writer.place(split, tokens.sum(), np.cumsum(tokens)[table['last'][to[split]]]):
            places[split] = place, to[split], tokens.sum()
    return places


def _write(writer, part, table, places):
    """Write the pieces of a part to their `places`, or where these are in one file only read them:
    returns functions that write, to be called in the order of the parts.
    """
    if any(tokens == part.record['tokens'] for _, _, tokens in places.values()):
        ((place, _, _),) = places.values()
        work = [functools.partial(writer.link_file, place, part.path('bin'), part.record['max_id'])]
    else:
        ids = np.fromfile(part.path('bin'), dtype=writer.dtype) if places else None
        edges = np.concatenate([[0], np.cumsum(table['tokens'])]).astype(np.int64)
        work = []
        for place, wanted, _ in places.values():
            wanted = np.flatnonzero(wanted)
            runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1)
            work.append(
                functools.partial(
                    writer.fill,
                    place,
                    np.concatenate([ids[edges[run[0]] : edges[run[-1] + 1]] for run in runs]),
                )
            )
    if not writer.sharded:
        return work
    for one in work:
        one()
    return []


def _end(part, future, bar):
    for write in future.result():
        write()
    bar.update(part.record['size'])


def find_repeated(tables: list[str], scratch: str) -> np.ndarray:
    """Return a bool array (in a file below `scratch` that is gone already) over the rows of all
    `tables` (.docs files): True for a document that came before. Memory holds BUCKET rows: they are
    dealt by hash to files, each sorted for itself.
    """
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
                entries = entries[
                    np.lexsort((entries['row'], entries['hash'][:, 1], entries['hash'][:, 0]))
                ]
                dropped[
                    entries['row'][1:][(entries['hash'][1:] == entries['hash'][:-1]).all(axis=1)]
                ] = True
    return dropped[:rows]
