"""A run's text as one memory-mapped array of tokens, cut into windows of `seq_length + 1`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mbfn.config.data import TextData
from mbfn.config.run import RunConfig
from mbfn.data.dataset import Dataset
from mbfn.data.files import cached
from mbfn.data.order import shuffled
from mbfn.data.rows import Rows, rows_of_windows
from mbfn.data.text import blocks, read_documents, text_digest
from mbfn.data.tokenizer import TokenizerFiles, end_of_text, find_tokenizer, token_dtype
from mbfn.errors import DataError

_TOKENS = "tokens.npy"
_FORMAT = 1  # of the token file and of how documents are joined in it
_BATCH = 16  # blocks that the tokenizer works on at once


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Windows:
    """`count` windows from window number `first` on, which overlap by one token. A seed shuffles each epoch."""

    tokens: NDArray[np.unsignedinteger]
    seq_length: int
    first: int
    count: int
    seed: int | None

    def read(self, numbers: NDArray[np.int64]) -> Rows:
        """The rows of these numbers."""
        indices = numbers % self.count if self.seed is None else shuffled(numbers, self.count, self.seed)
        offsets = (self.first + indices)[:, None] * self.seq_length + np.arange(self.seq_length + 1)
        return rows_of_windows(np.asarray(self.tokens[offsets], dtype=np.int64))


def open_text(run: RunConfig, data: TextData) -> Dataset:
    """The text that `data.path` names, tokenised now unless the cache has it."""
    documents = read_documents(data.path)
    tokenizer = find_tokenizer(run, documents, data.cache)
    separator = end_of_text(tokenizer, run)
    digest = f"{text_digest(documents)}-{tokenizer.digest}-{separator}-v{_FORMAT}"
    entry = cached(data.cache, f"tokens-{digest}", lambda path: _tokenise(documents, tokenizer, separator, path))
    tokens = np.load(entry / _TOKENS, mmap_mode="r")
    train, valid = cut(tokens, run, data)
    return Dataset(
        train=train,
        valid=valid,
        tokenizer=tokenizer,
        digest=digest,
        description=f"{len(tokens):,} tokens of {data.path}",
    )


def cut(tokens: NDArray[np.unsignedinteger], run: RunConfig, data: TextData) -> tuple[Windows, Windows | None]:
    """Windows to train on, and the held-out ones at the end.

    Raises: DataError when there are too few.
    """
    seq_length, fraction = run.train.seq_length, data.valid_fraction
    windows = max(0, len(tokens) - 1) // seq_length
    held_out = math.ceil(windows * fraction)
    count = windows - held_out
    if count < 1:
        needed = (2 if fraction else 1) * seq_length + 1
        raise DataError(
            f"data.path: {data.path} is {len(tokens)} tokens, seq_length={seq_length} needs at least {needed}; "
            "use more text or a smaller train.seq_length"
        )
    train = Windows(tokens=tokens, seq_length=seq_length, first=0, count=count, seed=run.train.seed)
    valid = Windows(tokens=tokens, seq_length=seq_length, first=count, count=held_out, seed=None)
    return train, valid if held_out else None


def _tokenise(documents: Sequence[str], tokenizer: TokenizerFiles, separator: int | None, directory: Path) -> None:
    loaded = tokenizer.load()
    dtype = token_dtype(loaded, separator)
    parts: list[NDArray[np.unsignedinteger]] = []
    for document in filter(None, documents):
        for batch in batched(blocks(document), _BATCH):
            encoded = loaded.encode_batch_fast(list(batch), add_special_tokens=False)
            parts += [np.asarray(item.ids, dtype=dtype) for item in encoded]
        if separator is not None:
            parts.append(np.asarray([separator], dtype=dtype))
    np.save(directory / _TOKENS, np.concatenate(parts))
