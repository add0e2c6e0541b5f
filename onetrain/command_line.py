"""How a command ends: with one sentence and exit code 2 where its input cannot be used, with 130
and no traceback at Ctrl-C.

Importing the package imports this first: from here on a Ctrl-C ends a command quietly, until
run_command() has it raise KeyboardInterrupt again, so that work in progress can be put in order.
"""

import argparse
import errno
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import onetrain
from onetrain.config import UserError, nearest, resolve
from onetrain.files import redact

# where a shell has closed them (>&-) Python has None, on which every print() would fail
sys.stdout = sys.stdout or open(os.devnull, 'w')
sys.stderr = sys.stderr or open(os.devnull, 'w')
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
INTERRUPTED = 130  # 128 + SIGINT


COMMANDS = ('train', 'sample', 'evaluate', 'export', 'checkpoints', 'plan', 'watch', 'sweep')


def _program():
    """Return the absolute path of the running program, '/' where there is none."""
    path = getattr(sys.modules.get('__main__'), '__file__', None)
    if path is None and '-m' in sys.orig_argv:  # python -m onetrain.doctor, before it is found
        module = sys.orig_argv[sys.orig_argv.index('-m') + 1]
        if module.startswith('onetrain.'):
            return os.path.join(ROOT, *module.split('.')) + '.py'
    return os.path.abspath(path or '/')


def check_checkout(path: str, root: str = ROOT):
    """Leave with exit code 2 where `path`, a script in data/, plots/ or bench/, lies in another
    copy of onetrain than `root`, the installed one, which PYTHONPATH does not name: it would run
    with the code of the other.
    """
    paths = os.environ.get('PYTHONPATH', '')
    named = [os.path.realpath(place) for place in paths.split(':') if place]
    other = os.path.dirname(path)
    while other != os.path.dirname(other):
        if os.path.isfile(os.path.join(other, 'onetrain', 'command_line.py')):
            ours = os.path.relpath(path, other).split(os.sep)[0] in ('data', 'plots', 'bench')
            if ours and os.path.realpath(root) not in (os.path.realpath(other), *named):
                print(
                    f'error: this script is of the copy {other}, and the onetrain that Python finds'
                    f' is that of {root}: type `pip install -e {other}`, or put'
                    f' PYTHONPATH={other} in front',
                    file=sys.stderr,
                )
                sys.exit(2)
            return
        other = os.path.dirname(other)


def _is_a_command():
    """Return whether the running program is one of the project's scripts, not a test or another
    program that imports them.
    """
    path = os.path.relpath(_program(), ROOT).split(os.sep)
    return path[0] in ('onetrain', 'data', 'plots', 'bench', *(f'{name}.py' for name in COMMANDS))


def _leave(number, frame):
    os.write(2, b'\ninterrupted\n')
    os._exit(INTERRUPTED)


check_checkout(_program())
if _is_a_command() and threading.current_thread() is threading.main_thread():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def run_command(
    work: Callable,
    argv: list[str] | None = None,
    tell: Callable | None = None,
    interrupted: str | None = 'interrupted',
) -> int:
    """Return the exit code of work(argv), or 2 where it raises what a user can mend, after telling
    it in one sentence.

    argv: None for sys.argv[1:]. tell: function that takes the sentence; None: print it to standard
    error. interrupted: what is told at Ctrl-C, after work() has put things in order; None: it has
    nothing to put in order, so Ctrl-C ends the process at once.
    """
    if (
        interrupted is not None
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is _leave
    ):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    tell = tell or (
        lambda sentence: print(f'error: {redact(sentence)}', file=sys.stderr, flush=True)
    )
    try:
        check_arguments(sys.argv[1:] if argv is None else argv)
        code = work(argv) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f'\n{interrupted or "interrupted"}', file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:  # as `| head` does; nothing more can be shown
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        tell(sentence)
        return 2


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Adds to the help of an option what it is unless given, where the help does not say so."""

    def _get_help_string(self, action):
        text = action.help or ''
        tells = (
            'default' in text
            or action.default in (None, False, argparse.SUPPRESS)
            or action.default == []
        )
        return (
            text if tells or not action.option_strings else f'{text} (default: %(default)s)'.strip()
        )


class ArgumentParser(argparse.ArgumentParser):
    """That of argparse, without abbreviations, whose errors are one sentence that names the nearest
    option.
    """

    def __init__(self, **options):
        super().__init__(**{'formatter_class': _HelpFormatter, 'allow_abbrev': False, **options})

    def parse_known_args(self, args: list[str] | None = None, namespace: Any = None) -> tuple:
        self.typed = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        known = [
            word
            for action in self._actions
            for word in action.option_strings
            if word.startswith('--')
        ]
        unknown = [
            word.split('=')[0]
            for word in self.typed
            if re.match(r'--\w', word) and word.split('=')[0] not in known
        ]
        if unknown and message.startswith(('unrecognized', 'the following arguments are required')):
            hint = nearest(unknown[0], known)
            if unknown[0] == '--init_from' and '--hf' in known:  # as in nanoGPT's sample.py
                hint = ': --out_dir=RUN reads a run, --hf=FOLDER Hugging Face weights'
            message = f'unknown option {unknown[0]}{hint}; `--help` lists all'
        elif found := re.match(
            r"argument (\S+): ignored explicit argument ['\"](.*)['\"]", message
        ):
            option, value = found.groups()
            off = value.lower() in ('false', '0', 'no', 'off')
            message = (
                f'{option} takes no value: {"leave it out" if off else f"type {option} alone"}'
            )
        elif '--out_dir' in known and message.startswith('unrecognized arguments: '):
            word = message.removeprefix('unrecognized arguments: ').split()[0]
            message = f'{word} is no option, did you mean --out_dir={word}'
        print(f'error: {redact(message)}', file=sys.stderr, flush=True)
        sys.exit(2)


def resolve_early(schema: type, argv: list[str], aliases: dict):
    """Return what config.resolve() does; end the process where it cannot, or where help or
    the version is asked for.

    For a script that imports much: what is typed wrong is told before. Under torchrun one process
    of each machine tells it.
    """
    try:
        check_arguments(argv)
        if '--version' in argv:
            print(f'onetrain {onetrain.__version__}', flush=True)
            sys.exit(0)
        return resolve(schema, argv, aliases)
    except BrokenPipeError:  # as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, OSError) as error:
        if os.environ.get('LOCAL_RANK', '0') in ('0', ''):
            print(f'error: {redact(explain(error))}', file=sys.stderr, flush=True)
        sys.exit(2)


def importing(what: str, after: float = 5.0):
    """Say so when `what` is still being imported after some seconds; returns a function to call
    when that has ended.
    """
    timer = threading.Timer(after, lambda: print(f'importing {what}', file=sys.stderr, flush=True))
    timer.daemon = True
    if os.environ.get('RANK', '0') in ('0', ''):
        timer.start()
    return timer.cancel


def whole(least: int = 1, most: int = 2**31) -> Callable:
    """Return the `type` of an argparse option that takes a whole number from `least` to `most`."""

    def parse(text):
        if not re.fullmatch(r'-?\d{1,20}', text, re.ASCII) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f'{text[:40]!r} is no whole number from {least:,} to {most:,}'
            )
        return int(text)

    return parse


def number(above: float = 0.0, most: float = 1e9):
    """Return the `type` of an argparse option that takes a number above `above` and up to
    `most`.
    """

    def parse(text):
        try:
            value = float(text) if text.isascii() else math.nan
        except ValueError:
            value = math.nan
        if not above < value <= most:
            raise argparse.ArgumentTypeError(
                f'{text[:40]!r} is no number above {above:g} and up to {most:g}'
            )
        return value

    return parse


def check_arguments(argv: list[str]) -> None:
    """Raise UserError for an argument that is not text: bytes that are not UTF-8."""
    for word in argv:
        if re.search(r'[\ud800-\udfff]', word):
            shown = word.encode('utf-8', 'backslashreplace').decode()
            raise UserError(
                f'the argument {shown!r} is not UTF-8: type it in UTF-8, or rename the file'
            )


_MEMORY = re.compile(
    r'can.t allocate memory|[Oo]ut of memory|Storage size calculation overflowed|numel: integer'
    r' multiplication overflow|'
    r'Unable to allocate|Cannot allocate memory|invalid size|exceeds? the maximum|not enough memory'
)


def explain(error: BaseException) -> str:
    """Return one sentence for an exception that a user can do something about, or None for a fault
    of the program.
    """
    sentence = _sentence(error)
    return (
        sentence
        if sentence is None or len(sentence) <= 1500
        else f'{sentence[:900]} ... {sentence[-400:]}'
    )


def _sentence(error):
    words = ' '.join(str(error).split())
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        where = f': {error.filename!r}' if error.filename is not None else ''
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f'the disk is full{where}: make room and type the same command again'
        return f'{error.strerror or words}{where}' if error.errno else words
    if (
        isinstance(error, MemoryError)
        or isinstance(error, (RuntimeError, TypeError, ValueError))
        and _MEMORY.search(words)
    ):
        return f'this takes more memory than there is ({words[:200]}): type smaller sizes'
    if isinstance(error, OverflowError):
        return f'a number is too large to compute with ({words[:200]}): type a smaller one'
    if isinstance(error, ValueError):
        return words
    return None
