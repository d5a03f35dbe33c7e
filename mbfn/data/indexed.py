"""Rows of Megatron corpora: documents one after another in an order of each epoch's own, cut, blended by weight."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mbfn.config.data import IndexedData
from mbfn.config.run import RunConfig
from mbfn.data.blend import blended, split_bounds
from mbfn.data.corpus import Corpus, open_corpus
from mbfn.data.dataset import Dataset
from mbfn.data.files import cached
from mbfn.data.order import permuted, shuffled
from mbfn.data.rows import Rows, rows_of_windows
from mbfn.data.tokenizer import TokenizerFiles, check_size, given_tokenizer, open_tokenizer
from mbfn.errors import DataError

_IN_MEMORY = 1 << 20  # documents up to which an epoch's order is not kept in a file


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """`seq_length + 1` tokens, and how many of them each document gave."""

    tokens: NDArray[np.int64]
    parts: list[int]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Stretch:
    """Documents `first:stop` of a corpus as an endless sequence of windows. A seed shuffles documents and windows."""

    corpus: Corpus
    first: int
    stop: int
    seq_length: int
    seed: int | None
    cache: str

    @property
    def total(self) -> int:
        """Tokens of an epoch."""
        return int(np.sum(self.corpus.lengths[self.first : self.stop], dtype=np.int64))

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return max(0, self.total - 1) // self.seq_length

    def read(self, numbers: NDArray[np.int64]) -> list[Window]:
        """The windows of these numbers."""
        places = numbers % self.windows if self.seed is None else shuffled(numbers, self.windows, self.seed + 1)
        return [self._window(int(n) // self.windows, int(p)) for n, p in zip(numbers, places, strict=True)]

    def _window(self, epoch: int, place: int) -> Window:
        order, ends = _laid_out(self, epoch)
        offset, left = place * self.seq_length, self.seq_length + 1
        position = int(np.searchsorted(ends, offset, side="right"))
        parts = []
        while left:
            document = self.first + int(order[position])
            stop = int(self.corpus.starts[document]) + int(self.corpus.lengths[document])
            taken = min(left, rest := int(ends[position]) - offset)
            parts.append(self.corpus.tokens[stop - rest : stop - rest + taken])
            position, left, offset = position + 1, left - taken, offset + taken
        found = [part for part in parts if len(part)]
        return Window(np.concatenate(found).astype(np.int64), [len(part) for part in found])


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Blend:
    """Rows of several stretches, by weight."""

    stretches: tuple[Stretch, ...]
    weights: tuple[float, ...]
    data: IndexedData
    vocab_size: int

    def read(self, numbers: NDArray[np.int64]) -> Rows:
        """The rows of these numbers."""
        which, counts = blended(numbers, self.weights)
        made = {d: iter(self.stretches[d].read(counts[which == d])) for d in np.unique(which).tolist()}
        found = [next(made[d]) for d in which.tolist()]
        windows = np.stack([window.tokens for window in found])
        if (largest := int(windows.max())) >= self.vocab_size:
            prefix = self.stretches[int(which[windows.max(axis=1).argmax()])].corpus.prefix
            raise DataError(
                f"data.path: token {largest} of {prefix} is beyond model.vocab_size={self.vocab_size}; "
                "it was made with another tokenizer"
            )
        rows = rows_of_windows(windows)
        apart, masked = self.data.separate_documents, self.data.separate_documents or self.data.eod_mask_loss
        if not masked:
            return rows
        for row, window in enumerate(found):
            rows.loss_mask[row, np.cumsum(window.parts)[:-1] - 1] = 0
        if not apart:
            return rows
        lengths = [_inputs(window.parts) for window in found]
        positions = np.stack([np.concatenate([np.arange(part) for part in parts]) for parts in lengths])
        return replace(rows, position_ids=positions, segments=tuple(map(tuple, lengths)))


def open_indexed(run: RunConfig, data: IndexedData) -> Dataset:
    """The corpora that `data.path` names.

    Raises: DataError for a corpus that is missing, broken or too short, or of another tokenizer.
    """
    corpora = [open_corpus(prefix) for prefix in data.paths]
    tokenizer = _tokenizer(run, [*corpora, *(held := [open_corpus(prefix) for prefix in data.valid_path])])
    bounds = [split_bounds(len(corpus.lengths), data.split) for corpus in corpora]
    train = [_stretch(run, data, c, b[0], run.train.seed) for c, b in zip(corpora, bounds, strict=True)]
    if short := next((part for part in train if not part.windows), None):
        raise DataError(
            f"data.path: the training share of {short.corpus.prefix} is {short.total} tokens, seq_length="
            f"{run.train.seq_length} needs {run.train.seq_length + 1}; use more text, another data.split or a smaller "
            "train.seq_length"
        )
    valid = [_stretch(run, data, c, b[1], None) for c, b in zip(corpora, bounds, strict=True)]
    if held:
        valid = [_stretch(run, data, corpus, (0, len(corpus.lengths)), None) for corpus in held]
    weights = data.weights or tuple(float(part.windows) for part in train)
    kept = [(part, w) for part, w in zip(valid, _valid_weights(data, valid, weights), strict=True) if part.windows]
    return Dataset(
        train=Blend(stretches=tuple(train), weights=weights, data=data, vocab_size=run.model.vocab_size),
        valid=_blend(run, data, kept),
        tokenizer=tokenizer,
        digest=_digest(data, [*corpora, *held]),
        description=_description(train, weights),
    )


@lru_cache(maxsize=64)
def _laid_out(stretch: Stretch, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The documents of an epoch in order, and where each ends in tokens from the epoch's start."""
    count, lengths = stretch.stop - stretch.first, stretch.corpus.lengths[stretch.first : stretch.stop]

    def made() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order = np.arange(count)
        if stretch.seed is not None:
            order = permuted(order, count, stretch.seed, epoch)
        return order, np.cumsum(lengths[order], dtype=np.int64)

    def write(directory: Path) -> None:
        for name, array in zip(("order", "ends"), made(), strict=True):
            np.save(directory / f"{name}.npy", array)

    if count <= _IN_MEMORY:
        return made()
    name = f"order-{stretch.corpus.digest}-{stretch.first}-{stretch.stop}-{stretch.seed}-{epoch}"
    entry = cached(stretch.cache, name, write)
    return np.load(entry / "order.npy", mmap_mode="r"), np.load(entry / "ends.npy", mmap_mode="r")


def _stretch(run: RunConfig, data: IndexedData, corpus: Corpus, bounds: tuple[int, int], seed: int | None) -> Stretch:
    first, stop = bounds
    return Stretch(corpus=corpus, first=first, stop=stop, seq_length=run.train.seq_length, seed=seed, cache=data.cache)


def _blend(run: RunConfig, data: IndexedData, kept: Sequence[tuple[Stretch, float]]) -> Blend | None:
    if not kept:
        return None
    stretches, weights = zip(*kept, strict=True)
    return Blend(stretches=stretches, weights=weights, data=data, vocab_size=run.model.vocab_size)


def _valid_weights(data: IndexedData, valid: Sequence[Stretch], weights: Sequence[float]) -> Sequence[float]:
    return [float(part.windows) for part in valid] if data.valid_path or not data.weights else weights


def _inputs(parts: Sequence[int]) -> list[int]:
    """Lengths of the documents in what is read, which is all but the last token."""
    kept = [*parts[:-1], parts[-1] - 1]
    return kept if kept[-1] else kept[:-1]


def _tokenizer(run: RunConfig, corpora: Sequence[Corpus]) -> TokenizerFiles | None:
    """The tokenizer for exports: given, or the one that the first corpus names; never another than made the corpora."""
    named = [corpus.about["tokenizer"] for corpus in corpora if "tokenizer" in corpus.about]
    found = given_tokenizer(run)
    if found is None and named and Path(named[0]).exists():
        found = open_tokenizer(Path(named[0]))
    if found is None:
        return None
    check_size(found, run)
    for corpus in corpora:
        if corpus.about.get("tokenizer_digest", found.digest) != found.digest:
            raise DataError(
                f"data.tokenizer: {corpus.prefix} was made with {corpus.about['tokenizer']}, not {found.files[0]}; "
                "give that one, or tokenise again"
            )
    return found


def _digest(data: IndexedData, corpora: Sequence[Corpus]) -> str:
    options = [data.weights, data.split, data.separate_documents, data.eod_mask_loss]
    said = [*(corpus.digest for corpus in corpora), *map(str, options)]
    return hashlib.sha256("|".join(said).encode()).hexdigest()[:16]


def _description(train: Sequence[Stretch], weights: Sequence[float]) -> str:
    shares = [weight / sum(weights) for weight in weights]
    parts = [f"{s.total:,} tokens of {s.corpus.prefix}" for s in train]
    if len(parts) == 1:
        return parts[0]
    return ", ".join(f"{part} ({share:.1%})" for part, share in zip(parts, shares, strict=True))
