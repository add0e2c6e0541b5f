"""Proves that a split in many files, in object storage or in a mixture is read as the same tokens
in the same order.
"""

import fractions
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, losses, records, run_train, write_dataset, write_shards
from ranks import train as ranks_train

from onetrain.config import UserError
from onetrain.data import loader, remote
from onetrain.data.dataset import check_vocab_and_length, open_dataset, parse_mixture
from onetrain.data.loader import evaluation_batches
from onetrain.data.order import MixedOrder, WindowOrder, order_of
from onetrain.data.text_bytes import bytes_of
from onetrain.descriptors import FILES
from onetrain.ops.cross_entropy import IGNORE
from onetrain.tokenizers.base import BytesTokenizer

CPU = torch.device('cpu')


@pytest.fixture
def pair(tmp_path):
    """The same tokens in one file and in many."""
    train, val = np.arange(5000), np.arange(1000)[::-1]
    return write_dataset(str(tmp_path / 'one'), train, val, vocab_size=5000), write_shards(
        tmp_path / 'many', train, val
    )


def same(a, b, T=32):
    assert len(a) == len(b) and a.max_id == b.max_id
    assert [
        a.slice(i, i + n).tolist() for i, n in ((0, 5), (690, 40), (0, len(a)), (len(a), 0))
    ] == [b.slice(i, i + n).tolist() for i, n in ((0, 5), (690, 40), (0, len(b)), (len(b), 0))]
    starts = order_of(a, T, 3).starts(0, 400)
    assert torch.equal(a.windows(starts, T), b.windows(starts, T))
    assert all(
        torch.equal(u, v)
        for x, y in zip(evaluation_batches(a, T, 4, 5), evaluation_batches(b, T, 4, 5), strict=True)
        for u, v in zip(x[:2], y[:2])
    )


def test_many_files_are_read_as_one(pair):
    one, many = (open_dataset(folder, '/') for folder in pair)
    assert len(many[0].pieces) > 10
    for a, b in zip(one[:2], many[:2]):
        same(a, b)
    assert many[0].fingerprint == many[2]['fingerprint']['train'] != one[0].fingerprint


def test_damaged_and_missing_files_of_many(pair):
    path = os.path.join(pair[1], 'train_000004.bin')
    with open(path, 'r+b') as f:
        f.write(b'xx')
    with pytest.raises(UserError, match='not the file that its meta.pkl describes'):
        open_dataset(pair[1], '/')
    with open(path, 'ab') as f:
        f.write(b'xx')
    with pytest.raises(UserError, match='has 1402 bytes, which is not 700 uint16 tokens'):
        open_dataset(pair[1], '/')
    os.remove(path)
    with pytest.raises(UserError, match='train_000004.bin'):
        open_dataset(pair[1], '/')


@pytest.mark.parametrize('which', [0, 1])
@pytest.mark.parametrize('how', ['touched', 'put back', 'replaced', 'written to'])
def test_a_file_that_changes_while_it_is_read(pair, which, how):
    train = open_dataset(pair[which], '/')[0]
    path, right = train.pieces[0].path, train.slice(0, 50).tolist()
    content = open(path, 'rb').read()
    if how == 'touched':
        os.utime(path, (1, 1))
    elif how == 'written to':
        with open(path, 'r+b') as f:
            f.write(b'xx')
    else:
        # under another name first, as rsync does; the descriptor stays that of the former until it
        # is needed for another file
        with open(f'{path}.new', 'wb') as f:
            f.write(content if how == 'put back' else b'xx' + content[2:])
        os.replace(f'{path}.new', path)
        assert train.slice(0, 50).tolist() == right
        FILES.close()
    if how in ('touched', 'put back'):
        assert train.slice(0, 50).tolist() == right == train.slice(0, 50).tolist()
    else:
        with pytest.raises(UserError, match='train.*bin was changed while it was read'):
            train.slice(0, 50)


@pytest.mark.parametrize(
    'more',
    [[], ['--use_dataloader=True', '--dataloader_num_workers=2']],
    ids=['in process', 'workers'],
)
def test_a_run_whose_data_changes_ends_with_a_sentence(tmp_path, pair, monkeypatch, capsys, more):
    taken = loader.TrainLoader.next

    def next_of(self, *given):
        if self.micro == 12:
            with open(os.path.join(pair[0], 'train.bin'), 'r+b') as f:
                f.write(b'xx')
        return taken(self, *given)

    monkeypatch.setattr(loader.TrainLoader, 'next', next_of)
    assert (
        run_train(
            pair[0],
            tmp_path / 'out',
            '--max_iters=50',
            '--checkpoint_interval=5',
            '--checkpoint_async=False',
            '--vocab_size=5000',
            *more,
        )
        == 2
    )
    (error,) = capsys.readouterr().err.splitlines()
    assert 'train.bin was changed while it was read' in error
    assert len(os.listdir(tmp_path / 'out' / 'checkpoints')) >= 2


def test_what_is_not_a_data_set_is_told_with_what_to_type(tmp_path):
    (tmp_path / 'data' / 'own_text').mkdir(parents=True)
    (tmp_path / 'data' / 'own_text' / 'prepare.py').write_text('')
    for name, letters in (('mybooks', 'ab'), ('books2', 'cd')):
        write_dataset(
            str(tmp_path / 'data' / name),
            np.arange(200) % 2,
            np.arange(200) % 2,
            vocab_size=2,
            extra={'stoi': {c: i for i, c in enumerate(letters)}, 'itos': dict(enumerate(letters))},
        )
    for name, message in (
        ('own_text', r'prepare.py --input YOUR.txt --tokenizer char` first'),
        ('mybook', "data, did you mean 'mybooks'$"),
        ('nothing', 'prepared are books2, mybooks; for text of your own run'),
        ('mybooks:1,books2:1', 'char makes its own for each text'),
    ):
        with pytest.raises(UserError, match=message):
            open_dataset(name, str(tmp_path))
    train, val, _ = open_dataset('mybooks', str(tmp_path))
    check_vocab_and_length(val, 2, 199)
    with pytest.raises(UserError, match='type --block_size=199 or less'):
        check_vocab_and_length(val, 2, 200)
    small = write_dataset(str(tmp_path / 'small'), np.arange(9) % 2, [1], vocab_size=2)
    with pytest.raises(UserError, match='has 1 token, and nothing to predict: prepare more text'):
        check_vocab_and_length(open_dataset(small, '/')[1], 2, 1)


def test_names_and_weights():
    assert parse_mixture('a') == [('a', 1)] and parse_mixture('/x/y:z') == [('/x/y:z', 1)]
    assert (
        parse_mixture('a:0.7,b:0.3')
        == [('a', fractions.Fraction(7, 10)), ('b', fractions.Fraction(3, 10))]
        == parse_mixture('a:7, b:3')
    )
    for bad, message in (
        ('a,b', 'is no mixture'),
        ('a:0.5,b', 'is no mixture'),
        ('a:1,b:0', 'above 0'),
        ('a:1,a:2', 'different'),
        ('a:0.123457,b:0.654321', 'round them'),
    ):
        with pytest.raises(UserError, match=message):
            parse_mixture(bad)


@pytest.fixture
def three(tmp_path):
    """Three sets of different size whose tokens tell where they are from."""
    return [
        write_dataset(
            str(tmp_path / name), first + np.arange(n), first + np.arange(n // 4), vocab_size=60_000
        )
        for name, first, n in (('a', 0, 9000), ('b', 20_000, 3000), ('c', 40_000, 1000))
    ]


@pytest.mark.parametrize(
    'weights', [(0.7, 0.3), (0.5, 0.3, 0.2), (1, 1, 1), (0.9, 0.05, 0.05), (0.123, 0.877)]
)
def test_shares_are_exact_and_every_source_keeps_its_order(three, weights):
    spec = ','.join(f'{folder}:{weight}' for folder, weight in zip(three, weights))
    train, val, meta = open_dataset(spec, '/')
    order, T = order_of(train, 32, 3), 32
    assert isinstance(order, MixedOrder) and meta['tokens']['train'] == len(train) == sum(
        len(source) for source in train.sources
    )
    tokens = train.windows(order.starts(0, 5000), T)
    source = tokens[:, 0].numpy() // 20_000
    assert (tokens[:, 1:] - tokens[:, :-1] == 1).all()  # no window crosses from one to the next
    for number, weight in enumerate(weights):
        had, share = np.cumsum(source == number), weight / sum(weights)
        assert np.abs(had - share * np.arange(1, 5001)).max() <= 1
        of_1000 = had[1000:] - had[:-1000]
        assert np.abs(of_1000 - 1000 * share).max() <= 1
        alone = WindowOrder(len(train.sources[number]), T, 3).starts(0, had[-1])
        assert (tokens[source == number][:, 0].numpy() - 20_000 * number == alone).all()
    pieces = np.concatenate([order.starts(p, 7) for p in range(0, 700, 7)])
    assert (pieces == order.starts(0, 700)).all()
    firsts = torch.cat(
        [x[y[:, 0] != IGNORE][:, 0] for x, y, _ in evaluation_batches(val, T, 10, 2)]
    ).numpy()
    counts = np.bincount(firsts // 20_000, minlength=len(weights))
    assert all(
        abs(n - min(20 * w / sum(weights), (len(s) - 1) // T)) < 1
        for n, w, s in zip(counts, weights, val.sources)
    ) and len(set(firsts)) == len(firsts)


def test_losses_of_the_sources_of_a_mixture(three, tmp_path):
    """Of 8 windows in batches of 4, 3 are of the first: one batch is of both. They add up to the
    loss of all, on any number of ranks.
    """
    spec = f'{three[0]}:0.375,{three[1]}:0.625'
    val = open_dataset(spec, '/')[1]
    whole = [
        (x, y, source)
        for rank in range(2)
        for x, y, source in evaluation_batches(val, 16, 4, 2, rank, 2)
    ]
    assert [source for *_, source in whole] == [0, 1] * 2 and sum(
        (y != IGNORE).sum() for _, y, _ in whole
    ) == 8 * 16
    assert all((y[x[:, 0] // 20_000 != source] == IGNORE).all() for x, y, source in whole)
    found = []
    for size in (1, 2):
        code, output = ranks_train(
            size,
            f'--dataset={spec}',
            f'--out_dir={tmp_path}/{size}',
            *TINY,
            '--vocab_size=60000',
            '--max_iters=4',
            '--eval_interval=2',
            '--total_batch_size=128',
            *(['--use_fsdp=True'] if size > 1 else []),
        )
        assert code == 0, output
        found.append(records(tmp_path / str(size), 'eval'))
    for one, two in zip(*found, strict=True):
        parts = one['val_loss_by_source']
        assert [*parts] == [three[0], three[1]] and parts == pytest.approx(
            two['val_loss_by_source'], abs=1e-4
        )
        assert one['val_loss'] == pytest.approx(
            0.375 * parts[three[0]] + 0.625 * parts[three[1]], rel=1e-6
        )
        assert (
            one['perplexity'] == pytest.approx(math.exp(one['val_loss']))
            and one['bits_per_byte'] is None
        )
    assert (
        f'{three[0]} {found[0][-1]["val_loss_by_source"][three[0]]:.4f}'
        in next((tmp_path / '1').glob('*.log')).read_text()
    )


def test_a_source_that_no_evaluation_sees_is_named(three, tmp_path, capsys):
    """A share of less than half a window of the evaluation."""
    spec = f'{three[0]}:0.99,{three[1]}:0.01'
    for eval_iters, unseen in ((2, True), (40, False)):
        code = run_train(
            spec,
            tmp_path / str(eval_iters),
            '--vocab_size=60000',
            '--max_iters=1',
            f'--eval_iters={eval_iters}',
        )
        assert code == 0
        assert (f'no evaluation sees {three[1]}' in capsys.readouterr().out) == unseen


@pytest.mark.parametrize('text, bytes_per_token', [('ab', 1), ('äö', 2), ('日本', 3)])
def test_bits_per_byte(text, bytes_per_token, tmp_path):
    """Where the tokenizer tells how many bytes a token stands for: here each is one character."""
    letters = sorted(text)
    meta = {
        'stoi': {letter: i for i, letter in enumerate(letters)},
        'itos': dict(enumerate(letters)),
    }
    data = write_dataset(
        str(tmp_path / 'data'), np.arange(4000) % 2, np.arange(400) % 2, vocab_size=2, extra=meta
    )
    assert run_train(data, tmp_path / 'out', '--max_iters=2', '--eval_interval=2') == 0
    last = records(tmp_path / 'out', 'eval')[-1]
    assert last['bits_per_byte'] == pytest.approx(last['val_loss'] / math.log(2) / bytes_per_token)
    assert (
        f'{last["bits_per_byte"]:.3f} bits per byte'
        in next((tmp_path / 'out').glob('*.log')).read_text()
    )


def test_a_run_on_a_mixture_resumes_on_the_same_bits(three, tmp_path):
    spec = f'{three[0]}:0.75,{three[1]}:0.25'
    arguments = ['--eval_interval=4', '--vocab_size=60000', '--keep_all_checkpoints=True']
    assert run_train(spec, tmp_path / 'whole', '--max_iters=8', *arguments) == 0
    assert run_train(spec, tmp_path / 'part', '--max_iters=4', *arguments) == 0
    assert (
        run_train(spec, tmp_path / 'part', '--max_iters=8', '--init_from=resume', *arguments) == 0
    )
    assert losses(tmp_path / 'whole') == losses(tmp_path / 'part')
    # other data
    assert (
        run_train(
            spec.replace('0.75', '0.7'),
            tmp_path / 'part',
            '--max_iters=9',
            '--init_from=resume',
            *arguments,
        )
        == 2
    )
    text = next((tmp_path / 'whole').glob('*.log')).read_text()
    assert 'epochs of' in text and '10000 training' not in text


def test_bytes_of_characters_that_are_spread_over_tokens():
    """One token is one byte: where each stands for bytes of its own they are counted exactly, else
    a character counts where it ends.
    """
    ids = np.frombuffer('aäö日'.encode() * 20, np.uint8).astype(np.int64)
    exact = BytesTokenizer()
    by_text = SimpleNamespace(vocab_size=257, eot_id=exact.eot_id, decode=exact.decode)
    for tokenizer in (exact, by_text):
        assert bytes_of(ids, tokenizer) == len(ids)
        assert bytes_of(np.append(ids, exact.eot_id), tokenizer) == len(ids)
        assert bytes_of(np.array([300]), tokenizer) is None
    assert bytes_of(ids[2:5], exact) == 3
    cuts = [*range(0, len(ids), 7), len(ids)]
    assert len(ids) == sum(
        bytes_of(ids[first:last], by_text, ids[max(0, first - 4) : first])
        for first, last in zip(cuts, cuts[1:])
    )


def test_sources_of_different_tokenizers_do_not_mix(three, tmp_path):
    other = write_dataset(
        str(tmp_path / 'other'), np.arange(5000), np.arange(1000), vocab_size=5000
    )
    with pytest.raises(UserError, match='were made with different tokenizers'):
        open_dataset(f'{three[0]}:1,{other}:1', '/')
    for folder, content in ((three[0], b'x'), (three[1], b'y')):
        os.makedirs(os.path.join(folder, 'tokenizer'))
        with open(os.path.join(folder, 'tokenizer', 'tokenizer.json'), 'wb') as f:
            f.write(content)
    import pickle

    for folder in three[:2]:
        with open(os.path.join(folder, 'meta.pkl'), 'rb') as f:
            meta = pickle.load(f)
        with open(os.path.join(folder, 'meta.pkl'), 'wb') as f:
            pickle.dump({**meta, 'tokenizer': {'kind': 'hf', 'path': 'tokenizer'}}, f)
    with pytest.raises(UserError, match='were made with different tokenizers'):
        open_dataset(f'{three[0]}:1,{three[1]}:1', '/')
    with pytest.raises(UserError, match='no data set'):
        open_dataset(f'{three[0]}:1,{tmp_path}/none:1', ROOT)


def test_sources_whose_tokenizers_give_the_same_ids_mix(tmp_path):
    """One described as the bytes of the text, one by the files of a tokenizer that does the
    same.
    """
    from onetrain.tokenizers.base import BytesTokenizer, HuggingFaceTokenizer
    from onetrain.tokenizers.export import save_for_transformers

    save_for_transformers(BytesTokenizer(), str(tmp_path / 'hf'))
    folders = [str(tmp_path / name) for name in ('bytes', 'files', 'text')]
    for folder, tokenizer in zip(
        folders,
        (
            BytesTokenizer(),
            HuggingFaceTokenizer.of_folder(str(tmp_path / 'hf')),
            HuggingFaceTokenizer.of_folder(str(tmp_path / 'hf')),
        ),
    ):
        write_dataset(
            folder,
            np.arange(2000) % 256,
            np.arange(500) % 256,
            vocab_size=257,
            eot_id=256,
            tokenizer=tokenizer,
            extra={},
        )
    assert len(open_dataset(f'{folders[0]}:1,{folders[1]}:1', '/')[0]) == 4000
    path = tmp_path / 'text' / 'tokenizer' / 'tokenizer.json'
    described = json.loads(path.read_text())
    vocabulary = described['model']['vocab']
    vocabulary['a'], vocabulary['b'] = vocabulary['b'], vocabulary['a']
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match='were made with different tokenizers: prepare'):
        open_dataset(f'{folders[0]}:1,{folders[2]}:1', '/')
    path.write_text('{')
    with pytest.raises(
        UserError, match='different tokenizers, or with one that cannot be loaded here'
    ):
        open_dataset(f'{folders[0]}:1,{folders[2]}:1', '/')


# ---- object storage


@pytest.fixture
def stored(s3, pair, tmp_path):
    """(URLs of both sets, root with an empty data/)."""
    import fsspec

    fs, urls = fsspec.filesystem('s3', endpoint_url=s3.environment['AWS_ENDPOINT_URL']), []
    for folder in pair:
        urls.append(f's3://bucket/{tmp_path.name}/{os.path.basename(folder)}')
        fs.put(folder, urls[-1], recursive=True)
    (tmp_path / 'root' / 'data').mkdir(parents=True)
    return urls, tmp_path / 'root'


@pytest.mark.parametrize('which', [0, 1])
def test_object_storage_gives_the_same_tokens(stored, pair, which, monkeypatch):
    monkeypatch.setattr(remote, 'BLOCK', 256)
    (urls, root), local = stored, open_dataset(pair[which], '/')
    far = open_dataset('x', str(root), urls[which])
    assert far[2] == local[2] and [file.fingerprint for file in far[:2]] == [
        file.fingerprint for file in local[:2]
    ]
    for a, b in zip(local[:2], far[:2]):
        same(a, b)
    far[0].slice(0, len(far[0]))
    # each byte once
    assert sum(piece.fetched for piece in far[0].pieces) == sum(
        piece.size for piece in far[0].pieces
    )
    again = open_dataset('x', str(root), urls[which])
    same(local[0], again[0])
    assert sum(piece.fetched for piece in again[0].pieces) == 0  # it is all here


def test_a_damaged_copy_is_fetched_again(stored, pair, monkeypatch):
    monkeypatch.setattr(remote, 'BLOCK', 256)
    (urls, root), local = stored, open_dataset(pair[0], '/')
    same(local[0], open_dataset('x', str(root), urls[0])[0])
    (copy,) = (root / 'data' / 'x' / 'copy').glob('*_train.bin')
    content = bytearray(copy.read_bytes())
    content[1000] ^= 1
    copy.write_bytes(content)
    far = open_dataset('x', str(root), urls[0])[0]
    same(local[0], far)
    assert far.pieces[0].fetched == 256


def test_a_file_there_that_changes_while_it_is_read(stored, pair, monkeypatch):
    """The copy forgets what may be of the new file; the old one put back is read again."""
    monkeypatch.setattr(remote, 'BLOCK', 256)
    (urls, root), local = stored, open_dataset(pair[0], '/')
    far = open_dataset('x', str(root), urls[0])[0]
    fs, place = far.pieces[0].storage.connected()
    content = fs.cat_file(f'{place}/train.bin')
    far.slice(0, 99)
    fs.pipe(f'{place}/train.bin', b'xx' + content[2:])
    storage = far.pieces[0].storage
    # asked for some minutes after the last time
    assert len(far.slice(200, 500)) and storage.looking is None
    monkeypatch.setattr(remote, 'LOOK_AFTER', 0)

    def looked():
        storage.versions()
        storage.looking.join()
        monkeypatch.setattr(remote, 'LOOK_AFTER', 1000)
        storage.versions()
        monkeypatch.setattr(remote, 'LOOK_AFTER', 0)

    real = storage.list
    storage.list = lambda: 1 / 0  # a server that does not answer says nothing
    looked()
    assert len(far.slice(500, 600))
    storage.looking.join()
    storage.list = real
    looked()
    with pytest.raises(UserError, match='/train was changed while it was read'):
        far.slice(1000, 1200)
    fs.pipe(f'{place}/train.bin', content)
    looked()
    same(local[0], far)
    same(local[0], open_dataset('x', str(root), urls[0])[0])


def test_a_full_disk_only_ends_the_copy(stored, pair, monkeypatch, capsys):
    monkeypatch.setattr(remote, 'BLOCK', 256)
    (urls, root), local = stored, open_dataset(pair[0], '/')

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'pwrite', full)
    same(local[0], open_dataset('x', str(root), urls[0])[0])
    assert capsys.readouterr().out.count('no room for a local copy') == 1


def test_a_network_that_fails_is_asked_again(stored, pair, monkeypatch):
    (urls, root), local = stored, open_dataset(pair[0], '/')
    far = open_dataset('x', str(root), urls[0])[0]
    monkeypatch.setattr(remote.time, 'sleep', lambda seconds: None)
    fs, _ = far.pieces[0].storage.connected()
    real, calls = fs.cat_ranges, []

    def fails(*args, **more):
        calls.append(1)
        if len(calls) <= 2:
            raise ConnectionError('reset')
        return (
            [content[:-1] for content in real(*args, **more)]
            if len(calls) == 3
            else real(*args, **more)
        )

    monkeypatch.setattr(fs, 'cat_ranges', fails)
    assert far.slice(0, 99).tolist() == local[0].slice(0, 99).tolist() and len(calls) == 4
    monkeypatch.setattr(fs, 'cat_ranges', lambda *args, **more: 1 / 0)
    with pytest.raises(OSError, match=r's3://.*/train.bin cannot be read \(ZeroDivisionError'):
        far.pieces[0].storage.ranges([('train.bin', 0, 9)])


def test_a_run_from_object_storage_is_the_local_one(stored, pair, tmp_path, s3):
    arguments = ['--max_iters=6', '--eval_interval=3', '--vocab_size=5000']
    assert run_train(pair[0], tmp_path / 'near', *arguments) == 0
    for name, more in (
        ('far', []),
        ('workers', ['--use_dataloader=True', '--dataloader_num_workers=2']),
    ):
        assert (
            run_train(
                str(tmp_path / 'copies' / name),
                tmp_path / name,
                f'--data_url={stored[0][1]}',
                *arguments,
                *more,
            )
            == 0
        )
        assert losses(tmp_path / name) == losses(tmp_path / 'near')
    assert not list((tmp_path / 'copies' / 'far').glob('*.bin'))


def test_urls_that_are_no_data_set(stored, pair, s3):
    (urls, root), (near, _) = stored, pair
    for url, message in (
        (f'{urls[0]}/none', 'has no meta.pkl'),
        ('nonsense://x', 'cannot be reached|nonsense'),
    ):
        with pytest.raises(UserError, match=message):
            open_dataset('x', str(root), url)
    with pytest.raises(UserError, match='holds a data set already'):
        open_dataset(near, '/', urls[0])
    with pytest.raises(UserError, match='holds one data set, not the mixture'):
        open_dataset('a:1,b:1', str(root), urls[0])
    import fsspec

    fsspec.filesystem('s3', endpoint_url=s3.environment['AWS_ENDPOINT_URL']).pipe(
        f'{urls[0]}/train.bin', b'xx'
    )
    with pytest.raises(UserError, match='train.bin has 2 bytes, its meta.pkl says 10000'):
        open_dataset('x', str(root), urls[0])
