"""Rows that cannot be used: where they are, why, and what is said of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mbfn.data.sources import Shard
from mbfn.errors import DataError

_SHOWN = 3  # rows that an error names


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row and why it cannot be used; what stands before a colon is the sort of the reason."""

    file: str
    line: int
    reason: str


def first_lines(shards: Sequence[Shard], lines: Sequence[int]) -> list[int]:
    """The lines of its file before each shard, from the lines of every shard."""
    before, file, found = 0, None, []
    for shard, count in zip(shards, lines, strict=True):
        before = before if shard.file == file else 0
        file = shard.file
        found.append(before)
        before += count
    return found


def located(
    shards: Sequence[Shard], lines: Sequence[int], bad: Iterable[Sequence[tuple[int, str]]]
) -> Iterator[BadRow]:
    """Bad rows by their place in a shard -> by their place in its file."""
    for shard, start, part in zip(shards, first_lines(shards, lines), bad, strict=True):
        yield from (BadRow(str(shard.file), start + line, why) for line, why in part)


def check(bad: Sequence[BadRow], rows: int, path: str, policy: str, *, prefix: str = "data.") -> None:
    """Raises: DataError with the first bad rows, unless the policy is to skip them."""
    if not bad or policy == "skip":
        return
    shown = "; ".join(f"{row.file}:{row.line}: {row.reason}" for row in bad[:_SHOWN])
    more = f"; and {len(bad) - _SHOWN} more ({reasons(counts(bad))})" if len(bad) > _SHOWN else ""
    raise DataError(
        f"{prefix}path: {len(bad)} of {rows} rows of {path} cannot be used: {shown}{more}; mend them, or leave them "
        f"out with {prefix}bad_rows=skip"
    )


def counts(bad: Iterable[BadRow]) -> Counter[str]:
    """How many there are of each sort."""
    return Counter(row.reason.partition(":")[0] for row in bad)


def reasons(found: Counter[str]) -> str:
    """`3 broken JSON, 1 missing role`."""
    return ", ".join(f"{count:,} {kind}" for kind, count in found.most_common())


def write_bad_rows(path: Path, bad: Iterable[BadRow]) -> None:
    """One JSON object a row."""
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"file": row.file, "line": row.line, "reason": row.reason}) + "\n" for row in bad)
