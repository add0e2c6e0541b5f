"""document_mask, windows and sinks: what a token must not see changes nothing, in every backend
that runs here.
"""

import pytest
import torch
from conftest import TEXT, losses, write_dataset
from test_attention import inputs

from model import Model, documents_of
from onetrain.model_config import resolve_shape
from onetrain.ops.attention import attention, choose_backend, make_attention_mask

END = 7


def test_documents_and_positions():
    idx = torch.tensor([[1, 2, END, 3, END, END, 4], [END, 1, 1, 1, 1, 1, END]])
    documents, positions = documents_of(idx, END)
    assert documents.tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize('backend', ['sdpa', 'manual'])
@pytest.mark.parametrize(
    'settings',
    [
        dict(arch_preset='gpt2'),
        dict(arch_preset='llama3', num_key_value_heads=2),
        dict(arch_preset='neox'),
        dict(
            arch_preset='gpt_oss', num_experts=4, num_experts_per_tok=2, d_ff=16, sliding_window=6
        ),
    ],
    ids=lambda s: s['arch_preset'] if isinstance(s, dict) else s,
)
def test_changing_one_document_does_not_change_another(settings, backend):
    model = Model(
        resolve_shape(
            dict(n_layer=2, n_head=4, n_embd=32, block_size=24, vocab_size=50, **settings)
        ),
        backend,
        document_end=END,
    )
    model.init_weights(0)
    first = torch.tensor([[9, 10, 11, 12, END]])
    second = torch.randint(10, 40, (1, 12), generator=torch.Generator().manual_seed(0))
    together = model(torch.cat([first, second], 1))
    other = model(torch.cat([torch.tensor([[20, 21, 22, 23, END]]), second], 1))
    # experts multiply more or fewer rows at once, which rounds otherwise
    assert torch.allclose(
        together[:, 5:], other[:, 5:], atol=1e-6 if model.moe_layers else 0, rtol=0
    ) and not torch.allclose(together[:, :5], other[:, :5])
    assert torch.allclose(together[:, 5:], model(second), atol=1e-5)  # positions too
    model.document_end = None
    assert not torch.allclose(
        model(torch.cat([first, second], 1))[:, 5:], together[:, 5:], atol=1e-3
    )


def by_hand(q, k, v, window, documents, sinks):
    out = torch.zeros_like(q)
    share = q.size(1) // k.size(1)
    for b in range(q.size(0)):
        for h in range(q.size(1)):
            for t in range(q.size(2)):
                seen = [
                    s
                    for s in range(t + 1)
                    if (window is None or t - s < window)
                    and (documents is None or documents[b, s] == documents[b, t])
                ]
                scores = (q[b, h, t] * k[b, h // share, seen]).sum(-1) / q.size(-1) ** 0.5
                scores = torch.cat([scores, sinks[h, None]]) if sinks is not None else scores
                out[b, h, t] = (scores.softmax(-1)[: len(seen), None] * v[b, h // share, seen]).sum(
                    0
                )
    return out


@pytest.mark.parametrize('backend', ['sdpa', 'manual'])
@pytest.mark.parametrize('with_sinks', [False, True])
@pytest.mark.parametrize(
    'window, with_documents',
    [(None, False), (4, False), (None, True), (6, True), (1, False), (99, False)],
)
def test_every_combination_is_its_definition(backend, with_sinks, window, with_documents):
    q, k, v = inputs(2, 4, 2, 19, 8)
    documents = torch.tensor([[0] * 6 + [1] * 3 + [2] * 10, [0] * 19]) if with_documents else None
    sinks = torch.tensor([-1.0, 0.0, 1.0, 3.0], requires_grad=True) if with_sinks else None
    wanted = [t for t in (q, k, v, sinks) if t is not None]
    expected = by_hand(q, k, v, window, documents, sinks)
    got = attention(
        q,
        k,
        v,
        backend,
        window=window,
        mask=make_attention_mask(backend, 19, 'cpu', window, documents),
        sinks=sinks,
    )
    assert torch.allclose(expected, got, atol=1e-6)
    direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad(expected, wanted, direction),
        torch.autograd.grad(got, wanted, direction),
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_backends_that_cannot_say_why():
    assert choose_backend(
        'sdpa', 'cpu', torch.float32, 64, window=True, documents=True, sinks=True
    ) == ('sdpa', [])
    assert choose_backend('sdpa', 'cpu', torch.float32, 64, dropout=0.1, sinks=True)[0] == 'manual'
    assert choose_backend('sdpa', 'cuda', torch.bfloat16, 64, sinks=True) == ('sdpa', [])
    chosen, reasons = choose_backend('sdpa', 'cuda', torch.bfloat16, 64, window=True, sinks=True)
    assert chosen == 'flex' and 'no log-sum-exp' in reasons[0]
    assert choose_backend('flex', 'cpu', torch.float32, 64)[0] == 'manual'


@pytest.fixture(scope='module')
def documents(tmp_path_factory):
    ids = [TEXT.index(c) if c != 'z' else END for c in TEXT * 120]
    return write_dataset(
        str(tmp_path_factory.mktemp('data') / 'documents'),
        ids[:9000],
        ids[9000:],
        vocab_size=len(TEXT),
        eot_id=END,
        tokenizer={'kind': 'bytes'},
    )


def test_training_with_it_and_without(documents, tmp_path):
    from conftest import run_train

    for name, *args in (
        ('plain',),
        ('masked', '--document_mask=True'),
        ('manual', '--document_mask=True', '--attention_backend=manual'),
    ):
        assert (
            run_train(
                documents,
                tmp_path / name,
                '--max_iters=6',
                '--eval_interval=6',
                '--arch_preset=llama',
                *args,
            )
            == 0
        )
    masked, plain, manual = (losses(tmp_path / name) for name in ('masked', 'plain', 'manual'))
    assert masked != plain and all(abs(masked[k] - manual[k]) < 1e-5 for k in masked)


def test_what_cannot_be_masked_is_told(dataset, documents, tmp_path, capsys):
    from conftest import run_train

    assert run_train(dataset, tmp_path / 'a', '--document_mask=True') == 2
    assert 'document_mask=True needs an end-of-text token' in capsys.readouterr().err
