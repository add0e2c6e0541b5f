"""Text from a model, token by token: which one comes next, and the loop that asks."""

import contextlib
import os

import torch
from torch.distributed.tensor import DTensor

from onetrain.config import ConfigError
from onetrain.ops import kernels
from onetrain.ops.kv_cache import Cache
from onetrain.tokenizers.base import decode_after


def cache_for(model, batch, size, dtype=None, padding=None, static=False, device=None):
    """A kv_cache.Cache for `batch` rows of up to `size` tokens of `model`. dtype: of its
    matmuls; None: float32, or autocast's. device: where it computes, None: where its parameters
    are.
    """
    c, device = model.config, device or model.transformer.wte.weight.device
    if dtype is None:
        dtype = (
            torch.get_autocast_dtype(device.type)
            if torch.is_autocast_enabled(device.type)
            else torch.float32
        )
    return Cache(
        c.windows, batch, c.num_key_value_heads, c.head_dim, size, device, dtype, padding, static
    )


def likely(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Probabilities (B, V) to draw from, for fp32 `logits` (B, V); temperature above 0.

    top_k keeps the k most likely tokens; top_p the fewest whose probability adds up to at least p
    (nucleus sampling, Holtzman et al., 2019); min_p those at least that fraction as likely as the
    likeliest (Nguyen et al., 2024). The most likely token always stays.
    """
    # no temperature makes them infinite
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float('-inf'))
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = probabilities.cumsum(dim=-1) - probabilities >= top_p
        beyond[:, 0] = False
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), float('-inf'))
    probabilities = logits.softmax(dim=-1)
    if min_p is not None:
        probabilities = probabilities.masked_fill(
            probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), 0.0
        )
    return probabilities


def penalised(logits, seen, penalty):
    """`logits` (B, V) of tokens that occur in `seen` (B, V) bool divided by `penalty` where
    positive, multiplied where negative (Keskar et al., "CTRL", 2019).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def lines_of(path, said):
    """The prompts of a text file, one on each line. Raises ConfigError where there is none; said:
    what the user typed before the path.
    """
    return [line for line in text_of(path, said).split('\n') if line.strip()]


def text_of(path, said):
    """The text of a file in UTF-8. Raises ConfigError where it cannot be read; said: what the user
    typed before the path.
    """
    if not os.path.isfile(path):
        raise ConfigError(f'{said}{path}: no such file')
    try:
        with open(path, encoding='utf-8-sig') as f:
            return f.read()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f'{said}{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at'
            f' {error.start:,}): convert it, for instance with `iconv -f latin1 -t utf-8`'
        ) from None
    except OSError as error:
        raise ConfigError(f'{said}{path} cannot be read ({error.strerror})') from None


def default_start(tokenizer):
    """Return the text that samples begin with where nothing else is given: a line end, or the first
    of the characters where they are few and it is not among them.
    """
    characters = getattr(tokenizer, 'stoi', ('\n',))
    return '\n' if '\n' in characters else min(characters)


def prompts_of(start, tokenizer, block_size):
    """Token ids of the key sample_start: of the text, or with FILE:name of each line of a file.
    Raises ConfigError for what a model of block_size tokens cannot begin with.
    """
    prompts, start = [], default_start(tokenizer) if start == '\n' else start
    for text in (
        lines_of(start[5:], 'sample_start=FILE:') if start.startswith('FILE:') else [start]
    ) or ['']:
        try:
            prompts.append(tokenizer.encode(text).tolist())
        except ValueError as error:
            raise ConfigError(f'sample_start={text!r}: {error}') from None
        if not 0 < len(prompts[-1]) <= block_size:
            raise ConfigError(
                f'sample_start={text!r} has {len(prompts[-1])} tokens, expected 1 to'
                f' block_size={block_size}: give the text that samples begin with, or'
                ' --sample_interval=0'
            )
    return prompts


def check_prompts(prompts, model):
    """Raise ConfigError for a prompt (list of ids) that the model cannot begin with."""
    for prompt in prompts:
        if not 0 < len(prompt) <= model.config.block_size:
            raise ConfigError(
                f'a prompt of {len(prompt)} tokens: expected 1 to {model.config.block_size}, the'
                ' context of this model; shorten it'
            )


def generate(
    model,
    prompts,
    max_new_tokens,
    *,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=1.0,
    stop_ids=(),
    generator=None,
    cached=True,
    compiled=False,
    device=None,
    on_tokens=None,
    interrupted=lambda: False,
):
    """Continue each of `prompts` (lists of token ids, not empty, at most block_size long) by up to
    max_new_tokens tokens; returns the new ids, a list for each.

    temperature 0 takes the most likely token. A row ends with the first of stop_ids, which is part
    of it; the loop ends when all rows have or interrupted() is true. on_tokens(ids, alive): called
    with each token of all rows (lists of int and bool). When the context is full, its older half is
    forgotten. cached=False computes all tokens anew for each one, with the same result; compiled:
    torch.compile decoding (CUDA graphs on a GPU); device: where the model computes, if its
    parameters lie elsewhere.
    """
    c, device = model.config, device or model.transformer.wte.weight.device
    check_prompts(prompts, model)
    # every key turns anew with the length of its row
    by_length = (
        c.rope_scaling == 'dynamic'
        and max(map(len, prompts)) + max_new_tokens > c.rope_original_block_size
    )
    cached = cached and not by_length
    training = model.training
    model.eval()
    rows, alive = [list(prompt) for prompt in prompts], [True] * len(prompts)
    read = chosen = None  # the state of reading, and the last tokens
    decode = (
        torch.compile(
            _read, mode='reduce-overhead' if device.type == 'cuda' else None, fullgraph=True
        )
        if compiled
        else _read
    )
    begins = [0] * len(rows)  # what lies before is forgotten
    sharded = any(isinstance(p, DTensor) for p in model.parameters())  # FSDP keeps what it gathers
    with (
        contextlib.nullcontext() if compiled else kernels.eager_mode(),
        torch.no_grad() if sharded else torch.inference_mode(),
    ):
        seen = None
        if repetition_penalty != 1.0:
            seen = torch.zeros(len(rows), c.vocab_size, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                seen[row, prompt] = True
        for _ in range(max_new_tokens):
            if interrupted() or not any(alive):
                break
            widest = max(len(row) - begin for row, begin in zip(rows, begins))
            if widest > c.block_size:
                begins = [
                    (
                        len(row) - max(1, c.block_size // 2)
                        if len(row) - begin > c.block_size
                        else begin
                    )
                    for row, begin in zip(rows, begins)
                ]
                widest, read = max(len(row) - begin for row, begin in zip(rows, begins)), None
            if by_length:
                logits = torch.cat(
                    [
                        _read(
                            model,
                            torch.tensor([row[begin:]], device=device),
                            cache_for(model, 1, len(row) - begin, device=device),
                        )
                        for row, begin in zip(rows, begins)
                    ]
                )
            elif read is None:
                padding = torch.tensor(
                    [widest - len(row) + begin for row, begin in zip(rows, begins)], device=device
                )
                idx = torch.tensor(
                    [
                        [0] * (widest - len(row) + begin) + row[begin:]
                        for row, begin in zip(rows, begins)
                    ],
                    device=device,
                )
                padding = padding if padding.any() else None
                room = min(c.block_size, widest + max_new_tokens)
                read = cache_for(
                    model,
                    len(rows),
                    room if cached else widest,
                    padding=padding,
                    static=compiled and cached,
                    device=device,
                )
                logits = _read(model, idx, read)
            else:
                logits = decode(model, chosen, read)
            logits = logits.float()
            if not cached:
                read = None
            if seen is not None:
                logits = penalised(logits, seen, repetition_penalty)
            if temperature == 0:
                chosen = logits.argmax(dim=-1, keepdim=True)
            else:
                chosen = torch.multinomial(
                    likely(logits, temperature, top_k, top_p, min_p), 1, generator=generator
                )
            if seen is not None:
                seen.scatter_(1, chosen, True)
            tokens = chosen[:, 0].tolist()
            for row, token in zip(rows, tokens):
                row.append(token)
            if on_tokens is not None:
                on_tokens(tokens, list(alive))
            alive = [living and token not in stop_ids for living, token in zip(alive, tokens)]
    model.train(training)
    new = [row[len(prompt) :] for row, prompt in zip(rows, prompts)]
    ends = [
        next((i + 1 for i, token in enumerate(ids) if token in stop_ids), len(ids)) for ids in new
    ]
    return [ids[:end] for ids, end in zip(new, ends)]


def _read(model, idx, cache):
    """Logits (B, V) after the (B, T) tokens idx, which the cache takes up."""
    return model(idx, last_only=True, cache=cache)[:, -1]


def encode_prompt(text, tokenizer):
    """Token ids of a prompt; an empty one is the end of the text before."""
    ids = tokenizer.encode(text).tolist()
    if not ids and tokenizer.eot_id is None:
        raise ConfigError(
            '--start is empty, and this tokenizer has no end-of-text token to start from: give some'
            ' text'
        )
    return ids or [tokenizer.eot_id]


def continue_texts(
    model, tokenizer, prompts, max_new_tokens, *, stop=(), ignore_eot=False, show=None, **how
):
    """What the model writes after each of `prompts` (lists of ids), as texts: each ends before the
    first of the strings `stop`, or with the end of text unless ignore_eot. show: called with more
    and more of the first. how: as generate() takes it.
    """
    eot = {tokenizer.eot_id} - {None}
    written, shown = [[] for _ in prompts], 0

    def end_of(text):
        return min((at for at in (text.find(word) for word in stop) if at >= 0), default=len(text))

    def text_of(row):
        """What the new tokens of a row add to its prompt, without the end of text."""
        ids = written[row]
        return decode_after(
            tokenizer, prompts[row], ids[:-1] if ids and ids[-1] in eot and not ignore_eot else ids
        )

    def finished(row):
        if eot & {*written[row][-1:]} and not ignore_eot:
            return True
        return bool(stop) and end_of(text := text_of(row)) < len(text)

    def on_tokens(tokens, alive):
        nonlocal shown
        for row, (token, living) in enumerate(zip(tokens, alive)):
            if living and not finished(row):
                written[row].append(token)
        if show is not None:
            text = text_of(0)
            # what may be half a character, or the beginning of a stop string, waits
            safe = min(
                len(text.rstrip('\N{REPLACEMENT CHARACTER}')),
                end_of(text),
                len(text) if finished(0) else len(text) - max(map(len, stop), default=1) + 1,
            )
            if safe > shown:
                show(text[shown:safe])
                shown = safe

    generate(
        model,
        prompts,
        max_new_tokens,
        on_tokens=on_tokens,
        stop_ids=() if ignore_eot else eot,
        interrupted=lambda: bool(stop) and all(map(finished, range(len(prompts)))),
        **how,
    )
    texts = [text_of(row) for row in range(len(prompts))]
    texts = [text[: end_of(text)] for text in texts]
    if show is not None and len(texts[0]) > shown:
        show(texts[0][shown:])
    return texts
