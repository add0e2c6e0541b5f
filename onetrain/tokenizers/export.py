"""Any tokenizer of onetrain/tokenizers/base.py as the files that transformers reads: tokenizer.json
and tokenizer_config.json.
"""

import json
import os
from typing import TYPE_CHECKING

from onetrain.files import parse_json
from onetrain.tokenizers.base import (
    EOT,
    BytesTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    write_files,
)

if TYPE_CHECKING:
    from onetrain.tokenizers.base import Tokenizer


def save_for_transformers(tokenizer: 'Tokenizer', folder: str) -> list[str]:
    """Write `tokenizer` to `folder`, so that transformers.AutoTokenizer gives the same ids. Returns
    phrases for texts in which ids may differ all the same.

    Raises ValueError where a library is missing, and for a sentencepiece model that tokenizer.json
    cannot express.
    """
    notes = []
    os.makedirs(folder, exist_ok=True)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        write_files(_cleaned(tokenizer), folder)
        return []
    from tokenizers import Tokenizer

    if isinstance(tokenizer, SentencePieceTokenizer):
        from onetrain.tokenizers.sentencepiece_json import convert

        made, notes = convert(tokenizer.model)
        eos = tokenizer.eot_token
        with open(os.path.join(folder, 'tokenizer.model'), 'wb') as f:
            f.write(tokenizer.model)
    elif isinstance(tokenizer, CharTokenizer):
        made, eos = Tokenizer(_characters(tokenizer)), None
        made.pre_tokenizer, made.decoder = _split_each(), _fuse()
    elif isinstance(tokenizer, BytesTokenizer):
        made = _byte_level({bytes([i]): i for i in range(256)}, '', {EOT: tokenizer.eot_id})
        eos = EOT
    elif isinstance(tokenizer, TiktokenTokenizer):
        encoding = tokenizer.encoding
        # possessive for the library of tiktoken, for that of tokenizers a repeated group
        made = _byte_level(
            encoding._mergeable_ranks,
            encoding._pat_str.replace('{1,3}+', '{1,3}'),
            encoding._special_tokens,
        )
        eos = EOT if tokenizer.eot_id is not None else None
    made.save(os.path.join(folder, 'tokenizer.json'))
    _config(folder, eos)
    return notes


_NAMED = (
    'bos_token',
    'eos_token',
    'unk_token',
    'sep_token',
    'pad_token',
    'cls_token',
    'mask_token',
)


def _cleaned(tokenizer):
    """Return {name: bytes} of a Hugging Face tokenizer's files such that tokenizer(text) gives the
    ids of encode(text), whichever model they lie beside.

    What the training texts did not have is not added (a BOS), nothing is cut or filled up, no class
    of another project is named, and no token beyond the vocabulary; templates of conversations
    stay.
    """
    from tokenizers import Tokenizer

    described = parse_json(tokenizer.files['tokenizer.json'])
    described['truncation'] = described['padding'] = None
    library = Tokenizer.from_str(json.dumps(described))
    if library.num_special_tokens_to_add(False) or library.num_special_tokens_to_add(True):
        described['post_processor'] = None
    theirs = {
        **tokenizer._settings('tokenizer_config.json'),
        **tokenizer._settings('special_tokens_map.json'),
    }
    known = library.get_vocab(with_added_tokens=True)
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'clean_up_tokenization_spaces': False,
        'model_max_length': 10**30,
    }
    for name in _NAMED:
        token = theirs.get(name)
        token = token.get('content') if isinstance(token, dict) else token
        # another would be added behind the vocabulary of the model
        if isinstance(token, str) and token in known:
            config[name] = token
    config['eos_token'] = config['bos_token'] = tokenizer.eot_token
    config.update(
        {
            key: theirs[key]
            for key in ('chat_template', 'padding_side', 'truncation_side', 'split_special_tokens')
            if key in theirs
        }
    )
    return {
        'tokenizer.json': json.dumps(described, ensure_ascii=False).encode(),
        'tokenizer_config.json': json.dumps(config, indent=2).encode(),
        **{name: tokenizer.files[name] for name in tokenizer.files if name.endswith('.jinja')},
    }


def _config(folder, eos):
    with open(os.path.join(folder, 'tokenizer_config.json'), 'w') as f:
        json.dump(
            {
                'tokenizer_class': 'PreTrainedTokenizerFast',
                'eos_token': eos,
                'bos_token': eos,
                'clean_up_tokenization_spaces': False,
                'model_max_length': 10**30,
            },
            f,
            indent=2,
        )


def _characters(tokenizer):
    from tokenizers import models

    # without a token for unknown characters the library refuses a text that has one, as ours does
    return models.WordLevel({character: i for character, i in tokenizer.stoi.items()}, unk_token='')


def _split_each():
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')


def _fuse():
    from tokenizers import decoders

    return decoders.Fuse()


def byte_characters() -> dict[int, str]:
    """Return {byte: character} under which byte-level BPE files name the 256 bytes (GPT-2's table):
    printable ones as themselves, the others from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{byte: chr(byte) for byte in printable},
        **{byte: chr(256 + i) for i, byte in enumerate(others)},
    }


def _byte_level(ranks, pattern, special):
    """Return a byte-level BPE from tiktoken's form: ranks {bytes: id}, the regular expression that
    splits words ('' for none), special tokens {text: id}.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    names = byte_characters()

    def spell(token):
        return ''.join(names[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _last_merge(token, ranks, rank)
            merges.append((spell(left), spell(right)))
    made = Tokenizer(models.BPE({spell(token): i for token, i in ranks.items()} | special, merges))
    split = [pre_tokenizers.Split(Regex(pattern), 'isolated')] if pattern else []
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return made


def _last_merge(token, ranks, rank):
    """Return the two parts that byte pair encoding joins last on its way to `token`."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        at = min(
            range(len(parts) - 1),
            key=lambda i: (
                r
                if (r := ranks.get(parts[i] + parts[i + 1])) is not None and r < rank
                else float('inf')
            ),
        )
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
