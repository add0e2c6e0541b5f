"""export.py: a trained run opened by transformers has the same loss and writes the same text;
tokenizers of every kind give the same ids there.
"""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TEXT, records, run_train, write_dataset

import export
import sample
from load import load_run
from onetrain.generation import generate
from onetrain.huggingface import weights as huggingface_weights
from onetrain.tokenizers.base import (
    BytesTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    ids_digest,
    same_tokenizer,
    tokenizer_of,
)
from onetrain.tokenizers.export import byte_characters, save_for_transformers
from onetrain.tokenizers.matching import tokenizer_identity

transformers = pytest.importorskip('transformers')
FAMILIES = {
    'gpt2': [],
    'gpt2 biases': ['--bias=True'],
    'llama': ['--arch_preset=llama', '--sliding_window=0'],
    'llama3': ['--arch_preset=llama3', '--num_key_value_heads=1'],
    'qwen3': ['--arch_preset=qwen3'],
    'neox': ['--arch_preset=neox'],
    'mistral': ['--arch_preset=llama', '--sliding_window=5'],
    'yarn': [
        '--arch_preset=llama',
        '--rope_scaling=yarn',
        '--rope_factor=2',
        '--rope_original_block_size=8',
    ],
    'mixtral': [
        '--arch_preset=mixtral',
        '--num_experts=4',
        '--balance_rate=0',
        '--aux_loss_weight=0.01',
    ],
    'qwen3_moe': [
        '--arch_preset=qwen3_moe',
        '--num_experts=4',
        '--num_experts_per_tok=2',
        '--balance_rate=0',
        '--expert_d_ff=16',
    ],
    'gpt_oss': [
        '--arch_preset=gpt_oss',
        '--num_experts=4',
        '--num_experts_per_tok=2',
        '--balance_rate=0',
        '--sliding_window=6',
        '--rope_original_block_size=8',
    ],
    'moe': [
        '--arch_preset=moe',
        '--num_experts=4',
        '--expert_d_ff=16',
        '--balance_rate=0.01',
        '--n_dense_layers=1',
    ],
}
# in a fresh process that knows transformers only
READER = """
import json, sys, torch, transformers
folders, ids, prompt = json.load(open(sys.argv[1]))
torch.set_num_threads(2)
found = []
for folder in folders:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    x = torch.tensor(ids)
    start = tokenizer(prompt, return_tensors='pt', add_special_tokens=False)['input_ids']
    with torch.no_grad():
        logits = model(x[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()).item()
        written = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=8,
                                 do_sample=False, pad_token_id=0)
    found.append([loss, tokenizer.decode(written[0]), type(model).__name__])
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def exported(dataset, tmp_path_factory):
    """{family: (folder, what a process with transformers alone found there)}: every family trained
    for 50 iterations and exported.
    """
    top = tmp_path_factory.mktemp('exported')
    for number, family in enumerate(FAMILIES):
        assert (
            run_train(
                dataset,
                top / str(number) / 'run',
                '--max_iters=50',
                '--eval_interval=50',
                '--eval_at_start=False',
                *FAMILIES[family],
            )
            == 0
        )
        assert export.main([f'--out_dir={top}/{number}/run', f'--to={top}/{number}/hf']) == 0
    ids = CharTokenizer.of_texts([TEXT]).encode(TEXT[:34]).tolist()
    (top / 'job.json').write_text(
        json.dumps(
            [
                [str(top / str(number) / 'hf') for number in range(len(FAMILIES))],
                [ids[:17], ids[17:]],
                'the quick',
            ]
        )
    )
    (top / 'reader.py').write_text(READER)
    done = subprocess.run(
        [sys.executable, str(top / 'reader.py'), str(top / 'job.json')],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=top,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        family: (top / str(number), found)
        for number, (family, found) in enumerate(
            zip(FAMILIES, json.loads(done.stdout.splitlines()[-1]))
        )
    }


@pytest.mark.parametrize('family', FAMILIES)
def test_trained_exported_and_read_by_transformers(dataset, exported, family):
    """The loss of the same batch within 1e-5, the same greedy text."""
    folder, (theirs, written, name) = exported[family]
    model, tokenizer, _, _ = load_run(str(folder / 'run'), None, torch.device('cpu'), torch.float32)
    x = torch.tensor(tokenizer.encode(TEXT[:34]).tolist()).view(2, 17)
    prompt = tokenizer.encode('the quick').tolist()
    with torch.no_grad():
        loss = model(x[:, :-1], x[:, 1:]).item()
    text = tokenizer.decode(prompt + generate(model, [prompt], 8, temperature=0)[0])
    assert abs(theirs - loss) < 1e-5 and written == text, name
    # and back in: the loss of the first evaluation is that of the last one of the run
    assert (
        run_train(
            dataset,
            folder / 'again',
            f'--init_from={folder}/hf',
            '--max_iters=1',
            '--eval_interval=1',
        )
        == 0
    )
    first, last = records(folder / 'again', 'eval')[0], records(folder / 'run', 'eval')[-1]
    assert first['val_loss'] == pytest.approx(last['val_loss'], abs=1e-5)


def test_card_shards_and_dtype(dataset, tmp_path, capsys):
    assert run_train(dataset, tmp_path / 'run', '--max_iters=4', '--eval_interval=2') == 0
    log = next(
        name
        for name in os.listdir(tmp_path / 'run')
        if name.startswith('run_') and name.endswith('.jsonl')
    )
    with open(tmp_path / 'run' / log, 'a') as f:
        f.write('{"type": "iter", "it')  # cut by a kill
    assert (
        export.main(
            [
                f'--out_dir={tmp_path}/run',
                f'--to={tmp_path}/hf',
                '--dtype=bfloat16',
                '--shard_size=40KB',
                '--step=2',
            ]
        )
        == 0
    )
    files = [name for name in os.listdir(tmp_path / 'hf') if name.endswith('.safetensors')]
    assert len(files) > 1 and (tmp_path / 'hf' / 'model.safetensors.index.json').exists()
    from safetensors.torch import load_file

    assert {t.dtype for name in files for t in load_file(str(tmp_path / 'hf' / name)).values()} == {
        torch.bfloat16
    }
    card = (tmp_path / 'hf' / 'README.md').read_text()
    assert (
        '128 in 2 iterations of 64' in card
        and 'nats per token at iteration 2' in card
        and 'library_name: transformers' in card
    )
    # what was there before goes
    assert export.main([f'--out_dir={tmp_path}/run', f'--to={tmp_path}/hf']) == 0
    assert [name for name in os.listdir(tmp_path / 'hf') if name.endswith('.safetensors')] == [
        'model.safetensors'
    ] and not (tmp_path / 'hf' / 'model.safetensors.index.json').exists()


def test_a_wrong_export_is_noticed(dataset, tmp_path, capsys, monkeypatch):
    assert (
        run_train(
            dataset, tmp_path / 'run', '--max_iters=2', '--eval_interval=2', '--arch_preset=llama'
        )
        == 0
    )
    real = huggingface_weights.config_json
    monkeypatch.setattr(
        huggingface_weights, 'config_json', lambda *args: {**real(*args), 'rms_norm_eps': 0.5}
    )
    assert export.main([f'--out_dir={tmp_path}/run', f'--to={tmp_path}/hf']) == 2
    assert 'transformers computes other logits' in capsys.readouterr().err
    monkeypatch.setattr(huggingface_weights, 'config_json', real)
    monkeypatch.setattr(
        export,
        'save_for_transformers',
        lambda tokenizer, folder: save_for_transformers(
            CharTokenizer({**tokenizer.stoi, 'a': 0, '\n': tokenizer.stoi['a']}, tokenizer.itos),
            folder,
        ),
    )
    assert export.main([f'--out_dir={tmp_path}/run', f'--to={tmp_path}/hf']) == 2
    assert 'its tokenizer gives other ids' in capsys.readouterr().err


@pytest.mark.parametrize(
    'family, message',
    [
        (
            ['--norm_position=post'],
            (
                'no Hugging Face architecture computes this model; nearest is gpt2, in the way are'
                " norm_position='post'"
            ),
        ),
        (
            ['--arch_preset=mixtral', '--num_experts=4'],
            'balanced by a bias, which mixtral does not have: train with --balance_rate=0',
        ),
    ],
)
def test_what_transformers_lacks_is_told(dataset, tmp_path, capsys, family, message):
    assert run_train(dataset, tmp_path / 'run', '--max_iters=2', '--eval_interval=2', *family) == 0
    capsys.readouterr()
    assert export.main([f'--out_dir={tmp_path}/run', f'--to={tmp_path}/hf']) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_no_hub_no_run_no_tokenizer(dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    assert run_train(dataset, tmp_path / 'run', '--max_iters=2', '--eval_interval=2') == 0
    for args, message in (
        ([f'--out_dir={tmp_path}/none'], 'no checkpoint to load'),
        (
            [f'--out_dir={tmp_path}/run', '--push_to_hub=me/x'],
            '--push_to_hub=me/x cannot be written to',
        ),
    ):
        capsys.readouterr()
        assert (
            export.main([*args, f'--to={tmp_path}/hf']) == 2 and message in capsys.readouterr().err
        )
    import shutil

    shutil.copytree(dataset, tmp_path / 'data')
    assert (
        run_train(str(tmp_path / 'data'), tmp_path / 'moved', '--max_iters=2', '--eval_interval=2')
        == 0
    )
    shutil.rmtree(tmp_path / 'data')
    for command in (export.main, sample.main):
        capsys.readouterr()
        assert (
            command(
                [
                    f'--out_dir={tmp_path}/moved',
                    *([f'--to={tmp_path}/hf'] if command is export.main else ['--device=cpu']),
                ]
            )
            == 2
        )
        assert 'has no meta.pkl: prepare' in capsys.readouterr().err
    assert not (tmp_path / 'hf').exists()


def tiktoken_like(text):
    """A tiktoken encoding made on the spot: none can be downloaded here."""
    import tiktoken
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    byte_of = {character: byte for byte, character in byte_characters().items()}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer = TiktokenTokenizer.__new__(TiktokenTokenizer)
    tokenizer.encoding = tiktoken.Encoding(
        'mine',
        pat_str=pattern,
        special_tokens={'<|endoftext|>': 400},
        mergeable_ranks={
            bytes(byte_of[c] for c in word): i for word, i in made.get_vocab().items()
        },
    )
    tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id = 'mine', 401, 400
    return tokenizer


def sentencepiece_like(text, kind):
    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=file,
        vocab_size=400,
        model_type=kind,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    return SentencePieceTokenizer(file.getvalue(), 'made.model')


def hugging_face_like(text, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=['</s>'],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "</s>"}')
    return HuggingFaceTokenizer.of_folder(str(tmp_path))


@pytest.mark.parametrize('kind', ['bytes', 'char', 'tiktoken', 'bpe', 'unigram', 'hf'])
def test_every_tokenizer_gives_the_same_ids_in_transformers(tmp_path, kind):
    with open(os.path.join(ROOT, 'train.py'), encoding='utf-8') as f:
        text = f.read()[:8000] + '  héllo wörld — 日本語 \t\n\n x  <|endoftext|> y'
    (tmp_path / 'own').mkdir()
    tokenizer = {
        'bytes': BytesTokenizer,
        'char': lambda: CharTokenizer.of_texts([text]),
        'tiktoken': lambda: tiktoken_like(text),
        'bpe': lambda: sentencepiece_like(text, 'bpe'),
        'unigram': lambda: sentencepiece_like(text, 'unigram'),
        'hf': lambda: hugging_face_like(text, tmp_path / 'own'),
    }[kind]()
    save_for_transformers(tokenizer, str(tmp_path / 'hf'))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / 'hf'))
    ids = theirs(text, add_special_tokens=False, split_special_tokens=True)['input_ids']
    assert (
        ids == tokenizer.encode(text).tolist()
        and theirs.decode(ids) == tokenizer.decode(ids)
        and theirs.eos_token_id == tokenizer.eot_id
    )


def test_templates_of_conversations_are_kept_and_those_of_another_tokenizer_removed(tmp_path):
    for name in ('own', 'folder/data', 'hf'):
        (tmp_path / name).mkdir(parents=True)
    one = hugging_face_like('some text to make words of', tmp_path / 'own')
    (tmp_path / 'own' / 'additional_chat_templates').mkdir()
    (tmp_path / 'own' / 'additional_chat_templates' / 'tool_use.jinja').write_text(
        '{{ messages }} with tools'
    )
    (tmp_path / 'own' / 'chat_template.jinja').write_text('{{ messages }}')
    templates = {'default': '{{ messages }}', 'tool_use': '{{ messages }} with tools'}
    meta = {
        'tokenizer': (
            HuggingFaceTokenizer.of_folder(str(tmp_path / 'own')).describe(str(tmp_path / 'folder'))
        )
    }
    kept = tokenizer_of(str(tmp_path / 'folder'), meta)
    save_for_transformers(kept, str(tmp_path / 'hf'))
    assert (
        transformers.AutoTokenizer.from_pretrained(str(tmp_path / 'hf')).chat_template == templates
    )
    identity = tokenizer_identity(str(tmp_path / 'folder'), meta)
    assert identity
    export.clear_leftovers(str(tmp_path / 'hf'))
    one.describe(str(tmp_path / 'folder'))
    for folder in (tmp_path / 'hf', tmp_path / 'folder' / 'tokenizer'):
        assert not [name for name in folder.rglob('*') if 'template' in name.name]


def test_a_link_in_the_tokenizer_of_a_data_set_is_not_published(tmp_path):
    for name in ('own', 'set', 'other'):
        (tmp_path / name).mkdir()
    meta = {
        'tokenizer': (
            hugging_face_like('some text', tmp_path / 'own').describe(str(tmp_path / 'set'))
        )
    }
    (tmp_path / 'secret').write_text('password')
    (tmp_path / 'set' / 'tokenizer' / 'chat_template.jinja').symlink_to(tmp_path / 'secret')
    (tmp_path / 'other' / 'tokenizer').symlink_to(tmp_path / 'own')
    for name, file in (('set', 'chat_template.jinja'), ('other', 'tokenizer.json')):
        with pytest.raises(ValueError, match=f'{file} is a link'):
            tokenizer_of(str(tmp_path / name), meta)
    with pytest.raises(ValueError, match='tokenizer is a link'):
        HuggingFaceTokenizer.of_folder(str(tmp_path / 'own')).describe(str(tmp_path / 'other'))


@pytest.mark.parametrize('letters', ['abcdefgh', 'Once upon'])
def test_the_snippet_of_the_model_card_runs(tmp_path, letters):
    """Also where the context is short and the alphabet knows no 'Once'."""
    letters = ''.join(dict.fromkeys(letters))
    ids = torch.randint(len(letters), (3000,), generator=torch.Generator().manual_seed(0)).numpy()
    data = write_dataset(
        str(tmp_path / 'data'),
        ids,
        ids[:500],
        vocab_size=len(letters),
        extra={'stoi': {c: i for i, c in enumerate(letters)}, 'itos': dict(enumerate(letters))},
    )
    assert run_train(data, tmp_path / 'run', '--max_iters=2', '--eval_interval=2') == 0
    assert export.main([f'--out_dir={tmp_path}/run', f'--to={tmp_path}/hf']) == 0
    card = (tmp_path / 'hf' / 'README.md').read_text()
    snippet = (
        card.split('```python\n')[1].split('```')[0].replace('THIS_FOLDER', str(tmp_path / 'hf'))
    )
    exec(compile(snippet, 'card', 'exec'), {})


def test_a_folder_of_something_else_is_not_written_over(dataset, tmp_path, capsys):
    assert run_train(dataset, tmp_path / 'run', '--max_iters=2', '--eval_interval=2') == 0
    (tmp_path / 'project').mkdir()
    for name in ('README.md', 'vocab.json', 'config.json'):
        (tmp_path / 'project' / name).write_text('mine')
    for folder in ('project', 'run'):
        capsys.readouterr()
        assert (
            export.main([f'--out_dir={tmp_path}/run', f'--to={tmp_path}/{folder}', '--no_check'])
            == 2
            and 'which no export wrote' in capsys.readouterr().err
        )
    assert sorted((path.name, path.read_text()) for path in (tmp_path / 'project').iterdir()) == [
        ('README.md', 'mine'),
        ('config.json', 'mine'),
        ('vocab.json', 'mine'),
    ]
    for _ in range(2):
        assert export.main([f'--out_dir={tmp_path}/run', f'--to={tmp_path}/new', '--no_check']) == 0


def test_tokenizers_that_differ_in_more_than_words_are_not_the_same(tmp_path):
    """In the end of a text, in what is done to characters, and in two ids."""
    (tmp_path / 'one').mkdir()
    one = hugging_face_like('The quick brown fox; some text to make words of', tmp_path / 'one')
    described = json.loads((tmp_path / 'one' / 'tokenizer.json').read_text())
    vocabulary = described['model']['vocab']
    swapped = {**vocabulary, 'q': vocabulary['u'], 'u': vocabulary['q']}
    from tokenizers import Tokenizer, models, pre_tokenizers

    # knows no other word, and has no token for one
    few = Tokenizer(models.WordLevel({'ab': 0, 'ba': 1}))
    few.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name, content in (
        ('few', few.to_str()),
        ('other', few.to_str().replace('"ab":0,"ba":1', '"ab":1,"ba":0')),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'tokenizer.json').write_text(content)
    few, other = (HuggingFaceTokenizer.of_folder(str(tmp_path / name)) for name in ('few', 'other'))
    assert few.decode([0]) == other.decode([1]) == 'ab' and ids_digest(few) != ids_digest(other)
    georgian = [chr(0x10D0 + i) for i in range(32)]
    sets = [
        CharTokenizer(*({c: i for i, c in enumerate(order)}, dict(enumerate(order))))
        for order in (georgian, georgian[::-1])
    ]
    assert ids_digest(sets[0]) != ids_digest(sets[1]) and ids_digest(sets[0]).startswith('1 ')
    others = {
        'end': (described, '{"eos_token": "q"}'),
        'normalizer': ({**described, 'normalizer': {'type': 'NFKC'}}, None),
        'ids': ({**described, 'model': {**described['model'], 'vocab': swapped}}, None),
    }
    for name, (tokenizer, config) in others.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / 'tokenizer.json').write_text(json.dumps(tokenizer))
        (tmp_path / name / 'tokenizer_config.json').write_text(config or '{"eos_token": "</s>"}')
        other = HuggingFaceTokenizer.of_folder(str(tmp_path / name))
        assert not same_tokenizer(one, other) and ids_digest(one) != ids_digest(other), name
    again = HuggingFaceTokenizer.of_folder(str(tmp_path / 'one'))
    assert same_tokenizer(one, again) and ids_digest(one) == ids_digest(again)


def test_a_character_that_an_exported_tokenizer_does_not_know_is_refused(tmp_path):
    save_for_transformers(CharTokenizer.of_texts(['abc']), str(tmp_path))
    with pytest.raises(ValueError, match="cannot encode 'abx'"):
        HuggingFaceTokenizer.of_folder(str(tmp_path)).encode('abx')
