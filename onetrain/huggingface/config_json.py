"""The config.json that transformers reads, from the shape of a model."""

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


def config_json(kind, config: ModelConfig, dtype, eot_id):
    activation = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.activation]
    common = dict(
        model_type=kind,
        architectures=[
            f'{ARCHITECTURES[kind].name}{"LMHeadModel" if kind == "gpt2" else "ForCausalLM"}'
        ],
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
