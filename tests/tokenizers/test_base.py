"""Proves that every tokenizer gives the ids of its reference library, decodes to the same text,
keeps special tokens out, and travels with its data set.
"""

import io
import json
import pickle
import shutil
import sys

import numpy as np
import pytest

from onetrain.data.token_file import TokenFileWriter, read_meta
from onetrain.tokenizers.base import load_tokenizer, tokenizer_of

EOT = '<|endoftext|>'
TEXTS = [
    'hello there, hello world\n',
    '',
    ' ',
    f'a{EOT}b</s>[PAD]{EOT}',
    'Grüße, 日本語 \N{GRINNING FACE} \u0301\n\n\tif x:\n        return "1234"\n',
]
CORPUS = [text for text in TEXTS if text] * 4 + [
    f'the cat sat on mat number {i}, then the hat fell\n' for i in range(60)
]

# an encoding that tiktoken finds by itself, as it finds gpt2, but without the network; 300 is a gap
PLUGIN = r"""
def tiny(name='tiny', special={'<|endoftext|>': 301}):
    ranks = {bytes([i]): i for i in range(256)} | {
        b'he': 256, b'll': 257, b'hell': 258, b'hello': 259, b' hello': 260, b' w': 261}
    pattern = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
    return {'name': name, 'pat_str': pattern, 'mergeable_ranks': ranks, 'special_tokens': special}
def offline():
    raise __import__('requests').exceptions.ConnectionError('no route to host')
without = lambda: tiny('tiny_without_eot', {})
ENCODING_CONSTRUCTORS = {'tiny': tiny, 'tiny_without_eot': without, 'offline': offline}
"""


@pytest.fixture(scope='module')
def tiktoken(tmp_path_factory):
    tiktoken = pytest.importorskip('tiktoken')
    folder = tmp_path_factory.mktemp('plugin')
    (folder / 'tiktoken_ext').mkdir()
    (folder / 'tiktoken_ext' / 'onetrain_test.py').write_text(PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(tiktoken.registry, 'ENCODING_CONSTRUCTORS', None)
        patch.setattr(tiktoken.registry, 'ENCODINGS', {})
        tiktoken.registry._available_plugin_modules.cache_clear()
        yield tiktoken
    tiktoken.registry._available_plugin_modules.cache_clear()


@pytest.fixture
def hf_folder(tmp_path):
    """A byte-level BPE with two added tokens, the last one far beyond the others, that would
    truncate and pad if let.
    """
    tokenizers = pytest.importorskip('tokenizers')
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([EOT, '[PAD]'])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f'{EOT} $A', special_tokens=[(EOT, tokenizer.token_to_id(EOT))]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    folder = tmp_path / 'source'
    folder.mkdir()
    stored = json.loads(tokenizer.to_str())
    last = next(token for token in stored['added_tokens'] if token['content'] == '[PAD]')
    last['id'] = stored['model']['vocab']['[PAD]'] = 999
    (folder / 'tokenizer.json').write_text(json.dumps(stored))
    (folder / 'tokenizer_config.json').write_text(
        json.dumps({'eos_token': EOT, 'tokenizer_class': 'PreTrainedTokenizerFast'})
    )
    return folder


@pytest.fixture
def sentencepiece_model(tmp_path):
    sentencepiece = pytest.importorskip('sentencepiece')
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=420,
        model_type='bpe',
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    path = tmp_path / 'tiny.model'
    path.write_bytes(model.getvalue())
    return path


def through_a_data_set(tokenizer, folder):
    """What a reader of a data set made with `tokenizer` gets."""
    extra = {'stoi': tokenizer.stoi, 'itos': tokenizer.itos} if hasattr(tokenizer, 'stoi') else None
    with TokenFileWriter(
        str(folder),
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer=tokenizer,
        split='x',
        extra=extra,
    ) as writer:
        writer.write('train', tokenizer.encode('hello'))
        writer.write('val', tokenizer.encode('hello'))
    return tokenizer_of(str(folder), read_meta(folder))


def check(tokenizer, reference):
    """reference: str -> list of ids. Encoding equals it, is exact, and survives a pickle (worker
    processes get one).
    """
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint32 and ids.ndim == 1
        assert ids.tolist() == reference(text)
        assert tokenizer.eot_id not in ids
        assert tokenizer.decode(ids) == text and tokenizer.decode(ids.tolist()) == text
        assert pickle.loads(pickle.dumps(tokenizer)).encode(text).tolist() == ids.tolist()
    # a padded vocabulary can sample these
    assert isinstance(tokenizer.decode(range(tokenizer.vocab_size + 50)), str)


def test_bytes(tmp_path):
    tokenizer = load_tokenizer('bytes')
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256)
    check(tokenizer, lambda text: list(text.encode()))
    check(through_a_data_set(tokenizer, tmp_path), lambda text: list(text.encode()))
    assert tokenizer.decode([72, 0xFF, 256, 300]) == f'H\ufffd{EOT}\ufffd'


def test_char(tmp_path):
    characters = sorted(set(''.join(TEXTS)))
    tokenizer = load_tokenizer('char', iter(TEXTS))
    assert tokenizer.vocab_size == len(characters) and tokenizer.eot_id is None
    check(tokenizer, lambda text: [characters.index(c) for c in text])
    check(through_a_data_set(tokenizer, tmp_path), lambda text: [characters.index(c) for c in text])
    with pytest.raises(ValueError, match="the character 'Ω' is not among"):
        tokenizer.encode('hello Ω')
    with pytest.raises(ValueError, match='made from a text'):
        load_tokenizer('char')


def test_nanogpt_meta_and_no_meta(tmp_path, monkeypatch):
    stoi = {'\n': 0, 'a': 1, 'é': 2}
    meta = {'vocab_size': 3, 'stoi': stoi, 'itos': {i: c for c, i in stoi.items()}}
    assert tokenizer_of(str(tmp_path), meta).encode('é\na').tolist() == [2, 0, 1]
    monkeypatch.setattr(
        'onetrain.tokenizers.base.TiktokenTokenizer', lambda name: f'tiktoken {name}'
    )
    assert tokenizer_of(str(tmp_path), {}) == 'tiktoken gpt2'
    for other in ({'vocab_size': 100}, {'tokenizer': 'gpt2'}, {'tokenizer': {'kind': 'none'}}):
        with pytest.raises(ValueError, match='names the tokenizer'):
            tokenizer_of(str(tmp_path), other)


def test_tiktoken(tmp_path, tiktoken):
    encoding = tiktoken.get_encoding('tiny')
    tokenizer = load_tokenizer('tiny')
    assert (
        (tokenizer.vocab_size, tokenizer.eot_id)
        == (302, 301)
        == (encoding.n_vocab, encoding.eot_token)
    )
    check(tokenizer, encoding.encode_ordinary)
    assert 260 in tokenizer.encode('oh hello')  # the merges are at work
    check(through_a_data_set(tokenizer, tmp_path), encoding.encode_ordinary)
    assert read_meta(tmp_path)['tokenizer'] == {'kind': 'tiktoken', 'name': 'tiny'}
    assert tokenizer.decode([259, 301, 300, 5000, 0xFF]) == f'hello{EOT}' + '\ufffd' * 3
    assert load_tokenizer('tiny_without_eot').eot_id is None


def test_hugging_face(tmp_path, hf_folder):
    transformers = pytest.importorskip('transformers')
    theirs = transformers.AutoTokenizer.from_pretrained(hf_folder)

    def reference(text):
        return theirs(text, add_special_tokens=False, split_special_tokens=True)['input_ids']

    tokenizer = load_tokenizer(str(hf_folder))
    assert (
        tokenizer.vocab_size
        == 1000
        > tokenizer.tokenizer.get_vocab_size(with_added_tokens=True)
        > 401
    )
    assert tokenizer.eot_id == theirs.eos_token_id == tokenizer.tokenizer.token_to_id(EOT)
    check(tokenizer, reference)
    assert tokenizer.decode([tokenizer.eot_id, *tokenizer.encode('é'), 999]) == f'{EOT}é[PAD]'
    assert len(tokenizer.encode('hello world ' * 50)) > 64  # neither truncated nor padded
    assert load_tokenizer(str(hf_folder / 'tokenizer.json')).vocab_size == 1000

    data_set = tmp_path / 'set'
    kept = through_a_data_set(tokenizer, data_set)
    references = {text: reference(text) for text in TEXTS}
    shutil.rmtree(hf_folder)
    shutil.move(data_set, tmp_path / 'moved')
    meta = read_meta(tmp_path / 'moved')
    assert meta['tokenizer'] == {'kind': 'hf', 'path': 'tokenizer'} and meta['vocab_size'] == 1000
    for again in (kept, tokenizer_of(str(tmp_path / 'moved'), meta)):
        assert (again.vocab_size, again.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)
        check(again, references.__getitem__)


def test_hugging_face_describe_replaces_and_survives_its_own_folder(tmp_path, hf_folder):
    data_set = tmp_path / 'set'
    (hf_folder / 'special_tokens_map.json').write_text('{"eos_token": "[PAD]"}')
    through_a_data_set(load_tokenizer(str(hf_folder)), data_set)
    assert (data_set / 'tokenizer' / 'special_tokens_map.json').exists()
    (hf_folder / 'special_tokens_map.json').unlink()
    first = through_a_data_set(load_tokenizer(str(hf_folder)), data_set)
    assert not (data_set / 'tokenizer' / 'special_tokens_map.json').exists(), (
        'a file of the tokenizer before'
    )
    # from the folder it is written to
    again = through_a_data_set(load_tokenizer(str(data_set / 'tokenizer')), data_set)
    assert again.encode('hello').tolist() == first.encode('hello').tolist()


@pytest.mark.parametrize(
    'files, eos',
    [
        ({'tokenizer_config.json': {'eos_token': '[PAD]'}}, 999),
        ({'tokenizer_config.json': {'eos_token': {'content': '[PAD]', 'lstrip': False}}}, 999),
        (
            {
                'tokenizer_config.json': {'eos_token': None},
                'special_tokens_map.json': {'eos_token': '[PAD]'},
            },
            999,
        ),
        ({'special_tokens_map.json': {'eos_token': {'content': '[PAD]'}}}, 999),
        ({'tokenizer_config.json': {}, 'config.json': {'eos_token_id': 7}}, 7),
        ({'config.json': {'eos_token_id': [8, 9]}}, 8),
        ({}, None),
    ],
)
def test_where_hugging_face_folders_name_their_eos(hf_folder, files, eos):
    (hf_folder / 'tokenizer_config.json').unlink()
    for name, content in files.items():
        (hf_folder / name).write_text(json.dumps(content))
    assert load_tokenizer(str(hf_folder)).eot_id == eos


def test_sentencepiece(tmp_path, sentencepiece_model):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    references = {text: processor.encode(text) for text in TEXTS}
    tokenizer = load_tokenizer(str(sentencepiece_model))
    assert (
        (tokenizer.vocab_size, tokenizer.eot_id)
        == (420, 2)
        == (processor.vocab_size(), processor.eos_id())
    )
    check(tokenizer, references.__getitem__)
    kept = through_a_data_set(tokenizer, tmp_path / 'set')
    sentencepiece_model.unlink()
    check(kept, references.__getitem__)
    assert read_meta(tmp_path / 'set')['tokenizer'] == {
        'kind': 'sentencepiece',
        'path': 'tokenizer.model',
    }


def refusal(*arguments):
    with pytest.raises(ValueError) as caught:
        load_tokenizer(*arguments)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_loaded_is_refused_in_one_sentence(
    tmp_path, tiktoken, hf_folder, monkeypatch
):
    message = refusal('tinny')
    assert "'tinny'" in message and "did you mean 'tiny'" in message and 'cl100k_base' in message
    assert "could not download the encoding 'offline' (ConnectionError)" in refusal('offline')
    assert 'no sentencepiece model' in refusal(str(tmp_path / 'no.model'))
    (tmp_path / 'bad.model').write_bytes(b'junk')
    assert 'is no sentencepiece model' in refusal(str(tmp_path / 'bad.model'))
    assert 'save_pretrained' in refusal(str(tmp_path))
    (tmp_path / 'tokenizer.model').write_bytes(b'')
    assert f'type --tokenizer {tmp_path}/tokenizer.model' in refusal(str(tmp_path))
    (hf_folder / 'tokenizer_config.json').write_text('{"eos_token": "<absent>"}')
    assert "eos token '<absent>'" in refusal(str(hf_folder))
    (hf_folder / 'tokenizer.json').write_text('{}')
    assert 'cannot be read as a tokenizer' in refusal(str(hf_folder))
    for name, spec in (
        ('tiktoken', 'tiny'),
        ('tokenizers', str(hf_folder)),
        ('sentencepiece', str(tmp_path / 'bad.model')),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        assert f'pip install {name}' in refusal(spec)
    for stated in ({'kind': 'hf', 'path': 'gone'}, {'kind': 'sentencepiece', 'path': 'gone.model'}):
        with pytest.raises(ValueError, match='gone'):
            tokenizer_of(str(tmp_path), {'tokenizer': stated})
