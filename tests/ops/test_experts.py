"""Mixture of experts: the sorted dispatch equals the loop, routing its definition, and balancing,
logs and checkpoints hold under every layout.
"""

import math

import pytest
import torch
from conftest import equal, losses, records, run_ranks, weights
from layout_runs import LAYOUTS, arguments, close, run
from ranks import ranks

from model import Model
from onetrain.model_config import resolve_shape
from onetrain.ops import experts

MOE = [
    '--arch_preset=moe',
    '--num_experts=4',
    '--expert_d_ff=32',
    '--n_dense_layers=1',
    '--n_layer=3',
    '--balance_rate=0.01',
    '--expert_log_interval=7',
]


def layer(n=40, width=16, inner=24, number=5, top_k=2, biases=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    # the last expert gets none
    chosen = torch.rand(n, number - 1, generator=generator).topk(top_k).indices
    fc, proj = (
        (draw(number, *sizes), draw(number, sizes[0]) if biases else None)
        for sizes in ((2 * inner, width), (width, inner))
    )
    return draw(n, width), chosen, draw(n, top_k), fc, proj


def swiglu(x):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize(
    'top_k, biases, compiled',
    [(1, True, False), (2, False, False), (3, True, False), (2, True, True)],
)
def test_grouped_dispatch_equals_the_loop(top_k, biases, compiled):
    x, chosen, gates, fc, proj = layer(top_k=top_k, biases=biases)
    inputs = [t for t in (x, gates, *fc, *proj) if t is not None]
    grouped = (
        torch.compile(experts.run_experts, fullgraph=True) if compiled else experts.run_experts
    )
    results = []
    for how, dispatch in ((experts.run_experts, 'loop'), (grouped, 'grouped')):
        y = how(x, chosen, gates, fc, proj, swiglu, dispatch)
        results.append(
            [y, *torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), inputs)]
        )
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)
    # the expert that nobody chose has a gradient, of zeros
    assert results[0][3].abs().sum() > 0 and not results[1][3][-1].any()


def test_experts_without_tokens_get_no_gradient_whatever_the_kernel_leaves_there(monkeypatch):
    """As on a B200, where the kernel does not write what belongs to them."""
    real = experts._grouped_mm

    def leaving_garbage(a, b, offs):
        out = real(a, b, offs=offs)
        if out.dim() == 3:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = float('nan')
        return out

    monkeypatch.setattr(experts, '_grouped_mm', leaving_garbage)
    x, chosen, gates, fc, proj = layer()
    experts.run_experts(x, chosen, gates, fc, proj, swiglu, 'grouped').square().sum().backward()
    for weight, _ in (fc, proj):
        assert weight.grad.isfinite().all() and not weight.grad[-1].any() and weight.grad[0].any()


def test_autocast_reaches_the_grouped_matmuls():
    x, chosen, gates, fc, proj = layer(biases=False)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        a, b = (
            experts.run_experts(x, chosen, gates, fc, proj, swiglu, dispatch)
            for dispatch in ('loop', 'grouped')
        )
    assert a.dtype == b.dtype == torch.bfloat16 and (a - b).abs().max() <= 0.05 * a.abs().max()
    assert (
        b.float() - experts.run_experts(x, chosen, gates, fc, proj, swiglu, 'loop')
    ).abs().max() > 0


def test_dispatch_falls_back_with_its_reason():
    assert experts.choose_dispatch('grouped', (64, 36), torch.float32, 'cpu') == ('grouped', None)
    assert experts.choose_dispatch('loop', (64, 36), torch.float32, 'cpu') == ('loop', None)
    dispatch, reason = experts.choose_dispatch('grouped', (64, 36), torch.bfloat16, 'cpu')
    assert dispatch == 'loop' and 'multiples of 8 in bfloat16, not 36' in reason
    assert (
        'want bfloat16 on a GPU, not float32'
        in experts.choose_dispatch('grouped', (64, 64), torch.float32, 'cuda')[1]
    )


def by_hand(
    logits, bias, top_k, score_function, n_groups, topk_groups, norm_topk_prob, route_scale
):
    """DeepSeek-V3's routing of one token, in plain Python."""
    size = len(logits) // n_groups
    total = sum(math.exp(x) for x in logits)
    scores = [
        1 / (1 + math.exp(-x)) if score_function == 'sigmoid' else math.exp(x) / total
        for x in logits
    ]
    biased = [s + b for s, b in zip(scores, bias)]
    strength = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(n_groups)]
    groups = sorted(range(n_groups), key=lambda g: -strength[g])[:topk_groups]
    chosen = sorted(
        (e for e in range(len(logits)) if e // size in groups), key=lambda e: -biased[e]
    )[:top_k]
    share = sum(scores[e] for e in chosen) if norm_topk_prob else 1
    return {e: scores[e] / share * route_scale for e in chosen}


@pytest.mark.parametrize('score_function', ['sigmoid', 'softmax'])
@pytest.mark.parametrize('n_groups, topk_groups', [(1, 1), (4, 2), (4, 4), (12, 5)])
@pytest.mark.parametrize('norm_topk_prob, route_scale', [(True, 2.5), (False, 1.0)])
def test_routing_is_its_definition(
    score_function, n_groups, topk_groups, norm_topk_prob, route_scale
):
    generator = torch.Generator().manual_seed(n_groups)
    logits = torch.randn(30, 12, generator=generator)
    bias = 0.3 * torch.randn(12, generator=generator)
    options = dict(
        top_k=3,
        score_function=score_function,
        n_groups=n_groups,
        topk_groups=topk_groups,
        norm_topk_prob=norm_topk_prob,
        route_scale=route_scale,
    )
    chosen, gates, scores = experts.choose_experts(logits, bias, **options)
    for row in range(30):
        expected = by_hand(logits[row].tolist(), bias.tolist(), **options)
        assert {*chosen[row].tolist()} == expected.keys()
        assert all(
            abs(gate - expected[e]) < 1e-6
            for e, gate in zip(chosen[row].tolist(), gates[row].tolist())
        )
    counts, (entropy, auxiliary, z) = experts.routing_statistics(logits, scores, chosen).split(
        [12, 3]
    )
    assert counts.tolist() == torch.bincount(chosen.flatten(), minlength=12).tolist()
    shares = scores / scores.sum(1, keepdim=True)
    assert torch.isclose(
        entropy, torch.distributions.Categorical(shares).entropy().mean(), atol=1e-5
    )
    assert torch.isclose(auxiliary, 12 * (counts / 90 * shares.mean(0)).sum()) and torch.isclose(
        z, logits.exp().sum(1).log().square().mean()
    )


def test_balancing_moves_toward_the_mean():
    bias = [torch.zeros(4), torch.zeros(4)]
    counts = torch.tensor([[10.0, 2.0, 6.0, 6.0], [0.0, 0.0, 0.0, 12.0]])
    experts.update_balance(bias, counts, 0.1, 1)
    assert torch.allclose(
        torch.stack(bias), torch.tensor([[-0.1, 0.1, 0.0, 0.0], [0.1, 0.1, 0.1, -0.1]])
    )
    experts.update_balance(bias, counts, 0.1, torch.tensor(0.0))  # a step that was skipped
    assert torch.allclose(bias[0], torch.tensor([-0.1, 0.1, 0.0, 0.0]))
    assert experts.load_score(counts).tolist() == [20, 0]


def model(**changes):
    made = Model(
        resolve_shape(
            dict(
                arch_preset='moe',
                n_layer=2,
                n_head=2,
                n_embd=32,
                block_size=16,
                vocab_size=61,
                num_experts=4,
                expert_d_ff=24,
            )
        ),
        **changes,
    )
    made.init_weights(0)
    return made


def test_routing_is_in_float32_whatever_comes_in():
    router = model().moe_layers[0].router
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        chosen, gates, _ = router(x)
    expected = (x.float() @ router.weight.T).sigmoid().topk(2)
    assert torch.equal(chosen, expected.indices) and torch.allclose(
        gates, expected.values / expected.values.sum(1, keepdim=True), atol=1e-6
    )


def test_losses_of_routing_are_in_the_gradient_only():
    x = torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(0))
    gradients, values = [], []
    for weight in (0.0, 0.5):
        m = model(aux_loss=weight, z_loss=weight / 10)
        loss = m(x[:, :-1], x[:, 1:])
        loss.backward()
        gradients.append(m.moe_layers[0].router.weight.grad.clone())
        values.append(loss.item())
    assert values[0] == values[1] and not torch.allclose(*gradients)
    m = model(aux_loss=0.5, z_loss=0.05)  # the gradient is that of the written-out loss
    x_in, statistics = x[:, :-1], []
    for moe in m.moe_layers:
        moe.router.register_forward_hook(lambda module, args, out: statistics.append(out[2]))
    loss = m(x_in, x[:, 1:])
    aux, z = torch.stack(statistics)[:, -2:].mean(0)
    expected = torch.autograd.grad(
        loss.detach() * 0 + Model.forward(m.eval(), x_in, x[:, 1:]), m.moe_layers[0].router.weight
    )[0]
    extra = torch.autograd.grad(0.5 * aux + 0.05 * z, m.moe_layers[0].router.weight)[0]
    assert torch.allclose(gradients[1], expected + extra, atol=1e-6) and extra.abs().max() > 1e-4


def test_recomputation_counts_each_token_once():
    x = torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(0))
    found = []
    for how in ('none', 'selective', 'full'):
        m = model(activation_checkpointing=how)
        for part in (x, x.flip(0)):
            m(part[:, :-1], part[:, 1:]).backward()
        m.eval()(x[:, :-1], x[:, 1:])  # evaluation counts nothing
        found.append((m.routing.clone(), [p.grad for p in m.parameters()]))
    for routing, gradients in found[1:]:
        assert torch.equal(routing, found[0][0]) and all(
            torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, found[0][1])
        )
    # micro-steps, layers, experts per token, tokens
    assert found[0][0][:, :4].sum() == 2 * 2 * 2 * 48


@pytest.fixture(scope='module')
def single(dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp('moe')
    run(1, *arguments(dataset, out, *MOE, '--batch_size=8', '--eval_iters=1'))
    return out


def balances(out, step):
    names = [f'model.transformer.h.{i}.mlp.router.balance' for i in (1, 2)]
    found = {name: torch.zeros(4) for name in names}
    from onetrain.checkpoint import store

    store.load(store.path_of(str(out), step), found)
    return found


@pytest.mark.parametrize(
    'layout, work',
    [
        (
            layout,
            (
                ['--batch_size=4']
                if number % 2
                else ['--batch_size=8', '--eval_iters=1', '--activation_checkpointing=full']
            ),
        )
        for number, layout in enumerate(LAYOUTS)
    ],
)
def test_every_layout_trains_alike(dataset, tmp_path, single, layout, work):
    run(2, *arguments(dataset, tmp_path, *MOE, *LAYOUTS[layout], *work))
    assert close(losses(tmp_path), losses(single), 1e-5)
    assert all(
        torch.equal(tensor, balances(single, 20)[name])
        for name, tensor in balances(tmp_path, 20).items()
    )

    def shares(out):
        return [
            [layer.get(key) for key in ('utilization', 'least', 'most')]
            for record in records(out)
            for layer in record['moe']['layers']
        ]

    assert shares(tmp_path) == shares(single)


def held(arguments):
    """A run of hybrid or full sharding on this rank: its exit code, and the elements of all experts
    that this rank holds.
    """
    import train
    from onetrain.distributed import layouts

    real, found = layouts.shard, []

    def shard(model, *args):
        real(model, *args)
        found.append(sum(p.to_local().numel() for p in model.parameters() if p.dim() == 3))

    layouts.shard = shard
    try:
        return train.main(arguments), found[0]
    finally:
        layouts.shard = real


def test_experts_that_the_ranks_do_not_divide_are_split_along_their_width(dataset, tmp_path):
    """6 experts on 4 ranks: a rank holds a quarter of each; the losses, a checkpoint and its
    resumption on 2 ranks are those of one process.
    """
    settings = [word for word in MOE if 'num_experts' not in word] + [
        '--num_experts=6',
        '--eval_iters=1',
        '--checkpoint_interval=10',
    ]
    run(1, *arguments(dataset, tmp_path / 'one', *settings, '--batch_size=8'))
    answers = ranks(4)(
        held, arguments(dataset, tmp_path / 'four', *settings, '--batch_size=2', '--use_fsdp=True')
    )
    experts_of_layer = 6 * (2 * 32 * 32 + 32 * 32)
    assert answers == [(0, 2 * experts_of_layer // 4)] * 4
    assert close(losses(tmp_path / 'four'), losses(tmp_path / 'one'), 1e-5)
    run(
        2,
        *arguments(
            dataset,
            tmp_path / 'four',
            *settings,
            '--batch_size=4',
            '--use_fsdp=True',
            '--init_from=resume',
            '--resume_from=10',
        ),
    )
    assert close(losses(tmp_path / 'four'), losses(tmp_path / 'one'), 1e-5)


def test_log_tells_of_every_expert(single):
    for record in records(single):
        first, second = record['moe']['layers']
        assert (
            (first['layer'], second['layer']) == (1, 2)
            and 0 <= first['least'] <= 0.25 <= first['most']
            and first['dropped'] == 0
        )
        # that of each expert every expert_log_interval iterations, and in the first and the last
        assert ('utilization' in first) == (record['iter'] in (1, 7, 14, 20))
        if 'utilization' in first:
            assert (
                abs(sum(first['utilization']) - 1) < 1e-3
                and max(first['utilization']) == first['most']
            )
        assert (
            0 <= first['load_score'] <= 100
            and 0 <= first['entropy'] <= math.log(4) + 1e-6
            and record['moe']['aux_loss'] > 0.9
        )
    assert (
        records(single)[-1]['moe']['layers'][0]['bias_max']
        > 0
        > records(single)[-1]['moe']['layers'][0]['bias_min']
    )


def test_shares_are_left_out_or_logged_when_their_interval_was_passed(train, tmp_path):
    # every third iteration is logged, and the first
    for interval, logged in ((0, []), (5, [1, 6, 12])):
        assert (
            train(
                tmp_path / str(interval),
                *MOE[:-1],
                f'--expert_log_interval={interval}',
                '--max_iters=12',
                '--log_interval=3',
            )
            == 0
        )
        assert [
            r['iter']
            for r in records(tmp_path / str(interval))
            if 'utilization' in r['moe']['layers'][0]
        ] == logged


def test_resume_is_bitwise(dataset, train, tmp_path, single):
    code = train(
        tmp_path / 'part',
        *MOE,
        '--max_iters=10',
        '--eval_interval=10',
        '--total_batch_size=256',
        '--batch_size=8',
        '--eval_iters=1',
        '--lr_decay_iters=600000',
    )
    assert (
        code == 0
        and train(
            tmp_path / 'part',
            *MOE,
            '--batch_size=8',
            '--eval_iters=1',
            '--total_batch_size=256',
            '--init_from=resume',
            '--max_iters=20',
        )
        == 0
    )
    assert (
        losses(tmp_path / 'part') == losses(single)
        and equal(weights(tmp_path / 'part', 20), weights(single, 20))
        and equal(balances(tmp_path / 'part', 20), balances(single, 20))
    )


def test_a_bad_step_moves_no_balance(dataset, tmp_path, monkeypatch, train):
    real = Model.after_step

    def nan_at_five(self, world, rate, skipped):
        seen.append((skipped.item(), self.moe_layers[0].router.balance.clone()))
        return real(self, world, rate, skipped)

    seen = []
    monkeypatch.setattr(Model, 'after_step', nan_at_five)
    forward = Model.forward
    calls = []

    def broken(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs) * (float('nan') if len(calls) == 5 else 1)

    monkeypatch.setattr(Model, 'forward', broken)
    assert (
        train(
            tmp_path,
            *MOE,
            '--max_iters=8',
            '--eval_interval=100',
            '--eval_at_start=False',
            '--max_bad_steps=9',
        )
        == 0
    )
    assert [skipped for skipped, _ in seen] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert torch.equal(seen[5][1], seen[4][1]) and not torch.equal(seen[6][1], seen[5][1])


def test_compiled_under_fsdp(dataset, tmp_path, single):
    """A dense layer and two of experts, each compiled for itself, some of them computed twice."""
    code, output = run_ranks(
        2,
        '--compile=True',
        '--activation_checkpointing=selective',
        *[
            a
            for a in arguments(
                dataset,
                tmp_path,
                *MOE,
                '--use_fsdp=True',
                '--batch_size=4',
                '--max_iters=5',
                '--eval_at_start=False',
                '--eval_interval=100',
            )
            if a != '--compile=False'
        ],
    )
    assert code == 0, output
    assert close(losses(tmp_path), {k: v for k, v in losses(single).items() if k <= 5}, 1e-5)


@pytest.mark.parametrize(
    'settings, message',
    [
        (
            dict(num_experts_per_tok=5),
            'num_experts_per_tok=5 must be at least 1 and at most num_experts=4',
        ),
        (dict(n_groups=3), 'num_experts=4 must be a multiple of n_groups=3'),
        (
            dict(n_groups=4, topk_groups=1, num_experts_per_tok=2),
            'more than the 1 experts of topk_groups=1 groups of 1',
        ),
        (dict(n_dense_layers=3), 'n_dense_layers from 0|n_dense_layers=3 from 0'),
    ],
)
def test_impossible_shapes_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        resolve_shape(
            {
                **dict(
                    arch_preset='moe', n_layer=2, n_head=2, n_embd=32, block_size=16, num_experts=4
                ),
                **settings,
            }
        )


def unbalanced(balance_rate, steps, seed):
    """The load score of a model whose router begins with a bias for one expert, over training."""
    from onetrain.counter_rng import hash_ints

    m = Model(
        resolve_shape(
            dict(
                arch_preset='moe',
                n_layer=1,
                n_head=2,
                n_embd=32,
                block_size=16,
                vocab_size=61,
                num_experts=8,
                expert_d_ff=24,
                bias=True,
            )
        )
    )
    m.init_weights(seed)
    with torch.no_grad():
        m.moe_layers[0].router.bias += torch.linspace(0.5, -0.5, 8)
    optimizer, world = torch.optim.AdamW(m.parameters(), lr=1e-3), type('World', (), {'size': 1})()
    scores = []
    for step in range(steps):
        x = torch.randint(
            61, (64, 17), generator=torch.Generator().manual_seed(hash_ints(1 + seed, step) % 2**63)
        )
        x[:, 1:] = (x[:, :-1] * 7 + 3) % 61  # something to learn
        m(x[:, :-1], x[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        scores.append(m.routing_report(m.after_step(world, balance_rate, 0), 1024)['load_score'])
    return scores


def test_balancing_makes_an_unbalanced_start_even():
    """For every seed and with room to spare: one run is chaotic, and no two processors round
    alike.
    """
    for seed in (0, 1, 2):
        off, on = unbalanced(0.0, 200, seed), unbalanced(1e-3, 200, seed)
        even, uneven = sum(on[-100:]) / 100, sum(off[-100:]) / 100
        assert off[0] == on[0] and even > 3 * uneven, (seed, even, uneven)


def test_biases_of_experts_are_not_decayed():
    from onetrain.training.optim import decay_groups

    named = dict(model(dispatch='loop').named_parameters()) | dict(
        Model(
            resolve_shape(
                dict(
                    arch_preset='gpt_oss',
                    n_layer=1,
                    n_head=2,
                    n_embd=16,
                    block_size=16,
                    vocab_size=20,
                    num_experts=4,
                    d_ff=8,
                )
            )
        ).named_parameters(prefix='oss')
    )
    decayed, others = decay_groups(named.items())
    assert (
        'oss.transformer.h.0.mlp.c_fc.bias' in others
        and 'oss.transformer.h.0.attn.sinks' in others
        and named['oss.transformer.h.0.mlp.c_fc.bias'].dim() == 2
    )
    assert 'oss.transformer.h.0.mlp.c_fc.weight' in decayed and len(decayed) + len(others) == len(
        named
    )
