"""Random tokens: nothing to read, nothing to learn, the same for the same seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mbfn.config.data import MockData
from mbfn.config.run import RunConfig
from mbfn.data.dataset import Dataset
from mbfn.data.rows import Rows, rows_of_windows
from mbfn.data.tokenizer import open_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Windows of uniformly drawn tokens."""

    seed: tuple[int, ...]
    vocab_size: int
    seq_length: int

    def read(self, numbers: NDArray[np.int64]) -> Rows:
        """The rows of these numbers."""
        drawn = (np.random.default_rng((*self.seed, int(number))) for number in numbers)
        size = self.seq_length + 1
        return rows_of_windows(np.stack([rng.integers(self.vocab_size, size=size, dtype=np.int64) for rng in drawn]))


def open_mock(run: RunConfig, data: MockData) -> Dataset:
    """Noise over the model's vocabulary."""
    train, valid = (
        Noise(seed=(run.train.seed, part), vocab_size=run.model.vocab_size, seq_length=run.train.seq_length)
        for part in range(2)
    )
    return Dataset(
        train=train,
        valid=valid,
        tokenizer=None if data.tokenizer is None else open_tokenizer(Path(data.tokenizer).expanduser()),
        digest="mock",
        description="random tokens",
    )
