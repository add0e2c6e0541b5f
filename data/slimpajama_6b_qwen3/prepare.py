"""
SlimPajama-6B in Qwen3's tokens: a sample of SlimPajama-627B, with its own validation split.

    hf download Qwen/Qwen3-1.7B-Base --include "tokenizer*" --local-dir qwen3_tokenizer
    python data/slimpajama_6b_qwen3/prepare.py                          # from the Hugging Face hub
    python data/slimpajama_6b_qwen3/prepare.py --input FOLDER  # from its files on this machine
    python train.py config/full_qwen3_1.8b_optimal.py

Each document is closed by the tokenizer's eos. The test split is left out.
"""

import functools
import os

from onetrain.prepare import cli, slimpajama

FOLDER = os.path.dirname(os.path.abspath(__file__))

main = functools.partial(slimpajama.prepare, '6b', 'qwen3', __doc__, FOLDER)

if __name__ == '__main__':
    cli.run(main)
