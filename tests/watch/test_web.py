"""Proves what the page of watch.py shows and to whom, and that nothing in a log becomes a part of
it: with requests, and in a browser where there is one.
"""

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import threading

import pytest
from conftest import records, run_train

import watch
from onetrain.config import UserError
from onetrain.watch import web
from onetrain.watch.follow import Follower

EVIL = '</script><img src=x onerror="document.title=\'mine\'"><b>bold</b>'
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')


@pytest.fixture(scope='module')
def runs(dataset, tmp_path_factory):
    """Two runs that differ in their learning rate; the log of the second holds HTML."""
    folder = tmp_path_factory.mktemp('web')
    words = '--max_iters=12', '--eval_interval=5', '--sample_interval=6'
    for name, rate in (('a', '1e-3'), ('b', '3e-3')):
        assert run_train(dataset, folder / name, *words[:2], f'--learning_rate={rate}') == 0
    (log,) = (folder / 'b').glob('run_*.jsonl')
    header, *rest = log.read_text().splitlines()
    header = json.loads(header)
    header['startup_info']['model']['architecture'] = EVIL
    header['config']['dataset'] = EVIL
    log.write_text('\n'.join([json.dumps(header), *rest]) + '\n')
    with open(log.with_suffix('.log'), 'a') as f:
        f.write(f'{EVIL}\x1b[2J\n')
    return folder


@contextlib.contextmanager
def serving(runs, host='127.0.0.1'):
    server = web.Server([Follower(str(runs / name)) for name in 'ab'], host, 0, 0.5)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(server, path, **headers):
    """(status, headers, body) of a request."""
    connection = http.client.HTTPConnection('127.0.0.1', server.server_address[1], timeout=20)
    connection.request('GET', path, headers={'Host': 'localhost', **headers})
    answer = connection.getresponse()
    return answer.status, dict(answer.headers), answer.read().decode()


def test_what_the_page_asks_for(runs):
    with serving(runs) as server:
        status, headers, body = ask(server, '/runs')
        data = json.loads(body)
        assert status == 200 and headers['Content-Type'] == 'application/json'
        assert "default-src 'none'" in headers['Content-Security-Policy']
        for name, shown in zip('ab', data['runs']):
            steps, evaluations = records(runs / name), records(runs / name, 'eval')
            assert shown['curves']['loss'] == {
                'iters': [r['iter'] for r in steps],
                'values': [r['loss'] for r in steps],
            }
            assert shown['curves']['val_loss']['values'] == [r['val_loss'] for r in evaluations]
            assert shown['curves']['grad_norm']['values'] == [
                r['gradients']['global_norm'] for r in steps
            ]
            assert shown['state'] == 'finished' and shown['numbers']['iter'] == 12
            assert shown['tokens_per_iter'] == steps[-1]['tokens_seen'] / 12
        differences = dict(data['differences'])
        assert differences['learning_rate'] == ['0.001', '0.003'] and 'n_layer' not in differences
        for path in ('/', '/page.css', '/page.js', '/plotly.js'):
            assert ask(server, path)[0] == 200
        assert 'src="http' not in ask(server, '/')[2] and '//' not in ask(server, '/')[2]
        text = ask(server, '/log?run=1')[2]
        assert EVIL in text and '\x1b' not in text and 'Done:' in text
        for path in ('/log?run=9', '/log?run=-1', '/log?run=' + '9' * 50, '/log'):
            assert ask(server, path)[0] == 200
        for path in ('/../watch.py', '/page/page.js', '/etc/passwd', '/%2e%2e/watch.py'):
            assert ask(server, path)[0] == 404


def test_a_log_that_cannot_be_read_is_said(runs, tmp_path):
    shutil.copytree(runs / 'a', tmp_path / 'a')
    shutil.copytree(runs / 'b', tmp_path / 'b')
    with serving(tmp_path) as server:
        shutil.rmtree(tmp_path / 'b')
        server.looked = 0.0
        status, _, body = ask(server, '/runs')
        assert status in (200, 500) and 'Traceback' not in body
        shutil.copytree(runs / 'b', tmp_path / 'b')
        server.looked = 0.0
        assert ask(server, '/runs')[0] == 200


def test_who_may_see_it(runs):
    with serving(runs) as server:
        assert ask(server, '/runs', Host='evil.example')[0] == 403  # a name that leads here
        assert ask(server, '/runs', Host='127.0.0.1:1')[0] == 200
        assert 'token' not in server.address
    with serving(runs, '0.0.0.0') as server:
        for path in ('/', '/runs', '/log?run=0', '/plotly.js', '/runs?token=', '/runs?token=x'):
            assert ask(server, path, Host='gpu-7')[0] == 403
        status, headers, _ = ask(server, f'/?token={server.token}', Host='gpu-7')
        assert status == 303 and headers['Location'] == '/'
        cookie = headers['Set-Cookie'].split(';')[0]
        assert 'HttpOnly' in headers['Set-Cookie'] and server.token in server.address
        assert ask(server, '/runs', Host='gpu-7', Cookie=cookie)[0] == 200
        assert ask(server, '/runs', Host='gpu-7', Cookie=cookie[:-1])[0] == 403


def test_a_port_in_use(runs, capsys):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert watch.main([str(runs / 'a'), '--web', f'--port={port}']) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: ') and f'--port={port + 1}' in said and said.count('\n') == 1


def test_a_report_is_one_file(runs, tmp_path, capsys):
    target = tmp_path / 'report.html'
    assert watch.main([str(runs / 'a'), str(runs / 'b'), f'--html={target}']) == 0
    page = target.read_text().replace(web.plotly_script(), '')
    assert EVIL not in page and 'src="' not in page and 'href="' not in page
    begin = '<script type="application/json" id="data">'
    data = json.loads(page[page.index(begin) + len(begin) :].split('</script>')[0])
    assert data['runs'][1]['architecture'] == EVIL and EVIL in data['runs'][1]['log']


@pytest.mark.skipif(not CHROMIUM, reason='needs chromium')
@pytest.mark.parametrize('kind', ['served', 'file'])
def test_in_a_browser(runs, tmp_path, kind):
    def opened(address):
        return subprocess.run(
            [
                CHROMIUM,
                *'--headless --no-sandbox --disable-gpu --disable-quic --no-first-run'.split(),
                *'--disable-background-networking --disable-component-update'.split(),
                *('--disable-sync', '--virtual-time-budget=5000', '--dump-dom'),
                f'--user-data-dir={tmp_path / "browser"}',
                address,
            ],
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout

    if kind == 'file':
        watch.main([str(runs / 'a'), str(runs / 'b'), f'--html={tmp_path / "report.html"}'])
        page = opened(f'file://{tmp_path}/report.html')
    else:
        with serving(runs) as server:
            page = opened(server.address)
    body = page[page.index('<body') :].split('<script')[0]
    assert body.count('class="state finished"') == 2 and 'iteration 12 of 12' in body
    assert body.count('class="trace scatter') >= 4  # two curves and two validations
    assert '<title>onetrain</title>' in page and '<img' not in body and '<b>bold' not in body
    assert '&lt;img src=x' in body and 'learning_rate' in body


def test_plotly_is_asked_for(runs, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'plotly.offline', None)
    with pytest.raises(UserError, match='pip install plotly'):
        web.plotly_script()
