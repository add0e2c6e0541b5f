"""Generation: the cache of keys and values changes no token, in any family; what is drawn obeys its
limits.
"""

import pytest
import torch

from model import Model
from onetrain.config import UserError
from onetrain.generation import apply_repetition_penalty, generate, logits_to_probs
from onetrain.model_config import resolve_shape

FAMILIES = {
    'gpt2': dict(arch_preset='gpt2', bias=True),
    'llama3': dict(arch_preset='llama3', num_key_value_heads=2),
    'qwen3': dict(arch_preset='qwen3', head_dim=10),
    'neox': dict(arch_preset='neox'),
    'post': dict(arch_preset='llama', norm_position='post', position_encoding='learned_absolute'),
    'moe': dict(arch_preset='moe', num_experts=4, expert_d_ff=16),
    'mixtral sliding': dict(arch_preset='mixtral', num_experts=4, expert_d_ff=16, sliding_window=5),
    'window of one': dict(arch_preset='llama', sliding_window=1, window_pattern='SL'),
    'gpt_oss': dict(
        arch_preset='gpt_oss',
        num_experts=4,
        num_experts_per_tok=2,
        d_ff=16,
        sliding_window=6,
        rope_factor=4.0,
        rope_original_block_size=16,
    ),
    'llama dynamic': dict(
        arch_preset='llama', rope_scaling='dynamic', rope_factor=2.0, rope_original_block_size=20
    ),
}
# batched, they are padded at the left
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12, 13, 14, 15], [3]]


def build(name, **changes):
    model = Model(
        resolve_shape(
            {
                **dict(n_layer=4, n_head=4, n_embd=32, block_size=48, vocab_size=97),
                **FAMILIES[name],
                **changes,
            }
        )
    )
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():  # so that what is likely changes from token to token
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.25)
    return model.eval()


def written_out(model, prompt, n):
    """Greedy tokens by the definition: the whole text through the model, again for each."""
    row = list(prompt)
    for _ in range(n):
        row.append(model(torch.tensor([row]))[0, -1].argmax().item())
    return row[len(prompt) :]


@pytest.mark.parametrize('name', FAMILIES)
def test_cached_equals_the_whole_text_read_anew(name):
    model = build(name)
    together = generate(model, PROMPTS, 36, temperature=0)
    assert len({*together[0], *together[1]}) > 3
    for prompt, tokens in zip(PROMPTS, together):
        assert (
            tokens
            == written_out(model, prompt, 36)
            == generate(model, [prompt], 36, temperature=0)[0]
        )


@pytest.mark.parametrize('name', ['gpt2', 'mixtral sliding'])
def test_a_full_context_forgets_its_older_half(name):
    model = build(name)
    tokens = generate(model, PROMPTS, 110, temperature=0)
    assert tokens == generate(model, PROMPTS, 110, temperature=0, cached=False)
    # each row by itself
    assert tokens == [generate(model, [prompt], 110, temperature=0)[0] for prompt in PROMPTS]
    row, read = PROMPTS[2] + tokens[2], []
    model.register_forward_pre_hook(lambda module, args: read.append(args[0].tolist()[0]))
    generate(model, PROMPTS[2:], 110, temperature=0)
    # the 49th token did not fit
    assert [len(text) for text in read if len(text) > 1] == [24] * 3 and read[48] == row[25:49]


def test_compiled_decoding_writes_the_same():
    model = build('gpt_oss')
    assert generate(model, PROMPTS[:2], 12, temperature=0, compiled=True) == generate(
        model, PROMPTS[:2], 12, temperature=0
    )


@pytest.mark.parametrize('family', ['gpt2', 'llama3'])
def test_decoding_is_compiled_once(family):
    """Not for each token: no number of Python's that grows is part of what is compiled, and the
    cache stays at its addresses, as CUDA graphs need.
    """
    model = build(family)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert len(generate(model, PROMPTS[:2], 12, temperature=0, compiled=True)[0]) == 12


@pytest.mark.parametrize('name', ('gpt2', 'llama3', 'moe', 'gpt_oss'))
def test_weights_in_the_dtype_of_the_matmuls_change_nothing(name):
    model = build(name)
    idx, counts = torch.tensor([PROMPTS[1]]), model.parameter_counts()['total']
    with torch.autocast('cpu', dtype=torch.bfloat16), torch.no_grad():
        expected = model(idx)
        model.cast_matmuls(torch.bfloat16)
        assert torch.equal(model(idx), expected)
    low = {p.dtype for name, p in model.named_parameters() if 'c_fc' in name or 'lm_head' in name}
    assert low == {torch.bfloat16}
    assert model.transformer.wte.weight.dtype == torch.float32
    assert model.parameter_counts()['total'] == counts


def test_a_window_keeps_no_more_than_it_looks_back_on():
    from onetrain.generation import cache_for

    cache = cache_for(build('gpt_oss'), 2, 40)
    assert [k.size(2) for k in cache.keys] == [5, 40, 5, 40] and cache.keys[0].shape[:2] == (2, 4)
    assert cache_for(build('llama3'), 1, 40).keys[0].size(1) == 2  # as many heads as keys have


def test_rows_end_by_themselves_and_the_loop_with_the_last():
    model = build('llama3')
    free = generate(model, PROMPTS, 30, temperature=0)
    stop = free[0][4]
    seen = []
    ended = generate(
        model,
        PROMPTS,
        30,
        temperature=0,
        stop_ids={stop},
        on_tokens=lambda ids, alive: seen.append((ids, alive)),
    )
    for whole, part in zip(free, ended):
        assert part == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    assert (
        len(seen) == max(map(len, ended))
        and all(len(ids) == 3 for ids, _ in seen)
        and seen[0][1] == [True] * 3
    )
    assert len(generate(model, PROMPTS, 30, interrupted=lambda: len(seen) > 0)[0]) == 0


def test_draws_repeat_with_their_seed():
    model = build('qwen3')
    draws = [
        generate(model, PROMPTS, 12, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert generate(model, PROMPTS, 12, top_k=1) == generate(model, PROMPTS, 12, temperature=0)
    assert model.training is False and build('qwen3').train().training


def test_training_mode_is_given_back():
    model = build('gpt2').train()
    generate(model, PROMPTS, 2)
    assert model.training


def test_likely():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    assert (
        logits_to_probs(logits, top_k=1).tolist() == [[1, 0, 0, 0]]
        and (logits_to_probs(logits, top_p=0.6) > 0).sum() == 2
    )
    assert logits_to_probs(logits, top_p=0.1).tolist() == [[1, 0, 0, 0]]
    assert torch.allclose(logits_to_probs(logits, top_p=1.0, top_k=9, min_p=0.0), logits.exp())
    assert (logits_to_probs(logits, min_p=0.3) > 0).tolist() == [[True, True, True, False]] and (
        logits_to_probs(logits, min_p=0.5) > 0
    ).sum() == 1
    assert torch.allclose(logits_to_probs(logits, temperature=0.5), (2 * logits).softmax(-1))


def test_repetition_is_penalized():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    assert apply_repetition_penalty(logits, torch.tensor([[True, True, False]]), 2.0).tolist() == [
        [1.0, -4.0, 1.0]
    ]
    model = build('llama3')
    plain, penalty = (
        generate(model, PROMPTS[:1], 30, temperature=0, repetition_penalty=p)[0] for p in (1.0, 5.0)
    )
    assert len({*penalty}) > len({*plain}) and not {*penalty[:20]} & {*PROMPTS[0]}


@pytest.mark.parametrize('prompt', [[], list(range(49))])
def test_prompts_that_do_not_fit_are_told(prompt):
    with pytest.raises(UserError, match=f'a prompt of {len(prompt)} tokens: expected 1 to 48'):
        generate(build('gpt2'), [prompt], 3)
