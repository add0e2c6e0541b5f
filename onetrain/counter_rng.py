"""Random numbers that are a function of their counters: the same on any number of processes."""

import numpy as np

_MASK = 2**64 - 1


def hash_ints(*numbers) -> int:
    """Return a 64-bit hash of integers (the finaliser of SplitMix64, chained). Python ints in,
    Python int out.
    """
    h = 0
    for number in numbers:
        h = (h + number + 0x9E3779B97F4A7C15) & _MASK
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _MASK
        h ^= h >> 31
    return h


def _hash_array(x, key):
    """Return the same hash for a uint64 array `x` under one key."""
    x = x + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Keyed permutation of 0..n-1, elementwise and in O(1) memory.

    index: (k,) int64 array of values in [0, n). Returns a (k,) int64 array; over all of 0..n-1 it
    is a bijection. A Feistel network over a grid of a x b >= n cells (a, b close to sqrt(n)); what
    lands on one of the few cells beyond n walks on along its cycle (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002).
    """
    a = int(np.ceil(np.sqrt(n)))
    b = -(-n // a)
    keys = [hash_ints(key, r) for r in range(8)]

    def feistel(x):
        left, right = x // np.uint64(b), x % np.uint64(b)
        for r, round_key in enumerate(keys):
            if r % 2 == 0:
                left = (left + _hash_array(right, round_key) % np.uint64(a)) % np.uint64(a)
            else:
                right = (right + _hash_array(left, round_key) % np.uint64(b)) % np.uint64(b)
        return left * np.uint64(b) + right

    x = feistel(np.asarray(index).astype(np.uint64))
    while (beyond := x >= n).any():
        x[beyond] = feistel(x[beyond])
    return x.astype(np.int64)
