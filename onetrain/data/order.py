"""The order in which training reads its data.

The training stream is a fixed sequence of windows of block_size + 1 tokens. Position p, counted in
sequences since the start of training, names a window as a pure function of (seed, p): epoch p // n,
and within it a keyed permutation of the n windows that do not overlap, all shifted by an offset of
that epoch. Nothing is stored and nothing is drawn, so resume is one integer, an epoch shows every
token once (but for less than two windows at the ends), and what a step sees does not depend on the
number of ranks, the micro-batch, evaluation or logging.
"""

import abc
from typing import TYPE_CHECKING

import numpy as np

from onetrain.counter_rng import hash_ints, permute
from onetrain.data.dataset import Mixture, mixture_period

if TYPE_CHECKING:
    from onetrain.data.dataset import Tokens


class Order(abc.ABC):
    """An order of windows. per_epoch: how many there are before any comes again."""

    block_size: int
    per_epoch: int

    @abc.abstractmethod
    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the first token of the windows at `positions`, an int64 array."""

    def starts(self, position: int, count: int) -> np.ndarray:
        """Return the first token of the windows at positions position .. position + count - 1:
        (count,) int64 array.
        """
        return self.at(np.arange(position, position + count, dtype=np.int64))


class WindowOrder(Order):
    """Where the window at each position of the training stream starts.

    n_tokens: tokens in the split; block_size: T, a window is T + 1 tokens and windows start T
    apart.
    """

    def __init__(self, n_tokens: int, block_size: int, seed: int):
        self.block_size, self.seed = block_size, seed
        self.max_offset = min(block_size - 1, n_tokens - 1 - block_size)
        self.per_epoch = (n_tokens - 1 - self.max_offset) // block_size

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the first token of the windows at `positions`, an int64 array."""
        epochs = positions // self.per_epoch
        starts = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            key = hash_ints(self.seed, int(epoch))
            order = permute(positions[here] % self.per_epoch, self.per_epoch, key)
            starts[here] = order * self.block_size + hash_ints(key, 0x0FF5E7) % (
                self.max_offset + 1
            )
        return starts


class MixedOrder(Order):
    """The same for a Mixture. Of each cycle of positions a source gets its share, spread evenly:
    always the one that is furthest behind. Its windows are those of its own order, one after the
    other.
    """

    def __init__(self, mixture: Mixture, block_size: int, seed: int):
        self.block_size = block_size
        self.orders = [WindowOrder(len(source), block_size, seed) for source in mixture.sources]
        self.shares, self.firsts = mixture.shares, mixture.firsts
        cycle = mixture_period(self.shares)
        self.counts = np.array([int(share * cycle) for share in self.shares])
        # whose turn a position of a cycle is, and how many it had
        self.source, self.before = np.empty(cycle, np.int64), np.empty(cycle, np.int64)
        used = np.zeros(len(self.counts), np.int64)
        for turn in range(cycle):
            self.source[turn] = last = np.argmax(self.counts * (turn + 1) - used * cycle)
            self.before[turn] = used[last]
            used[last] += 1
        # an epoch is over when the first source has been read through
        self.per_epoch = int(
            min(order.per_epoch / share for order, share in zip(self.orders, self.shares))
        )

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the first token of the windows at `positions`, an int64 array."""
        source, turn = self.source[positions % len(self.source)], positions // len(self.source)
        within = turn * self.counts[source] + self.before[positions % len(self.source)]
        starts = np.empty(len(positions), np.int64)
        for number, order in enumerate(self.orders):
            here = source == number
            starts[here] = self.firsts[number] + order.at(within[here])
        return starts


def order_of(file: 'Mixture | Tokens', block_size: int, seed: int):
    """Return the order in which training reads a dataset.Tokens or Mixture."""
    return (
        MixedOrder(file, block_size, seed)
        if isinstance(file, Mixture)
        else WindowOrder(len(file), block_size, seed)
    )
