"""Proves that a trace has the iterations that were asked for, and that they compute the same."""

import json

import pytest
from conftest import TINY, losses, records, run_process

from onetrain.config import UserError
from onetrain.training.profiler import parse_profile


@pytest.mark.parametrize('span', ['1:1', '3:4'])
def test_a_trace(train, tmp_path, span, capsys):
    assert train(tmp_path / 'a', '--max_iters=5', f'--profile={span}') == 0
    assert train(tmp_path / 'b', '--max_iters=5') == 0
    path = tmp_path / 'a' / f'profile_{span.replace(":", "_")}.json'
    assert f'wrote the trace {path}' in capsys.readouterr().out
    events = json.loads(path.read_text())['traceEvents']
    first, last = map(int, span.split(':'))
    steps = [e for e in events if 'Optimizer.step' in e.get('name', '')]
    assert len(steps) == last - first + 1
    assert any(e.get('name') == 'aten::mm' for e in events)
    assert losses(tmp_path / 'a') == losses(tmp_path / 'b') and len(records(tmp_path / 'a')) == 5


def test_a_run_that_ends_within_the_span(dataset, tmp_path):
    """In a process of its own, which torch would end with SIGSEGV while a trace is under way."""
    words = [f'--dataset={dataset}', f'--out_dir={tmp_path}', *TINY, '--max_iters=3']
    code, said = run_process('-c', f'import train; train.main({words + ["--profile=2:9"]!r})')
    assert code == 0 and 'wrote the trace' in said, said
    assert json.loads((tmp_path / 'profile_2_3.json').read_text())['traceEvents']


def test_a_span_that_is_not_reached_leaves_no_file(train, tmp_path):
    assert train(tmp_path, '--max_iters=3', '--profile=5:9') == 0
    assert not list(tmp_path.glob('profile*'))


@pytest.mark.parametrize('text', ['', '0:3', '5:4', 'a', '1:1000', '1:2:3', '-1'])
def test_what_is_no_span(text):
    with pytest.raises(UserError, match='profile='):
        parse_profile(text)


def test_spans():
    assert parse_profile(None) is None and parse_profile('7') == (7, 7)
    assert parse_profile('100:103') == (100, 103)
