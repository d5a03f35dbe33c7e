"""`metrics.jsonl`: one JSON object a step. A resumed run continues the file as if it had never stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mbfn.train.loop import Observer
    from mbfn.train.state import Metrics, TrainState

Record = dict[str, float | None]


@contextmanager
def recorded(path: Path, interval: int, steps: int, resumed: int) -> Iterator[Observer]:
    """Append every `interval`-th step, each evaluation and the last step; records after step `resumed` are dropped."""
    keep_until(path, resumed)
    with path.open("a") as file:

        def observe(_: TrainState, metrics: Metrics) -> None:
            if metrics.step % interval == 0 or metrics.step == steps or metrics.valid_loss is not None:
                file.write(json.dumps(metrics.record()) + "\n")
                file.flush()

        yield observe


def keep_until(path: Path, step: int) -> None:
    """Drop the records after `step`, and a last line that was cut off."""
    kept = [record for record in read_records(path) if (record["step"] or 0) <= step]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(part, path)


def read_records(path: Path) -> list[Record]:
    """The records of a run so far; none when there is no file. A torn last line is left out."""
    if not path.is_file():
        return []
    complete = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in complete.splitlines()]
