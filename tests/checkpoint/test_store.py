"""A checkpoint that loads is whole: damage anywhere is refused by name, older ones go last, nothing
in it is executed.
"""

import json
import os
import pickle

import pytest
import torch

from onetrain.checkpoint import import_nanogpt, store
from onetrain.checkpoint.async_writer import Saver
from onetrain.config import UserError
from onetrain.distributed.processes import World

ONE = World(0, 1, torch.device('cpu'))


def tensors(value=1.0):
    return {
        'model.a': torch.full((5, 3), value),
        'optimizer.step.a': torch.tensor(value),
        'optimizer.exp_avg.a': torch.full((5, 3), 2 * value),
    }


SHAPE = {
    'arch_preset': 'gpt2',
    'n_layer': 1,
    'n_head': 1,
    'n_embd': 8,
    'block_size': 8,
    'vocab_size': 8,
}


def save(out_dir, step, value=None, **options):
    """The path of a checkpoint of tensors(value), written in the foreground."""
    saver = Saver(str(out_dir), ONE, background=False, **options)
    saver.start(
        step,
        tensors(step if value is None else value),
        {'config': {**SHAPE, 'x': 1}, 'position': step * 10},
    )
    outcome = saver.wait()
    assert outcome.error is None, outcome
    return outcome.path


def test_saved_is_loaded(tmp_path):
    path = save(tmp_path, 7)
    into = tensors(0.0)
    store.load(path, into)
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors(7.0).items())
    state = store.read_state(path)
    assert state['step'] == 7 and state['position'] == 70 and state['config'] == {**SHAPE, 'x': 1}
    assert store.newest_whole(str(tmp_path)) == (7, [])
    assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['step_00000007']


def test_any_damage_is_refused_by_name_and_the_older_one_used(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    store.record_evaluation(path, {'train': 1.0, 'val': 2.0, 'data': 'x'})
    names = sorted(os.listdir(path))
    assert names == ['.metadata', '__0_0.distcp', 'evaluation.json', 'manifest.json', 'state.json']
    tried = 0
    for name in names:
        file = os.path.join(path, name)
        with open(file, 'rb') as f:
            good = f.read()
        damaged = [good[:-1], good + b'\n']
        for at in {0, len(good) // 3, len(good) // 2, len(good) - 2, len(good) - 1}:
            for bit in (1, 4, 32):
                damaged.append(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
        for bad in damaged:
            with open(file, 'wb') as f:
                f.write(bad)
            step, rejected = store.newest_whole(str(tmp_path))
            assert step == 1 and rejected[0][0] == path and rejected[0][1].startswith(name), (
                name,
                rejected,
            )
            tried += 1
        os.remove(file)
        if name != 'evaluation.json':  # which is not there before the losses are known
            step, rejected = store.newest_whole(str(tmp_path))
            assert step == 1 and rejected[0][1].startswith(f'{name} is missing'), (name, rejected)
        with open(file, 'wb') as f:
            f.write(good)
        assert store.newest_whole(str(tmp_path)) == (2, [])
    assert tried > 80


def test_every_single_bit_of_the_manifest_counts(tmp_path):
    path = save(tmp_path, 1)
    with open(os.path.join(path, 'manifest.json'), 'rb') as f:
        good = f.read()
    assert store.verify_checksum(good)['step'] == 1
    for at in range(len(good)):
        with pytest.raises(ValueError):
            store.verify_checksum(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])


def test_level_size_reads_no_tensors_but_sees_sizes(tmp_path):
    path = save(tmp_path, 1)
    with open(os.path.join(path, '__0_0.distcp'), 'r+b') as f:
        f.write(b'?')
    assert store.corruption_reason(
        path, 'size'
    ) is None and '__0_0.distcp' in store.corruption_reason(path, 'full')
    with open(os.path.join(path, '__0_0.distcp'), 'ab') as f:
        f.write(b'?')
    assert 'bytes, expected' in store.corruption_reason(path, 'size')


def test_a_renamed_checkpoint_is_not_another_step(tmp_path):
    os.rename(save(tmp_path, 1), store.path_of(str(tmp_path), 2))
    assert store.newest_whole(str(tmp_path))[1][0][1] == 'manifest.json is that of step 1'


def test_a_half_written_one_is_not_seen(tmp_path):
    save(tmp_path, 1)
    os.makedirs(tmp_path / 'checkpoints' / '.writing_step_00000002')
    assert store.steps(str(tmp_path)) == [1]
    save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['step_00000001', 'step_00000002']


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, value=1.0)
    path = save(tmp_path, 1, value=5.0)
    into = tensors(0.0)
    store.load(path, into)
    assert into['model.a'][0, 0] == 5.0 and os.listdir(tmp_path / 'checkpoints') == [
        'step_00000001'
    ]


def test_newest_and_best_stay(tmp_path):
    out = str(tmp_path)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, None)):
        save(tmp_path, step, keep=2)
        if loss:
            store.record_evaluation(
                store.path_of(out, step), {'train': loss, 'val': loss, 'data': 'x'}
            )
    assert store.steps(out) == [2, 4, 5] and store.best_step(out) == 2
    # the recorded evaluation does not break the manifest
    assert store.corruption_reason(store.path_of(out, 2)) is None
    save(tmp_path, 6, keep_all=True)
    assert store.steps(out) == [2, 4, 5, 6]
    # a loss on other validation data is no rival
    store.record_evaluation(store.path_of(out, 6), {'train': 9.0, 'val': 9.0, 'data': 'y'})
    assert store.best_step(out) == 6


def test_milestones_stay(tmp_path):
    for step in range(1, 12):
        save(tmp_path, step, keep=1, keep_every=4)
    assert store.steps(str(tmp_path)) == [4, 8, 11]


def test_a_removal_that_fails_is_told_and_stops_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def stuck(path, step):
        raise OSError(16, 'Device or resource busy', path)

    monkeypatch.setattr(store, 'remove', stuck)
    saver = Saver(str(tmp_path), ONE, keep=1)
    saver.start(2, tensors(2.0), {})
    outcome = saver.wait()
    assert (
        outcome.error is None
        and 'step_00000001 could not be removed: Device or resource busy' in outcome.notes[0]
    )
    assert store.steps(str(tmp_path)) == [1, 2]


def test_a_newer_damaged_one_does_not_push_out_the_one_just_saved(tmp_path):
    out = str(tmp_path)
    for step in (1, 8, 9):
        save(tmp_path, step, keep_all=True)
    for step in (8, 9):
        (tmp_path / 'checkpoints' / f'step_{step:08d}' / 'state.json').write_text('{')
    save(tmp_path, 2, keep=1)
    assert store.newest_whole(out)[0] == 2
    for path, _ in store.newest_whole(out)[1]:
        store.rename_aside(path, 'rejected')
    assert store.steps(out) == [2] and 'rejected_step_00000009' in os.listdir(
        tmp_path / 'checkpoints'
    )


def test_what_interrupted_saves_left_is_tidied(tmp_path):
    path = save(tmp_path, 1)
    # killed between the two renames
    os.rename(path, tmp_path / 'checkpoints' / '.replaced_step_00000001')
    os.makedirs(tmp_path / 'checkpoints' / '.writing_step_00000002')
    store.clean_partial(str(tmp_path))
    assert (
        os.listdir(tmp_path / 'checkpoints') == ['step_00000001']
        and store.corruption_reason(path) is None
    )


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    path = save(tmp_path, 1)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)

    with open(os.path.join(path, '.metadata'), 'wb') as f:
        pickle.dump(Evil(), f)
    with pytest.raises(BaseException, match='not admitted'):
        store.load(path, tensors())
    assert not (tmp_path / 'executed').exists()
    torch.save({'model': Evil()}, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='is not a checkpoint of nanoGPT'):
        import_nanogpt.read_checkpoint(str(tmp_path / 'ckpt.pt'))
    assert not (tmp_path / 'executed').exists()


def test_shapes_and_names_must_match(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(
        UserError,
        match=(
            r'has model.a of shape \(5, 3\), and the model of its settings has model.a of shape'
            r' \(4, 3\)'
        ),
    ):
        store.load(path, {'model.a': torch.zeros(4, 3)})
    with pytest.raises(UserError, match='has no model.b'):
        store.load(path, {'model.b': torch.zeros(5, 3)})


def test_manifest_states_size_checksum_and_configuration(tmp_path):
    path = save(tmp_path, 1)
    with open(os.path.join(path, 'manifest.json')) as f:
        manifest = json.load(f)
    assert manifest['step'] == 1 and len(manifest['config_sha256']) == 64
    assert set(manifest['files']) == set(os.listdir(path)) - {'manifest.json'}
    for name, entry in manifest['files'].items():
        assert (
            entry['size'] == os.path.getsize(os.path.join(path, name))
            and len(entry['sha256']) == 64
        )


def test_set_aside_never_overwrites(tmp_path):
    for _ in range(2):
        save(tmp_path, 1)
        store.rename_all_aside(str(tmp_path), 'run')
    assert sorted(os.listdir(tmp_path)) == ['checkpoints_run', 'checkpoints_run_2']


@pytest.mark.parametrize('keep', range(1, 9))
def test_as_many_stay_as_asked_for(tmp_path, keep):
    for step in range(1, 13):
        save(tmp_path, step, keep=keep)
        assert store.steps(str(tmp_path)) == list(range(max(1, step - keep + 1), step + 1))


def test_what_cannot_be_read_is_rejected_by_name(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / 'checkpoints'
    (folder / 'step_00000002').write_text('a file')
    os.makedirs(folder / 'step_00000003' / 'manifest.json')
    step, rejected = store.newest_whole(str(tmp_path))
    assert step == 1 and [reason for _, reason in rejected] == [
        (
            f'manifest.json is damaged ({folder}/step_00000003/manifest.json is a folder, expected'
            ' a file: put one there, or take it away)'
        ),
        f'{folder}/step_00000002/manifest.json cannot be read (Not a directory)',
    ]


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    for step, loss in ((1, float('nan')), (2, 2.0), (3, 3.0)):
        store.record_evaluation(
            save(tmp_path, step, keep=9), {'train': 1.0, 'val': loss, 'data': 'x'}
        )
    assert store.best_step(str(tmp_path)) == 2


def test_an_evaluation_that_cannot_be_read_stops_neither_saving_nor_retention(tmp_path):
    path = save(tmp_path, 1)
    os.symlink('/proc/self/mem', os.path.join(path, 'evaluation.json'))
    for step in (2, 3, 4):
        save(tmp_path, step, keep=2)
    assert store.steps(str(tmp_path)) == [3, 4]
