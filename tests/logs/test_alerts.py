"""Proves that each warning comes when it should, once, and not otherwise, and that notices
arrive.
"""

import http.server
import json
import math
import threading

import numpy as np
import pytest
from conftest import records, run_train

from onetrain.logs import alerts
from onetrain.logs.alerts import Alerts
from onetrain.watch.follow import Follower
from onetrain.watch.terminal_view import facts


class Log:
    """Keeps what a RunLog is told."""

    def __init__(self):
        self.said, self.events = [], []

    def say(self, text):
        self.said.append(text)

    def event(self, kind, **fields):
        self.events.append({'type': kind, **fields})


@pytest.fixture
def watched(tmp_path):
    """watched(**options): Alerts with a log that keeps what it is told."""
    return lambda **options: Alerts(Log(), 'run', str(tmp_path), max_iters=10**6, **options)


def step(alerts, iter, loss=3.0, norm=1.0, data_wait_ms=0.0, comm_wait_ms=None):
    alerts.sink(
        'iter',
        {
            'iter': iter,
            'loss': loss,
            'time_ms': 100.0,
            'gradients': {'global_norm': norm},
            'data_wait_ms': data_wait_ms,
            'comm_wait_ms': comm_wait_ms,
        },
    )


def evaluated(alerts, iter, train, val):
    alerts.sink('eval', {'iter': iter, 'train_loss': train, 'val_loss': val})


def of(alerts):
    return [event['what'] for event in alerts.log.events]


def test_a_healthy_run_is_not_warned(watched, tmp_path):
    run, noise = watched(checkpoint_bytes=1000), np.random.default_rng(0)
    for n in range(1, 12001):
        loss = 3 + 5 / n**0.5 + 0.2 * noise.standard_normal()
        step(run, n, loss, 20.0 if n < 50 else 1 + noise.random(), 1.0, 10.0)
        if n % 1000 == 0:
            evaluated(run, n, loss, loss + 0.1)
    for _ in range(20):
        run.look_at_machine([{'gpu': 0, 'utilization_percent': 97, 'throttle': None}])
    assert run.log.events == [] and run.log.said == []


def test_a_flat_loss_is_no_rise(watched):
    for seed in range(5):
        run, noise = watched(), np.random.default_rng(seed)
        for n in range(1, 12001):
            step(run, n, 3 + 0.2 * noise.standard_normal())
        assert of(run) == []


def test_gradient_norms(watched):
    run = watched()
    for n in range(200):
        step(run, n, norm=11.0 if n == 150 else 1.0)
        step(run, n, norm=math.nan)
    assert of(run) == ['gradient norm'] and '11' in run.log.said[0]
    assert run.log.said[0].startswith('WARNING: ') and run.log.events[0]['iter'] == 150
    run = watched()
    for n in range(200):
        step(run, n, norm=6.0)
    assert of(run) == ['gradient norm for long']


def test_a_loss_that_rises(watched):
    run, noise = watched(), np.random.default_rng(0)
    for n in range(1, 8001):
        step(run, n, (3.0 if n < 6000 else 3.3) + 0.2 * noise.standard_normal())
    (event,) = run.log.events
    assert event['what'] == 'loss rises' and 6000 < event['iter'] < 6200
    seldom, noise = watched(), np.random.default_rng(0)  # log_interval=10
    for n in range(10, 20001, 10):
        step(seldom, n, (3.0 if n < 10000 else 4.0) + 0.2 * noise.standard_normal())
    assert of(seldom) == ['loss rises'] and len(seldom.losses) <= 520


def test_validation_above_training(watched):
    run = watched()
    for n, gap in enumerate((0.4, 0.35, 0.31, 0.2, 0.25, 0.29)):
        evaluated(run, n, 3.0, 3.0 + gap)
    assert of(run) == []
    evaluated(run, 9, 3.0, 3.31)
    evaluated(run, 10, 3.0, 3.5)
    assert of(run) == ['overfitting']


def test_waits(watched):
    run = watched()
    for n in range(100):
        step(run, n, data_wait_ms=6.0 if n % 3 else 0.0)
    assert of(run) == ['data wait'] and '6 %' in run.log.said[0]
    run = watched(slow_path=lambda: 'the slowest path is the link between CPU sockets')
    for n in range(100):
        step(run, n, comm_wait_ms=75.0)
    assert of(run) == ['gradients wait']
    assert '40 iterations a second' in run.log.said[0] and 'CPU sockets' in run.log.said[0]


def test_the_machine(watched):
    run = watched(checkpoint_bytes=10**18)
    run.look_at_machine([])
    assert of(run) == ['disk']
    run = watched()
    step(run, 1)
    for n in range(10):
        throttle = ['temperature'] if n > 2 else None
        run.look_at_machine(
            [
                {'gpu': 0, 'utilization_percent': 99, 'throttle': None},
                {'gpu': 1, 'utilization_percent': 60, 'throttle': throttle},
                {'machine': 'here'},
            ]
        )
    assert of(run) == ['utilization', 'throttling']
    assert all('GPU 1' in text for text in run.log.said) and 'temperature' in run.log.said[1]


@pytest.fixture
def receiver():
    """(URL, list of the notices that arrive there)."""
    arrived = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            arrived.append(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f'http://127.0.0.1:{server.server_address[1]}/hook/secret', arrived
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_run_that_deserves_it(dataset, tmp_path, monkeypatch, receiver, capsys):
    url, arrived = receiver
    monkeypatch.setattr(alerts, 'NORM', 1e-3)
    monkeypatch.setattr(alerts, 'OVER', 2)
    assert run_train(dataset, tmp_path, '--max_iters=6', f'--notify={url}') == 0
    assert capsys.readouterr().out.count('WARNING: the gradient norm is') == 1
    (warning,) = records(tmp_path, 'warning')
    assert [notice['what'] for notice in arrived] == ['gradient norm', 'finished']
    assert arrived[0]['text'] == warning['text'] and arrived[0]['iter'] == warning['iter'] == 3
    for path in tmp_path.glob('run_*'):
        assert 'secret' not in path.read_text()
    standing = Follower(str(tmp_path)).look()
    assert standing.warnings == [(3, warning['text'])] and facts(standing)


def test_a_notice_that_does_not_arrive(dataset, tmp_path, capsys):
    url = '--notify=http://127.0.0.1:9/hook/secret'
    assert run_train(dataset, tmp_path, '--max_iters=2', url) == 0
    said = capsys.readouterr().out
    assert said.count('a notice could not be sent') == 1 and 'secret' not in said


@pytest.mark.parametrize('url', ['file:///etc/passwd', 'hook', 'https://', 'ftp://a/b'])
def test_what_is_no_url(dataset, tmp_path, url, capsys):
    assert run_train(dataset, tmp_path, '--max_iters=2', f'--notify={url}') == 2
    assert 'is no URL that can be posted to' in capsys.readouterr().err
