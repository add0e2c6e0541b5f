"""How many bytes of text a token stands for, by which losses of different tokenizers can be
compared.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from onetrain.tokenizers.base import UNKNOWN, decode_after

if TYPE_CHECKING:
    from onetrain.data.dataset import Mixture, Tokens
    from onetrain.tokenizers.base import Tokenizer

MOST = 1_000_000  # tokens that are looked at


def bytes_of(
    ids: np.ndarray, tokenizer: 'Tokenizer', before: np.ndarray | tuple = ()
) -> int | None:
    """Return how many bytes of UTF-8 the token ids, a numpy array, stand for, or None where one of
    them stands for no token. Those that end a text stand for none.

    before: ids in front of them, for a tokenizer that has no byte_length(): a character that is
    spread over several tokens counts where it ends.
    """
    if ids.max(initial=0) >= tokenizer.vocab_size:
        return None
    ids, before = (np.asarray(part) for part in (ids, before))
    ids, before = ids[ids != tokenizer.eot_id], before[before != tokenizer.eot_id]
    if hasattr(tokenizer, 'byte_length'):
        ids, counts = np.unique(ids, return_counts=True)
        lengths = [tokenizer.byte_length(i) for i in ids.tolist()]
        if None in lengths:
            return None
        return sum(length * count for length, count in zip(lengths, counts.tolist()))
    text = decode_after(tokenizer, before.tolist(), ids.tolist())
    return len(text.rstrip(UNKNOWN).encode('utf-8', 'replace'))


class TextBytes:
    """Count, in a thread beside the run, the bytes of UTF-8 per target of the evaluation windows of
    `file`.

    file: dataset.Tokens or Mixture; starts: where its windows of block_size tokens begin;
    load: function that returns the tokenizer. A token that ends a text stands for no byte. Of many
    windows every n-th is looked at, so that it takes seconds.
    """

    def __init__(
        self, file: 'Mixture | Tokens', starts: np.ndarray, block_size: int, load: Callable
    ):
        self._mean = None
        every = max(1, len(starts) * block_size // MOST)
        self._thread = threading.Thread(
            target=self._count, args=(file, starts[::every], block_size, load), daemon=True
        )
        self._thread.start()

    def per_token(self, patience: float = 5.0) -> float:
        """Return bytes per token, or None where the tokenizer is not to be had or `patience`
        seconds were not enough.
        """
        self._thread.join(patience)
        return self._mean

    def _count(self, file, starts, block_size, load):
        try:
            tokenizer, found, tokens = load(), 0, 0
            for first in range(0, len(starts), 16):
                for row in file.windows(starts[first : first + 16], block_size).numpy():
                    known = 1 if hasattr(tokenizer, 'byte_length') else min(4, block_size // 2)
                    number = bytes_of(row[known:], tokenizer, row[:known])
                    if number is None:  # it is not the tokenizer of this data
                        return
                    found, tokens = found + number, tokens + len(row) - known
            self._mean = found / tokens or None
        # whatever a tokenizer's library says: this is a number to look at, not one to train by
        except Exception:
            self._mean = None
