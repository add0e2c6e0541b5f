"""Proves that data/inspect_dataset.py counts what is there and sees what is wrong, and that
data/train_tokenizer.py makes tokenizers that the other commands take.
"""

import importlib
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, make_dataset, run_process, write_shards
from test_prepare import lines, prepare, read_texts, write_jsonl

from onetrain.data.token_file import read_meta
from onetrain.tokenizers.base import load_tokenizer

inspect, train_tokenizer = (
    importlib.import_module(f'data.{name}') for name in ('inspect_dataset', 'train_tokenizer')
)


@pytest.fixture
def bytes_set(tmp_path):
    texts = lines(300)
    prepare(tmp_path / 'set', write_jsonl(tmp_path / 'a.jsonl', texts), tokenizer='bytes')
    return tmp_path / 'set', [text for i, text in enumerate(texts) if i % 20 != 19]


def test_counts_lengths_and_text(bytes_set, tmp_path, capsys):
    folder, texts = bytes_set
    found = inspect.main(
        [
            str(folder),
            '--at',
            str(len(texts[0].encode()) + 1),
            '--tokens',
            '30',
            '--output',
            str(tmp_path / 'a.png'),
        ]
    )
    said, joined = capsys.readouterr().out, b''.join(text.encode() for text in texts)
    assert (
        found['tokens'] == len(joined) + len(texts)
        and found['counts'][:256].tolist()
        == np.bincount(np.frombuffer(joined, np.uint8), minlength=256).tolist()
    )
    assert (
        found['counts'][256] == len(texts)
        and found['lengths'].tolist() == [len(text.encode()) + 1 for text in texts]
        and found['doubts'] == []
    )
    assert (
        f'{found["tokens"]:,} tokens, uint16, 1 file' in said
        and f'documents: {len(texts):,}' in said
        and texts[1][:12] in said
        and 'LOOK' not in said
    )
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
    os.remove(folder / 'train.ends')  # as of sets that were made before there were any
    assert (
        inspect.main([str(folder), '--output', str(tmp_path / 'a.png')])['lengths'].tolist()
        == found['lengths'].tolist()
    )
    assert (
        inspect.main(
            [str(folder), '--split', 'val', '--at', '-5', '--output', str(tmp_path / 'a.png')]
        )['lengths'].size
        == 15
    )


def test_files_of_many_and_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, 'STRETCH', 100)
    folder = write_shards(tmp_path / 'many', np.arange(5000), np.arange(1000))
    found = inspect.main([folder, '--output', str(tmp_path / 'a.png')])
    assert (found['counts'] == 1).all() and found['counted'] == 5000 and len(found['lengths']) > 10
    sampled = inspect.main([folder, '--sample', '1000', '--output', str(tmp_path / 'a.png')])
    assert (
        sampled['counted'] == 1000
        and sampled['counts'].sum() == 1000
        and sampled['counts'][:100].all()
        and sampled['counts'][4500:].any()
    )


def test_what_looks_wrong(bytes_set, tmp_path, capsys):
    folder, _ = bytes_set

    def doubts(**changes):
        with open(folder / 'meta.pkl', 'rb') as f:
            meta = pickle.load(f)
        with open(folder / 'meta.pkl', 'wb') as f:
            pickle.dump({**meta, **changes}, f)
        return ' '.join(inspect.main([str(folder), '--output', str(tmp_path / 'a.png')])['doubts'])

    wide = np.random.default_rng(0).integers(100, 60_000, 5000)
    assert 'ids are beyond the vocabulary of 200' in doubts(vocab_size=200)
    assert 'not the bytes that meta.pkl describes' in doubts(
        vocab_size=257, fingerprint={'train': 'a' * 64, 'val': 'a' * 64}
    )
    assert 'meta.pkl states 7 tokens' in doubts(vocab_size=257, tokens={'train': 7, 'val': 7})
    assert 'the id 255, which ends a document, never occurs' in doubts(eot_id=255)
    wide.astype(np.uint32).tofile(folder / 'train.bin')
    assert 'these are uint32 tokens read as uint16' in doubts(vocab_size=60_000)
    assert 'uint' not in doubts(dtype='uint32', vocab_size=60_000)
    wide.astype(np.uint16).tofile(folder / 'train.bin')
    assert 'these are uint16 tokens read as uint32' in doubts() and 'uint32' not in doubts(
        dtype='uint16'
    )
    assert 'LOOK: ' in capsys.readouterr().out
    for arguments, message in (
        ([str(tmp_path / 'none')], 'there is no data set'),
        ([str(tmp_path)], 'has no train.bin'),
        ([str(folder), '--at', '99999999'], 'is beyond the'),
    ):
        with pytest.raises(ValueError, match=message):
            inspect.main(arguments)


def test_as_a_command_from_anywhere(tmp_path):
    folder = make_dataset(str(tmp_path / 'set'))
    for where, path in (
        (ROOT, 'data/inspect_dataset.py'),
        (os.path.join(ROOT, 'data'), 'inspect_dataset.py'),
        (tmp_path, os.path.join(ROOT, 'data', 'inspect_dataset.py')),
    ):
        done = subprocess.run(
            [sys.executable, path, folder, '--tokens', '20'],
            cwd=where,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and '20,000 tokens' in done.stdout, done.stderr
    done = subprocess.run(
        [sys.executable, 'data/inspect_dataset.py', 'none'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and done.stderr
        == 'error: there is no data set none: type the name of a folder of data/ or a path\n'
    )


@pytest.mark.parametrize('kind', ['bpe', 'unigram', 'sp_bpe'])
def test_a_tokenizer_of_ones_own_text(kind, tmp_path):
    texts = [
        open(os.path.join(ROOT, name), encoding='utf-8').read()
        for name in ('TRAINING_GUIDE.md', 'train.py', 'model.py')
    ] + ['Ünïcode 日本 \N{GRINNING FACE}  two   spaces\n\ttab']
    source = write_jsonl(
        tmp_path / 'a.jsonl', [part for text in texts for part in text.split('\n\n')]
    )
    code, output = run_process(
        'data/train_tokenizer.py',
        '--input',
        str(source),
        '--kind',
        kind,
        '--vocab_size',
        '600',
        '--output',
        str(tmp_path / 'own'),
    )
    assert code == 0 and '600 ids of' in output, output
    path = tmp_path / 'own' if kind == 'bpe' else tmp_path / 'own' / 'tokenizer.model'
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.vocab_size, tokenizer.eot_id, tokenizer.eot_token) == (
        600,
        *((0, '<|endoftext|>') if kind == 'bpe' else (2, '</s>')),
    )
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and len(ids) < len(text.encode())
    prepare(tmp_path / 'set', source, tokenizer=path)
    assert (
        read_meta(tmp_path / 'set')['vocab_size'] == 600
        and read_texts(tmp_path / 'set', 'val')[0]
        == [part for text in texts for part in text.split('\n\n')][19]
    )


def test_bounded_text_and_bad_input(tmp_path):
    source = write_jsonl(tmp_path / 'a.jsonl', [f'{i} ' + 'x' * 90 for i in range(1000)])
    some = list(train_tokenizer.Texts([str(source)], 'text', 12_000))
    numbers = [int(text.split()[0]) for text in some]
    assert (
        95 < len(some) < 115
        and numbers == sorted(numbers)
        and numbers[0] == 0
        and numbers[-1] > 980
    )
    for words, message in (
        (['--vocab_size', '100'], 'too small for 256 bytes'),
        (['--kind', 'unigram', '--pattern', 'llama3'], 'has no meaning with --kind unigram'),
        (['--kind', 'unigram', '--vocab_size', '5000'], 'cannot make 5000 pieces'),
    ):
        with pytest.raises(ValueError, match=message):
            train_tokenizer.main(
                ['--input', str(source), '--output', str(tmp_path / 'own'), *words]
            )
    (tmp_path / 'empty.txt').write_text('')
    with pytest.raises(ValueError, match='there is no text'):
        train_tokenizer.main(
            ['--input', str(tmp_path / 'empty.txt'), '--output', str(tmp_path / 'own')]
        )
