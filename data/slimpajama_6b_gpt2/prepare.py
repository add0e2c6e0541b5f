"""
SlimPajama-6B in GPT-2's tokens: a sample of SlimPajama-627B, with its own validation split.

    python data/slimpajama_6b_gpt2/prepare.py                          # from the Hugging Face hub
    python data/slimpajama_6b_gpt2/prepare.py --input FOLDER  # from its files on this machine
    python train.py config/full_gpt2_1.36b.py

Each document is closed by <|endoftext|>. The test split is left out.
"""

import functools
import os

from onetrain.prepare import cli, slimpajama

FOLDER = os.path.dirname(os.path.abspath(__file__))

main = functools.partial(slimpajama.prepare, '6b', 'gpt2', __doc__, FOLDER)

if __name__ == '__main__':
    cli.run(main)
