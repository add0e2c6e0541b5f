"""Proves that a Hugging Face folder is read as transformers reads it, or refused by name: keys that
are missing, doubled or contradictory, files that are left over.
"""

import json
import os
import shutil

import pytest
import torch
from test_weights import VARIANTS

from model import Model
from onetrain import huggingface
from onetrain.config import UserError
from onetrain.model_config import resolve_shape

transformers = pytest.importorskip('transformers')
FAMILIES = (
    'gpt2',
    'llama3-gqa',
    'mistral',
    'qwen3',
    'neox',
    'mixtral',
    'qwen3-moe',
    'gpt-oss',
    'glm4-moe',
)
IDS = torch.randint(97, (1, 24), generator=torch.Generator().manual_seed(1))
ADDED = [
    {'rope_theta': 700.0},
    {'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}},
    {'rope_scaling': None},
    {'rope_scaling': {'type': 'yarn', 'factor': 4.0}},
    {'rope_parameters': {'rope_type': 'default'}},
    {'rope_parameters': {}},
    {
        'rope_parameters': {
            'rope_type': 'linear',
            'type': 'dynamic',
            'factor': 2.0,
            'rope_theta': 700.0,
        }
    },
    {'rope_parameters': {'rope_type': 'linear', 'factor': 0, 'rope_theta': 700.0}},
    {'rope_parameters': {'full_attention': {'rope_type': 'default', 'rope_theta': 700.0}}},
    {'rope_parameters': None, 'rope_theta': 700.0},
    {'rope_parameters': None, 'rotary_emb_base': 700.0},
    {'rotary_pct': 0.75},
    {'partial_rotary_factor': 0.75},
    {'rotary_pct': None},
    {'sliding_window': 3},
    {'use_sliding_window': False, 'sliding_window': 3},
    {'use_sliding_window': True},
    {'is_causal': False},
    {'num_hidden_layers': 1},
    {'num_attention_heads': 1},
    {'head_dim': 4},
    {'num_experts': 3},
    {'num_local_experts': 3},
    {'rms_norm_eps': float('nan')},
    {'tie_word_embeddings': True},
    {'tie_word_embeddings': 'yes'},
    {'hidden_act': 'tanh'},
    {'hidden_size': '32'},
    {'num_hidden_layers': 10**9},
    {'vocab_size': [97]},
    {'layer_types': 5},
]


def variant(family):
    """The name of VARIANTS that stands for a family."""
    return next(
        name
        for name in (family, *VARIANTS)
        if name in VARIANTS and name.replace('_', '-').startswith(family)
    )


def saved(name, folder, seed=0, **options):
    """A reference model with weights that show every difference, saved to `folder`."""
    family, settings = VARIANTS[name]
    torch.manual_seed(seed)
    model = (
        getattr(transformers, 'GPT2LMHeadModel' if family == 'GPT2' else f'{family}ForCausalLM')(
            getattr(transformers, f'{family}Config')(**settings)
        )
        .float()
        .eval()
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.dim() == 1))
    model.save_pretrained(folder, **options)


def theirs(folder):
    transformers.logging.set_verbosity_error()
    with torch.no_grad():
        return (
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            .eval()(IDS)
            .logits
        )


def ours(folder):
    """Our logits, or None where the folder is refused, in one sentence."""
    try:
        shape = resolve_shape(huggingface.read_settings(folder))
        model = Model(shape)
        model.fill(huggingface.read_weights(folder, shape))
    except UserError as error:
        assert '\n' not in str(error)
        return None
    with torch.no_grad():
        return model(IDS)


def agree(folder, what):
    """Whether ours equal theirs; a folder that they do not read either may be read, and one that
    they do may be refused.
    """
    found = ours(folder)
    if found is None:
        return False
    try:
        expected = theirs(folder)
    except Exception:  # they raise whatever comes first
        return False
    difference = (found - expected).abs().max().item() / expected.abs().max().item()
    assert difference < 1e-4, (what, difference)
    return True


@pytest.mark.parametrize('family', FAMILIES)
def test_settings_are_those_of_transformers_or_refused(family, tmp_path):
    """Each key of a config.json left out, and others added beside it."""
    folder = str(tmp_path)
    saved(variant(family), folder)
    path = os.path.join(folder, 'config.json')
    with open(path) as f:
        config = json.load(f)
    assert agree(folder, 'as it is')
    changes = [
        {key: ...}
        for key in config
        if key
        not in (
            'model_type',
            'architectures',
            'transformers_version',
            'dtype',
            'bos_token_id',
            'eos_token_id',
            'pad_token_id',
        )
    ]
    read = 0
    for change in changes + ADDED:
        with open(path, 'w') as f:
            json.dump(
                {key: value for key, value in {**config, **change}.items() if value is not ...}, f
            )
        read += agree(folder, change)
    assert read > len(changes) // 3


def test_files_are_those_that_transformers_reads(tmp_path):
    new, old, folder = (str(tmp_path / name) for name in ('new', 'old', 'both'))
    saved('llama2', old, seed=1, max_shard_size='6KB')
    saved('llama2', new, seed=2, max_shard_size='20KB')
    shutil.copytree(old, folder)
    for name in os.listdir(new):
        shutil.copy(os.path.join(new, name), folder)  # its index, too
    assert agree(new, 'sharded') and agree(folder, 'an older sharding beside it')
    index = os.path.join(folder, 'model.safetensors.index.json')
    with open(index) as f:
        content = json.load(f)
    for wrong in (
        {**content, 'weight_map': dict.fromkeys(content['weight_map'], '../new/model.safetensors')},
        {'weight_map': 5},
        [],
        {**content, 'weight_map': dict.fromkeys(content['weight_map'], 'none.safetensors')},
    ):
        with open(index, 'w') as f:
            json.dump(wrong, f)
        assert ours(folder) is None
    os.remove(index)
    assert ours(folder) is None  # shards that nothing lists
    saved('llama2', folder, seed=3)
    assert agree(folder, 'one file beside the shards')
    (tmp_path / 'both' / 'adapter_config.json').write_text('{}')
    assert ours(folder) is None


@pytest.mark.parametrize('family', ['gpt2', 'llama2', 'neox'])
def test_a_tied_head_is_the_table_or_refused(family, tmp_path):
    folder = str(tmp_path)
    name = 'gpt2-untied-exact-gelu' if family == 'gpt2' else variant(family)
    saved(name, folder)
    path = os.path.join(folder, 'config.json')
    with open(path) as f:
        config = json.load(f)
    with open(path, 'w') as f:
        json.dump({**config, 'tie_word_embeddings': True}, f)
    assert ours(folder) is None
