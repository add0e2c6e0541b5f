"""
SlimPajama-627B in LLaMA-3's tokens: its .jsonl.zst files of train, and its own validation split.

    hf download meta-llama/Llama-3.1-8B --include "tokenizer*" --local-dir llama3_tokenizer
    python data/slimpajama_627b_llama3/prepare.py --limit 100000                     # try it first
    python data/slimpajama_627b_llama3/prepare.py --input s3://BUCKET/SlimPajama-627B \\
        --shard 1/16 --output /big/slimpajama
    python data/slimpajama_627b_llama3/prepare.py --merge /big/slimpajama* --output /big/slimpajama
    python train.py config/full_llama3_1.5b_optimal.py --dataset=/big/slimpajama

Each document is closed by <|end_of_text|>. The test split is left out. The ids take four bytes each
and lie in some 2,000 files, train_000000.bin and so on, which are read as one.
"""

import functools
import os

from onetrain.prepare import cli, slimpajama

FOLDER = os.path.dirname(os.path.abspath(__file__))

main = functools.partial(slimpajama.prepare, '627b', 'llama3', __doc__, FOLDER)

if __name__ == '__main__':
    cli.run(main)
