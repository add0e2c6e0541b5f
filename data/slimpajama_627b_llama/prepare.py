"""
SlimPajama-627B in LLaMA-2's tokens: 59,166 .jsonl.zst files of train, and its own validation split.

    hf download meta-llama/Llama-2-7b-hf --include "tokenizer*" --local-dir llama2_tokenizer
    python data/slimpajama_627b_llama/prepare.py --limit 100000                     # try it first
    python data/slimpajama_627b_llama/prepare.py --input s3://BUCKET/SlimPajama-627B --shard 1/16 --output /big/slimpajama
    python data/slimpajama_627b_llama/prepare.py --merge /big/slimpajama* --output /big/slimpajama
    python train.py config/full_llama_1.36b.py --dataset=/big/slimpajama

Each document is closed by </s>. The test split is left out. The ids take two bytes each and lie in files of about 1 GB of text, train_000000.bin
and so on, which are read as one.
"""
import os
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(FOLDER)))

from data import command


def main(argv=None):
    """Prepare the data set; argv as in sys.argv[1:]. Raises ValueError for what the user got wrong."""
    parser = command.corpus_parser(__doc__, FOLDER, source=['hf://datasets/cerebras/SlimPajama-627B'], tokenizer='llama2_tokenizer')
    command.corpus(parser.parse_args(argv), FOLDER, published=True, sharded=True, tokenizer_from='meta-llama/Llama-2-7b-hf', eot='</s>', config='config/full_llama_1.36b.py')


if __name__ == '__main__':
    command.run(main)
