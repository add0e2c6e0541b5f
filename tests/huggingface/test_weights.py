"""Logits and gradients equal those of transformers for every family, in fp32; weights survive the
way in and out to the last bit.
"""

import json
import os

import pytest
import torch
from conftest import small_gpt2

from model import Model
from onetrain import huggingface
from onetrain.config import UserError
from onetrain.huggingface import weights
from onetrain.model_config import resolve_shape

transformers = pytest.importorskip('transformers')
SIZES = dict(
    num_hidden_layers=2, vocab_size=97, max_position_embeddings=32, bos_token_id=0, eos_token_id=0
)
VARIANTS = {
    'gpt2': (
        'GPT2',
        dict(
            n_layer=2,
            n_head=4,
            n_embd=32,
            n_positions=32,
            vocab_size=97,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    'gpt2-odd-head': (
        'GPT2',
        dict(
            n_layer=2,
            n_head=3,
            n_embd=15,
            n_positions=32,
            vocab_size=97,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    'gpt2-untied-exact-gelu': (
        'GPT2',
        dict(
            n_layer=2,
            n_head=2,
            n_embd=24,
            n_inner=40,
            n_positions=32,
            vocab_size=97,
            tie_word_embeddings=False,
            activation_function='gelu',
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    'llama2': ('Llama', dict(SIZES, num_attention_heads=4, hidden_size=32, intermediate_size=56)),
    'llama2-biases': (
        'Llama',
        dict(
            SIZES,
            num_attention_heads=4,
            hidden_size=32,
            intermediate_size=56,
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    'llama3-gqa': (
        'Llama',
        dict(
            SIZES,
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_size=40,
            intermediate_size=64,
            rope_parameters={'rope_type': 'default', 'rope_theta': 500000.0},
        ),
    ),
    'llama3-tied-mqa-wide-head': (
        'Llama',
        dict(
            SIZES,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=18,
            hidden_size=40,
            intermediate_size=64,
            tie_word_embeddings=True,
            rope_parameters={'rope_type': 'default', 'rope_theta': 500000.0},
        ),
    ),
    'qwen3': (
        'Qwen3',
        dict(
            SIZES,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=14,
            hidden_size=40,
            intermediate_size=64,
        ),
    ),
    'qwen3-large-eps': (
        'Qwen3',
        dict(
            SIZES,
            num_attention_heads=2,
            num_key_value_heads=2,
            hidden_size=24,
            head_dim=12,
            intermediate_size=40,
            rms_norm_eps=0.3,
        ),
    ),
    'gpt2-large-eps': (
        'GPT2',
        dict(
            n_layer=1,
            n_head=2,
            n_embd=24,
            n_positions=32,
            vocab_size=97,
            layer_norm_epsilon=0.3,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    'neox-large-eps': (
        'GPTNeoX',
        dict(
            SIZES, num_attention_heads=2, hidden_size=32, intermediate_size=40, layer_norm_eps=0.3
        ),
    ),
    'qwen3-tied-mha': (
        'Qwen3',
        dict(
            SIZES,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=6,
            hidden_size=24,
            intermediate_size=64,
            tie_word_embeddings=True,
        ),
    ),
    'neox': ('GPTNeoX', dict(SIZES, num_attention_heads=4, hidden_size=64, intermediate_size=96)),
    'neox-sequential-tied': (
        'GPTNeoX',
        dict(
            SIZES,
            num_attention_heads=2,
            hidden_size=32,
            intermediate_size=96,
            tie_word_embeddings=True,
            use_parallel_residual=False,
            rotary_pct=0.5,
        ),
    ),
    'mistral-window': (
        'Mistral',
        dict(
            SIZES,
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_size=32,
            intermediate_size=56,
            sliding_window=5,
        ),
    ),
    'qwen3-some-slide': (
        'Qwen3',
        dict(
            SIZES,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            hidden_size=24,
            intermediate_size=40,
            use_sliding_window=True,
            sliding_window=6,
            layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
        ),
    ),
    'mixtral': (
        'Mixtral',
        dict(
            SIZES,
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_size=32,
            intermediate_size=24,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
    ),
    'mixtral-window-top3': (
        'Mixtral',
        dict(
            SIZES,
            num_attention_heads=2,
            num_key_value_heads=2,
            hidden_size=16,
            intermediate_size=24,
            num_local_experts=6,
            num_experts_per_tok=3,
            sliding_window=7,
            tie_word_embeddings=True,
        ),
    ),
    'qwen3-moe': (
        'Qwen3Moe',
        dict(
            SIZES,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            hidden_size=32,
            intermediate_size=40,
            moe_intermediate_size=16,
            num_experts=6,
            num_experts_per_tok=3,
            norm_topk_prob=True,
        ),
    ),
    'qwen3-moe-dense-first': (
        'Qwen3Moe',
        dict(
            SIZES,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            hidden_size=16,
            intermediate_size=40,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            mlp_only_layers=[0],
        ),
    ),
    'gpt-oss': (
        'GptOss',
        dict(
            SIZES,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            hidden_size=32,
            intermediate_size=24,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=6,
            rope_parameters={
                'rope_type': 'yarn',
                'rope_theta': 150000.0,
                'factor': 4.0,
                'beta_fast': 32.0,
                'beta_slow': 1.0,
                'truncate': False,
                'original_max_position_embeddings': 8,
            },
        ),
    ),
    'gpt-oss-plain-rope': (
        'GptOss',
        dict(
            SIZES,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            hidden_size=16,
            intermediate_size=16,
            num_local_experts=5,
            num_experts_per_tok=4,
            sliding_window=32,
            layer_types=['full_attention'] * 2,
            rope_parameters={'rope_type': 'default', 'rope_theta': 10000.0},
        ),
    ),
    'glm4-moe': (
        'Glm4Moe',
        dict(
            SIZES,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            hidden_size=32,
            intermediate_size=40,
            moe_intermediate_size=16,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            first_k_dense_replace=1,
            use_qk_norm=True,
            rope_parameters={
                'rope_type': 'default',
                'rope_theta': 10000.0,
                'partial_rotary_factor': 0.5,
            },
        ),
    ),
    'glm4-moe-unnormalized': (
        'Glm4Moe',
        dict(
            SIZES,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            hidden_size=16,
            intermediate_size=40,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=2,
            n_group=1,
            topk_group=1,
            norm_topk_prob=False,
            first_k_dense_replace=0,
            rope_parameters={
                'rope_type': 'default',
                'rope_theta': 10000.0,
                'partial_rotary_factor': 1.0,
            },
        ),
    ),
    **{
        f'llama-{scaling["rope_type"]}': (
            'Llama',
            dict(
                SIZES,
                num_attention_heads=2,
                hidden_size=32,
                intermediate_size=56,
                max_position_embeddings=scaling.pop('positions', 32),
                rope_parameters={'rope_theta': 10000.0, **scaling},
            ),
        )
        for scaling in (
            dict(rope_type='linear', factor=4.0),
            dict(rope_type='dynamic', factor=2.0, positions=12),
            dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=20),
            dict(
                rope_type='llama3',
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        )
    },
    'llama-yarn-attention-factor': (
        'Llama',
        dict(
            SIZES,
            num_attention_heads=2,
            hidden_size=32,
            intermediate_size=56,
            rope_parameters={
                'rope_type': 'yarn',
                'rope_theta': 500.0,
                'factor': 8.0,
                'original_max_position_embeddings': 4,
                'attention_factor': 1.3,
                'beta_fast': 16.0,
                'beta_slow': 2.0,
            },
        ),
    ),
}


@pytest.fixture(params=VARIANTS, scope='module')
def pair(request, tmp_path_factory):
    """(reference model, the folder it was saved to)"""
    family, settings = VARIANTS[request.param]
    torch.manual_seed(0)
    reference = (
        getattr(transformers, 'GPT2LMHeadModel' if family == 'GPT2' else f'{family}ForCausalLM')(
            getattr(transformers, f'{family}Config')(**settings)
        )
        .float()
        .eval()
    )
    with torch.no_grad():
        # weights large enough, and norms and biases random, so that each one matters
        for p in reference.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() > 1 else 0.3))
        for name, buffer in reference.named_buffers():
            if name.endswith('e_score_correction_bias'):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    folder = str(tmp_path_factory.mktemp(request.param))
    reference.save_pretrained(folder)
    return reference, folder


def load(folder, backend='sdpa'):
    settings = huggingface.read_settings(folder)
    if settings['rope_scaling'] == 'dynamic':
        settings['block_size'] = 32  # beyond what it was trained on
    config = resolve_shape(settings)
    model = Model(config, backend)
    model.fill(huggingface.read_weights(folder, config))
    return model


@pytest.mark.parametrize('backend', ['sdpa', 'manual'])
def test_logits_and_gradients(pair, backend):
    reference, folder = pair
    model = load(folder, backend)
    idx = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(1))
    logits = reference(idx).logits
    assert (model(idx) - logits).abs().max() <= 1e-5 and logits.abs().max() > 0.3
    reference.zero_grad()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).backward()
    targets = torch.cat([idx[:, 1:], torch.full((2, 1), -1)], dim=1)
    model(idx, targets).backward()
    gradients = dict(model.named_parameters())
    theirs = dict(reference.named_parameters())
    compared = 0
    for name, sources, form in huggingface.name_map(
        huggingface.architecture_of(model.config), model.config
    ):
        if form == 'experts':  # fused in memory: (E, 2 * width, in) and (E, out, width)
            prefix = sources[0].split('.experts.')[0].replace('block_sparse_moe', 'mlp')
            expected = theirs[
                f'{prefix}.experts.{"gate_up_proj" if ".c_fc." in name else "down_proj"}'
            ].grad
        elif not all(s.replace('block_sparse_moe', 'mlp') in theirs for s in sources):
            continue
        else:
            expected = weights._join(
                [theirs[s.replace('block_sparse_moe', 'mlp')].grad for s in sources],
                form,
                model.config,
            )
        assert torch.allclose(gradients[name].grad, expected, atol=1e-5), name
        compared += 1
    assert compared >= 0.9 * len(gradients)


def test_round_trip_is_bitwise(pair, tmp_path):
    reference, folder = pair
    model = load(folder)
    huggingface.write_model(str(tmp_path), model.config, model.tensors(), eot_id=0)
    again = type(reference).from_pretrained(str(tmp_path), dtype=torch.float32)
    states = reference.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    ours = load(str(tmp_path)).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.state_dict().items())
    assert load(str(tmp_path)).config == model.config


def test_gpt2_without_biases_is_written_with_zeros(tmp_path):
    model = Model(
        resolve_shape(
            dict(arch_preset='gpt2', n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50)
        )
    )
    model.init_weights(0)
    huggingface.write_model(str(tmp_path), model.config, model.state_dict(), eot_id=0)
    reference = transformers.GPT2LMHeadModel.from_pretrained(
        str(tmp_path), dtype=torch.float32
    ).eval()
    idx = torch.randint(50, (1, 8))
    assert (reference(idx).logits - model(idx)).abs().max() <= 1e-5


def test_shorter_block_keeps_the_first_positions(tmp_path):
    model = small_gpt2(block_size=8, vocab_size=50)
    huggingface.write_model(str(tmp_path), model.config, model.state_dict())
    short = resolve_shape({**huggingface.read_settings(str(tmp_path)), 'block_size': 4})
    assert torch.equal(
        dict(huggingface.read_weights(str(tmp_path), short))['transformer.wpe.weight'],
        model.transformer.wpe.weight[:4],
    )


def test_what_cannot_be_computed_is_refused(pair, tmp_path):
    _, folder = pair
    with open(os.path.join(folder, 'config.json')) as f:
        config = json.load(f)

    def settings(**changes):
        (tmp_path / 'config.json').write_text(json.dumps({**config, **changes}))
        return huggingface.read_settings(str(tmp_path))

    with pytest.raises(UserError, match="model_type 'mamba' is not one of"):
        settings(model_type='mamba')
    with pytest.raises(UserError, match='its weights are quantized'):
        settings(quantization_config={'quant_method': 'mxfp4'})
    with pytest.raises(UserError, match='activation'):
        settings(activation_function='swish7', hidden_act='swish7')
    if config['model_type'] != 'gpt2':
        with pytest.raises(UserError, match="RoPE scaling 'longrope' is not supported"):
            settings(rope_parameters={'rope_type': 'longrope', 'factor': 4})
        with pytest.raises(UserError, match="RoPE scaling 'yarn' with mscale is not supported"):
            settings(rope_parameters={'rope_type': 'yarn', 'factor': 4, 'mscale': 1.0})
    post = resolve_shape(
        dict(
            arch_preset='llama', n_layer=1, n_head=2, n_embd=16, block_size=8, norm_position='post'
        )
    )
    with pytest.raises(UserError, match="in the way are norm_position='post'"):
        huggingface.write_model(str(tmp_path), post, {})


def test_damaged_folders_are_named(pair, tmp_path):
    _, folder = pair
    config = resolve_shape(huggingface.read_settings(folder))
    with open(os.path.join(folder, 'model.safetensors'), 'rb') as f:
        (tmp_path / 'model.safetensors').write_bytes(f.read()[:-100])
    with pytest.raises(UserError, match='model.safetensors is damaged'):
        huggingface.read_weights(str(tmp_path), config)
    with pytest.raises(UserError, match='config.json is missing'):
        huggingface.read_settings(str(tmp_path))
    (tmp_path / 'config.json').write_text('{"model_type": "llama"')
    with pytest.raises(UserError, match='is not the config.json of a model'):
        huggingface.read_settings(str(tmp_path))


def test_missing_and_left_over_weights_are_named(pair, tmp_path):
    from safetensors.torch import load_file, save_file

    _, folder = pair
    tensors = load_file(os.path.join(folder, 'model.safetensors'))
    config = resolve_shape(huggingface.read_settings(folder))
    name = next(n for n in tensors if 'norm' in n or 'ln_' in n)
    save_file(
        {**{n: t for n, t in tensors.items() if n != name}, 'extra.weight': torch.zeros(1)},
        str(tmp_path / 'model.safetensors'),
    )
    with pytest.raises(UserError, match='missing .*left over .*extra.weight'):
        huggingface.read_weights(str(tmp_path), config)


def test_gpt2_is_found_in_the_hubs_cache(tmp_path, monkeypatch, dataset):
    """init_from=gpt2 goes through huggingface_hub; here its cache holds a small model under that
    name.
    """
    snapshot = tmp_path / 'hub' / 'models--gpt2' / 'snapshots' / 'abc'
    snapshot.mkdir(parents=True)
    (tmp_path / 'hub' / 'models--gpt2' / 'refs').mkdir()
    (tmp_path / 'hub' / 'models--gpt2' / 'refs' / 'main').write_text('abc')
    model = small_gpt2(block_size=64, vocab_size=80)
    huggingface.write_model(str(snapshot), model.config, model.state_dict())
    from conftest import run_process

    env = {'HF_HUB_CACHE': str(tmp_path / 'hub'), 'HF_HUB_OFFLINE': '1'}
    common = (
        '--device=cpu',
        '--compile=False',
        '--eval_iters=2',
        '--batch_size=2',
        '--gradient_accumulation_steps=1',
        f'--dataset={dataset}',
    )
    code, output = run_process(
        'train.py',
        '--init_from=gpt2',
        f'--out_dir={tmp_path}/out',
        '--max_iters=2',
        '--block_size=32',
        *common,
        env=env,
    )
    assert code == 0 and 'Architecture: 1L-2H-16D-64ff' in output and 'iter 2/2:' in output, output
    code, output = run_process(
        'train.py', '--init_from=gpt2-xl', f'--out_dir={tmp_path}/out2', *common, env=env
    )
    assert code == 2 and 'could not be fetched' in output, output


def test_a_second_copy_of_the_weights_is_passed_over(pair, tmp_path):
    import shutil

    _, folder = pair
    shutil.copytree(folder, tmp_path / 'both')
    from safetensors.torch import save_file

    save_file(
        {'layers.0.attention.wq.weight': torch.zeros(2, 2)},
        str(tmp_path / 'both' / 'consolidated.safetensors'),
    )
    assert load(str(tmp_path / 'both')).config == load(folder).config


@pytest.mark.parametrize('kind', ['Llama', 'GPTNeoX'])
def test_upcycled_experts_begin_as_the_dense_model(tmp_path, dataset, train, kind):
    """Each expert is a copy and gates add up to 1, so the first loss is the dense model's."""
    from conftest import records

    reference = getattr(transformers, f'{kind}ForCausalLM')(
        getattr(transformers, f'{kind}Config')(
            **SIZES, num_attention_heads=2, hidden_size=32, intermediate_size=48
        )
    )
    reference.save_pretrained(tmp_path / 'dense')
    found = {}
    for name, *args in (
        ('dense',),
        (
            'routed',
            '--upcycle=True',
            '--num_experts=4',
            '--num_experts_per_tok=2',
            '--n_dense_layers=1',
        ),
    ):
        shape = (
            '--n_layer=2',
            '--n_head=2',
            '--n_embd=32',
            '--block_size=16',
            f'--init_from={tmp_path}/dense',
            '--eval_interval=1',
            '--max_iters=1',
        )
        import train as trainer

        assert (
            trainer.main(
                [
                    f'--dataset={dataset}',
                    f'--out_dir={tmp_path}/out-{name}',
                    '--device=cpu',
                    '--compile=False',
                    '--batch_size=4',
                    '--gradient_accumulation_steps=1',
                    '--eval_iters=2',
                    *shape,
                    *args,
                ]
            )
            == 0
        )
        found[name] = records(tmp_path / f'out-{name}', 'eval')[0]['val_loss']
    torch.use_deterministic_algorithms(False)
    assert found['routed'] == pytest.approx(found['dense'], abs=1e-6)
    config = records(tmp_path / 'out-routed', 'header')[0]['config']
    assert (config['num_experts'], config['n_dense_layers'], config['expert_d_ff']) == (4, 1, 48)


@pytest.mark.parametrize(
    'args, message',
    [
        (['--upcycle=True'], 'upcycle=True needs --num_experts'),
        (['--num_experts=4'], 'has num_experts=0: leave --num_experts out'),
        (
            ['--upcycle=True', '--num_experts=4', '--num_shared_experts=1'],
            'num_shared_experts must be 0, not 1',
        ),
        (['--upcycle=True', '--num_experts=4', '--num_experts_per_tok=5'], 'at most num_experts=4'),
        (['--block_size=64'], 'beyond the 32 positions of .* or give a --rope_scaling'),
    ],
)
def test_contradictions_with_the_folder_are_told(tmp_path, dataset, capsys, args, message):
    import train as trainer

    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES, num_attention_heads=2, hidden_size=32, intermediate_size=48
        )
    ).save_pretrained(tmp_path)
    assert (
        trainer.main(
            [
                f'--dataset={dataset}',
                f'--out_dir={tmp_path}/out',
                f'--init_from={tmp_path}',
                '--device=cpu',
                *args,
            ]
        )
        == 2
    )
    import re

    assert re.search(message, capsys.readouterr().err)


def test_a_longer_context_than_the_folder_has(tmp_path, dataset):
    """With a scaling, block_size may go beyond; the frequencies are transformers' for that
    scaling.
    """
    from conftest import records

    import train as trainer

    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES, num_attention_heads=2, hidden_size=32, intermediate_size=48
        )
    ).save_pretrained(tmp_path)
    assert (
        trainer.main(
            [
                f'--dataset={dataset}',
                f'--out_dir={tmp_path}/out',
                f'--init_from={tmp_path}',
                '--device=cpu',
                '--compile=False',
                '--block_size=64',
                '--rope_scaling=yarn',
                '--rope_factor=2',
                '--batch_size=2',
                '--gradient_accumulation_steps=1',
                '--eval_iters=1',
                '--max_iters=2',
                '--eval_interval=2',
                '--n_layer=2',
                '--n_head=2',
                '--n_embd=32',
            ]
        )
        == 0
    )
    torch.use_deterministic_algorithms(False)
    config = records(tmp_path / 'out', 'header')[0]['config']
    assert (
        config['block_size'],
        config['rope_original_block_size'],
        config['rope_scaling'],
        config['rope_factor'],
    ) == (64, 32, 'yarn', 2.0)
