"""
SlimPajama-627B in GPT-2's tokens: its .jsonl.zst files of train, and its own validation split.

    python data/slimpajama_627b_gpt2/prepare.py --limit 100000                     # try it first
    python data/slimpajama_627b_gpt2/prepare.py --input s3://BUCKET/SlimPajama-627B \\
        --shard 1/16 --output /big/slimpajama
    python data/slimpajama_627b_gpt2/prepare.py --merge /big/slimpajama* --output /big/slimpajama
    python train.py config/full_gpt2_1.36b.py --dataset=/big/slimpajama

Each document is closed by <|endoftext|>. The test split is left out. The ids take two bytes each
and lie in some 2,000 files, train_000000.bin and so on, which are read as one.
"""

import functools
import os

from onetrain.prepare import cli, slimpajama

FOLDER = os.path.dirname(os.path.abspath(__file__))

main = functools.partial(slimpajama.prepare, '627b', 'gpt2', __doc__, FOLDER)

if __name__ == '__main__':
    cli.run(main)
