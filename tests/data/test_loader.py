"""The training stream is a pure function of (seed, position): a permutation per epoch, the same for
any layout, resumable anywhere.
"""

import itertools
import os
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from conftest import write_dataset

from onetrain.config import UserError
from onetrain.counter_rng import permute
from onetrain.data.dataset import check_vocab_and_length, open_dataset
from onetrain.data.loader import TrainLoader, evaluation_batches
from onetrain.data.order import WindowOrder
from onetrain.descriptors import FILES
from onetrain.ops.cross_entropy import IGNORE

CPU = torch.device('cpu')


def open_split(folder, split='train'):
    return dict(zip(('train', 'val'), open_dataset(folder, '/')))[split]


@pytest.fixture
def counting(tmp_path):
    """A data set whose token i is i, so that a batch tells where it came from."""
    return write_dataset(
        str(tmp_path / 'counting'), np.arange(5000), np.arange(1000), vocab_size=5000
    )


@pytest.mark.parametrize('n', [1, 2, 3, 7, 64, 1000, 4097, 10007])
def test_permutation_is_a_bijection(n):
    assert sorted(permute(np.arange(n), n, key=5)) == list(range(n))


def test_permutation_depends_on_its_key_and_looks_random():
    a, b = permute(np.arange(10000), 10000, key=1), permute(np.arange(10000), 10000, key=2)
    assert (a != b).mean() > 0.99
    for x in (a, b):
        # 4 standard deviations of the correlation of random orders
        assert abs(np.corrcoef(x, np.arange(10000))[0, 1]) < 0.04
        assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 0.04
    # three windows have six orders; all of them come up
    assert {tuple(permute(np.arange(3), 3, key=k)) for k in range(200)} == set(
        itertools.permutations(range(3))
    )


def test_an_epoch_shows_every_token_once_but_for_the_ends():
    n_tokens, T = 5000, 32
    order = WindowOrder(n_tokens, T, seed=1)
    for epoch in range(3):
        starts = order.starts(epoch * order.per_epoch, order.per_epoch)
        targets = (starts[:, None] + 1 + np.arange(T)).ravel()
        assert len(set(targets)) == len(targets)
        assert len(targets) > n_tokens - 2 * T - 1
        assert 0 <= starts.min() and starts.max() + T + 1 <= n_tokens


def test_epochs_differ_in_order_and_offset():
    order = WindowOrder(5000, 32, seed=1)
    epochs = [order.starts(e * order.per_epoch, order.per_epoch) for e in range(8)]
    assert len({tuple(e) for e in epochs}) == 8
    assert len({e.min() % 32 for e in epochs}) > 3
    assert (order.starts(0, 100) != WindowOrder(5000, 32, seed=2).starts(0, 100)).any()


@pytest.mark.parametrize('n_tokens', [17, 18, 32, 33, 50])
def test_the_smallest_data_sets_have_a_window(n_tokens):
    order = WindowOrder(n_tokens, 16, seed=0)
    starts = order.starts(0, 20)
    assert starts.min() >= 0 and starts.max() + 17 <= n_tokens


def test_positions_are_a_pure_function():
    order = WindowOrder(5000, 32, seed=1)
    whole = order.starts(0, 1000)
    pieces = np.concatenate([order.starts(p, 7) for p in range(0, 1000, 7)])[:1000]
    assert (whole == pieces).all()


def open_loader(file, **options):
    defaults = dict(batch_size=4, rank=0, world_size=1, position=0, device=CPU)
    return TrainLoader(file, WindowOrder(len(file), 32, seed=3), **{**defaults, **options})


def sequences(file, *, batch_size, world_size, accumulation, steps, position=0, **options):
    """First tokens of the sequences of each step, in the order of the stream."""
    size = dict(batch_size=batch_size, world_size=world_size, position=position)
    loaders = [open_loader(file, rank=r, **size, **options) for r in range(world_size)]
    rows = []
    for _ in range(steps):
        for _ in range(accumulation):
            for loader in loaders:
                x, y, _ = loader.next()
                assert (
                    torch.equal(x[:, 1:], y[:, :-1])
                    and x.dtype == torch.int64
                    and x.shape == (batch_size, 32)
                )
                rows += x[:, 0].tolist()
    for loader in loaders:
        loader.close()
    return rows


def test_same_steps_for_any_world_size_and_micro_batch(counting):
    file = open_split(counting)
    reference = sequences(file, batch_size=4, world_size=1, accumulation=4, steps=20)
    for layout in (
        dict(batch_size=4, world_size=2, accumulation=2),
        dict(batch_size=4, world_size=4, accumulation=1),
        dict(batch_size=2, world_size=4, accumulation=2),
        dict(batch_size=16, world_size=1, accumulation=1),
    ):
        assert sequences(file, **layout, steps=20) == reference
    assert (
        sequences(file, batch_size=4, world_size=1, accumulation=4, steps=12, position=8 * 16)
        == reference[8 * 16 :]
    )


def test_worker_processes_give_the_same_batches(counting):
    file = open_split(counting)
    layout = dict(batch_size=4, world_size=1, accumulation=2, steps=10, position=40)
    assert sequences(file, **layout, num_workers=2) == sequences(file, **layout)


@pytest.mark.parametrize('remote', (False, True))
def test_workers_inherit_no_lock_of_a_thread_that_reads(counting, remote, tmp_path):
    """Text bytes are counted, and copies made, by threads of the process that starts workers."""
    if remote:
        file, _, _ = open_dataset('there', str(tmp_path), f'file://{counting}')
        lock = file.pieces[0].storage.lock
    else:
        file, lock = open_split(counting), FILES.lock
    held = threading.Event()

    def read():
        with lock:
            held.set()
            time.sleep(0.5)

    threading.Thread(target=read).start()
    held.wait()
    loader = open_loader(file, num_workers=1)
    limit = time.monotonic() + 30
    batch = loader.next(lambda: time.monotonic() > limit)
    loader.close()
    assert batch is not None


def test_evaluation_windows_are_fixed_disjoint_and_independent_of_ranks(counting, tmp_path):
    file = open_split(counting, 'val')
    rows = [x[:, 0].tolist() for x, *_ in evaluation_batches(file, 32, 4, 5)]
    assert rows == [x[:, 0].tolist() for x, *_ in evaluation_batches(file, 32, 4, 5)]
    flat = sorted(sum(rows, []))
    assert len(flat) == 20 and min(np.diff(flat)) >= 32 and flat[-1] > 800
    ranks = [list(evaluation_batches(file, 32, 4, 5, rank, 2)) for rank in range(2)]
    # five batches: in the last round one rank only has targets
    assert len(ranks[0]) == len(ranks[1]) == 3 and (ranks[1][2][1] == IGNORE).all()
    assert [ranks[i % 2][i // 2][0][:, 0].tolist() for i in range(5)] == rows and all(
        (y != IGNORE).all() for _, y, _ in [*ranks[0], *ranks[1][:2]]
    )
    for n_tokens in (961, 960, 993):  # whole blocks and a token, one less, one block more
        file = open_split(
            write_dataset(
                str(tmp_path / str(n_tokens)), np.arange(100), np.arange(n_tokens), vocab_size=5000
            ),
            'val',
        )
        batches = list(evaluation_batches(file, 32, 4, 10**6))
        assert sum((y != IGNORE).sum() for _, y, _ in batches) == (n_tokens - 1) // 32 * 32 and all(
            x.shape == y.shape == (4, 32) for x, y, _ in batches
        )
    file = open_split(counting, 'val')
    everything = list(evaluation_batches(file, 32, 4, 10**6))
    # more asked for than there is
    assert sum((y[:, 0] != IGNORE).sum() for _, y, _ in everything) == (1000 - 1) // 32


def test_files_of_nanogpt_are_read_as_they_are(tmp_path):
    folder = tmp_path / 'nano'
    folder.mkdir()
    for split in ('train', 'val'):
        np.arange(3000, dtype=np.uint16).tofile(folder / f'{split}.bin')
    train, _, meta = open_dataset(str(folder), '/')
    assert meta == {} and train.pieces[0].dtype == np.uint16 and train.max_id == 2999
    with open(folder / 'meta.pkl', 'wb') as f:
        pickle.dump({'vocab_size': 3000, 'itos': {0: 'a'}, 'stoi': {'a': 0}}, f)
    train, _, meta = open_dataset(str(folder), '/')
    assert meta['vocab_size'] == 3000 and torch.equal(
        train.windows(np.array([5]), 3), torch.tensor([[5, 6, 7, 8]])
    )


def test_uint32_without_meta_is_recognised_not_misread(tmp_path):
    folder = tmp_path / 'wide'
    folder.mkdir()
    for split in ('train', 'val'):
        np.random.default_rng(0).integers(0, 128256, 3000).astype(np.uint32).tofile(
            folder / f'{split}.bin'
        )
    with pytest.raises(UserError, match='looks like uint32'):
        open_dataset(str(folder), '/')
    with open(folder / 'meta.pkl', 'wb') as f:
        pickle.dump({'dtype': 'uint32'}, f)
    assert len(open_split(str(folder))) == 3000


def test_damaged_files_are_refused(counting):
    path = os.path.join(counting, 'train.bin')
    with open(path, 'ab') as f:
        f.write(b'x')
    with pytest.raises(UserError, match='not a whole number of uint16 tokens'):
        open_split(counting)
    with open(path, 'r+b') as f:
        f.truncate(5000 * 2 - 2)
    with pytest.raises(UserError, match='not the file that its meta.pkl describes'):
        open_split(counting)


def test_ids_and_sizes_are_checked(counting):
    file = open_split(counting)
    check_vocab_and_length(file, 5000, 4999)
    with pytest.raises(UserError, match='token id 4999, beyond vocab_size=4000'):
        check_vocab_and_length(file, 4000, 32)
    with pytest.raises(UserError, match='--block_size=4999 or less'):
        check_vocab_and_length(file, 5000, 5000)


def test_missing_data_names_the_command():
    from conftest import ROOT

    os.makedirs(os.path.join(ROOT, 'data'), exist_ok=True)
    with pytest.raises(UserError, match='own_text/prepare.py'):
        open_dataset('no_such_set', ROOT)
