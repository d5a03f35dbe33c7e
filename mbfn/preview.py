"""`python -m mbfn.preview`: rows of a run as text, with what is trained in colour."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal

from mbfn.config.command import RunContext, hydra_main
from mbfn.config.run import RunConfig
from mbfn.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.text import Text

    from mbfn.data.rows import Rows

_OPEN, _CLOSE = "⟦", "⟧"  # round what is trained, where there is no colour


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewConfig(RunConfig):
    """A run as `python -m mbfn.train` takes it, and which of its rows to print."""

    rows: int = 3  # how many
    first: int = 0  # the number of the first; row global_batch_size * step + i is row i of a step
    split: Literal["train", "valid"] = "train"

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        try:
            RunConfig.__post_init__(self)  # a slots dataclass has no super() of its own
        except ConfigError as error:
            problems += error.problems
        problems += [(n, f"expected {m} or more") for n, m in (("rows", 1), ("first", 0)) if getattr(self, n) < m]
        if problems:
            raise ConfigError(problems)


def preview(config: PreviewConfig, context: RunContext) -> None:
    """Print the rows and what the data is."""
    import numpy as np
    from rich.console import Console

    from mbfn.data import open_dataset

    del context
    data = open_dataset(config.to_run())
    split = data.train if config.split == "train" else data.valid
    if split is None:
        raise DataError("split: nothing is held out; choose split=train or a larger data.valid_fraction")
    if data.tokenizer is None:
        raise DataError("data.tokenizer: these tokens have no tokenizer to read them with; give data.tokenizer=DIR")
    console = Console(highlight=False)
    console.print(data.description, soft_wrap=True, markup=False)
    console.print("trained tokens are " + ("bold green" if console.is_terminal else f"between {_OPEN} and {_CLOSE}"))
    tokenizer = data.tokenizer.load()

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    rows = split.read(config.first + np.arange(config.rows))
    for number in range(config.rows):
        console.rule(_title(rows, number, config.first + number))
        for pieces in samples_of(rows, number):
            console.print(_shown(pieces, decode, colour=console.is_terminal), soft_wrap=True)


def samples_of(rows: Rows, number: int) -> Iterator[list[tuple[list[int], bool]]]:
    """For each sample of a row the runs of tokens that are trained, or not; padding is left out."""
    import numpy as np

    length = rows.tokens.shape[1]
    lengths = (length,) if rows.segments is None else rows.segments[number]
    for start, stop in pairwise(accumulate(lengths, initial=0)):
        tokens, labels, mask = (array[number, start:stop] for array in (rows.tokens, rows.labels, rows.loss_mask))
        used = np.flatnonzero((tokens != 0) | (labels != 0) | (mask > 0))
        if not len(used):
            continue
        ids = np.append(tokens[:1], labels[: used[-1] + 1])
        trained = np.append(False, mask[: used[-1] + 1] > 0)
        edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
        yield [(ids[a:b].tolist(), bool(trained[a])) for a, b in pairwise(edges)]


def _title(rows: Rows, number: int, name: int) -> str:
    used, trained = len(rows.tokens[number]), int((rows.loss_mask[number] > 0).sum())
    samples = sum(1 for _ in samples_of(rows, number))
    return f"row {name}: {samples} sample{'s' * (samples != 1)}, {trained} of {used} positions trained"


def _shown(pieces: list[tuple[list[int], bool]], decode: Callable[[list[int]], str], *, colour: bool) -> Text:
    from rich.text import Text

    text = Text()
    for ids, trained in pieces:
        said = decode(ids)
        marked = said if colour or not trained else f"{_OPEN}{said}{_CLOSE}"
        text.append(marked, style="bold green" if trained else "dim")
    return text


if __name__ == "__main__":
    from mbfn.families import model_from_hf

    hydra_main(preview, root=PreviewConfig, config_name="preview", model_from_hf=model_from_hf, outputs=False)
