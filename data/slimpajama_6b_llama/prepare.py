"""
SlimPajama-6B in LLaMA-2's tokens: a sample of SlimPajama-627B, with its own validation split.

    hf download meta-llama/Llama-2-7b-hf --include "tokenizer*" --local-dir llama2_tokenizer
    python data/slimpajama_6b_llama/prepare.py                          # from the Hugging Face hub
    python data/slimpajama_6b_llama/prepare.py --input FOLDER  # from its files on this machine
    python train.py config/full_llama_1.36b.py

Each document is closed by </s>. The test split is left out.
"""

import functools
import os

from onetrain.prepare import cli, slimpajama

FOLDER = os.path.dirname(os.path.abspath(__file__))

main = functools.partial(slimpajama.prepare, '6b', 'llama', __doc__, FOLDER)

if __name__ == '__main__':
    cli.run(main)
