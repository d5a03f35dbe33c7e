"""What training needs to know of any data: its name, its tokenizer, and rows as a function of their number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mbfn.config.data import ChatData, IndexedData, MockData
from mbfn.config.run import RunConfig
from mbfn.data.rows import Rows
from mbfn.data.tokenizer import TokenizerFiles


class Split(Protocol):
    """An endless sequence of rows: equal numbers give equal rows, whoever asks and in whatever order."""

    def read(self, numbers: NDArray[np.int64]) -> Rows:
        """The rows of these numbers."""
        ...


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Dataset:
    """The data of a run, opened."""

    train: Split  # row `step * global_batch_size + i` is row i of that step
    valid: Split | None  # held out; none: there is nothing to evaluate on
    tokenizer: TokenizerFiles | None
    digest: str  # of all that decides which tokens a row has, but for train.seed
    description: str  # for the first line of a run


def open_dataset(run: RunConfig) -> Dataset:
    """The run's data, made ready now unless the cache has it. Safe to call from every rank at once.

    Raises: DataError naming what is missing, unreadable or too short.
    """
    if isinstance(run.data, ChatData):
        from mbfn.data.chat.dataset import open_chat

        return open_chat(run, run.data)
    if isinstance(run.data, IndexedData):
        from mbfn.data.indexed import open_indexed

        return open_indexed(run, run.data)
    if isinstance(run.data, MockData):
        from mbfn.data.mock import open_mock

        return open_mock(run, run.data)
    from mbfn.data.windows import open_text

    return open_text(run, run.data)
