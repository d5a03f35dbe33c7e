"""Rows of a batch: what is read, what is to be predicted, how much each prediction counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Rows:
    """R rows of S positions. `segments` are the lengths of the samples that a packed row holds; they add up to S."""

    tokens: NDArray[np.int64]  # (R, S)
    labels: NDArray[np.int64]  # (R, S)
    loss_mask: NDArray[np.float32]  # (R, S) weights of the predictions
    position_ids: NDArray[np.int64]  # (R, S)
    segments: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Tokens that belong together, and how much the prediction of each counts."""

    tokens: NDArray[np.integer]  # (N,)
    weights: NDArray[np.floating]  # (N,), of which the first is never predicted

    @property
    def positions(self) -> int:
        """Places of a row that the sample takes."""
        return max(0, len(self.tokens) - 1)


def rows_of_windows(windows: NDArray[np.int64]) -> Rows:
    """Every token but the last is read, every one but the first predicted.

    Shapes: windows (R, S + 1) -> Rows (R, S)
    """
    tokens, labels = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return Rows(
        tokens=tokens,
        labels=labels,
        loss_mask=np.ones(tokens.shape, dtype=np.float32),
        position_ids=np.ascontiguousarray(positions),
    )


def rows_of_samples(bins: Sequence[Sequence[Sample]], length: int, *, pack: bool, multiple: int = 1) -> Rows:
    """One row for each bin of samples, padded at the end with token 0 and weight 0.

    With `pack` each sample starts at a multiple of `multiple` with positions from 0, and `segments` says where;
    what is left of a row is a segment of its own. Without, a bin holds one sample.
    """
    shape = (len(bins), length)
    tokens, labels, positions = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    mask, segments = np.zeros(shape, dtype=np.float32), []
    for row, samples in enumerate(bins):
        lengths = [padded(sample.positions, multiple) for sample in samples]
        lengths += [left] if (left := length - sum(lengths)) else []
        start = 0
        for sample, taken in zip(samples, lengths, strict=False):
            stop = start + sample.positions
            tokens[row, start:stop] = sample.tokens[:-1]
            labels[row, start:stop] = sample.tokens[1:]
            mask[row, start:stop] = sample.weights[1:]
            start += taken
        positions[row] = np.concatenate([np.arange(taken) for taken in lengths]) if pack else np.arange(length)
        segments.append(tuple(lengths))
    return Rows(
        tokens=tokens,
        labels=labels,
        loss_mask=mask,
        position_ids=positions,
        segments=tuple(segments) if pack else None,
    )


def padded[T: (int, np.ndarray)](length: T, multiple: int) -> T:
    """`length` rounded up to a multiple."""
    return -(-length // multiple) * multiple
