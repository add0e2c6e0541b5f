"""A run that was killed or stopped continues to the same bits, whatever evaluation and logging do
beside it.
"""

import json
import os
import pickle
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    equal,
    losses,
    records,
    run_process,
    run_train,
    start_process,
    weights,
    write_dataset,
)

from model import Model
from onetrain.checkpoint import store
from onetrain.data.token_file import read_meta
from onetrain.model_config import resolve_shape

STEPS = 60


@pytest.fixture(scope='module')
def reference(dataset, tmp_path_factory):
    """A run of STEPS iterations that nobody disturbed."""
    out = tmp_path_factory.mktemp('reference')
    assert (
        run_train(dataset, out, f'--max_iters={STEPS}', '--eval_interval=20', '--dropout=0.1') == 0
    )
    return out


def kill_at(text, number, dataset, out, *args):
    """Start train.py, send it signal `number` when it prints `text`; returns (exit code,
    output).
    """
    process = start_process('train.py', f'--dataset={dataset}', f'--out_dir={out}', *TINY, *args)
    output = ''
    for line in process.stdout:
        output += line
        if text in line:
            process.send_signal(number)
    return process.wait(60), output


def test_two_runs_are_bitwise_equal(reference, train, tmp_path):
    assert train(tmp_path, f'--max_iters={STEPS}', '--eval_interval=20', '--dropout=0.1') == 0
    assert losses(tmp_path) == losses(reference) and len(losses(reference)) == STEPS
    assert equal(weights(tmp_path, STEPS), weights(reference, STEPS))


def test_sigkill_and_resume_is_bitwise(reference, dataset, train, tmp_path):
    code, output = kill_at(
        'saved ',
        signal.SIGKILL,
        dataset,
        tmp_path,
        f'--max_iters={STEPS}',
        '--eval_interval=20',
        '--dropout=0.1',
    )
    assert code == -signal.SIGKILL and 'iter 60/' not in output
    assert train(tmp_path, '--init_from=resume') == 0
    assert losses(tmp_path) == losses(reference)
    assert equal(weights(tmp_path, STEPS), weights(reference, STEPS))
    iterations = [r['iter'] for r in records(tmp_path)]
    assert iterations == list(range(1, STEPS + 1))  # none lost, none doubled
    assert [r['iter'] for r in records(tmp_path, 'eval')] == [0, 20, 40, 60]
    assert [r['iter'] for r in records(tmp_path, 'resume')] == [20]
    walls = [r['wall_s'] for r in records(tmp_path)]
    assert walls == sorted(walls)


@pytest.mark.parametrize('number, expected', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal_it_saves_and_goes_on(
    reference, dataset, train, tmp_path, number, expected
):
    code, output = kill_at(
        'iter 33/',
        number,
        dataset,
        tmp_path,
        f'--max_iters={STEPS}',
        '--eval_interval=20',
        '--dropout=0.1',
    )
    assert code == expected and '--init_from=resume continues' in output, output
    stopped = store.steps(str(tmp_path))[-1]
    assert 33 <= stopped < STEPS
    assert train(tmp_path, '--init_from=resume') == 0
    assert losses(tmp_path) == losses(reference)
    assert equal(weights(tmp_path, STEPS), weights(reference, STEPS))


def test_evaluation_logging_and_workers_change_nothing(reference, train, tmp_path):
    assert (
        train(
            tmp_path / 'a',
            f'--max_iters={STEPS}',
            '--eval_interval=10',
            '--eval_iters=5',
            '--dropout=0.1',
        )
        == 0
    )
    assert losses(tmp_path / 'a') == losses(reference)
    assert (
        train(
            tmp_path / 'b',
            f'--max_iters={STEPS}',
            '--eval_interval=1000',
            '--dropout=0.1',
            '--log_interval=7',
            '--eval_at_start=False',
            '--use_dataloader=True',
            '--dataloader_num_workers=2',
            '--gradient_log_interval=5',
            '--sample_interval=20',
            '--sample_start=the',
        )
        == 0
    )
    sparse = losses(tmp_path / 'b')
    assert set(sparse) == {1, *range(7, STEPS, 7), *range(5, STEPS + 1, 5)}
    assert sparse == {k: v for k, v in losses(reference).items() if k in sparse}


def test_resume_falls_back_to_the_newest_whole_checkpoint(reference, train, tmp_path, capsys):
    assert train(tmp_path, '--max_iters=40', '--eval_interval=20', '--dropout=0.1') == 0
    with open(os.path.join(store.path_of(str(tmp_path), 40), '__0_0.distcp'), 'r+b') as f:
        f.seek(1000)
        f.write(b'!')
    capsys.readouterr()
    assert train(tmp_path, '--init_from=resume', f'--max_iters={STEPS}') == 0
    output = capsys.readouterr().out
    assert (
        'rejected' in output
        and 'step_00000040: __0_0.distcp does not have the checksum' in output
        and 'continuing at iter 20' in output
    )
    assert losses(tmp_path) == losses(reference)


def test_a_damaged_newest_checkpoint_never_costs_the_good_ones(train, tmp_path, capsys):
    assert train(tmp_path, '--max_iters=15', '--eval_interval=5') == 0
    with open(os.path.join(store.path_of(str(tmp_path), 15), 'state.json'), 'a') as f:
        f.write(' ')
    assert train(tmp_path, '--init_from=resume', '--max_iters=12', '--keep_checkpoints=1') == 0
    assert store.newest_whole(str(tmp_path)) == (12, [])
    assert 'rejected_step_00000015' in os.listdir(tmp_path / 'checkpoints')


def test_workers_survive_the_signal_that_stops_the_run(dataset, tmp_path):
    """scancel and systemd send SIGTERM to the whole process group: the loader's workers must not
    die before the save.
    """
    process = start_process(
        'train.py',
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}',
        *TINY,
        '--max_iters=100000',
        '--eval_interval=100000',
        '--use_dataloader=True',
        '--dataloader_num_workers=2',
    )
    output = ''
    for line in process.stdout:
        output += line
        if 'iter 33/' in line:
            os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143 and 'Traceback' not in output, output
    step, rejected = store.newest_whole(str(tmp_path))
    assert step >= 33 and not rejected


def test_other_intervals_after_resume_lose_no_record(train, tmp_path):
    assert train(tmp_path, '--max_iters=10', '--eval_interval=5') == 0
    assert (
        train(
            tmp_path,
            '--init_from=resume',
            '--max_iters=20',
            '--eval_interval=8',
            '--log_interval=3',
        )
        == 0
    )
    assert [r['iter'] for r in records(tmp_path, 'eval')] == [0, 5, 10, 16, 20]
    assert [r['iter'] for r in records(tmp_path, 'checkpoint')] == [5, 10, 16, 20]
    with open(tmp_path / 'checkpoints' / 'step_00000020' / 'state.json') as f:
        # the last came after it was saved
        assert json.load(f)['best_val_loss'] == min(
            r['val_loss'] for r in records(tmp_path, 'eval')[:-1]
        )


def test_best_loss_is_remembered_over_a_resume(train, tmp_path):
    assert train(tmp_path, '--max_iters=10', '--eval_interval=5') == 0
    best = records(tmp_path, 'eval')[-1]['val_loss']
    assert (
        train(
            tmp_path,
            '--init_from=resume',
            '--max_iters=20',
            '--learning_rate=0.3',
            '--decay_lr=False',
            '--always_save_checkpoint=False',
        )
        == 0
    )
    assert all(r['val_loss'] > best for r in records(tmp_path, 'eval')[3:])
    # none at 15, which was no improvement
    assert [r['iter'] for r in records(tmp_path, 'checkpoint')] == [5, 10, 20]


def test_other_data_is_refused_unless_allowed(train, tmp_path, dataset, capsys):
    other = write_dataset(
        str(tmp_path / 'other'), np.arange(5000) % 40, np.arange(500) % 40, vocab_size=41
    )
    out = tmp_path / 'out'
    assert train(out, '--max_iters=5', '--eval_interval=5') == 0
    before, old_best = sorted(os.listdir(out)), records(out, 'eval')[-1]['val_loss']
    assert train(out, '--init_from=resume', '--max_iters=8', f'--dataset={other}') == 2
    error = capsys.readouterr().err
    assert (
        'train.bin is not the one that this run was trained with (5,000 tokens' in error
        and 'it was 20,000 tokens' in error
        and '--allow_data_change=True' in error
    )
    assert sorted(os.listdir(out)) == before
    assert (
        train(
            out,
            '--init_from=resume',
            '--max_iters=8',
            f'--dataset={other}',
            '--allow_data_change=True',
        )
        == 0
    )
    output = capsys.readouterr().out
    assert (
        'its stream starts at position 0 (it was at 20)' in output
        and 'the best loss so far is forgotten' in output
    )
    assert [r['tokens_seen'] for r in records(out)] == [64 * i for i in range(1, 9)]
    state = store.read_state(store.path_of(str(out), 8))
    assert state['position'] == 12 and state['data']['train']['tokens'] == 5000
    evaluated = records(out, 'eval')
    # measured anew at iteration 5, on the new data
    assert [r['iter'] for r in evaluated] == [0, 5, 8] and evaluated[1]['val_loss'] != old_best
    assert state['best_val_loss'] == evaluated[1]['val_loss']  # the last came after it was saved


@pytest.mark.parametrize(
    'now', ['same ids', 'other ids', 'more ids', 'nothing named', 'what it was is gone']
)
def test_other_data_to_continue_with_must_have_the_tokenizer_of_the_run(tmp_path, capsys, now):
    """Compared by their ids; where they cannot be, the run says so and goes on."""
    ids = np.random.default_rng(0).integers(0, 20, 3000)

    def folder(name, characters, **more):
        changes = {
            'vocab_size': 20,
            'extra': {
                'stoi': {c: i for i, c in enumerate(characters)},
                'itos': dict(enumerate(characters)),
            },
            **more,
        }
        return write_dataset(str(tmp_path / name), ids, ids[:600], **changes)

    letters = 'abcdefghijklmnopqrst'
    before = folder('before', letters)
    after = folder('after', letters[::-1] if now == 'other ids' else letters, split='another')
    if now == 'more ids':  # beyond the vocabulary of the run, which cannot grow
        letters += 'uvwxyz'
        after = folder('more', letters, vocab_size=26)
    if now == 'nothing named':
        meta = read_meta(after)
        with open(os.path.join(after, 'meta.pkl'), 'wb') as f:
            pickle.dump({key: meta[key] for key in ('vocab_size', 'dtype')}, f)
    assert run_train(before, tmp_path / 'out', '--max_iters=4', '--checkpoint_interval=4') == 0
    if now == 'what it was is gone':
        shutil.rmtree(before)
        after = folder('after', letters[::-1])
    capsys.readouterr()
    code = run_train(
        after, tmp_path / 'out', '--init_from=resume', '--max_iters=8', '--allow_data_change=True'
    )
    printed = capsys.readouterr()
    assert code == (0 if now in ('same ids', 'nothing named') else 2), printed
    if code:
        assert (
            'gives other ids than the one that this run was trained with' in printed.err
            and records(tmp_path / 'out')[-1]['iter'] == 4
        )
    else:
        assert ('is the one that this run was trained with is not known' in printed.out) == (
            now == 'nothing named'
        )


def test_other_validation_data_alone_is_noticed(train, tmp_path, capsys):
    folders = [
        write_dataset(
            str(tmp_path / name), np.arange(5000) % 40, np.arange(500) % size, vocab_size=41
        )
        for name, size in (('a', 40), ('b', 30))
    ]
    assert (
        train(tmp_path / 'out', f'--dataset={folders[0]}', '--max_iters=5', '--eval_interval=100')
        == 0
    )
    assert (
        train(tmp_path / 'out', f'--dataset={folders[1]}', '--init_from=resume', '--max_iters=8')
        == 2
    )
    assert 'val.bin is not the one' in capsys.readouterr().err
    assert (
        train(
            tmp_path / 'out',
            f'--dataset={folders[1]}',
            '--init_from=resume',
            '--max_iters=8',
            '--allow_data_change=True',
        )
        == 0
    )
    # the training stream goes on
    assert store.read_state(store.path_of(str(tmp_path / 'out'), 8))['position'] == 32


def test_a_recipes_accumulation_does_not_undo_the_total_batch(train, tmp_path, capsys):
    recipe = tmp_path / 'recipe.py'
    recipe.write_text('gradient_accumulation_steps = 2\n')
    assert (
        train(
            tmp_path, str(recipe), '--total_batch_size=512', '--max_iters=2', '--eval_interval=100'
        )
        == 0
    )
    import train as trainer

    assert (
        trainer.main(
            [
                str(recipe),
                f'--out_dir={tmp_path}',
                '--init_from=resume',
                '--device=cpu',
                '--max_iters=4',
            ]
        )
        == 0
    )
    assert [r['tokens_seen'] for r in records(tmp_path)] == [512, 1024, 1536, 2048]
    # TINY sets one micro-step on the command line
    assert train(tmp_path, '--init_from=resume', '--max_iters=5') == 0
    output = capsys.readouterr().out
    assert (
        'total_batch_size=512 of the checkpoint gives way' in output
        and '64 tokens per iteration from now on (it was 512)' in output
    )


def test_resume_may_change_what_is_safe_and_says_so(train, tmp_path, capsys):
    assert train(tmp_path, '--max_iters=10', '--eval_interval=100') == 0
    assert (
        train(
            tmp_path,
            '--init_from=resume',
            '--max_iters=12',
            '--learning_rate=5e-4',
            '--batch_size=2',
        )
        == 0
    )
    output = capsys.readouterr().out
    for note in (
        'max_iters=12 from now on',
        'learning_rate=0.0005 from now on',
        'batch_size=2 from now on (command line; it was 4)',
    ):
        assert note in output
    assert [r['tokens_seen'] for r in records(tmp_path)][-3:] == [640, 672, 704]
    # no sequence twice, none left out
    assert [
        store.read_state(store.path_of(str(tmp_path), step))['position'] for step in (10, 12)
    ] == [40, 44]


@pytest.mark.parametrize(
    'change',
    [
        '--n_layer=3',
        '--n_embd=64',
        '--block_size=8',
        '--arch_preset=llama',
        '--seed=1',
        '--bias=True',
    ],
)
def test_resume_refuses_another_model(train, tmp_path, capsys, change):
    assert train(tmp_path, '--max_iters=2', '--eval_interval=100') == 0
    assert train(tmp_path, '--init_from=resume', change) == 2
    assert change[2:].split('=')[0] + '=' in capsys.readouterr().err


def test_resume_needs_only_the_folder(dataset, train, tmp_path, capsys):
    import train as trainer

    assert (
        train(
            tmp_path,
            '--max_iters=10',
            '--eval_interval=100',
            '--arch_preset=qwen3',
            '--num_key_value_heads=1',
        )
        == 0
    )
    assert (
        trainer.main(
            [f'--out_dir={tmp_path}', '--init_from=resume', '--max_iters=12', '--device=cpu']
        )
        == 0
    )
    assert sorted(losses(tmp_path)) == list(range(1, 13))


def test_eval_only_evaluates_and_exits(train, tmp_path, capsys):
    assert train(tmp_path, '--max_iters=20', '--eval_interval=20') == 0
    before = {name: os.stat(tmp_path / name).st_mtime_ns for name in os.listdir(tmp_path)}
    trained = records(tmp_path, 'eval')[-1]
    capsys.readouterr()
    assert train(tmp_path, '--init_from=resume', '--eval_only=True') == 0
    output = capsys.readouterr().out
    assert (
        f'iter 20: train loss {trained["train_loss"]:.4f}, val loss {trained["val_loss"]:.4f}'
        in output
        and 'iter 21' not in output
    )
    assert before == {name: os.stat(tmp_path / name).st_mtime_ns for name in os.listdir(tmp_path)}


def test_eval_only_with_workers_ends(dataset, train, tmp_path):
    assert train(tmp_path, '--max_iters=4', '--eval_interval=4', '--use_dataloader=True') == 0
    code, output = run_process(
        'train.py',
        f'--out_dir={tmp_path}',
        '--init_from=resume',
        '--eval_only=True',
        '--device=cpu',
        timeout=60,
    )
    assert code == 0, output


def test_an_error_with_workers_ends(dataset, tmp_path):
    """The workers ignore SIGTERM, so the process must shut them down itself, whatever ended it."""
    script = tmp_path / 'crash.py'
    script.write_text(
        'import sys, train\n\ndef broken(*args): raise'
        ' RuntimeError("planted")\ntrain.optim.clip_gradients ='
        ' broken\nsys.exit(train.main(sys.argv[1:]))\n'
    )
    code, output = run_process(
        str(script),
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}/out',
        *TINY,
        '--use_dataloader=True',
        timeout=60,
        env={'PYTHONPATH': ROOT},
    )
    assert code == 1 and 'planted' in output, output


def test_starting_again_destroys_nothing(train, tmp_path, capsys, dataset):
    kill_at(
        'saved ',
        signal.SIGKILL,
        dataset,
        tmp_path,
        '--max_iters=600',
        '--eval_interval=20',
        '--keep_all_checkpoints=True',
    )
    for step in store.steps(str(tmp_path))[1:]:
        store.remove(store.path_of(str(tmp_path), step), step)
    unfinished = weights(tmp_path, 20)
    assert train(tmp_path, '--max_iters=60') == 2
    error = capsys.readouterr().err
    assert (
        'holds an unfinished run' in error
        and '--init_from=resume' in error
        and '--out_dir' in error
    )
    assert equal(weights(tmp_path, 20), unfinished)
    # a finished one has nothing to continue: its checkpoints are kept under another name
    assert train(tmp_path, '--init_from=resume', '--max_iters=25') == 0
    assert train(tmp_path, '--max_iters=3') == 0
    output = capsys.readouterr().out
    aside = [name for name in os.listdir(tmp_path) if name.startswith('checkpoints_run_')]
    assert len(aside) == 1 and f'its checkpoints are now in {tmp_path}/{aside[0]}' in output
    assert store.corruption_reason(str(tmp_path / aside[0] / 'step_00000025')) is None
    assert store.steps(str(tmp_path)) == [3]


def test_best_only_saving(train, tmp_path):
    assert (
        train(
            tmp_path,
            '--max_iters=30',
            '--eval_interval=10',
            '--always_save_checkpoint=False',
            '--learning_rate=1.0',
            '--decay_lr=False',
        )
        == 0
    )
    saved, evaluated = records(tmp_path, 'checkpoint'), records(tmp_path, 'eval')
    best, expected = evaluated[0]['val_loss'], []
    for record in evaluated[1:]:
        if record['val_loss'] < best:
            best, expected = record['val_loss'], expected + [record['iter']]
    assert [r['iter'] for r in saved] == sorted({*expected, 30})


def test_ckpt_of_nanogpt_is_imported_and_continued(train, tmp_path, dataset):
    """nanoGPT's file is rebuilt with its own layout: parameters numbered decayed first, _orig_mod.
    prefix, exact GELU.
    """
    shape = resolve_shape(
        dict(
            arch_preset='gpt2',
            activation='gelu',
            n_layer=2,
            n_head=2,
            n_embd=32,
            block_size=16,
            vocab_size=48,
            bias=False,
        )
    )
    model = Model(shape)
    model.init_weights(3)
    named = dict(model.named_parameters())
    groups = [
        {'params': [p for p in named.values() if p.dim() >= 2], 'weight_decay': 0.1},
        {'params': [p for p in named.values() if p.dim() < 2], 'weight_decay': 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for _ in range(3):
        idx = torch.randint(48, (4, 16))
        model(idx, idx).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(
        {
            'model': {f'_orig_mod.{n}': t for n, t in model.state_dict().items()},
            'optimizer': optimizer.state_dict(),
            'model_args': dict(
                n_layer=2,
                n_head=2,
                n_embd=32,
                block_size=16,
                bias=False,
                vocab_size=48,
                dropout=0.0,
            ),
            'iter_num': 3,
            'best_val_loss': torch.tensor(3.5),
            'config': {
                'learning_rate': 1e-3,
                'dtype': 'float16',
                'batch_size': 4,
                'device': 'cuda',
            },
        },
        tmp_path / 'ckpt.pt',
    )
    assert (
        train(
            tmp_path,
            '--init_from=resume',
            '--max_iters=4',
            '--warmup_iters=0',
            '--decay_lr=False',
            '--weight_decay=0.1',
        )
        == 0
    )
    # one step by hand from the same state
    from onetrain.data.dataset import open_dataset
    from onetrain.data.order import WindowOrder

    file = open_dataset(dataset, '/')[0]
    window = file.windows(WindowOrder(len(file), 16, 1337).starts(3 * 4, 4), 16)
    loss = model(window[:, :-1], window[:, 1:])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert losses(tmp_path)[4] == pytest.approx(loss.item(), abs=1e-6)
    continued = weights(tmp_path, 4)
    for name, p in model.named_parameters():
        assert torch.allclose(continued[f'model.{name}'], p, atol=1e-6), name
        assert torch.allclose(
            continued[f'optimizer.exp_avg_sq.{name}'], optimizer.state[p]['exp_avg_sq'], atol=1e-9
        ), name
    assert os.path.exists(tmp_path / 'ckpt.pt')


def test_scheduled_state_is_in_the_checkpoint(train, tmp_path):
    assert train(tmp_path, '--max_iters=20', '--eval_interval=10') == 0
    with open(tmp_path / 'checkpoints' / 'step_00000020' / 'state.json') as f:
        state = json.load(f)
    assert (
        state['step'] == 20
        and state['position'] == 80
        and state['tokens'] == 1280
        and state['world_size'] == 1
    )
    assert (
        state['best_val_loss'] == min(r['val_loss'] for r in records(tmp_path, 'eval')[:2])
        and state['versions']['torch'] == torch.__version__
    )
    assert state['config']['vocab_size'] and state['config']['d_ff'] == 128


def descendant_logits(w, idx, n_layer, n_head, n_kv, theta):
    """A LLaMA as nanoGPT's descendant computes it: q apart from kv, gate from value, RoPE as
    complex numbers on neighboring dimensions.
    """

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    def turn(x):
        d, t = x.size(-1), x.size(1)
        angles = torch.outer(torch.arange(t).float(), theta ** (-torch.arange(0, d, 2).float() / d))
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], d // 2, 2).contiguous())
        return torch.view_as_real(
            pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]
        ).flatten(-2)

    x = w['token_embeddings.weight'][idx]
    for i in range(n_layer):
        b = f'blocks.{i}.'
        y = norm(x, w[b + 'norm1.weight'])
        q = (y @ w[b + 'attn.c_q.weight'].T).unflatten(-1, (n_head, -1))
        k, v = (y @ w[b + 'attn.c_kv.weight'].T).chunk(2, dim=-1)
        k, v = (
            z.unflatten(-1, (n_kv, -1)).repeat_interleave(n_head // n_kv, dim=2)
            for z in (turn(k.unflatten(-1, (n_kv, -1))).flatten(2), v)
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            turn(q).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + out.transpose(1, 2).flatten(2) @ w[b + 'attn.c_proj.weight'].T
        y = norm(x, w[b + 'norm2.weight'])
        x = (
            x
            + (
                torch.nn.functional.silu(y @ w[b + 'ffn.w_gate.weight'].T)
                * (y @ w[b + 'ffn.w_value.weight'].T)
            )
            @ w[b + 'ffn.w_out.weight'].T
        )
    return norm(x, w['final_norm.weight']) @ w['lm_head.weight'].T


def test_ckpt_of_its_descendant_is_imported(train, tmp_path, dataset, capsys):
    """Other names, q and kv apart, interleaved RoPE: the imported model computes what its own did,
    and trains on from its iteration.
    """
    from model import Model
    from onetrain.checkpoint import import_nanogpt
    from onetrain.model_config import resolve_shape

    sizes = dict(
        n_layer=2,
        n_head=4,
        n_embd=32,
        block_size=16,
        num_key_value_heads=2,
        d_ff=48,
        norm_eps=1e-5,
        rope_theta=500.0,
        vocab_size=41,
    )
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    w = {
        'token_embeddings.weight': draw(41, 32),
        'final_norm.weight': 1 + draw(32),
        'lm_head.weight': draw(41, 32),
    }
    for i in range(2):
        for name, *shape in (
            ('norm1', 32),
            ('norm2', 32),
            ('attn.c_q', 32, 32),
            ('attn.c_kv', 32, 32),
            ('attn.c_proj', 32, 32),
            ('ffn.w_gate', 48, 32),
            ('ffn.w_value', 48, 32),
            ('ffn.w_out', 32, 48),
        ):
            w[f'blocks.{i}.{name}.weight'] = draw(*shape)
    torch.save(
        {
            'model': {f'_orig_mod.{name}': tensor for name, tensor in w.items()},
            'iter_num': 7,
            'best_val_loss': 3.25,
            'model_args': {**sizes, 'arch_preset': 'llama'},
            'config': {'learning_rate': 1e-3, 'dtype': 'bfloat16', 'batch_size': 4},
        },
        tmp_path / 'ckpt.pt',
    )
    read = import_nanogpt.read_checkpoint(str(tmp_path / 'ckpt.pt'))
    model = Model(resolve_shape(read['config']))
    model.fill(read['model'].items())
    idx = torch.randint(41, (2, 16), generator=generator)
    assert torch.allclose(model(idx), descendant_logits(w, idx, 2, 4, 2, 500.0), atol=1e-4)
    assert (
        train(
            tmp_path,
            '--init_from=resume',
            '--n_head=4',
            '--max_iters=9',
            '--eval_interval=9',
            '--eval_at_start=False',
        )
        == 0
    )
    assert 'iter 9/9:' in capsys.readouterr().out
    torch.save(
        {
            'model': {
                'token_embeddings.weight': draw(41, 32),
                'blocks.0.mystery.weight': draw(2, 2),
            },
            'iter_num': 7,
            'best_val_loss': 3.25,
            'model_args': sizes,
            'config': {},
        },
        tmp_path / 'ckpt.pt',
    )
    with pytest.raises(ValueError, match='the weights blocks.0.mystery.weight are not known here'):
        import_nanogpt.read_checkpoint(str(tmp_path / 'ckpt.pt'))
