"""Settings of a Hugging Face model: from its config.json to the keys of this trainer."""

import dataclasses
import os
import re
from typing import TYPE_CHECKING

from onetrain.config import UserError
from onetrain.files import check_regular, is_whole, parse_json
from onetrain.huggingface.architectures import ACTIVATIONS, ARCHITECTURES
from onetrain.model_config import ROUTING
from onetrain.ops import rope

if TYPE_CHECKING:
    from train import Config

_GPT2_NAMES = {
    'hidden_size': 'n_embd',
    'max_position_embeddings': 'n_positions',
    'num_attention_heads': 'n_head',
    'num_hidden_layers': 'n_layer',
}
# keys of the shape, beside block_size, that need no other weights
FREE = (
    'rope_theta',
    'rope_scaling',
    'rope_factor',
    'rope_original_block_size',
    'rope_attention_factor',
    'rope_beta_fast',
    'rope_beta_slow',
    'rope_truncate',
    'rope_low_freq_factor',
    'rope_high_freq_factor',
    'sliding_window',
    'window_pattern',
)


def is_source(init_from: str) -> bool:
    """Return whether `init_from` names Hugging Face weights: a folder with a config.json, or a hub
    id such as gpt2 or org/model.
    """
    return os.path.isfile(os.path.join(init_from, 'config.json')) or bool(
        re.fullmatch(r'gpt2(-\w+)?|[\w.-]+/[\w.-]+', init_from)
    )


def fetch_source(source: str) -> str:
    """Return the local folder of `source`: itself, or a snapshot of the hub's repository. Raises
    UserError when it cannot be had.
    """
    if os.path.isdir(source):
        return source
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
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
        raise UserError(
            f'init_from={source!r} is no local folder and could not be fetched from the hub '
            f'({type(error).__name__}): give a folder with config.json and safetensors files'
        ) from None


def read_settings(folder: str) -> dict:
    """Return the trainer's model keys for the config.json in `folder`. Raises UserError for what
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
        raise UserError(
            f'{path} is missing: give a folder with config.json and safetensors files'
        ) from None
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror})') from None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        IndexError,
        StopIteration,
    ) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f'{path} is not the config.json of a model: {type(error).__name__} {error}'
        ) from None


def settings_of(hf: dict, folder: str) -> dict:
    """Return the same for the dict `hf` of a config.json; `folder` names it in errors."""

    def refuse(what):
        raise UserError(f'{folder}: {what}')

    kind = hf.get('model_type')
    _check_supported(kind, hf, refuse)
    if kind == 'gpt2':
        settings = _gpt2(hf, refuse)
    else:
        rope_settings, theta, rotary_pct = _rope_of(kind, hf, refuse)
        shape = _shape(kind, hf, theta, refuse)
        shape.update(_scaling_of(hf, rope_settings, refuse))
        if kind == 'gpt_neox':
            settings = _gpt_neox(hf, shape, rotary_pct, refuse)
        else:
            shape.update(_llama(kind, hf, shape, refuse))
            shape.update(_window(kind, hf, shape['n_layer'], refuse))
            if kind in ('mistral', 'llama', 'qwen3'):
                family = 'qwen3' if kind == 'qwen3' else 'llama3' if theta != 10000.0 else 'llama'
                settings = dict(shape, arch_preset=family)
            else:
                settings = _mixture(kind, hf, shape, rotary_pct, refuse)
    return {
        'rope_scaling': 'none',
        'sliding_window': 0,
        'window_pattern': 'S',
        'attention_sinks': False,
        'num_experts': 0,
        **settings,
    }


def _check_supported(kind, hf, refuse):
    """Refuse a model of another kind, or with what is not read."""
    if hf.get('quantization_config'):
        refuse(
            'its weights are quantized, which are not read: load it with transformers, dequantize'
            ' it and save_pretrained() it'
        )
    if hf.get('is_causal', True) is not True:
        refuse('is_causal is not true, and only causal models are read')
    for key in ('transformers_weights', 'configuration_files', 'per_layer_config'):
        if hf.get(key):
            refuse(f'{key} names other files or other settings, which are not read: leave it out')
    if kind == 'gpt2':
        return
    if kind not in ARCHITECTURES:
        refuse(f'model_type {kind!r} is not one of {", ".join(ARCHITECTURES)}')
    if not is_whole(hf['num_hidden_layers'], 1, 10**4):
        refuse(
            f'num_hidden_layers={hf["num_hidden_layers"]!r}, expected a whole number from 1 to'
            ' 10,000'
        )


def _gpt2(hf, refuse):
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
        norm_eps=hf.get('layer_norm_epsilon', ARCHITECTURES['gpt2'].norm_eps),
        norm_position='pre',
        activation=_activation(hf.get('activation_function', 'gelu_new'), refuse),
        ffn_type='standard',
        position_encoding='learned_absolute',
        rope_theta=10000.0,
        qk_norm=False,
        parallel_residual=False,
        weight_tying=hf.get('tie_word_embeddings', True),
    )


def _shape(kind, hf, theta, refuse):
    """Return the keys of the shape that all but GPT-2 have."""
    return dict(
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
    )


def _gpt_neox(hf, shape, rotary_pct, refuse):
    if hf.get('head_dim', shape['n_embd'] // shape['n_head']) != shape['n_embd'] // shape['n_head']:
        refuse(f'head_dim={hf["head_dim"]} is not hidden_size / num_attention_heads: leave it out')
    if not hf.get('attention_bias', True):
        refuse('GPT-NeoX without biases in attention is not supported')
    return dict(
        shape,
        arch_preset='neox',
        num_key_value_heads=shape['n_head'],
        head_dim=shape['n_embd'] // shape['n_head'],
        bias=True,
        normalization='layernorm',
        norm_eps=hf.get('layer_norm_eps', ARCHITECTURES['gpt_neox'].norm_eps),
        ffn_type='standard',
        rotary_pct=rotary_pct,
        qk_norm=False,
        parallel_residual=hf.get('use_parallel_residual', True),
    )


def _llama(kind, hf, shape, refuse):
    """Return the keys that LLaMA and its descendants state."""
    bias = bool(hf.get('attention_bias', kind == 'gpt_oss'))
    if bias != bool(hf.get('mlp_bias', kind == 'gpt_oss')):
        refuse('biases in only one of attention and MLP are not supported')
    return dict(
        num_key_value_heads=hf.get('num_key_value_heads') or shape['n_head'],
        head_dim=hf.get('head_dim') or shape['n_embd'] // shape['n_head'],
        bias=bias,
        normalization='rmsnorm',
        norm_eps=hf.get('rms_norm_eps', ARCHITECTURES[kind].norm_eps),
        ffn_type='swiglu',
        rotary_pct=1.0,
        qk_norm=kind in ('qwen3', 'qwen3_moe'),
        parallel_residual=False,
    )


def _window(kind, hf, n_layer, refuse):
    """Return sliding_window and window_pattern, {} without a window."""
    slides = hf.get('sliding_window', ARCHITECTURES[kind].window)
    if kind in ('qwen3', 'qwen3_moe'):  # the key that others ignore
        if hf.get('use_sliding_window') and 'sliding_window' not in hf:
            refuse('use_sliding_window is true, and no sliding_window is stated: state it')
        slides = hf.get('use_sliding_window', False) and slides
    if kind in ('llama', 'glm4_moe') and (
        slides or 'sliding_attention' in (hf.get('layer_types') or ())
    ):
        refuse(f'{kind} has no sliding window: leave sliding_window out')
    if not slides:
        return {}
    types = hf.get('layer_types') or [
        'sliding_attention' if kind != 'gpt_oss' or i % 2 == 0 else 'full_attention'
        for i in range(n_layer)
    ]
    if kind in ('qwen3', 'qwen3_moe') and not hf.get('layer_types'):
        refuse('a sliding window without layer_types is not supported')
    pattern = ''.join({'sliding_attention': 'S', 'full_attention': 'L'}[t] for t in types)
    return dict(
        sliding_window=slides,
        window_pattern=next(
            pattern[:n]
            for n in range(1, len(pattern) + 1)
            if (pattern[:n] * len(pattern))[: len(pattern)] == pattern
        ),
    )


def _mixture(kind, hf, shape, rotary_pct, refuse):
    """Return the settings of a mixture of experts."""
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
    """Return the value that some of `keys` of the dict hf, or `more` values, state; refused where
    they contradict each other, or where there is none.
    """
    stated = {key: hf[key] for key in keys if hf.get(key) is not None}
    values = [*stated.values(), *(value for value in more if value is not None)]
    if not values or any(value != values[0] for value in values):
        refuse(f'{" and ".join(keys)} state {values or "nothing"}: state one value, once')
    return values[0]


def _rope_of(kind, hf, refuse):
    """Return (settings of RoPE's scaling, theta, share of each head that is rotated). Older files
    have rope_theta and rope_scaling, newer ones rope_parameters; where both are there they must not
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
    stated = [place.get('rope_theta') for place in (hf, new, old)] + [hf.get('rotary_emb_base')]
    theta = ARCHITECTURES[kind].theta
    if any(value is not None for value in stated):
        theta = float(_one_of({}, ('rope_theta',), refuse, *stated))
    return settings, theta, _rotary_pct(kind, hf, new, old, refuse)


def _rotary_pct(kind, hf, new, old, refuse):
    """Return the share of each head that is rotated. new, old: rope_parameters and rope_scaling."""
    if any(
        key in place and place[key] is None
        for place in (hf, new, old)
        for key in ('rotary_pct', 'partial_rotary_factor')
    ):
        refuse('partial_rotary_factor or rotary_pct is null: state a number, or leave it out')
    default = share = ARCHITECTURES[kind].rotary_pct
    shares = [place.get('partial_rotary_factor') for place in (hf, new, old)]
    shares.append(hf.get('rotary_pct'))
    if any(value is not None for value in shares):
        share = float(_one_of({}, ('rotary_pct', 'partial_rotary_factor'), refuse, *shares))
    if (
        kind == 'gpt_neox'
        and 'partial_rotary_factor' in hf
        and 'rotary_pct' not in hf
        and 'partial_rotary_factor' not in {**old, **new}
    ):
        refuse('partial_rotary_factor is not read for gpt_neox: state rotary_pct')
    if default == 1.0 and share != 1.0:
        refuse(f'{kind} turns whole heads, not a share of {share}: leave partial_rotary_factor out')
    return share


def _scaling_of(hf, settings, refuse):
    """Return our keys for the rope_parameters (or rope_scaling) of a config.json."""
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
    if name not in ACTIVATIONS:
        refuse(f'activation {name!r} is not one of {", ".join(ACTIVATIONS)}')
    return ACTIVATIONS[name]


def resolve_source(c: 'Config', given: dict[str, str], shape_keys: list[str]) -> tuple:
    """Return (config with the shape of the Hugging Face model that c.init_from names, its local
    folder). Raises UserError for what contradicts it.
    """
    if not is_source(c.init_from):
        raise UserError(
            f"init_from={c.init_from!r} is not 'scratch', 'resume', 'gpt2...', a Hugging Face"
            ' folder (with config.json) or a hub id (org/name)'
        )
    folder = fetch_source(c.init_from)
    settings = read_settings(folder)
    if given.get('arch_preset') and {c.arch_preset, settings['arch_preset']} not in (
        {settings['arch_preset']},
        {'llama', 'llama3'},
    ):
        raise UserError(
            f'{given["arch_preset"]}: arch_preset={c.arch_preset!r}, but {c.init_from} is'
            f' {settings["arch_preset"]!r}: leave --arch_preset out'
        )
    longer = c.rope_scaling not in (None, 'none') or settings.get('rope_scaling') == 'dynamic'
    if c.block_size > settings['block_size'] and given.get('block_size') and not longer:
        raise UserError(
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
            raise UserError(
                f'{given[key]}: {key}={getattr(c, key)!r}, but {c.init_from} has'
                f' {key}={settings[key]!r}: leave --{key} out'
            )
    return dataclasses.replace(c, **settings), folder


def _upcycling(c, given, settings):
    """Return the keys of a mixture of experts that begins as the dense model of `settings`
    (Komatsuzaki et al., "Sparse Upcycling", 2023).
    """
    if settings.get('num_experts'):
        raise UserError(
            f'upcycle=True, but {c.init_from} is a mixture of experts already: leave --upcycle out'
        )
    if not c.num_experts:
        raise UserError('upcycle=True needs --num_experts, such as --num_experts=8')
    for key, value in (
        ('num_shared_experts', 0),
        ('expert_d_ff', settings['d_ff']),
        ('norm_topk_prob', True),
        ('route_scale', 1.0),
    ):
        if given.get(key) and getattr(c, key) not in (None, value):
            raise UserError(
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
