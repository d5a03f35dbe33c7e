"""A run's text as one memory-mapped array of tokens, cut into windows of `seq_length + 1`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mbfn.config.run import RunConfig
from mbfn.data.files import cached
from mbfn.data.text import blocks, read_documents, text_digest
from mbfn.data.tokenizer import TokenizerFiles, end_of_text, find_tokenizer
from mbfn.errors import DataError

_TOKENS = "tokens.npy"
_FORMAT = 1  # of the token file and of how documents are joined in it
_BATCH = 16  # blocks that the tokenizer works on at once


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Dataset:
    """Windows of `seq_length + 1` tokens that overlap by one; the last `valid_windows` are held out."""

    tokens: NDArray[np.unsignedinteger]
    seq_length: int
    train_windows: int
    valid_windows: int
    tokenizer: TokenizerFiles
    digest: str  # of the text and the tokenizer

    def windows(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows of these numbers.

        Shapes: indices (B,) -> (B, seq_length + 1)
        """
        offsets = indices[:, None] * self.seq_length + np.arange(self.seq_length + 1)
        return np.asarray(self.tokens[offsets], dtype=np.int64)


def open_dataset(run: RunConfig) -> Dataset:
    """The run's data, tokenised now unless the cache has it. Safe to call from every rank at once.

    Raises: DataError naming what is missing, unreadable or too short.
    """
    documents = read_documents(run.data.path)
    tokenizer = find_tokenizer(run, documents)
    separator = end_of_text(tokenizer, run)
    digest = f"{text_digest(documents)}-{tokenizer.digest}-{separator}-v{_FORMAT}"
    entry = cached(run.data.cache, f"tokens-{digest}", lambda path: _tokenise(documents, tokenizer, separator, path))
    tokens = np.load(entry / _TOKENS, mmap_mode="r")
    return cut(tokens, run, tokenizer=tokenizer, digest=digest)


def cut(tokens: NDArray[np.unsignedinteger], run: RunConfig, *, tokenizer: TokenizerFiles, digest: str) -> Dataset:
    """`tokens` as training windows and the held-out ones at the end.

    Raises: DataError when there are too few.
    """
    seq_length, fraction = run.train.seq_length, run.data.valid_fraction
    windows = max(0, len(tokens) - 1) // seq_length
    held_out = math.ceil(windows * fraction)
    train = windows - held_out
    if train < 1:
        needed = (2 if fraction else 1) * seq_length + 1
        raise DataError(
            f"data.path: {run.data.path} is {len(tokens)} tokens, seq_length={seq_length} needs at least {needed}; "
            "use more text or a smaller train.seq_length"
        )
    return Dataset(
        tokens=tokens,
        seq_length=seq_length,
        train_windows=train,
        valid_windows=held_out,
        tokenizer=tokenizer,
        digest=digest,
    )


def _tokenise(documents: Sequence[str], tokenizer: TokenizerFiles, separator: int | None, directory: Path) -> None:
    loaded = tokenizer.load()
    largest = max(*loaded.get_vocab().values(), separator or 0)  # a model's end of text may lie beyond the tokenizer's
    dtype = np.uint16 if largest < 1 << 16 else np.uint32
    parts: list[NDArray[np.unsignedinteger]] = []
    for document in filter(None, documents):
        for batch in batched(blocks(document), _BATCH):
            encoded = loaded.encode_batch_fast(list(batch), add_special_tokens=False)
            parts += [np.asarray(item.ids, dtype=dtype) for item in encoded]
        if separator is not None:
            parts.append(np.asarray([separator], dtype=dtype))
    np.save(directory / _TOKENS, np.concatenate(parts))
