"""Hugging Face weights in and out: GPT-2, LLaMA-2/3, Mistral, Qwen3, GPT-NeoX, and the mixtures of
experts Mixtral, Qwen3-MoE, gpt-oss, GLM-4-MoE.

read() gives the model's settings and its state dict under the names of model.py; write() is the way
back, so that transformers' from_pretrained() opens the folder. Only safetensors files are read.
"""

import dataclasses
import json
import os
import re

import torch

from engine import rope
from engine.configurator import ConfigError
from engine.files import check_regular, is_whole, parse_json, plain_name, replacing, sentence
from presets import ROUTING, ModelConfig

_ACTIVATIONS = {
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu': 'gelu',
    'silu': 'silu',
    'relu': 'relu',
}
# what transformers takes where a config.json is silent
_DEFAULT_THETA = {
    'llama': 10000.0,
    'mistral': 10000.0,
    'qwen3': 10000.0,
    'gpt_neox': 10000.0,
    'mixtral': 1000000.0,
    'qwen3_moe': 10000.0,
    'gpt_oss': 150000.0,
    'glm4_moe': 10000.0,
}
_DEFAULT_EPS = {'mixtral': 1e-5, 'gpt_oss': 1e-5, 'glm4_moe': 1e-5}  # of RMSNorm, others 1e-6
_DEFAULT_WINDOW = {'mistral': 4096, 'gpt_oss': 128}
_GPT2_NAMES = {
    'hidden_size': 'n_embd',
    'max_position_embeddings': 'n_positions',
    'num_attention_heads': 'n_head',
    'num_hidden_layers': 'n_layer',
}
KINDS = ('gpt2', *_DEFAULT_THETA)
_CLASSES = {
    'gpt2': 'GPT2',
    'llama': 'Llama',
    'mistral': 'Mistral',
    'qwen3': 'Qwen3',
    'gpt_neox': 'GPTNeoX',
    'mixtral': 'Mixtral',
    'qwen3_moe': 'Qwen3Moe',
    'gpt_oss': 'GptOss',
    'glm4_moe': 'Glm4Moe',
}
FREE = (
    'rope_theta',
    'rope_scaling',
    'rope_factor',
    'rope_original_block_size',
    'rope_attention_factor',
    'rope_beta_fast',
    'rope_beta_slow',
    'rope_truncate',
    # keys of the shape, beside block_size, that need no other weights
    'rope_low_freq_factor',
    'rope_high_freq_factor',
    'sliding_window',
    'window_pattern',
)


def is_source(init_from):
    """Whether `init_from` names Hugging Face weights: a folder with a config.json, or a hub id such
    as gpt2 or org/model.
    """
    return os.path.isfile(os.path.join(init_from, 'config.json')) or bool(
        re.fullmatch(r'gpt2(-\w+)?|[\w.-]+/[\w.-]+', init_from)
    )


def fetch(source):
    """The local folder of `source`: itself, or a snapshot of the hub's repository. Raises
    ConfigError when it cannot be had.
    """
    if os.path.isdir(source):
        return source
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f'init_from={source!r} needs the package huggingface_hub: pip install huggingface_hub,'
            ' or give a local folder'
        ) from None
    try:
        return snapshot_download(
            source,
            allow_patterns=['*.safetensors', '*.json', 'tokenizer*', '*.txt'],
            ignore_patterns=['consolidated*', 'original/*', 'metal/*'],
        )
    except Exception as error:  # the hub's own errors, and any of the network's
        raise ConfigError(
            f'init_from={source!r} is no local folder and could not be fetched from the hub '
            f'({type(error).__name__}): give a folder with config.json and safetensors files'
        ) from None


def read_settings(folder):
    """The trainer's model keys for the config.json in `folder`. Raises ConfigError for what
    model.py cannot compute.
    """
    path = os.path.join(folder, 'config.json')
    check_regular(path)
    try:
        with open(path, 'rb') as f:
            hf = parse_json(f.read())
        if not isinstance(hf, dict):
            raise ValueError('it holds no object')
        return settings_of(hf, folder)
    except FileNotFoundError:
        raise ConfigError(
            f'{path} is missing: give a folder with config.json and safetensors files'
        ) from None
    except OSError as error:
        raise ConfigError(f'{path} cannot be read ({error.strerror})') from None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        IndexError,
        StopIteration,
    ) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f'{path} is not the config.json of a model: {type(error).__name__} {error}'
        ) from None


def settings_of(hf, folder):
    """The same for the dict `hf` of a config.json; `folder` names it in errors."""
    return {
        'rope_scaling': 'none',
        'sliding_window': 0,
        'window_pattern': 'S',
        'attention_sinks': False,
        'num_experts': 0,
        **_settings_of(hf, folder),
    }


def _settings_of(hf, folder):
    kind = hf.get('model_type')

    def refuse(what):
        raise ConfigError(f'{folder}: {what}')

    if hf.get('quantization_config'):
        refuse(
            'its weights are quantised, which are not read: load it with transformers, dequantise'
            ' it and save_pretrained() it'
        )
    if hf.get('is_causal', True) is not True:
        refuse('is_causal is not true, and only causal models are read')
    for key in ('transformers_weights', 'configuration_files', 'per_layer_config'):
        if hf.get(key):
            refuse(f'{key} names other files or other settings, which are not read: leave it out')
    if kind == 'gpt2':
        for alias, name in _GPT2_NAMES.items():
            if alias in hf and hf[alias] != hf[name]:
                refuse(f'{alias}={hf[alias]} and {name}={hf[name]} contradict each other: keep one')
        if hf.get('scale_attn_by_inverse_layer_idx') or not hf.get('scale_attn_weights', True):
            refuse('GPT-2 with another scaling of attention is not supported')
        return dict(
            arch_preset='gpt2',
            n_layer=hf['n_layer'],
            n_head=hf['n_head'],
            n_embd=hf['n_embd'],
            d_ff=hf.get('n_inner') or 4 * hf['n_embd'],
            head_dim=hf['n_embd'] // hf['n_head'],
            num_key_value_heads=hf['n_head'],
            block_size=hf['n_positions'],
            vocab_size=hf['vocab_size'],
            bias=True,
            normalization='layernorm',
            rotary_pct=1.0,
            norm_eps=hf.get('layer_norm_epsilon', 1e-5),
            norm_position='pre',
            activation=_activation(hf.get('activation_function', 'gelu_new'), refuse),
            ffn_type='standard',
            position_encoding='learned_absolute',
            rope_theta=10000.0,
            qk_norm=False,
            parallel_residual=False,
            weight_tying=hf.get('tie_word_embeddings', True),
        )
    if kind not in _DEFAULT_THETA:
        refuse(f'model_type {kind!r} is not one of {", ".join(KINDS)}')
    if not is_whole(hf['num_hidden_layers'], 1, 10**4):
        refuse(
            f'num_hidden_layers={hf["num_hidden_layers"]!r}, expected a whole number from 1 to'
            ' 10,000'
        )
    rope_settings, theta, rotary_pct = _rope_of(kind, hf, refuse)
    shape = dict(
        n_layer=hf['num_hidden_layers'],
        n_head=hf['num_attention_heads'],
        n_embd=hf['hidden_size'],
        d_ff=hf['intermediate_size'],
        block_size=hf['max_position_embeddings'],
        vocab_size=hf['vocab_size'],
        norm_position='pre',
        position_encoding='rope',
        rope_theta=float(theta),
        activation=_activation(
            hf.get('hidden_act', 'gelu' if kind == 'gpt_neox' else 'silu'), refuse
        ),
        weight_tying=hf.get('tie_word_embeddings', False),
        **_scaling_of(hf, rope_settings, refuse),
    )
    if kind == 'gpt_neox':
        if (
            hf.get('head_dim', shape['n_embd'] // shape['n_head'])
            != shape['n_embd'] // shape['n_head']
        ):
            refuse(
                f'head_dim={hf["head_dim"]} is not hidden_size / num_attention_heads: leave it out'
            )
        if not hf.get('attention_bias', True):
            refuse('GPT-NeoX without biases in attention is not supported')
        return dict(
            shape,
            arch_preset='neox',
            num_key_value_heads=shape['n_head'],
            head_dim=shape['n_embd'] // shape['n_head'],
            bias=True,
            normalization='layernorm',
            norm_eps=hf.get('layer_norm_eps', 1e-5),
            ffn_type='standard',
            rotary_pct=rotary_pct,
            qk_norm=False,
            parallel_residual=hf.get('use_parallel_residual', True),
        )
    shape.update(
        num_key_value_heads=hf.get('num_key_value_heads') or shape['n_head'],
        head_dim=hf.get('head_dim') or shape['n_embd'] // shape['n_head'],
        bias=bool(hf.get('attention_bias', kind == 'gpt_oss')),
        normalization='rmsnorm',
        norm_eps=hf.get('rms_norm_eps', _DEFAULT_EPS.get(kind, 1e-6)),
        ffn_type='swiglu',
        rotary_pct=1.0,
        qk_norm=kind in ('qwen3', 'qwen3_moe'),
        parallel_residual=False,
    )
    if shape['bias'] != bool(hf.get('mlp_bias', kind == 'gpt_oss')):
        refuse('biases in only one of attention and MLP are not supported')
    slides = hf.get('sliding_window', _DEFAULT_WINDOW.get(kind))
    if kind in ('qwen3', 'qwen3_moe'):  # the key that others ignore
        if hf.get('use_sliding_window') and 'sliding_window' not in hf:
            refuse('use_sliding_window is true, and no sliding_window is stated: state it')
        slides = hf.get('use_sliding_window', False) and slides
    if kind in ('llama', 'glm4_moe') and (
        slides or 'sliding_attention' in (hf.get('layer_types') or ())
    ):
        refuse(f'{kind} has no sliding window: leave sliding_window out')
    if slides:
        types = hf.get('layer_types') or [
            'sliding_attention' if kind != 'gpt_oss' or i % 2 == 0 else 'full_attention'
            for i in range(shape['n_layer'])
        ]
        if kind in ('qwen3', 'qwen3_moe') and not hf.get('layer_types'):
            refuse('a sliding window without layer_types is not supported')
        pattern = ''.join({'sliding_attention': 'S', 'full_attention': 'L'}[t] for t in types)
        shape.update(
            sliding_window=slides,
            window_pattern=next(
                pattern[:n]
                for n in range(1, len(pattern) + 1)
                if (pattern[:n] * len(pattern))[: len(pattern)] == pattern
            ),
        )
    if kind in ('mistral', 'llama', 'qwen3'):
        return dict(
            shape,
            arch_preset='qwen3' if kind == 'qwen3' else 'llama3' if theta != 10000.0 else 'llama',
        )
    # mixtures of experts
    shape.update(
        num_experts_per_tok=hf['num_experts_per_tok'],
        expert_d_ff=hf.get('moe_intermediate_size') or hf['intermediate_size'],
        num_shared_experts=0,
        n_dense_layers=0,
        score_function='softmax',
        n_groups=1,
        topk_groups=1,
        norm_topk_prob=True,
        route_scale=1.0,
        num_experts=_one_of(hf, ('num_local_experts', 'num_experts', 'n_routed_experts'), refuse),
    )
    if kind == 'mixtral':
        return dict(shape, arch_preset='mixtral')
    if kind == 'gpt_oss':
        if hf.get('swiglu_limit', 7.0) != 7.0 or hf.get('swiglu_alpha', 1.702) != 1.702:
            refuse('gpt-oss with another swiglu_limit or swiglu_alpha is not supported')
        return dict(shape, arch_preset='gpt_oss', ffn_type='swiglu_clamped', attention_sinks=True)
    if kind == 'qwen3_moe':
        dense = sorted(
            {
                *(hf.get('mlp_only_layers') or ()),
                *(i for i in range(shape['n_layer']) if (i + 1) % hf.get('decoder_sparse_step', 1)),
            }
        )
        if dense != [*range(len(dense))]:
            refuse(f'the layers {dense} are dense; supported is dense at the beginning only')
        return dict(
            shape,
            arch_preset='qwen3_moe',
            n_dense_layers=len(dense),
            norm_topk_prob=bool(hf.get('norm_topk_prob', False)),
        )
    return dict(
        shape,
        arch_preset='moe',
        score_function='sigmoid',
        num_shared_experts=hf.get('n_shared_experts') or 0,
        n_dense_layers=hf.get('first_k_dense_replace', 1),
        n_groups=hf.get('n_group') or 1,
        topk_groups=hf.get('topk_group') or 1,
        norm_topk_prob=bool(hf.get('norm_topk_prob', True)),
        route_scale=float(hf.get('routed_scaling_factor', 1.0)),
        qk_norm=bool(hf.get('use_qk_norm', False)),
        rotary_pct=rotary_pct,
    )


def _one_of(hf, keys, refuse, *more):
    """The value that some of `keys` of the dict hf, or `more` values, state; refused where they
    contradict each other, or where there is none.
    """
    stated = {key: hf[key] for key in keys if hf.get(key) is not None}
    values = [*stated.values(), *(value for value in more if value is not None)]
    if not values or any(value != values[0] for value in values):
        refuse(f'{" and ".join(keys)} state {values or "nothing"}: state one value, once')
    return values[0]


def _rope_of(kind, hf, refuse):
    """(settings of RoPE's scaling, theta, share of each head that turns). Older files have
    rope_theta and rope_scaling, newer ones rope_parameters; where both are there they must not
    contradict each other.
    """
    new, old = hf.get('rope_parameters') or {}, hf.get('rope_scaling') or {}
    for settings in (new, old):
        if not isinstance(settings, dict) or any(
            isinstance(value, dict) for value in settings.values()
        ):
            refuse(
                'rope_parameters or rope_scaling is not one set of numbers: RoPE that differs'
                ' between layers is not supported'
            )
        if 'type' in settings and settings.get('rope_type', settings['type']) != settings['type']:
            refuse(
                f'rope_type={settings["rope_type"]!r} and type={settings["type"]!r} contradict each'
                ' other: keep one'
            )
    free = ('rope_theta', 'partial_rotary_factor', 'type', 'rope_type')
    kinds = [settings.get('rope_type', settings.get('type', 'default')) for settings in (new, old)]
    if (
        new
        and old
        and (
            kinds[0] != kinds[1]
            or any(new[key] != old[key] for key in {*new} & {*old} - {*free})
            or {*new} - {*free} != {*old} - {*free}
        )
    ):
        refuse('rope_parameters and rope_scaling contradict each other: keep one')
    settings = {**old, **new}
    if kind == 'gpt_neox' and not settings and 'rope_theta' in hf and 'rotary_emb_base' not in hf:
        refuse('rope_theta alone is not read for gpt_neox: state rotary_emb_base')
    if kind == 'gpt_oss' and not settings:
        refuse('it states no rope_parameters: state them')
    if 'rotary_emb_base' in hf and kind != 'gpt_neox' or 'rotary_pct' in hf and kind != 'gpt_neox':
        refuse(
            f'rotary_emb_base and rotary_pct are keys of gpt_neox, not of {kind}: leave them out'
        )
    stated = [
        hf.get('rope_theta'),
        new.get('rope_theta'),
        old.get('rope_theta'),
        hf.get('rotary_emb_base'),
    ]
    theta = (
        float(_one_of({}, ('rope_theta',), refuse, *stated))
        if any(value is not None for value in stated)
        else _DEFAULT_THETA[kind]
    )
    shares = [
        hf.get('rotary_pct'),
        hf.get('partial_rotary_factor'),
        new.get('partial_rotary_factor'),
        old.get('partial_rotary_factor'),
    ]
    default = {'gpt_neox': 0.25, 'glm4_moe': 0.5}.get(kind, 1.0)
    if any(
        key in place and place[key] is None
        for place in (hf, new, old)
        for key in ('rotary_pct', 'partial_rotary_factor')
    ):
        refuse('partial_rotary_factor or rotary_pct is null: state a number, or leave it out')
    share = (
        float(_one_of({}, ('rotary_pct', 'partial_rotary_factor'), refuse, *shares))
        if any(value is not None for value in shares)
        else default
    )
    if (
        kind == 'gpt_neox'
        and 'partial_rotary_factor' in hf
        and 'rotary_pct' not in hf
        and 'partial_rotary_factor' not in settings
    ):
        refuse('partial_rotary_factor is not read for gpt_neox: state rotary_pct')
    if default == 1.0 and share != 1.0:
        refuse(f'{kind} turns whole heads, not a share of {share}: leave partial_rotary_factor out')
    return settings, theta, share


def _scaling_of(hf, settings, refuse):
    """Our keys for the rope_parameters (or rope_scaling) of a config.json."""
    kind = settings.get('rope_type', settings.get('type', 'default'))
    if kind == 'default':
        return dict(rope_scaling='none')
    if (
        kind not in rope.SCALINGS
        or kind == 'yarn'
        and (settings.get('mscale') or settings.get('mscale_all_dim'))
    ):
        refuse(
            f'RoPE scaling {kind!r}{" with mscale" if settings.get("mscale") else ""} is not'
            f' supported: {", ".join(rope.SCALINGS)} are'
        )
    originals = [
        settings.get('original_max_position_embeddings'),
        hf.get('original_max_position_embeddings'),
    ]
    original = (
        _one_of({}, ('original_max_position_embeddings',), refuse, *originals)
        if any(originals)
        else hf['max_position_embeddings']
    )
    if (
        not isinstance(settings.get('factor'), (int, float))
        or isinstance(settings['factor'], bool)
        or not settings['factor'] >= 1
    ):
        refuse(
            f"the factor of RoPE's scaling is {settings.get('factor')!r}, expected a number of at"
            ' least 1'
        )
    if kind == 'dynamic' and any(originals) and original != hf['max_position_embeddings']:
        refuse(
            'dynamic RoPE starts from max_position_embeddings: leave'
            ' original_max_position_embeddings out'
        )
    ours = dict(
        rope_scaling=kind, rope_factor=float(settings['factor']), rope_original_block_size=original
    )
    if kind == 'yarn':
        if settings.get('attention_factor') is not None and not settings['attention_factor'] > 0:
            refuse(f'attention_factor={settings["attention_factor"]} must be above 0')
        ours.update(
            rope_beta_fast=float(settings.get('beta_fast') or 32),
            rope_beta_slow=float(settings.get('beta_slow') or 1),
            rope_truncate=bool(settings.get('truncate', True)),
            rope_attention_factor=settings.get('attention_factor'),
        )
    if kind == 'llama3':
        ours.update(
            rope_low_freq_factor=float(settings['low_freq_factor']),
            rope_high_freq_factor=float(settings['high_freq_factor']),
        )
    return ours


def _activation(name, refuse):
    if name not in _ACTIVATIONS:
        refuse(f'activation {name!r} is not one of {", ".join(_ACTIVATIONS)}')
    return _ACTIVATIONS[name]


def find(c, given, shape_keys):
    """(config with the shape of the Hugging Face model that c.init_from names, its local folder).
    Raises ConfigError for what contradicts it.
    """
    if not is_source(c.init_from):
        raise ConfigError(
            f"init_from={c.init_from!r} is not 'scratch', 'resume', 'gpt2...', a Hugging Face"
            ' folder (with config.json) or a hub id (org/name)'
        )
    folder = fetch(c.init_from)
    settings = read_settings(folder)
    if given.get('arch_preset') and {c.arch_preset, settings['arch_preset']} not in (
        {settings['arch_preset']},
        {'llama', 'llama3'},
    ):
        raise ConfigError(
            f'{given["arch_preset"]}: arch_preset={c.arch_preset!r}, but {c.init_from} is'
            f' {settings["arch_preset"]!r}: leave --arch_preset out'
        )
    longer = c.rope_scaling not in (None, 'none') or settings.get('rope_scaling') == 'dynamic'
    if c.block_size > settings['block_size'] and given.get('block_size') and not longer:
        raise ConfigError(
            f'block_size={c.block_size} is beyond the {settings["block_size"]} positions of'
            f' {c.init_from}: type --block_size={settings["block_size"]} or less'
            + (
                ', or give a --rope_scaling, such as yarn, and its --rope_factor'
                if settings['position_encoding'] == 'rope'
                else ''
            )
        )
    if c.rope_scaling not in (None, 'none') and settings.get('rope_scaling', 'none') == 'none':
        settings['rope_original_block_size'] = settings['block_size']
    settings['block_size'] = c.block_size if longer else min(c.block_size, settings['block_size'])
    settings.update(
        {key: getattr(c, key) for key in FREE if given.get(key) and getattr(c, key) is not None}
    )
    if c.upcycle:
        settings.update(_upcycling(c, given, settings))
    for key in set(shape_keys) - {'arch_preset', 'block_size'}:
        if (
            given.get(key)
            and getattr(c, key) is not None
            and key in settings
            and getattr(c, key) != settings[key]
        ):
            raise ConfigError(
                f'{given[key]}: {key}={getattr(c, key)!r}, but {c.init_from} has'
                f' {key}={settings[key]!r}: leave --{key} out'
            )
    return dataclasses.replace(c, **settings), folder


def _upcycling(c, given, settings):
    """The keys of a mixture of experts that begins as the dense model of `settings` (Komatsuzaki et
    al., "Sparse Upcycling", 2023).
    """
    if settings.get('num_experts'):
        raise ConfigError(
            f'upcycle=True, but {c.init_from} is a mixture of experts already: leave --upcycle out'
        )
    if not c.num_experts:
        raise ConfigError('upcycle=True needs --num_experts, such as --num_experts=8')
    for key, value in (
        ('num_shared_experts', 0),
        ('expert_d_ff', settings['d_ff']),
        ('norm_topk_prob', True),
        ('route_scale', 1.0),
    ):
        if given.get(key) and getattr(c, key) not in (None, value):
            raise ConfigError(
                'upcycle=True makes each expert a copy of the dense layer, so that gates must add'
                f' up to 1: {key} must be {value}, not {getattr(c, key)}; leave --{key} out'
            )
    asked = {
        key: getattr(c, key) for key in ROUTING if given.get(key) and getattr(c, key) is not None
    }
    return {
        **asked,
        'num_shared_experts': 0,
        'expert_d_ff': settings['d_ff'],
        'norm_topk_prob': True,
        'route_scale': 1.0,
    }


def upcycled(folder, config):
    """(name, tensor) for each parameter but the routers of a mixture of experts Model(config):
    weights() of the dense model in `folder`, each expert a copy.
    """
    dense = dataclasses.replace(config, num_experts=0)
    for name, tensor in weights(folder, dense):
        routed = re.match(r'transformer\.h\.(\d+)\.mlp\.', name)
        yield (
            name,
            (
                tensor.expand(config.num_experts, *tensor.shape)
                if routed and int(routed[1]) in config.expert_layers
                else tensor
            ),
        )


def family(config):
    """The Hugging Face architecture (one of KINDS) that computes what `config` does.

    Raises ConfigError, naming the switches in the way, where there is none.
    """
    have = dataclasses.asdict(config)
    have['windows'] = (
        'none' if not config.sliding_window else 'all' if None not in config.windows else 'some'
    )
    have['shared'], have['groups'] = (
        config.num_shared_experts > 0,
        config.topk_groups < config.n_groups,
    )
    common = dict(norm_position='pre', attention_sinks=False, num_experts=0, windows='none')
    llama = dict(
        common,
        normalization='rmsnorm',
        ffn_type='swiglu',
        position_encoding='rope',
        rotary_pct=1.0,
        parallel_residual=False,
        bias=False,
        qk_norm=False,
    )
    routed = {key: value for key, value in llama.items() if key != 'num_experts'}
    softmax = dict(routed, score_function='softmax', shared=False, groups=False, route_scale=1.0)
    wanted = {
        'gpt2': dict(
            common,
            normalization='layernorm',
            ffn_type='standard',
            position_encoding='learned_absolute',
            qk_norm=False,
            parallel_residual=False,
            num_key_value_heads=config.n_head,
            head_dim=config.n_embd // config.n_head,
        ),
        'llama': {key: value for key, value in llama.items() if key != 'bias'},
        'mistral': dict(llama, windows='all'),
        'qwen3': {
            key: value for key, value in dict(llama, qk_norm=True).items() if key != 'windows'
        },
        'gpt_neox': dict(
            common,
            normalization='layernorm',
            ffn_type='standard',
            position_encoding='rope',
            qk_norm=False,
            bias=True,
            num_key_value_heads=config.n_head,
            head_dim=config.n_embd // config.n_head,
        ),
        'mixtral': dict(
            softmax,
            norm_topk_prob=True,
            n_dense_layers=0,
            windows='none' if have['windows'] == 'none' else 'all',
        ),
        'qwen3_moe': dict(softmax, qk_norm=True),
        'gpt_oss': {
            key: value
            for key, value in dict(
                softmax,
                norm_topk_prob=True,
                n_dense_layers=0,
                bias=True,
                ffn_type='swiglu_clamped',
                attention_sinks=True,
            ).items()
            if key != 'windows'
        },
        'glm4_moe': {
            key: value
            for key, value in dict(routed, score_function='sigmoid', shared=True).items()
            if key not in ('rotary_pct', 'qk_norm')
        },
    }
    routes = ('mixtral', 'qwen3_moe', 'gpt_oss', 'glm4_moe')
    names = {'windows': 'window_pattern', 'shared': 'num_shared_experts', 'groups': 'topk_groups'}
    in_the_way = {
        kind: [
            f'{names.get(key, key)}={getattr(config, names.get(key, key))!r}'
            for key, value in switches.items()
            if have[key] != value
            and not (
                kind == 'gpt2'
                and key == 'normalization'
                and config.normalization == 'layernorm_nobias'
            )
        ]
        for kind, switches in wanted.items()
        if (kind in routes) == (config.num_experts > 0)
    }
    kind = min(in_the_way, key=lambda k: len(in_the_way[k]))
    if in_the_way[kind]:
        raise ConfigError(
            f'no Hugging Face architecture computes this model; nearest is {kind}, in the way are'
            f' {", ".join(in_the_way[kind])}'
        )
    if config.activation not in _ACTIVATIONS.values():
        raise ConfigError(
            f'no Hugging Face architecture computes this model: activation={config.activation!r}'
        )
    return kind


def name_map(kind, config):
    """[(our name, [their names], form)]: how theirs make ours, as _join() does and _part()
    undoes.
    """
    biases = ('weight', 'bias') if config.bias else ('weight',)
    norms = (
        ('weight', 'bias')
        if config.normalization == 'layernorm' or kind in ('gpt2', 'gpt_neox')
        else ('weight',)
    )
    rows = []

    def add(ours, theirs, parts, form='rows'):
        for part in parts:
            rows.append(
                (
                    f'{ours}.{part}',
                    [f'{t}.{part}' for t in theirs],
                    'rows' if form == 'transposed' and part == 'bias' else form,
                )
            )

    if kind == 'gpt2':
        # GPT-2 on the hub always has biases; a model without them is written with zeros
        biases = ('weight', 'bias')
        add('transformer.wte', ['transformer.wte'], ('weight',))
        add('transformer.wpe', ['transformer.wpe'], ('weight',))
        for i in range(config.n_layer):
            h = f'transformer.h.{i}'
            for norm in ('ln_1', 'ln_2'):
                add(f'{h}.{norm}', [f'{h}.{norm}'], norms)
            for linear in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'):
                # Conv1D keeps its weight as (in, out)
                add(f'{h}.{linear}', [f'{h}.{linear}'], biases, 'transposed')
        add('transformer.ln_f', ['transformer.ln_f'], norms)
        head = 'lm_head'
    elif kind == 'gpt_neox':
        add('transformer.wte', ['gpt_neox.embed_in'], ('weight',))
        for i in range(config.n_layer):
            h, theirs = f'transformer.h.{i}', f'gpt_neox.layers.{i}'
            for ours, name in (('ln_1', 'input_layernorm'), ('ln_2', 'post_attention_layernorm')):
                add(f'{h}.{ours}', [f'{theirs}.{name}'], norms)
            add(f'{h}.attn.c_attn', [f'{theirs}.attention.query_key_value'], biases, 'by head')
            for ours, name in (
                ('attn.c_proj', 'attention.dense'),
                ('mlp.c_fc', 'mlp.dense_h_to_4h'),
                ('mlp.c_proj', 'mlp.dense_4h_to_h'),
            ):
                add(f'{h}.{ours}', [f'{theirs}.{name}'], biases)
        add('transformer.ln_f', ['gpt_neox.final_layer_norm'], norms)
        head = 'embed_out'
    else:
        add('transformer.wte', ['model.embed_tokens'], ('weight',))
        for i in range(config.n_layer):
            h, theirs = f'transformer.h.{i}', f'model.layers.{i}'
            for ours, name in (('ln_1', 'input_layernorm'), ('ln_2', 'post_attention_layernorm')):
                add(f'{h}.{ours}', [f'{theirs}.{name}'], norms)
            if config.qk_norm:
                for norm in ('q_norm', 'k_norm'):
                    add(f'{h}.attn.{norm}', [f'{theirs}.self_attn.{norm}'], ('weight',))
            if config.attention_sinks:
                rows.append((f'{h}.attn.sinks', [f'{theirs}.self_attn.sinks'], 'rows'))
            add(f'{h}.attn.c_attn', [f'{theirs}.self_attn.{x}_proj' for x in 'qkv'], biases)
            add(f'{h}.attn.c_proj', [f'{theirs}.self_attn.o_proj'], biases)
            if i in config.expert_layers:
                rows += _expert_rows(kind, config, h, theirs)
            else:
                add(f'{h}.mlp.c_fc', [f'{theirs}.mlp.gate_proj', f'{theirs}.mlp.up_proj'], biases)
                add(f'{h}.mlp.c_proj', [f'{theirs}.mlp.down_proj'], biases)
        add('transformer.ln_f', ['model.norm'], norms)
        head = 'lm_head'
    if not config.weight_tying:
        add('lm_head', [head], ('weight',))
    return rows


def tensors_of(folder):
    """{name: opened safetensors file} of all weights in a folder, from the files that transformers
    reads: model.safetensors, else those of its index.

    Raises ConfigError where there are none, and for an index that names other files than are there.
    """
    require_safetensors()
    from safetensors import SafetensorError, safe_open

    if os.path.isfile(os.path.join(folder, 'adapter_config.json')):
        raise ConfigError(
            f'{folder} holds an adapter (adapter_config.json), which is not read: merge it into its'
            ' model and save that'
        )
    whole, index = (
        os.path.join(folder, f'model.safetensors{ending}') for ending in ('', '.index.json')
    )
    wanted = None
    if os.path.isfile(whole):
        files = ['model.safetensors']
    elif os.path.isfile(index):
        try:
            with open(index, 'rb') as f:
                wanted = parse_json(f.read())['weight_map']
            files = sorted({plain_name(file, index) for file in wanted.values()})
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ConfigError(
                f'{index} is not the index of a model ({type(error).__name__}: {error}): fetch it'
                ' again'
            ) from None
    else:
        raise ConfigError(
            f'{folder} has no model.safetensors and no model.safetensors.index.json (weights under'
            ' other names and in other formats are not read)'
        )
    holder = {}
    for file in files:
        try:
            opened = safe_open(os.path.join(folder, file), framework='pt')
            names = opened.keys()
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f'{os.path.join(folder, file)} is damaged or missing: {error}'
            ) from None
        holder.update(
            {name: opened for name in names if wanted is None or wanted.get(name) == file}
        )
    if wanted is not None and (missing := [name for name in wanted if name not in holder]):
        raise ConfigError(
            f'{index} says that {missing[0]} is in {wanted[missing[0]]}, which does not hold it:'
            ' fetch the folder again'
        )
    return holder


def count_tensors(folder):
    """Return the number of tensors in the weights of a Hugging Face folder."""
    return len(tensors_of(folder))


def _expert_rows(kind, config, h, theirs):
    """Rows of name_map() for the mixture of experts of our layer h, their layer theirs."""
    if kind == 'gpt_oss':  # fused, gate and up interleaved, (E, in, out)
        mlp = f'{theirs}.mlp'
        return [
            (f'{h}.mlp.router.weight', [f'{mlp}.router.weight'], 'rows'),
            (f'{h}.mlp.router.bias', [f'{mlp}.router.bias'], 'rows'),
            (f'{h}.mlp.c_fc.weight', [f'{mlp}.experts.gate_up_proj'], 'fused pairs'),
            (f'{h}.mlp.c_fc.bias', [f'{mlp}.experts.gate_up_proj_bias'], 'pairs'),
            (f'{h}.mlp.c_proj.weight', [f'{mlp}.experts.down_proj'], 'fused'),
            (f'{h}.mlp.c_proj.bias', [f'{mlp}.experts.down_proj_bias'], 'rows'),
        ]
    mlp, gate, up, down = (
        (f'{theirs}.block_sparse_moe', 'w1', 'w3', 'w2')
        if kind == 'mixtral'
        else (f'{theirs}.mlp', 'gate_proj', 'up_proj', 'down_proj')
    )
    numbers = range(config.num_experts)
    rows = [
        (f'{h}.mlp.router.weight', [f'{mlp}.gate.weight'], 'rows'),
        (
            f'{h}.mlp.c_fc.weight',
            [f'{mlp}.experts.{e}.{name}.weight' for e in numbers for name in (gate, up)],
            'experts',
        ),
        (
            f'{h}.mlp.c_proj.weight',
            [f'{mlp}.experts.{e}.{down}.weight' for e in numbers],
            'experts',
        ),
    ]
    if kind == 'glm4_moe':
        rows += [
            (f'{h}.mlp.router.balance', [f'{mlp}.gate.e_score_correction_bias'], 'rows'),
            (
                f'{h}.mlp.shared.c_fc.weight',
                [f'{mlp}.shared_experts.{name}.weight' for name in (gate, up)],
                'rows',
            ),
            (f'{h}.mlp.shared.c_proj.weight', [f'{mlp}.shared_experts.{down}.weight'], 'rows'),
        ]
    return rows


def _join(parts, form, config):
    """Our tensor from theirs."""
    if form == 'transposed':
        return parts[0].t().contiguous()
    # GPT-NeoX keeps q, k, v of each head together, ours all q, then all k, then all v
    if form == 'by head':
        return _reordered(parts[0], config.n_head, 3, config.head_dim)
    if form == 'experts':
        return torch.cat(parts).view(config.num_experts, -1, parts[0].size(-1))
    if form in ('fused', 'fused pairs'):
        parts = [parts[0].transpose(1, 2)]
    # gate and up of each unit side by side, ours all gates, then all ups
    if form in ('pairs', 'fused pairs'):
        return torch.cat([parts[0][:, ::2], parts[0][:, 1::2]], dim=1)
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def _part(tensor, number, form, config):
    """Their tensors, `number` of them, from ours."""
    if form == 'transposed':
        return [tensor.t()]
    if form == 'by head':
        return [_reordered(tensor, 3, config.n_head, config.head_dim)]
    if form == 'experts':
        return [part for expert in tensor for part in expert.chunk(number // config.num_experts)]
    if form in ('pairs', 'fused pairs'):
        tensor = torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)
    if form in ('fused', 'fused pairs'):
        tensor = tensor.transpose(1, 2)
    q, kv = config.n_head * config.head_dim, config.num_key_value_heads * config.head_dim
    return tensor.split({1: [len(tensor)], 2: [len(tensor) // 2] * 2, 3: [q, kv, kv]}[number])


def _reordered(tensor, first, second, head_dim):
    rest = tensor.shape[1:]
    return (
        tensor.view(first, second, head_dim, *rest).transpose(0, 1).reshape(-1, *rest).contiguous()
    )


def weights(folder, config):
    """(name, fp32 tensor) for each parameter of model.Model(config), from the safetensors files in
    `folder`: read one at a time as they are asked for.

    A config.block_size below the folder's keeps the first learned positions. Raises ConfigError,
    before the first, for weights that are missing or left over.
    """
    holder = tensors_of(folder)
    kind = family(config)
    # the hub's gpt2 was saved without its outer module
    prefix = 'transformer.' if kind == 'gpt2' and 'wte.weight' in holder else ''
    rows = [
        (ours, [source.removeprefix(prefix) for source in sources], form)
        for ours, sources, form in name_map(kind, config)
    ]
    used = {source for _, sources, _ in rows for source in sources} | (
        {'lm_head.weight', 'embed_out.weight'} if config.weight_tying else set()
    )
    missing = [source for _, sources, _ in rows for source in sources if source not in holder]
    table = next(source for ours, (source, *_), _ in rows if ours == 'transformer.wte.weight')
    for head in (
        ('lm_head.weight', 'embed_out.weight') if config.weight_tying and table in holder else ()
    ):
        if head in holder and not torch.equal(
            holder[head].get_tensor(head), holder[table].get_tensor(table)
        ):
            raise ConfigError(
                f'{folder}: config.json says tie_word_embeddings=true, but its weights hold another'
                f' {head}: set tie_word_embeddings to false, or save the weights without it'
            )
    # masks, constants and rotary tables that older versions of transformers stored; layers of GLM
    # that predict further tokens
    left = [
        name
        for name in holder
        if name not in used
        and not re.search(r'\.(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$', name)
        and not (kind == 'glm4_moe' and name.startswith(f'model.layers.{config.n_layer}.'))
    ]
    if missing or left:
        raise ConfigError(
            f'{folder} does not hold the weights of its config.json: missing {missing[:3]}, left'
            f' over {left[:3]}'
        )

    def read():
        for name, sources, form in rows:
            tensor = _join(
                [holder[source].get_tensor(source).to(torch.float32) for source in sources],
                form,
                config,
            )
            yield name, tensor[: config.block_size] if name == 'transformer.wpe.weight' else tensor

    return read()


def require_safetensors():
    """Raise ConfigError where the packages that read and write these files are missing."""
    try:
        import huggingface_hub  # noqa: F401
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f'Hugging Face folders need the packages safetensors and huggingface_hub ({error}):'
            ' pip install safetensors huggingface_hub'
        ) from None


def write(folder, config, state_dict, dtype=torch.float32, eot_id=None, shard_size='5GB'):
    """Write `state_dict` (Model(config).tensors(); more names do no harm) as a Hugging Face folder:
    config.json, generation_config.json and safetensors files of at most shard_size with their
    index.

    eot_id: id that ends a text, or None. Raises ConfigError where no architecture computes this
    model.
    """
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    kind = family(config)
    if kind != 'glm4_moe' and any(
        bool(tensor.any()) for name, tensor in state_dict.items() if name.endswith('router.balance')
    ):
        raise ConfigError(
            f'the experts of this model were balanced by a bias, which {kind} does not have: train'
            ' with --balance_rate=0 (and --aux_loss_weight=0.01), or with sigmoid affinities and a'
            ' shared expert, which is glm4_moe'
        )
    theirs = {}
    for name, targets, form in name_map(kind, config):
        # a GPT-2 without biases is the same as one whose biases are zero
        tensor = (
            state_dict[name]
            if name in state_dict
            else torch.zeros(state_dict[name.replace('.bias', '.weight')].size(0))
        )
        for target, part in zip(targets, _part(tensor, len(targets), form, config), strict=True):
            keep = target.endswith('e_score_correction_bias')
            theirs[target] = part.to(torch.float32 if keep else dtype).contiguous().clone()
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):
        if re.fullmatch(r'model(-\d+-of-\d+)?\.safetensors(\.index\.json)?', name):
            # of an export before, which may have had more files
            os.remove(os.path.join(folder, name))
    try:
        save_torch_state_dict(theirs, folder, max_shard_size=shard_size)
    except SafetensorError as error:
        raise ConfigError(
            f'the weights could not be written to {folder} ({sentence(error)}): make room and type'
            ' the same command again'
        ) from None
    for name in os.listdir(folder):
        if name.endswith('.safetensors'):
            # the library makes them readable for their owner only
            os.chmod(os.path.join(folder, name), 0o644)
    for file, content in (
        ('config.json', _hf_config(kind, config, dtype, eot_id)),
        ('generation_config.json', {'bos_token_id': eot_id, 'eos_token_id': eot_id}),
    ):
        with replacing(os.path.join(folder, file), 'w') as f:
            json.dump(content, f, indent=2)


def _rope_config(kind, config):
    """rope_parameters of a config.json, and the same under the names of transformers 4."""
    scaling = dict(rope_type='default')
    if config.rope_scaling != 'none':
        scaling = dict(rope_type=config.rope_scaling, factor=config.rope_factor)
    if config.rope_scaling in ('yarn', 'llama3'):
        scaling.update(original_max_position_embeddings=config.rope_original_block_size)
    if config.rope_scaling == 'yarn':
        scaling.update(
            beta_fast=config.rope_beta_fast,
            beta_slow=config.rope_beta_slow,
            truncate=config.rope_truncate,
        )
        if config.rope_attention_factor:
            scaling.update(attention_factor=config.rope_attention_factor)
    if config.rope_scaling == 'llama3':
        scaling.update(
            low_freq_factor=config.rope_low_freq_factor,
            high_freq_factor=config.rope_high_freq_factor,
        )
    partial = (
        {}
        if config.rotary_pct == 1 and kind != 'glm4_moe'
        else dict(partial_rotary_factor=config.rotary_pct)
    )
    return dict(
        rope_parameters=dict(scaling, rope_theta=config.rope_theta, **partial),
        rope_theta=config.rope_theta,
        rope_scaling=None if config.rope_scaling == 'none' else scaling,
        **partial,
    )


def _hf_config(kind, config: ModelConfig, dtype, eot_id):
    activation = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[
        config.activation
    ]
    common = dict(
        model_type=kind,
        architectures=[f'{_CLASSES[kind]}{"LMHeadModel" if kind == "gpt2" else "ForCausalLM"}'],
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.weight_tying,
        torch_dtype=str(dtype).removeprefix('torch.'),
        bos_token_id=eot_id,
        eos_token_id=eot_id,
    )
    if kind == 'gpt2':
        return dict(
            common,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_inner=config.d_ff,
            n_positions=config.block_size,
            activation_function=activation,
            layer_norm_epsilon=config.norm_eps,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    common.update(
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        hidden_size=config.n_embd,
        intermediate_size=config.d_ff,
        max_position_embeddings=(
            config.rope_original_block_size
            if config.rope_scaling == 'dynamic'
            else config.block_size
        ),
        hidden_act=activation,
        **_rope_config(kind, config),
    )
    # starts from max_position_embeddings, while lm-eval asks for this first
    if config.rope_scaling == 'dynamic':
        common.update(n_positions=config.block_size)
    if kind == 'gpt_neox':
        return dict(
            common,
            layer_norm_eps=config.norm_eps,
            rotary_pct=config.rotary_pct,
            rotary_emb_base=config.rope_theta,
            use_parallel_residual=config.parallel_residual,
            attention_bias=True,
        )
    common.update(
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        attention_bias=config.bias,
    )
    types = [
        'full_attention' if window is None else 'sliding_attention' for window in config.windows
    ]
    sliding = dict(sliding_window=config.sliding_window or None)
    if kind == 'llama':
        return dict(common, mlp_bias=config.bias)
    if kind == 'mistral':
        return dict(common, **sliding)
    if kind == 'qwen3':
        return dict(
            common,
            **sliding,
            use_sliding_window=bool(config.sliding_window),
            layer_types=types,
            max_window_layers=0,
        )
    common.update(num_experts_per_tok=config.num_experts_per_tok, router_aux_loss_coef=0.0)
    if kind == 'mixtral':
        return dict(
            common,
            **sliding,
            num_local_experts=config.num_experts,
            intermediate_size=config.expert_d_ff,
        )
    if kind == 'gpt_oss':
        return dict(
            common,
            sliding_window=config.sliding_window or config.block_size,
            layer_types=types,
            num_local_experts=config.num_experts,
            intermediate_size=config.expert_d_ff,
            swiglu_limit=7.0,
        )
    common.update(moe_intermediate_size=config.expert_d_ff, norm_topk_prob=config.norm_topk_prob)
    if kind == 'qwen3_moe':
        return dict(
            common,
            num_experts=config.num_experts,
            mlp_only_layers=[*range(config.n_dense_layers)],
            decoder_sparse_step=1,
            use_sliding_window=False,
        )
    return dict(
        common,
        n_routed_experts=config.num_experts,
        n_shared_experts=config.num_shared_experts,
        first_k_dense_replace=config.n_dense_layers,
        n_group=config.n_groups,
        topk_group=config.topk_groups,
        routed_scaling_factor=config.route_scale,
        use_qk_norm=config.qk_norm,
    )
