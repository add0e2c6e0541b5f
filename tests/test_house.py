"""Proves what a reader may expect of the sources: one format, no lint, lines that fit."""

import ast
import os
import re
import subprocess
import sys
import typing

import pytest
from conftest import ROOT

import train
from onetrain.model_config import PRESETS
from onetrain.ops.attention import BACKENDS

ruff = pytest.importorskip('ruff')


def markdown():
    folders = '.', 'docs', 'bench'
    found = [
        (folder, name) for folder in folders for name in os.listdir(os.path.join(ROOT, folder))
    ]
    return sorted(os.path.join(*path) for path in found if path[1].endswith('.md'))


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


def test_types():
    """What has annotations agrees with them."""
    pytest.importorskip('mypy')
    done = subprocess.run(
        [sys.executable, '-m', 'mypy', '--cache-dir', os.devnull],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_functions_of_train_are_short_and_change_no_names_of_others():
    """train() has at most 130 lines, the others 60."""
    with open(os.path.join(ROOT, 'train.py'), encoding='utf-8') as f:
        tree = ast.parse(f.read())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    sizes = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert sizes.pop('train') <= 130 and max(sizes.values()) <= 60
    assert not any(isinstance(node, (ast.Nonlocal, ast.Global)) for node in ast.walk(tree))


@pytest.mark.parametrize('path', markdown())
def test_lines_of_documents_fit(path):
    """120 columns, but for wide tables."""
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        lines = f.read().split('\n')
    assert not [line for line in lines if len(line) > 120 and not line.startswith('|')]


def test_the_model_stands_without_the_data():
    """`import model` loads no module about data sets."""
    found = subprocess.run(
        [sys.executable, '-c', 'import model, sys; print(*sys.modules)'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert 'onetrain.ops.attention' in found
    assert not [
        name for name in found if name.split('.')[0] == 'data' or name == 'onetrain.data.dataset'
    ]


def test_choices_of_the_keys_are_all_that_there_is():
    assert set(typing.get_args(train.Family)) == set(PRESETS)
    assert set(typing.get_args(train.Backend)) == {'auto', *BACKENDS}


# the project's own words, for which the field has better ones
PRIVATE = re.compile(
    r'\b(why_not|why_broken|as_written|time_when_done|from_main|from_all|of_each_rank|was_told'
    r'|refuse_impossible|refuse_in_parts|note_without_effect|rows_of|part_of|make_way|set_aside'
    r'|shares_of|cycle_of|last_micro_step)\b'
)


def test_public_names_are_the_fields():
    """Of functions and classes at the top of a module; those that were renamed do not come back."""
    for folder in ('.', 'onetrain', 'data', 'plots'):
        for name in os.listdir(os.path.join(ROOT, folder)):
            if name.endswith('.py'):
                with open(os.path.join(ROOT, folder, name), encoding='utf-8') as f:
                    tree = ast.parse(f.read())
                public = [node.name for node in tree.body if hasattr(node, 'name')]
                assert not [word for word in public if PRIVATE.search(word)], name
