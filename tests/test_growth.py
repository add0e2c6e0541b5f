"""What a run costs grows no faster than it must: descriptors, bytes read and hashed, and
collectives are counted, not timed.
"""

import json
import os
import resource
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TINY, losses, run_train, write_dataset
from ranks import ranks

from onetrain import descriptors
from onetrain.checkpoint import store
from onetrain.config import UserError
from onetrain.data import dataset as datasets
from onetrain.data.loader import TrainLoader
from onetrain.data.order import order_of
from onetrain.data.token_file import TokenFileWriter
from onetrain.descriptors import Descriptors
from onetrain.prepare import pipeline
from onetrain.tokenizers.base import load_tokenizer

# ---- descriptors and parts


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    """A data set in 400 files, and the same in one."""
    folder = tmp_path_factory.mktemp('parts')
    ids = np.random.default_rng(0).integers(0, 61, (400, 50))
    settings = dict(vocab_size=61, eot_id=None, tokenizer={'kind': 'char'}, split='as given')
    for name, sharded in (('many', True), ('one', False)):
        with TokenFileWriter(str(folder / name), sharded=sharded, **settings) as writer:
            for part in ids:
                writer.append('train', part.astype(np.uint16), [len(part)])
            writer.append('val', ids[0].astype(np.uint16), [50])
    return folder


def open_files():
    return len(os.listdir('/proc/self/fd'))


@pytest.fixture
def few(monkeypatch):
    """At most 40 more files may be open than are now; Descriptors keep eight."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = Descriptors(8)
    monkeypatch.setattr(datasets, 'FILES', few)
    monkeypatch.setattr('onetrain.data.remote.FILES', few)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + 40, limits[1]))
    yield few
    few.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize('far', [False, True], ids=['folder', 'data_url'])
def test_parts_beyond_the_limit_of_open_files(parts, tmp_path, few, far):
    (tmp_path / 'data').mkdir()
    train, val, _ = (
        datasets.open_dataset('x', str(tmp_path), f'file://{parts}/many')
        if far
        else datasets.open_dataset(str(parts / 'many'), '/')
    )
    whole = datasets.open_dataset(str(parts / 'one'), '/')[0]
    before = open_files()
    assert train.slice(0, len(train)).tolist() == whole.slice(0, len(whole)).tolist()
    starts = np.random.default_rng(1).integers(0, len(train) - 81, 300)
    assert (
        torch.equal(train.windows(starts, 80), whole.windows(starts, 80))
        and val.slice(0, 50).tolist() == whole.slice(0, 50).tolist()
    )
    assert open_files() <= before + 8 and len(few.open) <= 8


def test_worker_processes_read_parts(parts):
    file = datasets.open_dataset(str(parts / 'many'), '/')[0]
    seen = []
    for workers in (0, 2):
        loader = TrainLoader(
            file,
            order_of(file, 70, 1),
            batch_size=4,
            rank=0,
            world_size=1,
            position=0,
            device=torch.device('cpu'),
            num_workers=workers,
        )
        seen.append([loader.next()[0].tolist() for _ in range(20)])
        loader.close()
    assert seen[0] == seen[1]


def test_a_file_that_became_shorter_is_named(tmp_path):
    write_dataset(str(tmp_path), np.zeros(500, int), np.zeros(100, int))
    train = datasets.open_dataset(str(tmp_path), '/')[0]
    os.truncate(tmp_path / 'train.bin', 600)
    with pytest.raises(OSError, match='train.bin has become shorter: it ends at byte 600'):
        train.windows(np.array([250]), 100)


def test_the_limit_of_open_files_is_raised():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1] - 1, limits[1]))
        descriptors.raise_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# ---- the largest id


def test_the_largest_id_is_read_once_where_nothing_states_it(tmp_path, monkeypatch):
    read = []
    whole = datasets.LocalFile.max
    monkeypatch.setattr(
        datasets.LocalFile, 'max', lambda self: read.append(self.path) or whole(self)
    )
    for split, ids in (('train', [3, 2999, 5]), ('val', [7, 8, 9])):
        np.array(ids * 100, np.uint16).tofile(tmp_path / f'{split}.bin')
    for _ in range(3):
        train, val, _ = datasets.open_dataset(str(tmp_path), '/')
        assert (train.max_id, val.max_id) == (2999, 9) and len(read) == 2
    np.array([1, 5000] * 150, np.uint16).tofile(tmp_path / 'train.bin')  # another file
    assert datasets.open_dataset(str(tmp_path), '/')[0].max_id == 5000 and len(read) == 3
    for odd in ('[1]', '{"x": "y"}', 'no json', json.dumps({train.fingerprint: -1})):
        (tmp_path / 'max_id.json').write_text(odd)
        assert datasets.open_dataset(str(tmp_path), '/')[0].max_id == 5000


def test_what_is_stated_is_not_read_and_every_batch_is_held_to_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.LocalFile, 'max', lambda self: pytest.fail('read in whole'))
    ids = np.zeros(20_000, int)
    write_dataset(str(tmp_path / 'set'), ids, ids[:4000])
    file = np.memmap(tmp_path / 'set' / 'train.bin', np.uint16, 'r+')
    for at in range(300, 20_000, 16):  # a damage that the fingerprint may not see
        file[at] = 60_000
    file.flush()
    monkeypatch.setattr(
        datasets,
        'fingerprint_of_files',
        lambda paths: datasets.read_meta(str(tmp_path / 'set'))['fingerprint'][
            os.path.basename(paths[0]).split('.')[0]
        ],
    )
    train = datasets.open_dataset(str(tmp_path / 'set'), '/')[0]
    for read in (lambda: train.windows(np.array([0, 5000]), 64), lambda: train.slice(300, 400)):
        with pytest.raises(
            UserError,
            match='train.bin holds token id 60000, and 0 is the largest that it is known to have',
        ):
            read()
    assert train.slice(0, 300).max() == 0
    assert (
        run_train(str(tmp_path / 'set'), tmp_path / 'out', '--max_iters=2', '--eval_at_start=False')
        == 2
        and 'holds token id 60000' in capsys.readouterr().err
    )


# ---- many ranks


def counted_run(arguments):
    """train.py on this rank: its exit code and what it did, by name."""
    import train
    from onetrain.descriptors import FILES
    from onetrain.distributed import layouts
    from onetrain.training import run_data

    counts = dict.fromkeys(('host', 'opened', 'hashed', 'read_from_checkpoint'), 0)
    hashed, real = [], {}

    def counting(owner, name, count):
        real[owner, name] = original = getattr(owner, name)

        def call(*args, **kwargs):
            count(*args, **kwargs)
            return original(*args, **kwargs)

        setattr(owner, name, call)

    def add(key, number=1):
        counts[key] += number

    counting(
        dist,
        'all_reduce',
        lambda tensor, *_, op=None, **more: add('host', int(op == dist.ReduceOp.MAX)),
    )
    counting(dist, 'all_gather', lambda *_, **more: add('host'))
    counting(run_data, 'open_dataset', lambda *_: add('opened'))
    counting(
        store,
        'sha256',
        lambda path, *_: hashed.append(
            (os.path.basename(os.path.dirname(path)), os.path.basename(path))
        ),
    )
    counting(
        store,
        '_load',
        lambda path, tensors, world=None: add(
            'read_from_checkpoint',
            sum(
                t.nbytes if not isinstance(t, layouts.DTensor) else t.to_local().nbytes
                for t in tensors.values()
            ),
        ),
    )
    try:
        code = train.main(arguments)
    finally:
        for (owner, name), original in real.items():
            setattr(owner, name, original)
        FILES.close()
    return code, counts, hashed


def arguments(dataset, out_dir, *more):
    return [
        f'--dataset={dataset}',
        f'--out_dir={out_dir}',
        *TINY,
        '--eval_at_start=False',
        '--eval_interval=100',
        *more,
    ]


def test_host_collectives_of_an_iteration(dataset, tmp_path):
    """One a micro-step, hidden behind it, and one a logged iteration: the same whatever the layout
    and the number of ranks.
    """
    for layout in ([], ['--use_fsdp=True']):
        found = {}
        for iterations in (5, 15):
            out = tmp_path / f'{len(layout)}-{iterations}'
            answers = ranks(2)(
                counted_run,
                arguments(
                    dataset,
                    out,
                    *layout,
                    f'--max_iters={iterations}',
                    '--gradient_accumulation_steps=3',
                    '--log_interval=5',
                    '--save_log_to_json=False',
                ),
            )
            assert [code for code, *_ in answers] == [0, 0] and answers[0][1]['host'] == answers[1][
                1
            ]['host']
            found[iterations] = answers[0][1]['host']
        assert found[15] - found[5] == 10 * 3 + 2


def test_one_process_of_a_machine_opens_the_data(dataset, tmp_path):
    answers = ranks(2)(counted_run, arguments(dataset, tmp_path, '--max_iters=2'))
    assert [counts['opened'] for _, counts, _ in answers] == [1, 0]


@pytest.mark.parametrize(
    'layout', [[], ['--use_zero1=True'], ['--use_fsdp=True']], ids=['DDP', 'ZeRO-1', 'ZeRO-3']
)
def test_every_byte_of_a_checkpoint_is_hashed_once_by_one_rank(dataset, tmp_path, layout):
    """Once after it was written and once at a start, which auto_resume does twice as cheaply as it
    looks; what all ranks hold is read by one.
    """
    run = arguments(dataset, tmp_path, *layout, '--checkpoint_interval=4', '--auto_resume=True')
    first = ranks(2)(counted_run, [*run, '--max_iters=4'])
    again = ranks(2)(counted_run, [*run, '--max_iters=5'])
    assert [code for code, *_ in first + again] == [0] * 4
    shards = {
        name
        for name in os.listdir(tmp_path / 'checkpoints' / 'step_00000004')
        if name.endswith('.distcp')
    }
    assert len(shards) == 2

    def of(answers, folder):
        return sorted(
            name
            for _, _, hashed in answers
            for where, name in hashed
            if where == folder and name in shards
        )

    assert of(first, '.writing_step_00000004') == sorted(shards) and of(
        again, 'step_00000004'
    ) == sorted(shards)
    # each rank its share
    assert all(any(name in shards for _, name in hashed) for _, _, hashed in first + again)
    read = [counts['read_from_checkpoint'] for _, counts, _ in again]
    size = store.tensor_bytes(store.path_of(str(tmp_path), 4))
    if layout == []:
        assert read[1] == 0 and 0.5 * size < read[0] <= size
    else:
        assert sum(read) <= size and min(read) > 0.1 * size


def test_a_flipped_bit_is_found_by_the_rank_whose_share_it_is(dataset, tmp_path):
    run = arguments(dataset, tmp_path, '--checkpoint_interval=2', '--auto_resume=True')
    assert [code for code, *_ in ranks(2)(counted_run, [*run, '--max_iters=4'])] == [0, 0]
    for name in ('__0_0.distcp', '__1_0.distcp'):
        copy = tmp_path / name
        shutil.copytree(tmp_path / 'checkpoints', copy / 'checkpoints')
        path = copy / 'checkpoints' / 'step_00000004' / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        answers = ranks(2)(
            counted_run,
            [
                *(
                    word.replace(str(tmp_path), str(copy)) if word.startswith('--out_dir') else word
                    for word in run
                ),
                '--max_iters=4',
            ],
        )
        assert [code for code, *_ in answers] == [0, 0]
        assert (copy / 'checkpoints' / 'rejected_step_00000004').exists() and store.newest_whole(
            str(copy)
        ) == (4, [])
        assert max(losses(copy)) == 4


def reductions_over_replicas(arguments):
    """All-reduces of gradients between groups of hybrid sharding, in a run."""
    import train
    from onetrain.distributed import layouts

    worlds, found, real, arrange = [], [], dist.all_reduce, layouts.choose_layout

    def note(tensor, *args, **kwargs):
        group = kwargs.get('group')
        found.append(
            bool(worlds)
            and group is not None
            and worlds[0].mesh is not None
            and group == worlds[0].mesh.get_group(0)
        )
        return real(tensor, *args, **kwargs)

    dist.all_reduce = note
    layouts.choose_layout = lambda world, *args: (arrange(world, *args), worlds.append(world))[0]
    try:
        return train.main(arguments), sum(found)
    finally:
        dist.all_reduce, layouts.choose_layout = real, arrange


def test_hybrid_sharding_sums_over_replicas_once_a_step(dataset, tmp_path):
    found = {}
    for accumulation in (1, 4):
        run = arguments(
            dataset,
            tmp_path / str(accumulation),
            '--use_fsdp=True',
            '--fsdp_replicas=2',
            '--max_iters=3',
            f'--gradient_accumulation_steps={accumulation}',
        )
        answers = ranks(4)(reductions_over_replicas, run)
        assert [code for code, _ in answers] == [0] * 4
        found[accumulation] = answers[0][1]
    assert found[1] == found[4] > 0


def test_a_plan_does_not_grow_with_its_files(tmp_path):
    """A part of a large file is one unit, and small files share a part, whichever split they go
    to.
    """
    with open(tmp_path / 'large.jsonl', 'w') as f:
        f.write('{"text": "a"}\n')
        f.truncate(2**36)
    tokenizer = load_tokenizer('bytes')
    large = pipeline.Plan.of_files([str(tmp_path / 'large.jsonl')], tokenizer)
    assert (
        1700 < len(large.parts) <= 2000
        and {len(part) for part in large.parts} == {1}
        and large.size() == 2**36
    )
    assert [part[0].begin for part in large.parts[1:]] == [part[0].end for part in large.parts[:-1]]
    small = [str(tmp_path / f'{i}.txt') for i in range(100)]
    for path in small:
        with open(path, 'w') as f:
            f.write('some lines\n' * 40)
    (part,) = pipeline.Plan.of_files(small, tokenizer, txt_val_fraction=0.1).parts
    assert [unit.split for unit in part] == ['train', 'val'] * 100
    twice = pipeline.Plan.of_files([small[0], small[0]], tokenizer).parts
    assert [unit.path for unit in twice[0]] == [small[0]] * 2
