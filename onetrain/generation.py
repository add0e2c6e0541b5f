"""Text from a model, token by token: which one comes next, and the loop that asks."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from onetrain.config import UserError
from onetrain.ops import kernels
from onetrain.ops.kv_cache import Cache
from onetrain.tokenizers.base import decode_after

if TYPE_CHECKING:
    from model import Model
    from onetrain.tokenizers.base import Tokenizer


def cache_for(
    model: 'Model',
    batch: int,
    size: int,
    dtype: torch.dtype | None = None,
    padding: torch.Tensor | None = None,
    static: bool = False,
    device: torch.device | None = None,
) -> 'Cache':
    """Return a kv_cache.Cache for `batch` rows of up to `size` tokens of `model`. dtype: of its
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


def logits_to_probs(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> torch.Tensor:
    """Return probabilities (B, V) to draw from, for fp32 `logits` (B, V); temperature above 0.

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


def apply_repetition_penalty(
    logits: torch.Tensor, seen: torch.Tensor, penalty: float
) -> torch.Tensor:
    """Return `logits` (B, V) of tokens that occur in `seen` (B, V) bool divided by `penalty` where
    positive, multiplied where negative (Keskar et al., "CTRL", 2019).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def lines_of(path: str, said: str) -> list[str]:
    """Return the prompts of a text file, one on each line. Raises UserError where there is none;
    said: what the user typed before the path.
    """
    return [line for line in text_of(path, said).split('\n') if line.strip()]


def text_of(path: str, said: str) -> str:
    """Return the text of a file in UTF-8. Raises UserError where it cannot be read; said: what
    the user typed before the path.
    """
    if not os.path.isfile(path):
        raise UserError(f'{said}{path}: no such file')
    try:
        with open(path, encoding='utf-8-sig') as f:
            return f.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f'{said}{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at'
            f' {error.start:,}): convert it, for instance with `iconv -f latin1 -t utf-8`'
        ) from None
    except OSError as error:
        raise UserError(f'{said}{path} cannot be read ({error.strerror})') from None


def default_start(tokenizer: 'Tokenizer') -> str:
    """Return the text that samples begin with where nothing else is given: a line end, or the first
    of the characters where they are few and it is not among them.
    """
    characters = getattr(tokenizer, 'stoi', ('\n',))
    return '\n' if '\n' in characters else min(characters)


def prompts_of(start: str, tokenizer: 'Tokenizer', block_size: int) -> list[list]:
    """Return token ids of the key sample_start: of the text, or with FILE:name of each line of a
    file. Raises UserError for what a model of block_size tokens cannot begin with.
    """
    prompts, start = [], default_start(tokenizer) if start == '\n' else start
    for text in (
        lines_of(start[5:], 'sample_start=FILE:') if start.startswith('FILE:') else [start]
    ) or ['']:
        try:
            prompts.append(tokenizer.encode(text).tolist())
        except ValueError as error:
            raise UserError(f'sample_start={text!r}: {error}') from None
        if not 0 < len(prompts[-1]) <= block_size:
            raise UserError(
                f'sample_start={text!r} has {len(prompts[-1])} tokens, expected 1 to'
                f' block_size={block_size}: give the text that samples begin with, or'
                ' --sample_interval=0'
            )
    return prompts


def check_prompts(prompts: list, model: 'Model') -> None:
    """Raise UserError for a prompt (list of ids) that the model cannot begin with."""
    for prompt in prompts:
        if not 0 < len(prompt) <= model.config.block_size:
            raise UserError(
                f'a prompt of {len(prompt)} tokens: expected 1 to {model.config.block_size}, the'
                ' context of this model; shorten it'
            )


def generate(
    model: 'Model',
    prompts: list,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_ids: set[int] | tuple = (),
    generator: torch.Generator | None = None,
    cached: bool = True,
    compiled: bool = False,
    device: torch.device | None = None,
    on_tokens: Callable | None = None,
    interrupted: Callable = lambda: False,
) -> list:
    """Continue each of `prompts` (lists of token ids, not empty, at most block_size long) by up to
    max_new_tokens tokens; returns the new ids, a list for each.

    temperature 0 takes the most likely token. A row ends with the first of stop_ids, which is part
    of it; the loop ends when all rows have or interrupted() is true. on_tokens(ids, alive): called
    with each token of all rows (lists of int and bool). When the context is full, its older half is
    forgotten. cached=False computes all tokens anew for each one, with the same result; compiled:
    torch.compile decoding (CUDA graphs on a GPU); device: where the model computes, if its
    parameters lie elsewhere.
    """
    check_prompts(prompts, model)
    device = device or model.transformer.wte.weight.device
    training = model.training
    model.eval()
    rows = _Rows(model, prompts, max_new_tokens, cached, compiled, device)
    alive = [True] * len(prompts)
    sharded = any(isinstance(p, DTensor) for p in model.parameters())  # FSDP keeps what it gathers
    with (
        contextlib.nullcontext() if compiled else kernels.eager_mode(),
        torch.no_grad() if sharded else torch.inference_mode(),
    ):
        seen = None if repetition_penalty == 1.0 else _tokens_of(prompts, model, device)
        for _ in range(max_new_tokens):
            if interrupted() or not any(alive):
                break
            logits = rows.next_logits().float()  # (B, V)
            if seen is not None:
                logits = apply_repetition_penalty(logits, seen, repetition_penalty)
            if temperature == 0:
                chosen = logits.argmax(dim=-1, keepdim=True)
            else:
                probabilities = logits_to_probs(logits, temperature, top_k, top_p, min_p)
                chosen = torch.multinomial(probabilities, 1, generator=generator)
            if seen is not None:
                seen.scatter_(1, chosen, True)
            tokens = rows.append(chosen)
            if on_tokens is not None:
                on_tokens(tokens, list(alive))
            alive = [living and token not in stop_ids for living, token in zip(alive, tokens)]
    model.train(training)
    new = [row[len(prompt) :] for row, prompt in zip(rows.ids, prompts)]
    return [_until(ids, stop_ids) for ids in new]


def _tokens_of(prompts, model, device):
    """Return (B, V) bool: which tokens each prompt has."""
    shape = len(prompts), model.config.vocab_size
    seen = torch.zeros(shape, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    return seen


def _until(ids, stop_ids):
    """Return the ids up to the first of stop_ids, which is part of them."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in stop_ids), len(ids))]


class _Rows:
    """Texts that grow by a token at a time, all at once. ids: lists of token ids; starts: where the
    part of each begins that the model still sees.
    """

    def __init__(self, model, prompts, max_new_tokens, cached, compiled, device):
        c = model.config
        self.model, self.device, self.context = model, device, c.block_size
        self.ids, self.starts = [list(prompt) for prompt in prompts], [0] * len(prompts)
        self.max_new_tokens = max_new_tokens
        # with dynamic RoPE every key is rotated anew with the length of its row
        self.by_length = (
            c.rope_scaling == 'dynamic'
            and max(map(len, prompts)) + max_new_tokens > c.rope_original_block_size
        )
        self.cached = cached and not self.by_length
        self.static = compiled and self.cached
        self.cache = self.chosen = None  # of all tokens but the last, and the last (B, 1)
        self.decode = _read
        if compiled:
            mode = 'reduce-overhead' if device.type == 'cuda' else None
            self.decode = torch.compile(_read, mode=mode, fullgraph=True)

    def next_logits(self):
        """Return the logits (B, V) after the rows as they are."""
        self._forget()
        if self.by_length:
            return torch.cat([self._logits([ids]) for ids in self._visible()])
        if self.cache is None:
            return self._logits(self._visible())
        return self.decode(self.model, self.chosen, self.cache)

    def append(self, chosen):
        """Add a token (B, 1) to each row; returns them as a list."""
        tokens = chosen[:, 0].tolist()
        for row, token in zip(self.ids, tokens):
            row.append(token)
        self.chosen = chosen
        if not self.cached:
            self.cache = None
        return tokens

    def _visible(self):
        return [row[start:] for row, start in zip(self.ids, self.starts)]

    def _forget(self):
        """Drop the older half of the context where it is full."""
        lengths = [len(row) - start for row, start in zip(self.ids, self.starts)]
        if max(lengths) > self.context:
            self.starts = [
                len(row) - max(1, self.context // 2) if length > self.context else start
                for row, start, length in zip(self.ids, self.starts, lengths)
            ]
            self.cache = None

    def _logits(self, visible):
        """Read the lists `visible` from their beginnings, padded on the left, into a new cache."""
        widest = max(map(len, visible))
        padding = [widest - len(ids) for ids in visible]
        idx = torch.tensor([[0] * n + ids for n, ids in zip(padding, visible)], device=self.device)
        self.cache = cache_for(
            self.model,
            len(visible),
            min(self.context, widest + self.max_new_tokens) if self.cached else widest,
            padding=torch.tensor(padding, device=self.device) if any(padding) else None,
            static=self.static,
            device=self.device,
        )
        return _read(self.model, idx, self.cache)


def _read(model, idx, cache):
    """Return logits (B, V) after the (B, T) tokens idx, which the cache takes up."""
    return model(idx, last_only=True, cache=cache)[:, -1]


def _end_of(text, stop):
    """Return where the first of the strings `stop` begins in a text, its length without one."""
    return min((at for at in (text.find(word) for word in stop) if at >= 0), default=len(text))


def encode_prompt(text: str, tokenizer: 'Tokenizer') -> list[int]:
    """Return token ids of a prompt; an empty one is the end of the text before."""
    ids = tokenizer.encode(text).tolist()
    if not ids and tokenizer.eot_id is None:
        raise UserError(
            '--start is empty, and this tokenizer has no end-of-text token to start from: give some'
            ' text'
        )
    return ids or [tokenizer.eot_id]


def continue_texts(
    model: 'Model | None',
    tokenizer: 'Tokenizer',
    prompts: list[list],
    max_new_tokens: int,
    *,
    stop: Sequence[str] = (),
    ignore_eot: bool = False,
    show: Callable | None = None,
    **how,
) -> list[str]:
    """Return what the model writes after each of `prompts` (lists of ids), as texts: each ends
    before the first of the strings `stop`, or with the end of text unless ignore_eot. show: called
    with more and more of the first. how: as generate() takes it.
    """
    eot = {tokenizer.eot_id} - {None}
    written, shown = [[] for _ in prompts], 0

    def text_of(row):
        """Return what the new tokens of a row add to its prompt, without the end of text."""
        ids = written[row]
        return decode_after(
            tokenizer, prompts[row], ids[:-1] if ids and ids[-1] in eot and not ignore_eot else ids
        )

    def finished(row):
        if eot & {*written[row][-1:]} and not ignore_eot:
            return True
        return bool(stop) and _end_of(text := text_of(row), stop) < len(text)

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
                _end_of(text, stop),
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
    texts = [text[: _end_of(text, stop)] for text in map(text_of, range(len(prompts)))]
    if show is not None and len(texts[0]) > shown:
        show(texts[0][shown:])
    return texts
