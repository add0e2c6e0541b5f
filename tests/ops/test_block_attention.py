"""Attention by blocks of queries is attention: outputs and gradients, of any length, with grouped
queries and with dropout; and it is what a CPU takes in bfloat16, by rule.
"""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from onetrain.model_config import resolve_shape
from onetrain.ops import block_attention as blocks
from onetrain.ops import kernels
from onetrain.ops.attention import attention, choose_backend
from onetrain.training.memory import Counter
from train import Config


def inputs(B, n_head, n_kv, T, head_dim=16, dtype=torch.float32):
    torch.manual_seed(0)
    return [
        torch.randn(B, T, n, head_dim, dtype=dtype).transpose(1, 2).requires_grad_()
        for n in (n_head, n_kv, n_kv)
    ]


def results(backend, tensors):
    out = attention(*tensors, backend)
    return out, *torch.autograd.grad(out.float().square().sum(), tensors)


@pytest.mark.parametrize('B, n_head, n_kv', [(2, 4, 4), (3, 6, 2), (1, 4, 1)])
@pytest.mark.parametrize('T', [1, 7, 128, 129, 300])
def test_it_is_attention(B, n_head, n_kv, T):
    tensors = inputs(B, n_head, n_kv, T)
    for found, expected in zip(results('blocks', tensors), results('manual', tensors)):
        assert torch.allclose(found, expected, atol=2e-5, rtol=1e-4)


def test_sequences_are_computed_in_parts_of_the_batch(monkeypatch):
    """Whatever the parts, the same results."""
    tensors = inputs(5, 2, 2, 200)
    whole = results('blocks', tensors)
    monkeypatch.setattr(blocks, 'MAX_SCORES', 2 * 2 * 128 * 200)  # two sequences
    for found, expected in zip(results('blocks', tensors), whole):
        assert torch.allclose(found, expected, atol=1e-6)


def test_the_compiler_and_the_prediction_of_memory_see_one_operator_each_way():
    """Not one for each block of each sequence: GPT-2's prediction took 20 s."""
    x = [torch.empty(8, 12, 1024, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    seen = []

    class Seen(Counter):
        def __torch_dispatch__(self, function, *args, **kwargs):
            seen.append(function.name())
            return super().__torch_dispatch__(function, *args, **kwargs)

    with FakeTensorMode(allow_non_fake_inputs=True), Seen() as counter:
        out = attention(*x, 'blocks')
        kept = counter.now
        out.sum().backward()
    assert seen.count('onetrain::block_attention') == 1
    assert seen.count('onetrain::block_attention_backward') == 1 and len(seen) < 40
    # outputs, and weights of block after block with all keys up to its end
    assert kept == out.nbytes + 2 * 8 * 12 * sum(128 * end for end in range(128, 1025, 128))


def test_bfloat16_stays_near_float32():
    tensors = inputs(2, 4, 4, 200, 32)
    low = [x.detach().bfloat16().requires_grad_() for x in tensors]
    for found, expected in zip(results('blocks', low), results('manual', tensors)):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).norm() < 0.02 * expected.norm()


def test_gradients_with_dropout(monkeypatch):
    monkeypatch.setattr(blocks, 'BLOCK', 4)
    tensors = inputs(1, 2, 1, 6, 3, torch.float64)

    def dropped(*tensors):
        torch.manual_seed(1)
        return attention(*tensors, 'blocks', 0.4)

    assert torch.autograd.gradcheck(dropped, tensors)
    ones = [*tensors[:2], torch.ones_like(tensors[2])]
    means = torch.stack([attention(*ones, 'blocks', 0.4).mean() for _ in range(200)])
    assert abs(means.mean() - 1) < 0.05 and means.std() > 0


def test_it_is_for_what_it_computes():
    device = 'cpu', torch.bfloat16, 16
    assert choose_backend('blocks', *device) == ('blocks', [])
    assert choose_backend('flash_attn_2', *device)[0] == 'sdpa'  # only where it is asked for
    for special, reason in (
        ('window', 'sliding_window'),
        ('documents', 'document_mask'),
        ('sinks', 'attention_sinks'),
    ):
        chosen, reasons = choose_backend('blocks', *device, **{special: True})
        assert chosen == 'sdpa' and reason in reasons[0]
    assert choose_backend('blocks', 'cuda', torch.bfloat16, 16)[0] == 'sdpa'


@pytest.mark.parametrize(
    'dtype, options, expected',
    [
        (torch.bfloat16, {}, 'blocks'),
        (torch.float32, {}, 'sdpa'),
        (torch.bfloat16, dict(block_size=2048), 'sdpa'),
        (torch.bfloat16, dict(document_mask=True), 'sdpa'),
        (torch.bfloat16, dict(attention_sinks=True), 'sdpa'),
        (torch.bfloat16, dict(dropout=0.1), 'blocks'),
        (torch.bfloat16, dict(activation_checkpointing='full'), 'blocks'),
        (torch.bfloat16, dict(activation_checkpointing='selective'), 'sdpa'),
        (torch.bfloat16, dict(attention_backend='sdpa'), 'sdpa'),
    ],
)
def test_the_usual_backend_on_a_cpu(dtype, options, expected):
    c = Config(**{'arch_preset': 'llama', 'vocab_size': 64, 'block_size': 256, **options})
    shape = resolve_shape(dataclasses.asdict(c))
    chosen, _ = kernels.select_kernels(c, shape, torch.device('cpu'), dtype)
    assert chosen['backend'] == expected
