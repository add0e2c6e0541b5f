"""Every kernel computes softmax(q k^T / sqrt(d)) v with a causal mask; a backend that cannot run falls back with a reason."""
import pytest
import torch

from engine.attention import BACKENDS, attention, choose_backend

SHAPES = [(2, 4, 4, 33, 16), (2, 6, 2, 17, 8), (1, 3, 1, 20, 5)]  # B, n_head, n_kv, T, head_dim


def inputs(B, n_head, n_kv, T, head_dim, **options):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, h, T, head_dim, generator=generator).to(**options).requires_grad_() for h in (n_head, n_kv, n_kv)]


def definition(q, k, v):
    out = torch.zeros_like(q)
    share = q.size(1) // k.size(1)
    for h in range(q.size(1)):
        for t in range(q.size(2)):
            scores = (q[:, h, t, None] * k[:, h // share, :t + 1]).sum(-1) / q.size(-1) ** 0.5
            out[:, h, t] = (scores.softmax(-1)[..., None] * v[:, h // share, :t + 1]).sum(1)
    return out


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('backend', ['sdpa', 'manual'])
def test_values_and_gradients(shape, backend):
    q, k, v = inputs(*shape)
    expected, got = definition(q, k, v), attention(q, k, v, backend)
    assert torch.allclose(expected, got, atol=1e-6)
    direction = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(expected, (q, k, v), direction), torch.autograd.grad(got, (q, k, v), direction)):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('backend', ['flash_attn_3', 'flash_attn_2', 'sdpa'])
def test_kernels_on_a_gpu(backend):
    q, k, v = inputs(2, 8, 2, 256, 64, device='cuda', dtype=torch.bfloat16)
    chosen, _ = choose_backend(backend, 'cuda', torch.bfloat16, 64)
    reference = attention(q.float(), k.float(), v.float(), 'manual')
    assert (attention(q, k, v, chosen).float() - reference).abs().max() < 0.02


def test_fallback_goes_down_the_list_and_says_why():
    chosen, reasons = choose_backend('flash_attn_3', 'cpu', torch.float32, 64)
    assert chosen == 'sdpa' and len(reasons) == 2 and all('needs an NVIDIA GPU' in r for r in reasons)
    for backend in ('sdpa', 'manual'):
        assert choose_backend(backend, 'cpu', torch.float32, 64) == (backend, [])
    assert BACKENDS == ('flash_attn_3', 'flash_attn_2', 'sdpa', 'flex', 'manual')


@pytest.mark.parametrize('backend', ['sdpa', 'manual'])
def test_dropout_of_the_weights(backend):
    q, k, v = inputs(2, 4, 4, 64, 16)
    v = torch.ones_like(v)
    dropped = attention(q, k, v, backend, dropout=0.5)
    assert abs(dropped.mean().item() - 1) < 0.1 and dropped.std() > 0.1
