"""The ids of a BPE from gigatoken, several times as fast as tiktoken and some eighty times as fast
as `tokenizers`.

gigatoken is young and by one author, so nothing rests on it: it is optional (the extra `data`), and
taken for a tokenizer only after it gave that one's own ids for some 5,000 texts, in which every
character that is in use stands beside letters, digits and white space (is_same()). Texts that hold
an added token, or are not in the normal form that the tokenizer wants, are left to its library.
"""

import importlib.metadata
import json
import os
import random
import re
import tempfile
import unicodedata
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from onetrain.config import UserError

# a tokenizer's library: from texts to their ids
Reference = Callable[[list[str]], list[list[int]]]

# of tiktoken's encodings: gigatoken's name of the expression that cuts a text
_SCHEMES = {'cl100k_base': 'gpt4', 'o200k_base': 'o200k'}
# beyond it hardly any character is in use
KNOWN = 0x32000
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# each digit for itself, and what is before it
GPT2_DIGITS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
)
NFC = {'type': 'NFC'}, {'type': 'Sequence', 'normalizers': [{'type': 'NFC'}]}


class FastBPE:
    """encoder: a gigatoken.Tokenizer; words: added tokens; normal: whether a text must be in NFC,
    and none of its characters younger than Python's tables.
    """

    def __init__(self, encoder: Any, words: Iterable[str] = (), normal: bool = False):
        self.encoder = encoder
        self.words = re.compile('|'.join(map(re.escape, sorted(words)))) if words else None
        self.unknown = _unassigned() if normal else None

    def encode(self, text: str) -> np.ndarray | None:
        """Return (n,) uint32 ids, or None for a text that is left to the tokenizer's library."""
        if self.words and self.words.search(text):
            return None
        if self.unknown is not None and not text.isascii():
            if self.unknown.search(text) or not unicodedata.is_normalized('NFC', text):
                return None
        try:
            return self.encoder.encode(text)
        except BaseException as error:  # such as half a surrogate pair, which has no bytes
            if _is_interrupt(error):
                raise
            return None

    def normalized(self, text: str) -> str:
        """Return what of `text` encode() does not leave to the library, in the normal form."""
        if self.unknown is None:
            return text
        return unicodedata.normalize('NFC', self.unknown.sub('', text))


def fast_bpe_of_json(content: str, reference: Reference | None) -> FastBPE | None:
    """Return the FastBPE of the tokenizer.json `content`, or None where gigatoken is not installed
    or does not give the ids of `reference`, its library, to which special tokens are ordinary text;
    reference None: not compared again, in another process of the same work.
    """
    described = json.loads(content)
    words, normalizer = added_words(described), described.get('normalizer')
    if words is None or normalizer not in (None, *NFC):
        return None
    if pattern_of(described.get('pre_tokenizer')) is None:  # of others it may overlook a step
        return None
    for key in ('added_tokens', 'normalizer', 'truncation', 'padding', 'post_processor'):
        described[key] = [] if key == 'added_tokens' else None
    return _made(
        lambda library: FastBPE(
            library.Tokenizer.from_json(json.dumps(described)), words, normalizer is not None
        ),
        reference,
    )


def pattern_of(pre_tokenizer: dict | None) -> str | None:
    """Return the regular expression that cuts a text as this description in a tokenizer.json does,
    or None.
    """
    steps = (
        pre_tokenizer['pretokenizers']
        if pre_tokenizer and pre_tokenizer['type'] == 'Sequence'
        else [pre_tokenizer]
    )
    if not steps[-1] or steps[-1]['type'] != 'ByteLevel' or steps[-1]['add_prefix_space']:
        return None
    by_regex = steps[-1].get('use_regex', True)
    if len(steps) == 1 and by_regex:
        return GPT2
    if len(steps) == 2 and steps[0] == {'type': 'Digits', 'individual_digits': True} and by_regex:
        return GPT2_DIGITS
    if (
        len(steps) == 2
        and steps[0]['type'] == 'Split'
        and steps[0]['behavior'] == 'Isolated'
        and not steps[0]['invert']
        and not by_regex
    ):
        return steps[0]['pattern'].get('Regex')
    return None


def added_words(described: dict) -> set[str] | None:
    """Return the added tokens of a tokenizer.json that are found in a text: those that are not
    special; None where the text that one is found by is not the one that it is written with.
    """
    added = described.get('added_tokens') or []
    words = {token['content'] for token in added if not token.get('special')}
    as_written = described.get('normalizer') is None or all(
        unicodedata.is_normalized('NFC', word) for word in words
    )
    return words if as_written else None


def fast_bpe_of_tiktoken(encoding: Any, reference: Reference | None) -> FastBPE | None:
    """Return the same for a tiktoken.Encoding."""
    from tiktoken_ext.openai_public import r50k_pat_str

    scheme = 'gpt2' if encoding._pat_str == r50k_pat_str else _SCHEMES.get(encoding.name)
    if scheme is None:
        return None

    def load(library):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'ranks.tiktoken')
            with open(path, 'wb') as f:
                f.writelines(
                    b64encode(token) + b' %d\n' % i
                    for token, i in encoding._mergeable_ranks.items()
                )
            return FastBPE(library.Tokenizer.from_tiktoken(path, scheme, {}))

    return _made(load, reference)


def _made(load, reference):
    try:
        import gigatoken
    except ImportError:
        return None
    try:
        fast = load(gigatoken)
    except BaseException as error:  # what it does not know, it says in many ways
        if _is_interrupt(error):
            raise
        return None
    return fast if reference is None or is_same(fast, reference) else None


def _is_interrupt(error):
    """Return whether an error is none of the library, whose panics are no Exception."""
    return not isinstance(error, Exception) and type(error).__name__ != 'PanicException'


def version() -> str | None:
    """Return the name of the library with its version, as meta.pkl records it; None where it is
    not installed.
    """
    try:
        return f'gigatoken {importlib.metadata.version("gigatoken")}'
    except importlib.metadata.PackageNotFoundError:
        return None


def is_same(fast: FastBPE, reference: Reference) -> bool:
    """Return whether fast.encode(text) is what reference() gives for all probes(), in their normal
    form.
    """
    texts = [fast.normalized(text) for text in probes()]
    if fast.words:
        texts = [text for text in texts if not fast.words.search(text)]
    try:
        expected = reference(texts)
    except UserError:  # of a text that the library cannot encode
        return False
    found = map(fast.encode, texts)
    return all(ids is not None and ids.tolist() == wanted for ids, wanted in zip(found, expected))


def probes() -> Iterator[str]:
    """Yield texts that tokenizers read differently: each character in use, beside others, and 2,000
    mixtures of white space, controls, digits, combining marks, emoji, scripts and contractions.
    """
    codes = [*range(0xD800), *range(0xE000, KNOWN), *range(0xE0000, 0xE0200)]
    codes += range(KNOWN, 0x110000, 997)
    for first in range(0, len(codes), 64):
        yield ''.join(f'a{chr(c)}1 ' for c in codes[first : first + 64])
    yield from ('a' * 5000, ' ' * 5000, '\n' * 5000, '漢' * 5000, '7' * 5000, 'ab ' * 3000)
    draw = random.Random(0)
    kinds = [
        lambda: draw.choice(' \n\r\t\x0b\x0c\x1c\x85\xa0\u2028\u3000\u200b'),
        lambda: chr(draw.randrange(0x20)),
        lambda: chr(draw.randrange(0x20, 0x7F)),
        lambda: draw.choice('0123456789²½٣'),
        lambda: chr(draw.randrange(0x80, 0x600)),
        lambda: chr(draw.randrange(0x300, 0x370)),
        lambda: chr(draw.randrange(0x4E00, 0x9FFF)),
        lambda: chr(draw.randrange(0x1F300, 0x1F700)),
        lambda: chr(draw.randrange(0xD800)),
        lambda: draw.choice(["'s", "'LL", "'ſ", '  ', '\r\n', 'the', ' The', '<|endoftext|>']),
    ]
    for _ in range(2000):
        chosen = draw.choices(kinds, k=draw.randrange(1, 120))
        yield ''.join(kind() * draw.choice((1, 1, 2, 5)) for kind in chosen)


def _unassigned():
    """Return an expression for characters whose normal form Python's tables do not know."""
    spans, codes = [], [c for c in range(KNOWN) if unicodedata.category(chr(c)) == 'Cn']
    for code in codes:
        if spans and code == spans[-1][1] + 1:
            spans[-1][1] = code
        else:
            spans.append([code, code])
    inside = ''.join(f'{re.escape(chr(a))}-{re.escape(chr(b))}' for a, b in spans)
    return re.compile(f'[{inside}{chr(KNOWN)}-{chr(0x10FFFF)}]')
