"""FLOPs from the structure, peaks of devices, and what follows: model FLOPs utilization (MFU).

Convention: every matmul that runs, forward and backward, per token of training. A linear layer
costs 6 per weight (2 forward, 4 backward; a tied head counts, an embedding lookup does not; of
experts those that a token goes to), attention scores and their product with the values 12 * n_layer
* n_head * head_dim * T, causality not halved (Chowdhery et al., "PaLM", 2022, appendix B). The
causal figure, with half of the attention, stands beside it. torch's FlopCounterMode agrees to the
last FLOP (tests/test_flops.py).
"""

import re
from dataclasses import dataclass

# dense tensor-core peaks in bf16 and fp16, TFLOP/s, from the vendors' data sheets
_PEAKS = [
    # other clocks than the SXM card, and no figure that was checked
    (r'\bH100 (PCIe|NVL)\b|\bH200 NVL\b|\bH800 PCIe\b', None),
    (r'\b(H100|H200|GH200)\b', 989),
    (r'\bB200\b', 2250),
    (r'\bA100\b', 312),
    (r'\bRTX A6000\b|\bA6000\b', 155),
    (r'\bL40S\b', 362),
    (r'\bRTX 4090\b(?! (D|Laptop))', 165),
    (r'\bRTX 3090\b(?! (Ti|Laptop))', 71),
]


def peak_flops(device_name: str | None, dtype: str) -> float | None:
    """Return the dense peak of one device in FLOP/s, or None where it is not known.

    device_name: as torch.cuda.get_device_name says, None for a CPU; dtype: 'bfloat16' | 'float16' |
    'float32' (no figure is kept for float32: it depends on the TF32 setting).
    """
    if device_name is None or dtype not in ('bfloat16', 'float16'):
        return None
    for pattern, tflops in _PEAKS:
        if re.search(pattern, device_name):
            return tflops and tflops * 1e12
    return None


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of training on one token, by part."""

    n_layer: int
    attention: float  # of all layers: projections and scores
    ffn: float
    head: float
    scores: float  # the part that causality could halve

    @property
    def total(self) -> float:
        """FLOPs of one token, forward and backward."""
        return self.attention + self.ffn + self.head

    @property
    def causal(self) -> float:
        """The same without the half of the scores that causality spares."""
        return self.total - self.scores / 2


def per_token(
    weights: dict[str, int], *, n_layer: int, width: int, seen: list[int]
) -> 'TokenFlops':
    """Return TokenFlops of a model. weights: {'attention', 'ffn', 'head'}, numbers of matmul
    weights that a token meets, all layers together; width: n_head * head_dim; seen: for each layer
    the tokens that attention reaches over, the length of the sequence or a window.
    """
    scores = 12 * width * sum(seen)
    return TokenFlops(
        n_layer, 6 * weights['attention'] + scores, 6 * weights['ffn'], 6 * weights['head'], scores
    )


# from iteration to iteration
VARIES = ('mfu', 'mfu_percent', 'mfu_causal', 'flops_achieved', 'tokens_per_sec', 'achieved_tflops')


def utilization(
    flops: 'TokenFlops',
    tokens_per_sec: float,
    *,
    device_name: str | None,
    dtype: str,
    num_devices: int,
    architecture: str,
) -> dict:
    """Return the `mfu` object of the log: achieved FLOP/s of all devices over their summed peak;
    null where no peak is known.
    """
    peak = peak_flops(device_name, dtype)
    achieved = flops.total * tokens_per_sec
    mfu = achieved / (peak * num_devices) if peak else None
    return {
        'mfu': mfu,
        'mfu_percent': mfu and 100 * mfu,
        'mfu_causal': mfu and mfu * flops.causal / flops.total,
        'flops_achieved': achieved,
        'flops_per_token': flops.total,
        'flops_per_token_causal': flops.causal,
        'tokens_per_sec': tokens_per_sec,
        'hardware_peak_flops': peak and peak * num_devices,
        'hardware_peak_tflops': peak and peak * num_devices / 1e12,
        'achieved_tflops': achieved / 1e12,
        'gpu_name': device_name,
        'precision': dtype,
        'num_gpus': num_devices if device_name else 0,
        'attention_flops_per_layer': flops.attention / flops.n_layer,
        'ffn_flops_per_layer': flops.ffn / flops.n_layer,
        'attention_to_ffn_ratio': flops.attention / flops.ffn,
        'architecture': architecture,
    }
