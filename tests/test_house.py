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
from onetrain import command_line
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


def sources():
    """(path, syntax tree) of the files that users run or read: not tests, benches and recipes."""
    listed = subprocess.run(
        ['git', 'ls-files', '*.py'], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for path in listed:
        if not path.startswith(('tests/', 'bench/', 'config/')):
            with open(os.path.join(ROOT, path), encoding='utf-8') as f:
                yield path, ast.parse(f.read())


def test_functions_are_short():
    """At most 60 lines, train() 120; ruff holds their complexity."""
    sizes = {
        f'{path} {node.name}': node.end_lineno - node.lineno + 1
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert sizes.pop('train.py train') <= 120 and len(sizes) > 1000
    assert not {name: lines for name, lines in sizes.items() if lines > 60}


def test_arguments_have_types():
    """Of all functions and methods that other files may call; mypy holds the calls to them."""

    def untyped(node, within_public=True):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                if within_public and not child.name.startswith('_'):
                    arguments = [*child.args.args, *child.args.kwonlyargs]
                    given = [a.arg for a in arguments if a.annotation or a.arg in ('self', 'cls')]
                    yield from {a.arg for a in arguments} - {'ctx', *given}
            elif isinstance(child, ast.ClassDef):
                yield from untyped(child, within_public and not child.name.startswith('_'))
            else:
                yield from untyped(child, within_public)

    assert not {path: names for path, tree in sources() if (names := [*untyped(tree)])}


def test_train_changes_no_names_of_others():
    tree = dict(sources())['train.py']
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
    r'|refuse_impossible|refuse_in_parts|note_without_effect|rows_of|part_of|make_way|set_aside\w*'
    r'|shares_of|cycle_of|last_micro_step|bend|concentration|likely|penali[sz]ed|Twin|twin_of|Quick'
    r'|Copier|news|thin_out|adopt|alone|talk|longer|ids_of|tidy|seal|unseal|age|deal|Guard'
    r'|MicroStep|Graphs)\b'
)


def test_public_names_are_the_fields():
    """Of functions, classes and methods; those that were renamed do not come back."""
    for path, tree in sources():
        names = [
            node.name
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        ]
        assert not [word for word in names if PRIVATE.fullmatch(word)], path


def test_nothing_edits_the_path_of_python():
    """The package is installed, or PYTHONPATH names this folder."""
    for path, tree in sources():
        edits = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        assert 'sys.path' not in edits, path


def test_a_script_of_another_copy_is_refused(tmp_path, capsys, monkeypatch):
    """It would run with the package that is installed, which is that of another folder."""
    script = tmp_path / 'copy' / 'data' / 'books' / 'prepare.py'
    os.makedirs(tmp_path / 'copy' / 'onetrain')
    (tmp_path / 'copy' / 'onetrain' / 'command_line.py').write_text('')
    command_line.check_checkout(str(script))  # PYTHONPATH names the package: it is meant
    monkeypatch.delenv('PYTHONPATH')
    with pytest.raises(SystemExit) as left:
        command_line.check_checkout(str(script))
    assert left.value.code == 2
    assert f'`pip install -e {tmp_path}/copy`' in capsys.readouterr().err
    command_line.check_checkout(os.path.join(ROOT, 'data', 'books', 'prepare.py'))
    command_line.check_checkout('/usr/bin/python3')
    for path in ('tests/test_x.py', '.venv/bin/pytest', 'train.py'):
        command_line.check_checkout(str(tmp_path / 'copy' / path))
