"""
SlimPajama-6B in LLaMA-3's tokens: a sample of SlimPajama-627B of 5.5 million documents, with its own validation split.

    hf download meta-llama/Llama-3.1-8B --include "tokenizer*" --local-dir llama3_tokenizer
    python data/slimpajama_6b_llama3/prepare.py                          # from the Hugging Face hub
    python data/slimpajama_6b_llama3/prepare.py --input FOLDER           # from its files on this machine
    python train.py config/full_llama3_1.5b_optimal.py

Each document is closed by <|end_of_text|>. The test split is left out.
"""
import os
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(FOLDER)))

from data import command


def main(argv=None):
    """Prepare the data set; argv as in sys.argv[1:]. Raises ValueError for what the user got wrong."""
    parser = command.corpus_parser(__doc__, FOLDER, source=['hf://datasets/DKYoon/SlimPajama-6B'], tokenizer='llama3_tokenizer')
    command.corpus(parser.parse_args(argv), FOLDER, published=True, tokenizer_from='meta-llama/Llama-3.1-8B', eot='<|end_of_text|>', config='config/full_llama3_1.5b_optimal.py')


if __name__ == '__main__':
    command.run(main)
