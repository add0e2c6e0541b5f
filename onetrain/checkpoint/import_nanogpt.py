"""Reads ckpt.pt of nanoGPT, and that of a descendant of it with LLaMA, Qwen3 and other families,
whose blocks have other names.
"""

import pickle
import re

import torch

from onetrain.config import UserError
from onetrain.files import is_whole


def read_checkpoint(path: str) -> dict:
    """nanoGPT's ckpt.pt as {'model': state dict, 'optimizer': {'exp_avg.<name>': tensor, ...},
    'config', 'step', 'best_val_loss'}.

    'optimizer' is empty if nothing had been trained yet. Read with weights_only, so no code in it
    runs. Raises UserError for a file that is none.
    """
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
        names = [name.removeprefix('_orig_mod.') for name in content['model']]
        if any(name.startswith('token_embeddings') for name in names):
            return _descendant(content)
        return _nanogpt(content)
    except (
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ValueError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        said = str(error).splitlines() or ['it is empty']
        raise UserError(
            f'{path} is not a checkpoint of nanoGPT ({type(error).__name__}:'
            f' {said[0].split(". ")[0][:120]})'
        ) from None


def _nanogpt(content):
    """read_checkpoint() for the content of nanoGPT's file."""
    sizes, trained = content['model_args'], content['config']
    model = {name.removeprefix('_orig_mod.'): tensor for name, tensor in content['model'].items()}
    step, best = content['iter_num'], float(content['best_val_loss'])
    if not is_whole(step, 0, 2**53) or not isinstance(trained, dict):
        raise ValueError('iter_num is no whole number, or config no dict')
    if odd := [
        name for name, tensor in model.items() if tensor.layout != torch.strided or tensor.is_meta
    ]:
        raise ValueError(f'{odd[0]} is not a plain tensor')
    model = {
        name: tensor
        for name, tensor in model.items()
        if not re.search(r'\.attn\.(bias|masked_bias)$', name)
    }
    optimizer = _moments(content['optimizer']['state'], model)
    shape = {key: sizes[key] for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')}
    # of the machine it ran on
    trained = {key: value for key, value in trained.items() if key not in ('dtype', 'compile')}
    # nanoGPT counts the micro-steps of all its processes
    if trained.keys() >= {'gradient_accumulation_steps', 'batch_size'}:
        trained['total_batch_size'] = (
            trained['gradient_accumulation_steps'] * trained['batch_size'] * shape['block_size']
        )
    config = {
        **trained,
        **shape,
        'bias': sizes.get('bias', True),
        'arch_preset': 'gpt2',
        'activation': 'gelu',  # nanoGPT computes the exact GELU, unlike GPT-2
    }
    return {
        'model': model,
        'optimizer': optimizer,
        'config': config,
        'step': step,
        'best_val_loss': best,
    }


def _moments(states, model):
    """AdamW's moments by name. states: by number; nanoGPT numbers its parameters: first those with
    two dimensions or more, then the rest, each in the model's order.
    """
    if not states:
        return {}
    names = [name for name in model if name != 'lm_head.weight']
    numbered = [n for n in names if model[n].dim() >= 2] + [n for n in names if model[n].dim() < 2]
    moments = {
        f'{key}.{name}': torch.as_tensor(states[i][key])
        for i, name in enumerate(numbered)
        for key in ('step', 'exp_avg', 'exp_avg_sq')
    }
    for key, tensor in moments.items():
        if not key.startswith('step.') and tensor.shape != model[key.partition('.')[2]].shape:
            raise ValueError(f'{key} has another shape than its weight')
    return moments


_RENAMED = (  # (their name, ours); a block's number stands for itself
    (r'token_embeddings', 'transformer.wte'),
    (r'pos_encoding\.wpe', 'transformer.wpe'),
    (r'final_norm', 'transformer.ln_f'),
    (r'lm_head', 'lm_head'),
    (
        r'blocks\.(\d+)\.(?:norm_?1|ln_?1|attn_norm|norm_attn|attention_norm)',
        r'transformer.h.\1.ln_1',
    ),
    (r'blocks\.(\d+)\.(?:norm_?2|ln_?2|ffn_norm|norm_ffn|mlp_norm)', r'transformer.h.\1.ln_2'),
    (r'blocks\.(\d+)\.attn\.(c_attn|c_proj|c_q|c_kv|q_norm|k_norm)', r'transformer.h.\1.attn.\2'),
    (r'blocks\.(\d+)\.ffn\.fc1', r'transformer.h.\1.mlp.c_fc'),
    (r'blocks\.(\d+)\.ffn\.(?:fc2|w_out)', r'transformer.h.\1.mlp.c_proj'),
    (r'blocks\.(\d+)\.ffn\.w_gate', r'transformer.h.\1.mlp.gate'),
    (r'blocks\.(\d+)\.ffn\.w_value', r'transformer.h.\1.mlp.up'),
)


def _descendant(content):
    """read_checkpoint() for the descendant's file: q and kv apart or together, gate and value
    apart, RoPE on neighboring dimensions. Its moments are left behind: 'optimizer' is empty.
    """
    args = {**content.get('config', {}), **content.get('model_args', {})}
    model = _renamed(content['model'])
    n_layer = 1 + max(int(name.split('.')[2]) for name in model if '.h.' in name)
    head_dim = args.get('head_dim') or model['transformer.wte.weight'].size(1) // args['n_head']
    for i in range(n_layer):
        for first, second, joined in (
            ('attn.c_q', 'attn.c_kv', 'attn.c_attn'),
            ('mlp.gate', 'mlp.up', 'mlp.c_fc'),
        ):
            for part in ('weight', 'bias'):
                names = [f'transformer.h.{i}.{x}.{part}' for x in (first, second)]
                if names[0] in model:
                    model[f'transformer.h.{i}.{joined}.{part}'] = torch.cat(
                        [model.pop(name) for name in names]
                    )
    rows = model['transformer.h.0.attn.c_attn.weight'].size(0)
    kv_heads = (rows // head_dim - args['n_head']) // 2
    if 'transformer.wpe.weight' not in model and args.get('position_encoding', 'rope') == 'rope':
        _reorder_rotary(model, args['n_head'], kv_heads, head_dim, args.get('rotary_pct', 1.0))
    known = {
        key: value
        for key, value in args.items()
        if value is not None and key not in ('dtype', 'compile', 'intermediate_size')
    }
    return {
        'model': model,
        'optimizer': {},
        'config': {**known, **_shape(model, args, n_layer, head_dim, kv_heads)},
        'step': content['iter_num'],
        'best_val_loss': float(content['best_val_loss']),
    }


def _renamed(theirs):
    """Return the descendant's state dict under our names, in float32. Raises ValueError for a
    weight that is not known.
    """
    model = {}
    for name, tensor in theirs.items():
        name = name.removeprefix('_orig_mod.')
        stem, _, part = name.rpartition('.')
        if part not in ('weight', 'bias') or re.search(
            r'rope|rotary|masked_bias|attn\.bias$', name
        ):
            continue  # tables and masks
        ours = [
            re.sub(f'^{pattern}$', ours, stem)
            for pattern, ours in _RENAMED
            if re.fullmatch(pattern, stem)
        ]
        if not ours:
            raise ValueError(f'the weights {name} are not known here')
        model[f'{ours[0]}.{part}'] = tensor.float()
    return model


def _reorder_rotary(model, heads, kv_heads, head_dim, rotary_pct):
    """Bring RoPE's pairs of neighbors (2i, 2i + 1) to halves (i, i + d/2), in each head of q and
    k, in place.
    """
    rotary = int(head_dim * rotary_pct)
    order = torch.cat(
        [torch.arange(0, rotary, 2), torch.arange(1, rotary, 2), torch.arange(rotary, head_dim)]
    )
    heads += kv_heads  # of q and k
    rows = torch.cat(
        [
            (torch.arange(heads)[:, None] * head_dim + order).flatten(),
            torch.arange(heads * head_dim, (heads + kv_heads) * head_dim),
        ]
    )
    for name in model:
        if '.attn.c_attn.' in name:
            model[name] = model[name][rows]
        elif '.q_norm.' in name or '.k_norm.' in name:
            model[name] = model[name][order]


def _shape(model, args, n_layer, head_dim, kv_heads):
    """Return keys of the shape, read off the weights; args: what the file says."""
    table, head = model['transformer.wte.weight'], model.get('lm_head.weight')
    d_ff = model['transformer.h.0.mlp.c_proj.weight'].size(1)
    gated = model['transformer.h.0.mlp.c_fc.weight'].size(0) != d_ff
    learned = 'transformer.wpe.weight' in model
    return dict(
        arch_preset=args.get('arch_preset', 'custom'),
        n_layer=n_layer,
        n_embd=table.size(1),
        head_dim=head_dim,
        num_key_value_heads=kv_heads,
        vocab_size=len(table),
        bias='transformer.h.0.attn.c_attn.bias' in model,
        qk_norm='transformer.h.0.attn.q_norm.weight' in model,
        weight_tying=head is None or torch.equal(head, table),
        d_ff=d_ff,
        ffn_type='swiglu' if gated else 'standard',
        position_encoding=(
            'learned_absolute' if learned else args.get('position_encoding', 'rope')
        ),
        rotary_pct=args.get('rotary_pct', 1.0),
    )
