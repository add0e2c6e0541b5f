"""Parameter counts are the published ones, every shipped config builds, every switch does what its
name says.
"""

import dataclasses
import glob
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from model import Model
from onetrain.config import UserError, resolve
from onetrain.model_config import PRESETS, resolve_shape
from onetrain.ops.cross_entropy import next_token_loss
from train import ALIASES, Config

CONFIGS = sorted(glob.glob(os.path.join(ROOT, 'config', '*.py')))
PARAMETERS = {
    'full_gpt2_1.36b': 1_267_322_112,
    'full_llama_1.36b': 1_294_159_104,
    'full_llama3_1.5b_optimal': 1_544_628_224,
    'full_llama3_2.2b_chinchilla': 2_224_154_624,
    'full_qwen3_1.8b_optimal': 1_830_389_760 + 6_144,
    'full_gpt2_1b': 759_905_280,
    'full_neox_1.2b': 1_414_455_296,
    'full_llama3_8b': 8_030_261_248,
    'train_gpt2': 124_373_760,
}


def shape(**settings):
    return resolve_shape(
        {
            'arch_preset': 'gpt2',
            'n_layer': 2,
            'n_head': 4,
            'n_embd': 32,
            'block_size': 16,
            'vocab_size': 61,
            **settings,
        }
    )


def build(seed=0, **settings):
    model = Model(shape(**settings))
    model.init_weights(seed)
    return model


def name_of(path):
    return os.path.basename(path).removesuffix('.py')


@pytest.mark.parametrize('path', CONFIGS, ids=name_of)
def test_shipped_configs_build_with_the_stated_parameters(path):
    config, _ = resolve(Config, [path], ALIASES)
    with torch.device('meta'):
        model = Model(resolve_shape(dataclasses.asdict(config)))
    counts = model.parameter_counts()
    if name_of(path) in PARAMETERS:
        assert counts['total'] == PARAMETERS[name_of(path)]
    assert counts['total'] == sum(p.numel() for p in model.parameters())
    with open(path) as f:
        header = f.read().split('\n\n')[0]
    assert (
        header.startswith('#')
        and 'train.py config/' in header
        and 'Batch' in header
        or 'eval' in path
    )
    if name_of(path).startswith('full_'):
        assert f'{counts["total"]:,}' in header


def test_a_preset_never_overrides_the_user():
    for preset in PRESETS:
        config = resolve_shape(
            dict(
                arch_preset=preset,
                n_layer=3,
                n_head=6,
                n_embd=60,
                block_size=8,
                vocab_size=77,
                num_key_value_heads=2,
                head_dim=12,
                d_ff=50,
                bias=True,
                normalization='layernorm',
                norm_eps=0.1,
                norm_position='pre',
                activation='relu2',
                ffn_type='standard',
                position_encoding='rope',
                rope_theta=7.0,
                rotary_pct=0.5,
                qk_norm=True,
                weight_tying=True,
            )
        )
        asked = dict(
            n_layer=3,
            n_head=6,
            num_key_value_heads=2,
            n_embd=60,
            head_dim=12,
            d_ff=50,
            block_size=8,
            vocab_size=77,
            bias=True,
            normalization='layernorm',
            norm_eps=0.1,
            norm_position='pre',
            activation='relu2',
            ffn_type='standard',
            position_encoding='rope',
            rope_theta=7.0,
            rotary_pct=0.5,
            qk_norm=True,
            parallel_residual=preset == 'neox',
            weight_tying=True,
        )
        assert {key: getattr(config, key) for key in asked} == asked
    routed = resolve_shape(
        dict(
            arch_preset='deepseek',
            n_layer=4,
            n_head=6,
            n_embd=60,
            block_size=8,
            num_experts=6,
            num_experts_per_tok=1,
            num_shared_experts=0,
            expert_d_ff=9,
            n_dense_layers=2,
            score_function='softmax',
            n_groups=3,
            topk_groups=1,
            norm_topk_prob=False,
            route_scale=1.5,
            sliding_window=3,
            window_pattern='LS',
            attention_sinks=True,
            rope_scaling='linear',
            rope_factor=2.0,
        )
    )
    assert (
        routed.num_experts,
        routed.num_experts_per_tok,
        routed.num_shared_experts,
        routed.expert_d_ff,
        routed.n_dense_layers,
        routed.score_function,
        routed.n_groups,
        routed.topk_groups,
        routed.norm_topk_prob,
        routed.route_scale,
        routed.windows,
        routed.attention_sinks,
        routed.rope_scaling,
        routed.rope_factor,
    ) == (6, 1, 0, 9, 2, 'softmax', 3, 1, False, 1.5, [None, 3, None, 3], True, 'linear', 2.0)


def test_the_factor_of_a_scaling_is_that_of_the_context():
    longer = shape(
        arch_preset='llama', block_size=64, rope_scaling='yarn', rope_original_block_size=16
    )
    assert (
        longer.rope_factor == 4.0
        and shape(
            arch_preset='llama',
            block_size=64,
            rope_scaling='yarn',
            rope_original_block_size=16,
            rope_factor=2.0,
        ).rope_factor
        == 2.0
    )
    assert (
        shape(arch_preset='gpt_oss').rope_factor == 32.0
        and shape(arch_preset='llama').rope_factor == 1.0
    )


def test_vocabulary_comes_from_the_user_then_the_data_then_the_preset():
    settings = dict(arch_preset='llama', n_layer=1, n_head=2, n_embd=8, block_size=4)
    assert resolve_shape(settings).vocab_size == 32000
    assert resolve_shape(settings, 65).vocab_size == 65
    assert resolve_shape({**settings, 'vocab_size': 100}, 65).vocab_size == 100


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(n_embd=30), 'n_embd=30 is not divisible by n_head=4: type --n_head=(3|5)'),
        (dict(num_key_value_heads=3), 'not a multiple of num_key_value_heads=3'),
        (dict(arch_preset='llama', head_dim=5), 'RoPE turns pairs'),
        (dict(n_layer=0), 'n_layer=0 must be at least 1'),
        (dict(arch_preset='neox', norm_position='post'), "needs norm_position='pre'"),
        (dict(arch_preset='mamba'), "'mamba' is not one of"),
    ],
)
def test_impossible_shapes(settings, message):
    with pytest.raises(UserError, match=message):
        shape(**settings)


@pytest.mark.parametrize(
    'settings',
    [dict(arch_preset=p) for p in PRESETS]
    + [
        dict(norm_position='post'),
        dict(arch_preset='llama3', num_key_value_heads=2, head_dim=10),
        dict(position_encoding='none'),
        dict(n_embd=20, bias=True),
    ],
)
def test_no_position_sees_the_future(settings):
    model = build(**settings).eval()
    idx = torch.randint(61, (2, 16))
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 61
    with torch.no_grad():
        a, b = model(idx), model(changed)
    assert torch.allclose(a[:, :9], b[:, :9], atol=1e-6) and not torch.allclose(
        a[:, 9:], b[:, 9:], atol=1e-3
    )


def test_loss_is_the_cross_entropy_of_the_logits():
    model = build(arch_preset='llama')
    idx, targets = torch.randint(61, (2, 2, 16))
    targets[0, :5] = -1
    logits = model(idx)
    expected = F.cross_entropy(logits.view(-1, 61), targets.view(-1), ignore_index=-1)
    assert torch.allclose(model(idx, targets), expected)
    assert torch.allclose(model(idx, targets, reduction='sum'), expected * 27)
    assert torch.allclose(model(idx, last_only=True), logits[:, -1:], atol=1e-6)
    assert (
        next_token_loss(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, 2, 3])).dtype
        == torch.float32
    )


def test_initial_weights_depend_on_seed_and_name_alone():
    a, deeper = build(seed=1).state_dict(), build(seed=1, n_layer=3).state_dict()
    same = [n for n in a if n in deeper and not n.endswith('c_proj.weight')]
    assert all(torch.equal(a[n], deeper[n]) for n in same) and len(same) > 8
    assert not torch.equal(
        a['transformer.wte.weight'], build(seed=2).state_dict()['transformer.wte.weight']
    )
    assert not torch.equal(
        a['transformer.h.0.mlp.c_fc.weight'], a['transformer.h.1.mlp.c_fc.weight']
    )


def test_initial_loss_is_that_of_a_uniform_guess():
    for preset in PRESETS:
        model = build(arch_preset=preset, vocab_size=1000)
        idx, targets = torch.randint(1000, (2, 8, 16))
        assert abs(model(idx, targets).item() - torch.tensor(1000.0).log().item()) < 0.1


def test_dropout_acts_in_training_only():
    model = Model(shape(), dropout=0.5)
    model.init_weights(0)
    idx = torch.randint(61, (1, 16))
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_tied_head_shares_its_weight():
    tied, untied = build(), build(weight_tying=False)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.parameter_counts()['total'] - tied.parameter_counts()['total'] == 61 * 32
    assert (
        tied.parameter_counts()['non_embedding']
        == tied.parameter_counts()['total'] - 61 * 32 - 16 * 32
    )


@pytest.mark.parametrize('preset', PRESETS)
def test_an_empty_model_needs_only_weights(preset):
    """Built on the meta device and filled, it computes what the model built in place does: ties and
    RoPE tables are there.
    """
    model = build(arch_preset=preset)
    empty = Model.on_meta(model.config).allocate('cpu')
    assert (empty.lm_head.weight is empty.transformer.wte.weight) == model.config.weight_tying
    empty.init_weights(0)
    idx = torch.randint(61, (1, 16))
    assert torch.equal(empty(idx), model(idx))
