"""gigatoken gives the ids of the tokenizers that it is taken for, and is not taken where it does
not; a corpus says what encoded it.
"""

import json
import pickle
import sys

import numpy as np
import pytest
import tiktoken
from small_tokenizers import BYTES, EOT, KINDS, LLAMA3, hard_texts, source, trained
from tokenizers import AddedToken, Regex
from tokenizers.pre_tokenizers import Sequence, Split

from onetrain.data.token_file import read_meta
from onetrain.prepare import pipeline
from onetrain.prepare.assemble import assemble
from onetrain.tokenizers import fast_bpe
from onetrain.tokenizers.base import TiktokenTokenizer, load_tokenizer
from onetrain.tokenizers.byte_level import ranks_of


def saved(tokenizer, folder):
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': EOT}))
    return load_tokenizer(str(folder))


@pytest.mark.parametrize('kind', KINDS)
def test_ids_are_the_librarys(kind, tmp_path):
    """With an added token in the text, too; texts that are not in the normal form go elsewhere."""
    library = trained(kind)
    library.add_tokens(['<tool>', AddedToken('<left>', lstrip=True, rstrip=True)])
    library.add_tokens([AddedToken('word', single_word=True)])
    library.encode_special_tokens = True
    own = saved(library, tmp_path)
    own.accelerate()
    # whose regular expression it does not know
    assert own.encoder.split()[0] == ('tiktoken' if kind == 'starcoder2' else 'gigatoken')
    elsewhere = 0
    added = ['a <tool> b', 'a  <left>  b', 'word', 'words word', 'sword']
    for text in [*source(), *hard_texts(500, 5), *added, '', f'a {EOT} b', ' ' * 999]:
        elsewhere += own.fast.encode(text) is None
        ids = own.encode(text)
        assert ids.dtype == np.uint32
        assert ids.tolist() == library.encode(text, add_special_tokens=False).ids, repr(text)
    assert elsewhere < (500 if kind == 'qwen3' else 100)  # of hard_texts most are not in NFC
    other = pickle.loads(pickle.dumps(own))  # as in a process that tokenizes
    assert other.encoder == own.encoder and type(other.fast) is type(own.fast)
    assert other.encode(source()[0]).tolist() == own.encode(source()[0]).tolist()


@pytest.mark.parametrize('kind', ['gpt2', 'qwen3'])
def test_it_is_not_taken_where_one_id_differs(kind):
    """Whichever text it is in."""
    library = trained(kind)
    content = library.to_str()

    def right(texts):
        return [found.ids for found in library.encode_batch(texts, add_special_tokens=False)]

    def wrong(texts):
        return [[*ids, 0] if 'aҡ' in text else ids for text, ids in zip(texts, right(texts))]

    assert fast_bpe.fast_bpe_of_json(content, right) is not None
    assert fast_bpe.fast_bpe_of_json(content, wrong) is None
    assert len(list(fast_bpe.probes())) > 4000
    seen = set(''.join(fast_bpe.probes()))
    assert all(chr(code) in seen for code in range(0x32000) if not 0xD800 <= code < 0xE000)


def split_twice():
    """Return a pre-tokenizer one of whose steps gigatoken overlooks."""
    steps = [Split('KING', 'isolated'), Split(Regex(LLAMA3), 'isolated'), BYTES]
    return json.loads(Sequence(steps).__getstate__())


def test_what_it_cannot_load_is_left_alone(tmp_path, monkeypatch):
    for key, value in (
        ('pre_tokenizer', {'type': 'Whitespace'}),
        ('normalizer', {'type': 'Lowercase'}),
        ('pre_tokenizer', split_twice()),
    ):
        described = {**json.loads(trained('gpt2', 400).to_str()), key: value}
        assert fast_bpe.fast_bpe_of_json(json.dumps(described), None) is None
    own = saved(trained('gpt2', 400), tmp_path)
    monkeypatch.setitem(sys.modules, 'gigatoken', None)
    own.accelerate()
    assert own.encoder == f'tiktoken {tiktoken.__version__}'
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    own.accelerate()
    assert own.encoder is None and [own.encode('a b').tolist()] == own._library_ids(['a b'])


def test_an_added_token_that_is_found_in_another_form_than_written(tmp_path):
    """By the library, which brings it into the normal form of the texts."""
    library = trained('qwen3')
    library.add_tokens([AddedToken('cafe\u0301', normalized=True)])
    own = saved(library, tmp_path)
    own.accelerate()
    assert own.encoder is None
    assert own.encode('1 caf\xe9 2').tolist() == library.encode('1 caf\xe9 2').ids


def test_half_a_surrogate_pair_goes_to_the_library():
    fast = fast_bpe.fast_bpe_of_json(trained('gpt2', 400).to_str(), None)
    assert fast.encode('a\ud800') is None and fast.encode('a') is not None


@pytest.mark.parametrize('name', ['gpt2', 'p50k_edit', 'cl100k_base', 'o200k_base', 'unknown'])
def test_encodings_of_tiktoken(name, monkeypatch):
    """With ranks made here: the real ones are a download."""
    import tokenizers
    from tiktoken_ext import openai_public

    model = json.loads(trained('llama3').to_str())['model']
    ranks = {token: rank for rank, (token, _) in enumerate(ranks_of(model, tokenizers))}
    for load in ('load_tiktoken_bpe', 'data_gym_to_mergeable_bpe_ranks'):
        monkeypatch.setattr(openai_public, load, lambda *_, **__: ranks)
    pattern = getattr(openai_public, 'o200k_base' if name == 'unknown' else name)()['pat_str']
    encoding = tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)}
    )
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda _: encoding)
    monkeypatch.setattr(tiktoken, 'list_encoding_names', lambda: [name])
    own = TiktokenTokenizer(name)
    own.accelerate()
    assert (own.encoder is None) == (name == 'unknown')
    for text in [*source(), *hard_texts(300, 6), EOT]:
        assert own.encode(text).tolist() == encoding.encode_ordinary(text)


@pytest.mark.parametrize('processes', [1, 2])
def test_a_corpus_says_what_encoded_it(processes, tmp_path, monkeypatch):
    """And has the same ids as a small one, which the library itself encodes."""
    tokenizer = saved(trained('gpt2'), tmp_path)
    paths = [str(tmp_path / f'{i}.txt') for i in range(4)]
    for path, text in zip(paths, source()):
        with open(path, 'w', encoding='utf-8') as f:
            f.write(text)
    found = {}
    for size in (2**30, 1000):
        monkeypatch.setattr(pipeline, 'CORPUS', size)
        output = str(tmp_path / f'out-{size}')
        plan = pipeline.Plan.of_files(paths, tokenizer)
        with pipeline.exclusive_lock(plan, output):
            made = pipeline.tokenize(plan, output, num_proc=processes)
            assemble(plan, made, output, split='every second', val_every=2)
        ids = [open(f'{output}/{split}.bin', 'rb').read() for split in ('train', 'val')]
        found[size] = ids, read_meta(output).get('encoder')
    assert found[2**30][0] == found[1000][0]
    assert found[2**30][1] is None and found[1000][1] == fast_bpe.version()
