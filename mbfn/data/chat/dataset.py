"""A chat set as the rows of a run: which samples are trained on, which held out, what is too long, who shares a row."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mbfn.config.data import ChatData
from mbfn.config.run import RunConfig
from mbfn.data.bad_rows import reasons
from mbfn.data.chat.build import BAD_ROWS, Samples, build, open_samples, samples_digest
from mbfn.data.dataset import Dataset
from mbfn.data.files import cached
from mbfn.data.order import permuted, shuffled
from mbfn.data.packing import Bins, packed
from mbfn.data.rows import Rows, Sample, rows_of_samples
from mbfn.data.sources import find_files
from mbfn.data.tokenizer import TokenizerFiles, check_size, given_tokenizer, open_tokenizer
from mbfn.errors import DataError

_HELD_OUT = 0x6D62666E  # names the draw of held-out conversations, which no seed of a run changes


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ChatRows:
    """Rows of the samples `chosen`, packed or padded."""

    samples: Samples
    chosen: NDArray[np.int64]
    data: ChatData
    seq_length: int
    multiple: int  # that packed samples begin at
    seed: int | None  # of the order; none: as they lie
    bins: Bins | None  # of places in `chosen`; none: made anew for each epoch

    def read(self, numbers: NDArray[np.int64]) -> Rows:
        """The rows of these numbers."""
        bins = self._bins(numbers)
        return rows_of_samples(
            [[self.sample(int(item)) for item in items] for items in bins],
            self.seq_length,
            pack=self.data.packing != "none",
            multiple=self.multiple,
        )

    def sample(self, item: int) -> Sample:
        """A chosen sample, cut where a row ends."""
        index = self.chosen[item]
        start, stop = self.samples.offsets[index], self.samples.offsets[index + 1]
        stop = min(stop, start + self.seq_length + 1)
        weights = np.asarray(self.samples.mask[start:stop], dtype=np.float64)
        if self.data.loss_weights == "sample":
            weights /= max(1.0, weights[1:].sum())
        return Sample(self.samples.tokens[start:stop], weights)

    def epoch_bins(self, epoch: int) -> Bins:
        """The rows of an epoch in the order of the samples, which is the epoch's own where rows are made anew."""
        return _bins_of(self, epoch) if self.bins is None else self.bins

    def _bins(self, numbers: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        if self.data.preference == "pairs":
            pairs = self._places(numbers // 2, len(self.chosen) // 2)
            return list((2 * pairs + numbers % 2)[:, None])
        if self.bins is None:
            return [self._made_anew(int(number)) for number in numbers]
        return [self.bins[int(place)] for place in self._places(numbers, len(self.bins))]

    def _made_anew(self, number: int) -> NDArray[np.int64]:
        epoch = 0
        while number >= (rows := len(bins := self.epoch_bins(epoch))):
            number, epoch = number - rows, epoch + 1
        return bins[int(permuted(np.asarray([number], dtype=np.int64), rows, self.seed or 0, epoch)[0])]

    def _places(self, numbers: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        return numbers % size if self.seed is None else shuffled(numbers, size, self.seed)


@lru_cache(maxsize=64)
def _bins_of(rows: ChatRows, epoch: int) -> Bins:
    """One epoch's own rows: its samples in an order of its own, then packed. Later epochs are counted on from it."""
    order = permuted(np.arange(len(rows.chosen)), len(rows.chosen), (rows.seed or 0) + 1, epoch)
    lengths = np.minimum(rows.samples.positions[rows.chosen], rows.seq_length)
    bins = packed(lengths[order], rows.seq_length, rows.data.packing, multiple=rows.multiple)
    return Bins(order[bins.items], bins.bounds)


def open_chat(run: RunConfig, data: ChatData) -> Dataset:
    """The conversations that `data.path` names, tokenised now unless the cache has them.

    Raises: DataError naming what cannot be used, and how to go on without it.
    """
    tokenizer = _tokenizer(run, data)
    train = _samples(data.path, tokenizer, data)
    if data.valid_path is not None:
        chosen, held_out = np.arange(len(train)), _samples(data.valid_path, tokenizer, data)
        valid, drawn = held_out, np.arange(len(held_out))
    else:
        chosen, drawn = _drawn(train, data)
        valid = train
    left: Counter[str] = Counter()
    train_rows = _rows(run, data, train, _fitting(run, data, train, chosen, left), seed=run.train.seed)
    valid_rows = _rows(run, data, valid, _fitting(run, data, valid, drawn, left), seed=None)
    if train_rows is None:
        raise DataError(f"data.path: {data.path} has no conversation left to train on; {_left_out(left)}")
    return Dataset(
        train=train_rows,
        valid=valid_rows,
        tokenizer=tokenizer,
        digest=_digest(run, data, train, valid),
        description=_description(data, train, train_rows, valid_rows, left),
    )


def _tokenizer(run: RunConfig, data: ChatData) -> TokenizerFiles:
    """The tokenizer with the template that this run uses, as exports carry it."""
    found = given_tokenizer(run)
    if found is None:
        raise DataError("data.tokenizer: data=chat takes the model's own; give init.hf=DIR or data.tokenizer=DIR")
    check_size(found, run)
    if data.chat_template in ("auto", "none"):
        return found
    template = Path(data.chat_template).expanduser()
    if not template.is_file():
        raise DataError(f"data.chat_template: no file {template}; give a Jinja file, auto or none")

    def make(directory: Path) -> None:
        for file in found.files:
            shutil.copyfile(file, directory / file.name)
        shutil.copyfile(template, directory / "chat_template.jinja")

    text = hashlib.sha256(template.read_bytes()).hexdigest()[:16]
    return open_tokenizer(cached(data.cache, f"tokenizer-{_files_digest(found)}-{text}", make))


def _files_digest(tokenizer: TokenizerFiles) -> str:
    """Of the files that decide about tokens and templates."""
    digest = hashlib.sha256()
    for file in tokenizer.files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _samples(path: str, tokenizer: TokenizerFiles, data: ChatData) -> Samples:
    name = f"chat-{samples_digest(find_files(path), _files_digest(tokenizer), data)}"
    return open_samples(cached(data.cache, name, lambda entry: build(path, tokenizer.directory, data, entry)))


def _drawn(samples: Samples, data: ChatData) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The samples to train on and those held out, in their order; what came from one row stays together."""
    rows = np.cumsum(np.diff(samples.places, axis=0, prepend=samples.places[:1]).any(axis=1))
    count = int(rows[-1]) + 1
    held_out = math.ceil(count * data.valid_fraction)
    if held_out >= count:
        raise DataError(
            f"data.valid_fraction: {data.valid_fraction} leaves none of {count} rows; use more or set it to 0"
        )
    drawn = np.isin(rows, permuted(np.arange(held_out), count, _HELD_OUT, 0))
    return np.flatnonzero(~drawn), np.flatnonzero(drawn)


def _fitting(
    run: RunConfig, data: ChatData, samples: Samples, chosen: NDArray[np.int64], left: Counter[str]
) -> NDArray[np.int64]:
    """The samples that a row holds, by the policy for those that it does not; `left` counts what the policy did.

    Raises: DataError where the policy is to stop.
    """
    seq_length, lengths = run.train.seq_length, samples.positions[chosen]
    long = lengths > seq_length
    if data.over_long == "truncate":
        dull = (cut and not _trains(samples, int(i), seq_length) for cut, i in zip(long, chosen, strict=True))
        lost = np.fromiter(dull, dtype=bool, count=len(chosen))
        left["cut at train.seq_length"] += int(long.sum() - lost.sum())
        left["dropped, with no trained token before train.seq_length"] += int(lost.sum())
        long = lost
    elif data.over_long == "drop":
        left["dropped as longer than train.seq_length"] += int(long.sum())
    elif long.any():
        longest = int(lengths.argmax())
        raise DataError(
            f"data.over_long: {int(long.sum())} of {len(chosen)} samples are longer than train.seq_length={seq_length} "
            f"(the longest {lengths[longest]}, {samples.place(int(chosen[longest]))}); set data.over_long=drop or "
            "truncate, or a larger train.seq_length"
        )
    if data.preference == "pairs":
        long = np.repeat(long.reshape(-1, 2).any(axis=1), 2)
    return chosen[~long]


def _multiple(run: RunConfig) -> int:
    """What the length of a packed sample is a multiple of, so that context-parallel ranks can share it."""
    packs = isinstance(run.data, ChatData) and run.data.packing != "none"
    return 2 * run.parallel.cp if packs and run.parallel.cp > 1 else 1


def _trains(samples: Samples, index: int, seq_length: int) -> bool:
    """Whether a sample cut at `seq_length` still has a trained token."""
    start = samples.offsets[index]
    return bool(samples.mask[start + 1 : start + seq_length + 1].any())


def _rows(
    run: RunConfig, data: ChatData, samples: Samples, chosen: NDArray[np.int64], *, seed: int | None
) -> ChatRows | None:
    if not len(chosen):
        return None
    lengths = np.minimum(samples.positions[chosen], run.train.seq_length)
    again = data.pack_every_epoch and seed is not None
    bins = None if again else _cached_bins(run, data, lengths)
    return ChatRows(
        samples=samples,
        chosen=chosen,
        data=data,
        seq_length=run.train.seq_length,
        multiple=_multiple(run),
        seed=seed,
        bins=bins,
    )


def _cached_bins(run: RunConfig, data: ChatData, lengths: NDArray[np.int64]) -> Bins:
    """Bins of samples of these lengths, packed now unless the cache has them."""
    if data.packing == "none":
        return packed(lengths, run.train.seq_length, "none")
    named = hashlib.sha256(np.ascontiguousarray(lengths).tobytes()).hexdigest()[:16]
    name = f"bins-{named}-{data.packing}-{run.train.seq_length}-{_multiple(run)}"

    def make(entry: Path) -> None:
        bins = packed(lengths, run.train.seq_length, data.packing, multiple=_multiple(run))
        np.save(entry / "items.npy", bins.items)
        np.save(entry / "bounds.npy", bins.bounds)

    entry = cached(data.cache, name, make)
    return Bins(np.load(entry / "items.npy", mmap_mode="r"), np.load(entry / "bounds.npy", mmap_mode="r"))


def _digest(run: RunConfig, data: ChatData, train: Samples, valid: Samples) -> str:
    options = [data.over_long, data.packing, data.pack_every_epoch, data.loss_weights, data.valid_fraction]
    said = [train.entry.name, valid.entry.name, *map(str, options), str(_multiple(run))]
    return hashlib.sha256("|".join(said).encode()).hexdigest()[:16]


def _description(data: ChatData, train: Samples, rows: ChatRows, valid: ChatRows | None, left: Counter[str]) -> str:
    held_out = len(valid.chosen) if valid is not None else 0
    count = len(rows.epoch_bins(0))
    parts = [
        f"{len(rows.chosen):,} samples of {data.path} in {count:,} row{'s' * (count != 1)}, {held_out:,} held out; "
        f"{train.trained:,} of {len(train.tokens):,} tokens trained"
    ]
    if said := _left_out(left):
        parts.append(said)
    if train.bad:
        parts.append(f"bad rows skipped: {reasons(train.bad)} (listed in {train.entry / BAD_ROWS})")
    if train.typed:
        parts.append(f"special tokens typed in {train.typed:,} samples are text")
    return "; ".join(parts)


def _left_out(left: Counter[str]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in left.items() if count)
