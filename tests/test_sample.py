"""sample.py writes with the model that was trained: every family, runs and Hugging Face folders,
repeatable, with clear refusals.
"""

import os

import numpy as np
import pytest
from conftest import TEXT, run_train, write_dataset

import export
import sample
from model import Model
from onetrain import huggingface
from onetrain.checkpoint import store
from onetrain.generation import generate
from onetrain.model_config import PRESETS, resolve_shape


def write(capsys, *args):
    code = sample.main(['--device=cpu', '--num_samples=1', '--max_new_tokens=20', *args])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize('preset', PRESETS)
def test_every_family(train, tmp_path, capsys, preset):
    assert train(tmp_path, '--max_iters=2', '--eval_interval=2', f'--arch_preset={preset}') == 0
    capsys.readouterr()
    code, text = write(capsys, f'--out_dir={tmp_path}', '--start=the quick')
    assert code == 0 and 'the quick' in text
    written = text.split('the quick')[1].split('\n---')[0]
    assert len(written) == 20 and set(written) <= set(TEXT)
    assert write(capsys, f'--out_dir={tmp_path}', '--start=the quick')[1] == text
    assert write(capsys, f'--out_dir={tmp_path}', '--start=the quick', '--seed=2')[1] != text


def test_it_is_the_model_that_was_trained(train, tmp_path, capsys):
    """After enough steps on a repetitive text, the most likely continuation is the text's."""
    assert (
        train(
            tmp_path,
            '--max_iters=400',
            '--eval_interval=200',
            '--learning_rate=5e-3',
            '--batch_size=16',
        )
        == 0
    )
    capsys.readouterr()
    words = set(TEXT.split())
    _, text = write(
        capsys, f'--out_dir={tmp_path}', '--start=the ', '--temperature=0', '--max_new_tokens=60'
    )
    written = text.split('parameters\n')[1].split('\n---')[0].split()[:-1]
    assert len(written) > 5 and sum(word in words for word in written) >= 0.8 * len(written), (
        written
    )


def test_prompt_from_a_file_and_limits(train, tmp_path, capsys):
    assert train(tmp_path, '--max_iters=2', '--eval_interval=2') == 0
    (tmp_path / 'prompt.txt').write_text('lazy dog; ')
    code, text = write(
        capsys,
        f'--out_dir={tmp_path}',
        f'--start=FILE:{tmp_path}/prompt.txt',
        '--top_k=3',
        '--top_p=0.9',
        '--num_samples=2',
    )
    assert code == 0 and text.count('lazy dog; ') == 2


def test_best_checkpoint_or_the_step_asked_for(train, tmp_path, capsys):
    assert train(tmp_path, '--max_iters=6', '--eval_interval=2', '--keep_all_checkpoints=True') == 0
    path = store.path_of(str(tmp_path), 4)
    store.record_evaluation(path, {**store.read_evaluation(path), 'val': 0.1})
    assert 'step_00000004' in write(capsys, f'--out_dir={tmp_path}', '--start=the')[1]
    assert 'step_00000002' in write(capsys, f'--out_dir={tmp_path}', '--start=the', '--step=2')[1]
    with open(os.path.join(store.path_of(str(tmp_path), 4), 'state.json'), 'a') as f:
        f.write(' ')
    assert 'step_00000006' in write(capsys, f'--out_dir={tmp_path}', '--start=the')[1]
    code, text = write(capsys, f'--out_dir={tmp_path}', '--start=the', '--step=4')
    assert code == 2 and 'cannot be used: state.json has' in text


def test_from_a_hugging_face_folder(tmp_path, capsys):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT * 20],
        trainers.BpeTrainer(
            vocab_size=280,
            special_tokens=['</s>'],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "</s>"}')
    model = Model(
        resolve_shape(
            dict(arch_preset='qwen3', n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=280)
        )
    )
    model.init_weights(0)
    huggingface.write_model(str(tmp_path), model.config, model.state_dict())
    code, text = write(capsys, f'--hf={tmp_path}', '--start=the quick brown', '--temperature=0')
    ids = tokenizer.encode('the quick brown').ids
    assert (
        code == 0 and tokenizer.decode(ids + generate(model, [ids], 20, temperature=0)[0]) in text
    )


@pytest.mark.parametrize(
    'args, message',
    [
        (['--out_dir=nowhere'], 'no checkpoint to load'),
        (['--hf=./nowhere'], 'no local folder and could not be fetched'),
        (['--start=FILE:nowhere.txt'], 'no such file'),
        (['--top_p=2'], '--top_p=2.0 must be from 0 to 1'),
        (['--temperature=-1'], '--temperature=-1.0 must be from 0'),
    ],
)
def test_refusals(capsys, args, message):
    code, text = write(capsys, *args)
    assert code == 2 and message in text and text.startswith('error: ') and text.count('\n') == 1


def test_samples_while_training(train, tmp_path, capsys):
    assert (
        train(
            tmp_path,
            '--max_iters=6',
            '--eval_interval=6',
            '--sample_interval=3',
            '--sample_start=fox',
        )
        == 0
    )
    output = capsys.readouterr().out
    assert '---- sample at iter 3\nfox' in output and '---- sample at iter 6\nfox' in output
    (tmp_path / 'prompts.txt').write_text('lazy dog\njudge\n')
    assert (
        train(
            tmp_path / 'many',
            '--max_iters=2',
            '--eval_interval=6',
            '--sample_interval=2',
            f'--sample_start=FILE:{tmp_path}/prompts.txt',
        )
        == 0
    )
    output = capsys.readouterr().out
    assert '---- sample at iter 2\nlazy dog' in output and '---- sample at iter 2\njudge' in output


def test_prompts_stops_and_penalties(train, tmp_path, capsys):
    assert train(tmp_path, '--max_iters=60', '--eval_interval=60', '--learning_rate=1e-2') == 0
    capsys.readouterr()
    code, text = write(
        capsys,
        f'--out_dir={tmp_path}',
        '--start=the ',
        '--start=quick ',
        '--num_samples=2',
        '--min_p=0.01',
        '--repetition_penalty=1.2',
    )
    assert code == 0 and text.count('-' * 15) == 4 and text.count('\nquick ') == 2
    whole = (
        write(
            capsys,
            f'--out_dir={tmp_path}',
            '--start=the ',
            '--temperature=0',
            '--max_new_tokens=40',
        )[1]
        .split('parameters\n\n')[1]
        .split('\n---')[0]
    )
    assert len(whole) == 44
    stop = whole[20:23]
    stopped = (
        write(
            capsys,
            f'--out_dir={tmp_path}',
            '--start=the ',
            '--temperature=0',
            '--max_new_tokens=40',
            f'--stop={stop}',
            '--stop=never there',
        )[1]
        .split('parameters\n\n')[1]
        .split('\n---')[0]
    )
    assert stopped == 'the ' + whole[4 : 4 + whole[4:].index(stop)]
    for args, message in (
        (['--block_size=8'], 'this model learned 16 positions, no more and no fewer'),
        (['--rope_factor=2'], '--rope_factor=2 needs a --rope_scaling'),
        (
            ['--interactive'],
            'leaves no room for a prompt in a context of 16 tokens: type --max_new_tokens=8',
        ),
    ):
        code, text = write(capsys, f'--out_dir={tmp_path}', *args)
        assert code == 2 and message in text
    code, text = write(capsys, f'--out_dir={tmp_path}', f'--start={"the " * 9}')
    assert (
        code == 2 and 'a prompt of 36 tokens: expected 1 to 16, the context of this model' in text
    )


def test_interactive_goes_on_from_what_stands(train, tmp_path, capsys, monkeypatch):
    assert train(tmp_path, '--max_iters=2', '--eval_interval=2') == 0
    lines = iter(['the', 'fox', '', 'Ü', 'dog'])
    monkeypatch.setattr('builtins.input', lambda prompt: _next(lines))
    seen = []
    real = sample.continue_texts
    monkeypatch.setattr(
        sample,
        'continue_texts',
        lambda model, tokenizer, prompts, *args, **how: (
            seen.append(tokenizer.decode(prompts[0]))
            or real(model, tokenizer, prompts, *args, **how)
        ),
    )
    capsys.readouterr()
    code, text = write(
        capsys, f'--out_dir={tmp_path}', '--interactive', '--max_new_tokens=3', '--temperature=0'
    )
    assert (
        code == 0
        and seen[0] == 'the'
        and seen[1].startswith('the')
        and seen[1].endswith('fox')
        and len(seen[1]) == 9
        and seen[2] == 'dog'
        and "error: the character 'Ü'" in text
    )


def _next(lines):
    try:
        return next(lines)
    except StopIteration:
        raise EOFError from None


def characters(folder, letters):
    """A data set of these characters, in this order."""
    ids = np.random.default_rng(0).integers(0, len(letters), 3000)
    return write_dataset(
        str(folder),
        ids,
        ids[:500],
        vocab_size=len(letters),
        extra={'stoi': {c: i for i, c in enumerate(letters)}, 'itos': dict(enumerate(letters))},
    )


def test_a_data_set_that_was_prepared_again_with_another_tokenizer(tmp_path, capsys):
    """Whatever is in its place now, no model of before writes with it."""
    data, out = characters(tmp_path / 'data', 'abcdefgh'), tmp_path / 'out'
    assert run_train(data, out, '--max_iters=2', '--eval_interval=2') == 0
    for letters in ('hgfedcba', 'abcdefghijklmnop'):
        characters(tmp_path / 'data', letters)
        for command in (
            lambda: sample.main([f'--out_dir={out}', '--device=cpu']),
            lambda: export.main([f'--out_dir={out}', f'--to={tmp_path}/hf']),
        ):
            capsys.readouterr()
            assert (
                command() == 2
                and 'was prepared again, with a tokenizer that gives other ids'
                in capsys.readouterr().err
            )
    characters(tmp_path / 'data', 'abcdefgh')
    assert (
        sample.main([f'--out_dir={out}', '--device=cpu', '--max_new_tokens=2', '--num_samples=1'])
        == 0
    )


def test_samples_of_a_text_without_line_ends(tmp_path, capsys):
    data = characters(tmp_path / 'data', 'xyz')
    assert (
        run_train(
            data, tmp_path / 'out', '--max_iters=2', '--eval_interval=2', '--sample_interval=2'
        )
        == 0
    )
    capsys.readouterr()
    code, text = write(capsys, f'--out_dir={tmp_path}/out')
    assert code == 0 and text.split('parameters\n')[1].strip().startswith('x')
    assert (
        run_train(
            data, tmp_path / 'new', '--max_iters=2', '--sample_interval=2', '--sample_start=q'
        )
        == 2
    )


def test_an_older_run_without_ids_of_its_tokenizer(tmp_path, capsys):
    """Told by the description that its state.json has; it may be the same all the same."""
    import json

    from test_hostile import seal

    data, out = characters(tmp_path / 'data', 'abcdefgh'), tmp_path / 'out'
    assert run_train(data, out, '--max_iters=2', '--eval_interval=2') == 0
    path = store.path_of(str(out), 2)
    with open(f'{path}/state.json') as f:
        state = json.load(f)
    with open(f'{path}/state.json', 'w') as f:
        json.dump({key: value for key, value in state.items() if key != 'token_ids'}, f)
    seal(path)
    for letters, note in (('abcdefgh', False), ('hgfedcba', True)):
        characters(tmp_path / 'data', letters)
        capsys.readouterr()
        assert (
            sample.main(
                [f'--out_dir={out}', '--device=cpu', '--max_new_tokens=2', '--num_samples=1']
            )
            == 0
        )
        assert (
            'is not the data that this model was trained with' in capsys.readouterr().err
        ) == note
