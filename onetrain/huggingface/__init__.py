"""Hugging Face weights in and out: GPT-2, LLaMA-2/3, Mistral, Qwen3, GPT-NeoX, and the mixtures of
experts Mixtral, Qwen3-MoE, gpt-oss, GLM-4-MoE.

read_settings() gives the keys of a model and read_weights() its tensors under the names of
model.py; write_model() is the way back, so that transformers' from_pretrained() opens the folder.
Only safetensors files are read.
"""

from onetrain.huggingface.architectures import ARCHITECTURES, architecture_of
from onetrain.huggingface.settings import (
    fetch_source,
    is_source,
    read_settings,
    resolve_source,
)
from onetrain.huggingface.weights import (
    count_tensors,
    name_map,
    read_weights,
    require_safetensors,
    upcycled,
    write_model,
)

__all__ = [
    'ARCHITECTURES',
    'architecture_of',
    'count_tensors',
    'fetch_source',
    'is_source',
    'name_map',
    'read_settings',
    'read_weights',
    'require_safetensors',
    'resolve_source',
    'upcycled',
    'write_model',
]
