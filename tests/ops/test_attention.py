"""Every kernel computes softmax(q k^T / sqrt(d)) v with a causal mask; a backend that cannot run
falls back with a reason.
"""

import contextlib
import dataclasses
import types

import pytest
import torch
from torch.nn.attention import current_flash_attention_impl

from model import Model
from onetrain.model_config import resolve_shape
from onetrain.ops import kernels
from onetrain.ops.attention import _KERNELS, BACKENDS, activate_backend, attention, choose_backend
from onetrain.ops.kernels import fastest_backend
from onetrain.training import memory
from train import Config

SHAPES = [(2, 4, 4, 33, 16), (2, 6, 2, 17, 8), (1, 3, 1, 20, 5)]  # B, n_head, n_kv, T, head_dim


def inputs(B, n_head, n_kv, T, head_dim, **options):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(B, h, T, head_dim, generator=generator).to(**options).requires_grad_()
        for h in (n_head, n_kv, n_kv)
    ]


def definition(q, k, v):
    out = torch.zeros_like(q)
    share = q.size(1) // k.size(1)
    for h in range(q.size(1)):
        for t in range(q.size(2)):
            scores = (q[:, h, t, None] * k[:, h // share, : t + 1]).sum(-1) / q.size(-1) ** 0.5
            out[:, h, t] = (scores.softmax(-1)[..., None] * v[:, h // share, : t + 1]).sum(1)
    return out


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('backend', ['sdpa', 'manual'])
def test_values_and_gradients(shape, backend):
    q, k, v = inputs(*shape)
    expected, got = definition(q, k, v), attention(q, k, v, backend)
    assert torch.allclose(expected, got, atol=1e-6)
    direction = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(expected, (q, k, v), direction),
        torch.autograd.grad(got, (q, k, v), direction),
    ):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize(
    'backend', ['flash_attn_4', 'flash_attn_3', 'flash_attn_2', 'cudnn', 'sdpa']
)
def test_kernels_on_a_gpu(backend):
    q, k, v = inputs(2, 8, 2, 256, 64, device='cuda', dtype=torch.bfloat16)
    chosen, _ = choose_backend(backend, 'cuda', torch.bfloat16, 64)
    activate_backend(chosen)
    reference = attention(q.float(), k.float(), v.float(), 'manual')
    assert (attention(q, k, v, chosen).float() - reference).abs().max() < 0.02


def test_fallback_goes_down_the_list_and_says_why():
    chosen, reasons = choose_backend('flash_attn_3', 'cpu', torch.float32, 64)
    assert (
        chosen == 'sdpa' and len(reasons) == 2 and all('needs an NVIDIA GPU' in r for r in reasons)
    )
    for backend in ('sdpa', 'manual'):
        assert choose_backend(backend, 'cpu', torch.float32, 64) == (backend, [])
    assert BACKENDS == (
        'flash_attn_4',
        'flash_attn_3',
        'flash_attn_2',
        'cudnn',
        'blocks',
        'sdpa',
        'flex',
        'manual',
    )


def test_cudnn_is_taken_only_where_it_is_asked_for_and_may_be():
    assert choose_backend('cudnn', 'cuda', torch.bfloat16, 64) == ('cudnn', [])
    for reason, options in (
        ('do not repeat', dict(deterministic=True)),
        ('not used with sliding_window', dict(window=True)),
        ('not used with document_mask', dict(documents=True)),
        ('at most 128', dict(head_dim=192)),
        ('not float32', dict(dtype=torch.float32)),
    ):
        chosen, reasons = choose_backend(
            'cudnn', 'cuda', **{'dtype': torch.bfloat16, 'head_dim': 64, **options}
        )
        assert chosen == 'sdpa' and len(reasons) == 1 and reason in reasons[0]
    assert not any(
        'cudnn' in reason for reason in choose_backend('flash_attn_3', 'cpu', torch.float32, 64)[1]
    )


def test_flash_attention_4_is_switched_on_for_the_process_and_off_again(monkeypatch):
    """torch's switch, with a stand-in for the kernels; predicting the memory of a model does not
    touch it.
    """

    class Handle:
        def remove(self):
            pass

    monkeypatch.setitem(torch.nn.attention._registry._FLASH_ATTENTION_IMPLS, 'FA4', Handle)
    shape = resolve_shape(
        dict(arch_preset='llama', n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=20)
    )
    assert current_flash_attention_impl() is None
    Model.on_meta(shape, 'flash_attn_4').allocate('cpu')
    assert current_flash_attention_impl() == 'FA4'
    memory.step_memory(lambda: Model(shape), 1, 8, 'cpu', contextlib.nullcontext())
    assert current_flash_attention_impl() == 'FA4'
    Model.on_meta(shape, 'sdpa').allocate('cpu')
    assert current_flash_attention_impl() is None


def test_where_flash_attention_4_runs(monkeypatch):
    def reasons(capability=(10, 0), **options):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
        return choose_backend(
            'flash_attn_4', 'cuda', **{'dtype': torch.bfloat16, 'head_dim': 64, **options}
        )

    assert 'flash_attn_4: the package flash_attn.cute is not installed' in reasons()[1]
    monkeypatch.setattr(
        'onetrain.ops.attention._installed', lambda module: module == 'flash_attn.cute'
    )
    assert reasons() == reasons((9, 0), deterministic=True) == ('flash_attn_4', [])
    for expected, options in (
        ('needs a GPU of compute capability 9.0 or 10.0', dict(capability=(8, 0))),
        ('has no dropout', dict(dropout=0.1)),
        ('not used with sliding_window', dict(window=True)),
        ('not used with document_mask', dict(documents=True)),
        ('at most 128', dict(head_dim=192)),
        ('not float32', dict(dtype=torch.float32)),
    ):
        chosen, told = reasons(**options)
        assert chosen == 'sdpa' and expected in told[0] and len(told) == 3


def test_what_a_gpu_is_told():
    """Notes, without a GPU: an odd vocabulary."""

    def notes(dtype=torch.bfloat16, **changes):
        c = Config(attention_backend='sdpa', **changes)
        shape = resolve_shape(dataclasses.asdict(c), 50257)
        return ' '.join(kernels.select_kernels(c, shape, torch.device('cuda'), dtype)[1])

    assert '--vocab_size=50304 adds ids that no text has' in notes()
    assert (
        not notes(vocab_size=50304)
        and not notes(init_from='resume')
        and not notes(torch.float32, vocab_size=50304)
    )


def test_a_gpu_that_a_batch_size_leaves_idle_is_told(monkeypatch):
    """By the times of an H100, 18 heads of 128 (bench/RESULTS.md): a sequence takes 0.29 ms of the
    backward pass with 7 of them, 0.42 with 8, 0.27 with 14, 0.33 with 16.
    """
    shares = [round(kernels.idle_share(n, 18, 132), 2) for n in (7, 8, 14, 16, 22)]
    assert shares == [0.05, 0.45, 0.05, 0.27, 0.0]
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    h100 = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: h100)

    def notes(**changes):
        settings = dict(attention_backend='sdpa', n_head=18, n_embd=2304, batch_size=8)
        c = Config(**{**settings, 'vocab_size': 32000, **changes})
        shape = resolve_shape(dataclasses.asdict(c), 32000)
        return kernels.idle_note(c, shape, torch.device('cuda'), torch.bfloat16, 'sdpa')

    assert notes() == (
        "batch_size=8 leaves 45 % of the GPU idle in attention's backward pass, which repeats to"
        ' the last bit; --batch_size=7 or --batch_size=14 would not'
    )
    assert not notes(batch_size=7) and not notes(deterministic=False) and not notes(n_head=36)


def test_determinism_is_an_error_not_a_warning(monkeypatch):
    """By a warning torch's memory-efficient attention takes a backward pass that does not
    repeat.
    """
    monkeypatch.setattr(torch.utils.deterministic, 'fill_uninitialized_memory', True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        kernels.set_deterministic(True)
        assert (
            torch.are_deterministic_algorithms_enabled()
            and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize('native, dtype', [(False, torch.float16), (True, torch.bfloat16)])
def test_bfloat16_is_taken_where_the_gpu_has_it_itself(native, dtype, monkeypatch):
    monkeypatch.setattr(
        torch.cuda,
        'is_bf16_supported',
        lambda including_emulation=True: native or including_emulation,
    )
    assert kernels.precision(None, torch.device('cuda')) == dtype


@pytest.mark.parametrize('operator', [None, 'scatter'])
def test_an_operator_that_does_not_repeat_is_told(operator, train, tmp_path, monkeypatch, capsys):
    """As torch does on a GPU, where some operators have no kernel that repeats."""

    def forward(self, *args, **kwargs):
        raise RuntimeError(
            f'{operator}_cuda does not have a deterministic implementation, but you set'
            " 'torch.use_deterministic_algorithms(True)'. You can turn off ..."
        )

    if operator:
        monkeypatch.setattr(Model, 'forward', forward)
    assert train(tmp_path, '--max_iters=1', '--eval_at_start=False') == (2 if operator else 0)
    assert capsys.readouterr().err == (
        'error: deterministic=True: scatter_cuda does not have a deterministic implementation: type'
        ' --deterministic=False\n'
        if operator
        else ''
    )


def test_compiled_gradients_with_sinks_are_those_of_eager():
    """torch 2.11 compiled a backward pass of zeros for what its forward pass returns twice."""
    inputs, found = [*(torch.randn(1, 2, 16, 8) for _ in range(3)), torch.randn(2)], []
    for compiled in (False, True):

        def call(q, k, v, sinks):
            return attention(q, k, v, 'sdpa', sinks=sinks)

        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        (torch.compile(call, backend='aot_eager') if compiled else call)(
            *leaves
        ).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for a, b in zip(*found):
        assert torch.allclose(a, b, atol=1e-6) and b.any()


LAYER = dict(batch_size=2, n_head=4, n_kv=2, head_dim=16, T=64)


@pytest.mark.parametrize(
    'special',
    [
        {},
        dict(window=16),
        dict(documents=True),
        dict(sinks=True),
        dict(window=8, documents=True, sinks=True),
        dict(dropout=0.1),
    ],
)
def test_the_fastest_by_a_trial(special):
    backend, told = fastest_backend(torch.device('cpu'), torch.float32, **LAYER, **special)
    assert (
        backend in ('sdpa', 'manual', 'blocks')
        and all(f'ms with {name}' in told for name in ('sdpa', 'manual'))
        and 'off by' not in told
    )


def test_the_fastest_is_fast_and_right(monkeypatch):
    """A backend wins by its time, and only if it computes the same, and runs."""
    times = {'sdpa': 3.0, 'manual': 1.0, 'blocks': 4.0}
    trial = kernels.time_attention

    def timed(call, inputs, grad):
        name = next(argument for argument in call.args if isinstance(argument, str))
        return trial(call, inputs, grad)[0], times[name]

    monkeypatch.setattr(kernels, 'time_attention', timed)

    def found():
        return fastest_backend(torch.device('cpu'), torch.float32, **LAYER)

    assert (
        found()[0] == 'manual'
        and found()[1]
        == 'forward and backward of a layer take 1000.00 ms with manual, 3000.00 ms with sdpa,'
        ' 4000.00 ms with blocks'
    )
    times['manual'] = 2.99
    assert found()[0] == 'sdpa'
    times['manual'] = 1.0
    manual = _KERNELS['manual']
    monkeypatch.setitem(_KERNELS, 'manual', lambda *args: 1.01 * manual(*args))
    assert found()[0] == 'sdpa' and 'manual is off by 1.0e-02' in found()[1]

    def broken(*args):
        raise TypeError('no kernel for this card')  # as a package's compiler may

    monkeypatch.setitem(_KERNELS, 'manual', broken)
    assert found()[0] == 'sdpa' and 'manual no kernel for this card' in found()[1]
    monkeypatch.setitem(_KERNELS, 'sdpa', broken)
    monkeypatch.setitem(_KERNELS, 'manual', manual)
    assert found()[0] == 'manual'


@pytest.mark.parametrize(
    'options, expected',
    [
        ({}, 'flex'),
        (dict(deterministic=False), 'sdpa'),
        (dict(compile=False), 'sdpa'),
        (dict(dropout=0.1), 'sdpa'),
        (dict(document_mask=True), 'sdpa'),
        (dict(attention_sinks=True), 'sdpa'),
        (dict(n_head=2), 'sdpa'),
        (dict(n_head=8), 'flex'),
        (dict(attention_backend='manual'), 'manual'),
    ],
)
def test_the_usual_backend_on_an_h100(options, expected, monkeypatch):
    """By rule, not by a trial: the same whenever a run starts."""
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (9, 0))
    c = Config(
        **{
            'arch_preset': 'llama',
            'n_head': 4,
            'n_embd': 512,
            'vocab_size': 64,
            'num_key_value_heads': None,
            **options,
        }
    )
    shape, device = resolve_shape(dataclasses.asdict(c)), torch.device('cuda')
    assert kernels.select_kernels(c, shape, device, torch.bfloat16)[0]['backend'] == expected
    assert kernels.select_kernels(c, shape, torch.device('cpu'), torch.float32)[0]['backend'] == (
        expected if expected == 'manual' else 'sdpa'
    )
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (8, 0))
    assert kernels.default_backend(c, shape, device, torch.bfloat16) == 'sdpa'


def test_a_run_with_auto(train, tmp_path, capsys, monkeypatch):
    """What it takes is what the run has from then on: a resumed one does not measure again."""
    timed = []  # what torch may take while the trial runs
    monkeypatch.setattr(
        'onetrain.ops.kernels.fastest_backend',
        lambda *args, **kwargs: (
            timed.append(
                (
                    torch.backends.cuda.cudnn_sdp_enabled(),
                    torch.are_deterministic_algorithms_enabled(),
                )
            ),
            ('manual', 'a trial'),
        )[1],
    )
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert train(tmp_path, '--attention_backend=auto', '--max_iters=2', '--eval_interval=2') == 0
    said = capsys.readouterr().out
    assert timed == [(False, True)]
    assert (
        'Attention backend: manual' in said
        and 'Note: attention_backend=auto takes manual: a trial' in said
    )
    monkeypatch.setattr('onetrain.ops.kernels.fastest_backend', None)
    assert train(tmp_path, '--init_from=resume', '--max_iters=4') == 0
    assert 'Attention backend: manual' in capsys.readouterr().out
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # deterministic=True
    assert (
        train(tmp_path / 'free', '--deterministic=False', '--max_iters=1') == 0
        and torch.backends.cuda.cudnn_sdp_enabled()
    )


@pytest.mark.parametrize('backend', ['sdpa', 'manual'])
def test_dropout_of_the_weights(backend):
    q, k, v = inputs(2, 4, 4, 64, 16)
    v = torch.ones_like(v)
    dropped = attention(q, k, v, backend, dropout=0.5)
    assert abs(dropped.mean().item() - 1) < 0.1 and dropped.std() > 0.1
