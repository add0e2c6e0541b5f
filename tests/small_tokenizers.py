"""Tokenizers of the kinds that models have, trained on the spot, and texts hard for them."""

import os
import random

from conftest import ROOT
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

EOT = '<|endoftext|>'
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BY_REGEX = pre_tokenizers.ByteLevel(add_prefix_space=False)
KINDS = {
    'gpt2': (None, BY_REGEX),
    'starcoder2': (
        None,
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BY_REGEX]),
    ),
    'llama3': (
        None,
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), 'isolated'), BYTES]),
    ),
    'qwen3': (
        normalizers.NFC(),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3.replace('{1,3}', '')), 'isolated'), BYTES]
        ),
    ),
}


def hard_texts(count, seed=0):
    """Texts of everything that tokenizers stumble over: runs of white space, digits, marks,
    scripts, emoji, controls, unassigned characters.
    """
    draw = random.Random(seed)
    kinds = [
        lambda: draw.choice(" \n\r\t\u3000\x85\xa0'"),
        lambda: chr(draw.randrange(32, 127)),
        lambda: draw.choice('0123456789²½٣'),
        lambda: chr(draw.randrange(0x80, 0x600)),
        lambda: chr(draw.randrange(0x4E00, 0x9FFF)),
        lambda: chr(draw.randrange(0x1F300, 0x1F700)),
        lambda: chr(draw.randrange(0x300, 0x370)),
        lambda: chr(draw.randrange(0xD800)),
        lambda: draw.choice(["'s", "'LL", '  ', 'the', ' the', '\r\n', EOT]),
    ]
    return [
        ''.join(kind() * draw.choice((1, 1, 2, 5)) for kind in draw.choices(kinds, k=120))
        for _ in range(count)
    ]


def source():
    return [
        open(os.path.join(ROOT, name), encoding='utf-8').read()
        for name in ('train.py', 'model.py', 'TRAINING_GUIDE.md', 'README.md')
    ]


def trained(kind, vocab_size=2000, **settings):
    tokenizer = Tokenizer(models.BPE(**settings))
    normalizer, tokenizer.pre_tokenizer = KINDS[kind]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        source() + hard_texts(50),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.encode_special_tokens = True
    return tokenizer
