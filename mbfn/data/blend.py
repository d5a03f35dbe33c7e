"""Which of several corpora a row comes from: by weight, as a function of the row's number alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def blended(numbers: NDArray[np.int64], weights: Sequence[float]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each row its corpus, and how many rows of that corpus came before it.

    Row k of corpus d is due at (k + 1/2) / weight, and rows come in the order in which they are due. So of the first n
    rows each corpus has its share of n to within one, for every n, and no index has to be stored.
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    base = np.maximum(0.0, numbers.astype(np.float64) - len(shares) / 2 - 1)  # fewer than `number` rows are due by then
    counts = np.maximum(0, np.floor(shares * base[:, None] + 0.5).astype(np.int64) - 1)
    counts += _due(counts, shares) <= base[:, None]
    counts += _due(counts, shares) <= base[:, None]
    left = numbers - counts.sum(axis=1)
    rows = np.arange(len(numbers))
    corpus = _due(counts, shares).argmin(axis=1)
    while (walking := left > 0).any():
        counts[rows[walking], corpus[walking]] += 1
        left = left - walking
        corpus = _due(counts, shares).argmin(axis=1)
    return corpus.astype(np.int64), counts[rows, corpus]


def split_bounds(count: int, split: Sequence[float]) -> list[tuple[int, int]]:
    """The documents of each share of a corpus, as Megatron cuts them: bounds rounded to whole documents."""
    shares = np.asarray([*split, *([0.0] * (3 - len(split)))], dtype=np.float64)
    ends = [0.0]
    for share in (shares / shares.sum()).tolist():
        ends.append(ends[-1] + share)
    places = [round(end * float(count)) for end in ends]
    return list(pairwise(places))


def _due(counts: NDArray[np.int64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    return (counts + 0.5) / shares
