"""Train a tokenizer on texts: byte-level BPE, or a model of sentencepiece."""

import errno
import json
import os
import sys
from collections.abc import Iterable

from onetrain.config import UserError
from onetrain.tokenizers.base import EOT, HuggingFaceTokenizer

GPT2, LLAMA3 = 'gpt2', 'llama3'
PATTERNS = {
    GPT2: None,
    LLAMA3: (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
    ),
}


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str = GPT2) -> HuggingFaceTokenizer:
    """Return a HuggingFaceTokenizer: byte-level BPE of `texts` with `vocab_size` ids, of which 0
    ends a text. Raises UserError for a size below 257.
    """
    if vocab_size < 257:
        raise UserError(
            f'--vocab_size {vocab_size} is too small for 256 bytes and the end of text: type 257 or'
            ' more'
        )
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError(
            'byte-level BPE is trained with the library tokenizers, which is not installed: type'
            ' `pip install tokenizers`'
        ) from None
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if PATTERNS[pattern]:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERNS[pattern]), 'isolated'),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=sys.stderr.isatty(),
        ),
    )
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'eos_token': EOT,
        'clean_up_tokenization_spaces': False,
    }
    return HuggingFaceTokenizer(
        {
            'tokenizer.json': tokenizer.to_str(pretty=True).encode(),
            'tokenizer_config.json': json.dumps(config, indent=2).encode(),
        },
        'the tokenizer trained here',
    )


def train_sentencepiece(texts: Iterable, folder: str, kind: str, vocab_size: int) -> None:
    """Write tokenizer.model of `texts` to `folder`: kind 'unigram' or 'sp_bpe', as LLaMA-2's.
    Raises UserError for a vocab_size that the text does not give.
    """
    import sentencepiece

    path = os.path.join(folder, 'tokenizer.model')

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split('\n') if line.strip()),
            model_prefix=os.path.join(folder, 'tokenizer'),
            model_type='unigram' if kind == 'unigram' else 'bpe',
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name='identity',
            remove_extra_whitespaces=False,
            split_digits=kind == 'sp_bpe',
            max_sentence_length=2**20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        text = ' '.join(str(error).split())
        advice = (
            'a larger'
            if 'smaller than required' in text or 'Increase vocab_size' in text
            else 'a smaller'
        )
        raise UserError(
            f'sentencepiece cannot make {vocab_size} pieces of this text ({text[-200:]}): type'
            f' {advice} --vocab_size'
        ) from None
    # the library does not say that a disk is full
    with open(path, 'rb') as f:
        os.fsync(f.fileno())
    if not os.path.getsize(path):
        raise OSError(errno.ENOSPC, 'the model could not be written', path)
