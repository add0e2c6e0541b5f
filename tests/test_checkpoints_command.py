"""checkpoints.py looks into checkpoints and compares them, and doctor and check tell the truth
about a machine and a copy.
"""

import json
import shutil
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, weights

import checkpoints
from onetrain import doctor, self_check


@pytest.fixture(scope='module')
def run(dataset, tmp_path_factory):
    """A run with checkpoints 4, 8 and 12, of which 12 has another learning rate and 4 is only where
    they are copied to.
    """
    from conftest import run_train

    folder = tmp_path_factory.mktemp('checkpoints')
    out, copies = folder / 'run', [f'--upload_to=file://{folder}/copies', '--upload_keep_local=2']
    assert (
        run_train(
            dataset,
            out,
            '--max_iters=8',
            '--eval_interval=4',
            '--keep_all_checkpoints=True',
            *copies,
        )
        == 0
    )
    assert (
        run_train(
            dataset,
            out,
            '--init_from=resume',
            '--max_iters=12',
            '--eval_interval=4',
            '--keep_all_checkpoints=True',
            '--learning_rate=5e-4',
            *copies,
        )
        == 0
    )
    shutil.rmtree(out / 'checkpoints' / 'step_00000004', ignore_errors=True)
    return out


def of(capsys, run, *words):
    """(exit code, what is printed as JSON)."""
    capsys.readouterr()
    code = checkpoints.main([str(run), *words, '--json'])
    return code, json.loads(capsys.readouterr().out)


def test_view(run, capsys):
    code, found = of(capsys, run, 'view', '8')
    expected = {
        name: tensor for name, tensor in weights(run, 8).items() if name.startswith('model.')
    }
    norms = {tensor['name']: tensor for tensor in found['tensors']}
    assert (
        code == 0
        and found['tokens'] == 8 * 64
        and found['config']['n_layer'] == 2
        and found['versions']['onetrain']
        and found['tokens_per_sec'] > 0
    )
    assert set(expected) == set(norms)
    for name, tensor in expected.items():
        assert norms[name]['shape'] == list(tensor.shape) and norms[name]['norm'] == pytest.approx(
            tensor.double().norm().item(), abs=1e-12
        )
    assert checkpoints.main([str(run), 'view', '8']) == 0
    said = capsys.readouterr().out
    assert (
        'versions: onetrain ' in said
        and '41x32' in said
        and max(map(len, said.splitlines())) <= 140
    )


def test_compare(run, capsys):
    code, found = of(capsys, run, 'compare', '8', '12')
    a, b = (
        {name: tensor for name, tensor in weights(run, step).items() if name.startswith('model.')}
        for step in (8, 12)
    )
    assert (
        code == 0
        and found['config']['learning_rate'] == [1e-3, 5e-4]
        and 'n_layer' not in found['config']
        and not found['unlike']
    )
    rows = {row['part']: row for row in found['weights']}
    assert list(rows) == ['h.0', 'h.1', 'ln_f.weight', 'wpe.weight', 'wte.weight']
    names = [name for name in a if '.h.1.' in name]
    distance = (
        torch.stack([(a[name].double() - b[name].double()).square().sum() for name in names])
        .sum()
        .sqrt()
    )
    norm = torch.stack([a[name].double().square().sum() for name in names]).sum().sqrt()
    assert rows['h.1']['distance'] == pytest.approx(distance.item()) and rows['h.1'][
        'relative'
    ] == pytest.approx((distance / norm).item())
    assert of(capsys, run, 'compare', '8', '8')[1]['weights'][0]['distance'] == 0
    assert checkpoints.main([str(run), 'compare', '8', '12']) == 0
    assert 'learning_rate: 0.001 -> 0.0005' in capsys.readouterr().out


def test_status(run, capsys, tmp_path):
    code, found = of(capsys, run, 'status')
    assert code == 0 and [
        (entry['step'], entry['here'], entry['there'], entry['pending']) for entry in found
    ] == [
        (4, 'removed', 'whole', False),
        (8, 'whole', 'whole', False),
        (12, 'whole', 'whole', False),
    ]
    (copy,) = (run.parent / 'copies' / 'run').iterdir()
    with open(copy / 'checkpoints' / 'step_00000008' / '__0_0.distcp', 'r+b') as f:
        f.seek(300)
        f.write(b'#')
    shutil.move(copy / 'checkpoints' / 'step_00000012', tmp_path)
    try:
        code, found = of(capsys, run, 'status')
        assert code == 1 and [
            (entry['here'], entry['there'], entry['pending']) for entry in found[1:]
        ] == [('whole', 'BROKEN', False), ('whole', 'removed', True)]
        assert checkpoints.main([str(run), 'status']) == 1 and 'pending' in capsys.readouterr().out
    finally:
        shutil.move(tmp_path / 'step_00000012', copy / 'checkpoints')


def test_the_list_as_json(run, capsys):
    code, found = of(capsys, run)
    assert (
        code == 0
        and [entry['step'] for entry in found] == [8, 12]
        and all(entry['broken'] is None and entry['val'] > 0 for entry in found)
    )


@pytest.mark.parametrize(
    'words, message',
    [
        (['view'], "'view' is not understood: type view STEP"),
        (['view', '7'], 'has no checkpoint of step 7; it has 8, 12'),
        (['look', '7'], 'is not understood'),
        (['compare', '8', 'x'], 'is not understood'),
        (['view', '8', '--copy_to=x'], '--copy_to copies'),
    ],
)
def test_what_cannot_be_asked(run, capsys, words, message):
    assert checkpoints.main([str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_an_action_before_the_folder(capsys):
    assert checkpoints.main(['view', 'out-x', '8']) == 2
    assert 'type `python checkpoints.py out-x view 8`' in capsys.readouterr().err
    assert checkpoints.main(['status']) == 2
    assert 'type `python checkpoints.py FOLDER status`' in capsys.readouterr().err


def test_doctor(monkeypatch, tmp_path, capsys):
    assert doctor.main(['--json', f'--url=file://{tmp_path}/place']) == 0
    found = {entry['subject']: entry for entry in json.loads(capsys.readouterr().out)['findings']}
    assert (
        found['torch']['text'] == torch.__version__.split('+')[0]
        or found['torch']['text'] == torch.__version__
    )
    assert (
        found['URL']['state'] == 'ok'
        and found['Memory']['text'].endswith('free')
        and 'Cores' in found
    )
    (tmp_path / 'file').write_text('in the way')
    assert doctor.main([f'--url=file://{tmp_path}/file/place']) == 1
    said = capsys.readouterr().out
    assert '! URL' in said and '-> correct the URL' in said and '1 thing to mend' in said
    version = doctor.importlib.metadata.version

    def without_tqdm(name):
        if name in ('tqdm', 'pyarrow'):
            raise doctor.importlib.metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(doctor.importlib.metadata, 'version', without_tqdm)
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert (
        '! tqdm           not installed (progress bars)' in said
        and "without pyarrow (.parquet files)\n                 -> pip install -e '.[data]'" in said
    )


def test_doctor_of_a_machine_with_gpus(monkeypatch):
    """As far as can be told without one: the sentences about two GPUs, one of which is busy."""
    properties = types.SimpleNamespace(name='NVIDIA H100', total_memory=80e9, major=9, minor=0)
    for name, value in dict(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda i: properties,
        mem_get_info=lambda i: ((70e9, 10e9)[i], 80e9),
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(
        'onetrain.distributed.topology.read_topology', lambda count: {(0, 1): 'SYS'}
    )
    found = {finding.subject: finding for finding in doctor.gpus()}
    assert (
        found['GPU 0'].state == 'ok'
        and 'bfloat16 and float8' in found['GPU 0'].text
        and found['GPU 1'].text.endswith('only 10 GB are free')
    )
    assert found['Topology'].state == 'note' and 'SYS' in found['Topology'].text


@pytest.mark.slow
def test_check(capsys):
    assert self_check.main([]) == 0
    said = capsys.readouterr().out
    assert 'the same to the last bit' in said and 'computes what transformers does' in said


@pytest.mark.slow
def test_check_sees_a_run_that_differs(monkeypatch):
    losses = iter([{1: 2.0}, {1: 2.5}])
    monkeypatch.setattr(self_check, 'losses', lambda folder: next(losses))
    with pytest.raises(ValueError, match='has other losses'):
        self_check.main([])


def test_start_py_knows_its_commands():
    done = subprocess.run(
        [sys.executable, 'start.py', 'doktor'], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and 'python3 start.py doctor' in done.stderr
