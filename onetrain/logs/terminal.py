"""What a person sees of a run: its lines, a progress bar below them, and what is being done.

Nothing stays silent: when no line has appeared for some seconds, a thread shows what the program is
doing, in the bar of a terminal, else as a line of its own.

    terminal = Terminal()
    with terminal.doing('evaluating', total=400) as work:
        for batch in batches:
            work.done += 1
"""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO

from tqdm import tqdm

QUIET_S = 5.0  # seconds without a line after which the work is named
AGAIN_S = 30.0  # and after which it is named again where there is no terminal
WIDTH = 79  # columns of a line of progress where the width is not known


class Work:
    """Something that takes time: `done` of `total` (None: not known) units of `what`."""

    def __init__(self, what: str, total: int | None = None):
        self.what, self.total, self.done = what, total, 0
        self.started = time.monotonic()

    def describe(self) -> str:
        """Return a line such as 'evaluating 37/400, about 2 min left'."""
        seconds = time.monotonic() - self.started
        if self.total is None:
            return f'{self.what}, {duration(seconds)} so far'
        left = seconds / self.done * (self.total - self.done) if self.done else None
        about = f', about {duration(left)} left' if left is not None else ''
        return f'{self.what} {self.done}/{self.total}{about}'


class Terminal:
    """The standard output of the process that talks; others have one with active=False.

    A terminal gets a bar once start_bar() is called; a file gets lines alone. file: where to write
    instead, for a command whose output is read by another.
    """

    def __init__(self, active: bool = True, file: TextIO | None = None):
        self.active, self.file, self.bar = active, file, None
        self.works, self.last_line, self.named = [], time.monotonic(), False
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def say(self, text: str = '') -> None:
        """Print a line, above the bar."""
        if self.active:
            tqdm.write(text, file=self.file)
            self.last_line, self.named = time.monotonic(), False

    @contextlib.contextmanager
    def doing(self, what: str, total: int | None = None):
        """Name the work inside the block where it takes more than a few seconds; gives a Work."""
        work = Work(what, total)
        self.works.append(work)
        if self.active and self.thread is None:
            self.thread = threading.Thread(target=self._watch, daemon=True, name='terminal')
            self.thread.start()
        try:
            yield work
        finally:
            self.works.remove(work)
            if self.bar is not None and not self.bar.disable and self.bar.desc:
                self.bar.set_description_str('', refresh=False)

    def _watch(self):
        while not self.ended.wait(0.5):
            bar = self.bar
            if bar is not None and not bar.disable:
                bar.set_description_str(self.look(0.0) or '', refresh=True)
            elif text := self.look(AGAIN_S):
                tqdm.write(text, file=self.file)

    def look(self, again: float = AGAIN_S) -> str | None:
        """Return what is being done, if that has taken QUIET_S and no line appeared meanwhile;
        once, and then every `again` seconds.
        """
        work = next(iter(self.works[-1:]), None)
        now = time.monotonic()
        since = now - self.last_line
        if work is None or min(since, now - work.started) < QUIET_S or self.named and since < again:
            return None
        if again:
            self.last_line, self.named = now, True
        return work.describe()

    def start_bar(self, total: int, done: int) -> None:
        """Show a bar of `total` iterations below the lines, if this is a terminal."""
        if self.active:
            layout = '{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}'
            self.bar = tqdm(
                total=total,
                initial=done,
                disable=None,
                dynamic_ncols=True,
                leave=False,
                bar_format=layout,
                file=sys.stdout,
            )

    def advance(self, step: int) -> None:
        """Move the bar to iteration `step`."""
        if self.bar is not None and not self.bar.disable:
            self.bar.update(step - self.bar.n)

    def end_bar(self) -> None:
        """Remove the bar: there is no iteration to come."""
        if self.bar is not None:
            bar, self.bar = self.bar, None
            bar.close()

    def close(self) -> None:
        """Remove the bar and name no work any longer."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join()
        self.end_bar()

    def columns(self):
        """Return the columns of the terminal, None where the output is a file or a pipe."""
        return shutil.get_terminal_size().columns if sys.stdout.isatty() else None

    def width(self) -> int:
        """Return the columns that a line of progress may take."""
        return min(120, self.columns() or WIDTH)


def duration(seconds: float) -> str:
    """Return a time as people say it: '12 s', '3:31 min', '2 h 05 min', '4 d 3 h'."""
    seconds = max(0, round(seconds))
    if seconds < 100:
        return f'{seconds} s'
    if seconds < 3600:
        return f'{seconds // 60}:{seconds % 60:02d} min'
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f'{hours} h {minutes:02d} min'
    return f'{hours // 24} d {hours % 24} h'


def short_number(number: float) -> str:
    """Return a number in few characters: 935, 46.1k, 1.11M."""
    for size, unit in ((1e9, 'G'), (1e6, 'M'), (1e4, 'k')):
        if number >= size:
            scaled = number / (1e3 if unit == 'k' else size)
            return f'{scaled:.2f}{unit}' if scaled < 10 else f'{scaled:.1f}{unit}'
    return f'{number:,.0f}'


def progress_line(
    step: int,
    total: int,
    loss: float,
    lr: float,
    norm: float,
    rate: float,
    mfu: dict | float | None = None,
    left: float | None = None,
    more: Sequence[str] = (),
    width: int = WIDTH,
) -> str:
    """Return the line of a logged iteration, in at most `width` columns.

    rate: tokens per second; mfu: percent, or None; left: seconds, or None; more: further words,
    which are left out first where the line is too narrow.
    """
    begin = f'iter {step}/{total}:'
    numbers = [
        f'loss {loss:.4f}',
        f'lr {lr:.2e}',
        f'norm {norm:.3f}',
        f'{short_number(rate)} tok/s',
    ]
    numbers += [] if mfu is None else [f'mfu {mfu:.1f}%']
    ends = [] if left is None else [f'{duration(left)} left']
    more = list(more)
    while True:
        words = [begin, *numbers, *more, *ends]
        for gap in ('  ', ' '):
            if len(line := gap.join(words)) <= width:
                return line
        if more:
            more.pop()
        elif ends and ends[0].endswith(' left'):
            ends = [ends[0].removesuffix(' left').replace(' ', '')]
            numbers[1:3] = f'lr {lr:.1e}', f'norm {norm:.2f}'
        elif ends:
            ends = []
        else:
            return line[:width]
