"""Proves the token file format: the dtype holds every id, nothing half-written looks finished,
meta.pkl runs no code, and fingerprints tell files apart.
"""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pytest

from onetrain.data.token_file import TokenFileWriter, fingerprint, read_meta, token_dtype

ROOT = Path(conftest.ROOT)


def writer(folder, vocab_size=300, **more):
    return TokenFileWriter(
        str(folder),
        **{
            'vocab_size': vocab_size,
            'eot_id': None,
            'tokenizer': {'kind': 'bytes'},
            'split': 'by hand',
            **more,
        },
    )


def write_set(folder, train=(1, 2, 3), val=(4, 5), **more):
    with writer(folder, **more) as w:
        w.write('train', train)
        w.write('val', val)
    return w


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob('*')
        if path.is_file() and path.suffix != '.tmp'
    }


@pytest.mark.parametrize('vocab_size, dtype', [(65536, 'uint16'), (65537, 'uint32')])
def test_dtype_is_the_smallest_that_holds_every_id(tmp_path, vocab_size, dtype):
    write_set(tmp_path, train=[0, vocab_size - 1], val=[vocab_size - 1], vocab_size=vocab_size)
    meta = read_meta(tmp_path)
    assert meta['dtype'] == dtype == token_dtype(meta).name
    stored = np.frombuffer(
        (tmp_path / 'train.bin').read_bytes(), dtype='<u2' if dtype == 'uint16' else '<u4'
    )
    assert stored.tolist() == [0, vocab_size - 1]


def test_meta_says_what_the_files_hold(tmp_path):
    with writer(tmp_path, eot_id=9, extra={'note': 'x'}) as w:
        w.write('train', np.array([5, 6], dtype=np.int64), ends_document=False)
        w.write('train', [250])
        w.write('train', [])
        w.write('train', [8, 7])
        w.write('val', [3])
    meta = read_meta(tmp_path)
    assert (
        meta['tokens'] == {'train': 5, 'val': 1}
        and meta['documents'] == {'train': 2, 'val': 1}
        and meta['max_id'] == {'train': 250, 'val': 3}
    )
    assert (meta['vocab_size'], meta['eot_id'], meta['split'], meta['note']) == (
        300,
        9,
        'by hand',
        'x',
    )
    assert meta['fingerprint'] == {
        split: fingerprint(tmp_path / f'{split}.bin') for split in ('train', 'val')
    }
    assert sorted(os.listdir(tmp_path)) == [
        'meta.pkl',
        'train.bin',
        'train.ends',
        'val.bin',
        'val.ends',
    ]
    assert [
        np.fromfile(tmp_path / name, '<u8').tolist() for name in ('train.ends', 'val.ends')
    ] == [[3, 5], [1]]


@pytest.mark.parametrize('bad', [-1, 300])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match=f'token id {bad} is outside the vocabulary of 300'):
        write_set(tmp_path, train=[1, bad, 2])
    assert os.listdir(tmp_path) == []


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match='no tokens for val'):
        write_set(tmp_path, val=())
    assert os.listdir(tmp_path) == []


class Describes:
    """A tokenizer that leaves a file in the data set's folder, as a Hugging Face one does."""

    def __init__(self, content, fail=False):
        self.content, self.fail = content, fail

    def describe(self, folder):
        if self.fail:
            raise OSError('disk full')
        Path(folder, 'tokenizer.model').write_text(self.content)
        return {'kind': 'sentencepiece', 'path': 'tokenizer.model'}


def test_an_exception_leaves_the_older_set_as_it_was(tmp_path):
    write_set(tmp_path, tokenizer=Describes('old'))
    older = contents(tmp_path)
    assert (
        older['tokenizer.model'] == b'old'
        and read_meta(tmp_path)['tokenizer']['kind'] == 'sentencepiece'
    )
    with pytest.raises(RuntimeError):
        with writer(tmp_path, tokenizer=Describes('new')) as w:
            w.write('train', [7] * 100_000)
            w.write('val', [7])
            raise RuntimeError('mid-way')
    assert contents(tmp_path) == older and not list(tmp_path.glob('*.tmp'))


def test_an_error_while_publishing_leaves_nothing_that_looks_finished(tmp_path):
    write_set(tmp_path)
    with pytest.raises(OSError):
        write_set(tmp_path, train=[9, 9], tokenizer=Describes('new', fail=True))
    assert not (tmp_path / 'train.bin').exists() and not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize('older', [False, True])
def test_sigkill_mid_way_publishes_nothing(tmp_path, older):
    if older:
        write_set(tmp_path, tokenizer=Describes('old'))
    before = contents(tmp_path)
    script = (
        'import sys, time; from onetrain.data.token_file import TokenFileWriter\nwith'
        " TokenFileWriter(sys.argv[1], vocab_size=300, eot_id=None, tokenizer={'kind': 'bytes'},"
        " split='by hand') as w:\n    w.write('train', [7] * 100000); w.write('val', [7] * 100000);"
        " print('mid-way', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, '-c', script, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == 'mid-way\n'
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(tmp_path.glob('train.bin.tmp')), 'the test must have interrupted a writer at work'
    assert contents(tmp_path) == before
    write_set(tmp_path, train=[1, 1, 1])  # and what it left is no obstacle
    assert read_meta(tmp_path)['tokens']['train'] == 3 and not list(tmp_path.glob('*.tmp'))


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('function', [os.mkdir, eval, exec])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, function):
    harm = tmp_path / 'harm'
    argument = str(harm) if function is os.mkdir else f'__import__("os").mkdir({str(harm)!r})'
    content = pickle.dumps({'vocab_size': 3, 'note': Runs(function, argument)})
    (tmp_path / 'meta.pkl').write_bytes(content)
    with pytest.raises(ValueError, match=r'meta.pkl cannot be read.*only builtin containers'):
        read_meta(tmp_path)
    assert not harm.exists()
    pickle.loads(content)
    assert harm.exists(), 'the pickle must be one that does harm'


def test_damaged_and_foreign_meta_are_refused(tmp_path):
    for content in (b'', b'garbage', pickle.dumps({'vocab_size': 3})[:-4], pickle.dumps([1, 2])):
        (tmp_path / 'meta.pkl').write_bytes(content)
        with pytest.raises(ValueError, match='meta.pkl'):
            read_meta(tmp_path)
    with pytest.raises(ValueError, match="dtype 'int64'"):
        token_dtype({'dtype': 'int64'})


def test_nanogpt_sets_are_uint16_with_or_without_meta(tmp_path):
    assert read_meta(tmp_path) == {} and token_dtype({}) == np.dtype('<u2')
    theirs = {'vocab_size': 2, 'itos': {0: '\n', 1: 'ä'}, 'stoi': {'\n': 0, 'ä': 1}}
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(theirs))
    assert read_meta(tmp_path) == theirs and token_dtype(theirs) == np.dtype('<u2')
    plain = {'a': {1, 2}, 'b': frozenset([3]), 'c': (None, True, 1.5, 2j, b'x', bytearray(b'y'))}
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(plain))
    assert read_meta(tmp_path) == plain


def test_fingerprint_tells_bytes_order_and_length_apart(tmp_path):
    def of(content):
        (tmp_path / 'x').write_bytes(content)
        return fingerprint(tmp_path / 'x')

    small = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8)
    prints = {of(small.tobytes())}
    for at in range(0, len(small), 4999):
        changed = small.copy()
        changed[at] ^= 1
        prints.add(of(changed.tobytes()))
    assert len(prints) == 1 + len(range(0, len(small), 4999))
    large = np.random.default_rng(1).integers(0, 256, 6_000_000, dtype=np.uint8).tobytes()
    assert of(large) == of(large)
    assert (
        len(
            {
                of(large),
                of(large[3_000_000:] + large[:3_000_000]),
                of(large[:-2]),
                of(large + b'\0\0'),
                of(large[:-1] + b'?'),
            }
        )
        == 5
    )
    assert of(b'') != of(b'\0') and of(bytes(3_000_000)) != of(bytes(3_000_002))
