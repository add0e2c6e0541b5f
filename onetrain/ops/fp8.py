"""Matmuls of linear layers in float8, by torchao: weights, inputs and gradients are rounded to 8
bits with one scale per tensor, taken from its largest value when it is used.

Weights, optimizer state and all that is no such matmul keep their dtype.
"""

import importlib.util
import logging
import math
import sys

import torch
from torch import nn

from onetrain.config import UserError


def choose_recipe(dtype: torch.dtype, device: torch.device) -> str:
    """Return what Model takes as float8, 'hardware', or on a CPU 'emulated': the same rounding,
    then a matmul of `dtype`; for experiments, not for speed.

    Raises UserError where it cannot be had. dtype: torch dtype of the matmuls; device:
    torch.device.
    """
    if 'torchao' not in sys.modules and importlib.util.find_spec('torchao') is None:
        raise UserError(
            'fp8=True needs the package torchao: pip install torchao, or type --fp8=False'
        )
    if device.type == 'cpu':
        return 'emulated'
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(
            'fp8=True needs a GPU that multiplies float8 (H100, L40S, RTX 4090 or newer), not'
            f' {torch.cuda.get_device_name(device)}: type --fp8=False'
        )
    if dtype != torch.bfloat16:
        raise UserError(
            'fp8=True takes the place of bfloat16 matmuls, not of'
            f' {str(dtype).removeprefix("torch.")}: type --dtype=bfloat16, or --fp8=False'
        )
    return 'hardware'


def check_tokens(batch_size: int, length: int) -> None:
    """Raise UserError unless micro-steps of batch_size sequences, of `length` tokens on a rank,
    have a multiple of 16 tokens: a gradient of a weight is a matmul over them.
    """
    if batch_size * length % 16:
        multiple = 16 // math.gcd(16, length)
        larger = math.ceil(batch_size / multiple) * multiple
        raise UserError(
            f'fp8=True needs a multiple of 16 tokens per micro-step, not {batch_size * length}'
            f' (batch_size * block_size): type --batch_size={larger}, or --fp8=False'
        )


def gains_from_float8(layer: nn.Module) -> bool:
    """Return whether a torch.nn.Linear gets faster: both sizes are multiples of 16, which the
    kernels ask for, and it is large enough to pay for the rounding (by torchao's table of an H100,
    tensorwise: more than 1024 outputs or 4096 inputs).
    """
    return (
        layer.in_features % 16 == 0
        and layer.out_features % 16 == 0
        and (layer.out_features > 1024 or layer.in_features > 4096)
    )


def convert_to_float8(layers: nn.Module, kind: str) -> int:
    """Replace the torch.nn.Linear within `layers`, a module, that gains_from_float8(); subclasses,
    such as routers, stay. kind: what choose_recipe() returned. Returns how many.

    Names and shapes of parameters stay, so checkpoints do too.
    """
    said = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of kernels for other purposes that it has not found
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    logging.disable(said)
    chosen = {
        module
        for module in layers.modules()
        if type(module) is torch.nn.Linear and gains_from_float8(module)
    }
    convert_to_float8_training(
        layers,
        module_filter_fn=lambda module, name: module in chosen,
        config=Float8LinearConfig(emulate=kind == 'emulated'),
    )
    return len(chosen)
