"""
Show what is in a prepared data set: counts, documents, vocabulary, text.

    python data/inspect_dataset.py shakespeare_char
    python data/inspect_dataset.py slimpajama_6b_llama --at 1000 --tokens 300
    python data/inspect_dataset.py openwebtext --split val

Draws the lengths of documents and the use of ids into inspect_SPLIT.png in
the folder of the data set (--output FILE elsewhere). All ids are counted,
unless there are more than --sample of them (default: 200 million): then
evenly spaced stretches, and it says so.
"""

# first, so that a Ctrl-C while libraries are imported ends this without a traceback
from onetrain.command_line import ROOT, ArgumentParser, run_command  # noqa: F401

# isort: split
import argparse
import os
from collections.abc import Iterator

import numpy as np

from onetrain.config import UserError
from onetrain.data.dataset import LocalFile, Tokens, fingerprint_of_pieces
from onetrain.data.token_file import read_meta, token_dtype
from onetrain.files import replacing
from onetrain.tokenizers.base import tokenizer_of

STRETCH = 2**20  # tokens
MOST = 2**21  # ids that are told apart


def arguments(argv: list[str]) -> argparse.Namespace:
    """Return the parsed `argv`. Raises UserError."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('dataset', help='a folder of data/, or a path')
    parser.add_argument('--split', default='train', choices=('train', 'val'))
    parser.add_argument(
        '--at',
        type=int,
        default=0,
        metavar='N',
        help='the token from which text is shown, negative: from the end',
    )
    parser.add_argument('--tokens', type=int, default=200, help='how many tokens of text are shown')
    parser.add_argument(
        '--sample', type=int, default=200_000_000, help='how many tokens are counted at most'
    )
    parser.add_argument('--output', metavar='FILE', help='of the picture')
    args = parser.parse_args(argv)
    for name in ('tokens', 'sample'):
        if getattr(args, name) < 1:
            raise UserError(f'--{name} {getattr(args, name)} must be at least 1')
    if args.output and (
        not args.output.endswith(('.png', '.pdf', '.svg'))
        or os.path.isdir(args.output)
        or not os.path.isdir(os.path.dirname(args.output) or '.')
    ):
        raise UserError(
            f'--output {args.output} is no picture: name a file that ends in .png, .pdf or .svg, in'
            ' a folder that is there'
        )
    return args


def main(argv: list[str] | None = None) -> dict:
    """Print and draw; argv as in sys.argv[1:]. Raises UserError for what the user got wrong.
    Returns what was found, a dict.
    """
    args = arguments(argv)
    folder = next(
        (
            path
            for path in (args.dataset, os.path.join(ROOT, 'data', args.dataset))
            if os.path.isdir(path)
        ),
        None,
    )
    if folder is None:
        raise UserError(
            f'there is no data set {args.dataset}: type the name of a folder of data/ or a path'
        )
    meta, tokens = open_split(folder, args.split)
    total = len(tokens)
    if not -total <= args.at < total:
        raise UserError(f'--at {args.at} is beyond the {total:,} tokens of {args.split}')
    found = {
        'tokens': total,
        **use_of_ids(tokens, meta, args.sample),
        'lengths': lengths(folder, args.split, meta, tokens, args.sample),
    }
    found['doubts'] = doubts(found, tokens, meta)
    for line in describe(folder, tokens, meta, found):
        print(line)
    show(folder, meta, tokens, args.at % total, args.tokens, found)
    path = args.output or os.path.join(folder, f'inspect_{args.split}.png')
    draw(path, f'{os.path.basename(os.path.abspath(folder))}, {args.split}', found)
    print(f'\nwrote {path}')
    return found


def open_split(folder: str, split: str) -> tuple:
    """Return (meta, Tokens) of a split. Raises UserError where it is not here."""
    meta = read_meta(folder)
    names = [name for name, _ in meta.get('files', {}).get(split, [])] or [f'{split}.bin']
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise UserError(f'{folder} has no {missing[0]}: run its prepare.py first')
    dtype = token_dtype(meta)
    for name in names:
        size = os.path.getsize(os.path.join(folder, name))
        if not size or size % dtype.itemsize:
            raise UserError(
                f'{os.path.join(folder, name)} has {size} bytes, which is no whole number of'
                f' {dtype.name} tokens'
            )
    pieces = [LocalFile(os.path.join(folder, name), dtype) for name in names]
    return meta, Tokens(folder, split, pieces, fingerprint_of_pieces(pieces), None)


def stretches(total: int, sample: int) -> Iterator:
    """Yield (begin, end) of all tokens, or of evenly spaced stretches with about `sample` of
    them.
    """
    count = -(-total // STRETCH)
    wanted = count if total <= sample else max(1, sample // STRETCH)
    for i in range(wanted):
        begin = (i * count // wanted) * STRETCH
        yield begin, min(begin + STRETCH, total)


def use_of_ids(tokens: Tokens, meta: dict, sample: int) -> dict:
    """Return {'counts': of each id (from MOST on together), 'largest', 'counted': tokens, 'odd':
    share of ids at odd places that are below 16, 'even': at even ones}.
    """
    counts = np.zeros(min(meta.get('vocab_size', 1), MOST), np.int64)
    counted = 0
    small = np.zeros(2, np.int64)
    largest = 0
    for begin, end in stretches(len(tokens), sample):
        ids = tokens.slice(begin, end)
        largest = max(largest, int(ids.max()))
        here = np.bincount(np.minimum(ids.astype(np.int64), MOST), minlength=len(counts))
        counts = np.pad(counts, (0, len(here) - len(counts))) + here
        small += [(ids[::2] < 16).sum(), (ids[1::2] < 16).sum()]
        counted += len(ids)
    return {
        'counts': counts,
        'largest': largest,
        'counted': counted,
        'even': float(small[0]) / -(-counted // 2),
        'odd': float(small[1]) / max(1, counted // 2),
    }


def lengths(folder: str, split: str, meta: dict, tokens: Tokens, sample: int) -> np.ndarray | None:
    """Return tokens of each document, an array: of train.ends where there is one, else by the id
    that ends a document; None where neither tells.
    """
    path = os.path.join(folder, meta.get('ends', {}).get(split, 'none'))
    if os.path.isfile(path):
        ends = np.fromfile(path, '<u8', count=os.path.getsize(path) // 8).astype(np.int64)
    elif meta.get('eot_id') is not None:
        ends = np.concatenate(
            [
                np.flatnonzero(
                    tokens.slice(begin, min(begin + STRETCH, sample, len(tokens))) == meta['eot_id']
                )
                + begin
                + 1
                for begin in range(0, min(len(tokens), sample), STRETCH)
            ]
        )
    else:
        return None
    return np.diff(ends, prepend=0)


def doubts(found: dict, tokens: Tokens, meta: dict) -> list[str]:
    """Return sentences on what looks wrong."""
    said, counts, size, dtype = [], found['counts'], meta.get('vocab_size'), tokens.pieces[0].dtype
    if dtype.itemsize == 2 and found['odd'] > 0.9 and found['even'] < 0.5:
        said.append(
            f'{found["odd"]:.0%} of the ids at odd places are below 16, {found["even"]:.0%} of the'
            ' others: these are uint32 tokens read as uint16'
        )
    if (
        dtype.itemsize == 4
        and size
        and len(counts) > size
        and counts[2**16 :].sum() > 0.5 * found['counted']
    ):
        said.append(
            'most ids are above 65,535 and beyond the vocabulary: these are uint16 tokens read as'
            ' uint32'
        )
    if size and len(counts) > size and counts[size:].any():
        said.append(
            f'{int(counts[size:].sum()):,} ids are beyond the vocabulary of {size:,}, the largest'
            f' is {found["largest"]:,}'
        )
    stated = meta.get('tokens', {}).get(tokens.split)
    if stated is not None and stated != found['tokens']:
        said.append(f'meta.pkl states {stated:,} tokens')
    if meta.get('fingerprint', {}).get(tokens.split) not in (None, tokens.fingerprint):
        said.append(
            'these are not the bytes that meta.pkl describes: train.py refuses them, run prepare.py'
            ' again'
        )
    eot = meta.get('eot_id')
    if (
        eot is not None
        and found['counted'] == found['tokens']
        and (eot >= len(counts) or not counts[eot])
    ):
        said.append(f'the id {eot}, which ends a document, never occurs')
    return said


def describe(folder: str, tokens: Tokens, meta: dict, found: dict) -> Iterator:
    """Yield the lines about a split: sizes, ids, lengths of documents, warnings."""
    pieces, counts, size = tokens.pieces, found['counts'], meta.get('vocab_size')
    used = int((counts > 0).sum())
    yield (
        f'{folder}, {tokens.split}: {found["tokens"]:,} tokens, {pieces[0].dtype.name},'
        f' {len(pieces)} file{"s" if len(pieces) > 1 else ""},'
        f' {sum(piece.size for piece in pieces) / 1e6:,.1f} MB'
    )
    if not meta:
        yield 'there is no meta.pkl, so these are taken for uint16 tokens of GPT-2'
    yield (
        f'tokenizer: {meta.get("tokenizer", "not stated")}, end of text: {meta.get("eot_id")};'
        f' {meta.get("split", "no word on the split")}'
    )
    part = (
        ''
        if found['counted'] == found['tokens']
        else f' (of {found["counted"]:,} tokens that were counted)'
    )
    never = max(size, len(counts)) - used if size else None
    yield (
        f'ids: {used:,} of {size:,} occur{part}, {never:,} never; the largest is'
        f' {found["largest"]:,}'
        if size
        else f'ids: {used:,} occur{part}, the largest is {found["largest"]:,}'
    )
    share = counts[counts > 0] / found['counted']
    entropy = -(share * np.log2(share)).sum()
    yield (
        f'entropy of single ids: {entropy:.2f} bits, as of {2**entropy:,.0f} equally frequent ones'
    )
    if found['lengths'] is not None and len(found['lengths']):
        low, middle, high = np.percentile(found['lengths'], (10, 50, 90))
        yield (
            f'documents: {len(found["lengths"]):,}, of {found["lengths"].mean():,.0f} tokens in the'
            f' mean; 10 % have {low:,.0f} or fewer, half {middle:,.0f}, 10 % {high:,.0f} or more,'
            f' the longest {found["lengths"].max():,}'
        )
    yield from (f'LOOK: {doubt}' for doubt in found['doubts'])


def show(folder: str, meta: dict, tokens: Tokens, at: int, count: int, found: dict) -> None:
    """Print text of the data set, and its most frequent tokens."""
    try:
        tokenizer = tokenizer_of(folder, meta)
    except ValueError as error:
        print(f'no text: {error}')
        return
    top = np.argsort(found['counts'])[::-1][:12]
    print(
        'most frequent: '
        + ', '.join(
            f'{tokenizer.decode([i])!r} {found["counts"][i] / found["counted"]:.1%}'
            for i in top
            if found['counts'][i]
        )
    )
    ids = tokens.slice(at, min(at + count, len(tokens)))
    print(f'---- tokens {at:,} to {at + len(ids):,}\n{tokenizer.decode(ids.tolist())}\n----')


def draw(path: str, title: str, found: dict) -> None:
    """A picture of the lengths of documents and of how often ids occur."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    known = found['lengths'] is not None and len(found['lengths'])
    figure, axes = pyplot.subplots(
        1, 2 if known else 1, figsize=(12 if known else 6.5, 4.2), squeeze=False
    )
    if known:
        longest = max(2, int(found['lengths'].max()))
        axes[0][0].hist(
            np.maximum(found['lengths'], 1),
            bins=np.unique(np.geomspace(1, longest + 1, 60).astype(int)),
        )
        axes[0][0].set(
            xscale='log',
            xlabel='tokens',
            ylabel='documents',
            title=f'{len(found["lengths"]):,} documents',
        )
    often = np.sort(found['counts'][found['counts'] > 0])[::-1]
    axes[0][-1].loglog(np.arange(1, len(often) + 1), often)
    axes[0][-1].set(xlabel='rank of the id', ylabel='times', title=f'{len(often):,} ids that occur')
    figure.suptitle(title)
    figure.tight_layout()
    with replacing(path) as f:
        figure.savefig(f, format=os.path.splitext(path)[1][1:], dpi=120)
    pyplot.close(figure)


if __name__ == '__main__':
    from onetrain.prepare import cli

    cli.run(main)
