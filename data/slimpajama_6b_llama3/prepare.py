"""
SlimPajama-6B in LLaMA-3's tokens: a sample of SlimPajama-627B, with its own validation split.

    hf download meta-llama/Llama-3.1-8B --include "tokenizer*" --local-dir llama3_tokenizer
    python data/slimpajama_6b_llama3/prepare.py                          # from the Hugging Face hub
    python data/slimpajama_6b_llama3/prepare.py --input FOLDER  # from its files on this machine
    python train.py config/full_llama3_1.5b_optimal.py

Each document is closed by <|end_of_text|>. The test split is left out.
"""

import functools
import os

from onetrain.prepare import cli, slimpajama

FOLDER = os.path.dirname(os.path.abspath(__file__))

main = functools.partial(slimpajama.prepare, '6b', 'llama3', __doc__, FOLDER)

if __name__ == '__main__':
    cli.run(main)
