"""Proves the prepare.py scripts: the ids, splits and counts they promise, bounded pieces, broken
input counted or refused, and nothing half-done published.
"""

import collections
import gzip
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import types
from pathlib import Path

import conftest
import numpy as np
import pytest

from onetrain.data.token_file import read_meta, token_dtype
from onetrain.prepare import cli, documents, tinyshakespeare
from onetrain.tokenizers.base import HuggingFaceTokenizer, tokenizer_of
from onetrain.tokenizers.train import train_bpe

ROOT = Path(conftest.ROOT)

own_text, openwebtext, pystdlib, shakespeare, shakespeare_char = (
    importlib.import_module(f'data.{name}.prepare')
    for name in ('own_text', 'openwebtext', 'pystdlib', 'shakespeare', 'shakespeare_char')
)
EOT = '<|endoftext|>'


def read_ids(folder, split):
    return np.fromfile(Path(folder) / f'{split}.bin', dtype=token_dtype(read_meta(folder))).tolist()


def read_texts(folder, split):
    """The documents of a split as text, with the data set's own tokenizer; every one must be
    closed.
    """
    meta = read_meta(folder)
    tokenizer, texts = tokenizer_of(str(folder), meta), [[]]
    for i in read_ids(folder, split):
        texts[-1].append(i)
        if i == meta['eot_id']:
            texts[-1].pop()
            texts.append([])
    assert meta['eot_id'] is None or texts.pop() == []
    return [tokenizer.decode(ids) for ids in texts]


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob('*')
        if path.is_file() and path.suffix != '.tmp'
    }


def lines(count, seed=0):
    """A text of `count` lines of different lengths."""
    draw = random.Random(seed)
    return [f'{i} ' + 'wörd ' * draw.randrange(1, 12) + '\n' for i in range(count)]


def write_jsonl(path, texts, field='text'):
    opener = gzip.open if path.suffix == '.gz' else open
    with opener(path, 'wt', encoding='utf-8') as f:
        f.writelines(json.dumps({'id': i, field: text}) + '\n' for i, text in enumerate(texts))
    return path


def prepare(folder, *inputs, script=own_text, **options):
    words = [word for key, value in options.items() for word in (f'--{key}', str(value))]
    script.main(['--output', str(folder), *words, '--input', *map(str, inputs)])
    return read_meta(folder)


@pytest.fixture
def tiny_encoding(tmp_path):
    """PYTHONPATH on which tiktoken finds an encoding named tiny, for scripts that run as
    processes.
    """
    pytest.importorskip('tiktoken')
    (tmp_path / 'plugin' / 'tiktoken_ext').mkdir(parents=True)
    (tmp_path / 'plugin' / 'tiktoken_ext' / 'onetrain_tiny.py').write_text(
        "ENCODING_CONSTRUCTORS = {'tiny': lambda: {'name': 'tiny', 'pat_str': r'\\S+|\\s+',"
        " 'special_tokens': {'<|endoftext|>': 257},\n                         'mergeable_ranks':"
        " {bytes([i]): i for i in range(256)} | {b'th': 256}}}\n"
    )
    return {**os.environ, 'PYTHONPATH': f'{ROOT}:{tmp_path / "plugin"}'}


def test_every_script_runs_from_its_folder_and_from_the_root():
    scripts = sorted((ROOT / 'data').glob('*/prepare.py'))
    assert len(scripts) >= 5
    for script in scripts:
        for words, cwd in (
            (['prepare.py'], script.parent),
            ([str(script.relative_to(ROOT))], ROOT),
        ):
            done = subprocess.run(
                [sys.executable, *words, '--help'], cwd=cwd, capture_output=True, text=True
            )
            assert done.returncode == 0 and '--output' in done.stdout, done.stderr


def test_shakespeare_char_is_nanogpts(tmp_path, capsys):
    text = ''.join(lines(40)) + 'an end with no newline'
    (tmp_path / 'text').write_text(text, encoding='utf-8')
    meta = prepare(tmp_path / 'set', tmp_path / 'text', script=shakespeare_char)
    characters = sorted(set(text))
    stoi = {c: i for i, c in enumerate(characters)}  # from here on as in nanoGPT's script
    ids = [stoi[c] for c in text]
    assert (
        meta['stoi'] == stoi
        and meta['itos'] == dict(enumerate(characters))
        and meta['vocab_size'] == len(characters)
    )
    assert (
        read_ids(tmp_path / 'set', 'train') == ids[: int(len(text) * 0.9)]
        and read_ids(tmp_path / 'set', 'val') == ids[int(len(text) * 0.9) :]
    )
    assert (
        meta['eot_id'] is None
        and ''.join(read_texts(tmp_path / 'set', 'train') + read_texts(tmp_path / 'set', 'val'))
        == text
    )
    said = capsys.readouterr().out
    assert (
        f'{meta["tokens"]["train"]:,} tokens' in said
        and 'python train.py config/train_shakespeare_char.py --dataset=' in said
    )


def test_shakespeare_is_one_text_without_an_end(tmp_path, tiny_encoding):
    text = ''.join(lines(40)) + f'the {EOT} the end'
    (tmp_path / 'text').write_text(text, encoding='utf-8')
    done = subprocess.run(
        [
            sys.executable,
            'prepare.py',
            '--tokenizer',
            'tiny',
            '--input',
            tmp_path / 'text',
            '--output',
            tmp_path / 'set',
        ],
        cwd=ROOT / 'data' / 'shakespeare',
        env=tiny_encoding,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    cut = int(len(text) * 0.9)
    for split, part in (('train', text[:cut]), ('val', text[cut:])):
        ids = read_ids(tmp_path / 'set', split)
        assert b''.join(b'th' if i == 256 else bytes([i]) for i in ids).decode() == part
    assert 256 in ids and 257 not in ids
    meta = read_meta(tmp_path / 'set')
    assert meta['tokenizer'] == {'kind': 'tiktoken', 'name': 'tiny'} and (
        meta['vocab_size'],
        meta['eot_id'],
    ) == (258, 257)


def test_shakespeare_downloads_once_and_says_what_to_do_when_it_cannot(tmp_path, monkeypatch):
    def offline(*args, **more):
        raise OSError('no route to host')

    monkeypatch.setattr(tinyshakespeare.urllib.request, 'urlopen', offline)
    with pytest.raises(
        ValueError, match=f'no route to host.*put the file at {tmp_path}/set/input.txt'
    ) as caught:
        shakespeare_char.main(['--output', str(tmp_path / 'set')])
    assert '\n' not in str(caught.value) and not (tmp_path / 'set').exists()
    asked = []
    monkeypatch.setattr(
        tinyshakespeare.urllib.request,
        'urlopen',
        lambda url, timeout: asked.append(url) or (tmp_path / 'source').open('rb'),
    )
    (tmp_path / 'source').write_text('abc' * 50)
    for _ in range(2):
        shakespeare_char.main(['--output', str(tmp_path / 'set')])
    assert (
        asked == [tinyshakespeare.URL]
        and (tmp_path / 'set' / 'input.txt').read_text() == 'abc' * 50
    )
    assert read_meta(tmp_path / 'set')['tokens'] == {'train': 135, 'val': 15}


def test_pystdlib_is_a_deterministic_hugging_face_data_set(tmp_path, monkeypatch):
    root = tmp_path / 'lib'
    for i in range(60):
        path = root / ('pkg' if i % 2 else '') / f'module{i:02}.py'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'"""Module {i}."""\nimport sys\n\n\ndef function_{i}(argument):\n    return argument *'
            f' {i}\n'
        )
    (root / 'latin.py').write_bytes('# coding: latin-1\nname = "é"\n'.encode('latin-1'))
    for left_out in (
        'test/x.py',
        'pkg/tests/x.py',
        'site-packages/x.py',
        'encodings/cp1.py',
        'notes.txt',
        'empty.py',
        '_sysconfigdata_x.py',
    ):
        (root / left_out).parent.mkdir(exist_ok=True)
        (root / left_out).write_text('' if left_out == 'empty.py' else 'LEFT_OUT = 1\n')
    monkeypatch.setattr(pystdlib.sysconfig, 'get_paths', lambda: {'stdlib': str(root)})
    for name in ('a', 'b'):
        pystdlib.main(['--output', str(tmp_path / name), '--vocab_size', '300'])
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')
    assert sorted(contents(tmp_path / 'a')) == [
        'meta.pkl',
        'tokenizer/tokenizer.json',
        'tokenizer/tokenizer_config.json',
        'train.bin',
        'train.ends',
        'val.bin',
        'val.ends',
    ]
    meta = read_meta(tmp_path / 'a')
    assert meta['tokenizer'] == {'kind': 'hf', 'path': 'tokenizer'} and (
        meta['vocab_size'],
        meta['eot_id'],
    ) == (300, 0)
    files = sorted(
        [*root.glob('*.py'), *root.glob('pkg/*.py')], key=lambda path: str(path.relative_to(root))
    )
    texts = [
        path.read_text('latin-1' if path.stem == 'latin' else 'utf-8')
        for path in files
        if path.stem not in ('empty', '_sysconfigdata_x')
    ]
    assert len(texts) == 61
    assert read_texts(tmp_path / 'a', 'val') == texts[19::20]
    assert read_texts(tmp_path / 'a', 'train') == [
        text for i, text in enumerate(texts) if i % 20 != 19
    ]
    with pytest.raises(ValueError, match='type 257 or more'):
        pystdlib.main(['--output', str(tmp_path / 'c'), '--vocab_size', '256'])


def test_pystdlib_reads_this_pythons_library():
    import sysconfig

    paths = pystdlib.source_files(sysconfig.get_paths()['stdlib'])
    assert (
        paths == sorted(paths)
        and 'argparse.py' in paths
        and os.path.join('json', 'decoder.py') in paths
    )
    assert len(paths) > 300 and not [
        path for path in paths if {'test', 'site-packages', 'encodings'} & set(path.split(os.sep))
    ]


def test_own_text_txt_is_cut_at_a_line_end_and_closed(tmp_path):
    texts = [''.join(lines(300, seed)) for seed in (1, 2)]
    for name, text in zip('ab', texts):
        (tmp_path / f'{name}.txt').write_text(text, encoding='utf-8')
    meta = prepare(tmp_path / 'set', tmp_path, tokenizer='bytes', val_fraction=0.1)
    train, val = read_texts(tmp_path / 'set', 'train'), read_texts(tmp_path / 'set', 'val')
    assert [t + v for t, v in zip(train, val)] == texts and meta['documents'] == {
        'train': 2,
        'val': 2,
    }
    for t, v in zip(train, val):
        assert t.endswith('\n') and abs(len(v.encode()) / len((t + v).encode()) - 0.1) < 0.01
    assert '0.1 of each .txt' in meta['split'] and meta['eot_id'] == 256


def test_markdown_is_text_where_it_is_named(tmp_path, capsys):
    """In a folder it is more often about the data than the data."""
    (tmp_path / 'notes').mkdir()
    for name, text in (('a.md', '# A title\n' * 30), ('b.txt', 'some lines\n' * 30)):
        (tmp_path / 'notes' / name).write_text(text)
    prepare(tmp_path / 'folder', tmp_path / 'notes', tokenizer='bytes')
    said = capsys.readouterr().out
    assert (
        f'{tmp_path / "notes"}: 1 file left out (1 of .md); from a folder .txt, ' in said
        and f"'{tmp_path / 'notes'}/**/*.md'" in said
    )
    prepare(tmp_path / 'pattern', tmp_path / 'notes' / '*', tokenizer='bytes')
    assert b'title' not in bytes(read_ids(tmp_path / 'folder', 'train')[:-1])
    read = bytes(id for id in read_ids(tmp_path / 'pattern', 'train') if id < 256)
    assert read.count(b'# A title\n') == 28 and read.count(b'some lines\n') == 28
    os.remove(tmp_path / 'notes' / 'b.txt')
    with pytest.raises(
        ValueError,
        match=(
            'holds no .txt, .*; Markdown and .json are taken from patterns: --input'
            " '.*notes/[*][*]/[*].md'"
        ),
    ):
        prepare(tmp_path / 'none', tmp_path / 'notes', tokenizer='bytes')


def test_own_text_without_line_ends_is_cut_between_characters(tmp_path):
    text = '日本語' * 1000
    for size in (3000, 2990, 2995):  # the cut falls on the 1st, 3rd and 2nd byte of a character
        (tmp_path / 'a.txt').write_text(text[:size], encoding='utf-8')
        meta = prepare(tmp_path / 'set', tmp_path / 'a.txt', tokenizer='char', val_fraction=0.07)
        cut = meta['tokens']['train']
        assert read_texts(tmp_path / 'set', 'train') + read_texts(tmp_path / 'set', 'val') == [
            text[:cut],
            text[cut:size],
        ]
        assert (
            meta['tokens']['val'] in (int(size * 0.07), int(size * 0.07) + 1)
            and meta['vocab_size'] == 3
        )


def read_txt(path, **options):
    units = documents.units_of(str(path), **options)
    return [(unit, row.content) for unit in units for row in documents.read(unit)]


def test_large_txt_comes_in_pieces_that_end_at_line_ends(tmp_path, monkeypatch):
    text = ''.join(lines(3000))
    path = tmp_path / 'a.txt'
    # a byte order mark and another system's line ends
    path.write_bytes(b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode())
    whole = read_txt(path, txt_val_fraction=0.1)
    assert [(unit.split, unit.last) for unit, _ in whole] == [('train', True), ('val', True)]
    monkeypatch.setattr(documents, 'PIECE_BYTES', 1000)
    pieces = read_txt(path, txt_val_fraction=0.1)
    assert (
        len(pieces) > 60
        and max(len(piece) for _, piece in pieces) < 1100
        and all(piece.endswith('\n') for _, piece in pieces)
    )
    assert [
        ''.join(piece for unit, piece in pieces if unit.split == split)
        for split in ('train', 'val')
    ] == [piece for _, piece in whole]
    assert ''.join(piece for _, piece in pieces) == text
    assert [i for i, (unit, _) in enumerate(pieces) if unit.last] == [
        [unit.split for unit, _ in pieces].index('val') - 1,
        len(pieces) - 1,
    ]
    meta = prepare(tmp_path / 'set', path, tokenizer='bytes', val_fraction=0.1)
    assert meta['documents'] == {'train': 1, 'val': 1} and read_texts(
        tmp_path / 'set', 'train'
    ) == [whole[0][1]]
    assert np.fromfile(tmp_path / 'set' / 'train.ends', '<u8').tolist() == [meta['tokens']['train']]
    # one endless line: pieces stay bounded, and neither a character nor a line end of two bytes is
    # cut
    monkeypatch.setattr(documents, 'LINE_BYTES', 500)
    for text in (
        '日本語' * 5000,
        'a' + '日本語' * 5000,
        '\U0001f600' * 3000,
        'x\r' * 2 + '\U0001f600' * 3000,
    ):
        path.write_text(text, encoding='utf-8', newline='')
        pieces = [piece for _, piece in read_txt(path)]
        assert (
            ''.join(pieces) == text.replace('\r', '\n')
            and max(map(len, pieces)) <= 501
            and len(pieces) > 5
        )
    monkeypatch.setattr(documents, 'PIECE_BYTES', 7)
    monkeypatch.setattr(documents, 'LINE_BYTES', 3)
    for text in ('ab\r\ncd\r\n' * 40, '\r\n' * 99, 'a\r\n' * 50 + '日\r\n' * 50):
        path.write_text(text, encoding='utf-8', newline='')
        assert ''.join(piece for _, piece in read_txt(path)) == text.replace('\r\n', '\n')


def test_rows_go_to_val_every_kth_whatever_the_format(tmp_path):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    texts = [line.strip() + ('' if i % 3 else '\nsecond line') for i, line in enumerate(lines(50))]
    write_jsonl(tmp_path / 'a.jsonl', texts[:10])
    write_jsonl(tmp_path / 'b.jsonl.gz', texts[10:20])
    write_jsonl(tmp_path / 'c.json', texts[20:30])
    parquet.write_table(
        pyarrow.table({'id': list(range(20)), 'text': texts[30:]}),
        tmp_path / 'd.parquet',
        row_group_size=7,
    )
    inputs = [str(tmp_path / name) for name in ('a.jsonl', 'b*', 'c.json', 'd.parquet', '*.jsonl')]
    assert [Path(path).name for path in documents.find_files(inputs)] == [
        'a.jsonl',
        'b.jsonl.gz',
        'c.json',
        'd.parquet',
    ]
    (tmp_path / '.hidden.txt').write_text('x')
    assert [Path(path).name for path in documents.find_files([str(tmp_path)])] == [
        'a.jsonl',
        'b.jsonl.gz',
        'd.parquet',
    ]
    meta = prepare(tmp_path / 'set', *inputs, tokenizer='bytes', val_fraction=0.1)
    assert read_texts(tmp_path / 'set', 'val') == texts[9::10]
    assert read_texts(tmp_path / 'set', 'train') == [
        text for i, text in enumerate(texts) if i % 10 != 9
    ]
    assert meta['documents'] == {'train': 45, 'val': 5} and 'every 10th line' in meta['split']


def test_special_token_text_and_half_surrogates_in_documents(tmp_path):
    (tmp_path / 'a.jsonl').write_text(
        ''.join(
            f'{{"text": "{text}"}}\n'
            for text in [f'a {EOT} b', 'x \\ud800 y', '', 'pair \\ud83d\\ude00'] * 2
        )
    )
    prepare(tmp_path / 'set', tmp_path / 'a.jsonl', tokenizer='bytes', val_fraction=0.5)
    texts = read_texts(tmp_path / 'set', 'train') + read_texts(tmp_path / 'set', 'val')
    assert collections.Counter(texts) == {
        f'a {EOT} b': 2,
        'x \ufffd y': 2,
        'pair \N{GRINNING FACE}': 2,
    }


def test_hugging_face_ids_are_those_of_the_library_on_the_whole_text(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    texts = lines(40) + [f'{EOT} in a text\n']
    own = train_bpe(texts, 300)
    own.describe(str(tmp_path))
    (tmp_path / 'a.txt').write_text(''.join(texts), encoding='utf-8')
    meta = prepare(tmp_path / 'set', tmp_path / 'a.txt', tokenizer=tmp_path / 'tokenizer')
    library = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer' / 'tokenizer.json'))
    library.encode_special_tokens = True
    for split in ('train', 'val'):
        assert read_ids(tmp_path / 'set', split) == library.encode(
            read_texts(tmp_path / 'set', split)[0]
        ).ids + [meta['eot_id']]


def test_broken_rows_are_counted_and_the_first_is_named(tmp_path, capsys):
    path = write_jsonl(tmp_path / 'a.jsonl', ['x'] * 198)
    with path.open('a') as f:
        f.write('\n{"text": "cut of\n{"text": null}\n')
    meta = prepare(tmp_path / 'set', path, tokenizer='bytes')
    assert sum(meta['documents'].values()) == 198
    assert (
        f'2 of 200 rows have no text and were left out, the first is {path} line 200 (no JSON'
        ' object on one line' in capsys.readouterr().out
    )


@pytest.mark.parametrize('tokenizer', ['bytes', 'char'])
def test_more_than_one_percent_of_broken_rows_stops_the_run(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / 'a.jsonl', ['x'] * 197)
    prepare(tmp_path / 'set', path, tokenizer=tokenizer)
    before = contents(tmp_path / 'set')
    with path.open('a') as f:
        f.write('[1]\n{"texts": "y"}\n{"text": 5}\n')
    with pytest.raises(
        ValueError,
        match=r'3 of 200 rows have no text, more than 1 %.*line 198 \(no JSON object but a list\)',
    ):
        prepare(tmp_path / 'set', path, tokenizer=tokenizer)
    with pytest.raises(ValueError, match='more than 1 %'):
        prepare(tmp_path / 'other', path, tokenizer=tokenizer)
    assert contents(tmp_path / 'set') == before
    assert not (tmp_path / 'other').exists() or not os.listdir(tmp_path / 'other')


def test_a_wrong_field_is_found_after_1000_rows(tmp_path):
    path = write_jsonl(tmp_path / 'a.jsonl', ['x'] * 3000, field='content')
    with pytest.raises(
        ValueError, match=r"1,000 of 1,000 rows.*no field 'text', only id, content.*--text_field"
    ):
        prepare(tmp_path / 'set', path, tokenizer='bytes')
    assert prepare(tmp_path / 'set', path, tokenizer='bytes', text_field='content')[
        'documents'
    ] == {'train': 2850, 'val': 150}


def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')

    def refusal(*inputs, **options):
        with pytest.raises(ValueError) as caught:
            prepare(tmp_path / 'set', *inputs, **{'tokenizer': 'bytes', **options})
        assert '\n' not in str(caught.value)
        assert not (tmp_path / 'set').exists() or not os.listdir(tmp_path / 'set')
        return str(caught.value)

    def file(name, content=b''):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    assert 'no such file or folder' in refusal(tmp_path / 'no*.txt')
    (tmp_path / 'folder').mkdir()
    assert (
        'holds no .txt, .jsonl, .jsonl.gz, .json.gz, .jsonl.zst, .json.zst or .parquet file'
        in refusal(tmp_path / 'folder')
    )
    assert 'expected .txt' in refusal(file('a.doc', b'x'))
    assert 'there is no text in these files' in refusal(file('empty.txt'))
    assert 'there is no text in these files' in refusal(
        file('empty.txt'), file('empty.jsonl', b'\n{"text": ""}\n')
    )
    assert 'no tokens for train' in refusal(file('one.txt', b'x'))
    assert 'type a larger share, such as --val_fraction 0.5' in refusal(
        write_jsonl(tmp_path / 'few.jsonl', ['x'] * 19)
    )
    assert 'is not UTF-8 (byte 0xe9 at 3)' in refusal(
        file('latin.txt', 'caf\xe9 noir\n'.encode('latin-1') * 9)
    )
    assert 'is not UTF-8' in refusal(file('cut.txt', ('x' * 100 + '日').encode()[:-1]))
    whole = write_jsonl(tmp_path / 'whole.jsonl.gz', lines(2000)).read_bytes()
    assert 'cut.jsonl.gz is damaged after line' in refusal(file('cut.jsonl.gz', whole[:-3000]))
    assert 'is damaged after line 0' in refusal(file('plain.jsonl.gz', b'{"text": "x"}\n'))
    assert 'cannot be read as parquet' in refusal(file('bad.parquet', b'PAR1'))
    parquet.write_table(pyarrow.table({'id': [1], 'content': ['x']}), tmp_path / 'other.parquet')
    assert "no column 'text': name one of id, content with --text_field" in refusal(
        tmp_path / 'other.parquet'
    )
    assert "row 1 ('id' is a int)" in refusal(tmp_path / 'other.parquet', text_field='id')
    assert 'above 0 and up to 0.5' in refusal(tmp_path / 'few.jsonl', val_fraction=0.6)
    assert "unknown tokenizer 'gpt22'" in refusal(tmp_path / 'few.jsonl', tokenizer='gpt22')


def test_as_a_command_a_users_error_is_one_line_and_code_2(tmp_path):
    for script, arguments in (
        ('own_text', ['--input', tmp_path / 'none.txt']),
        ('own_text', ['--tokenizer', 'char']),
        ('openwebtext', ['--tokenizer', 'no', '--output', tmp_path]),
        ('shakespeare', ['--tokenizer', 'bytes', '--input', 'none']),
    ):
        done = subprocess.run(
            [sys.executable, ROOT / 'data' / script / 'prepare.py', *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert (
            done.returncode == 2
            and 'Traceback' not in done.stderr
            and 'error: ' in done.stderr.splitlines()[-1]
        ), done.stderr
    (tmp_path / 'a.txt').write_text('text\n' * 99)
    done = subprocess.run(
        [
            sys.executable,
            ROOT / 'data' / 'own_text' / 'prepare.py',
            '--input',
            'a.txt',
            '--tokenizer=char',
            '--output=mine',
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and done.stdout.endswith(
        f'next: python train.py config/own_text.py --dataset={tmp_path}/mine\n'
    ), done.stderr


def test_the_train_command_that_is_named(capsys):
    for folder, config, expected in (
        (ROOT / 'data' / 'mybooks', None, '--dataset=mybooks'),
        (ROOT / 'data' / 'own_text', 'config/a.py', 'config/a.py'),
        (ROOT / 'data' / 'mybooks', 'config/a.py', 'config/a.py --dataset=mybooks'),
    ):
        cli.report(
            types.SimpleNamespace(folder=str(folder), report=lambda: None),
            str(ROOT / 'data' / 'own_text'),
            config,
        )
        assert capsys.readouterr().out == f'next: python train.py {expected}\n'


def test_sigkill_while_preparing_leaves_the_older_set_and_its_tokenizer(tmp_path):
    folders = []
    for size in (300, 280):
        folders.append(tmp_path / f'tokenizer{size}')
        train_bpe(lines(40), size).describe(str(folders[-1]))
    write_jsonl(tmp_path / 'a.jsonl', lines(100))
    prepare(tmp_path / 'set', tmp_path / 'a.jsonl', tokenizer=folders[0] / 'tokenizer')
    before = contents(tmp_path / 'set')
    script = (
        'import sys, time, importlib; from onetrain.prepare import documents\n'
        'read = documents.read\n'
        'def slow(unit, field):\n'
        '    for number, row in enumerate(read(unit, field)):\n'
        '        yield row\n'
        "        if number == 50: print('mid-way', flush=True); time.sleep(60)\n"
        'documents.read = slow\n'
        "importlib.import_module('data.own_text.prepare').main(sys.argv[1:])\n"
    )
    for output, expected in ((tmp_path / 'set', before), (tmp_path / 'fresh', {})):
        process = subprocess.Popen(
            [
                sys.executable,
                '-c',
                script,
                '--input',
                tmp_path / 'a.jsonl',
                '--tokenizer',
                folders[1] / 'tokenizer',
                '--output',
                output,
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == 'mid-way\n'
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert (
            list(output.glob('parts-*/000000.bin.*.tmp'))
            and {
                name: content
                for name, content in contents(output).items()
                if not name.startswith('parts-')
            }
            == expected
        )
    prepare(tmp_path / 'set', tmp_path / 'a.jsonl', tokenizer=folders[1] / 'tokenizer')
    assert (
        read_meta(tmp_path / 'set')['vocab_size'] == 280
        and read_texts(tmp_path / 'set', 'val') == lines(100)[19::20]
        and not list((tmp_path / 'set').glob('parts-*'))
    )


def test_an_exception_mid_way_leaves_the_older_set(tmp_path, monkeypatch):
    train_bpe(lines(40), 300).describe(str(tmp_path))
    path = write_jsonl(tmp_path / 'a.jsonl', lines(100))
    prepare(tmp_path / 'set', path, tokenizer=tmp_path / 'tokenizer')
    before = contents(tmp_path / 'set')
    encode, texts = HuggingFaceTokenizer.encode, []

    def fails(self, text):
        texts.append(text)
        if len(texts) == 50:
            raise MemoryError
        return encode(self, text)

    monkeypatch.setattr(HuggingFaceTokenizer, 'encode', fails)
    with pytest.raises(MemoryError):
        prepare(tmp_path / 'set', path, tokenizer=tmp_path / 'tokenizer')
    assert contents(tmp_path / 'set') == before and not list((tmp_path / 'set').glob('*.tmp'))


def test_openwebtext_from_local_files(tmp_path):
    texts = [f'document {i}' for i in range(4100)]
    write_jsonl(tmp_path / 'a.jsonl', texts[:4000])
    for i in range(4000, 4100):
        (tmp_path / f'b{i}.txt').write_text(texts[i])
    meta = prepare(tmp_path / 'set', tmp_path, script=openwebtext, tokenizer='bytes')
    assert (
        read_texts(tmp_path / 'set', 'val') == [texts[1999], texts[3999]]
        and meta['split'] == 'every 2000th document is val'
    )
    assert read_texts(tmp_path / 'set', 'train') == [
        text for i, text in enumerate(texts) if i % 2000 != 1999
    ]
    with pytest.raises(ValueError, match='--revision has no meaning with --input'):
        prepare(tmp_path / 'set', tmp_path, script=openwebtext, revision='main')
    with pytest.raises(ValueError, match='--text_field has no meaning without --input'):
        openwebtext.main(['--text_field', 'content'])


class HubRows(list):
    """As much of datasets.Dataset as prepare.py uses."""

    def train_test_split(self, **how):
        assert how == {'test_size': 0.0005, 'seed': 2357, 'shuffle': True}
        return {'train': HubRows(self[:-3]), 'test': HubRows(self[-3:])}

    def map(self, function, remove_columns, num_proc, desc):
        assert remove_columns == ['text'] and num_proc == 5
        return HubRows(function(row) for row in self)

    def iter(self, batch_size):
        for first in range(0, len(self), batch_size):
            yield {'ids': [row['ids'] for row in self[first : first + batch_size]]}


def test_openwebtext_from_the_hub(tmp_path, monkeypatch):
    texts = [f'document {i} {EOT}' for i in range(2500)] + ['']
    asked = []

    def load_dataset(name, revision, num_proc):
        asked.append((name, revision, num_proc))
        if revision is None:
            raise RuntimeError('Dataset scripts are no longer supported')
        return {'train': HubRows({'text': text} for text in texts)}

    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
    arguments = ['--tokenizer', 'bytes', '--output', str(tmp_path / 'set'), '--num_proc', '5']
    with pytest.raises(ValueError, match='--revision=refs/convert/parquet'):
        openwebtext.main(arguments)
    openwebtext.main([*arguments, '--revision=refs/convert/parquet'])
    assert asked == [('openwebtext', None, 5), ('openwebtext', 'refs/convert/parquet', 5)]
    assert (
        read_texts(tmp_path / 'set', 'train') == texts[:-3]
        and read_texts(tmp_path / 'set', 'val') == texts[-3:]
    )
    assert 'seed=2357' in read_meta(tmp_path / 'set')['split']
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(ValueError, match='pip install datasets'):
        openwebtext.main(arguments)
