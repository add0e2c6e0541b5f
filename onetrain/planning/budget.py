"""Which model to train for a budget: a grid of shapes, and the loss that a law predicts for each at
the tokens that the budget pays for.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from model import Model
from onetrain.config import UserError
from onetrain.model_config import PRESETS, resolve_shape
from onetrain.planning.scaling_laws import TOKENS_PER_PARAMETER, Law

WIDTHS = range(1024, 7937, 256)
LAYERS = range(16, 63, 2)
HEAD_DIMS = 64, 128
KEY_VALUE_HEADS = 8
NEAR_CHINCHILLA = 0.5, 1.5  # tokens over 20 per parameter
BILLIONS = np.linspace(1e9, 1e12, 100)  # numbers of tokens that the recipes were chosen from
TOLERANCE = 0.02  # of the budget, with which they were


@dataclass(frozen=True)
class Candidate:
    """A shape, and what the budget makes of it.

    flops: of training on `tokens`, all matmuls counted.
    """

    n_layer: int
    n_embd: int
    head_dim: int
    d_ff: int
    parameters: int
    flops_per_token: float
    tokens: float
    loss: float

    @property
    def n_head(self) -> int:
        """Return the number of attention heads."""
        return self.n_embd // self.head_dim

    @property
    def flops(self) -> float:
        """Return the FLOPs of the whole run."""
        return self.flops_per_token * self.tokens

    def describe(self) -> str:
        """Return such as '18L x 2048, head_dim 128, d_ff 7168'."""
        return f'{self.n_layer}L x {self.n_embd}, head_dim {self.head_dim}, d_ff {self.d_ff}'


@dataclass(frozen=True)
class Grid:
    """Shapes of a family that are tried. ratio: d_ff over n_embd, before it is rounded down to a
    multiple of 256; vocab_size None: that of the preset.
    """

    preset: str = 'llama3'
    layers: Sequence[int] = LAYERS
    ratio: float = 3.5
    block_size: int = 2048
    vocab_size: int | None = None

    def shapes(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (n_layer, n_embd, head_dim, d_ff)."""
        for width in WIDTHS:
            for head_dim in HEAD_DIMS:
                if width % head_dim == 0 and width // head_dim % KEY_VALUE_HEADS == 0:
                    for n_layer in self.layers:
                        yield n_layer, width, head_dim, int(self.ratio * width / 256) * 256

    def keys(self, n_layer: int, width: int, head_dim: int, d_ff: int) -> dict:
        """Return the keys of train.py for a shape."""
        return {
            'arch_preset': self.preset,
            'n_layer': n_layer,
            'n_embd': width,
            'n_head': width // head_dim,
            'head_dim': head_dim,
            'num_key_value_heads': KEY_VALUE_HEADS,
            'd_ff': d_ff,
            'block_size': self.block_size,
            'vocab_size': self.vocab_size or PRESETS[self.preset].get('vocab_size'),
            'weight_tying': False,
        }

    def sizes(self) -> dict[tuple, tuple[int, float]]:
        """Return {shape: (parameters, FLOPs per token)}, of models built with two and three layers:
        each further one adds as much.
        """
        found, built = {}, {}
        for n_layer, *rest in self.shapes():
            if tuple(rest) not in built:
                models = [Model.on_meta(resolve_shape(self.keys(n, *rest))) for n in (2, 3)]
                built[tuple(rest)] = [
                    (m.parameter_counts()['total'], m.flops().total) for m in models
                ]
            (n2, f2), (n3, f3) = built[tuple(rest)]
            further = n_layer - 2
            size = n2 + further * (n3 - n2), f2 + further * (f3 - f2)
            found[(n_layer, *rest)] = size
        return found


def candidates(grid: Grid, budget: float, law: Law, chinchilla: bool = False) -> list[Candidate]:
    """Return a Candidate for each shape of the grid, at the tokens that `budget` FLOPs pay for,
    lowest loss first. chinchilla: only those with about 20 tokens per parameter.
    """
    found = [
        _candidate(shape, n, flops, budget / flops, law)
        for shape, (n, flops) in grid.sizes().items()
    ]
    return _sorted(found, chinchilla, budget)


def candidates_of_recipes(
    grid: Grid, budget: float, law: Law, chinchilla: bool = False
) -> list[Candidate]:
    """Return the same as it was done for the recipes of config/: FLOPs by a formula in which
    attention counts n_head / 2 times too much and the head does not, and only numbers of tokens
    that meet the budget within 2 %.
    """
    found = []
    for shape, (n, flops) in grid.sizes().items():
        n_layer, width, head_dim, d_ff = shape
        layer = 4 * width**2 + 4 * width * KEY_VALUE_HEADS * head_dim
        layer += 2 * (width // head_dim) * grid.block_size * width + 6 * width * d_ff
        formula = 3 * (n_layer * layer + width)
        found += [
            _candidate(shape, n, flops, tokens, law)
            for tokens in BILLIONS.tolist()
            if abs(formula * tokens - budget) / budget <= TOLERANCE
        ]
    return _sorted(found, chinchilla, budget)


def _candidate(shape, parameters, flops, tokens, law):
    n_layer, width, head_dim, d_ff = shape
    loss = law.loss(parameters, tokens)
    return Candidate(n_layer, width, head_dim, d_ff, parameters, flops, tokens, loss)


def _sorted(found, chinchilla, budget):
    low, high = NEAR_CHINCHILLA
    if chinchilla:
        found = [
            c for c in found if low <= c.tokens / (TOKENS_PER_PARAMETER * c.parameters) <= high
        ]
    if not found:
        raise UserError(
            f'--budget={budget:g}: no shape of the grid spends it'
            + (' near 20 tokens per parameter' if chinchilla else '')
            + ': the shipped models take about 1e21 FLOPs'
        )
    return sorted(found, key=lambda c: c.loss)


def recipe(grid: Grid, chosen: Candidate, path: str, command: str) -> str:
    """Return the text of a config file for the chosen model. command: that it comes from."""
    keys = grid.keys(chosen.n_layer, chosen.n_embd, chosen.head_dim, chosen.d_ff)
    tokens_per_iter = 256 * grid.block_size
    iterations = max(1, math.ceil(chosen.tokens / tokens_per_iter))
    training = {
        'batch_size': 8,
        'total_batch_size': tokens_per_iter,
        'learning_rate': 3e-4,
        'min_lr': 3e-5,
        'warmup_iters': min(2000, iterations // 10),
        'max_iters': iterations,
        'lr_decay_iters': iterations,
        'eval_interval': 1000,
        'eval_iters': 50,
        'eval_at_start': False,
        'log_interval': 10,
    }
    lines = [
        f'# {chosen.parameters:,} parameters for {chosen.tokens / 1e9:.2f} B tokens:',
        f'# {chosen.flops:.3g} FLOPs, {chosen.loss:.4f} nats per token predicted.',
        '#',
        f'#   {command}',
        '',
        f"out_dir = 'out-{path}'",
        *_dataset(grid.preset),
        '',
        *(f'{key} = {value!r}' for key, value in keys.items()),
        '',
        *(f'{key} = {value!r}' for key, value in training.items()),
    ]
    return '\n'.join(lines) + '\n'


def _dataset(preset):
    names = {'llama3': 'slimpajama_6b_llama3', 'qwen3': 'slimpajama_6b_qwen3'}
    return [f'dataset = {names[preset]!r}'] if preset in names else []


def record(candidate: Candidate) -> dict:
    """Return a Candidate for JSON."""
    return {**dataclasses.asdict(candidate), 'n_head': candidate.n_head, 'flops': candidate.flops}
