"""Rotary position encoding (Su et al., "RoFormer", 2021) and its scalings for contexts longer than
the original.

linear    all frequencies divided by the factor (Chen et al., "Position Interpolation", 2023)
dynamic   NTK-aware: a larger theta, the longer the sequence
yarn      high frequencies stay, low ones are divided, and attention is sharpened (Peng et al.,
          "YaRN", 2023)
llama3    the same idea with other borders (Dubey et al., "The Llama 3 Herd of Models", 2024)
"""

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from onetrain.model_config import ModelConfig

SCALINGS = ('linear', 'dynamic', 'yarn', 'llama3')


def inverse_frequencies(c: 'ModelConfig', length: int) -> torch.Tensor:
    """Return (d / 2,) fp32: the angle per position of each pair of the d = c.rotary_dims
    dimensions, for a sequence of `length` tokens (only dynamic depends on it). c:
    ModelConfig.
    """
    d = c.rotary_dims
    theta = c.rope_theta
    factor = c.rope_factor
    original = c.rope_original_block_size
    if c.rope_scaling == 'dynamic' and length > original:
        theta = theta * (factor * length / original - (factor - 1)) ** (d / (d - 2))
    plain = 1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    if c.rope_scaling == 'linear':
        return plain / factor
    if c.rope_scaling == 'yarn':
        low, high = (
            d / 2 * math.log(original / (2 * math.pi * beta)) / math.log(theta)
            for beta in (c.rope_beta_fast, c.rope_beta_slow)
        )
        if c.rope_truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d - 1)
        ramp = ((torch.arange(d // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(
            0, 1
        )
        return plain * (1 - ramp) + plain / factor * ramp
    if c.rope_scaling == 'llama3':
        wavelength = 2 * math.pi / plain
        smooth = (
            (original / wavelength - c.rope_low_freq_factor)
            / (c.rope_high_freq_factor - c.rope_low_freq_factor)
        ).clamp(0, 1)
        return plain * smooth + plain / factor * (1 - smooth)
    return plain


def attention_scaling(c: 'ModelConfig') -> float:
    """Return what cosine and sine are multiplied with: with YaRN 0.1 ln(factor) + 1 unless
    c.rope_attention_factor says otherwise, else 1.
    """
    if c.rope_scaling != 'yarn':
        return 1.0
    return c.rope_attention_factor or (
        0.1 * math.log(c.rope_factor) + 1 if c.rope_factor > 1 else 1.0
    )


def cos_sin_table(c: 'ModelConfig', length: int, size: int | None = None) -> tuple:
    """Return (cos, sin), each (size, d) fp32, of the first `size` positions (None: length) of a
    sequence of `length` tokens, as apply_rotary_emb() takes them: each angle stands at both
    dimensions of its pair, the first sine with a minus.
    """
    angles = torch.outer(
        torch.arange(size or length, dtype=torch.float32), inverse_frequencies(c, length)
    )
    cos, sin = angles.cos() * attention_scaling(c), angles.sin() * attention_scaling(c)
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first d = cos.size(-1) dimensions of each head, halves paired (i, i + d/2) as in
    Hugging Face models.

    x: (B, heads, T, head_dim); cos, sin: (T, d) of cos_sin_table(), or (B, 1, T, d) where each row
    has positions of its own. Computed in fp32, returned in x's dtype.
    """
    d = cos.size(-1)
    part = (x if d == x.size(-1) else x[..., :d]).to(cos.dtype)
    rotated = (part * cos + part.roll(d // 2, -1) * sin).to(x.dtype)
    return rotated if d == x.size(-1) else torch.cat([rotated, x[..., d:]], dim=-1)
