"""Proves that an exported sentencepiece model gives the ids and the text of sentencepiece itself,
for every setting that its trainer has for them.
"""

import io
import itertools

import pytest

from onetrain.tokenizers.base import SentencePieceTokenizer, decode_after
from onetrain.tokenizers.export import save_for_transformers
from onetrain.tokenizers.sentencepiece_json import convert, read_model

sentencepiece = pytest.importorskip('sentencepiece')
pytest.importorskip('tokenizers')
CORPUS = [
    'The quick brown fox jumps over the lazy dog, 3.14 times — and  two spaces.',
    'ROMEO: what light through yonder window breaks?',
    'ﬁne Ünïcode ①②③ ﾊﾝｶｸ',
    'こんにちは 世界',
    'a <sep> b<sep>c',
] * 40
TEXTS = [
    '',
    ' ',
    '  a  b ',
    'The fox',
    'the\tfox\r\nnext\n\nline',
    'ﬁ ① ﾊﾝｶｸ ｶﾞ か\u3099',
    'e\u0301 ①\u0301',
    '▁ a▁b',
    '世界 unknown ☃ 😀',
    'a<sep>b <sep> c',
    '<s> spelled </s> <unk>',
    '\x01\u200b\ufeff',
    '12345',
    'UPPER lower',
    '-' * 9,
]


def trained(model_type, rule, dummy, extra, fallback, symbols):
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=file,
        vocab_size=420 if fallback else 130,
        model_type=model_type,
        normalization_rule_name=rule,
        add_dummy_prefix=dummy,
        remove_extra_whitespaces=extra,
        byte_fallback=fallback,
        user_defined_symbols=['<sep>'] if symbols else [],
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    return file.getvalue()


CASES = [
    case
    for number, case in enumerate(
        itertools.product(
            ('unigram', 'bpe'),
            ('identity', 'nfkc', 'nmt_nfkc'),
            (True, False),
            (True, False),
            (True, False),
            (True, False),
        )
    )
    if number % 7 == 0
]


@pytest.mark.parametrize('case', CASES, ids=str)
def test_ids_and_text_are_those_of_sentencepiece(case):
    model = trained(*case)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    made, _ = convert(model)
    made.encode_special_tokens = True
    for text in TEXTS:
        ids = processor.encode(text)
        assert made.encode(text, add_special_tokens=False).ids == ids, text
        assert made.decode(ids, skip_special_tokens=False) == processor.decode(ids), text


def test_settings_are_read_from_the_file():
    m = read_model(trained('bpe', 'nmt_nfkc', False, True, True, True))
    assert (
        m['model_type'] == 'bpe'
        and m['byte_fallback']
        and not m['add_dummy_prefix']
        and m['remove_extra_whitespaces']
        and m['charsmap']
        and len(m['pieces']) > 300
    )


def test_what_a_user_calls_gives_our_ids(tmp_path):
    transformers = pytest.importorskip('transformers')
    tokenizer = SentencePieceTokenizer(
        trained('unigram', 'nmt_nfkc', True, True, True, True), 'here'
    )
    save_for_transformers(tokenizer, str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        if '<s>' not in text:  # which transformers finds in a text, and we do not
            assert theirs(text)['input_ids'] == tokenizer.encode(text).tolist(), text
    assert len(theirs) == tokenizer.vocab_size


def test_what_new_tokens_add_to_a_prompt():
    """The space before a word is part of its piece, and decode() alone drops it."""
    tokenizer = SentencePieceTokenizer(
        trained('unigram', 'identity', True, False, True, False), 'here'
    )
    ids = tokenizer.encode('The quick brown fox').tolist()
    for cut in range(1, len(ids)):
        before, after = ids[:cut], ids[cut:]
        assert (
            tokenizer.decode(before) + decode_after(tokenizer, before, after)
            == 'The quick brown fox'
        )
    assert any(
        tokenizer.decode(ids[:cut]) + tokenizer.decode(ids[cut:]) != 'The quick brown fox'
        for cut in range(1, len(ids))
    )


def test_a_sample_continues_its_prompt(monkeypatch):
    """sample.py: prompt and continuation are one text, stop strings and streaming included."""
    from onetrain import generation

    tokenizer = SentencePieceTokenizer(
        trained('unigram', 'identity', True, False, True, False), 'here'
    )
    ids = tokenizer.encode('The quick brown fox jumps').tolist()
    monkeypatch.setattr(
        generation,
        'generate',
        lambda model, prompts, n, on_tokens=None, **how: [on_tokens([i], [True]) for i in ids[2:]],
    )
    shown = []
    for stop, expected in (((), 'The quick brown fox jumps'), ((' fox',), 'The quick brown')):
        shown.clear()
        (text,) = generation.continue_texts(
            None, tokenizer, [ids[:2]], 9, stop=stop, show=shown.append
        )
        assert tokenizer.decode(ids[:2]) + text == expected and ''.join(shown) == text
