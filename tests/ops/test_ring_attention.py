"""Ring attention is dense attention: output, gradients, and less memory for each rank."""

import numpy as np
import pytest
import torch
from conftest import write_dataset
from ranks import ranks

from onetrain import descriptors
from onetrain.data.dataset import open_dataset
from onetrain.ops.attention import attention
from onetrain.ops.cross_entropy import IGNORE
from onetrain.ops.ring_attention import Ring, ring_attention


def beyond(ring):
    """Which of the local tokens only fill a sequence up."""
    return torch.cat([torch.arange(begin, end) for begin, end in ring.chunks]) >= ring.block_size


def compare(T, n_head, n_kv, head_dim, kernel, dtype):
    """Largest differences of (output, dq, dk, dv) on this rank's tokens from dense attention over
    all T tokens.
    """
    import torch.distributed as dist

    ring = Ring(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), T, torch.device('cpu'))
    generator = torch.Generator().manual_seed(T)
    q, grad = (
        torch.randn(2, n_head, T, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    k, v = (
        torch.randn(2, n_kv, T, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    dense = [t.to(torch.float32, copy=True).requires_grad_() for t in (q, k, v)]
    expected = attention(*dense, 'manual')
    expected.backward(grad.float())
    real = ~beyond(ring)
    mine = ring.positions[real]
    local = [t[:, :, ring.positions].clone().requires_grad_() for t in (q, k, v)]
    out = ring_attention(*local, ring, kernel)
    # what fills up has no target, hence no gradient
    out.backward(grad[:, :, ring.positions] * real[:, None])
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(local, dense))]
    assert all(a.dtype == dtype for a, _ in pairs)
    return [(a[:, :, real].float() - b[:, :, mine]).abs().max().item() for a, b in pairs]


@pytest.mark.parametrize('size', [2, 4])
@pytest.mark.parametrize('kernel', ['flash', 'manual'])
def test_output_and_gradients_are_those_of_dense_attention(size, kernel):
    for T, n_head, n_kv, head_dim in (
        (64, 4, 4, 16),
        (48, 4, 2, 8),
        (100, 6, 1, 24),
        (37, 2, 1, 7),
        (9, 3, 3, 5),
        (4, 1, 1, 4),
    ):
        for differences in ranks(size)(compare, T, n_head, n_kv, head_dim, kernel, torch.float32):
            assert max(differences) <= 1e-5, (T, differences)


def test_in_bfloat16_it_is_as_exact_as_bfloat16():
    for kernel in ('flash', 'manual'):
        for differences in ranks(2)(compare, 96, 4, 2, 16, kernel, torch.bfloat16):
            assert max(differences) <= 0.03, differences


def saved_bytes(context_parallel):
    """Bytes that one forward pass of a small model keeps for the backward pass, on this rank."""
    import torch.distributed as dist

    from model import Model
    from onetrain.model_config import resolve_shape

    shape = resolve_shape(
        dict(
            arch_preset='llama3',
            n_layer=2,
            n_head=4,
            n_embd=64,
            num_key_value_heads=2,
            block_size=512,
            vocab_size=64,
        )
    )
    ring = (
        Ring(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), 512, torch.device('cpu'))
        if context_parallel
        else None
    )
    model = Model(shape, ring=ring)
    model.init_weights(0)
    x = torch.randint(64, (1, 512), generator=torch.Generator().manual_seed(0))
    x = x[:, ring.positions] if ring else x
    parameters, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(x, x, reduction='sum')
    loss.backward()
    return sum(kept.values())


def test_memory_of_a_rank_falls_with_the_number_of_ranks():
    whole = ranks(2)(saved_bytes, False)[0]
    for size in (2, 4):
        for part in ranks(size)(saved_bytes, True):
            assert part == pytest.approx(whole / size, rel=0.1), (size, part, whole)


def test_all_ranks_have_the_same_work():
    for size in (2, 3, 8):
        rings = [Ring(None, rank, size, 48 * size, torch.device('cpu')) for rank in range(size)]
        # a token at position p attends to p + 1
        pairs = [sum(int(p) + 1 for p in ring.positions) for ring in rings]
        assert max(pairs) - min(pairs) <= max(pairs) * 0.01
        assert sorted(torch.cat([ring.positions for ring in rings]).tolist()) == list(
            range(48 * size)
        )


@pytest.mark.parametrize(
    'size, block_size', [(1, 8), (2, 64), (2, 37), (3, 48), (4, 9), (4, 4), (8, 20)]
)
def test_ranks_read_their_tokens_alone(tmp_path, monkeypatch, size, block_size):
    file = open_dataset(
        write_dataset(str(tmp_path), np.arange(2000) % 61, np.arange(200) % 61), '/'
    )[0]
    starts, read, real = np.array([0, 700, 1300]), [], descriptors.FILES.read_into
    window = file.windows(starts, block_size)
    monkeypatch.setattr(
        descriptors.FILES,
        'read_into',
        lambda path, wanted: (read.extend(ids.nbytes for ids, _ in wanted), real(path, wanted))[1],
    )
    for rank in range(size):
        ring, before = Ring(None, rank, size, block_size, torch.device('cpu')), sum(read)
        x, y = ring.read_part(file, starts)
        assert torch.equal(x, window[:, :-1][:, ring.positions])
        assert torch.equal(y, window[:, 1:][:, ring.positions].masked_fill(beyond(ring), IGNORE))
        # two bytes a token; each piece has one more
        assert sum(read) - before <= len(starts) * 2 * (-(-block_size // size) + 1 + 3), (
            rank,
            read,
        )
        assert x.shape == (3, 2 * -(-block_size // (2 * size)))
