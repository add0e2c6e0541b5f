"""How many bytes of text a token stands for, by which losses of different tokenizers can be
compared.
"""

import threading

MOST = 1_000_000  # tokens that are looked at


def bytes_of(ids, tokenizer):
    """Return how many bytes of UTF-8 the token ids, a numpy array, stand for: those that end a text
    for none.
    """
    text = tokenizer.decode(ids if tokenizer.eot_id is None else ids[ids != tokenizer.eot_id])
    return len(text.encode('utf-8', 'replace'))


class TextBytes:
    """Count, in a thread beside the run, the bytes of UTF-8 per target of the evaluation windows of
    `file`.

    file: engine.dataset.Tokens or Mixture; starts: where its windows of block_size tokens begin;
    load: function that returns the tokenizer. A token that ends a text stands for no byte. Of many
    windows every n-th is looked at, so that it takes seconds.
    """

    def __init__(self, file, starts, block_size, load):
        self._mean = None
        every = max(1, len(starts) * block_size // MOST)
        self._thread = threading.Thread(
            target=self._count, args=(file, starts[::every], block_size, load), daemon=True
        )
        self._thread.start()

    def per_token(self, patience=5.0):
        """Return bytes per token, or None where the tokenizer is not to be had or `patience`
        seconds were not enough.
        """
        self._thread.join(patience)
        return self._mean

    def _count(self, file, starts, block_size, load):
        try:
            tokenizer, found = load(), 0
            for first in range(0, len(starts), 16):
                for targets in file.windows(starts[first : first + 16], block_size)[:, 1:].numpy():
                    if (
                        targets.max() >= tokenizer.vocab_size
                    ):  # it is not the tokenizer of this data
                        return
                    found += bytes_of(targets, tokenizer)
            self._mean = found / (len(starts) * block_size) or None
        except (
            Exception
        ):  # whatever a tokenizer's library says: this is a number to look at, not one to train by
            self._mean = None
