"""evaluate.py: loss over every token once, bits per byte, tasks as lm-eval scores them, the same on
several processes.
"""

import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import ROOT, run_process, run_ranks, run_train, write_dataset
from test_export import hugging_face_like

import evaluate
import export
from load import load_run
from onetrain import generation
from onetrain.config import UserError
from onetrain.data.token_file import TokenFileWriter
from onetrain.evaluation import multiple_choice

FILES = {
    name: os.path.join(ROOT, 'tests', 'tasks', f'{name}.jsonl')
    for name in ('hellaswag', 'arc_easy', 'openbookqa', 'piqa')
}
WORDS = ','.join(f'{name}:{path}' for name, path in FILES.items())


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run on the project's own source with a byte-level BPE."""
    folder = tmp_path_factory.mktemp('trained')
    text = ''.join(
        open(os.path.join(ROOT, name), encoding='utf-8').read()
        for name in ('train.py', 'model.py', 'TRAINING_GUIDE.md')
    )
    (folder / 'tokenizer').mkdir()
    tokenizer = hugging_face_like(text, folder / 'tokenizer')
    ids = tokenizer.encode(text)
    with TokenFileWriter(
        str(folder / 'data'),
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer=tokenizer.describe(str(folder / 'data')),
        split='as given',
    ) as writer:
        writer.write('train', ids[:-3001])
        writer.write('val', [*ids[-3001:-1500], tokenizer.eot_id, *ids[-1500:]])
    assert (
        run_train(
            str(folder / 'data'),
            folder / 'run',
            '--max_iters=150',
            '--eval_interval=75',
            '--arch_preset=llama',
            '--block_size=64',
            '--batch_size=8',
            '--learning_rate=5e-3',
            '--n_embd=64',
        )
        == 0
    )
    return folder


def results(folder, step=150):
    with open(folder / 'run' / f'evaluation_{step:08d}.json') as f:
        return json.load(f)


def test_loss_is_that_of_every_token_once(trained, capsys):
    assert evaluate.main([f'--out_dir={trained}/run', '--device=cpu', '--batch_size=3']) == 0
    found = results(trained)['loss']
    model, tokenizer, _, _ = load_run(
        str(trained / 'run'), None, torch.device('cpu'), torch.float32
    )
    import numpy as np

    ids = torch.from_numpy(
        np.fromfile(trained / 'data' / 'val.bin', dtype=np.uint16).astype('int64')
    )
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 64):
            window = ids[start : start + 65][None]
            total += model(window[:, :-1], window[:, 1:], reduction='sum').item()
    assert found['tokens'] == len(ids) - 1 and found['loss'] == pytest.approx(
        total / (len(ids) - 1), abs=1e-5
    )
    text = tokenizer.decode([i for i in ids[1:].tolist() if i != tokenizer.eot_id])
    assert found['bits_per_byte'] == pytest.approx(
        total / math.log(2) / len(text.encode()), rel=1e-3
    ) and found['perplexity'] == pytest.approx(math.exp(found['loss']))
    assert f'loss {found["loss"]:.4f}' in capsys.readouterr().out
    assert (
        evaluate.main([f'--out_dir={trained}/run', '--device=cpu', '--tokens=100']) == 0
        and results(trained)['loss']['tokens'] == 99
    )


def test_two_processes_find_what_one_does(trained):
    for size in (1, 2):
        args = [
            'evaluate.py',
            f'--out_dir={trained}/run',
            '--device=cpu',
            f'--tasks={WORDS}',
            '--batch_size=3',
            f'--json={trained}/{size}.json',
        ]
        code, output = (
            run_process(*args) if size == 1 else run_ranks(2, *args[1:], script='evaluate.py')
        )
        assert code == 0, output
        assert output.count('piqa: acc') == 1
    one, two = (json.loads((trained / f'{size}.json').read_text()) for size in (1, 2))
    assert (
        one['tasks'] == two['tasks']
        and one['loss']['loss'] == pytest.approx(two['loss']['loss'], abs=1e-6)
        and one['loss']['tokens'] == two['loss']['tokens']
    )


def test_scores_are_those_of_lm_eval(trained, tmp_path, monkeypatch, capsys):
    """The same items through lm-eval on the exported folder."""
    lm_eval = pytest.importorskip('lm_eval')
    for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'):
        monkeypatch.setenv(name, '1')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    assert export.main([f'--out_dir={trained}/run', f'--to={tmp_path}/hf']) == 0
    assert (
        evaluate.main(
            [
                f'--out_dir={trained}/run',
                '--device=cpu',
                '--no_loss',
                f'--tasks={WORDS}',
                f'--json={tmp_path}/ours.json',
            ]
        )
        == 0
    )
    ours = json.loads((tmp_path / 'ours.json').read_text())['tasks']
    (tmp_path / 'yaml').mkdir()
    where = {
        'hellaswag': 'hellaswag/hellaswag',
        'arc_easy': 'arc/arc_easy',
        'openbookqa': 'openbookqa/openbookqa',
        'piqa': 'piqa/piqa',
    }
    for name, path in FILES.items():
        (tmp_path / 'yaml' / f'{name}.yaml').write_text(
            f'include: {os.path.dirname(lm_eval.__file__)}/tasks/{where[name]}.yaml\ntask:'
            f' local_{name}\ntag: null\ndataset_path: json\ndataset_name: null\ndataset_kwargs:\n '
            f' data_files:\n    validation: {path}\ntraining_split: null\nvalidation_split:'
            ' validation\ntest_split: null\n'
        )
    model = HFLM(pretrained=str(tmp_path / 'hf'), device='cpu', dtype='float32', batch_size=2)
    theirs = lm_eval.simple_evaluate(
        model,
        tasks=[f'local_{name}' for name in FILES],
        task_manager=TaskManager(include_path=str(tmp_path / 'yaml'), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    for name in FILES:
        found = theirs['results'][f'local_{name}']
        assert (ours[name]['acc'], ours[name]['acc_norm']) == (
            found['acc,none'],
            found['acc_norm,none'],
        ), name
    assert len({score['acc'] for score in ours.values()}) > 1
    # and each log-likelihood
    loaded, tokenizer, _, _ = load_run(
        str(trained / 'run'), None, torch.device('cpu'), torch.float32
    )
    for name, items in multiple_choice.load_tasks(WORDS).items():
        made = multiple_choice.encode_items({name: items}, tokenizer, 64)[name][1]
        mine = multiple_choice.log_likelihoods(loaded, made, 4, torch.device('cpu'))
        sampled = sorted(theirs['samples'][f'local_{name}'], key=lambda s: s['doc_id'])
        expected = [float(answer[0]) for s in sampled for answer in s['filtered_resps']]
        assert [mine[i] for i in range(len(made))] == pytest.approx(expected, abs=1e-3), name


def test_items_of_every_format():
    found = multiple_choice.load_tasks(WORDS)
    assert {name: len(items) for name, items in found.items()} == {
        'hellaswag': 5,
        'arc_easy': 8,
        'openbookqa': 6,
        'piqa': 6,
    }
    assert (
        found['hellaswag'][2].question
        == 'How to plant a seed. Find a pot.: Fill it with earth and make a small hole with a'
        ' finger. Then'
    )
    assert '[step]' not in found['hellaswag'][0].choices[2] and found['hellaswag'][1].answer == 1
    assert found['arc_easy'][0] == multiple_choice.Item(
        'Question: Which of these is a source of light?\nAnswer:',
        ['a stone', 'a candle', 'a cloud', 'a shoe'],
        1,
    )
    assert len(multiple_choice.load_tasks(WORDS, 2)['piqa']) == 2


def test_only_the_answer_counts():
    item = multiple_choice.Item('ab', ['cd', 'c'], 0)
    made = multiple_choice.make_requests([item], lambda text: [ord(c) for c in text], None, 100)
    assert made == [([97, 98, 32, 99, 100], 3), ([97, 98, 32, 99], 2)]
    logits = torch.zeros(1, 8, 128)
    logits[..., 99] = 3.0
    found = multiple_choice.log_likelihoods(
        lambda idx: logits.expand(len(idx), -1, -1)[:, : idx.size(1)], made, 2, torch.device('cpu')
    )
    p = logits[0, 0].log_softmax(-1)
    assert found[1] == pytest.approx((p[32] + p[99]).item()) and found[0] == pytest.approx(
        (p[32] + p[99] + p[100]).item()
    )
    assert multiple_choice.score_items([item], [-1.0, -0.9]) == {
        'acc': 0.0,
        'acc_norm': 1.0,
        'chance': 0.5,
        'items': 1,
    }
    # a context of 2 tokens
    assert multiple_choice.make_requests([item], lambda text: [ord(c) for c in text], None, 2)[
        0
    ] == (
        [32, 99, 100],
        2,
    )


def test_speed_prompts_and_what_was_found_before(trained, tmp_path, capsys):
    (tmp_path / 'prompts.txt').write_text('def \nclass A\n')
    assert (
        evaluate.main([f'--out_dir={trained}/run', '--device=cpu', '--step=75', '--tokens=200'])
        == 0
    )
    assert (
        evaluate.main(
            [
                f'--out_dir={trained}/run',
                '--device=cpu',
                '--step=75',
                '--no_loss',
                '--speed',
                f'--prompts={tmp_path}/prompts.txt',
                '--max_new_tokens=5',
            ]
        )
        == 0
    )
    found = results(trained, 75)
    assert (
        found['loss']['tokens'] == 199
        and [row['prompt'] for row in found['written']] == ['def ', 'class A']
        and all(row['text'] for row in found['written'])
    )
    assert {(row['batch'], row['length']) for row in found['speed']} == {(1, 56), (8, 56)} and all(
        row['prefill_tokens_per_s'] > row['decode_tokens_per_s'] > 0 for row in found['speed']
    )
    assert '---- class A' in capsys.readouterr().out


@pytest.mark.parametrize(
    'args, message',
    [
        (['--tasks=hellaswg'], "unknown task 'hellaswg', did you mean 'hellaswag'"),
        (
            ['--tasks=piqa:nowhere.jsonl'],
            'nowhere.jsonl cannot be read (No such file or directory)',
        ),
        ([f'--tasks=piqa:{FILES["arc_easy"]}'], "line 1: not an item of piqa (KeyError: 'goal')"),
        (['--prompts=nowhere.txt'], '--prompts=nowhere.txt: no such file'),
        (['--out_dir=nowhere'], 'no checkpoint to load'),
        (['--limit=0'], '--limit=0 must be at least 1'),
        (['--hf=./nowhere'], 'no local folder and could not be fetched'),
    ],
)
def test_bad_input_is_told(trained, capsys, args, message):
    assert evaluate.main([f'--out_dir={trained}/run', '--device=cpu', *args]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_documents_are_kept_apart_if_they_were_in_training(trained, tmp_path):
    assert (
        run_train(
            f'{trained}/data',
            tmp_path / 'run',
            '--max_iters=30',
            '--eval_interval=30',
            '--arch_preset=llama',
            '--block_size=64',
            '--document_mask=True',
            '--eval_iters=100000',
        )
        == 0
    )
    from conftest import records

    assert (
        evaluate.main([f'--out_dir={tmp_path}/run', '--device=cpu', f'--json={tmp_path}/x.json'])
        == 0
    )
    model, _, _, _ = load_run(str(tmp_path / 'run'), None, torch.device('cpu'), torch.float32)
    assert model.document_end is not None
    found = json.loads((tmp_path / 'x.json').read_text())['loss']['loss']
    logged = records(tmp_path / 'run', 'eval')[-1]['val_loss']
    # the last window, which is shorter, is not in the run's
    assert found == pytest.approx(logged, abs=0.02)


def test_results_are_kept_for_the_same_weights_only(trained, tmp_path, capsys):
    assert export.main([f'--out_dir={trained}/run', f'--to={tmp_path}/hf', '--no_check']) == 0
    common = ['--device=cpu', f'--tasks=piqa:{FILES["piqa"]}']
    assert evaluate.main([f'--hf={tmp_path}/hf', *common, '--no_loss']) == 0
    assert (
        evaluate.main(
            [f'--hf={tmp_path}/hf/', '--device=cpu', f'--dataset={trained}/data', '--tokens=100']
        )
        == 0
    )
    found = json.loads((tmp_path / 'hf' / 'evaluation.json').read_text())
    assert found['tasks']['piqa']['items'] == 6 and found['loss']['tokens'] == 99
    assert (
        export.main([f'--out_dir={trained}/run', f'--to={tmp_path}/hf', '--no_check', '--step=75'])
        == 0
    )
    assert evaluate.main([f'--hf={tmp_path}/hf', *common, '--no_loss']) == 0
    assert 'loss' not in json.loads((tmp_path / 'hf' / 'evaluation.json').read_text())
    assert (
        evaluate.main(
            [
                f'--out_dir={trained}/run',
                *common,
                '--no_loss',
                f'--json={tmp_path}/new/folder/x.json',
            ]
        )
        == 0
        and (tmp_path / 'new' / 'folder' / 'x.json').exists()
    )


def test_results_under_other_conditions_are_not_mixed(trained, tmp_path, capsys):
    common = [
        f'--out_dir={trained}/run',
        '--device=cpu',
        '--tokens=100',
        f'--json={tmp_path}/x.json',
    ]
    assert evaluate.main(common) == 0
    before = json.loads((tmp_path / 'x.json').read_text())
    assert before['loss']['conditions'] == {
        'block_size': 64,
        'rope_scaling': 'none',
        'rope_factor': 1.0,
        'dtype': 'float32',
    }
    for more, words in (
        (['--block_size=4'], "{'block_size': 64} where this is {'block_size': 4}"),
        (['--dtype=bfloat16'], "{'dtype': 'float32'} where this is {'dtype': 'bfloat16'}"),
    ):
        capsys.readouterr()
        assert evaluate.main([*common, *more]) == 2 and words in capsys.readouterr().err
    assert json.loads((tmp_path / 'x.json').read_text()) == before
    for name, content in (('notes.txt', 'keep'), ('other.json', '{"a": 1}'), ('list.json', '[1]')):
        (tmp_path / name).write_text(content)
        assert (
            evaluate.main([*common, f'--json={tmp_path}/{name}']) == 2
            and 'holds something else than results of evaluate.py' in capsys.readouterr().err
        )
        assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize('label', [0.9, True, '-1', '1.0', '²', None, [0]])
def test_labels_are_whole_numbers(tmp_path, label):
    for number, right in enumerate((0, '1')):
        (tmp_path / 'a.jsonl').write_text(
            json.dumps({'goal': 'a', 'sol1': 'b', 'sol2': 'c', 'label': right}) + '\n'
        )
        assert multiple_choice.load_tasks(f'piqa:{tmp_path}/a.jsonl')['piqa'][0].answer == number
    (tmp_path / 'a.jsonl').write_text(
        json.dumps({'goal': 'a', 'sol1': 'b', 'sol2': 'c', 'label': label}) + '\n'
    )
    with pytest.raises(UserError, match='line 1: not an item of piqa'):
        multiple_choice.load_tasks(f'piqa:{tmp_path}/a.jsonl')
    with pytest.raises(UserError, match='piqa is named twice'):
        multiple_choice.load_tasks(f'piqa:{FILES["piqa"]},piqa:{tmp_path}/a.jsonl')


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbfThe')
    assert generation.lines_of(str(tmp_path / 'a.txt'), '') == ['The']


def test_data_of_another_tokenizer_and_tasks_it_cannot_spell(trained, dataset, tmp_path, capsys):
    assert evaluate.main([f'--out_dir={trained}/run', '--device=cpu', f'--dataset={dataset}']) == 2
    assert 'was made with another tokenizer than the model' in capsys.readouterr().err
    for more in ([], ['--eval_only=True', '--init_from=resume']):
        if more:
            assert run_train(dataset, tmp_path / 'run', '--max_iters=2', '--eval_interval=2') == 0
            capsys.readouterr()
        assert (
            run_train(
                dataset,
                tmp_path / 'run',
                '--max_iters=2',
                f'--eval_tasks=piqa:{FILES["piqa"]}',
                *more,
            )
            == 2
        )
        assert (
            'the tasks piqa cannot be asked with this tokenizer: the character'
            in capsys.readouterr().err
        )
    assert (
        run_train(
            f'{trained}/data',
            trained / 'run',
            '--init_from=resume',
            '--eval_only=True',
            '--max_iters=150',
            '--arch_preset=llama',
            '--block_size=64',
            '--n_embd=64',
            f'--eval_tasks=piqa:{FILES["piqa"]}',
        )
        == 0
    )
    assert ', piqa ' in capsys.readouterr().out


def test_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(
        UserError,
        match=(
            'hellaswag (could not be fetched from the hub|comes from the hub, which needs the'
            ' package datasets)'
        ),
    ):
        multiple_choice.load_tasks('hellaswag')


@pytest.mark.parametrize('layout', [[], ['--use_fsdp=True']])
def test_tasks_at_evaluations_of_a_run(trained, tmp_path, layout):
    """The scores in the log are those of evaluate.py for that checkpoint, on one process and under
    FSDP.
    """
    from conftest import records
    from ranks import train as train_on

    code, output = train_on(
        2 if layout else 1,
        f'--dataset={trained}/data',
        f'--out_dir={tmp_path}/run',
        '--device=cpu',
        '--compile=False',
        '--arch_preset=llama',
        '--n_layer=1',
        '--n_head=2',
        '--n_embd=32',
        '--block_size=64',
        '--batch_size=4',
        '--gradient_accumulation_steps=1',
        '--max_iters=4',
        '--eval_interval=4',
        '--eval_iters=1',
        f'--eval_tasks={WORDS}',
        '--eval_tasks_limit=4',
        *layout,
    )
    assert code == 0, output
    found = records(tmp_path / 'run', 'eval')[-1]['tasks']
    assert ', hellaswag ' in output and found['piqa']['items'] == 4
    assert (
        evaluate.main(
            [
                f'--out_dir={tmp_path}/run',
                '--device=cpu',
                f'--tasks={WORDS}',
                '--limit=4',
                f'--json={tmp_path}/x.json',
                '--no_loss',
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / 'x.json').read_text())['tasks'] == {
        name: {
            **one,
            'file': dict(word.split(':') for word in WORDS.split(','))[name],
            'limit': 4,
            'conditions': {
                'block_size': 64,
                'rope_scaling': 'none',
                'rope_factor': 1.0,
                'dtype': 'float32',
            },
        }
        for name, one in found.items()
    }


def test_the_sources_of_a_mixture(tmp_path, capsys):
    """Each in turn, and their mean by the shares."""
    made = [
        write_dataset(
            str(tmp_path / name), np.arange(3000) % 40, np.arange(first, first + 400) % 40
        )
        for name, first in (('a', 0), ('b', 7))
    ]
    spec = f'{made[0]}:0.75,{made[1]}:0.25'
    assert run_train(spec, tmp_path / 'run', '--max_iters=2', '--eval_interval=2') == 0
    capsys.readouterr()
    assert evaluate.main([f'--out_dir={tmp_path}/run']) == 0
    with open(tmp_path / 'run' / 'evaluation_00000002.json') as f:
        found = json.load(f)['losses']
    a, b = (found[f'{name} val']['loss'] for name in made)
    assert f'loss {0.75 * a + 0.25 * b:.4f}, by the shares' in capsys.readouterr().out
    assert evaluate.main([f'--out_dir={tmp_path}/run', f'--data_url=file://{made[0]}']) == 2
    assert 'holds one data set, not the mixture' in capsys.readouterr().err
