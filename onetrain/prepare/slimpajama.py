"""SlimPajama and its sample of 6 billion tokens, for the eight data sets made of them: one for each
size and tokenizer.
"""

from typing import NamedTuple

from onetrain.prepare import cli

SOURCES = {
    '6b': 'hf://datasets/DKYoon/SlimPajama-6B',
    '627b': 'hf://datasets/cerebras/SlimPajama-627B',
}


class Family(NamedTuple):
    """tokenizer: default of --tokenizer; tokenizer_from: where the hub has it; eot: how the token
    that ends its texts must be written; config: the recipe.
    """

    tokenizer: str
    tokenizer_from: str | None
    eot: str | None
    config: str


FAMILIES = {
    'gpt2': Family('gpt2', None, '<|endoftext|>', 'config/full_gpt2_1.36b.py'),
    'llama': Family(
        'llama2_tokenizer', 'meta-llama/Llama-2-7b-hf', '</s>', 'config/full_llama_1.36b.py'
    ),
    'llama3': Family(
        'llama3_tokenizer',
        'meta-llama/Llama-3.1-8B',
        '<|end_of_text|>',
        'config/full_llama3_1.5b_optimal.py',
    ),
    'qwen3': Family(
        'qwen3_tokenizer', 'Qwen/Qwen3-1.7B-Base', None, 'config/full_qwen3_1.8b_optimal.py'
    ),
}


def prepare(
    size: str, family: str, docstring: str, folder: str, argv: list[str] | None = None
) -> None:
    """Prepare the data set of `size`, a key of SOURCES, in the tokens of `family`, a key of
    FAMILIES, with the split of the source; that of 627b in a file for each part. docstring, folder:
    of the script; argv as in sys.argv[1:]. Raises UserError for what the user got wrong.
    """
    tokenizer, tokenizer_from, eot, config = FAMILIES[family]
    parser = cli.corpus_parser(docstring, folder, source=[SOURCES[size]], tokenizer=tokenizer)
    if size == '627b':
        parser.set_defaults(sharded=True)
    cli.prepare_corpus(
        parser.parse_args(argv),
        folder,
        published=True,
        tokenizer_from=tokenizer_from,
        eot=eot,
        config=config,
    )
