"""Weights under Hugging Face's names: read from safetensors files, and written to them."""

import dataclasses
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from onetrain.config import UserError
from onetrain.files import parse_json, plain_name, replacing, sentence
from onetrain.huggingface.architectures import architecture_of
from onetrain.huggingface.config_json import config_json

if TYPE_CHECKING:
    from onetrain.model_config import ModelConfig


def name_map(kind: str, config: 'ModelConfig') -> list[tuple]:
    """Return [(our name, [their names], form)]: how theirs make ours, as _join() does and _part()
    undoes.
    """
    rows = {'gpt2': _gpt2_rows, 'gpt_neox': _gpt_neox_rows}.get(kind, _llama_rows)(kind, config)
    if not config.weight_tying:
        head = 'embed_out' if kind == 'gpt_neox' else 'lm_head'
        rows += _rows('lm_head', [head], ('weight',))
    return rows


def _rows(ours, theirs, parts, form='rows'):
    """Return rows of name_map() for the parts, such as weight and bias, of one of our modules."""
    return [
        (
            f'{ours}.{part}',
            [f'{name}.{part}' for name in theirs],
            'rows' if form == 'transposed' and part == 'bias' else form,
        )
        for part in parts
    ]


def _gpt2_rows(kind, config):
    # GPT-2 on the hub always has biases; a model without them is written with zeros
    both = ('weight', 'bias')
    rows = _rows('transformer.wte', ['transformer.wte'], ('weight',))
    rows += _rows('transformer.wpe', ['transformer.wpe'], ('weight',))
    for i in range(config.n_layer):
        h = f'transformer.h.{i}'
        for norm in ('ln_1', 'ln_2'):
            rows += _rows(f'{h}.{norm}', [f'{h}.{norm}'], both)
        for linear in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj'):
            # Conv1D keeps its weight as (in, out)
            rows += _rows(f'{h}.{linear}', [f'{h}.{linear}'], both, 'transposed')
    return rows + _rows('transformer.ln_f', ['transformer.ln_f'], both)


def _gpt_neox_rows(kind, config):
    both = ('weight', 'bias')
    biases = both if config.bias else ('weight',)
    rows = _rows('transformer.wte', ['gpt_neox.embed_in'], ('weight',))
    for i in range(config.n_layer):
        h, theirs = f'transformer.h.{i}', f'gpt_neox.layers.{i}'
        for ours, name in (('ln_1', 'input_layernorm'), ('ln_2', 'post_attention_layernorm')):
            rows += _rows(f'{h}.{ours}', [f'{theirs}.{name}'], both)
        name = f'{theirs}.attention.query_key_value'
        rows += _rows(f'{h}.attn.c_attn', [name], biases, 'by head')
        for ours, name in (
            ('attn.c_proj', 'attention.dense'),
            ('mlp.c_fc', 'mlp.dense_h_to_4h'),
            ('mlp.c_proj', 'mlp.dense_4h_to_h'),
        ):
            rows += _rows(f'{h}.{ours}', [f'{theirs}.{name}'], biases)
    return rows + _rows('transformer.ln_f', ['gpt_neox.final_layer_norm'], both)


def _llama_rows(kind, config):
    """Of LLaMA and all that name their weights as it does."""
    biases = ('weight', 'bias') if config.bias else ('weight',)
    norms = ('weight', 'bias') if config.normalization == 'layernorm' else ('weight',)
    rows = _rows('transformer.wte', ['model.embed_tokens'], ('weight',))
    for i in range(config.n_layer):
        h, theirs = f'transformer.h.{i}', f'model.layers.{i}'
        for ours, name in (('ln_1', 'input_layernorm'), ('ln_2', 'post_attention_layernorm')):
            rows += _rows(f'{h}.{ours}', [f'{theirs}.{name}'], norms)
        if config.qk_norm:
            for norm in ('q_norm', 'k_norm'):
                rows += _rows(f'{h}.attn.{norm}', [f'{theirs}.self_attn.{norm}'], ('weight',))
        if config.attention_sinks:
            rows.append((f'{h}.attn.sinks', [f'{theirs}.self_attn.sinks'], 'rows'))
        rows += _rows(f'{h}.attn.c_attn', [f'{theirs}.self_attn.{x}_proj' for x in 'qkv'], biases)
        rows += _rows(f'{h}.attn.c_proj', [f'{theirs}.self_attn.o_proj'], biases)
        if i in config.expert_layers:
            rows += _expert_rows(kind, config, h, theirs)
        else:
            gate_and_up = [f'{theirs}.mlp.gate_proj', f'{theirs}.mlp.up_proj']
            rows += _rows(f'{h}.mlp.c_fc', gate_and_up, biases)
            rows += _rows(f'{h}.mlp.c_proj', [f'{theirs}.mlp.down_proj'], biases)
    return rows + _rows('transformer.ln_f', ['model.norm'], norms)


def _expert_rows(kind, config, h, theirs):
    """Return rows of name_map() for the mixture of experts of our layer h, their layer theirs."""
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
    """Return our tensor from theirs."""
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
    """Return their tensors, `number` of them, from ours."""
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


def require_safetensors(writing: bool = False) -> None:
    """Raise UserError where the packages that read these files, or write them, are missing."""
    needed = ['safetensors', 'huggingface_hub'] if writing else ['safetensors']
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'Hugging Face folders need {" and ".join(missing)}: pip install {" ".join(missing)}'
        )


def tensors_of(folder: str) -> dict:
    """Return {name: opened safetensors file} of all weights in a folder, from the files that
    transformers reads: model.safetensors, else those of its index.

    Raises UserError where there are none, and for an index that names other files than are there.
    """
    require_safetensors()
    from safetensors import SafetensorError, safe_open

    if os.path.isfile(os.path.join(folder, 'adapter_config.json')):
        raise UserError(
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
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(
                f'{index} is not the index of a model ({type(error).__name__}: {error}): fetch it'
                ' again'
            ) from None
    else:
        raise UserError(
            f'{folder} has no model.safetensors and no model.safetensors.index.json (weights under'
            ' other names and in other formats are not read)'
        )
    holder = {}
    for file in files:
        try:
            opened = safe_open(os.path.join(folder, file), framework='pt')
            names = opened.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(
                f'{os.path.join(folder, file)} is damaged or missing: {error}'
            ) from None
        holder.update(
            {name: opened for name in names if wanted is None or wanted.get(name) == file}
        )
    if wanted is not None and (missing := [name for name in wanted if name not in holder]):
        raise UserError(
            f'{index} says that {missing[0]} is in {wanted[missing[0]]}, which does not hold it:'
            ' fetch the folder again'
        )
    return holder


def count_tensors(folder: str) -> int:
    """Return the number of tensors in the weights of a Hugging Face folder."""
    return len(tensors_of(folder))


def read_weights(folder: str, config: 'ModelConfig') -> Iterable:
    """Return (name, fp32 tensor) for each parameter of model.Model(config), from the safetensors
    files in `folder`: read one at a time as they are asked for.

    A config.block_size below the folder's keeps the first learned positions. Raises UserError,
    before the first, for weights that are missing or left over.
    """
    holder = tensors_of(folder)
    kind = architecture_of(config)
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
            raise UserError(
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
        raise UserError(
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


def upcycled(folder: str, config: 'ModelConfig') -> Iterator:
    """Yield (name, tensor) for each parameter but the routers of a mixture of experts
    Model(config): read_weights() of the dense model in `folder`, each expert a copy.
    """
    dense = dataclasses.replace(config, num_experts=0)
    for name, tensor in read_weights(folder, dense):
        routed = re.match(r'transformer\.h\.(\d+)\.mlp\.', name)
        yield (
            name,
            (
                tensor.expand(config.num_experts, *tensor.shape)
                if routed and int(routed[1]) in config.expert_layers
                else tensor
            ),
        )


def write_model(
    folder: str,
    config: 'ModelConfig',
    state_dict: dict[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    eot_id: int | None = None,
    shard_size: str = '5GB',
) -> None:
    """Write `state_dict` (Model(config).tensors(); more names do no harm) as a Hugging Face folder:
    config.json, generation_config.json and safetensors files of at most shard_size with their
    index.

    eot_id: id that ends a text, or None. Raises UserError where no architecture computes this
    model.
    """
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    kind = architecture_of(config)
    if kind != 'glm4_moe' and any(
        bool(tensor.any()) for name, tensor in state_dict.items() if name.endswith('router.balance')
    ):
        raise UserError(
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
        raise UserError(
            f'the weights could not be written to {folder} ({sentence(error)}): make room and type'
            ' the same command again'
        ) from None
    for name in os.listdir(folder):
        if name.endswith('.safetensors'):
            # the library makes them readable for their owner only
            os.chmod(os.path.join(folder, name), 0o644)
    for file, content in (
        ('config.json', config_json(kind, config, dtype, eot_id)),
        ('generation_config.json', {'bos_token_id': eot_id, 'eos_token_id': eot_id}),
    ):
        with replacing(os.path.join(folder, file), 'w') as f:
            json.dump(content, f, indent=2)
