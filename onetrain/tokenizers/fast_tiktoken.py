r"""tiktoken's ids, sooner: its time goes into cutting a text by a regular expression, and much of
that into looking around.

Two things are spared. Alternatives that do not look around are grouped, which hands them to a
faster engine. And GPT-2's expression is freed of its only look ahead, \s+(?!\S), which leaves the
last character of white space to the word behind it: where such a run stands before a word, all of
it but its last character is replaced by stand-ins, control characters that the text does not have,
and which merge as what they stand for.
"""

import itertools
import re

import numpy as np

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# tiktoken's own writing of it
_SPELLED = GPT2, r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
_STOOD_IN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\x01-\x06]+|\s+|[\x01-\x06]+"
_SPACE, _STAND_IN = b'\t\n\x0b\x0c\r ', b'\x01\x02\x03\x04\x05\x06'
_TRANSLATION = bytes.maketrans(_SPACE, _STAND_IN)
_OTHER_SPACE = re.compile('[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]')
# of a regular expression: a class or an escaped character
ATOM = re.compile(r'\\[pP]\{\^?\w+\}|\\[^1-9kKbBAzZG]|\[\^?(?:\\.|[^\]\\])+\]')
# what only the slower engine of regular expressions knows, or might not; atoms are an x
HARD = re.compile(r'\(\?[=!<>]|[*+?}]\+|[$^\\]')


class FastTiktoken:
    """The ids that tiktoken gives for the regular expression `pattern` and ranks, {bytes: id}; all
    256 bytes are among these.
    """

    def __init__(self, pattern: str, ranks: dict[bytes, int]):
        self.encoding, self.stood_in = _encoding(group_expression(pattern), ranks), None
        if pattern not in _SPELLED:
            return
        top = max(ranks.values()) + 1
        runs = sorted(
            (rank, token)
            for token, rank in ranks.items()
            if len(token) > 1 and not token.strip(_SPACE)
        )
        self.stood_in = _encoding(
            _STOOD_IN,
            {
                **ranks,
                **{token.translate(_TRANSLATION): top + i for i, (_, token) in enumerate(runs)},
            },
        )
        # from the ids of stand-ins to those of what they stand for
        self.back = np.arange(top + len(runs), dtype=np.uint32)
        self.back[top:] = [rank for rank, _ in runs]
        for space, other in zip(_SPACE, _STAND_IN):
            self.back[ranks[bytes([other])]] = ranks[bytes([space])]

    def encode(self, text: str) -> np.ndarray:
        """Return (n,) uint32 ids; what spells out a special token is ordinary text."""
        if self.stood_in is not None and (replaced := self._replaced(text)) is not None:
            return self.back.take(self.stood_in.encode_to_numpy(replaced, disallowed_special=()))
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def _replaced(self, text):
        """Return `text` with its stand-ins; None where it has such characters itself, or other
        white space than ASCII's.
        """
        if not text.isascii() and _OTHER_SPACE.search(text):
            return None
        content = text.encode()
        raw = np.frombuffer(content, dtype=np.uint8)
        if not len(raw) or raw.min() <= max(_STAND_IN):
            return None
        others = np.frombuffer(content.translate(_TRANSLATION), dtype=np.uint8)
        space = others != raw
        inner = space[:-1] & space[1:]
        if space[-1]:  # the run at the end is one piece
            inner[len(raw) - (len(text) - len(text.rstrip(_SPACE.decode()))) :] = False
        raw = raw.copy()
        np.copyto(raw[:-1], others[:-1], where=inner)
        return str(raw.data, 'utf-8')


def _encoding(pattern, ranks):
    import tiktoken

    # it looks for special tokens first: with none at all it looks at every character
    return tiktoken.Encoding(
        'quick',
        pat_str=pattern,
        mergeable_ranks=ranks,
        special_tokens={'<|none|>': max(ranks.values()) + 1},
    )


def group_expression(pattern: str) -> str:
    """Return the same regular expression with those of its alternatives that need no looking
    around, one after the other, in a group. tiktoken's engine hands a group to a faster one as a
    whole, but not single alternatives beside one that looks around: (a|b)|c finds what a|b|c finds,
    in two thirds of the time.
    """
    alternatives, depth, start, i = [], 0, 0, 0
    while i < len(pattern):
        if pattern[i] == '\\':
            i += 1
        elif pattern[i] == '[':
            i = _class_end(pattern, i)
        elif pattern[i] in '()':
            depth += 1 if pattern[i] == '(' else -1
        elif pattern[i] == '|' and depth == 0:
            alternatives.append(pattern[start:i])
            start = i + 1
        i += 1
    alternatives.append(pattern[start:])
    plain = [ATOM.sub('x', alternative) for alternative in alternatives]
    for i, one in enumerate(plain):
        # at the end of an alternative nothing can ask a quantifier to give back, so a possessive
        # one is an ordinary one; so is that of one character up to the end of the text
        if re.search(r'[*+?}]\+$|^x[*+]\+\$$', one):
            at = -2 if one.endswith('$') else -1
            alternatives[i], plain[i] = (was[:at] + was[at:][1:] for was in (alternatives[i], one))
    hard = [bool(HARD.search(one.removesuffix('$'))) for one in plain]
    groups = [
        (is_hard, [alternative for _, alternative in group])
        for is_hard, group in itertools.groupby(zip(hard, alternatives), key=lambda pair: pair[0])
    ]
    return '|'.join(
        '|'.join(group) if is_hard or len(group) == 1 else f'(?:{"|".join(group)})'
        for is_hard, group in groups
    )


def _class_end(pattern, i):
    """Return the index of the ] that closes the [ at i."""
    i += 2 if pattern.startswith('[^', i) else 1
    while pattern[i] != ']':
        i += 2 if pattern[i] == '\\' else 1
    return i
