r"""The ids of a Hugging Face byte-level BPE (GPT-2's kind: LLaMA-3, Qwen, StarCoder2, ...) from
tiktoken's loop: the same ids, several times as fast. For those that gigatoken (fast_bpe.py) does
not know, and where it is not installed.

Both libraries cut a text with one regular expression and merge bytes within each piece, lowest rank
first. They differ in what may merge: a pair that is listed, or any pair that makes up a token. That
is the same where every token of the vocabulary is what the listed merges make of its own bytes:
merges inside a stretch of text do not depend on what is around it, as long as none crosses its
ends, so whenever a stretch is down to two parts that make up a token, they are the two that the
listed merges leave, and their merge is the next. equivalent_of() checks this token by token, and
asks that parts come before what is made of them. A pattern with ^, $ or \b is left to the library,
where they mean something else. Where the two engines of regular expressions do not agree on a
character's class, which is tried with all of them, and where a text is not in the normal form that
the tokenizer wants, or spells out an added token, TiktokenEquivalent.encode() leaves it to the
library itself.
"""

import json
import re
import unicodedata
from typing import Any

import numpy as np

from onetrain.tokenizers.fast_bpe import KNOWN, NFC, added_words, pattern_of

# of a regular expression: a class or an escaped character
ATOM = re.compile(r'\\[pP]\{\^?\w+\}|\\[^1-9kKbBAzZG]|\[\^?(?:\\.|[^\]\\])+\]')
FOLDED = 'ſK'  # characters that are an s or a k where case does not count


class TiktokenEquivalent:
    """encoding: tiktoken's of merge ranks; ids: (number of ranks,) uint32, the id of each; unsafe:
    (0x110000,) bool, characters that are left to the library; words: added tokens, whose text is
    too; normal: whether a text must be in NFC.
    """

    def __init__(
        self,
        encoding: Any,
        ids: np.ndarray,
        unsafe: np.ndarray,
        words: set[str],
        normal: bool,
    ):
        self.encoding, self.ids, self.unsafe, self.normal = encoding, ids, unsafe, normal
        self.words = re.compile('|'.join(map(re.escape, sorted(words)))) if words else None

    def encode(self, text: str) -> np.ndarray | None:
        """Return (n,) uint32 ids, or None for a text that is left to the library."""
        if self.words and self.words.search(text):
            return None
        if not text.isascii():
            if self.unsafe[
                np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype=np.uint32)
            ].any():
                return None
            if self.normal and not unicodedata.is_normalized('NFC', text):
                return None
        return self.ids[self.encoding.encode_to_numpy(text, disallowed_special=())]


def equivalent_of(content: str) -> 'TiktokenEquivalent | None':
    """Return a TiktokenEquivalent of the tokenizer.json `content` (str), or None where it is none
    of these or tiktoken is not installed.
    """
    try:
        import tiktoken
        import tokenizers
    except ImportError:
        return None
    described = json.loads(content)
    model = described['model']
    pattern = pattern_of(described['pre_tokenizer'])
    words, normalizer = added_words(described), described.get('normalizer')
    if (
        pattern is None
        or re.search(r'[$^\\]', ATOM.sub('x', pattern))
        or model.get('type') != 'BPE'
        or normalizer not in (None, *NFC)
        or words is None
    ):
        return None
    if (
        model.get('dropout')
        or model.get('byte_fallback')
        or model.get('continuing_subword_prefix')
        or model.get('end_of_word_suffix')
    ):
        return None
    ranks = ranks_of(model, tokenizers)
    if ranks is None:
        return None
    encoding = tiktoken.Encoding(
        'equivalent',
        pat_str=pattern,
        mergeable_ranks={token: rank for rank, (token, _) in enumerate(ranks)},
        # it looks for special tokens first: with none at all it looks at every character
        special_tokens={'<|none|>': len(ranks)},
    )
    unsafe = disagreements(pattern, tiktoken, tokenizers)
    # of characters that are younger than Python's tables the normal form is not known
    if normalizer is not None:
        unsafe[:KNOWN] |= np.array([unicodedata.category(chr(i)) == 'Cn' for i in range(KNOWN)])
    return TiktokenEquivalent(
        encoding,
        np.array([i for _, i in ranks], dtype=np.uint32),
        unsafe,
        words,
        normalizer is not None,
    )


def characters() -> dict[str, int]:
    """Return {character: byte} of the alphabet in which GPT-2's vocabulary spells bytes: printable
    ones as they are, the others from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + i): byte for i, byte in enumerate(others)},
    }


def ranks_of(model: dict, tokenizers: Any) -> list[tuple] | None:
    """Return [(bytes, id)] of the tokens that a tokenizer.json's "model" can make, in the order of
    their merges, single bytes first; None where tiktoken would merge otherwise.
    """
    alphabet, vocab = characters(), model['vocab']
    merges = [
        tuple(merge.split(' ')) if isinstance(merge, str) else tuple(merge)
        for merge in model['merges']
    ]
    if not all(character in vocab for character in alphabet):
        return None
    order = {character: -1 for character in alphabet}
    last = None
    for rank, (a, b) in enumerate(merges):
        if a + b in order and a + b != last:  # other merges of it, which other tokens' come before
            return None
        if a not in order or b not in order or a + b not in vocab:
            return None
        order[a + b] = order.get(a + b, rank)
        last = a + b
    tokens = list(order)
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    itself = [
        found.ids == [vocab[token]]
        for token, found in zip(tokens, library.encode_batch_fast(tokens, add_special_tokens=False))
    ]
    stray = [token for token, made in zip(tokens, itself) if not made]
    # made by no merge
    whole = {
        token
        for token in vocab
        if token not in order and all(character in alphabet for character in token)
    } | set(stray)
    if model.get('ignore_merges') and whole:  # a piece that is one of them is taken whole
        if any(_merged(token, order) for token in whole) or any(
            token not in order for token in whole
        ):
            return None
    else:
        tokens = [token for token, made in zip(tokens, itself) if made]
    return [(bytes(alphabet[character] for character in token), vocab[token]) for token in tokens]


def _merged(token, order):
    """Return whether merging any two parts that make up a token, lowest rank first, makes `token`
    of its characters.
    """
    parts = list(token)
    while len(parts) > 1:
        rank, at = min(
            (order.get(parts[i] + parts[i + 1], len(order) * 10), i) for i in range(len(parts) - 1)
        )
        if parts[at] + parts[at + 1] not in order:
            return False
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return True


def disagreements(pattern: str, tiktoken: Any, tokenizers: Any) -> np.ndarray:
    """Return (0x110000,) bool: characters that the two libraries put into different classes of
    those in `pattern`; from KNOWN on, where hardly any is in use, all.
    """
    codes = np.array([i for i in range(KNOWN) if not 0xD800 <= i < 0xE000])
    everything = ''.join(map(chr, codes))
    single = {bytes([byte]): byte for byte in range(256)}
    differ = np.zeros(0x110000, bool)
    differ[0xD800:0xE000] = differ[KNOWN:] = True
    for name in sorted(set(re.findall(r'\\[pP]\{\^?\w+\}|\\[sSdDwW]', pattern))):
        theirs = np.ones(len(codes), bool)
        for _, (start, end) in tokenizers.pre_tokenizers.Split(
            tokenizers.Regex(name), 'removed'
        ).pre_tokenize_str(everything):
            theirs[start:end] = False
        found = tiktoken.Encoding(
            'class', pat_str=name, mergeable_ranks=single, special_tokens={}
        ).encode_to_numpy(everything, disallowed_special=())
        ours = np.isin(
            codes,
            np.frombuffer(
                found.astype(np.uint8).tobytes().decode('utf-8').encode('utf-32-le'),
                dtype=np.uint32,
            ),
        )
        differ[codes[theirs != ours]] = True
    if '(?i' in pattern:
        differ[[ord(character) for character in FOLDED]] = True
    return differ
