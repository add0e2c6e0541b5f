"""Proves that preparing data counts what it loses, and stops where that is much: encodings,
characters without an id, padding, overlaps, flipped bytes.
"""

import io
import json
import warnings

import numpy as np
import pytest
from test_pipeline import contents

from data.own_text import prepare as own_text
from onetrain.data.token_file import read_meta
from onetrain.prepare import documents, parts

JAPANESE = ['日本語の文章をここに書きます。', '今日はとても良い天気ですね。', '東京都と大阪府'] * 12


def prepare(output, path, *args, script=own_text):
    script.main(['--input', str(path), '--output', str(output), '--num_proc', '1', *args])


def texts_of(path, field='text'):
    return [
        (row.content, row.problem)
        for unit in documents.units_of(str(path))
        for row in documents.read(unit, field)
    ]


def model_without_bytes(path):
    sentencepiece = pytest.importorskip('sentencepiece')
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(['the quick brown fox jumps over the lazy dog'] * 20),
        model_writer=file,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(file.getvalue())
    return str(path)


def test_text_that_a_tokenizer_cannot_write_stops_the_run(tmp_path, capsys):
    model = model_without_bytes(tmp_path / 'tokenizer.model')
    path = tmp_path / 'a.jsonl'
    path.write_text('\n'.join(json.dumps({'text': text}) for text in JAPANESE))
    with pytest.raises(
        ValueError,
        match=(
            r'characters that were decoded again \(1e\+02 %|characters that were decoded again'
            r' \(\d+ %'
        ),
    ):
        prepare(tmp_path / 'set', path, '--tokenizer', model)
    assert not (tmp_path / 'set' / 'train.bin').exists()
    path.write_text(
        '\n'.join(
            json.dumps({'text': text})
            for text in ['the 日 dog'] + ['the quick brown fox jumps over the lazy dog'] * 99
        )
    )
    prepare(tmp_path / 'set', path, '--tokenizer', model)
    assert "such as '日') are lost: this tokenizer cannot write them" in capsys.readouterr().out
    prepare(tmp_path / 'bytes', path, '--tokenizer', 'bytes')
    assert 'are lost' not in capsys.readouterr().out


@pytest.mark.parametrize('name', ['a.jsonl', 'a.txt'])
@pytest.mark.parametrize('encoding', ['utf-16', 'utf-32'])
def test_other_encodings_are_named_with_the_command(name, encoding, tmp_path):
    (tmp_path / name).write_bytes('{"text": "größer"}\n'.encode(encoding))
    with pytest.raises(
        ValueError,
        match=(
            f'is {encoding.upper()}, as its byte order mark says.*iconv -f {encoding.upper()} -t'
            ' UTF-8'
        ),
    ):
        texts_of(tmp_path / name)


SCRIPTS = {
    'latin': 'a text of some length\n',
    'cyrillic': 'Все счастливые семьи похожи друг на друга, каждая несчастливая.\n',
    'greek': 'Όλες οι ευτυχισμένες οικογένειες μοιάζουν\n',
    'arabic': 'كل العائلات السعيدة تتشابه لكن كل عائلة تعيسة\n',
    'hebrew': 'כל המשפחות המאושרות דומות זו לזו\n',
    'hindi': 'सभी सुखी परिवार एक जैसे होते हैं\n',
}


@pytest.mark.parametrize('encoding', ['utf-16-le', 'utf-16-be'])
@pytest.mark.parametrize('script', SCRIPTS)
def test_utf_16_without_a_mark_is_no_text(tmp_path, script, encoding):
    (tmp_path / 'a.txt').write_bytes((SCRIPTS[script] * 9).encode(encoding))
    with pytest.raises(
        ValueError,
        match=(
            f'as {encoding.upper().replace("-L", "L").replace("-B", "B")} without a byte order'
            ' mark has'
        ),
    ):
        texts_of(tmp_path / 'a.txt')
    (tmp_path / 'b.txt').write_text(SCRIPTS[script] * 9, encoding='utf-8')
    assert texts_of(tmp_path / 'b.txt') == [(SCRIPTS[script] * 9, None)]


def test_what_is_odd_and_text_all_the_same(tmp_path):
    for text in (
        '\n'.join('\t'.join('012'[i % 3] for i in range(50)) for _ in range(30)),
        '\t' * 8 + 'x\n' * 3,
        'N\bNA\bAM\bME\bE\n' * 30,
        'bell\x07 rings',
        'a\x1fb\x1f' * 40,
        ' \f' * 40,
        '1\n2\n3\n' * 50,
        '\x1b[31mred\x1b[0m\n' * 20,
        'a\0b ' * 3 + 'c' * 90,
        '\t' * 9,
        'x' * 40,
        '\r\n' * 30,
    ):
        (tmp_path / 'a.txt').write_bytes(text.encode())
        assert texts_of(tmp_path / 'a.txt') == [(text.replace('\r\n', '\n'), None)]
    (tmp_path / 'a.txt').write_bytes(bytes(range(32)) * 9)
    with pytest.raises(ValueError, match='% control characters, so it is no text'):
        texts_of(tmp_path / 'a.txt')


def test_json_in_utf_16_is_a_problem_of_each_line(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes('{"text": "a"}\n'.encode('utf-16-le') * 20)
    assert all(content is None and problem for content, problem in texts_of(tmp_path / 'a.jsonl'))


def test_lines_are_strict_utf_8(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\n{"text": "caf\xe9"}\n{"text": "\xed\xa0\x80"}\n{"text":'
        b' "\\ud800 half"}\n'
    )
    found = texts_of(tmp_path / 'a.jsonl')
    assert found[0] == ('one', None) and found[3] == ('\N{REPLACEMENT CHARACTER} half', None)
    assert (
        found[1] == (None, 'not UTF-8, byte 0xe9 at 13 of the line') and 'not UTF-8' in found[2][1]
    )
    with pytest.raises(ValueError, match=r'a.jsonl line 2 \(not UTF-8'):
        prepare(tmp_path / 'set', tmp_path / 'a.jsonl', '--tokenizer', 'bytes')


@pytest.mark.parametrize(
    'content, command',
    [
        ('[{"text": "a"}, {"text": "b"}]', 'jq -c ".[]"'),
        ('{\n  "text": "a"\n}\n', 'jq -c .'),
        ('[\n{"text": "a"}\n]', 'jq -c ".[]"'),
    ],
)
def test_json_in_other_forms_is_named_with_the_command(content, command, tmp_path):
    (tmp_path / 'a.json').write_text(content)
    with pytest.raises(ValueError) as error:
        texts_of(tmp_path / 'a.json')
    assert command in str(error.value)


def test_fields_within_fields_and_bytes(tmp_path):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    parquet.write_table(
        pyarrow.table({'meta': [{'text': 'one'}, {'text': 'zwölf'}], 'raw': [b'one', b'\xff']}),
        tmp_path / 'a.parquet',
    )
    assert texts_of(tmp_path / 'a.parquet', 'meta.text') == [('one', None), ('zwölf', None)]
    assert texts_of(tmp_path / 'a.parquet', 'raw') == [
        ('one', None),
        (None, "not UTF-8, byte 0xff at 0 of 'raw'"),
    ]
    with pytest.raises(ValueError, match="has no column 'meta.none'"):
        texts_of(tmp_path / 'a.parquet', 'meta.none')
    (tmp_path / 'a.jsonl').write_text('{"meta": {"text": "one"}}\n{"meta": 5}\n')
    assert texts_of(tmp_path / 'a.jsonl', 'meta.text') == [
        ('one', None),
        (None, "no field 'meta.text', only meta"),
    ]


def test_npz_rows_without_padding_and_without_overlap(tmp_path):
    rows = np.arange(1, 33).reshape(4, 8)
    mask = (np.arange(8) < 5).astype(int) * np.ones((4, 1), int)
    np.savez(tmp_path / 'mask.npz', input_ids=rows, attention_mask=mask)
    assert [row.tolist() for row, _ in texts_of(tmp_path / 'mask.npz')] == rows[:, :5].tolist()
    np.savez(tmp_path / 'lengths.npz', input_ids=rows, sequence_lengths=[8, 1, 0, 3])
    assert [len(row) for row, _ in texts_of(tmp_path / 'lengths.npz')] == [8, 1, 0, 3]
    stream = np.arange(100)
    windows = np.stack([stream[i : i + 20] for i in range(0, 81, 5)])
    for arrays in ({'stride': 5}, {}):
        np.savez(tmp_path / 'windows.npz', input_ids=windows, **arrays)
        assert np.concatenate([row for row, _ in texts_of(tmp_path / 'windows.npz')]).tolist() == (
            stream.tolist() if arrays else windows.flatten().tolist()
        )
    # an overlap that is long enough to be no accident
    wide = np.stack([np.arange(i, i + 40) for i in range(0, 100, 10)])
    np.savez(tmp_path / 'wide.npz', input_ids=wide)
    assert np.concatenate([row for row, _ in texts_of(tmp_path / 'wide.npz')]).tolist() == list(
        range(130)
    )
    for odd in (
        {'attention_mask': mask[:2]},
        {'sequence_lengths': [9, 1, 1, 1]},
        {'sequence_lengths': ['a'] * 4},
    ):
        np.savez(tmp_path / 'odd.npz', input_ids=rows, **odd)
        with pytest.raises(ValueError, match='expected'):
            texts_of(tmp_path / 'odd.npz')


def test_arrays_of_another_shape_or_kind_are_refused(tmp_path):
    rows = np.arange(1, 25).reshape(4, 6)
    np.savez(tmp_path / 'a.npz', input_ids=rows, attention_mask=np.ones((6, 4)))
    with pytest.raises(ValueError, match=r'expected numbers of the shape of input_ids, \(4, 6\)'):
        texts_of(tmp_path / 'a.npz')
    np.savez(tmp_path / 'b.npz', input_ids=rows, stride=np.array(1 + 2j))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert [row.tolist() for row, _ in texts_of(tmp_path / 'b.npz')] == rows.tolist()


def test_columns_of_any_kind_of_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = ['one', 'two', 'one', 'größe']
    for number, column in enumerate(
        (
            pyarrow.array(texts),
            pyarrow.array(texts).dictionary_encode(),
            pyarrow.array(texts, pyarrow.string_view()),
            pyarrow.array(texts, pyarrow.large_string()),
        )
    ):
        pyarrow.parquet.write_table(pyarrow.table({'text': column}), tmp_path / f'{number}.parquet')
        assert texts_of(tmp_path / f'{number}.parquet') == [(text, None) for text in texts]


def test_a_flipped_byte_in_a_part_is_made_again(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text('\n'.join(json.dumps({'text': f'text number {i}'}) for i in range(50)))
    unit = documents.units_of(str(path))
    from onetrain.tokenizers.base import BytesTokenizer

    parts.make_part(str(tmp_path), 0, unit, BytesTokenizer())
    for kind in ('bin', 'docs', 'json'):
        file = tmp_path / f'000000.{kind}'
        good = file.read_bytes()
        assert parts.read_part(str(tmp_path), 0, unit) is not None
        file.write_bytes(good[:20] + bytes([good[20] ^ 1]) + good[21:])
        assert parts.read_part(str(tmp_path), 0, unit) is None, kind
        file.write_bytes(good)


def test_the_result_is_that_of_before(tmp_path):
    """What is counted changes no byte of the data set."""
    (tmp_path / 'a.jsonl').write_text(
        '\n'.join(json.dumps({'text': 'x' * i}) for i in range(1, 60))
    )
    for name in 'ab':
        prepare(tmp_path / name, tmp_path / 'a.jsonl', '--tokenizer', 'bytes')
    assert (
        contents(tmp_path / 'a') == contents(tmp_path / 'b')
        and read_meta(str(tmp_path / 'a'))['tokens']['train'] > 0
    )
