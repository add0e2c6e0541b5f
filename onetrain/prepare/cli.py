"""What every prepare.py does around its own work: its options, the closing lines, and how a user's
error ends it.
"""

import argparse
import collections
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from onetrain.command_line import ROOT, ArgumentParser, run_command
from onetrain.config import UserError
from onetrain.prepare import assemble, documents, pipeline
from onetrain.tokenizers.base import CharTokenizer, load_tokenizer

if TYPE_CHECKING:
    from onetrain.data.token_file import TokenFileWriter
    from onetrain.prepare.parts import Part
    from onetrain.prepare.pipeline import Plan
    from onetrain.tokenizers.base import Tokenizer

DATA = os.path.join(ROOT, 'data')
SHARDED_FROM = 100e9  # bytes of ids, above which to copy them once more takes too long
OPTIONS = """
A corpus of any size goes through as many processes as there are cores.
Interrupted work continues where it stopped when the same command is typed
again. Many machines take a share each, --shard 1/3, 2/3, 3/3, and one of them
then makes the data set with --merge and the --output folders of all. --input
takes files, folders, patterns and URLs (s3://, https://,
hf://datasets/OWNER/NAME) of .txt, .md, .jsonl, .json (both also .gz and
.zst), .parquet and, for token ids, .npz. The result does not depend on
--num_proc or --shard.
"""


def argument_parser(docstring: str, folder: str) -> 'ArgumentParser':
    """Return an ArgumentParser with --output, which is `folder` unless given. The docstring of the
    script is its help.
    """
    parser = ArgumentParser(description=docstring)
    parser.add_argument(
        '--output',
        default=folder,
        metavar='FOLDER',
        help='where the data set goes, default: the folder of this script',
    )
    return parser


def corpus_parser(
    docstring: str,
    folder: str,
    *,
    source: list[str] | None = None,
    tokenizer: str = 'gpt2',
    text_field: str = 'text',
    val_fraction: float | None = None,
) -> 'ArgumentParser':
    """Return an ArgumentParser with the options of prepare_corpus(). source: default of --input, a
    list, or None where it must be given; val_fraction: of --val_fraction, None where the source has
    a split of its own.
    """
    parser = argument_parser(docstring + OPTIONS, folder)
    parser.add_argument(
        '--input',
        nargs='+',
        metavar='PATH',
        default=source,
        required=source is None,
        help=f'where the documents are{", default: " + " ".join(source) if source else ""}',
    )
    parser.add_argument(
        '--tokenizer',
        default=tokenizer,
        help=f'bytes, char, a tiktoken name, a folder or a .model file, default: {tokenizer}',
    )
    parser.add_argument(
        '--text_field',
        default=text_field,
        help=f'where JSON and parquet have the text, default: {text_field}',
    )
    parser.add_argument(
        '--val_fraction',
        type=float,
        default=val_fraction,
        help=f'share that goes to val, default: {val_fraction or "the split of the source"}',
    )
    _add_work_options(parser)
    return parser


def _add_work_options(parser):
    """Add the options of prepare_corpus() about how the work is done."""
    parser.add_argument('--num_proc', type=int, help='processes, default: one for each core')
    parser.add_argument('--limit', type=int, metavar='N', help='only the first N documents')
    parser.add_argument(
        '--dedup', action='store_true', help='leave out documents whose text came before'
    )
    parser.add_argument(
        '--max_broken',
        type=float,
        default=0.01,
        metavar='FRACTION',
        help='of rows without a text, which are left out; more stop the run, default: 0.01',
    )
    parser.add_argument(
        '--max_lost',
        type=float,
        default=0.01,
        metavar='FRACTION',
        help=(
            'of characters that the tokenizer cannot write, found out by decoding a sample; more'
            ' stop the run, default: 0.01'
        ),
    )
    parser.add_argument(
        '--sharded',
        action=argparse.BooleanOptionalAction,
        default=None,
        help=(
            'leave the token ids in many files, which are read as one, instead of copying them'
            f' into one; default: above {SHARDED_FROM / 1e9:g} GB of ids'
        ),
    )
    parser.add_argument(
        '--shard',
        metavar='I/N',
        help='only the I-th of N shares of the work; --merge makes the data set',
    )
    parser.add_argument(
        '--merge',
        nargs='+',
        metavar='FOLDER',
        help='make the data set of the shares in these folders',
    )


def prepare_corpus(
    args: argparse.Namespace,
    folder: str,
    *,
    published: bool = False,
    cut_txt: bool = False,
    tokenizer_from: str | None = None,
    eot: str | None = None,
    config: str | None = None,
    endings: tuple = documents.FOLDER_ENDINGS,
) -> None:
    """Prepare the data set that `args` (of corpus_parser) describe. Raises UserError for what the
    user got wrong.

    published: the source has a validation split, told by names of files; cut_txt: a .txt is cut in
    two, else it is one document; tokenizer_from: the hub's name of the tokenizer, for the message
    where it is missing; eot: how the token is written that must end its texts; config: the recipe
    made for this data set; endings: of files that are taken from a folder.
    """
    shard = check_arguments(args)
    # before a tokenizer is fetched or made
    files, splits = (None, None) if args.merge else find_input(args, published, endings)
    tokenizer = find_tokenizer(
        args.tokenizer, folder, tokenizer_from, lambda: characters(args, endings)
    )
    check_end_of_text(args.tokenizer, tokenizer, eot, tokenizer_from)
    folders = None
    if args.merge:
        plan, folders = pipeline.Plan.load(args.merge, tokenizer)
    else:
        plan = plan_of_files(args, files, splits, tokenizer, cut_txt, endings)
    with pipeline.exclusive_lock(plan, args.output, shard):
        try:
            made = (
                pipeline.find_parts(plan, folders)
                if args.merge
                else pipeline.tokenize(plan, args.output, num_proc=args.num_proc, shard=shard)
            )
            if shard[1] > 1:
                print(
                    f'share {args.shard} is in {plan.folder(args.output)}; when all {shard[1]} are'
                    ' there, type the same command with --merge and the --output folders of all'
                    ' instead of --shard'
                )
                return
            writer, counts = assemble_parts(args, plan, made, tokenizer, cut_txt)
        except BaseException as error:
            pipeline.discard(
                plan,
                args.output,
                finished=not args.merge
                and plan.size() <= pipeline.PART_BYTES[0]
                and isinstance(error, ValueError),
            )
            raise
        pipeline.remove_parts(plan, args.output)
    report_corpus(args, tokenizer, counts)
    report(writer, folder, config)


def report_corpus(args: argparse.Namespace, tokenizer: 'Tokenizer', counts: dict) -> None:
    """Print what was left out of a corpus. counts: of assemble()."""
    for said in filter(None, (counts['left_out'], counts['lost'])):
        print(said)
    if args.dedup:
        print(f'{counts["repeated"]:,} documents came before and were left out')
    if tokenizer.eot_id is None and args.tokenizer != 'char':
        print(f'{args.tokenizer} names no end of text, so documents follow each other without one')


def plan_of_files(
    args: argparse.Namespace,
    files: list[str],
    splits: dict[str, str] | None,
    tokenizer: 'Tokenizer',
    cut_txt: bool,
    endings: tuple,
) -> 'Plan':
    """Return the pipeline.Plan for `files`, after telling which others are left out."""
    for said in describe_left_out(args.input, endings):
        print(said)
    return pipeline.Plan.of_files(
        files,
        tokenizer,
        splits=splits,
        txt_val_fraction=args.val_fraction if cut_txt else None,
        text_field=args.text_field,
        limit=args.limit,
    )


def check_end_of_text(
    name: str, tokenizer: 'Tokenizer', eot: str | None, tokenizer_from: str | None
) -> None:
    """Raise UserError for a tokenizer that does not end its texts with the token `eot`, if that is
    given.
    """
    if eot and tokenizer.eot_token != eot:
        raise UserError(
            f'{name} ends texts with {tokenizer.eot_token!r}, these models with {eot!r}: take the'
            ' tokenizer of the base model'
            + (
                f', `hf download {tokenizer_from} --include "tokenizer*" --local-dir'
                f' {os.path.basename(name)}`'
                if tokenizer_from
                else ''
            )
        )


def assemble_parts(
    args: argparse.Namespace,
    plan: 'Plan',
    made: 'list[Part]',
    tokenizer: 'Tokenizer',
    cut_txt: bool,
) -> tuple:
    """Put the finished parts `made` of a plan together; returns assemble()'s (writer, counts)."""
    size = sum(part.record['size'] for part in made)
    sharded = size > SHARDED_FROM if args.sharded is None else args.sharded
    check_room(size, args.output, sharded)
    if os.path.exists(os.path.join(args.output, 'meta.pkl')):
        print(
            f'WARNING: {args.output} holds a data set, which is replaced: runs that were trained'
            ' with it will refuse another'
        )
    val_every = round(1 / args.val_fraction) if args.val_fraction else None
    split = f'every {val_every}th document is val'
    if not val_every:
        split = "the source's own validation split is val"
    if cut_txt:
        split = (
            f'every {val_every}th line of .jsonl and row of .parquet is val, and the last'
            f' {args.val_fraction:g} of each .txt, cut at a line end where one is near'
        )
    extra = None
    if isinstance(tokenizer, CharTokenizer):
        extra = {'stoi': tokenizer.stoi, 'itos': tokenizer.itos}
    return assemble.assemble(
        plan,
        made,
        args.output,
        split=split,
        val_every=val_every,
        dedup=args.dedup,
        max_broken=args.max_broken,
        max_lost=args.max_lost,
        sharded=sharded,
        extra=extra,
    )


def check_room(needed: int, output: str, sharded: bool) -> None:
    """Raise UserError where the disk has no room for `needed` bytes of ids once more."""
    # sharded files are the parts themselves
    if not sharded and (free := shutil.disk_usage(output).free) < needed:
        raise UserError(
            f'{output} needs {needed / 1e9:.1f} GB more and has {free / 1e9:.1f} GB: make room and'
            ' type the same command again; the tokenized parts are kept'
        )


def check_arguments(args: argparse.Namespace) -> tuple:
    """Return (i, n) of --shard. Raises UserError for numbers that mean nothing."""
    if args.val_fraction is not None and not 1e-12 < args.val_fraction <= 0.5:
        raise UserError(
            f'--val_fraction {args.val_fraction} is not a share for val: type a number above 0 and'
            ' up to 0.5'
        )
    for name in ('max_broken', 'max_lost'):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(
                f'--{name} {getattr(args, name)} is not a fraction: type a number from 0 to 1'
            )
    check_output(args.output)
    for name in ('num_proc', 'limit'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f'--{name} {getattr(args, name)} must be at least 1')
    words = (args.shard or '1/1').split('/')
    if (
        len(words) != 2
        or not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words)
        or not 1 <= int(words[0]) <= int(words[1])
    ):
        raise UserError(f'--shard {args.shard} is no share: type 1/3, 2/3 or 3/3 on three machines')
    if args.merge and args.shard:
        raise UserError('--merge makes the data set of all shares: leave --shard out')
    return int(words[0]), int(words[1])


def check_output(folder: str) -> None:
    """Raise UserError for an --output that is no folder and cannot become one."""
    if not folder or '://' in folder:
        raise UserError(
            f'--output {folder!r} is no folder: name one on this machine, which is made if it is'
            ' not there'
        )
    above = os.path.abspath(folder)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above) or not os.access(above, os.W_OK):
        raise UserError(
            f'--output {folder}: {above} is'
            f' {"no folder" if not os.path.isdir(above) else "not writable"}: name another'
        )


def find_input(args: argparse.Namespace, published: bool, endings: tuple) -> tuple:
    """Return (files, {path: split} or None) that --input names. published: take the splits that the
    files' names say, or with a --val_fraction those for training.
    """
    if not published:
        return documents.find_files(args.input, endings), None
    splits = {
        path: documents.published_split(path, given)
        for given in args.input
        for path in documents.find_files([given], endings)
    }
    splits = {path: split for path, split in splits.items() if split}
    if args.val_fraction:
        return [path for path in splits if splits[path] == 'train'], None
    if set(splits.values()) != {'train', 'val'}:
        missing = 'val' if 'train' in splits.values() else 'train'
        raise UserError(
            f'--input {" ".join(args.input)}: no file is named as'
            f' {"the validation split" if missing == "val" else "one for training"}, such as'
            f' {"validation" if missing == "val" else "train"}/a.jsonl: add them, or type'
            ' --val_fraction 0.0005 for every 2000th document'
        )
    return list(splits), splits


def describe_left_out(inputs: list[str], endings: tuple) -> Iterator:
    """Yield sentences on the files of local folders that are not read, because of their endings."""
    for given in inputs:
        if documents.is_url(given) or not os.path.isdir(given):
            continue
        found = collections.Counter(
            os.path.splitext(name)[1].lower() or 'no ending'
            for _, _, names in os.walk(given)
            for name in names
            if not name.startswith('.') and not name.lower().endswith(endings)
        )
        if found:
            kinds = ', '.join(f'{number:,} of {ending}' for ending, number in found.most_common(5))
            yield (
                f'{given}: {found.total():,} file{"s" if found.total() > 1 else ""} left out'
                f' ({kinds}); from a folder {", ".join(endings)} are read, others of'
                f' {", ".join(documents.ENDINGS)} from a pattern such as'
                f" '{given.rstrip('/')}/**/*.md'"
            )


def find_tokenizer(
    name: str, folder: str, tokenizer_from: str | None, texts: Callable
) -> 'Tokenizer':
    """Return the tokenizer that --tokenizer names: a path is looked for here, in the script's
    folder and in the root. texts: for 'char', a function that gives them.
    """
    for place in ('', folder, ROOT):
        path = os.path.join(place, name)
        if os.path.isfile(path) or any(
            os.path.isfile(os.path.join(path, file))
            for file in ('tokenizer.json', 'tokenizer.model')
        ):
            name = path
            break
    else:
        if tokenizer_from and name.endswith('_tokenizer'):
            raise UserError(
                f'there is no tokenizer {name}: type `hf download {tokenizer_from} --include'
                f' "tokenizer*" --local-dir {name}` (after `hf auth login` where its terms ask for'
                ' it), or name another with --tokenizer'
            )
    return load_tokenizer(name, texts() if name == 'char' else None)


def characters(args: argparse.Namespace, endings: tuple) -> Iterator:
    """Yield the texts of --input, for a vocabulary of characters."""
    if args.merge:
        raise UserError(
            'the vocabulary of --tokenizer char is that of all texts: it cannot be merged; prepare'
            ' them on one machine'
        )
    for path in documents.find_files(args.input, endings):
        for unit in documents.units_of(path):
            yield from (
                row.content
                for row in documents.read(unit, args.text_field)
                if isinstance(row.content, str)
            )


def report(writer: 'TokenFileWriter', folder: str, config: str | None = None) -> None:
    """Print what `writer` (a closed TokenFileWriter) wrote and what to type next.

    folder: the script's own; config: the recipe made for the data set there, or None.
    """
    writer.report()
    output = os.path.abspath(writer.folder)
    name = os.path.relpath(output, DATA)
    name = output if name.startswith(os.pardir) else name  # --dataset takes a path too
    own = output == os.path.abspath(folder)
    words = (
        [config]
        if config and own
        else [config, f'--dataset={name}']
        if config
        else [f'--dataset={name}']
    )
    print(f'next: python train.py {" ".join(words)}')


def run(main: Callable) -> None:
    """Run `main` as a script: what the user got wrong ends it with one sentence and exit code 2,
    Ctrl-C with 130; what is finished is kept.
    """
    sys.exit(
        run_command(
            lambda _: main() and None,
            interrupted='interrupted: type the same command again to go on',
        )
    )
