"""Proves every corpus's prepare.py on small files of its publisher's format, with a real tokenizer
of the kind it takes: the ids are the library's own, documents end and split as stated, by one
process and by two, from this machine and from a bucket.
"""

import gzip
import importlib
import json
import os
import random

import numpy as np
import pytest
from conftest import ROOT
from small_tokenizers import trained
from test_prepare import contents, prepare, read_ids, tiny_encoding, write_jsonl  # noqa: F401

from onetrain.data.token_file import read_meta, token_dtype
from onetrain.prepare import cli, documents, pipeline


def texts_of(count, seed=0):
    draw = random.Random(seed)
    words = [
        'the',
        'The',
        'straße',
        '日本',
        '12345',
        "it's",
        '\n\n',
        '\t',
        '  ',
        '<|endoftext|>',
        '</s>',
        '\N{GRINNING FACE}',
        'brown',
        'fox',
        'e\u0301',
    ]
    return [
        ' '.join(draw.choice(words) for _ in range(draw.randrange(1, 90))) + f' {i}'
        for i in range(count)
    ]


def hugging_face(folder, kind, eos):
    tokenizer = trained(kind, 500)
    tokenizer.add_special_tokens([eos])  # behind the vocabulary, as LLaMA-3's and Qwen's
    folder.mkdir()
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': eos}))
    return (
        str(folder),
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        tokenizer.token_to_id(eos),
        tokenizer.get_vocab_size(),
    )


def sentence_piece(folder):
    import sentencepiece

    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            line for text in texts_of(300, 9) for line in text.split('\n') if line.strip()
        ),
        model_prefix=str(folder / 'tokenizer'),
        model_type='bpe',
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))
    return (
        str(folder / 'tokenizer.model'),
        lambda text: processor.encode(text),
        processor.eos_id(),
        processor.get_piece_size(),
    )


def tiny_tiktoken(monkeypatch, environment):
    import tiktoken
    import tiktoken_ext

    monkeypatch.setenv('PYTHONPATH', environment['PYTHONPATH'])
    monkeypatch.setattr(
        tiktoken_ext,
        '__path__',
        [
            *tiktoken_ext.__path__,
            os.path.join(environment['PYTHONPATH'].split(':')[1], 'tiktoken_ext'),
        ],
    )
    monkeypatch.setattr(tiktoken.registry, 'ENCODING_CONSTRUCTORS', None)
    monkeypatch.setattr(
        tiktoken.registry,
        '_available_plugin_modules',
        tiktoken.registry._available_plugin_modules.__wrapped__,
    )
    encoding = tiktoken.get_encoding('tiny')
    return (
        'tiny',
        lambda text: encoding.encode(text, disallowed_special=()),
        encoding.eot_token,
        encoding.n_vocab,
    )


def parquet(path, texts):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({'text': texts, 'meta': ['{}'] * len(texts)}), path, row_group_size=20
    )


def zst(path, texts, field='text'):
    import zstandard

    path.write_bytes(
        zstandard.ZstdCompressor().compress(
            ''.join(json.dumps({field: text, 'meta': {}}) + '\n' for text in texts).encode()
        )
    )


def packed(path, texts, field):
    with gzip.open(path, 'wt', encoding='utf-8') as f:
        f.writelines(json.dumps({'license': 'mit', field: text}) + '\n' for text in texts)


def slimpajama_6b(folder):
    train, val = texts_of(200), texts_of(30, 1)
    (folder / 'data').mkdir(parents=True)
    for i in (0, 1):
        parquet(folder / 'data' / f'train-0000{i}-of-00002.parquet', train[100 * i : 100 * i + 100])
    parquet(folder / 'data' / 'validation-00000-of-00001.parquet', val)
    parquet(folder / 'data' / 'test-00000-of-00001.parquet', ['not this'])
    return train, val


def slimpajama_627b(folder):
    train, val = texts_of(200), texts_of(30, 1)
    for split, texts in (('train', train), ('validation', val), ('test', ['not this'] * 4)):
        for chunk in (1, 2):
            (folder / split / f'chunk{chunk}').mkdir(parents=True)
            half = len(texts) // 2
            zst(
                folder
                / split
                / f'chunk{chunk}'
                / f'example_{"holdout" if split != "train" else split}_0.jsonl.zst',
                texts[half * (chunk - 1) : half * chunk],
            )
    return train, val


def codeparrot(folder):
    texts = texts_of(4100)
    folder.mkdir()
    for i in range(2):
        packed(
            folder / f'file-00000000000{i}.json.gz', texts[2050 * i : 2050 * i + 2050], 'content'
        )
    return [text for i, text in enumerate(texts) if i % 2000 != 1999], texts[1999::2000]


def c4(folder):
    train, val = texts_of(200), texts_of(30, 1)
    (folder / 'en').mkdir(parents=True)
    packed(folder / 'en' / 'c4-train.00000-of-01024.json.gz', train[:100], 'text')
    packed(folder / 'en' / 'c4-train.00001-of-01024.json.gz', train[100:], 'text')
    packed(folder / 'en' / 'c4-validation.00000-of-00008.json.gz', val, 'text')
    return train, val


def openwebtext(folder):
    texts = texts_of(4100)
    folder.mkdir()
    parquet(folder / '0000.parquet', texts[:3000])
    write_jsonl(folder / '0001.jsonl', texts[3000:])
    return [text for i, text in enumerate(texts) if i % 2000 != 1999], texts[1999::2000]


SOURCES = {
    **{
        f'slimpajama_{size}_{family}': (source, kind)
        for size, source in (('6b', slimpajama_6b), ('627b', slimpajama_627b))
        for family, kind in (
            ('gpt2', 'tiktoken'),
            ('llama', 'sentencepiece'),
            ('llama3', 'llama3'),
            ('qwen3', 'qwen3'),
        )
    },
    'codeparrot_starcoder2': (codeparrot, 'starcoder2'),
    'c4_starcoder2': (c4, 'starcoder2'),
    'openwebtext': (openwebtext, 'tiktoken'),
}
EOS = {'llama3': '<|end_of_text|>', 'qwen3': '<|endoftext|>', 'starcoder2': '<|endoftext|>'}


def ids_of(folder, split):
    meta = read_meta(folder)
    names = [name for name, _ in meta.get('files', {}).get(split, [(f'{split}.bin', 0)])]
    return np.concatenate(
        [np.fromfile(folder / name, token_dtype(meta)) for name in names]
    ).tolist()


def test_every_corpus_is_tried():
    # tests of their own
    others = {'own_text', 'pystdlib', 'shakespeare', 'shakespeare_char', 'refocused_npz'}
    assert {
        name
        for name in os.listdir(os.path.join(ROOT, 'data'))
        if os.path.isfile(os.path.join(ROOT, 'data', name, 'prepare.py'))
    } == {*SOURCES, *others}


@pytest.mark.parametrize('name', SOURCES)
def test_a_corpus_with_its_tokenizer(name, tmp_path, monkeypatch, tiny_encoding):  # noqa: F811
    make, kind = SOURCES[name]
    monkeypatch.setattr(pipeline, 'PART_BYTES', (4000, 4000))
    tokenizer, encode, eot, size = (
        tiny_tiktoken(monkeypatch, tiny_encoding)
        if kind == 'tiktoken'
        else (
            sentence_piece(tmp_path / 'tokenizer')
            if kind == 'sentencepiece'
            else hugging_face(tmp_path / 'tokenizer', kind, EOS[kind])
        )
    )
    splits = dict(zip(('train', 'val'), make(tmp_path / 'source')))
    script = importlib.import_module(f'data.{name}.prepare')
    # starting processes takes a second
    two = len(splits['train']) < 1000 and name.endswith(('llama', 'llama3'))
    for processes in (1, 2) if two else (1,):
        meta = prepare(
            tmp_path / f'set{processes}',
            tmp_path / 'source',
            script=script,
            tokenizer=tokenizer,
            num_proc=processes,
        )
    assert not two or contents(tmp_path / 'set1') == contents(tmp_path / 'set2')
    for split, texts in splits.items():
        expected = [i for text in texts for i in (*encode(text), eot)]
        assert (
            ids_of(tmp_path / 'set1', split) == expected
            and meta['tokens'][split] == len(expected)
            and meta['documents'][split] == len(texts)
        )
        assert meta['max_id'][split] == max(expected)
    assert (meta['vocab_size'], meta['eot_id'], meta['dtype']) == (size, eot, 'uint16') and (
        'files' in meta
    ) == ('627b' in name)
    assert meta['split'] == (
        "the source's own validation split is val"
        if make in (slimpajama_6b, slimpajama_627b, c4)
        else 'every 2000th document is val'
    )


def test_a_bucket_gives_the_same_as_this_machine(s3, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setattr(pipeline, 'PART_BYTES', (4000, 4000))
    monkeypatch.setattr(documents, 'UNIT_BYTES', 3000)
    script = importlib.import_module('data.slimpajama_6b_gpt2.prepare')
    slimpajama_6b(tmp_path / 'source')
    write_jsonl(tmp_path / 'source' / 'data' / 'train-more.jsonl', texts_of(100, 3))
    (tmp_path / 'source' / 'data' / 'train-text.txt').write_text('\n'.join(texts_of(50, 4)))
    fs = fsspec.filesystem('s3', endpoint_url=s3.environment['AWS_ENDPOINT_URL'])
    fs.put(str(tmp_path / 'source'), f's3://bucket/{tmp_path.name}', recursive=True)
    prepare(tmp_path / 'near', tmp_path / 'source', script=script, tokenizer='bytes')
    for processes in (1, 2):
        prepare(
            tmp_path / f'far{processes}',
            f's3://bucket/{tmp_path.name}',
            script=script,
            tokenizer='bytes',
            num_proc=processes,
        )
        assert contents(tmp_path / f'far{processes}') == contents(tmp_path / 'near')
    prepare(
        tmp_path / 'some',
        f's3://bucket/{tmp_path.name}/data/*.jsonl',
        f's3://bucket/{tmp_path.name}/data/train-text.txt',
        script=script,
        tokenizer='bytes',
        val_fraction=0.1,
    )
    assert sum(read_meta(tmp_path / 'some')['documents'].values()) == 101
    with pytest.raises(ValueError, match='this folder holds no .txt'):
        prepare(
            tmp_path / 'x', f's3://bucket/{tmp_path.name}/nothing', script=script, tokenizer='bytes'
        )


def test_the_hub_says_what_is_missing(tmp_path, monkeypatch):
    class GatedRepoError(Exception):
        pass

    class Hub:
        def __init__(self, error):
            self.error = error

        def find(self, path):
            raise self.error

    script = importlib.import_module('data.slimpajama_6b_gpt2.prepare')
    for error, message in (
        (
            GatedRepoError('403 Client Error'),
            (
                r'no access \(GatedRepoError\): accept its terms at'
                r' https://huggingface.co/datasets/DKYoon/SlimPajama-6B, then type `hf auth login`'
            ),
        ),
        (
            ConnectionError('Name or service not known\nx'),
            (
                r'hf://datasets/DKYoon/SlimPajama-6B cannot be reached \(ConnectionError: Name or'
                r' service not known x\): connect this machine, or'
            ),
        ),
    ):
        monkeypatch.setattr(documents, 'filesystem', lambda path: (Hub(error), path))
        with pytest.raises(ValueError, match=message) as caught:
            script.main(['--tokenizer', 'bytes', '--output', str(tmp_path)])
        assert '\n' not in str(caught.value)
    monkeypatch.undo()
    with pytest.raises(
        ValueError,
        match=(
            'for the data set of that name on the Hugging Face hub type'
            ' hf://datasets/DKYoon/SlimPajama-6B'
        ),
    ):
        prepare(tmp_path / 'x', 'DKYoon/SlimPajama-6B', script=script, tokenizer='bytes')
    with pytest.raises(ValueError, match='nonsense://x cannot be opened'):
        prepare(tmp_path / 'x', 'nonsense://x', script=script, tokenizer='bytes')


def test_offline_for_real(tmp_path, capsys):
    """This needs no network: whatever stands between here and the hub is told in one sentence."""
    script = importlib.import_module('data.c4_starcoder2.prepare')
    with pytest.raises(SystemExit) as ended:
        os.environ['HF_HUB_OFFLINE'] = '1'
        try:
            cli.run(lambda: script.main(['--tokenizer', 'bytes', '--output', str(tmp_path)]))
        finally:
            os.environ.pop('HF_HUB_OFFLINE')
    assert ended.value.code == 2


def test_ids_of_documents_that_spell_the_end_of_text(tmp_path):
    tokenizer, encode, eot, _ = hugging_face(tmp_path / 'tokenizer', 'gpt2', '<|endoftext|>')
    texts = ['a <|endoftext|> b'] * 30
    prepare(tmp_path / 'set', write_jsonl(tmp_path / 'a.jsonl', texts), tokenizer=tokenizer)
    ids = read_ids(tmp_path / 'set', 'train')
    assert ids.count(eot) == 29 and ids == [*encode(texts[0]), eot] * 29
