"""
Watch runs while they train, from here or over ssh.

    python watch.py out-demo
    python watch.py out-a out-b --refresh=10
    python watch.py s3://bucket/runs/out-a --once
    python watch.py out-a out-b --web
    python watch.py out-a out-b --html=report.html

A run is the out_dir of train.py, one of its run_*.jsonl, or the URL that it is copied to with
--upload_to. Ctrl-C ends this command and nothing else. The states: running; stale, if nothing was
logged for five times the usual interval (and a minute); gone, if its process ended without a word;
stopped and finished.
"""

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING

from onetrain.command_line import ArgumentParser, number, run_command, whole
from onetrain.config import UserError
from onetrain.watch.follow import Follower

if TYPE_CHECKING:
    from onetrain.watch import web


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='out_dir, log or URL of a run')
    parser.add_argument('--once', action='store_true', help='print how they stand, and end')
    parser.add_argument(
        '--refresh', type=number(most=86400), default=2.0, help='seconds between two looks'
    )
    parser.add_argument('--web', action='store_true', help='serve a page, which stays up to date')
    parser.add_argument('--port', type=whole(most=65535), help='of the page (default: 8000)')
    parser.add_argument(
        '--host',
        help='address that the page is served at (default: 127.0.0.1); beyond this machine it asks'
        ' for a token',
    )
    parser.add_argument('--html', metavar='FILE', help='write how they stand as one page, and end')
    return run_command(
        lambda argv: run(parser.parse_args(argv)), argv, interrupted='watching ended'
    )


def run(args: argparse.Namespace) -> int:
    """Show the runs that `args` name until they are finished; returns the exit code. Raises
    UserError.
    """
    chosen = [
        f'--{name}' for name in ('once', 'web', 'html') if getattr(args, name) not in (None, False)
    ]
    if len(chosen) > 1:
        raise UserError(f'{" and ".join(chosen)} are two ways to watch: type one of them')
    if (args.host is not None or args.port is not None) and not args.web:
        raise UserError('--host and --port are those of the page: type --web too')
    if args.html == '':
        raise UserError('--html= names no file: type such as --html=report.html')
    try:
        from rich.console import Console
        from rich.live import Live

        from onetrain.watch import web
        from onetrain.watch.terminal_view import view
    except ImportError:
        raise UserError('watch.py needs the package rich: pip install rich') from None

    followers = [Follower(place) for place in args.runs]
    if args.html:
        web.write_report([each.look() for each in followers], args.html)
        print(f'wrote {args.html}')
        return 0
    if args.web:
        host, port = args.host or '127.0.0.1', args.port or 8000
        return serve(web.Server(followers, host, port, args.refresh))
    console = Console()
    # a pipe or a file gets lines of 80 columns
    width = min(console.width, 120) if console.is_terminal else 80

    def look():
        found = [follower.look() for follower in followers]
        lines = console.height // len(found) - 11 if console.is_terminal else 8
        return found, view(found, width, min(lines, 16))

    standings, shown = look()
    if args.once or not console.is_terminal:
        console.print(shown)
        return 0
    with Live(shown, console=console, auto_refresh=False, vertical_overflow='crop') as live:
        # one that is gone or stopped may be resumed
        while any(each.state != 'finished' for each in standings):
            time.sleep(args.refresh)
            standings, shown = look()
            live.update(shown, refresh=True)
    return 0


def serve(server: 'web.Server') -> int:
    """Serve the page until Ctrl-C."""
    port = server.server_address[1]
    print(f'open {server.address} (Ctrl-C ends it)')
    if server.token is None:
        host = os.uname().nodename
        print(f'from elsewhere: ssh -L {port}:localhost:{port} {host}, then the same address')
    sys.stdout.flush()
    with server:
        server.serve_forever()
    return 0


if __name__ == '__main__':
    sys.exit(main())
