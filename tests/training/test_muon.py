"""Proves Muon: torch's own update, AdamW for the rest, bad steps left out on the device, any
layout, resume to the last bit.
"""

import io
import math
import platform

import pytest
import torch
from conftest import TINY, equal, losses, records, run_train, weights
from layout_runs import arguments, run
from ranks import ranks

from model import Model
from onetrain import cpu
from onetrain.model_config import resolve_shape
from onetrain.training import muon, optim
from onetrain.training.muon import Muon, newton_schulz

REAL = cpu.has_bfloat16
SHAPE = dict(
    arch_preset='llama3',
    n_layer=2,
    n_head=4,
    num_key_value_heads=2,
    n_embd=32,
    block_size=16,
    vocab_size=30,
)


def trained(build, steps=4):
    """The weights after `steps` steps on the same batches with build(model)'s optimizers."""
    model = Model(resolve_shape(SHAPE))
    model.init_weights(0)
    optimizers = build(model)
    torch.manual_seed(0)
    for _ in range(steps):
        idx = torch.randint(30, (4, 16))
        model(idx, idx.roll(-1, 1)).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return dict(model.named_parameters())


@pytest.fixture
def in_bfloat16(monkeypatch):
    """As on a CPU that computes in it, and as torch's Muon does everywhere."""
    monkeypatch.setattr(cpu, 'has_bfloat16', lambda: True)


def test_a_cpu_without_bfloat16_computes_in_float32(monkeypatch, in_bfloat16):
    matrices = torch.randn(3, 48, 96, generator=torch.Generator().manual_seed(0))
    expected, dtypes, baddbmm = newton_schulz(matrices), set(), torch.baddbmm
    monkeypatch.setattr(cpu, 'has_bfloat16', lambda: False)
    monkeypatch.setattr(
        torch,
        'baddbmm',
        lambda *tensors, **options: (
            dtypes.update(t.dtype for t in tensors),
            baddbmm(*tensors, **options),
        )[1],
    )
    found = newton_schulz(matrices)
    assert dtypes == {torch.float32} and found.dtype == expected.dtype == torch.bfloat16
    assert ((found.float() - expected.float()).norm() / expected.float().norm()) < 0.03
    values = torch.linalg.svdvals(found.float())
    assert 0.6 < values.min() and values.max() < 1.3


def test_what_a_processor_says_of_itself(monkeypatch):
    for lines, name, bfloat16 in (
        ('model name : A\nflags : avx2 avx512f\n', 'A', False),
        ('flags\t: avx512f avx512_bf16\n', platform.machine(), True),
        ('Features : fp asimd bf16\n', platform.machine(), True),
        ('', platform.machine(), False),
    ):
        cpu._described.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr('builtins.open', lambda path: io.StringIO(lines))
            assert (cpu.cpu_name(), REAL()) == (name, bfloat16)
    cpu._described.cache_clear()


def test_it_is_torchs_muon_and_adamw(in_bfloat16):
    def ours(model):
        return [
            optim.build_optimizer(
                model.named_parameters(),
                matrices=model.matrices(),
                momentum=0.9,
                learning_rate=0.01,
                betas=(0.9, 0.95),
                weight_decay=0.1,
                device_type='cpu',
            )
        ]

    def torchs(model):
        named, matrices = dict(model.named_parameters()), set(model.matrices())
        decayed, others = optim.decay_groups(named.items())
        rest = torch.optim.AdamW(
            [
                {'params': [named[n] for n in decayed if n not in matrices], 'weight_decay': 0.1},
                {'params': [named[n] for n in others], 'weight_decay': 0.0},
            ],
            lr=0.01,
            betas=(0.9, 0.95),
            fused=True,
        )
        return [
            torch.optim.Muon(
                [named[n] for n in matrices],
                lr=0.01,
                weight_decay=0.1,
                momentum=0.9,
                adjust_lr_fn='match_rms_adamw',
            ),
            rest,
        ]

    a, b = trained(ours), trained(torchs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    start = Model(resolve_shape(SHAPE))
    start.init_weights(0)
    assert all((a[name] - p).abs().max() > 1e-3 for name, p in start.named_parameters())


def test_small_matrices_go_together(monkeypatch, in_bfloat16):
    """To the bits of one after the other."""
    found = []
    for most, expected in (
        (muon.MAX_BATCH_NUMEL, [2, 2, 2, 2]),
        (2 * 64 * 32, [2, 2, 1, 1, 1, 1]),
        (1, [1] * 8),
    ):
        monkeypatch.setattr(muon, 'MAX_BATCH_NUMEL', most)
        model = Model(resolve_shape(SHAPE))
        assert sorted(
            map(
                len,
                muon.group_by_shape(
                    [dict(model.named_parameters())[name] for name in model.matrices()]
                ),
            )
        ) == sorted(expected)
        found.append(
            trained(
                lambda model: [
                    optim.build_optimizer(
                        model.named_parameters(),
                        matrices=model.matrices(),
                        learning_rate=0.01,
                        betas=(0.9, 0.95),
                        weight_decay=0.1,
                        device_type='cpu',
                    )
                ]
            )
        )
    assert all(equal(found[0], other) for other in found[1:])


def test_which_parameters_it_takes():
    for settings, expected in (
        (SHAPE, {'attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'}),
        (
            dict(SHAPE, arch_preset='gpt2', num_key_value_heads=None),
            {'attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'},
        ),
        (
            dict(
                SHAPE,
                arch_preset='moe',
                num_experts=4,
                num_experts_per_tok=2,
                num_shared_experts=1,
                n_dense_layers=0,
                bias=True,
            ),
            {'attn.c_attn', 'attn.c_proj', 'mlp.shared.c_fc', 'mlp.shared.c_proj'},
        ),
    ):
        names = Model.on_meta(resolve_shape(settings)).matrices()
        assert {
            name.split('.', 3)[3].removesuffix('.weight') for name in names
        } == expected and all(name.endswith('.weight') for name in names)


@pytest.mark.parametrize('shape', [(32, 32), (16, 64), (96, 24)])
def test_singular_values_become_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    found = newton_schulz(matrix[None])[0].float()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    assert (
        found.shape == shape
        and 0.6 < torch.linalg.svdvals(found).min()
        and torch.linalg.svdvals(found).max() < 1.3
    )
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.97


def test_a_bad_step_leaves_matrices_and_momentum():
    def one(norms):
        p, q = torch.nn.Parameter(torch.eye(3)), torch.nn.Parameter(torch.ones(3))
        optimizer = Muon(
            [
                {'params': [p], 'weight_decay': 0.1, 'muon': True},
                {'params': [q], 'weight_decay': 0.0},
            ],
            0.1,
            (0.9, 0.95),
        )
        guard = optim.NonFiniteGuard([p, q], torch.amp.GradScaler('cpu', enabled=False), 3)
        for step, norm in enumerate(norms, 1):
            p.grad, q.grad = torch.full((3, 3), float(norm)), torch.full((3,), float(norm))
            guard.step(optimizer, step, torch.tensor(1.0), torch.tensor(float(norm)))
        return [p.detach(), q.detach(), *optimizer.state[p].values(), *optimizer.state[q].values()]

    skipped, calm = one([1, math.nan, 1]), one([1, 1])
    assert (
        len(skipped) == 6
        and all(torch.equal(a, b) for a, b in zip(skipped, calm))
        and not torch.equal(one([1])[0], calm[0])
    )


def test_resume_is_bitwise_and_the_optimizer_stays(dataset, tmp_path, capsys):
    muon = ['--optimizer=muon', '--arch_preset=llama', '--learning_rate=1e-2']
    assert run_train(dataset, tmp_path / 'whole', *muon, '--max_iters=8', '--eval_interval=4') == 0
    said = capsys.readouterr().out
    assert 'Optimizer:   Muon and AdamW (fused)' in said and said.count('weight decay 0.1 on ') == 1
    assert (
        run_train(
            dataset,
            tmp_path / 'parts',
            *muon,
            '--max_iters=4',
            '--eval_interval=4',
            '--lr_decay_iters=600000',
        )
        == 0
    )
    assert (
        run_train(
            dataset,
            tmp_path / 'parts',
            *muon,
            '--init_from=resume',
            '--max_iters=8',
            '--eval_interval=4',
        )
        == 0
    )
    assert losses(tmp_path / 'whole') == losses(tmp_path / 'parts') and equal(
        weights(tmp_path / 'whole', 8), weights(tmp_path / 'parts', 8)
    )
    capsys.readouterr()
    assert run_train(dataset, tmp_path / 'parts', '--init_from=resume', '--optimizer=adamw') == 2
    assert "optimizer='adamw', but the checkpoint in" in capsys.readouterr().err
    assert (
        run_train(
            dataset, tmp_path / 'adamw', '--max_iters=2', '--eval_interval=2', '--muon_momentum=0.9'
        )
        == 0
    )
    assert 'muon_momentum has no effect without optimizer=muon' in capsys.readouterr().out
    assert run_train(dataset, tmp_path / 'x', '--optimizer=muon', '--muon_momentum=1') == 2


LAYOUTS = {
    'DDP': [],
    'ZeRO-1': ['--use_zero1=True'],
    'ZeRO-2': ['--use_fsdp=True', '--fsdp_reshard=False'],
    'ZeRO-3': ['--use_fsdp=True'],
    'hybrid': ['--use_fsdp=True', '--fsdp_replicas=2'],
}


def test_every_layout_makes_the_same_steps(dataset, tmp_path):
    """Rounding to bf16 within Newton-Schulz makes of a difference in the last bit of a gradient one
    of 1 in 256 of some elements, so one process agrees less closely.
    """
    settings = [
        '--arch_preset=llama3',
        '--num_key_value_heads=1',
        '--d_ff=50',
        '--optimizer=muon',
        '--learning_rate=5e-3',
    ]
    run(1, *arguments(dataset, tmp_path / 'one', *settings))
    found = {}
    for name, layout in LAYOUTS.items():
        run(
            4 if name == 'hybrid' else 2,
            *arguments(
                dataset,
                tmp_path / name,
                *settings,
                *layout,
                '--batch_size=4' if name == 'hybrid' else '--batch_size=8',
                *(['--eval_iters=1'] * (name != 'hybrid')),
            ),
        )
        found[name] = losses(tmp_path / name)
        one = losses(tmp_path / 'one')
        assert (
            one.keys() == found[name].keys()
            and max(abs(one[step] - loss) for step, loss in found[name].items()) < 2e-3
        )
        assert one[20] < one[1] - 0.3
    assert found['DDP'] == found['ZeRO-1'] and equal(
        weights(tmp_path / 'DDP', 20), weights(tmp_path / 'ZeRO-1', 20)
    )
    assert found['ZeRO-2'] == found['ZeRO-3'] and equal(
        weights(tmp_path / 'ZeRO-2', 20), weights(tmp_path / 'ZeRO-3', 20)
    )
    # what one layout saved another goes on with
    run(
        1,
        f'--dataset={dataset}',
        f'--out_dir={tmp_path}/ZeRO-3',
        *TINY,
        '--init_from=resume',
        '--use_fsdp=False',
        '--max_iters=22',
        '--total_batch_size=256',
        '--batch_size=16',
    )
    assert (
        max(losses(tmp_path / 'ZeRO-3')) == 22 and records(tmp_path / 'ZeRO-3')[-1]['loss'] < one[1]
    )


def shared_steps(layout, bad_step):
    """Three steps with the same gradients on every rank: this rank's rows of the parameters and
    momenta, and how many matrices it made orthogonal.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    size = dist.get_world_size() if layout != 'single' else 1
    generator, made = torch.Generator().manual_seed(0), []
    shapes = [(12, 8)] * 5 + [(3, 9)] * 2 + [(1, 6), (20, 4), (8, 8)]
    mesh = {
        'rows': lambda: init_device_mesh('cpu', (size,)),
        'hybrid': lambda: init_device_mesh('cpu', (2, size // 2)),
    }.get(layout, lambda: None)()
    full = [torch.randn(shape, generator=generator) for shape in shapes]
    parameters = [torch.nn.Parameter(of_mesh(tensor, mesh) if mesh else tensor) for tensor in full]
    optimizer = Muon(
        [{'params': parameters, 'weight_decay': 0.1, 'muon': True}],
        0.05,
        (0.9, 0.95),
        ranks=size if mesh is None else 1,
    )
    real, muon.MAX_BATCH_NUMEL = muon.newton_schulz, 2 * 96
    muon.newton_schulz = lambda matrices: (made.append(len(matrices)), real(matrices))[1]
    try:
        for step in range(3):
            for p, shape in zip(parameters, shapes):
                gradient = torch.randn(shape, generator=generator)
                p.grad = of_mesh(gradient, mesh) if mesh else gradient
            optimizer.found_inf = torch.tensor(float(step == bad_step))
            optimizer.step()
    finally:
        muon.newton_schulz, muon.MAX_BATCH_NUMEL = real, 2**22
    found = []
    for p in parameters:
        for tensor in (p, optimizer.state[p]['momentum']):
            found.append(tensor.full_tensor().detach().numpy() if mesh else tensor.detach().numpy())
    return found, sum(made)


def of_mesh(tensor, mesh):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from onetrain.distributed.layouts import shard_rows

    return DTensor.from_local(
        tensor[shard_rows(tensor, mesh)].clone(),
        mesh,
        [Replicate()] * (mesh.ndim - 1) + [Shard(0)],
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


@pytest.mark.parametrize('layout, size', [('full', 2), ('rows', 2), ('rows', 4), ('hybrid', 4)])
def test_each_matrix_is_made_orthogonal_by_one_rank_to_the_bits_of_one_process(layout, size):
    alone, all_of_them = shared_steps('single', 1)
    answers = ranks(size)(shared_steps, layout, 1)
    for found, _ in answers:
        assert all((a == b).all() for a, b in zip(found, alone, strict=True))
    shared = size // 2 if layout == 'hybrid' else size
    assert (
        all_of_them == 3 * 10 and sum(made for _, made in answers) == all_of_them * size // shared
    )
    assert max(made for _, made in answers) <= 3 * -(-10 // shared) + 3
