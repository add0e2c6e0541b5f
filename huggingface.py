"""Hugging Face weights in and out: GPT-2, LLaMA-2/3, Qwen3, GPT-NeoX.

read() gives the model's settings and its state dict under the names of model.py; write() is the way back, so that
transformers' from_pretrained() opens the folder. Only safetensors files are read.
"""
import dataclasses
import json
import os
import re

import torch

from engine.configurator import ConfigError
from model import ModelConfig

_ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu', 'silu': 'silu', 'relu': 'relu'}
_DEFAULT_THETA = {'llama': 10000.0, 'qwen3': 1000000.0, 'gpt_neox': 10000.0}


def is_source(init_from):
    """Whether `init_from` names Hugging Face weights: a folder with a config.json, or a hub id such as gpt2 or org/model."""
    return os.path.isfile(os.path.join(init_from, 'config.json')) or bool(re.fullmatch(r'gpt2(-\w+)?|[\w.-]+/[\w.-]+', init_from))


def fetch(source):
    """The local folder of `source`: itself, or a snapshot of the hub's repository. Raises ConfigError when it cannot be had."""
    if os.path.isdir(source):
        return source
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(f'init_from={source!r} needs the package huggingface_hub: pip install huggingface_hub, or give a local folder') from None
    try:
        return snapshot_download(source, allow_patterns=['*.safetensors', '*.json', 'tokenizer*', '*.txt'])
    except Exception as error:  # the hub's own errors, and any of the network's
        raise ConfigError(f'init_from={source!r} is no local folder and could not be fetched from the hub '
                          f'({type(error).__name__}): give a folder with config.json and safetensors files') from None


def read_settings(folder):
    """The trainer's model keys for the config.json in `folder`. Raises ConfigError for what model.py cannot compute."""
    path = os.path.join(folder, 'config.json')
    try:
        with open(path) as f:
            return settings_of(json.load(f), folder)
    except FileNotFoundError:
        raise ConfigError(f'{path} is missing: give a folder with config.json and safetensors files') from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f'{path} is not the config.json of a model: {type(error).__name__} {error}') from None


def settings_of(hf, folder):
    """The same for the dict `hf` of a config.json; `folder` names it in errors."""
    kind = hf.get('model_type')

    def refuse(what):
        raise ConfigError(f'{folder}: {what}')
    if kind == 'gpt2':
        if hf.get('scale_attn_by_inverse_layer_idx') or not hf.get('scale_attn_weights', True):
            refuse('GPT-2 with another scaling of attention is not supported')
        return dict(arch_preset='gpt2', n_layer=hf['n_layer'], n_head=hf['n_head'], n_embd=hf['n_embd'], d_ff=hf.get('n_inner') or 4 * hf['n_embd'],
                    head_dim=hf['n_embd'] // hf['n_head'], num_key_value_heads=hf['n_head'],
                    block_size=hf['n_positions'], vocab_size=hf['vocab_size'], bias=True, normalization='layernorm', rotary_pct=1.0,
                    norm_eps=hf.get('layer_norm_epsilon', 1e-5), norm_position='pre', activation=_activation(hf.get('activation_function', 'gelu_new'), refuse),
                    ffn_type='standard', position_encoding='learned_absolute', rope_theta=10000.0, qk_norm=False, parallel_residual=False,
                    weight_tying=hf.get('tie_word_embeddings', True))
    if kind not in ('llama', 'qwen3', 'gpt_neox'):
        refuse(f'model_type {kind!r} is not one of gpt2, llama, qwen3, gpt_neox')
    rope = hf.get('rope_parameters') or hf.get('rope_scaling') or {}
    if rope.get('rope_type', rope.get('type', 'default')) != 'default':
        refuse(f"RoPE scaling {rope.get('rope_type', rope.get('type'))!r} is not supported")
    theta = hf.get('rope_theta') or rope.get('rope_theta') or hf.get('rotary_emb_base') or _DEFAULT_THETA[kind]
    shape = dict(n_layer=hf['num_hidden_layers'], n_head=hf['num_attention_heads'], n_embd=hf['hidden_size'], d_ff=hf['intermediate_size'],
                 block_size=hf['max_position_embeddings'], vocab_size=hf['vocab_size'], norm_position='pre', position_encoding='rope',
                 rope_theta=float(theta), activation=_activation(hf.get('hidden_act', 'silu'), refuse), weight_tying=hf.get('tie_word_embeddings', False))
    if kind == 'gpt_neox':
        if not hf.get('attention_bias', True):
            refuse('GPT-NeoX without biases in attention is not supported')
        rotary_pct = hf.get('rotary_pct') or rope.get('partial_rotary_factor') or hf.get('partial_rotary_factor') or 0.25
        return dict(shape, arch_preset='neox', num_key_value_heads=shape['n_head'], head_dim=shape['n_embd'] // shape['n_head'], bias=True,
                    normalization='layernorm', norm_eps=hf.get('layer_norm_eps', 1e-5), ffn_type='standard', rotary_pct=float(rotary_pct),
                    qk_norm=False, parallel_residual=hf.get('use_parallel_residual', True))
    if hf.get('use_sliding_window'):
        refuse('sliding-window attention is not supported')
    bias = bool(hf.get('attention_bias', False))
    if bias != bool(hf.get('mlp_bias', False)):
        refuse('biases in only one of attention and MLP are not supported')
    return dict(shape, arch_preset='qwen3' if kind == 'qwen3' else 'llama3' if theta != 10000.0 else 'llama',
                num_key_value_heads=hf.get('num_key_value_heads') or shape['n_head'],
                head_dim=hf.get('head_dim') or shape['n_embd'] // shape['n_head'], bias=bias, normalization='rmsnorm',
                norm_eps=hf.get('rms_norm_eps', 1e-6), ffn_type='swiglu', rotary_pct=1.0, qk_norm=kind == 'qwen3', parallel_residual=False)


def _activation(name, refuse):
    if name not in _ACTIVATIONS:
        refuse(f'activation {name!r} is not one of {", ".join(_ACTIVATIONS)}')
    return _ACTIVATIONS[name]


def find(c, given, shape_keys):
    """(config with the shape of the Hugging Face model that c.init_from names, its local folder). Raises ConfigError for what contradicts it."""
    if not is_source(c.init_from):
        raise ConfigError(f"init_from={c.init_from!r} is not 'scratch', 'resume', 'gpt2...', a Hugging Face folder (with config.json) or a hub id (org/name)")
    folder = fetch(c.init_from)
    settings = read_settings(folder)
    if given.get('arch_preset') and {c.arch_preset, settings['arch_preset']} not in ({settings['arch_preset']}, {'llama', 'llama3'}):
        raise ConfigError(f"{given['arch_preset']}: arch_preset={c.arch_preset!r}, but {c.init_from} is {settings['arch_preset']!r}: leave --arch_preset out")
    if c.block_size > settings['block_size'] and given.get('block_size'):
        raise ConfigError(f"block_size={c.block_size} is beyond the {settings['block_size']} positions of {c.init_from}: "
                          f"type --block_size={settings['block_size']} or less")
    settings['block_size'] = min(c.block_size, settings['block_size'])
    for key in set(shape_keys) - {'arch_preset', 'block_size'}:
        if given.get(key) and getattr(c, key) is not None and getattr(c, key) != settings[key]:
            raise ConfigError(f'{given[key]}: {key}={getattr(c, key)!r}, but {c.init_from} has {key}={settings[key]!r}: leave --{key} out')
    return dataclasses.replace(c, **settings), folder


def family(config):
    """'gpt2' | 'llama' | 'qwen3' | 'gpt_neox': the Hugging Face architecture that computes what `config` does.

    Raises ConfigError, naming the switches in the way, where there is none.
    """
    common = dict(norm_position='pre')
    llama = dict(common, normalization='rmsnorm', ffn_type='swiglu', position_encoding='rope', rotary_pct=1.0, parallel_residual=False)
    wanted = {
        'gpt2': dict(common, normalization='layernorm', ffn_type='standard', position_encoding='learned_absolute', qk_norm=False,
                     parallel_residual=False, num_key_value_heads=config.n_head, head_dim=config.n_embd // config.n_head),
        'llama': dict(llama, qk_norm=False),
        'qwen3': dict(llama, qk_norm=True, bias=False),
        'gpt_neox': dict(common, normalization='layernorm', ffn_type='standard', position_encoding='rope', qk_norm=False, bias=True,
                         num_key_value_heads=config.n_head, head_dim=config.n_embd // config.n_head),
    }
    in_the_way = {kind: [f'{key}={getattr(config, key)!r}' for key, value in switches.items() if getattr(config, key) != value
                         and not (kind == 'gpt2' and key == 'normalization' and config.normalization == 'layernorm_nobias')]
                  for kind, switches in wanted.items()}
    kind = min(in_the_way, key=lambda k: len(in_the_way[k]))
    if in_the_way[kind]:
        raise ConfigError(f"no Hugging Face architecture computes this model; nearest is {kind}, in the way are {', '.join(in_the_way[kind])}")
    if config.activation not in _ACTIVATIONS.values():
        raise ConfigError(f'no Hugging Face architecture computes this model: activation={config.activation!r}')
    return kind


def name_map(kind, config):
    """[(our name, [their names], transpose)]: several of theirs are stacked along the output dimension to make ours."""
    biases = ('weight', 'bias') if config.bias else ('weight',)
    norms = ('weight', 'bias') if config.normalization == 'layernorm' or kind in ('gpt2', 'gpt_neox') else ('weight',)
    rows = []

    def add(ours, theirs, parts, transpose=False):
        for part in parts:
            rows.append((f'{ours}.{part}', [f'{t}.{part}' for t in theirs], transpose and part == 'weight'))
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
                add(f'{h}.{linear}', [f'{h}.{linear}'], biases, transpose=True)  # Conv1D keeps its weight as (in, out)
        add('transformer.ln_f', ['transformer.ln_f'], norms)
        head = 'lm_head'
    elif kind == 'gpt_neox':
        add('transformer.wte', ['gpt_neox.embed_in'], ('weight',))
        for i in range(config.n_layer):
            h, theirs = f'transformer.h.{i}', f'gpt_neox.layers.{i}'
            for ours, name in (('ln_1', 'input_layernorm'), ('ln_2', 'post_attention_layernorm')):
                add(f'{h}.{ours}', [f'{theirs}.{name}'], norms)
            for ours, name in (('attn.c_attn', 'attention.query_key_value'), ('attn.c_proj', 'attention.dense'),
                               ('mlp.c_fc', 'mlp.dense_h_to_4h'), ('mlp.c_proj', 'mlp.dense_4h_to_h')):
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
            add(f'{h}.attn.c_attn', [f'{theirs}.self_attn.{x}_proj' for x in 'qkv'], biases)
            add(f'{h}.attn.c_proj', [f'{theirs}.self_attn.o_proj'], biases)
            add(f'{h}.mlp.c_fc', [f'{theirs}.mlp.gate_proj', f'{theirs}.mlp.up_proj'], biases)
            add(f'{h}.mlp.c_proj', [f'{theirs}.mlp.down_proj'], biases)
        add('transformer.ln_f', ['model.norm'], norms)
        head = 'lm_head'
    if not config.weight_tying:
        add('lm_head', [head], ('weight',))
    return rows


def _interleave_heads(tensor, config, back=False):
    """GPT-NeoX keeps q, k, v of each head together, ours all q, then all k, then all v: reorder the output dimension."""
    rest = tensor.shape[1:]
    first, second = (config.n_head, 3) if not back else (3, config.n_head)
    return tensor.view(first, second, config.head_dim, *rest).transpose(0, 1).reshape(-1, *rest).contiguous()


def weights(folder, config):
    """(name, fp32 tensor) for each parameter of model.Model(config), from the safetensors files in `folder`: read one at a time as they are asked for.

    A config.block_size below the folder's keeps the first learned positions. Raises ConfigError, before the first, for weights that are
    missing or left over.
    """
    from safetensors import SafetensorError, safe_open
    files = sorted(f for f in os.listdir(folder) if f.endswith('.safetensors'))
    if not files:
        raise ConfigError(f'{folder} has no .safetensors file (weights in other formats are not read)')
    holder = {}
    for file in files:
        try:
            opened = safe_open(os.path.join(folder, file), framework='pt')
        except SafetensorError as error:
            raise ConfigError(f'{os.path.join(folder, file)} is damaged: {error}') from None
        holder.update(dict.fromkeys(opened.keys(), opened))
    kind = family(config)
    # the hub's gpt2 was saved without its outer module
    prefix = 'transformer.' if kind == 'gpt2' and 'wte.weight' in holder else ''
    rows = [(ours, [source.removeprefix(prefix) for source in sources], transpose) for ours, sources, transpose in name_map(kind, config)]
    used = {source for _, sources, _ in rows for source in sources} | ({'lm_head.weight', 'embed_out.weight'} if config.weight_tying else set())
    missing = [source for _, sources, _ in rows for source in sources if source not in holder]
    # masks, constants and rotary tables that older versions of transformers stored
    left = [name for name in holder if name not in used and not re.search(r'\.(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$', name)]
    if missing or left:
        raise ConfigError(f"{folder} does not hold the weights of its config.json: missing {missing[:3]}, left over {left[:3]}")

    def read():
        for name, sources, transpose in rows:
            parts = [holder[source].get_tensor(source).to(torch.float32) for source in sources]
            tensor = torch.cat([part.t() if transpose else part for part in parts]).contiguous()
            if kind == 'gpt_neox' and '.c_attn.' in name:
                tensor = _interleave_heads(tensor, config)
            yield name, tensor[:config.block_size] if name == 'transformer.wpe.weight' else tensor
    return read()


def write(folder, config, state_dict, dtype=torch.float32, eot_id=None):
    """Write `state_dict` of model.Model(config) as a Hugging Face folder: config.json, model.safetensors, generation_config.json.

    eot_id: id that ends a text, or None. Raises ConfigError where no architecture computes this model.
    """
    from safetensors.torch import save_file
    kind = family(config)
    theirs = {}
    for name, targets, transpose in name_map(kind, config):
        # a GPT-2 without biases is the same as one whose biases are zero
        tensor = state_dict[name] if name in state_dict else torch.zeros(state_dict[name.replace('.bias', '.weight')].size(0))
        if kind == 'gpt_neox' and '.c_attn.' in name:
            tensor = _interleave_heads(tensor, config, back=True)
        q, kv = config.n_head * config.head_dim, config.num_key_value_heads * config.head_dim
        sizes = {1: [tensor.size(0)], 2: [config.d_ff] * 2, 3: [q, kv, kv]}[len(targets)]
        for target, part in zip(targets, tensor.split(sizes)):
            theirs[target] = (part.t() if transpose else part).to(dtype).contiguous()
    os.makedirs(folder, exist_ok=True)
    save_file(theirs, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})
    for file, content in (('config.json', _hf_config(kind, config, dtype, eot_id)),
                          ('generation_config.json', {'bos_token_id': eot_id, 'eos_token_id': eot_id})):
        with open(os.path.join(folder, file), 'w') as f:
            json.dump(content, f, indent=2)


def _hf_config(kind, config: ModelConfig, dtype, eot_id):
    activation = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[config.activation]
    common = dict(model_type=kind, vocab_size=config.vocab_size, tie_word_embeddings=config.weight_tying,
                  torch_dtype=str(dtype).removeprefix('torch.'), bos_token_id=eot_id, eos_token_id=eot_id)
    if kind == 'gpt2':
        return dict(common, architectures=['GPT2LMHeadModel'], n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
                    n_inner=config.d_ff, n_positions=config.block_size, activation_function=activation, layer_norm_epsilon=config.norm_eps,
                    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    common.update(num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, hidden_size=config.n_embd, intermediate_size=config.d_ff,
                  max_position_embeddings=config.block_size, hidden_act=activation, rope_theta=config.rope_theta)
    if kind == 'gpt_neox':
        return dict(common, architectures=['GPTNeoXForCausalLM'], layer_norm_eps=config.norm_eps, rotary_pct=config.rotary_pct,
                    rotary_emb_base=config.rope_theta, use_parallel_residual=config.parallel_residual, attention_bias=True)
    common.update(num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
                  attention_bias=config.bias)
    if kind == 'qwen3':
        return dict(common, architectures=['Qwen3ForCausalLM'])
    return dict(common, architectures=['LlamaForCausalLM'], mlp_bias=config.bias)
