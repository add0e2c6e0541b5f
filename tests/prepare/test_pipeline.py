"""Proves that a data set is the same bytes whoever makes it: any number of processes, machines and
interruptions; and what may stop it.
"""

import errno
import gzip
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT
from test_prepare import contents, lines, own_text, prepare, read_ids, read_texts, write_jsonl

from onetrain.data.token_file import TokenFileWriter, fingerprint, fingerprint_of_files, read_meta
from onetrain.prepare import assemble, cli, documents, parts, pipeline
from onetrain.tokenizers.base import load_tokenizer
from onetrain.tokenizers.train import train_bpe

EOT = '<|endoftext|>'


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(pipeline, 'PART_BYTES', (20_000, 20_000))
    monkeypatch.setattr(documents, 'UNIT_BYTES', 10_000)


def texts_of(count, seed=0):
    draw = random.Random(seed)
    return [
        f'{i} ' + ' '.join(f'w{draw.randrange(500)}' for _ in range(draw.randrange(1, 60)))
        for i in range(count)
    ]


def write_zst(path, texts):
    zstandard = pytest.importorskip('zstandard')
    halves = [
        ''.join(json.dumps({'text': text}) + '\n' for text in part).encode()
        for part in (texts[::2], texts[1::2])
    ]
    path.write_bytes(b''.join(map(zstandard.ZstdCompressor().compress, halves)))  # two frames
    return [*texts[::2], *texts[1::2]]


@pytest.fixture
def corpus(tmp_path):
    """A folder with a file of each kind, and its documents in order."""
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    folder = tmp_path / 'corpus'
    folder.mkdir()
    texts = texts_of(2000)
    write_jsonl(folder / 'a.jsonl', texts[:900])
    write_jsonl(folder / 'b.jsonl.gz', texts[900:1100])
    texts[1100:1300] = write_zst(folder / 'c.jsonl.zst', texts[1100:1300])
    parquet.write_table(
        pyarrow.table({'text': texts[1300:1990]}), folder / 'd.parquet', row_group_size=50
    )
    for i in range(1990, 2000):
        (folder / f'e{i}.txt').write_text(texts[i])
    return folder, texts


def test_every_kind_of_file_at_once_by_one_process_and_by_two(corpus, tmp_path):
    folder, texts = corpus
    for processes in (1, 2):
        prepare(
            tmp_path / f'set{processes}',
            folder,
            tokenizer='bytes',
            num_proc=processes,
            script=openwebtext_like,
        )
    assert contents(tmp_path / 'set1') == contents(tmp_path / 'set2')
    assert read_texts(tmp_path / 'set1', 'val') == texts[19::20]
    assert read_texts(tmp_path / 'set1', 'train') == [
        text for i, text in enumerate(texts) if i % 20 != 19
    ]
    meta, ids = read_meta(tmp_path / 'set1'), read_ids(tmp_path / 'set1', 'train')
    assert meta['documents'] == {'train': 1900, 'val': 100} and meta['max_id'] == {
        'train': 256,
        'val': 256,
    }
    assert np.fromfile(tmp_path / 'set1' / 'train.ends', '<u8').tolist() == [
        i + 1 for i, token in enumerate(ids) if token == 256
    ]


class openwebtext_like:
    """A script for which a .txt is one document."""

    @staticmethod
    def main(argv):
        parser = cli.corpus_parser('x', '/nowhere', val_fraction=0.05)
        cli.prepare_corpus(parser.parse_args(argv), '/nowhere')


def test_parts_are_bounded_and_more_than_a_few(corpus):
    files = documents.find_files([str(corpus[0])])
    plan = pipeline.Plan.of_files(files, load_tokenizer('bytes'))
    sizes = [sum(unit.size for unit in part) for part in plan.parts]
    assert len(sizes) > 10 and max(sizes[:-1]) < 40_000
    # row groups are rounded
    assert (
        sum(sizes) == plan.size()
        and 0 <= sum(os.path.getsize(path) for path in files) - plan.size() < 10
    )
    assert (
        pipeline.Plan.of_files(files, load_tokenizer('bytes')).digest
        == plan.digest
        != pipeline.Plan.of_files(files, load_tokenizer('bytes'), limit=5).digest
    )


def test_three_machines_and_a_merge(corpus, tmp_path, capsys, monkeypatch):
    folder, _ = corpus
    prepare(tmp_path / 'whole', folder, tokenizer='bytes')
    for i in (3, 1):
        prepare(tmp_path / f'm{i}', folder, tokenizer='bytes', shard=f'{i}/3')
    said = capsys.readouterr().out
    assert 'share 3/3 is in ' in said and not (tmp_path / 'm1' / 'meta.pkl').exists()

    def merge(*folders, tokenizer='bytes'):
        own_text.main(
            [
                '--output',
                str(tmp_path / 'set'),
                '--tokenizer',
                tokenizer,
                '--input',
                'gone',
                '--merge',
                *map(str, folders),
            ]
        )

    with pytest.raises(
        ValueError,
        match=r'\d+ of \d+ parts are missing or damaged, the first is \d+: run each --shard',
    ):
        merge(tmp_path / 'm1', tmp_path / 'm3')
    # parts of others are not thrown away, however little work they were
    monkeypatch.setattr(pipeline, 'PART_BYTES', (2**30, 2**30))
    with pytest.raises(ValueError, match='parts are missing'):
        own_text.main(
            [
                '--output',
                str(tmp_path / 'm1'),
                '--tokenizer',
                'bytes',
                '--input',
                'gone',
                '--merge',
                str(tmp_path / 'm1'),
                str(tmp_path / 'm3'),
            ]
        )
    monkeypatch.setattr(pipeline, 'PART_BYTES', (20_000, 20_000))
    prepare(tmp_path / 'm2', folder, tokenizer='bytes', shard='2/3')
    with pytest.raises(ValueError, match='was made with another tokenizer'):
        train_bpe(lines(40), 300).describe(str(tmp_path))
        merge(tmp_path / 'm1', tokenizer=str(tmp_path / 'tokenizer'))
    with pytest.raises(ValueError, match='there is no parts-'):
        merge(tmp_path / 'whole')
    merge(tmp_path / 'm1', tmp_path / 'm2', tmp_path / 'm3')
    assert contents(tmp_path / 'set') == contents(tmp_path / 'whole')
    for share in ('0/3', '4/3', '3', 'a/b'):
        with pytest.raises(ValueError, match='is no share: type 1/3, 2/3 or 3/3'):
            prepare(tmp_path / 'x', folder, tokenizer='bytes', shard=share)


KILLED = """
import sys
from onetrain.prepare import assemble, cli, documents, parts, pipeline
from data.own_text import prepare
from onetrain.tokenizers.base import BytesTokenizer
pipeline.PART_BYTES, documents.UNIT_BYTES = (20_000, 20_000), 10_000
make = parts.make_part
import time
def slow(*args, **more):
    time.sleep(0.02)
    return make(*args, **more)
parts.make_part = slow
if __name__ == '__main__':
    cli.run(lambda: prepare.main(sys.argv[1:]))
"""


def test_killed_twenty_times_at_random_and_continued(corpus, tmp_path):
    folder, _ = corpus
    script = tmp_path / 'killed.py'
    script.write_text(KILLED)
    begun = time.monotonic()
    subprocess.run(
        [
            sys.executable,
            str(script),
            '--input',
            str(folder),
            '--tokenizer=bytes',
            f'--output={tmp_path}/whole',
            '--num_proc=2',
        ],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    seconds = time.monotonic() - begun  # as slow as this machine is now
    draw, kills, kept = random.Random(1), 0, 0
    for turn in range(40):
        output = tmp_path / f'set{turn}'
        while True:
            process = subprocess.Popen(
                [
                    sys.executable,
                    str(script),
                    '--input',
                    str(folder),
                    '--tokenizer=bytes',
                    f'--output={output}',
                    f'--num_proc={1 + turn % 2}',
                ],
                env={**os.environ, 'PYTHONPATH': str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            try:
                said = process.communicate(timeout=seconds * draw.uniform(0.3, 1.1))[0]
                assert process.returncode == 0, said
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                kept += len(list(output.glob('parts-*/0*.json'))) > 0
                assert (
                    not (output / 'train.bin').exists()
                    or (output / 'train.bin').read_bytes()
                    == (tmp_path / 'whole' / 'train.bin').read_bytes()
                )
        assert contents(output) == contents(tmp_path / 'whole')
        if kills >= 20:
            break
    assert kills >= 20 and kept >= 5


def test_a_damaged_part_and_a_changed_file_are_made_again(corpus, tmp_path, monkeypatch):
    folder, _ = corpus
    prepare(tmp_path / 'whole', folder, tokenizer='bytes')
    made, make = [], parts.make_part

    def noted(folder, index, *more, **options):
        made.append(index)
        if len(made) == 9:
            raise KeyboardInterrupt
        return make(folder, index, *more, **options)

    monkeypatch.setattr(parts, 'make_part', noted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / 'set', folder, tokenizer='bytes', num_proc=1)
    (folder_of_parts,) = (tmp_path / 'set').glob('parts-*')
    assert (
        made == list(range(9))
        and len(list(folder_of_parts.glob('*.bin'))) == 8
        and not (tmp_path / 'set' / 'train.bin').exists()
    )
    content = bytearray((folder_of_parts / '000002.bin').read_bytes())
    content[100] ^= 1
    (folder_of_parts / '000002.bin').write_bytes(content)
    (folder_of_parts / '000004.docs').write_bytes(
        (folder_of_parts / '000004.docs').read_bytes()[:-1]
    )
    (folder_of_parts / '000005.json').write_text('{')
    made[:] = [None] * 20
    prepare(tmp_path / 'set', folder, tokenizer='bytes', num_proc=1)
    assert made[20:24] == [2, 4, 5, 8] and contents(tmp_path / 'set') == contents(
        tmp_path / 'whole'
    )
    made[:] = []
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / 'again', folder, tokenizer='bytes', num_proc=1)
    os.utime(folder / 'a.jsonl')  # written again, with the same size
    made[:] = [None] * 20
    prepare(tmp_path / 'again', folder, tokenizer='bytes', num_proc=1)
    assert made[20:22] == [0, 1] and contents(tmp_path / 'again') == contents(tmp_path / 'whole')


def test_limit_and_repeated_documents(corpus, tmp_path, capsys):
    folder, texts = corpus
    for processes in (1, 2):
        prepare(
            tmp_path / f'set{processes}', folder, tokenizer='bytes', limit=1203, num_proc=processes
        )
    assert contents(tmp_path / 'set1') == contents(tmp_path / 'set2')
    assert sorted(
        read_texts(tmp_path / 'set1', 'val') + read_texts(tmp_path / 'set1', 'train')
    ) == sorted(texts[:1203])
    write_jsonl(tmp_path / 'a.jsonl', [*texts[:700], *texts[100:500], 'a', 'b', 'a', 'c'])
    capsys.readouterr()
    own_text.main(
        [
            '--dedup',
            '--input',
            str(tmp_path / 'a.jsonl'),
            '--tokenizer=bytes',
            '--val_fraction=0.1',
            f'--output={tmp_path}/once',
        ]
    )
    assert '401 documents came before and were left out' in capsys.readouterr().out
    expected = [*texts[:700], 'a', 'b', 'c']
    assert read_texts(tmp_path / 'once', 'val') == expected[9::10] and read_texts(
        tmp_path / 'once', 'train'
    ) == [text for i, text in enumerate(expected) if i % 10 != 9]


def test_repeated_documents_are_found_in_buckets_too(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    table = np.zeros(3000, parts.DOCUMENT)
    table['hash'] = draw.integers(1, 40, (3000, 2))
    table['hash'][::50] = 0  # not to be compared
    for i, part in enumerate(np.split(table, [700, 700, 1800])):
        part.tofile(tmp_path / f'{i}.docs')
    seen, expected = set(), []
    for key in map(tuple, table['hash'].tolist()):
        expected.append(key in seen)
        seen |= {key} - {(0, 0)}
    for bucket in (10_000, 100):
        monkeypatch.setattr(assemble, 'BUCKET', bucket)
        assert (
            assemble.find_repeated(
                [str(tmp_path / f'{i}.docs') for i in range(4)], str(tmp_path)
            ).tolist()
            == expected
        )
    assert len(list(tmp_path.iterdir())) == 4


def published(tmp_path, name='slimpajama_627b_gpt2'):
    folder = tmp_path / 'SlimPajama'
    texts = {
        split: [f'{split} {text}' for text in texts_of(400, seed)]
        for seed, split in enumerate(('train', 'validation', 'test'))
    }
    for split, rows in texts.items():
        for chunk in (1, 2):
            (folder / split / f'chunk{chunk}').mkdir(parents=True)
            rows[200 * (chunk - 1) : 200 * chunk] = write_zst(
                folder / split / f'chunk{chunk}' / f'example_{chunk}.jsonl.zst',
                rows[200 * (chunk - 1) : 200 * chunk],
            )
    return folder, texts


def test_a_published_split_in_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, 'PART_BYTES', (3000, 3000))
    folder, texts = published(tmp_path)
    script = importlib.import_module('data.slimpajama_627b_gpt2.prepare')
    meta = prepare(tmp_path / 'set', folder, script=script, tokenizer='bytes')
    assert (
        not (tmp_path / 'set' / 'train.bin').exists()
        and not list((tmp_path / 'set').glob('parts-*'))
        and meta['split'] == "the source's own validation split is val"
    )
    names = [name for name, _ in meta['files']['train']]
    assert len(names) == 2 and names[0] == 'train_000000.bin' and len(meta['files']['val']) == 2
    assert (
        meta['fingerprint']['train']
        == fingerprint_of_files([tmp_path / 'set' / name for name in names])
        != fingerprint(tmp_path / 'set' / names[0])
    )
    one = prepare(
        tmp_path / 'one',
        folder,
        script=importlib.import_module('data.slimpajama_6b_gpt2.prepare'),
        tokenizer='bytes',
    )
    assert (
        read_texts(tmp_path / 'one', 'train') == texts['train']
        and read_texts(tmp_path / 'one', 'val') == texts['validation']
    )
    for split in ('train', 'val'):
        assert (
            b''.join((tmp_path / 'set' / name).read_bytes() for name, _ in meta['files'][split])
            == (tmp_path / 'one' / f'{split}.bin').read_bytes()
        )
        assert one['tokens'][split] == sum(tokens for _, tokens in meta['files'][split])
    shutil.rmtree(folder / 'validation')
    with pytest.raises(
        ValueError, match='no file is named as the validation split.*--val_fraction 0.0005'
    ):
        prepare(tmp_path / 'x', folder, script=script, tokenizer='bytes')
    assert prepare(tmp_path / 'x', folder, script=script, tokenizer='bytes', val_fraction=0.01)[
        'documents'
    ] == {'train': 396, 'val': 4}


def test_a_set_in_files_and_one_in_one_file_replace_each_other(tmp_path):
    folder, _ = published(tmp_path)
    sharded, plain = (
        importlib.import_module(f'data.slimpajama_{size}_gpt2.prepare') for size in ('627b', '6b')
    )
    for script, expected in ((plain, False), (sharded, True), (plain, False), (sharded, True)):
        prepare(tmp_path / 'set', folder, script=script, tokenizer='bytes')
        names = {path.name for path in (tmp_path / 'set').iterdir()}
        assert ('train.bin' in names, 'train_000000.bin' in names) == (not expected, expected) and {
            'meta.pkl',
            'train.ends',
            'val.ends',
        } < names


def test_ids_are_taken_as_they_are(tmp_path):
    rows = np.random.default_rng(0).integers(0, 250, (30, 40), dtype=np.int32)
    (tmp_path / 'npz').mkdir()
    np.savez_compressed(tmp_path / 'npz' / 'tokenized_cleaned_0.npz', input_ids=rows[:10])
    np.savez(tmp_path / 'npz' / 'tokenized_cleaned_1.npz', input_ids=rows[10:])
    script = importlib.import_module('data.refocused_npz.prepare')
    meta = prepare(
        tmp_path / 'set', tmp_path / 'npz', script=script, tokenizer='bytes', val_fraction=0.1
    )
    assert (
        read_ids(tmp_path / 'set', 'val') == rows[9::10].ravel().tolist()
        and meta['documents'] == {'train': 27, 'val': 3}
        and meta['tokens']['train'] == 27 * 40
    )
    np.savez(tmp_path / 'npz' / 'tokenized_cleaned_2.npz', input_ids=rows + 100)
    with pytest.raises(
        ValueError, match='tokenized_cleaned_2.npz: token id 3.. is outside the vocabulary of 257'
    ):
        prepare(
            tmp_path / 'set', tmp_path / 'npz', script=script, tokenizer='bytes', val_fraction=0.1
        )
    for arrays, message in (
        (dict(ids=rows), "has no array 'input_ids', only ids"),
        (dict(input_ids=rows / 2), 'expected one or two dimensions of integers'),
    ):
        np.savez(tmp_path / 'npz' / 'tokenized_cleaned_2.npz', **arrays)
        with pytest.raises(ValueError, match=message):
            prepare(
                tmp_path / 'set',
                tmp_path / 'npz',
                script=script,
                tokenizer='bytes',
                val_fraction=0.1,
            )


def test_a_full_disk_leaves_what_is_finished_and_nothing_that_looks_so(
    corpus, tmp_path, monkeypatch, capsys
):
    folder, _ = corpus
    prepare(tmp_path / 'whole', folder, tokenizer='bytes')
    real, opened_ = open, []

    def full(path, mode='r', *more, **options):
        if 'w' in mode and '.bin' in str(path):
            opened_.append(path)
            if len(opened_) == 4:
                return real('/dev/full', mode, *more, **options)
        return real(path, mode, *more, **options)

    monkeypatch.setattr('builtins.open', full)
    monkeypatch.setattr(
        os, 'remove', lambda path, remove=os.remove: path == '/dev/full' or remove(path)
    )
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: prepare(tmp_path / 'set', folder, tokenizer='bytes', num_proc=1))
    assert ended.value.code == 2 and 'error: the disk is full' in capsys.readouterr().err
    (left,) = (tmp_path / 'set').iterdir()
    # three parts and the plan
    assert len(list(left.glob('*.json'))) == 4 and not list(left.glob('*.tmp'))
    prepare(tmp_path / 'set', folder, tokenizer='bytes', num_proc=1)
    assert contents(tmp_path / 'set') == contents(tmp_path / 'whole')
    del opened_[:]

    def full_at_the_end(path, mode='r', *more, **options):
        return real(
            '/dev/full' if 'w' in mode and str(path).endswith('train.bin.tmp') else path,
            mode,
            *more,
            **options,
        )

    monkeypatch.setattr('builtins.open', full_at_the_end)
    with pytest.raises(OSError) as caught:
        prepare(tmp_path / 'set', folder, tokenizer='bytes', num_proc=1, val_fraction=0.1)
    assert (
        caught.value.errno == errno.ENOSPC
        and len(list((tmp_path / 'set').glob('parts-*/0*.json'))) > 10
    )
    assert {
        name: content
        for name, content in contents(tmp_path / 'set').items()
        if not name.startswith('parts-')
    } == contents(tmp_path / 'whole')
    monkeypatch.undo()


def test_there_must_be_room_before_it_is_written(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: type('Usage', (), {'free': 1000}))
    with pytest.raises(ValueError, match=r'needs 0.0 GB more and has 0.0 GB: make room'):
        prepare(tmp_path / 'set', corpus[0], tokenizer='bytes')


def test_broken_rows_in_a_later_part_have_their_line(tmp_path, capsys):
    path = write_jsonl(tmp_path / 'a.jsonl', texts_of(1000))
    with path.open('a') as f:
        f.write('nothing\n' * 9)
    prepare(tmp_path / 'set', path, tokenizer='bytes')
    assert (
        f'9 of 1,009 rows have no text and were left out, the first is {path} line 1,001'
        in capsys.readouterr().out
    )
    with path.open('a') as f:
        f.write('nothing\n' * 9)
    with pytest.raises(ValueError, match=r'18 of 1,018 rows.*line 1,001.*--max_broken 0.02'):
        prepare(tmp_path / 'set', path, tokenizer='bytes')
    prepare(tmp_path / 'set', path, tokenizer='bytes', max_broken=0.02)
    assert sum(read_meta(tmp_path / 'set')['documents'].values()) == 1000


def test_binary_garbage_and_cut_archives(tmp_path):
    garbage = np.random.default_rng(0).bytes(30_000)
    for name, message in (
        ('a.txt', 'is not UTF-8'),
        ('a.jsonl', 'have no text'),
        ('a.jsonl.gz', 'is damaged after line 0'),
        ('a.jsonl.zst', 'is damaged after line 0'),
        ('a.parquet', 'cannot be read as parquet'),
        ('a.npz', 'cannot be read as .npz'),
    ):
        (tmp_path / name).write_bytes(garbage)
        with pytest.raises(ValueError, match=message):
            prepare(tmp_path / 'set', tmp_path / name, tokenizer='bytes')
        assert not (tmp_path / 'set' / 'meta.pkl').exists()
    write_zst(tmp_path / 'cut.jsonl.zst', texts_of(3000))
    (tmp_path / 'cut.jsonl.zst').write_bytes((tmp_path / 'cut.jsonl.zst').read_bytes()[:-200])
    with pytest.raises(
        ValueError, match=r'cut.jsonl.zst is damaged after line [\d,]+ \(it ends in the middle\)'
    ):
        prepare(tmp_path / 'set', tmp_path / 'cut.jsonl.zst', tokenizer='bytes')
    with gzip.open(tmp_path / 'none.jsonl.gz', 'w'):
        pass
    with pytest.raises(ValueError, match='there is no text'):
        prepare(tmp_path / 'set', tmp_path / 'none.jsonl.gz', tokenizer='bytes')


def test_tokenizers_that_are_missing_or_of_another_family(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / 'train.jsonl', texts_of(50))
    write_jsonl(tmp_path / 'validation.jsonl', texts_of(9, 1))
    for name, hub, needed in (
        ('slimpajama_6b_llama', 'meta-llama/Llama-2-7b-hf', '</s>'),
        ('slimpajama_627b_llama3', 'meta-llama/Llama-3.1-8B', '<|end_of_text|>'),
        ('slimpajama_6b_qwen3', 'Qwen/Qwen3-1.7B-Base', None),
        ('codeparrot_starcoder2', 'bigcode/starcoder2-3b', EOT),
    ):
        script = importlib.import_module(f'data.{name}.prepare')
        with pytest.raises(
            ValueError,
            match=(
                f'there is no tokenizer .*_tokenizer: type `hf download {hub} --include'
                ' "tokenizer\\*" --local-dir'
            ),
        ):
            script.main(['--input', str(tmp_path), '--output', str(tmp_path / 'set')])
        train_bpe(lines(40), 300).describe(str(tmp_path))
        arguments = [
            '--input',
            str(tmp_path),
            '--output',
            str(tmp_path / 'set'),
            '--tokenizer',
            'tokenizer',
            '--text_field',
            'text',
            '--val_fraction',
            '0.1',
        ]
        if needed not in (None, EOT):
            with pytest.raises(
                ValueError,
                match=(
                    f'ends texts with .{EOT}., these models with .{needed}.: take the tokenizer of'
                    ' the base model'.replace('|', '\\|')
                ),
            ):
                script.main(arguments)
        else:
            script.main(arguments)
            # with its own validation split left out
            assert sum(read_meta(tmp_path / 'set')['documents'].values()) == (
                50 if 'slimpajama' in name else 59
            )


def test_two_runs_of_one_command_do_not_meet(corpus, tmp_path, monkeypatch):
    make = parts.make_part

    def meets(*args, **options):
        with pytest.raises(ValueError, match='is held by another process'):
            prepare(tmp_path / 'set', corpus[0], tokenizer='bytes', num_proc=1)
        monkeypatch.setattr(parts, 'make_part', make)
        return make(*args, **options)

    monkeypatch.setattr(parts, 'make_part', meets)
    prepare(tmp_path / 'set', corpus[0], tokenizer='bytes', num_proc=1)


def test_a_killed_worker_is_told(corpus, tmp_path):
    script = tmp_path / 'dies.py'
    script.write_text(
        KILLED.replace(
            'time.sleep(0.02)', 'os.kill(os.getpid(), 9) if args[1] == 7 else None'
        ).replace('import sys', 'import os, sys', 1)
    )
    done = subprocess.run(
        [
            sys.executable,
            str(script),
            '--input',
            str(corpus[0]),
            '--tokenizer=bytes',
            f'--output={tmp_path}/set',
            '--num_proc=2',
        ],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (
        done.returncode == 2
        and 'a process that tokenizes was killed' in done.stderr
        and 'Traceback' not in done.stderr
    )
    assert list((tmp_path / 'set').glob('parts-*/0*.json'))


def test_orphans_end(corpus, tmp_path):
    script = tmp_path / 'slow.py'
    script.write_text(KILLED.replace('0.02', '1'))
    process = subprocess.Popen(
        [
            sys.executable,
            str(script),
            '--input',
            str(corpus[0]),
            '--tokenizer=bytes',
            f'--output={tmp_path}/set',
            '--num_proc=2',
        ],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 20
    children = []
    while len(children) < 3 and time.monotonic() < deadline:  # two, and multiprocessing's own
        time.sleep(0.1)
        with open(f'/proc/{process.pid}/task/{process.pid}/children') as f:
            children = f.read().split()
    time.sleep(1.5)
    process.kill()
    process.wait()
    while (
        any(os.path.exists(f'/proc/{child}') for child in children) and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert len(children) >= 3 and not any(os.path.exists(f'/proc/{child}') for child in children)


def test_large_data_sets_stay_in_many_files(corpus, tmp_path, monkeypatch):
    """By themselves above SHARDED_FROM bytes of ids, and any data set where it is asked for: the
    same tokens.
    """
    from onetrain.data.dataset import open_dataset

    folder, _ = corpus
    prepare(tmp_path / 'one', folder, tokenizer='bytes')
    monkeypatch.setattr(pipeline, 'PART_BYTES', (20_000, 20_000))
    own_text.main(
        [
            '--output',
            str(tmp_path / 'asked'),
            '--input',
            str(folder),
            '--tokenizer',
            'bytes',
            '--sharded',
        ]
    )
    monkeypatch.setattr(cli, 'SHARDED_FROM', 1000)
    prepare(tmp_path / 'large', folder, tokenizer='bytes')
    own_text.main(
        [
            '--output',
            str(tmp_path / 'refused'),
            '--input',
            str(folder),
            '--tokenizer',
            'bytes',
            '--no-sharded',
        ]
    )
    found = {
        name: open_dataset(str(tmp_path / name), '/')[0]
        for name in ('one', 'asked', 'large', 'refused')
    }
    assert [len(file.pieces) > 3 for file in found.values()] == [False, True, True, False]
    assert len({file.slice(0, len(file)).tobytes() for file in found.values()}) == 1


def test_files_elsewhere_are_asked_together(monkeypatch):
    """In their order all the same; those on this machine one after the other."""
    lock, asking, most = threading.Lock(), [0], [0]

    def units_of(path, split, fraction):
        with lock:
            asking[0] += 1
            most[0] = max(most[0], asking[0])
        time.sleep(0.02)
        with lock:
            asking[0] -= 1
        return [documents.Unit(path, 0, 0, 1, split)]

    monkeypatch.setattr(documents, 'units_of', units_of)
    for where, expected in (('s3://bucket/', range(4, 17)), ('/here/', [1])):
        most[0], paths = 0, [f'{where}{i}.jsonl' for i in range(40)]
        found = list(documents.units_of_files(paths, {paths[3]: 'val'}))
        assert (
            [unit.path for unit in found] == paths
            and [unit.split for unit in found].count('val') == 1
            and most[0] in expected
        )


def test_many_files_are_written_at_once(corpus, tmp_path, monkeypatch):
    """Those of a data set in many files; of one file the parts are read ahead, and its bytes are
    the same.
    """
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(4))
    real, lock, writing, most = assemble._write, threading.Lock(), [0], {}

    def write(writer, *more):
        with lock:
            writing[0] += 1
            most[writer.sharded] = max(most.get(writer.sharded, 0), writing[0])
        time.sleep(0.02)
        work = real(writer, *more)
        assert bool(work) != writer.sharded
        with lock:
            writing[0] -= 1
        return work

    monkeypatch.setattr(assemble, '_write', write)
    for sharded in (True, False):
        own_text.main(
            [
                '--output',
                str(tmp_path / f'{sharded}'),
                '--input',
                str(corpus[0]),
                '--tokenizer',
                'bytes',
                '--val_fraction',
                '0.1',
                '--num_proc',
                '1',
                *['--sharded'] * sharded,
            ]
        )
    assert min(most.values()) >= 3
    for split in ('train', 'val'):
        parts = [path.read_bytes() for path in sorted((tmp_path / 'True').glob(f'{split}_*.bin'))]
        assert (
            b''.join(parts) == (tmp_path / 'False' / f'{split}.bin').read_bytes() and len(parts) > 3
        )
    metas = [read_meta(str(tmp_path / f'{sharded}')) for sharded in (True, False)]
    assert all(metas[0][key] == metas[1][key] for key in ('tokens', 'documents', 'max_id'))


def test_what_a_killed_run_left_is_not_written_through(tmp_path, monkeypatch):
    """Its *.tmp may be second names of finished parts, which another option then cuts anew."""
    monkeypatch.setattr(pipeline, 'PART_BYTES', (1, 1))  # a part for each file
    monkeypatch.setattr(documents, 'UNIT_BYTES', 10**6)
    folder, texts = tmp_path / 'files', texts_of(40)
    folder.mkdir()
    for name, mine in (
        ('a', texts[:10]),
        ('b', texts[:10]),
        ('c', texts[10:20]),
        ('d', [*texts[:5], *texts[20:30]]),
        ('e', texts[30:]),
    ):
        write_jsonl(folder / f'{name}.jsonl', mine)
    words = [
        '--input',
        str(folder),
        '--tokenizer',
        'bytes',
        '--val_fraction',
        '0.025',
        '--num_proc',
        '1',
        '--sharded',
    ]
    own_text.main(['--output', str(tmp_path / 'fresh'), *words, '--dedup'])

    class Killed(BaseException):
        pass

    def publish(writer):
        for name in (*writer.written, *(() if writer.sharded else ('meta.pkl',))):
            if os.path.exists(writer._tmp(name)):
                # what stays of it when nothing is tidied up
                os.link(writer._tmp(name), tmp_path / name)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr('onetrain.data.token_file.TokenFileWriter._publish', publish)
        with pytest.raises(Killed):
            own_text.main(['--output', str(tmp_path / 'set'), *words])
    for name in os.listdir(tmp_path):
        if name.endswith('.bin'):
            os.rename(tmp_path / name, tmp_path / 'set' / f'{name}.tmp')
    own_text.main(['--output', str(tmp_path / 'set'), *words, '--dedup'])
    assert contents(tmp_path / 'set') == contents(tmp_path / 'fresh')


def test_a_part_is_copied_where_it_cannot_be_linked_and_fsync_fails_aloud(tmp_path, monkeypatch):
    part = tmp_path / 'part.bin'
    part.write_bytes(np.arange(10, dtype='<u2').tobytes())

    def written(folder):
        with TokenFileWriter(
            str(folder),
            vocab_size=20,
            eot_id=None,
            tokenizer={'kind': 'none'},
            split='all',
            sharded=True,
        ) as writer:
            writer.link_file(writer.place('train', 10, [10]), str(part), 9)
            assert writer.place('train', 0, [0, 0]) is None  # documents without ids
            writer.append('val', np.arange(3, dtype=writer.dtype), [3])
        return (folder / 'train_000000.bin').read_bytes(), read_meta(str(folder))

    whole, meta = written(tmp_path / 'linked')
    assert (
        whole == part.read_bytes()
        and meta['documents'] == {'train': 3, 'val': 1}
        and meta['tokens'] == {'train': 10, 'val': 3}
        and meta['max_id'] == {'train': 9, 'val': 2}
    )
    with monkeypatch.context() as patched:
        patched.setattr(
            os, 'link', lambda *names: (_ for _ in ()).throw(OSError(errno.EPERM, 'no links'))
        )
        assert written(tmp_path / 'copied') == (whole, meta)
    fsync = os.fsync

    def fails(descriptor):
        if os.readlink(f'/proc/self/fd/{descriptor}').endswith('part.bin'):
            raise OSError(errno.EIO, 'the disk')
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', fails)
    with pytest.raises(OSError, match='the disk'):
        written(tmp_path / 'failed')
    assert part.stat().st_size == 20 and not list((tmp_path / 'failed').iterdir())
