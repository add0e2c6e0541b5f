"""Proves that tiktoken's loop gives the ids of Hugging Face's byte-level tokenizers, or leaves a
text to them.
"""

import json
import random
import sys

import numpy as np
import pytest
import tiktoken
import tokenizers
from small_tokenizers import BY_REGEX, BYTES, EOT, KINDS, LLAMA3, hard_texts, source, trained
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    pre_tokenizers,
)

from onetrain.tokenizers import base as tokenizer_module
from onetrain.tokenizers.base import load_tokenizer
from onetrain.tokenizers.byte_level import GPT2_DIGITS, KNOWN, equivalent_of, ranks_of
from onetrain.tokenizers.fast_tiktoken import _SPELLED, GPT2, FastTiktoken, group_expression


@pytest.mark.parametrize('kind', KINDS)
def test_ids_are_the_librarys(kind):
    tokenizer = trained(kind)
    twin = equivalent_of(tokenizer.to_str())
    left = 0
    for text in [
        *source(),
        *hard_texts(600, 1),
        *" \n'é5",
        '',
        'aaaaaaa' * 99,
        ' ' * 999,
        'a\n' * 500,
        "it's IT'S it'ſ",
        '5' * 99,
    ]:
        ids = twin.encode(text)
        left += ids is None
        assert (
            ids is None
            or ids.dtype == np.uint32
            and ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
        ), repr(text)
    assert left < (600 if kind == 'qwen3' else 100)  # of hard_texts most are not in NFC


@pytest.mark.parametrize('kind', ['gpt2', 'qwen3'])
def test_what_the_library_must_see(kind):
    tokenizer = trained(kind)
    tokenizer.add_tokens(['<tool>'])
    twin = equivalent_of(tokenizer.to_str())
    # which is ordinary text
    assert twin.encode('a <tool> b') is None and twin.encode(f'a {EOT} b') is not None
    assert twin.encode(f'a{chr(KNOWN)}') is None
    assert (twin.encode('e\u0301') is None) == (kind == 'qwen3') and twin.encode('é') is not None
    # not assigned: its normal form may change
    assert (twin.encode('\u0378') is None) == (kind == 'qwen3')
    assert (
        trained('llama3').pre_tokenizer is not None
        and equivalent_of(trained('llama3').to_str()).encode("it'ſ") is None
    )


def test_tokenizers_that_have_no_twin():
    def changed(change):
        described = json.loads(trained('gpt2', 400).to_str())
        change(described)
        return json.dumps(described)

    def set_(path, value):
        def change(described):
            for key in path[:-1]:
                described = described[key]
            described[path[-1]] = value

        return change

    assert equivalent_of(changed(lambda described: None)) is not None
    for path, value in (
        (['pre_tokenizer', 'add_prefix_space'], True),
        (['pre_tokenizer'], {'type': 'Whitespace'}),
        (['pre_tokenizer'], None),
        (['normalizer'], {'type': 'Lowercase'}),
        (['model', 'dropout'], 0.1),
        (['model', 'end_of_word_suffix'], '</w>'),
        (['model', 'byte_fallback'], True),
    ):
        assert equivalent_of(changed(set_(path, value))) is None, path
    # where a line, a text and a word end differs
    for pattern, expected in (
        (LLAMA3, True),
        (LLAMA3 + '|^x', False),
        (r'\s+$|' + LLAMA3, False),
        (r'\bx|' + LLAMA3, False),
    ):
        steps = {
            'type': 'Sequence',
            'pretokenizers': [
                json.loads(pre_tokenizers.Split(Regex(pattern), 'isolated').__getstate__()),
                json.loads(BYTES.__getstate__()),
            ],
        }
        assert (equivalent_of(changed(set_(['pre_tokenizer'], steps))) is not None) == expected, (
            pattern
        )
    # the byte 0
    assert equivalent_of(changed(lambda described: described['model']['vocab'].pop('Ā'))) is None
    assert (
        equivalent_of(
            changed(
                lambda described: described['model']['merges'].append(
                    described['model']['merges'][0]
                )
            )
        )
        is None
    )
    assert equivalent_of(changed(lambda described: described['model']['merges'].reverse())) is None


def test_tokens_that_merges_do_not_make():
    letters = {
        character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }

    def model(words, merges, **more):
        return {
            'vocab': {**letters, **{word: 256 + i for i, word in enumerate(words)}},
            'merges': merges,
            **more,
        }

    # abc can only be made of a and bc, but ab is made before
    hidden = model(['ab', 'bc', 'abc'], [['a', 'b'], ['b', 'c'], ['a', 'bc']])
    assert [token for token, _ in ranks_of(hidden, tokenizers)[256:]] == [b'ab', b'bc']
    library = Tokenizer(models.BPE(hidden['vocab'], [tuple(merge) for merge in hidden['merges']]))
    library.pre_tokenizer = BY_REGEX
    twin = equivalent_of(library.to_str())
    for text in ('abc', 'abcabc', 'bc abc', 'xabcx'):
        assert twin.encode(text).tolist() == library.encode(text).ids
    # two ways to one token, as in LLaMA-3's list
    both = model(['ab', 'bc', 'abc'], [['b', 'c'], ['a', 'b'], ['a', 'bc'], ['ab', 'c']])
    assert [token for token, _ in ranks_of(both, tokenizers)[256:]] == [b'bc', b'ab', b'abc']
    # with ignore_merges a piece that is a token is taken whole: fine where any merge makes it, or
    # none does
    assert (
        ranks_of({**both, 'ignore_merges': True}, tokenizers)
        and ranks_of({**hidden, 'ignore_merges': True}, tokenizers) is None
    )
    assert ranks_of(model(['xyz'], [], ignore_merges=True), tokenizers) is None


def test_a_corpus_goes_through_the_twin_and_a_few_lines_do_not(tmp_path, monkeypatch):
    tokenizer = trained('gpt2')
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': EOT}))
    monkeypatch.setattr(tokenizer_module, 'TRIAL', 1000)
    own = load_tokenizer(str(tmp_path))
    own.encode('x' * 900)
    assert own.twin is None
    texts = source() + hard_texts(20, 2)
    for text in texts:
        assert own.encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert own.twin is not None
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    without = load_tokenizer(str(tmp_path))
    assert [without.encode(text).tolist() for text in texts[:3]] == [
        own.encode(text).tolist() for text in texts[:3]
    ] and without.twin is None


def test_alternatives_in_a_group_find_the_same():
    import tiktoken
    from tiktoken_ext import openai_public

    letters = {bytes([byte]): byte for byte in range(256)}
    for pattern, expected in (
        (GPT2, r"(?:'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+"),
        (GPT2_DIGITS, None),
        (LLAMA3, None),
        (openai_public.r50k_pat_str, None),
        (r'a|[|(\]]|(b|c)+|\||x++y|d++|e', r'(?:a|[|(\]]|(b|c)+|\|)|x++y|(?:d+|e)'),
        (r'a|\p{L}{1,2}+|\bx|y', r'(?:a|\p{L}{1,2})|\bx|y'),
        (r'a', 'a'),
        (r'\++|b', r'(?:\++|b)'),
        (r'\s++$|a', r'(?:\s+$|a)'),
        (r'(\sa)++$|a', r'(\sa)++$|a'),
        (r'a$b|\s+$|b', r'a$b|(?:\s+$|b)'),
    ):
        assert group_expression(pattern) == (expected or group_expression(pattern)) and (
            group_expression(pattern) != pattern or pattern in ('a', r'(\sa)++$|a')
        )
        old, new = (
            tiktoken.Encoding(
                'x',
                pat_str=way,
                mergeable_ranks={
                    **letters,
                    **{
                        bytes([a, b]): 256 + i
                        for i, (a, b) in enumerate(
                            (a, b) for a in range(97, 123) for b in b' aeiou\n'
                        )
                    },
                },
                special_tokens={},
            )
            for way in (pattern, group_expression(pattern))
        )
        for text in [*source(), *hard_texts(100, 3)]:
            assert old.encode_ordinary(text) == new.encode_ordinary(text)
    assert group_expression(openai_public.r50k_pat_str).startswith(
        "(?:'(?:[sdmt]|ll|ve|re)| ?\\p{L}+|"
    )


def white_space_texts(count):
    """Texts of hardly anything but white space of all kinds, control characters, and words to hold
    on to.
    """
    draw = random.Random(2)
    kinds = [' ', '\n', '\t', '\r', '\x0b', '\x0c', ' ', '\n', 'a', 'b ', "'s", '7', '!', 'é', '漢']
    rare = [
        '\x01',
        '\x06',
        '\x00',
        '\x07',
        '\x1c',
        '\x1f',
        '\x85',
        '\xa0',
        '\u2028',
        '\u3000',
        '\u200b',
        '\U0001f600',
    ]
    return [
        ''.join(
            draw.choice(kinds if draw.random() < 0.98 else rare) * draw.choice((1, 1, 2, 5))
            for _ in range(draw.randrange(1, 60))
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize('pattern', _SPELLED)
def test_white_space_that_stands_in(pattern):
    """The ids of GPT-2's expression with nothing replaced in it, for whatever surrounds a run of
    white space.
    """
    ranks = {
        token: rank
        for rank, (token, _) in enumerate(
            ranks_of(json.loads(trained('gpt2', 1000).to_str())['model'], tokenizers)
        )
    }
    assert b'\n    ' in ranks or b'\n   ' in ranks  # runs merge
    plain = tiktoken.Encoding('plain', pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    quick = FastTiktoken(pattern, ranks)
    texts = [
        *white_space_texts(20_000),
        *source(),
        *hard_texts(300, 3),
        '',
        ' ',
        '\n\n',
        ' a',
        'a ',
        '  a',
        'a  ',
        '\x01',
        ' \x01 ',
    ]
    taken = 0
    for text in texts:
        taken += quick._replaced(text) is not None
        assert quick.encode(text).tolist() == plain.encode_ordinary(text), repr(text)
    assert len(texts) // 3 < taken < len(texts)


def test_characters_that_are_white_space():
    """Those that stand-ins know of are all that tiktoken's expressions know."""
    codes = [i for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    found = tiktoken.Encoding(
        'space',
        pat_str=r'\s',
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={},
    ).encode_ordinary(''.join(map(chr, codes)))
    quick = FastTiktoken(GPT2, {bytes([byte]): byte for byte in range(256)})
    spaces = bytes(found).decode()
    assert len(spaces) > 20 and all(
        space in ' \t\n\x0b\x0c\r' or quick._replaced(f'a{space}') is None for space in spaces
    )
    assert (
        quick._replaced('a \n b') == 'a\x06\x02 b'
        and quick._replaced('a \n ') == 'a \n '
        and quick._replaced('é\t\tb\r\n') == 'é\x01\tb\r\n'
    )
