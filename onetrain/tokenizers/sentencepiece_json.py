"""A sentencepiece model as a tokenizers.Tokenizer that gives the same ids and the same text.

What the `tokenizers` library has for this (Precompiled, Metaspace, added tokens) differs from
sentencepiece in normalization, white space and user-defined symbols. Here the .model file is read
itself (a protobuf message, of which few fields matter), and each rule of its normalizer becomes a
step of its own.

Precompiled looks for the shortest rule within a grapheme, sentencepiece for the longest anywhere.
So marks go between what no rule takes together (APART), and are left out where one does (JOINED),
before it runs.
"""

import re
import struct
from collections import defaultdict

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from onetrain.config import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces


def _fields(data):
    """Yield (number, value) for each field of the message `data`: int for varints, float for fixed
    32 bits, bytes for the others.
    """
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            value = varint()
        elif kind == 1:
            value, at = struct.unpack_from('<d', data, at)[0], at + 8
        elif kind == 5:
            value, at = struct.unpack_from('<f', data, at)[0], at + 4
        elif kind == 2:
            size = varint()
            value, at = data[at : at + size], at + size
        else:
            raise UserError(f'wire type {kind}')
        yield key >> 3, value


def read_model(model: bytes) -> dict:
    """Return a dict of what tokenization depends on in the bytes of a .model file: pieces, [(text,
    score, kind)], and settings.
    """
    pieces, trainer, norm, denorm = [], {}, {}, {}
    for number, value in _fields(model):
        if number == 1:
            f = dict(_fields(value))
            pieces.append((f[1].decode(), f.get(2, 0.0), f.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            norm = dict(_fields(value))
        elif number == 5:
            denorm = dict(_fields(value))

    def text(message, number, default):
        return message[number].decode() if number in message else default

    return dict(
        pieces=pieces,
        model_type={1: 'unigram', 2: 'bpe', 3: 'word', 4: 'char'}[trainer.get(3, 1)],
        byte_fallback=bool(trainer.get(35, 0)),
        suffix=bool(trainer.get(24, 0)),
        unk_surface=text(trainer, 44, ' \u2047 '),
        rule=text(norm, 1, ''),
        charsmap=norm.get(2, b''),
        add_dummy_prefix=bool(norm.get(3, 1)),
        remove_extra_whitespaces=bool(norm.get(4, 1)),
        escape_whitespaces=bool(norm.get(5, 1)),
        denormalizer=denorm.get(2, b''),
    )


def rules_of(blob: bytes) -> dict[str, str]:
    """Return {sequence: replacement} of a precompiled charsmap: a double array (Darts) and the
    replacements.
    """
    if not blob:
        return {}
    size = struct.unpack_from('<I', blob)[0]
    units = struct.unpack_from(f'<{size // 4}I', blob, 4)
    texts = blob[4 + size :]
    children = {}
    for at, unit in enumerate(units):
        if not unit >> 31 and unit & 255:
            children.setdefault(at ^ (unit & 255), []).append(at)

    def offset(unit):
        return unit >> 10 << ((unit & 512) >> 6)

    found, stack = {}, [(offset(units[0]), b'')]
    while stack:
        node, key = stack.pop()
        for at in children.get(node, ()):
            unit = units[at]
            name, below = key + bytes([unit & 255]), at ^ offset(unit)
            if unit >> 8 & 1:
                value = units[below] & (2**31 - 1)
                found[name.decode()] = texts[value : texts.index(0, value)].decode()
            stack.append((below, name))
    return found


JOINED, APART, IOTA = '\ufdd0', '\ufdd1', '\ufdd2'  # noncharacters, which no text has
SAFE = (
    '\\x00-\\x7f\u00a1-\u00a7\u00a9-\u00ac\u00ae\u00b0-\u00b3\u00b5-\u00b7\u00b9-\u02b7'
    '\u0370-\u0379\u037b-\u0383\u0386-\u0482\u048a-\u052f\u2010-\u2027\u3001-\u3029'
    '\u3041-\u3096\u30a1-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff01-\uff9d'
)
# characters that neither begin with a combining one when normalized nor belong to the grapheme
# before them


def _set(characters):
    """Return a regular expression's [...] of `characters`."""
    codes, runs = sorted(map(ord, characters)), []
    for code in codes:
        if runs and code == runs[-1][1] + 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return (
        '[' + ''.join(f'\\x{{{a:x}}}' + (f'-\\x{{{b:x}}}' if b > a else '') for a, b in runs) + ']'
    )


def _joins(rules):
    """Return the regular expression of the places between two characters that a rule takes
    together.
    """
    following = defaultdict(lambda: defaultdict(set))  # {base: {marks so far: next marks}}
    for key in rules:
        if len(key) > 1:
            following[key[0]][key[1:-1]].add(key[-1])
    places = defaultdict(set)  # {(marks so far, next marks): bases}
    for base, by_marks in following.items():
        for marks, after in by_marks.items():
            places[marks, frozenset(after)].add(base)
    merged = defaultdict(lambda: defaultdict(set))  # {(bases, number of marks, next marks): marks}
    for (marks, after), bases in places.items():
        merged[frozenset(bases), after][len(marks)].add(marks)
    parts = []
    for (bases, after), by_number in merged.items():
        for number, marks in by_number.items():
            columns = [_set({m[i] for m in marks}) for i in range(number)]
            product = 1
            for i in range(number):
                product *= len({m[i] for m in marks})
            heads = (
                [''.join(columns)]
                if product == len(marks)
                else [''.join(_set(c) for c in m) for m in marks]
            )
            parts += [f'(?<={_set(bases)}{head})(?={_set(after)})' for head in heads]
    everything = {c for key in rules for c in key[1:]}
    return f'(?={_set(everything)})(?:{"|".join(parts)})'


def _normalizer(m, user_defined, notes):
    steps, rules = [], rules_of(m['charsmap'])
    prefix = m['add_dummy_prefix'] and not m['suffix']
    space = '▁' if m['escape_whitespaces'] else ' '
    early = prefix and not m['remove_extra_whitespaces']
    if early:
        steps.append(normalizers.Prepend(' '))
    elif m['add_dummy_prefix'] and not m['remove_extra_whitespaces']:
        steps.append(normalizers.Replace(Regex(r'(?<=[\s\S])\z'), ' '))
    if rules:
        single = {k: v for k, v in rules.items() if len(k) == 1}
        hidden = []
        for piece in user_defined:  # they are not normalized
            if (
                any(c in single for c in piece)
                or piece[-1] in {k[0] for k in rules if len(k) > 1}
                or '  ' in piece
            ):
                hidden.append((piece, chr(0x100000 + len(hidden))))
        hidden.sort(key=lambda pair: -len(pair[0]))
        steps += [normalizers.Replace(piece, mark) for piece, mark in hidden]
        folds = rules.get('\u0345', '\u0345') != '\u0345'
        steps += [
            normalizers.Replace(Regex(_joins(rules)), JOINED),
            normalizers.Replace(
                Regex(rf'(?<=[\s\S])(?<!{JOINED})(?=[^{SAFE}{JOINED}])|(?<=\r)(?=\n)'), APART
            ),
        ]
        if folds:
            steps.append(normalizers.Replace(JOINED + '\u0345', JOINED + IOTA))
        steps.append(normalizers.Precompiled(m['charsmap']))
        if folds:
            steps.append(normalizers.Replace(IOTA, '\u0345'))
        steps += [
            normalizers.Replace(JOINED, ''),
            normalizers.NFC(),
            normalizers.Replace(APART, ''),
        ]
    else:
        hidden = []
    if m['remove_extra_whitespaces']:
        steps += [normalizers.Replace(Regex(r'\A +'), ''), normalizers.Replace(Regex(' {2,}'), ' ')]
    if m['escape_whitespaces']:
        steps.append(normalizers.Replace(' ', '▁'))
    if m['remove_extra_whitespaces']:
        steps.append(normalizers.Replace(Regex(f'{space}+\\z'), ''))
    steps += [normalizers.Replace(mark, piece) for piece, mark in hidden]
    if prefix and not early:
        steps.append(normalizers.Prepend(space))
    if m['add_dummy_prefix'] and m['suffix'] and m['remove_extra_whitespaces']:
        steps.append(normalizers.Replace(Regex(r'(?<=[\s\S])\z'), space))
    return normalizers.Sequence(steps) if steps else None


def _decoder(m, unknown):
    steps = []
    if m['byte_fallback']:
        steps.append(decoders.ByteFallback())
    steps += [
        decoders.Replace(Regex(rf'\A{re.escape(unknown)}\z'), m['unk_surface']),
        decoders.Fuse(),
    ]
    if m['add_dummy_prefix'] or m['remove_extra_whitespaces']:
        steps.append(decoders.Strip('▁', 2**30 if m['remove_extra_whitespaces'] else 1, 0))
    return decoders.Sequence([*steps, decoders.Replace('▁', ' ')])


def convert(model: bytes) -> tuple:
    """Return (tokenizers.Tokenizer, notes) of the bytes of a .model file; notes: in which texts the
    two may differ, one phrase each.

    Raises UserError for a model that tokenizer.json cannot express.
    """
    m, notes = read_model(model), []
    pieces = m['pieces']
    if m['model_type'] == 'word':
        raise UserError('its type is word, which tokenizer.json cannot express')
    if m['denormalizer']:
        raise UserError('it has rules for decoding, which tokenizer.json cannot express')
    if m['model_type'] != 'unigram' and any(kind == UNUSED for _, _, kind in pieces):
        raise UserError('it has unused pieces, which tokenizer.json cannot express')
    unknown = next(i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN)
    user_defined = [p for p, _, kind in pieces if kind == USER_DEFINED]
    build = _unigram if m['model_type'] == 'unigram' else _bpe
    made, splits = build(m, unknown, user_defined, notes)
    _note_differences(m, user_defined, notes)
    made.normalizer = _normalizer(m, user_defined, notes)
    if splits:
        made.pre_tokenizer = pre_tokenizers.Sequence(splits)
    made.decoder = _decoder(m, pieces[unknown][0])
    made.add_special_tokens(
        [AddedToken(p, special=True, normalized=False) for p, _, kind in pieces if kind == CONTROL]
    )
    return made, notes


def _unigram(m, unknown, user_defined, notes):
    """Return (tokenizers.Tokenizer, pre-tokenizers) of a unigram model. unknown: id of its unknown
    piece.
    """
    pieces, splits = m['pieces'], []
    ours = {p for p, _, kind in pieces if kind in (NORMAL, USER_DEFINED)}
    least = min(score for _, score, kind in pieces if kind == NORMAL)
    hidden = [len(p) for p, _, kind in pieces if kind not in (NORMAL, USER_DEFINED)]
    never = least * (max(hidden) + 1) - 1  # less than any way to spell it
    # as sentencepiece 0.2.3 (0.2.1: -0.1)
    score = {NORMAL: lambda p, s: s, USER_DEFINED: lambda p, s: 0.1 * (len(p.encode()) - 1)}
    made = Tokenizer(
        models.Unigram(
            [(p, score[kind](p, s) if kind in score else never) for p, s, kind in pieces],
            unk_id=unknown,
            byte_fallback=m['byte_fallback'],
        )
    )
    known, cuts = {p for p in ours if len(p) == 1}, []
    # not to be found in a text
    for p in (p for p, _, kind in pieces if kind in (CONTROL, UNKNOWN, BYTE)):
        if any(c not in known for c in p):  # else it costs more than its characters
            at = next((i for i in range(1, len(p)) if (p[i - 1] in known) != (p[i] in known)), None)
            if at is None:
                notes.append(f'the text {p!r}, as all of its characters are unknown')
            else:
                after = f'(?={re.escape(p[at + 1 :])})' if p[at + 1 :] else ''
                cuts.append(f'(?<={re.escape(p[:at])}){re.escape(p[at])}{after}')
    if cuts:
        splits.append(pre_tokenizers.Split(Regex('|'.join(cuts)), 'merged_with_next'))
    if odd := [
        p for p in ours if len(p) > 1 and any(c not in ours for c in p) and p not in user_defined
    ]:
        notes.append(f'texts with {odd[0]!r}, of which a character is no piece')
    return made, splits


def _bpe(m, unknown, user_defined, notes):
    """Return the same of a model of merges, or of characters."""
    pieces, splits = m['pieces'], []
    normal = {p for p, _, kind in pieces if kind == NORMAL}
    arguments = dict(
        vocab={p: i for i, (p, _, _) in enumerate(pieces)},
        merges=_merges(pieces, normal) if m['model_type'] == 'bpe' else [],
        unk_token=pieces[unknown][0],
        fuse_unk=True,
        byte_fallback=m['byte_fallback'],
    )
    made = Tokenizer(models.BPE(**arguments))
    if not user_defined:
        return made, splits
    plain = made.model
    unreachable = [p for p in normal if [t.value for t in plain.tokenize(p)] != [p]]
    if unreachable:
        notes.append(f'a text between two user-defined symbols that is {unreachable[0]!r}')
    made = Tokenizer(models.BPE(**arguments, ignore_merges=True))
    longest_first = sorted(user_defined, key=len, reverse=True)
    splits.append(pre_tokenizers.Split(Regex('|'.join(map(re.escape, longest_first))), 'isolated'))
    # or else a control or byte piece spelled out between two of them would be taken for it
    cuts = []
    for p in (p for p, _, kind in pieces if kind in (CONTROL, UNKNOWN, BYTE)):
        at = plain.tokenize(p)[0].offsets[1]
        if at == len(p):
            notes.append(
                f'the text {p!r} between two user-defined symbols, as all of its characters are'
                ' unknown'
            )
        else:
            cuts.append(f'{re.escape(p[:at])}(?={re.escape(p[at:])}\\z)')
    splits.append(pre_tokenizers.Split(Regex(rf'\A(?:{"|".join(cuts)})'), 'isolated'))
    return made, splits


def _merges(pieces, normal):
    """Return [(left, right)] in the order in which they are made: all ways to make a piece of
    two.
    """
    number = {p: i for i, (p, _, _) in enumerate(pieces)}
    merges = [
        (-s, number[p[:at]], number[p[at:]], p[:at], p[at:])
        for p, s, kind in pieces
        if kind == NORMAL
        for at in range(1, len(p))
        if p[:at] in normal and p[at:] in normal
    ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _note_differences(m, user_defined, notes):
    """Note texts in which the two differ whatever the model is made of."""
    if (m['remove_extra_whitespaces'] or m['charsmap']) and (
        odd := [p for p in user_defined if '▁' in p or any(c.isspace() for c in p)]
    ):
        notes.append(f'white space at the user-defined symbol {odd[0]!r}')
    special = [p for p, _, kind in m['pieces'] if kind in (CONTROL, UNKNOWN, BYTE)]
    if m['model_type'] != 'unigram' and (odd := [p for p in special if len(p) == 1]):
        notes.append(f'the text {odd[0]!r}, a control symbol of one character')
    if m['suffix'] and m['add_dummy_prefix'] and m['remove_extra_whitespaces']:
        notes.append("texts of which normalization leaves nothing, such as '▁' alone")
    if m['charsmap']:
        notes.append(
            'decomposed characters of scripts that Unicode took in after version 12, and'
            ' noncharacters U+FDD0 to U+FDD2'
        )
