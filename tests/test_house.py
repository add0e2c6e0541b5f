"""Proves what a reader may expect of the sources: one format, no lint, lines that fit."""

import subprocess
import sys

import pytest
from conftest import ROOT

ruff = pytest.importorskip('ruff')


@pytest.mark.parametrize('command', [['check'], ['format', '--check']], ids=['lint', 'format'])
def test_ruff(command):
    """The rules are in pyproject.toml."""
    done = subprocess.run(
        [sys.executable, '-m', 'ruff', *command, '--no-cache', '.'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
