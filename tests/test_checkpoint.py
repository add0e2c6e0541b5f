"""A checkpoint that loads is whole: damage anywhere is refused by name, older ones go last, nothing in it is executed."""
import json
import os
import pickle
import shutil

import pytest
import torch

from engine import checkpoint
from engine.configurator import ConfigError
from engine.parallel import World

ONE = World(0, 0, 1, torch.device('cpu'))


def tensors(value=1.0):
    return {'model.a': torch.full((5, 3), value), 'optimizer.step.a': torch.tensor(value), 'optimizer.exp_avg.a': torch.full((5, 3), 2 * value)}


def save(out_dir, step, value=None, **options):
    return checkpoint.save(str(out_dir), step, tensors(step if value is None else value), {'config': {'x': 1}, 'position': step * 10}, ONE, **options)


def test_saved_is_loaded(tmp_path):
    path = save(tmp_path, 7)
    into = tensors(0.0)
    checkpoint.load(path, into)
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors(7.0).items())
    state = checkpoint.read_state(path)
    assert state['step'] == 7 and state['position'] == 70 and state['config'] == {'x': 1}
    assert checkpoint.newest_whole(str(tmp_path)) == (7, [])
    assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['step_00000007']


def test_any_damage_is_refused_by_name_and_the_older_one_used(tmp_path):
    save(tmp_path, 1)
    good = save(tmp_path, 2)
    for name in sorted(os.listdir(good)):
        for damage in ('flip', 'cut', 'remove'):
            path = shutil.copytree(good, tmp_path / 'checkpoints' / 'step_00000003')
            file = path / name
            content = bytearray(file.read_bytes())
            if damage == 'flip':
                content[len(content) // 2] ^= 4
                file.write_bytes(content)
            elif damage == 'cut':
                file.write_bytes(content[:-1])
            else:
                file.unlink()
            step, rejected = checkpoint.newest_whole(str(tmp_path))
            assert step == 2 and rejected[0][0] == str(path) and name in rejected[0][1], (name, damage, rejected)
            shutil.rmtree(path)


def test_a_half_written_one_is_not_seen(tmp_path):
    save(tmp_path, 1)
    os.makedirs(tmp_path / 'checkpoints' / '.writing_step_00000002')
    assert checkpoint.steps(str(tmp_path)) == [1]
    save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['step_00000001', 'step_00000002']


def test_a_failed_save_leaves_the_older_one(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(checkpoint, 'write_json', full)
    with pytest.raises(OSError):
        save(tmp_path, 2, keep=1)
    assert checkpoint.newest_whole(str(tmp_path)) == (1, [])


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, value=1.0)
    path = save(tmp_path, 1, value=5.0)
    into = tensors(0.0)
    checkpoint.load(path, into)
    assert into['model.a'][0, 0] == 5.0 and os.listdir(tmp_path / 'checkpoints') == ['step_00000001']


def test_newest_and_best_stay(tmp_path):
    out = str(tmp_path)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, None)):
        save(tmp_path, step, keep=2)
        if loss:
            checkpoint.record_evaluation(out, step, {'train': loss, 'val': loss})
    assert checkpoint.steps(out) == [2, 4, 5] and checkpoint.best_step(out) == 2
    assert checkpoint.why_broken(checkpoint.path_of(out, 2)) is None  # the recorded evaluation does not break the manifest
    save(tmp_path, 6, keep_all=True)
    assert checkpoint.steps(out) == [2, 4, 5, 6]


def test_a_newer_damaged_one_does_not_push_out_the_one_just_saved(tmp_path):
    out = str(tmp_path)
    for step in (1, 8, 9):
        save(tmp_path, step, keep_all=True)
    for step in (8, 9):
        (tmp_path / 'checkpoints' / f'step_{step:08d}' / 'state.json').write_text('{')
    save(tmp_path, 2, keep=1)
    assert checkpoint.newest_whole(out)[0] == 2
    checkpoint.set_aside_rejected(path for path, _ in checkpoint.newest_whole(out)[1])
    assert checkpoint.steps(out) == [2] and 'rejected_step_00000009' in os.listdir(tmp_path / 'checkpoints')


def test_what_interrupted_saves_left_is_tidied(tmp_path):
    path = save(tmp_path, 1)
    os.rename(path, tmp_path / 'checkpoints' / '.replaced_step_00000001')  # killed between the two renames
    os.makedirs(tmp_path / 'checkpoints' / '.writing_step_00000002')
    checkpoint.tidy(str(tmp_path))
    assert os.listdir(tmp_path / 'checkpoints') == ['step_00000001'] and checkpoint.why_broken(path) is None


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    path = save(tmp_path, 1)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)
    with open(os.path.join(path, '.metadata'), 'wb') as f:
        pickle.dump(Evil(), f)
    with pytest.raises(BaseException, match='not admitted'):
        checkpoint.load(path, tensors())
    assert not (tmp_path / 'executed').exists()
    torch.save({'model': Evil()}, tmp_path / 'ckpt.pt')
    with pytest.raises(ConfigError, match='is not a checkpoint of nanoGPT'):
        checkpoint.read_nanogpt(str(tmp_path / 'ckpt.pt'))
    assert not (tmp_path / 'executed').exists()


def test_shapes_and_names_must_match(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(BaseException, match='Size mismatch'):
        checkpoint.load(path, {'model.a': torch.zeros(4, 3)})
    with pytest.raises(BaseException, match='model.b'):
        checkpoint.load(path, {'model.b': torch.zeros(5, 3)})


def test_manifest_states_size_checksum_and_configuration(tmp_path):
    path = save(tmp_path, 1)
    with open(os.path.join(path, 'manifest.json')) as f:
        manifest = json.load(f)
    assert manifest['step'] == 1 and len(manifest['config_sha256']) == 64
    assert set(manifest['files']) == set(os.listdir(path)) - {'manifest.json'}
    for name, entry in manifest['files'].items():
        assert entry['size'] == os.path.getsize(os.path.join(path, name)) and len(entry['sha256']) == 64


def test_set_aside_never_overwrites(tmp_path):
    for _ in range(2):
        save(tmp_path, 1)
        checkpoint.set_aside(str(tmp_path), 'run')
    assert sorted(os.listdir(tmp_path)) == ['checkpoints_run', 'checkpoints_run_2']
