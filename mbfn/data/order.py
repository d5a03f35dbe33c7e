"""A pseudo-random order that is computed, not stored: position -> index, a bijection for every key and size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def permuted(positions: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The indices at `positions` of a permutation of `range(size)` named by `(seed, epoch)`.

    A Feistel network on the smallest even-width power of two that holds `size`; values outside walk on along their
    cycle until they fall inside, which keeps it a bijection.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def shuffled(numbers: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """The indices of an endless sequence in which every `size` numbers are one epoch in an order of its own."""
    epochs, positions = np.divmod(numbers, size)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = permuted(positions[chosen], size, seed, int(epoch))
    return indices


def _feistel(
    values: NDArray[np.unsignedinteger], half: int, keys: NDArray[np.unsignedinteger]
) -> NDArray[np.unsignedinteger]:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """Splitmix64's finaliser: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> NDArray[np.unsignedinteger]:
    return np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)
