"""Any tokenizer of data/tokenizer.py as the files that transformers reads: tokenizer.json and tokenizer_config.json."""
import json
import os

from data.tokenizer import EOT, BytesTokenizer, CharTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, TiktokenTokenizer


def save_for_transformers(tokenizer, folder):
    """Write `tokenizer` to `folder`, so that transformers.AutoTokenizer gives the same ids. Raises ValueError where a library is missing."""
    os.makedirs(folder, exist_ok=True)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        for name in ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'):
            if name in tokenizer.files:
                with open(os.path.join(folder, name), 'wb') as f:
                    f.write(tokenizer.files[name])
        if 'tokenizer_config.json' not in tokenizer.files:
            eos = None if tokenizer.eot_id is None else tokenizer.tokenizer.id_to_token(tokenizer.eot_id)
            _config(folder, eos)
        return
    from tokenizers import Tokenizer
    if isinstance(tokenizer, SentencePieceTokenizer):
        made, eos = _of_sentencepiece(tokenizer)
        with open(os.path.join(folder, 'tokenizer.model'), 'wb') as f:
            f.write(tokenizer.model)
    elif isinstance(tokenizer, CharTokenizer):
        made, eos = Tokenizer(_characters(tokenizer)), None
        made.pre_tokenizer, made.decoder = _split_each(), _fuse()
    elif isinstance(tokenizer, BytesTokenizer):
        made, eos = _byte_level({bytes([i]): i for i in range(256)}, '', {EOT: tokenizer.eot_id}), EOT
    elif isinstance(tokenizer, TiktokenTokenizer):
        encoding = tokenizer.encoding
        made = _byte_level(encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens)
        eos = EOT if tokenizer.eot_id is not None else None
    made.save(os.path.join(folder, 'tokenizer.json'))
    _config(folder, eos)


def _config(folder, eos):
    with open(os.path.join(folder, 'tokenizer_config.json'), 'w') as f:
        json.dump({'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': eos, 'bos_token': eos, 'clean_up_tokenization_spaces': False, 'model_max_length': 10**30}, f, indent=2)


def _characters(tokenizer):
    from tokenizers import models
    # a character that the data set does not have becomes the first one: the library wants some token there, ours refuses it
    return models.WordLevel({character: i for character, i in tokenizer.stoi.items()}, unk_token=tokenizer.itos[0])


def _split_each():
    from tokenizers import Regex, pre_tokenizers
    return pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')


def _fuse():
    from tokenizers import decoders
    return decoders.Fuse()


def byte_characters():
    """{byte: character} under which byte-level BPE files name the 256 bytes (GPT-2's table): printable ones as themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def _byte_level(ranks, pattern, special):
    """A byte-level BPE from tiktoken's form: ranks {bytes: id}, the regular expression that splits words ('' for none), special tokens {text: id}."""
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
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return made


def _last_merge(token, ranks, rank):
    """The two parts that byte pair encoding joins last on its way to `token`."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        at = min(range(len(parts) - 1), key=lambda i: r if (r := ranks.get(parts[i] + parts[i + 1])) is not None and r < rank else float('inf'))
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _of_sentencepiece(tokenizer):
    """(tokenizers.Tokenizer, its eos piece) of a sentencepiece model, unigram or BPE, with its bytes for what it does not know."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    processor = tokenizer.processor
    pieces = [processor.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    scores = [processor.get_score(i) for i in range(tokenizer.vocab_size)]
    has_bytes = any(processor.is_byte(i) for i in range(tokenizer.vocab_size))
    unknown = processor.unk_id()
    learned = [scores[i] for i in range(tokenizer.vocab_size) if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) or processor.is_unused(i))]
    if any(score != round(score) for score in learned):  # logarithms of probabilities; BPE has minus the number of the merge
        made = Tokenizer(models.Unigram([*zip(pieces, scores)], unk_id=unknown, byte_fallback=has_bytes))
    else:
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        merges = []
        for i, piece in enumerate(pieces):
            if len(piece) > 1 and not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i) or processor.is_unused(i)):
                local = [(piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in vocabulary and piece[at:] in vocabulary]
                merges += [(scores[i], vocabulary[a], vocabulary[b], a, b) for a, b in local]
        merges = [(a, b) for score, _, _, a, b in sorted(merges, key=lambda m: (-m[0], m[1], m[2]))]
        made = Tokenizer(models.BPE(vocabulary, merges, unk_token=pieces[unknown], fuse_unk=True, byte_fallback=has_bytes))
    made.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    made.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    controls = [pieces[i] for i in range(tokenizer.vocab_size) if processor.is_control(i) or processor.is_unknown(i)]
    made.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in controls])
    return made, None if tokenizer.eot_id is None else pieces[tokenizer.eot_id]
