"""Proves that the loss in chunks is the plain one, in value and gradients, and that it needs less
memory.
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, losses, run_train
from torch.utils.flop_counter import FlopCounterMode

from onetrain.ops.cross_entropy import (
    IGNORE,
    _subtract_target,
    choose_chunk,
    eager_chunk,
    next_token_loss,
)


def both(chunk, dtype=torch.float32, reduction='mean', autocast=False, frozen=False, scale=1.0):
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 50, 24), torch.randn(97, 24) * 0.3
    targets = torch.randint(0, 97, (3, 50))
    targets[0, :7] = targets[2, 40:] = IGNORE
    found = []
    for size in (0, chunk):
        h, w = hidden.to(dtype).clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
            loss = next_token_loss(h, w, targets, reduction, size)
        (loss * scale).backward()
        found.append([loss.detach(), h.grad, w.grad])
    return found


@pytest.mark.parametrize('chunk', [1, 7, 50, 149, 150, 1000])
@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_chunks_give_the_plain_loss_and_its_gradients(chunk, reduction):
    plain, chunked = both(chunk, reduction=reduction, scale=3.0)
    for a, b in zip(plain, chunked):
        assert a.dtype == b.dtype and (a - b).abs().max() < 2e-6 * a.abs().max()


@pytest.mark.parametrize('chunk', [0, 40])
@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_z_loss_is_in_the_gradient_and_not_in_the_value(chunk, reduction):
    torch.manual_seed(0)
    hidden = torch.randn(2, 50, 24)
    weight = torch.randn(97, 24) * 0.3
    targets = torch.randint(0, 97, (2, 50))
    targets[0, :7] = IGNORE
    found = []
    for written_out in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if written_out:
            logits, there = (h @ w.T).flatten(0, 1), targets.flatten() != IGNORE
            value = torch.nn.functional.cross_entropy(
                logits, targets.flatten(), ignore_index=IGNORE, reduction=reduction
            )
            squares = logits.logsumexp(1)[there] ** 2
            (value + 0.1 * (squares.mean() if reduction == 'mean' else squares.sum())).backward()
        else:
            value = next_token_loss(h, w, targets, reduction, chunk, 0.1)
            value.backward()
        found.append([value.detach(), h.grad, w.grad])
    for a, b in zip(*found):
        assert (a - b).abs().max() < 3e-6 * a.abs().max()


@pytest.mark.parametrize('reduction, z_loss', [('mean', 0.0), ('sum', 0.1)])
def test_compiled_it_is_the_same(reduction, z_loss):
    """As on a GPU. torch 2.11 compiled a backward pass of zeros for what its forward pass returns
    twice.
    """
    torch.manual_seed(0)
    hidden = torch.randn(2, 50, 24)
    weight = torch.randn(97, 24) * 0.3
    targets = torch.randint(0, 97, (2, 50))
    found = []
    for compiled in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = (
            torch.compile(next_token_loss, backend='aot_eager') if compiled else next_token_loss
        )(h, w, targets, reduction, 40, z_loss)
        loss.backward()
        found.append([loss.detach(), h.grad, w.grad])
    for a, b in zip(*found):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max() and b.any()


def test_the_slope_is_the_same_by_comparison_and_by_scatter():
    p, target = torch.rand(9, 13), torch.randint(0, 13, (9, 1))
    assert (
        torch.equal(_subtract_target(p, target, True), _subtract_target(p.clone(), target, False))
        and (p >= 0).all()
    )


def test_an_evaluation_computes_no_gradient():
    hidden = torch.randn(100, 24)
    weight = torch.randn(97, 24, requires_grad=True)
    targets = torch.randint(0, 97, (100,))
    counted = []
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted), FlopCounterMode(display=False) as counter:
            next_token_loss(hidden, weight, targets, 'sum', 40)
        counted.append(counter.get_total_flops())
    assert counted[1] == 2 * 100 * 24 * 97 and counted[0] > 2 * counted[1]


def test_z_loss_of_a_run(dataset, tmp_path):
    for name, more in (
        ('plain', []),
        ('z', ['--head_z_loss_weight=0.1']),
        ('z in chunks', ['--head_z_loss_weight=0.1', '--loss_chunk=20']),
    ):
        assert (
            run_train(dataset, tmp_path / name, '--max_iters=6', '--learning_rate=1e-2', *more) == 0
        )
    plain, z, chunks = (losses(tmp_path / name) for name in ('plain', 'z', 'z in chunks'))
    assert plain[1] == z[1] and z == pytest.approx(chunks, abs=1e-5) and abs(plain[6] - z[6]) > 1e-4


def test_bf16_matmuls_with_a_loss_in_fp32():
    plain, chunked = both(32, autocast=True)
    assert chunked[0].dtype == torch.float32 and abs(plain[0] - chunked[0]) < 2e-3
    for a, b in zip(plain[1:], chunked[1:]):
        assert a.dtype == b.dtype and (a - b).norm() < 0.02 * a.norm()


def test_chunks_of_a_bf16_head_are_summed_in_fp32():
    """As under FSDP, which gathers the head in bf16: many chunks are as exact as one."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2048, 16), torch.randn(31, 16) * 0.3
    targets = torch.randint(0, 31, (2048,))

    def gradient(dtype, chunk):
        w = weight.bfloat16().to(dtype).requires_grad_()
        h = hidden.bfloat16().to(dtype)
        next_token_loss(h, w, targets, 'sum', chunk).backward()
        return w.grad.double()

    exact = gradient(torch.float32, 0)
    one, many = (
        ((gradient(torch.bfloat16, chunk) - exact).norm() / exact.norm()).item()
        for chunk in (2047, 8)
    )
    assert many < 1.5 * one


def test_without_gradients_and_with_a_frozen_head():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(40, 8), torch.randn(11, 8), torch.randint(0, 11, (40,))
    with torch.no_grad():
        assert torch.allclose(
            next_token_loss(hidden, weight, targets),
            next_token_loss(hidden, weight, targets, chunk=6),
        )
    plain, chunked = both(32, frozen=True)
    assert chunked[2] is None and torch.allclose(plain[1], chunked[1], atol=1e-6)
    assert (
        next_token_loss(hidden, weight, torch.full((40,), IGNORE), chunk=6).isnan()
        and next_token_loss(hidden, weight, torch.full((40,), IGNORE), 'sum', 6) == 0
    )


def test_which_chunk_is_taken():
    # all of them in one
    assert choose_chunk(None, 2048, 2048, 'cpu', torch.float32) == (0, None) and choose_chunk(
        None, 2048, 8192, 'cpu', torch.float32
    ) == (2048, None)
    assert (
        choose_chunk(None, 2048, 50304, 'cpu', torch.float32)[0] == 1024
        and 'loss in chunks of 1024' in choose_chunk(None, 2048, 50304, 'cpu', torch.float32)[1]
    )
    assert choose_chunk(None, 2048, 128256, 'cpu', torch.float32)[0] == 512 and choose_chunk(
        0, 2048, 128256, 'cpu', torch.float32
    ) == (0, None)
    assert (
        choose_chunk(None, 24 * 2048, 128256, 'cuda', torch.bfloat16)[0] == 1152
        and choose_chunk(None, 4096, 10**7, 'cpu', torch.float32)[0] == 256
    )
    assert (
        choose_chunk(64, 2048, 128256, 'cuda', torch.float16)[0] == 0
        and 'float16' in choose_chunk(64, 2048, 128256, 'cuda', torch.float16)[1]
    )
    # compiled on a GPU torch's takes less time and less memory, up to a size; that memory is
    # predicted from smaller chunks
    assert (
        choose_chunk(None, 8 * 2048, 128256, 'cuda', torch.bfloat16, True)
        == (0, None)
        != choose_chunk(None, 8 * 2048, 128256, 'cuda', torch.bfloat16)
    )
    assert (
        choose_chunk(None, 24 * 2048, 128256, 'cuda', torch.bfloat16, True)[0] == 1152
        and choose_chunk(None, 2048, 50304, 'cpu', torch.float32, True)[0] == 1024
    )
    assert (
        eager_chunk(0, 16384, 128256, 'cuda', True) == 4096
        and eager_chunk(1024, 16384, 128256, 'cuda', True) == 1024
    )
    assert (
        eager_chunk(0, 16384, 128256, 'cuda', False)
        == eager_chunk(0, 512, 128256, 'cuda', True)
        == eager_chunk(0, 16384, 128256, 'cpu', True)
        == 0
    )
    assert (
        choose_chunk(64, 64, 100, 'cpu', torch.float32)
        == (64, None)
        == choose_chunk(99, 64, 100, 'cpu', torch.float32)
    )


@pytest.mark.parametrize('compiled', [False, True])
def test_a_run_in_chunks_is_the_plain_run(dataset, tmp_path, compiled):
    arguments = [
        '--max_iters=6',
        '--eval_interval=3',
        '--arch_preset=llama',
        '--batch_size=4',
        f'--compile={compiled}',
    ]
    for tied in (False, True):
        for name, chunk in (('plain', 0), ('chunks', 24)):
            assert (
                run_train(
                    dataset,
                    tmp_path / f'{name}{tied}',
                    *arguments,
                    f'--loss_chunk={chunk}',
                    f'--weight_tying={tied}',
                )
                == 0
            )
        plain, chunks = losses(tmp_path / f'plain{tied}'), losses(tmp_path / f'chunks{tied}')
        assert plain.keys() == chunks.keys() and all(
            abs(plain[i] - chunks[i]) < 1e-5 for i in plain
        )
        assert (
            'loss in chunks of 24 tokens'
            in next((tmp_path / f'chunks{tied}').glob('*.log')).read_text()
        )
    assert run_train(dataset, tmp_path / 'bad', '--loss_chunk=-1') == 2


MEMORY = """
import sys, resource, torch
from onetrain.ops.cross_entropy import next_token_loss
hidden = torch.randn(1024, 32, requires_grad=True)
weight = torch.randn(200000, 32, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
targets = torch.zeros(1024, dtype=torch.int64)
next_token_loss(hidden, weight, targets, chunk=int(sys.argv[1])).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_chunks_need_less_memory():
    grown = {
        chunk: (
            int(
                subprocess.run(
                    [sys.executable, '-c', MEMORY, str(chunk)],
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    check=True,
                    env=os.environ,
                ).stdout
            )
            * 1024
        )
        for chunk in (0, 128)
    }
    assert grown[0] > 1024 * 200000 * 4 and grown[128] < grown[0] / 3
