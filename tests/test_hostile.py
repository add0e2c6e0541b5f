"""Proves that files somebody else made run no code, write nothing outside of their folder, send
nothing, and leave no secret in a log.
"""

import dataclasses
import glob
import hashlib
import io
import json
import os
import pathlib
import pickle
import shutil
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, make_dataset, run_process, write_dataset
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
)

import checkpoints
import evaluate
import export
import sample
from onetrain import files
from onetrain.checkpoint import dcp_metadata, resume, store
from onetrain.config import UserError
from onetrain.data.dataset import open_dataset
from onetrain.data.token_file import read_meta
from onetrain.logs.run_log import new_run_name
from onetrain.tokenizers.base import load_tokenizer, tokenizer_of
from train import Config


@pytest.fixture(scope='module')
def made(dataset, tmp_path_factory):
    """The folder of a run that ended at iteration 4, with checkpoints at 2 and 4."""
    from conftest import run_train

    out = tmp_path_factory.mktemp('made') / 'out'
    assert run_train(dataset, out, '--max_iters=4', '--eval_interval=2') == 0
    return str(out)


@pytest.fixture
def run(made, tmp_path):
    """A copy of it."""
    shutil.copytree(made, tmp_path / 'run')
    return str(tmp_path / 'run')


def newest(run):
    return store.path_of(run, store.steps(run)[-1])


def seal(path, change=lambda manifest: None):
    """Make the manifest fit the files of the checkpoint `path` again, then change it."""
    with open(f'{path}/manifest.json', 'rb') as f:
        manifest = store.verify_checksum(f.read())
    for name in manifest['files']:
        if os.path.isfile(f'{path}/{name}'):
            manifest['files'][name] = {
                'size': os.path.getsize(f'{path}/{name}'),
                'sha256': store.sha256(f'{path}/{name}'),
            }
    change(manifest)
    with open(f'{path}/manifest.json', 'wb') as f:
        f.write(store.add_checksum(manifest))


def edit_state(path, **changes):
    with open(f'{path}/state.json') as f:
        state = json.load(f)
    for key, value in changes.items():
        where = state['config'] if key.startswith('config_') else state
        where[key.removeprefix('config_')] = value
    with open(f'{path}/state.json', 'w') as f:
        json.dump(state, f)
    seal(path)


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ['HOSTILE_MARK'],)


def forge(path, kind):
    """Put a pickle into a checkpoint, with a manifest that fits."""
    with open(f'{path}/.metadata', 'rb') as f:
        metadata = pickle.load(f)
    key = 'model.transformer.wte.weight'
    if kind == 'bytes':
        buffer, shard = io.BytesIO(), f'{path}/__0_0.distcp'
        torch.save(Evil(), buffer)
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        for index in [index for index in metadata.storage_data if index.fqn == key]:
            del metadata.storage_data[index]
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo(
            '__0_0.distcp', os.path.getsize(shard), len(buffer.getvalue())
        )
        with open(shard, 'ab') as f:
            f.write(buffer.getvalue())
    elif kind == 'foreign class':
        metadata.planner_data = Evil()
    elif kind == 'in place of all':
        metadata = Evil()
    elif kind == 'wrapped':
        metadata.state_dict_metadata[key] = [metadata.state_dict_metadata[key]]
    elif kind == 'file outside':
        metadata.storage_data = {
            index: _StorageInfo('../../../x', place.offset, place.length)
            for index, place in metadata.storage_data.items()
        }
    elif kind == 'transformed':
        metadata.storage_data = {
            index: _StorageInfo(place.relative_path, place.offset, place.length, ['zstd'])
            for index, place in metadata.storage_data.items()
        }
    elif kind in LIES:
        LIES[kind](metadata, key)
    data = pickle.dumps(metadata)
    # BUILD(PosixPath, (None, {'__truediv__': PosixPath})), before all else
    if kind == 'attribute of a class':
        name = b'cpathlib\nPosixPath\n'
        data = data[:2] + name + b'N}X\x0b\0\0\0__truediv__' + name + b's\x86b0' + data[2:]
    elif kind == 'attribute of a dataclass':
        name = b'ctorch.distributed.checkpoint.metadata\nMetadata\n'
        data = data[:2] + name + b'N}X\x05\0\0\0mixin' + name + b's\x86b0' + data[2:]
    with open(f'{path}/.metadata', 'wb') as f:
        f.write(data)
    seal(path)


def place(metadata, key, **changes):
    (index,) = [index for index in metadata.storage_data if index.fqn == key]
    metadata.storage_data[index] = dataclasses.replace(metadata.storage_data[index], **changes)


def chunk(metadata, key, offsets=(0, 0), sizes=(44, 32), more=False):
    entry = metadata.state_dict_metadata[key]
    entry.chunks = [
        *entry.chunks[: int(more)],
        ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
    ]


OTHER = 'model.transformer.ln_f.weight'
LIES = {
    'no chunk': lambda m, key: m.state_dict_metadata[key].chunks.clear(),
    'half a chunk': lambda m, key: chunk(m, key, sizes=(22, 32)),
    'two chunks alike': lambda m, key: chunk(m, key, more=True),
    'a chunk outside': lambda m, key: chunk(m, key, offsets=(1, 0)),
    'a negative chunk': lambda m, key: chunk(m, key, offsets=(-1, 0)),
    'a chunk of one number': lambda m, key: chunk(m, key, offsets=(0,), sizes=(44 * 32,)),
    'a file that is not there': lambda m, key: place(m, key, relative_path='nofile.distcp'),
    'a file of another kind': lambda m, key: place(m, key, relative_path='state.json'),
    'beyond the file': lambda m, key: place(m, key, offset=10**9),
    'no bytes': lambda m, key: place(m, key, length=0),
    'all bytes': lambda m, key: place(m, key, length=2**61),
    'no place': lambda m, key: [
        m.storage_data.pop(index) for index in list(m.storage_data) if index.fqn == key
    ],
    'a place of nothing': lambda m, key: m.storage_data.update(
        {MetadataIndex('x', torch.Size([0])): next(iter(m.storage_data.values()))}
    ),
    'the place of another': lambda m, key: place(
        m, key, offset=next(p.offset for i, p in m.storage_data.items() if i.fqn == OTHER)
    ),
    'a size that is none': lambda m, key: setattr(m.state_dict_metadata[key], 'size', [44, 32]),
}


@pytest.mark.parametrize(
    'kind',
    [
        'bytes',
        'foreign class',
        'in place of all',
        'wrapped',
        'file outside',
        'transformed',
        'attribute of a class',
        'attribute of a dataclass',
        'no chunk',
    ],
)
def test_no_pickle_in_a_checkpoint_runs(kind, run, train, tmp_path, monkeypatch, capsys):
    """By any command that reads one, here and fetched; training goes on from the one before."""
    mark = str(tmp_path / 'CODE_RAN')
    monkeypatch.setenv('HOSTILE_MARK', mark)
    path = newest(run)
    forge(path, kind)
    assert 'metadata is damaged' in store.corruption_reason(
        path
    ) and '.metadata is damaged' in store.corruption_reason(path, 'size')
    with pytest.raises(UserError, match='nothing was read from it'):
        store.load(path, {'model.transformer.wte.weight': torch.zeros(44, 32)})
    for command, args in (
        (sample.main, []),
        (evaluate.main, []),
        (export.main, ['--to', str(tmp_path / 'hf')]),
    ):
        assert (
            command(
                [f'--out_dir={run}', '--step=4', *args]
                + (['--device=cpu'] if command is not export.main else [])
            )
            == 2
        )
        assert 'cannot be used: .metadata is damaged' in capsys.readouterr().err
    assert checkpoints.main([run]) == 1
    assert (
        train(
            tmp_path / 'fetched',
            '--init_from=resume',
            f'--resume_from=file://{run}',
            '--max_iters=3',
        )
        == 0
    )
    assert 'continuing at iter 2' in capsys.readouterr().out
    assert train(run, '--init_from=resume', '--max_iters=3') == 0
    assert 'continuing at iter 2' in capsys.readouterr().out and not os.path.exists(mark)
    assert str(pathlib.PurePosixPath('a') / 'b') == str(
        pathlib.Path('a') / 'b'
    ) == 'a/b' and not hasattr(Metadata, 'mixin')


@pytest.mark.parametrize('kind', LIES)
def test_metadata_that_lie_are_damaged(kind, run):
    path = newest(run)
    assert store.corruption_reason(path, 'size') is None
    forge(path, kind)
    assert '.metadata is damaged' in store.corruption_reason(path, 'size')


def test_tensors_of_another_shape_than_the_metadata_say_are_an_error(run):
    path = newest(run)
    with open(f'{path}/.metadata', 'rb') as f:
        metadata = pickle.load(f)
    metadata.state_dict_metadata[OTHER].size = torch.Size([4, 8])
    metadata.state_dict_metadata[OTHER].chunks = [
        ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([4, 8]))
    ]
    (index,) = [index for index in metadata.storage_data if index.fqn == OTHER]
    metadata.storage_data[MetadataIndex(OTHER, torch.Size([0, 0]))] = metadata.storage_data.pop(
        index
    )
    with open(f'{path}/.metadata', 'wb') as f:
        pickle.dump(metadata, f)
    seal(path)
    with pytest.raises(
        UserError, match=r'has model.transformer.ln_f.weight of shape \(4, 8\), and the model'
    ):
        store.load(path, {OTHER: torch.zeros(32)})
    with pytest.raises(UserError, match='cannot be read|ln_f.weight'):
        store.load(path, {OTHER: torch.zeros(4, 8)})
    with pytest.raises(UserError, match='has no model.nothing'):
        store.load(path, {'model.nothing': torch.zeros(4, 8)})


def test_what_is_a_plain_name():
    for name in ('a', '__0_0.distcp', '.metadata', 'train_000001.bin', 'größe'):
        assert files.plain_name(name, 'x') == name and files.inside('/f', name, 'x') == f'/f/{name}'
    assert files.inside('/f', 'tokenizer/vocab.json', 'x') == '/f/tokenizer/vocab.json'
    for name in (
        '',
        '.',
        '..',
        '../x',
        '/x',
        'a/../x',
        'a//x',
        'a\\x',
        'a\0b',
        'a\nb',
        'C:x',
        'x' * 300,
        None,
        5,
        ['a'],
        '\ud800',
        '..\\x',
        'a/',
    ):
        with pytest.raises(UserError, match='x names the file .*, which is not a plain file name'):
            files.inside('/f', name, 'x')


@pytest.mark.parametrize(
    'name',
    [
        '../../../../victim.py',
        '/tmp/victim.py',
        'a/../../../../../victim.py',
        'fetched.json',
        'evaluation.json',
    ],
)
def test_names_of_a_manifest_stay_in_its_folder(name, run, train, tmp_path, capsys):
    path, victim = newest(run), tmp_path / 'victim.py'
    victim.write_text('mine')
    content = b'theirs'
    seal(
        path,
        lambda manifest: manifest['files'].update(
            {name: {'size': len(content), 'sha256': hashlib.sha256(content).hexdigest()}}
        ),
    )
    assert (
        train(
            tmp_path / 'a' / 'b' / 'out',
            '--init_from=resume',
            f'--resume_from=file://{run}/checkpoints/step_00000004',
            '--max_iters=5',
        )
        == 2
    )
    assert 'manifest.json is damaged' in capsys.readouterr().err and victim.read_text() == 'mine'
    assert (
        checkpoints.main([run, f'--copy_to={tmp_path}/copies']) == 1
        and victim.read_text() == 'mine'
    )


@pytest.mark.parametrize('name', ['../../evil', '/tmp/evil', 'a\0b', 5, None, ['x']])
def test_a_run_has_a_plain_name(name, run, train, tmp_path, capsys):
    path = newest(run)
    edit_state(path, run_name=name)
    assert 'state.json is damaged' in store.corruption_reason(path)
    assert train(run, '--init_from=resume', '--max_iters=3') == 0
    assert not glob.glob(f'{tmp_path}/*evil*') and not glob.glob('/tmp/evil.*')


@pytest.mark.parametrize(
    'key, odd',
    [
        (key, odd)
        for key in (
            'step',
            'position',
            'tokens',
            'tokens_per_step',
            'config',
            'branch',
            'scaler',
            'data',
            'best_val_loss',
            'format',
            'versions',
        )
        for odd in ('x', [1], -1, True, 1.5)
    ]
    + [('format', 3), ('config_n_layer', [1]), ('config_dataset', 5), ('branch', 'z')],
)
def test_fields_of_a_state_have_types(key, odd, run):
    if (key, odd) in (('best_val_loss', -1), ('best_val_loss', 1.5)):
        return
    edit_state(newest(run), **{key: odd})
    reason = store.corruption_reason(newest(run))
    assert (
        reason
        and reason.startswith('state.json is')
        and (key != 'format' or odd != 3 or 'later version' in reason)
    )


@pytest.mark.parametrize('file', ['state.json', 'manifest.json', 'evaluation.json'])
@pytest.mark.parametrize(
    'content', [b'[' * 100_000, b'\xff\xfe{', b'5', b'null', b'{"a": ' * 100_000, b'']
)
def test_damaged_files_are_named(file, content, run):
    with open(f'{newest(run)}/{file}', 'wb') as f:
        f.write(content)
    if file == 'state.json':
        seal(newest(run))
    reason = store.corruption_reason(newest(run))
    assert reason and reason.startswith(f'{file} is damaged'), reason


OUTSIDE = {
    'upload_to': 'file:///nowhere/x',
    'data_url': 's3://theirs/set',
    'sample_start': 'FILE:/etc/passwd',
    'eval_tasks': 'piqa:/etc/passwd',
    'notify': 'https://theirs.example/hook',
    'wandb_log': True,
    'wandb_project': 'theirs',
}


def test_a_fetched_checkpoint_sends_nothing_and_reads_nothing(run, train, tmp_path, capsys):
    edit_state(
        newest(run),
        config_sample_interval=1,
        **{f'config_{key}': value for key, value in OUTSIDE.items()},
    )
    out = tmp_path / 'out'
    assert (
        train(
            out,
            '--init_from=resume',
            f'--resume_from=file://{run}',
            '--max_iters=5',
            '--sample_start=the',
        )
        == 0
    )
    said = capsys.readouterr().out
    for key in set(OUTSIDE) - {'sample_start'}:
        assert f'Note: {key}=' in said and f'give --{key} to have it' in said
    assert 'wandb_run_name' not in said  # it was the default
    config = store.read_state(store.path_of(str(out), 5))['config']
    assert config['sample_start'] == 'the' and all(
        config[key] in (None, False, 'onetrain') for key in set(OUTSIDE) - {'sample_start'}
    )
    # what was fetched stays fetched, also for one that continues without the URL; one's own run
    # keeps its keys
    shutil.rmtree(store.path_of(str(out), 5))
    assert set(store.read_state(store.path_of(str(out), 4))['not_taken_over']) == {
        *OUTSIDE,
        'dataset',
        'wandb_run_name',
    }
    assert (
        not store.read_state(newest(run))['not_taken_over']
        and store.read_state(newest(run))['config']['data_url'] == OUTSIDE['data_url']
    )


def test_a_path_of_another_machine_is_no_data_set(run, tmp_path, capsys):
    import train as trainer

    assert (
        trainer.main(
            [
                '--init_from=resume',
                f'--resume_from=file://{run}',
                f'--out_dir={tmp_path}/out',
                '--device=cpu',
                '--compile=False',
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert (
        'of a checkpoint that anybody may have made is not taken over' in error
        and 'give the --dataset here' in error
    )


SECRET = 'https://user:hunter2@host/set?sig=hunter2#hunter2'


def test_what_is_redacted():
    assert files.redact(SECRET) == 'https://***@host/set?***'
    for text in ('s3://bucket/x', 'hf://datasets/a/b@main/x', 'file:///a/b', 'no url', 5, None):
        assert files.redact(text) == text
    for text in (
        'zip://x::https://u:hunter2@h/x',
        's3://AK:hunter2/hunter2@h/x',
        'a https://u:hunter2@h/x, https://v:hunter2@h',
        "'https://u:p'hunter2@h/x'",
        {'a': [SECRET]},
    ):
        assert 'hunter2' not in str(files.redact(text))


def test_no_secret_is_recorded(train, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resume.uploader, 'check_writable', lambda url, out_dir: None)
    monkeypatch.setattr(
        'onetrain.training.run_data.open_dataset', lambda name, root, url: open_dataset(name, root)
    )
    monkeypatch.setattr('onetrain.training.outputs.Uploader', lambda *args: None)
    monkeypatch.setattr(resume.uploader, 'lineages', lambda place: set())
    monkeypatch.setattr(
        'train.collectives.broadcast_from_main',
        lambda work, world: True if 'finish' in work.__code__.co_names else work(),
    )
    out = tmp_path / 'out'
    assert (
        train(
            out,
            '--max_iters=2',
            '--eval_interval=2',
            f'--data_url={SECRET}',
            '--checkpoint_interval=1',
        )
        == 0
    )
    texts = [
        open(path, errors='replace').read()
        for path in glob.glob(f'{out}/**', recursive=True)
        if os.path.isfile(path)
    ]
    texts += [text for pair in [capsys.readouterr()] for text in pair]
    assert len(texts) > 6 and not any('hunter2' in text for text in texts)
    assert any('https://***@host/set?***' in text for text in texts)
    assert train(out, '--init_from=resume', '--max_iters=3') == 2
    assert 'never recorded: give --data_url again' in capsys.readouterr().err
    assert (
        train(out, '--init_from=resume', '--max_iters=3', f'--data_url={SECRET}') == 0
        and 'hunter2' not in capsys.readouterr().out
    )


ODD_META = [
    {'files': {'train': [('../victim', 5)], 'val': [('val.bin', 5)]}},
    {'files': 5},
    {'tokenizer': {'kind': 'hf', 'path': '../../x'}},
    {'tokenizer': {'kind': 'sentencepiece', 'path': '/etc/passwd'}},
    {'tokenizer': {'kind': 'sentencepiece', 'path': 'prepare.py'}},
    {'tokenizer': {'kind': 'hf', 'path': '.'}},
    {'ends': {'train': '/etc/passwd', 'val': 'x'}},
    {'fingerprint': {'train': '../../x', 'val': 'x'}},
    {'vocab_size': 'abc'},
    {'vocab_size': 10**30},
    {'eot_id': [1]},
    {'stoi': 5, 'itos': 5},
    {'itos': {}, 'stoi': {}},
    {'tokens': b'x'},
    {'max_id': {'train': -1, 'val': 1}},
    {'dtype': 'float64'},
]


@pytest.mark.parametrize('odd', ODD_META, ids=str)
def test_entries_of_a_meta_are_checked(odd, dataset, train, tmp_path, capsys):
    folder = tmp_path / 'set'
    shutil.copytree(dataset, folder)
    meta = read_meta(str(folder))
    with open(folder / 'meta.pkl', 'wb') as f:
        pickle.dump({**meta, **odd}, f)
    with pytest.raises(ValueError) as error:
        tokenizer_of(str(folder), read_meta(str(folder)))
    assert '\n' not in str(error.value)
    import train as trainer

    assert (
        trainer.main(
            [
                f'--dataset={folder}',
                f'--out_dir={tmp_path}/out',
                '--device=cpu',
                '--compile=False',
                '--max_iters=1',
            ]
        )
        == 2
    )
    assert capsys.readouterr().err.count('\n') == 1


def test_a_data_set_never_removes_what_it_did_not_make(tmp_path):
    """Preparing into a folder whose meta.pkl names other files."""
    (tmp_path / 'set').mkdir()
    for name in ('victim.txt', 'set/prepare.py'):
        (tmp_path / name).write_text('precious')
    for name in ('../victim.txt', 'prepare.py'):
        (tmp_path / 'set' / 'meta.pkl').write_bytes(
            pickle.dumps({'files': {'train': [(name, 5)], 'val': [(name, 5)]}})
        )
        write_dataset(str(tmp_path / 'set'), [1, 2, 3], [1, 2])
    assert (
        (tmp_path / 'victim.txt').read_text()
        == (tmp_path / 'set' / 'prepare.py').read_text()
        == 'precious'
    )


@pytest.fixture(params=['file', 's3'])
def stored(request, tmp_path):
    """(URL, write(name, bytes)) of a prepared data set elsewhere."""
    make_dataset(str(tmp_path / 'there'))
    if request.param == 'file':
        return f'file://{tmp_path}/there', lambda name, data: (
            tmp_path / 'there' / name
        ).write_bytes(data)
    import fsspec

    server = request.getfixturevalue('s3')
    fs = fsspec.filesystem('s3', endpoint_url=server.environment['AWS_ENDPOINT_URL'])
    for name in os.listdir(tmp_path / 'there'):
        fs.pipe(f'bucket/{tmp_path.name}/{name}', (tmp_path / 'there' / name).read_bytes())
    return f's3://bucket/{tmp_path.name}', lambda name, data: fs.pipe(
        f'bucket/{tmp_path.name}/{name}', data
    )


def test_a_remote_file_replaced_by_another_of_its_size_is_refused(stored, tmp_path):
    url, write = stored
    root = str(tmp_path / 'project')
    train_file, _, _ = open_dataset('set', root, url)
    write('train.bin', bytes(2 * len(train_file)))
    with pytest.raises(
        UserError, match='the files of train are not those that its meta.pkl describes'
    ):
        open_dataset('set', root, url)


def test_the_clock_decides_nothing(train, tmp_path, monkeypatch, capsys):
    """A run that goes back on a machine whose clock is years behind is still the newest; names of
    runs ascend, too.
    """
    assert train(tmp_path, '--max_iters=8', '--eval_interval=2', '--keep_all_checkpoints=True') == 0
    import datetime

    class Behind(datetime.datetime):
        @classmethod
        def now(cls, zone=None):
            return cls(2001, 1, 1, tzinfo=zone)

    monkeypatch.setattr(store.datetime, 'datetime', Behind)
    assert (
        train(
            tmp_path,
            '--init_from=resume',
            '--resume_from=4',
            '--max_iters=6',
            '--learning_rate=5e-4',
        )
        == 0
    )
    # as if a bucket still had it
    shutil.move(
        tmp_path / 'checkpoints' / 'superseded_step_00000008',
        tmp_path / 'checkpoints' / 'step_00000008',
    )
    assert store.newest_first(str(tmp_path))[0] == 6
    assert store.new_lineage(['20991231T235959.999999Z']) == '21000101T000000.000000Z'
    with pytest.raises(UserError, match='after which no other can come'):
        store.new_lineage(['99991231T235959.999999Z'])
    assert new_run_name(str(tmp_path)) > max(
        name[:-6]
        for name in os.listdir(tmp_path)
        if name.startswith('run_') and name.endswith('.jsonl')
    )


@pytest.mark.parametrize('what', ['.lock', 'checkpoints', 'log'])
def test_a_folder_that_cannot_hold_a_run_is_told_before_any_work(what, dataset, tmp_path, capsys):
    import train as trainer

    out = tmp_path / 'out'
    out.mkdir()
    if what == 'checkpoints':
        (out / 'checkpoints').write_text('a file')
    elif what == '.lock':
        (out / '.lock').mkdir()
    else:
        os.symlink('/nowhere/x', out / 'checkpoints')
    assert (
        trainer.main(
            [
                f'--dataset={dataset}',
                f'--out_dir={out}',
                *TINY,
                '--max_iters=1',
            ]
        )
        == 2
    )
    captured = capsys.readouterr()
    assert (
        captured.err.startswith('error: out_dir=')
        and captured.err.count('\n') == 1
        and 'iter' not in captured.out
    )


@pytest.mark.parametrize(
    'args', [['--learning_rate=1e38'], ['--weight_decay=1e300'], ['--learning_rate=1e308']]
)
def test_weights_that_are_not_finite_at_the_end_leave_with_3(args, train, tmp_path):
    assert train(tmp_path, '--max_iters=1', '--eval_at_start=False', '--decay_lr=False', *args) == 3


def test_an_upload_that_cannot_be_written_is_told_before_any_work(
    train, s3, tmp_path, monkeypatch, capsys
):
    (tmp_path / 'file').write_text('x')
    for url in (f'file://{tmp_path}/file/x', 's3://no-such-bucket/x'):
        assert train(tmp_path / 'out', '--max_iters=1', f'--upload_to={url}') == 2
        captured = capsys.readouterr()
        assert (
            captured.err.startswith(f'error: upload_to={url}')
            and captured.err.count('\n') == 1
            and 'iter 1' not in captured.out
        )


def test_copies_go_both_ways(run, tmp_path, capsys):
    there, back = f'file://{tmp_path}/there', str(tmp_path / 'back')
    assert (
        checkpoints.main([run, f'--copy_to={there}']) == 0
        and 'copied step 4' in capsys.readouterr().out
    )
    assert checkpoints.main([there, f'--copy_to={back}', '--step=4']) == 0
    out = capsys.readouterr().out
    (name,) = os.listdir(f'{back}/run')
    assert f'{name} is at {back}/run/{name}' in out and store.steps(f'{back}/run/{name}') == [4]
    path = store.path_of(f'{back}/run/{name}', 4)
    assert (
        store.corruption_reason(path) is None
        and os.path.isfile(f'{path}/fetched.json')
        and os.path.isfile(f'{back}/run/{name}/{name}.json')
    )
    assert (
        checkpoints.main([there, f'--copy_to={back}']) == 0
        and '1 checkpoint copied, 1 there already, verified' in capsys.readouterr().out
    )
    assert (
        checkpoints.main([there, f'--copy_to={back}', '--step=3']) == 2
        and 'has no checkpoint of step 3' in capsys.readouterr().err
    )


def test_many_checkpoints_of_a_bucket_are_looked_at_together(run, s3, monkeypatch):
    import fsspec

    fs = fsspec.filesystem(
        's3', endpoint_url=s3.environment['AWS_ENDPOINT_URL'], skip_instance_cache=True
    )
    place = 'bucket/together[x=1]'
    for step in range(1, 31):
        fs.put(newest(run), f'{place}/checkpoints/step_{step:08d}', recursive=True)
    fs.pipe(f'{place}/checkpoints/step_00000007/state.json', b'{')
    fs.rm_file(f'{place}/checkpoints/step_00000008/evaluation.json')
    asked, real = [], fs.cat_ranges
    monkeypatch.setattr(
        fs,
        'cat_ranges',
        lambda paths, *args, **more: (asked.append(len(paths)), real(paths, *args, **more))[1],
    )
    monkeypatch.setattr(type(fs), 'open', lambda *_, **__: 1 / 0)
    assert store.newest_first(place, fs) == [*range(30, 0, -1)] and store.lineages(place, fs) == {
        store.read_state(newest(run))['branch']
    }
    assert store.best_step(place, fs) == 30 and asked == [30, 30, 30]


def test_a_copy_that_was_damaged_is_made_again(run, tmp_path, capsys):
    assert checkpoints.main([run, f'--copy_to={tmp_path}/cp']) == 0
    file = max(glob.glob(f'{tmp_path}/cp/**/*.distcp', recursive=True), key=os.path.getsize)
    content = bytearray(open(file, 'rb').read())
    content[len(content) // 2] ^= 1
    with open(file, 'wb') as f:
        f.write(content)
    capsys.readouterr()
    assert (
        checkpoints.main([run, f'--copy_to={tmp_path}/cp']) == 0
        and '1 checkpoint copied, 1 there already, verified' in capsys.readouterr().out
    )
    assert checkpoints.main([f'{tmp_path}/cp']) == 0
    for place in (run, f'file://{run}', os.path.dirname(run)):
        assert (
            checkpoints.main([run, f'--copy_to={place}']) == 2
            and 'into itself' in capsys.readouterr().err
        )
    assert not os.path.exists(f'{run}/run')


@pytest.mark.parametrize(
    'command',
    [['sample.py', '--help'], ['-m', 'onetrain.doctor']],
    ids=['sample', 'doctor'],
)
@pytest.mark.parametrize('after', [0.5, 1.5])
def test_ctrl_c_while_libraries_are_imported_leaves_no_traceback(command, after):
    import signal
    import subprocess
    import time

    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=os.path.dirname(os.path.abspath(sample.__file__)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    # 0: it was quicker; -2: just as Python ended
    assert process.returncode in (130, 0, -2) and b'Traceback' not in error


@pytest.mark.parametrize(
    'env',
    [
        {'RANK': 'abc'},
        {'RANK': '1'},
        {'WORLD_SIZE': '0'},
        {'WORLD_SIZE': '2'},
        {'LOCAL_RANK': '²'},
        {'WORLD_SIZE': '2', 'RANK': '5', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29999'},
        {'WORLD_SIZE': '2', 'MASTER_ADDR': 'no.such.host.invalid', 'MASTER_PORT': '29999'},
    ],
    ids=str,
)
def test_the_environment_of_torchrun_is_checked(env, tmp_path, monkeypatch, capsys):
    import train as trainer
    from onetrain.distributed import processes

    monkeypatch.setattr(processes, '_store', None)
    for key in (
        'RANK',
        'LOCAL_RANK',
        'WORLD_SIZE',
        'LOCAL_WORLD_SIZE',
        'MASTER_ADDR',
        'MASTER_PORT',
    ):
        monkeypatch.delenv(key, raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    assert trainer.main([f'--out_dir={tmp_path}/out', '--device=cpu']) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: the environment says') and error.count('\n') == 1


def test_keys_that_reach_outside_are_keys():
    assert set(OUTSIDE) <= set(vars(Config()))
    assert all(store.is_external_key(key, value) for key, value in OUTSIDE.items())


def test_commands_as_processes_have_no_traceback(run, tmp_path):
    """What only a process of its own shows: arguments that are not UTF-8."""
    code, output = run_process('sample.py', f'--out_dir={run}', '--device=cpu', '--start=\udcff')
    assert code == 2 and 'Traceback' not in output and 'is not UTF-8' in output


# ---- links, pipes, and values that no run can have


def test_a_data_set_elsewhere_brings_its_tokenizer_and_no_other_file(tmp_path, dataset):
    (tmp_path / 'data' / 'x').mkdir(parents=True)
    (tmp_path / 'data' / 'x' / 'prepare.py').write_text('precious')
    shutil.copytree(dataset, tmp_path / 'there')
    meta = {**read_meta(dataset), 'tokenizer': {'kind': 'hf', 'path': 'tokenizer'}}
    for key in ('stoi', 'itos'):
        meta.pop(key)
    for name in (
        'prepare.py',
        'tokenizer/run.py',
        'tokenizer/tokenizer.json',
        'tokenizer/additional_chat_templates/a.jinja',
        'tokenizer/additional_chat_templates/a.py',
    ):
        (tmp_path / 'there' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'there' / name).write_text('theirs')
    (tmp_path / 'there' / 'meta.pkl').write_bytes(pickle.dumps(meta))
    open_dataset('x', str(tmp_path), f'file://{tmp_path}/there')
    assert (tmp_path / 'data' / 'x' / 'prepare.py').read_text() == 'precious'
    found = sorted(
        str(path.relative_to(tmp_path / 'data' / 'x'))
        for path in (tmp_path / 'data' / 'x' / 'tokenizer').rglob('*')
        if path.is_file()
    )
    assert found == ['tokenizer/additional_chat_templates/a.jinja', 'tokenizer/tokenizer.json']
    (tmp_path / 'there' / 'meta.pkl').write_bytes(
        pickle.dumps({**meta, 'tokenizer': {'kind': 'sentencepiece', 'path': 'prepare.py'}})
    )
    with pytest.raises(UserError, match="expected 'tokenizer' or 'tokenizer.model'"):
        open_dataset('x', str(tmp_path), f'file://{tmp_path}/there')
    assert (tmp_path / 'data' / 'x' / 'prepare.py').read_text() == 'precious'


def test_what_a_checkpoint_links_to_is_not_removed(run, train, tmp_path):
    for name in ('victim', 'run/checkpoints/step_00000003'):
        os.makedirs(
            tmp_path / name if name == 'victim' else f'{run}/{name.removeprefix("run/")}',
            exist_ok=True,
        )
    for path in (tmp_path / 'victim', pathlib.Path(run) / 'checkpoints' / 'step_00000003'):
        (path / 'thesis.txt').write_text('precious')
    os.symlink(tmp_path / 'victim', f'{run}/checkpoints/step_00000001')
    assert train(run, '--init_from=resume', '--max_iters=12', '--checkpoint_interval=2') == 0
    for path in (tmp_path / 'victim', pathlib.Path(run) / 'checkpoints' / 'step_00000003'):
        assert (path / 'thesis.txt').read_text() == 'precious'
    assert not os.path.lexists(f'{run}/checkpoints/step_00000001')


def log_of(run, ending='log'):
    (found,) = glob.glob(f'{run}/run_*.{ending}')
    return found


def link_log(run, tmp_path, ending='log'):
    (tmp_path / 'id_rsa').write_text('PRIVATE')
    log = log_of(run, ending)
    os.remove(log)
    os.symlink(tmp_path / 'id_rsa', log)


@pytest.mark.parametrize('ending', ['log', 'jsonl'])
def test_a_link_in_place_of_a_log_is_neither_sent_nor_written_to(
    run, train, tmp_path, capsys, ending
):
    link_log(run, tmp_path, ending)
    assert (
        train(
            tmp_path / 'out',
            '--init_from=resume',
            f'--resume_from={run}',
            '--max_iters=6',
            f'--upload_to=file://{tmp_path}/bucket',
        )
        == 2
    )
    assert checkpoints.main([run, f'--copy_to=file://{tmp_path}/bucket2']) in (1, 2)
    assert train(run, '--init_from=resume', '--max_iters=6') == 2
    assert capsys.readouterr().err.count('is a link out of its folder') == 3
    assert (tmp_path / 'id_rsa').read_text() == 'PRIVATE'
    assert not any(
        b'PRIVATE' in path.read_bytes()
        for name in ('bucket', 'bucket2', 'out')
        for path in (tmp_path / name).rglob('*')
        if path.is_file()
    )


def test_folders_of_the_hub_link_to_their_blobs(tmp_path):
    hub, blob = tmp_path / 'models--org--name', 'a' * 40
    for folder in (hub / 'blobs', hub / 'snapshots' / '1' / 'templates', tmp_path / 'mine'):
        folder.mkdir(parents=True)
    (hub / 'blobs' / blob).write_text('{}')
    (tmp_path / 'mine' / 'b').write_text('{}')
    snapshot = hub / 'snapshots' / '1'
    for path, target in (
        (snapshot / 'config.json', f'../../blobs/{blob}'),
        (snapshot / 'other.json', '../../../mine/b'),
        (snapshot / 'above.json', '../../refs'),
        (tmp_path / 'mine' / 'config.json', hub / 'blobs' / blob),
        (tmp_path / 'mine' / 'templates', snapshot / 'templates'),
    ):
        os.symlink(target, path)
    (hub / 'refs').write_text('x')
    (snapshot / 'templates' / 'a.jinja').write_text('x')
    for path in (
        snapshot / 'config.json',
        tmp_path / 'mine' / 'nothing',
        tmp_path / 'mine' / 'config.json',
    ):
        files.check_own(str(path))
    for path, root in (
        (snapshot / 'other.json', None),
        (snapshot / 'above.json', None),
        (tmp_path / 'mine' / 'templates' / 'a.jinja', str(tmp_path / 'mine')),
    ):
        with pytest.raises(UserError, match='is a link out of its folder'):
            files.check_own(str(path), root)


def test_pictures_and_results_replace_a_link(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(os.path.join(ROOT, 'plots'))
    import plot_single_run

    (tmp_path / 'bashrc').write_text('mine')
    for link in (
        log_of(run).replace('.log', '.png'),
        f'{run}/evaluation_00000004.json',
        f'{run}/evaluation_00000004.json.tmp',
    ):
        os.symlink(tmp_path / 'bashrc', link)
    assert plot_single_run.main([run]) == 0
    # what the link leads to holds no results
    assert evaluate.main([f'--out_dir={run}', '--device=cpu']) == 2
    os.remove(f'{run}/evaluation_00000004.json')
    assert evaluate.main([f'--out_dir={run}', '--device=cpu']) == 0
    assert (tmp_path / 'bashrc').read_text() == 'mine' and open(log_of(run, 'png'), 'rb').read(
        4
    ) == b'\x89PNG'


@pytest.mark.parametrize(
    'name',
    [
        'data/meta.pkl',
        'run/manifest.json',
        'run/state.json',
        'run/run.jsonl',
        'hf/config.json',
        'data/broken link',
    ],
)
def test_what_has_no_end_is_not_read(name, run, dataset, train, tmp_path, capsys):
    kind, file = name.split('/')
    if kind == 'data':
        shutil.copytree(dataset, tmp_path / 'set')
        os.remove(tmp_path / 'set' / 'meta.pkl')
        (
            os.symlink('/nowhere', tmp_path / 'set' / 'meta.pkl')
            if file == 'broken link'
            else os.mkfifo(tmp_path / 'set' / 'meta.pkl')
        )
        import train as trainer

        code = trainer.main(
            [
                f'--dataset={tmp_path}/set',
                f'--out_dir={tmp_path}/out',
                '--device=cpu',
                '--compile=False',
                '--max_iters=1',
            ]
        )
    elif kind == 'hf':
        (tmp_path / 'hf').mkdir()
        os.mkfifo(tmp_path / 'hf' / 'config.json')
        code = train(tmp_path / 'out', f'--init_from={tmp_path}/hf')
    else:
        path = log_of(run, 'jsonl') if file == 'run.jsonl' else f'{newest(run)}/{file}'
        os.remove(path)
        os.mkfifo(path)
        if file != 'run.jsonl':
            assert 'damaged' in store.corruption_reason(
                newest(run)
            ) or 'missing' in store.corruption_reason(newest(run))
            assert checkpoints.main([run]) == 1
            return
        code = train(run, '--init_from=resume', '--max_iters=6')
    error = capsys.readouterr().err
    assert (
        code == 2
        and error.count('\n') == 1
        and ('a pipe or a device' in error or 'a broken link' in error or kind == 'hf')
    ), error


NANOGPT = dict(n_layer=1, n_head=2, n_embd=32, block_size=16, bias=False, vocab_size=41)


def test_a_checkpoint_of_nanogpt_sends_nothing(dataset, tmp_path, capsys):
    n, V, T = NANOGPT['n_embd'], 41, 16
    shapes = {
        'wte': (V, n),
        'wpe': (T, n),
        'h.0.ln_1': (n,),
        'h.0.attn.c_attn': (3 * n, n),
        'h.0.attn.c_proj': (n, n),
        'h.0.ln_2': (n,),
        'h.0.mlp.c_fc': (4 * n, n),
        'h.0.mlp.c_proj': (n, 4 * n),
        'ln_f': (n,),
    }
    model = {
        f'transformer.{name}.weight': (
            torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape)
        )
        for name, shape in shapes.items()
    }
    model['lm_head.weight'] = model['transformer.wte.weight']
    (tmp_path / 'ng').mkdir()
    (tmp_path / 'secret').write_text('the fox')
    torch.save(
        {
            'model': model,
            'optimizer': {'state': {}, 'param_groups': []},
            'model_args': {**NANOGPT, 'dropout': 0.0},
            'iter_num': 2,
            'best_val_loss': 3.0,
            'config': dict(
                upload_to=f'file://{tmp_path}/sent',
                sample_start=f'FILE:{tmp_path}/secret',
                sample_interval=1,
                batch_size=2,
                gradient_accumulation_steps=1,
                eval_iters=2,
                eval_interval=2,
                max_iters=5,
            ),
        },
        tmp_path / 'ng' / 'ckpt.pt',
    )
    import train as trainer

    assert (
        trainer.main(
            [
                '--init_from=resume',
                f'--out_dir={tmp_path}/ng',
                '--device=cpu',
                '--compile=False',
                f'--dataset={dataset}',
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        'upload_to=' in said
        and 'is not taken over' in said
        and 'the fox' not in said
        and not (tmp_path / 'sent').exists()
    )


IMPOSSIBLE = dict(
    eval_interval=0,
    log_interval=0,
    batch_size=-1,
    gradient_accumulation_steps=0,
    context_parallel=0,
    dropout=2,
    learning_rate=-1e-3,
    beta1=1.5,
    loss_chunk=-1,
    eval_iters=0,
    weight_decay=-1,
    grad_clip=-1,
    muon_momentum=5,
    spike_factor=0.5,
    keep_checkpoints=-5,
    checkpoint_interval=-5,
    warmup_iters=-5,
    seed=-1,
    max_bad_steps=0,
    optimizer='muon',
    dataloader_num_workers=-1,
)


@pytest.mark.parametrize('key', IMPOSSIBLE)
def test_settings_of_a_checkpoint_that_no_run_can_have(key, run, train, capsys):
    """Of two kinds: out of range, and such that the tensors do not fit."""
    edit_state(newest(run), **{f'config_{key}': IMPOSSIBLE[key]})
    settings = ['--init_from=resume', f'--out_dir={run}', '--device=cpu', '--max_iters=6']
    import train as trainer

    assert store.corruption_reason(newest(run)) is None and trainer.main(settings) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and (
        key in error or 'it is not the checkpoint of such a run' in error
    ), error


@pytest.mark.parametrize(
    'key', ['config', 'config_n_layer', 'config_vocab_size', 'config_arch_preset']
)
def test_a_state_without_a_shape(key, run, capsys):
    path = newest(run)
    with open(f'{path}/state.json', encoding='utf-8') as f:
        state = json.load(f)
    (state if key == 'config' else state['config']).pop(key.removeprefix('config_'))
    with open(f'{path}/state.json', 'w', encoding='utf-8') as f:
        json.dump(state, f)
    seal(path)
    import train as trainer

    for command in (
        lambda: trainer.main(
            [
                '--init_from=resume',
                '--resume_from=4',
                f'--out_dir={run}',
                '--device=cpu',
                '--max_iters=6',
            ]
        ),
        lambda: sample.main([f'--out_dir={run}', '--step=4', '--device=cpu']),
        lambda: export.main([f'--out_dir={run}', '--step=4', f'--to={run}/hf']),
    ):
        assert command() == 2
        assert capsys.readouterr().err.count('\n') == 1


def bpe(**changes):
    return json.dumps(
        {
            'version': '1.0',
            'truncation': None,
            'padding': None,
            'added_tokens': [],
            'normalizer': None,
            'pre_tokenizer': None,
            'post_processor': None,
            'decoder': None,
            'model': {'type': 'BPE', 'vocab': {'a': 0, 'b': 1, 'ab': 2}, 'merges': ['a b']},
            **changes,
        }
    ).encode()


@pytest.mark.parametrize(
    'content, message',
    [
        (
            bpe(
                model={
                    'type': 'BPE',
                    'vocab': {'a': 0, 'é': 1, 'aé': 2},
                    'merges': ['a é'],
                    'continuing_subword_prefix': '#',
                }
            ),
            'merges without its continuing_subword_prefix',
        ),
        (
            bpe(
                model={
                    'type': 'BPE',
                    'vocab': {'a': 0, 'b': 1, 'ab': 2},
                    'merges': [['a', 'b']],
                    'continuing_subword_prefix': '########',
                }
            ),
            'merges without its continuing_subword_prefix',
        ),
        (
            bpe(
                model={
                    'type': 'BPE',
                    'vocab': {'a': 0, 'b': 1, 'ab': 2},
                    'merges': ['a b'],
                    'dropout': 0.5,
                }
            ),
            'other ids of the same text each time',
        ),
        (
            bpe(normalizer={'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}),
            'cannot be read|cannot encode',
        ),
        (
            bpe(normalizer={'type': 'Precompiled', 'precompiled_charsmap': 'BAAAAP////8AAAAA'}),
            'cannot be read|cannot encode',
        ),
        (
            bpe(decoder={'type': 'Strip', 'content': 'b', 'start': 0, 'stop': 10**6}),
            'cannot decode',
        ),
    ],
    ids=range(6),
)
def test_a_tokenizer_that_panics_is_refused(content, message, tmp_path):
    (tmp_path / 'tokenizer.json').write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokenizer = load_tokenizer(str(tmp_path))
        tokenizer.decode(tokenizer.encode('abab'))
        tokenizer.decode(tokenizer.encode('b'))


def test_credentials_in_the_url_of_a_bucket_are_refused_and_hidden():
    for url in ('s3://AKIA:hunter2/hunter2@bucket/x', 'gs://AKIA:hunter2@bucket/x'):
        with pytest.raises(UserError, match='has a user or a password in it') as error:
            files.open_url(url)
        assert 'hunter2' not in str(error.value)


def test_texts_of_a_checkpoint_are_one_line(run, capsys):
    edit_state(newest(run), time='\x1b[2J\x1b[31mOWNED')
    assert checkpoints.main([run]) == 1
    said = capsys.readouterr().out
    assert '\x1b' not in said and 'time is' in said


def test_what_is_written_beside_a_log_follows_no_link(run, train, tmp_path, capsys):
    with open(log_of(run, 'jsonl'), 'a') as f:
        f.write('touch CODE_RAN\n')
    for name in ('bashrc', 'thesis'):
        (tmp_path / name).write_text('mine')
    os.symlink(tmp_path / 'bashrc', f'{log_of(run, "jsonl")}.damaged')
    assert train(run, '--init_from=resume', '--max_iters=5') == 2
    os.remove(f'{log_of(run, "jsonl")}.damaged')
    os.remove(f'{run}/.lock')
    os.symlink(tmp_path / 'thesis', f'{run}/.lock')
    assert train(run, '--init_from=resume', '--max_iters=5') == 2
    assert (tmp_path / 'bashrc').read_text() == (tmp_path / 'thesis').read_text() == 'mine'


def test_copies_and_exports_write_through_no_link(run, tmp_path, capsys):
    assert checkpoints.main([run, f'--copy_to={tmp_path}/cp', '--step=2']) == 0
    (copied,) = glob.glob(f'{tmp_path}/cp/run/run_*')
    assert export.main([f'--out_dir={run}', f'--to={tmp_path}/hf', '--no_check']) == 0
    for name in ('log', 'state', 'config'):
        (tmp_path / name).write_text('mine')
    os.makedirs(f'{copied}/checkpoints/step_00000004')
    os.remove(glob.glob(f'{copied}/run_*.log')[0])
    os.remove(f'{tmp_path}/hf/config.json')
    for link, name in (
        (f'{copied}/{os.path.basename(log_of(run))}', 'log'),
        (f'{copied}/checkpoints/step_00000004/state.json', 'state'),
        (f'{tmp_path}/hf/config.json', 'config'),
    ):
        os.symlink(tmp_path / name, link)
    assert checkpoints.main([run, f'--copy_to={tmp_path}/cp']) == 0
    assert (
        export.main([f'--out_dir={run}', f'--to={tmp_path}/hf', '--no_check']) == 2
        and 'holds the link config.json' in capsys.readouterr().err
    )
    assert [(tmp_path / name).read_text() for name in ('log', 'state', 'config')] == ['mine'] * 3


def test_a_copy_of_data_and_a_tokenizer_write_through_no_link(tmp_path, dataset):
    (tmp_path / 'data' / 'x' / 'copy').mkdir(parents=True)
    (tmp_path / 'thesis').write_text('precious')
    stated = read_meta(dataset)['fingerprint']['train']
    os.symlink(tmp_path / 'thesis', tmp_path / 'data' / 'x' / 'copy' / f'{stated[:8]}_train.bin')
    with pytest.raises(UserError, match='cannot be reached'):
        open_dataset('x', str(tmp_path), f'file://{dataset}')
    from onetrain.tokenizers.base import HuggingFaceTokenizer

    (tmp_path / 'own').mkdir()
    (tmp_path / 'own' / 'tokenizer.json').write_bytes(bpe())
    (tmp_path / 'set' / 'tokenizer').mkdir(parents=True)
    os.symlink(tmp_path / 'thesis', tmp_path / 'set' / 'tokenizer' / 'tokenizer.json')
    HuggingFaceTokenizer.of_folder(str(tmp_path / 'own')).describe(str(tmp_path / 'set'))
    assert (tmp_path / 'thesis').read_text() == 'precious' and (
        tmp_path / 'set' / 'tokenizer' / 'tokenizer.json'
    ).read_bytes() == bpe()


@pytest.mark.parametrize(
    'data',
    [
        b'\x80\x02})' + b'\x85' * 3_000_000 + b'Ns.',
        b'\x80\x02}' + b'(' * 100_000 + b't' * 100_000 + b'Ns.',
        b'\x80\x02}N' + b'\x85\x94' * 200 + b'Ns.',
    ],
    ids=['tuples of one', 'marks', 'kept'],
)
def test_pickles_nested_deeply_are_refused(data, run, tmp_path):
    for parse in (lambda: files.refuse_deep_pickle(data), lambda: dcp_metadata.parse(data, {})):
        with pytest.raises(ValueError, match='nested more than 100 deep'):
            parse()
    (tmp_path / 'meta.pkl').write_bytes(data)
    with pytest.raises(ValueError, match='nested more than 100 deep'):
        read_meta(str(tmp_path))


@pytest.mark.parametrize(
    'data',
    [
        b'\x80\x04}' + b')' + b'2\x86' * 45 + b'K\x01s.',
        b'\x80\x04})\x94' + b''.join(b'h%ch%c\x86\x94' % (i, i) for i in range(45)) + b'K\x01s.',
    ],
    ids=['twice', 'kept'],
)
def test_tuples_that_take_for_ever_to_hash_are_refused(data, tmp_path):
    (tmp_path / 'meta.pkl').write_bytes(data)
    for read in (lambda: read_meta(str(tmp_path)), lambda: dcp_metadata.parse(data, {})):
        with pytest.raises(ValueError, match='a tuple of more than 1,000 items'):
            read()


def test_large_pickles_are_not_deep():
    value = {
        'long': list(range(5000)),
        'set': set(range(5000)),
        'pairs': [(str(i), i) for i in range(5000)],
        **{f'k{i}': [i, (i, (i, 'x')), {'a': {i}}] for i in range(3000)},
    }
    for protocol in (0, 2, 4):
        files.refuse_deep_pickle(pickle.dumps(value, protocol=protocol))


def test_what_a_killed_process_was_writing_goes_after_an_hour(tmp_path):
    for name, age in (
        ('a.json.0123abcd.tmp', 7200),
        ('a.json.0123abce.tmp', 60),
        ('b.json.0123abcd.tmp', 7200),
    ):
        (tmp_path / name).write_text('x')
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with files.replacing(str(tmp_path / 'a.json')) as f:
        f.write(b'y')
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'a.json',
        'a.json.0123abce.tmp',
        'b.json.0123abcd.tmp',
    ]


@pytest.mark.parametrize('change', [{'iter_num': 'x'}, {'iter_num': 3.5}, {'config': 5}], ids=str)
def test_an_odd_checkpoint_of_nanogpt_is_none(change, tmp_path):
    from onetrain.checkpoint import import_nanogpt

    content = {
        'model': {'transformer.wte.weight': torch.zeros(4, 4)},
        'optimizer': {'state': {}},
        'model_args': dict(n_layer=1, n_head=1, n_embd=4, block_size=4, vocab_size=4),
        'iter_num': 3,
        'best_val_loss': 1.0,
        'config': {},
    }
    torch.save(content, tmp_path / 'ckpt.pt')
    assert import_nanogpt.read_checkpoint(str(tmp_path / 'ckpt.pt'))['step'] == 3
    torch.save({**content, **change}, tmp_path / 'ckpt.pt')
    with pytest.raises(UserError, match='is not a checkpoint of nanoGPT'):
        import_nanogpt.read_checkpoint(str(tmp_path / 'ckpt.pt'))
