"""How runs stand, for a browser: a page that asks for what is new, or one file that holds it all.

The page comes from this machine alone. Beyond the loopback it is shown to those who know a token.
"""

import errno
import hmac
import http.server
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from onetrain.config import UserError, shortened
from onetrain.files import replacing
from onetrain.watch.follow import Follower, Standing
from onetrain.watch.terminal_view import gpu_phrases, machine_phrases, plain

LOG_BYTES = 2**16  # of the text of a run that are shown
LOOPBACK = ('127.0.0.1', 'localhost')
COOKIE = 'onetrain_watch'
_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; img-src data: blob:;"
    " style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)


def plotly_script() -> str:
    """Return the charting library, as the package plotly ships it. Raises UserError."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError('--web and --html need the package plotly: pip install plotly') from None
    return get_plotlyjs()


def page_data(standings: Sequence[Standing], refresh: float) -> dict[str, Any]:
    """Return what the page shows, for JSON."""
    return {
        'time': time.strftime('%Y-%m-%d %H:%M:%S'),
        'refresh': refresh,
        'runs': [_run(each) for each in standings],
        'differences': _differences([each.config for each in standings]),
    }


def _run(standing):
    numbers = standing.numbers
    seen = numbers['tokens_seen'] / numbers['iter'] if numbers.get('tokens_seen') else 0.0
    return {
        'name': plain(standing.name),
        'state': standing.state,
        'why': standing.why,
        'architecture': plain(standing.architecture),
        'numbers': numbers,
        'tokens_per_iter': seen,
        'curves': {
            name: {'iters': curve.iters, 'values': curve.values}
            for name, curve in standing.curves.items()
        },
        'gpus': [
            {'name': f'GPU {gpu["gpu"]}', 'text': ', '.join(gpu_phrases(gpu))}
            for gpu in standing.gpus
        ],
        'warnings': [[step, plain(text)] for step, text in standing.warnings],
        'machine': ', '.join(machine_phrases(standing.machine)),
    }


def _differences(configs):
    """Return [(key, its value in each run)] of the keys in which runs differ."""
    keys = sorted({key for config in configs for key in config if isinstance(key, str)})
    rows = [(key, [shortened(config.get(key)) for config in configs]) for key in keys]
    return [[plain(key), values] for key, values in rows if len(set(values)) > 1]


def log_text(standing: Standing) -> str:
    """Return the end of the text that a run showed, with its samples."""
    if standing.log is None or not standing.log.is_file():
        return 'no text here'
    with open(standing.log, 'rb') as f:
        f.seek(max(0, os.path.getsize(standing.log) - LOG_BYTES))
        text = f.read().decode('utf-8', 'replace')
    return ''.join(c for c in text if c.isprintable() or c in '\n\t')


def _read(name):
    return (resources.files('onetrain.watch') / 'page' / name).read_text(encoding='utf-8')


def report(standings: Sequence[Standing]) -> str:
    """Return a page that holds its data, for an e-mail or a web server. Raises UserError."""
    data = page_data(standings, 0.0)
    for run, standing in zip(data['runs'], standings):
        run['log'] = log_text(standing)
    # a script element ends at '</', whatever it holds
    text = json.dumps(data).replace('<', '\\u003c')
    page = _read('page.html')
    for before, after in (
        ('<link rel="stylesheet" href="page.css">', f'<style>\n{_read("page.css")}</style>'),
        ('<script src="plotly.js"></script>', f'<script>{plotly_script()}</script>'),
        (
            '<script src="page.js"></script>',
            f'<script type="application/json" id="data">{text}</script>\n'
            f'<script>\n{_read("page.js")}</script>',
        ),
    ):
        assert before in page
        page = page.replace(before, after)
    return page


class Server(http.server.ThreadingHTTPServer):
    """Serves the page of `followers` at host and port. Raises UserError where the port is taken.

    token: what a browser must know, None on the loopback.
    """

    daemon_threads = True

    def __init__(self, followers: Sequence[Follower], host: str, port: int, refresh: float):
        self.followers, self.host, self.refresh = followers, host, refresh
        self.token = None if host in LOOPBACK else secrets.token_urlsafe(16)
        self.lock = threading.Lock()  # a follower is read by one thread at a time
        self.looked, self.standings = 0.0, [each.look() for each in followers]
        self.script = plotly_script().encode()
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise UserError(
                    f'--host={host} is no address of this machine ({error.strerror}): leave it out,'
                    ' or type --host=0.0.0.0 for all of them'
                ) from None
            raise UserError(
                f'--port={port} on {host} cannot be had ({error.strerror}): type another, such as'
                f' --port={port + 1 if port < 65535 else 8000}'
            ) from None

    def look(self) -> list[Standing]:
        """Return how the runs stand; several browsers do not read the logs more often."""
        with self.lock:
            if time.monotonic() - self.looked > self.refresh / 2:
                self.standings = [each.look() for each in self.followers]
                self.looked = time.monotonic()
            return self.standings

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that left; of another error, one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print(f'a request failed: {type(error).__name__}', file=sys.stderr, flush=True)

    @property
    def address(self) -> str:
        """Return the URL to open."""
        shown = 'localhost' if self.token is None else self.host
        shown = os.uname().nodename if shown == '0.0.0.0' else shown
        return f'http://{shown}:{self.server_address[1]}/' + (
            f'?token={self.token}' if self.token else ''
        )


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    timeout = 30

    def do_GET(self):
        try:
            url = urlsplit(self.path)
            query = parse_qs(url.query, max_num_fields=10)
        except ValueError:
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        if not self._allowed(query):
            return
        if url.path == '/runs':
            self._answer_with(self._json)
        elif url.path == '/log':
            self._answer_with(lambda: self._log(query))
        elif url.path in ('/', '/page.css', '/page.js'):
            name = url.path[1:] or 'page.html'
            kind = {'html': 'text/html', 'css': 'text/css', 'js': 'text/javascript'}
            self._send(_read(name).encode(), f'{kind[name.split(".")[1]]}; charset=utf-8')
        elif url.path == '/plotly.js':
            self._send(self.server.script, 'text/javascript; charset=utf-8', 'max-age=86400')
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _answer_with(self, work):
        try:
            self._send(*work())
        except ConnectionError:
            raise
        except (UserError, OSError, ValueError, ArithmeticError) as error:
            self._send(str(error).encode(), 'text/plain; charset=utf-8', status=500)

    def _json(self):
        data = page_data(self.server.look(), self.server.refresh)
        return json.dumps(data).encode(), 'application/json'

    def _log(self, query):
        standings = self.server.look()
        asked = query.get('run', ['0'])[0]
        which = int(asked) if asked.isdecimal() and len(asked) < 6 else 0
        text = log_text(standings[which]) if which < len(standings) else 'no such run'
        return text.encode(), 'text/plain; charset=utf-8'

    def _allowed(self, query):
        """Return whether the browser may see this; else answer that it may not."""
        token = self.server.token
        if token is None:
            # another site whose name leads here may not read it through a browser
            if (self.headers.get('Host') or '').rsplit(':', 1)[0] in LOOPBACK:
                return True
            self.send_error(HTTPStatus.FORBIDDEN, 'open it as localhost')
            return False
        given = query.get('token', [''])[0]
        if hmac.compare_digest(given.encode(), token.encode()):
            self.send_response(HTTPStatus.SEE_OTHER)
            self.send_header('Set-Cookie', f'{COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/')
            self.send_header('Location', '/')
            self.send_header('Content-Length', '0')
            self.end_headers()
            return False
        cookies = (self.headers.get('Cookie') or '').split('; ')
        if any(hmac.compare_digest(c.encode(), f'{COOKIE}={token}'.encode()) for c in cookies):
            return True
        self.send_error(HTTPStatus.FORBIDDEN, 'open the URL with the token that watch.py printed')
        return False

    def _send(self, content, kind, cache='no-store', status=200):
        self.send_response(status)
        for name, value in (
            ('Content-Type', kind),
            ('Content-Length', str(len(content))),
            ('Cache-Control', cache),
            ('Content-Security-Policy', _POLICY),
            ('X-Content-Type-Options', 'nosniff'),
            ('Referrer-Policy', 'no-referrer'),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format, *args):
        pass  # each request is no news


def write_report(standings: Sequence[Standing], path: str) -> None:
    """Write report() to the file `path`."""
    page = report(standings)
    with replacing(path, 'w') as f:
        f.write(page)
