"""One resolved configuration: defaults <- config files <- --key=value.

The defaults are the fields of a dataclass whose comments, beside a field and below it, are the help
text. A config file is Python that assigns keys; it may import modules and use names that start with
an underscore for its own arithmetic. Every other name that is no key, in a file or on the command
line, is an error that names the nearest key.
"""

import ast
import dataclasses
import difflib
import dis
import glob
import inspect
import math
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from typing import Any


class UserError(ValueError):
    """Something the user gave cannot be run. The message is one sentence: given, expected, what to
    type instead.
    """


def resolve(schema: type, argv: list[str], aliases: dict | None = None) -> tuple:
    """Build `schema` (a dataclass type) from command-line arguments.

    argv: config files (paths) and `--key=value` words; later ones win, and the command line wins
    over files. aliases: {alias: function(value) -> {key: value}} for names that stand for other
    keys. Returns (config, given): the instance, and {key: where it was set} for every key that the
    user set. `--help` prints the keys that the schema's COMMON names, `--help=all` all of them,
    with the values of the files given, and exits with 0. Raises UserError.
    """
    hints = typing.get_type_hints(schema)
    aliases = aliases or {}
    values, given = {field.name: field.default for field in dataclasses.fields(schema)}, {}
    help_asked = [word for word in argv if word in ('--help', '-h', '--help=all')]

    def assign(key, value, source):
        if key in aliases:
            for target, translated in aliases[key](value).items():
                assign(target, translated, source)
            return
        if key not in hints:
            raise UserError(
                f'{source}: unknown key {key!r}{nearest(key, [*hints, *aliases])}; `--help=all`'
                ' lists all keys'
            )
        values[key] = check_type(key, value, hints[key], source)
        given[key] = source

    _check_pairs(argv, hints, aliases)
    for path in (word for word in argv if not word.startswith('-')):
        for key, value in read_file(path, values).items():
            assign(key, value, path)
    for word in argv:
        if not word.startswith('-') or word in help_asked:
            continue
        key, value = _split(word, hints)
        assign(key, typed_value(value, hints.get(key)), 'command line')
    if help_asked:
        print(help_text(schema, values, everything='--help=all' in help_asked), flush=True)
        sys.exit(0)
    return schema(**values), given


def _check_pairs(argv, hints, aliases):
    """Raise UserError for --key value in two words, as other programs take them."""
    for before, word in zip(['', *argv], argv):
        key = before.removeprefix('--')
        takes = hints.get(key) is not bool or word.lower() in ('true', 'false')
        if (
            before.startswith('--')
            and key in (*hints, *aliases)
            and takes
            and not word.startswith('-')
        ):
            raise UserError(
                f'command line: {before} {shortened(word)} are two words, did you mean'
                f' {before}={word}?'
            )


def _split(word, hints):
    """Return (key, value) of a word --key=value, both text. Raises UserError."""
    match = re.fullmatch(r'--([A-Za-z_]\w*)=(.*)', word, re.DOTALL)
    if match:
        return match[1], match[2]
    key, _, value = word.removeprefix('--').replace('-', '_').partition('=')
    meant = ''
    if hints.get(key) is bool or key in hints and value:
        meant = f', did you mean --{key}={value or True}'
    raise UserError(
        f'command line: cannot read {shortened(word)}, expected --key=value, such as'
        f' --max_iters=10{meant}'
    )


def read_file(path: str, defaults: dict) -> dict:
    """Run the config file `path` and return {key: value} for the names it assigns, in order. Raises
    UserError.

    The file sees `defaults` (and what earlier files set) as variables, as nanoGPT's config files
    do.
    """
    if not os.path.isfile(path):
        folder = os.path.dirname(path)
        there = (
            sorted(glob.glob(os.path.join(glob.escape(folder), '*.py')))
            if folder
            else glob.glob('config/*.py')
        )
        raise UserError(
            f'cannot read the config file {path!r}: no such'
            f' file{nearest(path, there) or " (options are written --key=value)"}'
        )
    try:
        with open(path, encoding='utf-8-sig') as f:
            code = compile(f.read(), path, 'exec')
        names = {**defaults, '__file__': path, '__name__': 'config'}
        exec(code, names)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a user's file may raise
        raise UserError(
            f'cannot read the config file {path!r}: {type(error).__name__}: {error}'
        ) from None
    assigned = dict.fromkeys(
        i.argval for i in dis.get_instructions(code) if i.opname in ('STORE_NAME', 'STORE_GLOBAL')
    )
    # import *, exec() and globals() set keys too
    assigned.update(dict.fromkeys(key for key in defaults if names.get(key) is not defaults[key]))
    private = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {
        name: names[name]
        for name in assigned
        if name in names
        and not name.startswith('_')
        and (name in defaults or not isinstance(names[name], private))
    }


def typed_value(text: str, hint: Any):
    """Return the value that a word of the command line gives to a key with the annotation `hint`;
    check_type() checks it.
    """
    # 'none' is a choice of some keys, and not the None of Python
    is_text = hint is str or text == 'none' and 'none' in choices_of(hint)
    return text if is_text else parse_value(text)


def parse_value(text: str):
    """Return a command-line value: a Python literal where it is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    # a text, or one that is nested too deeply, or has too many digits
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return {'true': True, 'false': False, 'none': None}.get(text.lower(), text)


def check_type(key: str, value: Any, hint: type, source: str):
    """Return `value` as the type that `hint` asks for; an int serves as a float. Raises
    UserError.
    """
    options = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )
    choices = [
        c
        for option in options
        if typing.get_origin(option) is typing.Literal
        for c in typing.get_args(option)
    ]
    if value is None and type(None) in options:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'{source}: {key}={value!r} is not a finite number')
    if bool in options and isinstance(value, bool):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        if int in options:
            if abs(value) >= 2**63:
                raise UserError(f'{source}: {key}={shortened(value)} is too large')
            return value
        if float in options:
            try:
                return float(value)
            except OverflowError:
                raise UserError(
                    f'{source}: {key} is a number of about {int(value.bit_length() * 0.30103) + 1}'
                    ' digits, which is too large'
                ) from None
    if float in options and isinstance(value, float):
        return value
    if int in options and isinstance(value, float) and value.is_integer():  # 1e3
        return int(value)
    if str in options and isinstance(value, (str, int, float)):
        if re.search('[\0\ud800-\udfff]', str(value)):
            raise UserError(
                f'{source}: {key}={value!r} holds a character that no path and no text may have'
            )
        return str(value)
    if value in choices:
        return value
    words = [repr(c) for c in choices] + [
        'True | False' if option is bool else option.__name__
        for option in options
        if isinstance(option, type) and option is not type(None)
    ]
    expected = ' | '.join(words + (['None'] if type(None) in options else []))
    hint_text = nearest(str(value), [str(c) for c in choices]) if choices else ''
    shown = shortened(value)
    raise UserError(
        f'{source}: {key}={shown} is {a_type(value)}, expected {expected}{hint_text}'
        if not choices
        else f'{source}: {key}={shown} is not one of {expected}{hint_text}'
    )


def shortened(value: Any) -> str:
    """repr() of a value in at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # an int of more than 4,300 digits
        text = f'a number of {value.bit_length()} bits'
    return text if len(text) <= 80 else f'{text[:60]}... ({len(text)} characters)'


def a_type(value: Any) -> str:
    """Return the type of a value as a user would call it, such as 'a str'."""
    return (
        'None'
        if value is None
        else f'a {type(value).__name__}'
        if type(value).__name__ != 'int'
        else 'an int'
    )


def nearest(word: str, known: list[str]) -> str:
    """Return ', did you mean X' for the known word that is closest to `word`, or ''."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f', did you mean {close[0]!r}' if close else ''


def nearest_path(path: str) -> str:
    """Return the same for a file or folder, among those beside it."""
    above = os.path.dirname(path.rstrip('/'))
    try:
        beside = [os.path.join(above, name) for name in os.listdir(above or '.')]
    except OSError:
        beside = []
    return nearest(path.rstrip('/'), beside)


def help_text(
    schema: type, values: dict, everything: bool = False, width: int | None = None
) -> str:
    """Return the keys of `schema` with their `values`, choices and comments: those that its COMMON
    names, or all in their sections.

    width: columns, None for those of the terminal.
    """
    width = min(width or shutil.get_terminal_size().columns, 120)
    sections = described(schema)
    defaults = {field.name: field.default for field in dataclasses.fields(schema)}
    if not everything and hasattr(schema, 'COMMON'):
        known = {key: text for _, keys in sections for key, text in keys.items()}
        sections = [
            ('Common options (--help=all lists all)', {key: known[key] for key in schema.COMMON})
        ]
    lines = [
        'usage: python train.py [config/file.py ...] [--key=value ...]',
        '       python train.py [config/file.py] --help | --help=all | --version',
    ]
    hints = typing.get_type_hints(schema)
    for title, keys in sections:
        lines += ['', title]
        for key, text in keys.items():
            choices = choices_of(hints[key])
            text += f' [{" | ".join(choices)}]' if choices else ''
            text += '' if values[key] == defaults[key] else f' (default: {defaults[key]!r})'
            begin = (
                f'  --{key}={values[key]!r}'
                if isinstance(values[key], str) and not values[key].isprintable()
                else f'  --{key}={values[key]}'
            )
            wrapped = textwrap.wrap(text, max(20, width - 36), break_long_words=False)
            lines += [begin] if len(begin) > 34 else []
            lines += [
                f'{begin if number == 0 and len(begin) <= 34 else "":<36}{line}'
                for number, line in enumerate(wrapped)
            ]
    return '\n'.join(lines)


def described(schema: type) -> list[tuple]:
    """Return [(section, {key: its comment})] from the source of a dataclass, in which a section
    begins with `# ----`.
    """
    sections = []
    for line in inspect.getsource(schema).splitlines():
        if match := re.fullmatch(r'    # ---- (.+)', line):
            sections.append((match[1], {}))
        elif match := re.fullmatch(r'    (\w+): .+? = .+?(?:  # (.*))?', line):
            if not sections:
                sections.append(('Keys', {}))
            key = match[1]
            sections[-1][1][key] = match[2] or ''
        elif (match := re.fullmatch(r'    # (.+)', line)) and sections and sections[-1][1]:
            sections[-1][1][key] = f'{sections[-1][1][key]} {match[1]}'.strip()
    return sections


def choices_of(hint: type) -> list[str]:
    """Return the words that a key may be, from its annotation; () where it may be anything of its
    type.
    """
    options = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )
    found = [
        str(choice)
        for option in options
        if typing.get_origin(option) is typing.Literal
        for choice in typing.get_args(option)
    ]
    return found + ['None'] if found and type(None) in options else found
