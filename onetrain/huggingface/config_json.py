"""The config.json that transformers reads, from the shape of a model."""

import torch

from onetrain.huggingface.architectures import ACTIVATIONS, ARCHITECTURES
from onetrain.model_config import ModelConfig


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


def config_json(kind: str, config: ModelConfig, dtype: torch.dtype, eot_id: int | None) -> dict:
    """Return the dict of a config.json: kind, a key of ARCHITECTURES; dtype: of the weights, a
    torch.dtype; eot_id: id that ends a text, or None.
    """
    return dict(
        model_type=kind,
        architectures=[
            f'{ARCHITECTURES[kind].name}{"LMHeadModel" if kind == "gpt2" else "ForCausalLM"}'
        ],
        vocab_size=config.vocab_size,
        tie_word_embeddings=config.weight_tying,
        torch_dtype=str(dtype).removeprefix('torch.'),
        bos_token_id=eot_id,
        eos_token_id=eot_id,
        **(_gpt2(config) if kind == 'gpt2' else _shape(kind, config)),
    )


def _activation(config):
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return names[config.activation]


def _gpt2(c):
    return dict(
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        n_inner=c.d_ff,
        n_positions=c.block_size,
        activation_function=_activation(c),
        layer_norm_epsilon=c.norm_eps,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def _shape(kind, c):
    """Return keys of all but GPT-2."""
    dynamic = c.rope_scaling == 'dynamic'
    shape = dict(
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        hidden_size=c.n_embd,
        intermediate_size=c.d_ff,
        max_position_embeddings=c.rope_original_block_size if dynamic else c.block_size,
        hidden_act=_activation(c),
        **_rope_config(kind, c),
    )
    if dynamic:  # starts from max_position_embeddings, while lm-eval asks for this first
        shape.update(n_positions=c.block_size)
    if kind == 'gpt_neox':
        return dict(
            shape,
            layer_norm_eps=c.norm_eps,
            rotary_pct=c.rotary_pct,
            rotary_emb_base=c.rope_theta,
            use_parallel_residual=c.parallel_residual,
            attention_bias=True,
        )
    shape.update(
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.norm_eps,
        attention_bias=c.bias,
    )
    if kind == 'llama':
        shape.update(mlp_bias=c.bias)
    if c.num_experts:
        shape.update(num_experts_per_tok=c.num_experts_per_tok, router_aux_loss_coef=0.0)
        shape.update(_experts(kind, c))
    return shape | _window(kind, c)


def _window(kind, c):
    """Return keys about a sliding window: of the families that have one."""
    types = ['full_attention' if window is None else 'sliding_attention' for window in c.windows]
    if kind in ('mistral', 'mixtral'):
        return dict(sliding_window=c.sliding_window or None)
    if kind == 'qwen3':
        return dict(
            sliding_window=c.sliding_window or None,
            use_sliding_window=bool(c.sliding_window),
            layer_types=types,
            max_window_layers=0,
        )
    if kind == 'qwen3_moe':
        return dict(use_sliding_window=False)
    if kind == 'gpt_oss':
        return dict(sliding_window=c.sliding_window or c.block_size, layer_types=types)
    return {}


def _experts(kind, c):
    """Return keys about the experts."""
    if kind == 'mixtral':
        return dict(num_local_experts=c.num_experts, intermediate_size=c.expert_d_ff)
    if kind == 'gpt_oss':
        return dict(
            num_local_experts=c.num_experts, intermediate_size=c.expert_d_ff, swiglu_limit=7.0
        )
    routing = dict(moe_intermediate_size=c.expert_d_ff, norm_topk_prob=c.norm_topk_prob)
    if kind == 'qwen3_moe':
        return dict(
            routing,
            num_experts=c.num_experts,
            mlp_only_layers=[*range(c.n_dense_layers)],
            decoder_sparse_step=1,
        )
    return dict(
        routing,
        n_routed_experts=c.num_experts,
        n_shared_experts=c.num_shared_experts,
        first_k_dense_replace=c.n_dense_layers,
        n_group=c.n_groups,
        topk_group=c.topk_groups,
        routed_scaling_factor=c.route_scale,
        use_qk_norm=c.qk_norm,
    )
