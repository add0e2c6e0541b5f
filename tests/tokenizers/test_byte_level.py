"""Proves that tiktoken's loop gives the ids of Hugging Face's byte-level tokenizers, or leaves a
text to them.
"""

import json

import numpy as np
import pytest
import tokenizers
from small_tokenizers import BY_REGEX, BYTES, EOT, KINDS, LLAMA3, hard_texts, source, trained
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    pre_tokenizers,
)

from onetrain.tokenizers.byte_level import KNOWN, equivalent_of, ranks_of


@pytest.mark.parametrize('kind', KINDS)
def test_ids_are_the_librarys(kind):
    tokenizer = trained(kind)
    equivalent = equivalent_of(tokenizer.to_str())
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
        ids = equivalent.encode(text)
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
    equivalent = equivalent_of(tokenizer.to_str())
    # which is ordinary text
    assert equivalent.encode('a <tool> b') is None and equivalent.encode(f'a {EOT} b') is not None
    assert equivalent.encode(f'a{chr(KNOWN)}') is None
    assert (equivalent.encode('e\u0301') is None) == (kind == 'qwen3') and equivalent.encode(
        'é'
    ) is not None
    # not assigned: its normal form may change
    assert (equivalent.encode('\u0378') is None) == (kind == 'qwen3')
    assert (
        trained('llama3').pre_tokenizer is not None
        and equivalent_of(trained('llama3').to_str()).encode("it'ſ") is None
    )


def test_tokenizers_that_have_no_equivalent():
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
    equivalent = equivalent_of(library.to_str())
    for text in ('abc', 'abcabc', 'bc abc', 'xabcx'):
        assert equivalent.encode(text).tolist() == library.encode(text).ids
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
