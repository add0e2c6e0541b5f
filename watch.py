"""
Watch runs while they train, from here or over ssh.

    python watch.py out-demo
    python watch.py out-a out-b --refresh=10
    python watch.py s3://bucket/runs/out-a --once

A run is the out_dir of train.py, one of its run_*.jsonl, or the URL that it is copied to with
--upload_to. Ctrl-C ends this command and nothing else. The states: running; stale, if nothing was
logged for five times the usual interval (and a minute); gone, if its process ended without a word;
stopped and finished.
"""

import argparse
import sys
import time

from onetrain.command_line import ArgumentParser, number, run_command
from onetrain.config import UserError
from onetrain.watch.follow import Follower


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='out_dir, log or URL of a run')
    parser.add_argument('--once', action='store_true', help='print how they stand, and end')
    parser.add_argument(
        '--refresh', type=number(most=86400), default=2.0, help='seconds between two looks'
    )
    return run_command(lambda argv: run(parser.parse_args(argv)), argv, interrupted=None)


def run(args: argparse.Namespace) -> int:
    """Show the runs that `args` name until they have ended; returns the exit code. Raises
    UserError.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        raise UserError('watch.py needs the package rich: pip install rich') from None
    from onetrain.watch.terminal_view import view

    followers = [Follower(place) for place in args.runs]
    console = Console()
    # a pipe or a file gets lines of 80 columns
    width = min(console.width, 120) if console.is_terminal else 80

    def look():
        found = [follower.look() for follower in followers]
        lines = (console.height - 8 * len(found)) // len(found) - 4 if console.is_terminal else 8
        return found, view(found, width, min(max(lines, 3), 16))

    standings, shown = look()
    if args.once or not console.is_terminal:
        console.print(shown)
        return 0
    with Live(shown, console=console, auto_refresh=False, vertical_overflow='visible') as live:
        while any(each.state in ('waiting', 'running', 'stale') for each in standings):
            time.sleep(args.refresh)
            standings, shown = look()
            live.update(shown, refresh=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
