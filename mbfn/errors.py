"""Every error a user can cause: one line with the field, tensor or file, what was expected, what was found, the fix.

A command prints the line and exits with `exit_code`; a library call raises the class. A traceback is a bug of mbfn.
"""

from __future__ import annotations

from collections.abc import Sequence


class MbfnError(Exception):
    """The base of all errors that the caller can mend. `str(error)` is what the user reads."""

    exit_code = 1


class ConfigError(MbfnError):
    """A configuration that cannot run. `problems` holds every one found, as (field path, sentence) pairs."""

    exit_code = 2

    def __init__(self, problems: list[tuple[str, str]] | str) -> None:
        self.problems = [("", problems)] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(f"{path}: {text}" if path else text for path, text in self.problems))


class ConversionError(MbfnError):
    """Weights that do not fit the model: a name without a rule, a missing tensor, a wrong shape or dtype."""


class CheckpointError(MbfnError):
    """A checkpoint or weight file that is broken, incomplete, or cannot be written."""


class DataError(MbfnError):
    """Training data or a tokenizer that is missing or unusable."""


class TrainingError(MbfnError):
    """A run whose steps went wrong: the loss is no number, or too many steps had to be left out."""


class LaunchError(MbfnError):
    """A run that cannot start here, or whose processes failed.

    `detail` is shown below the line; `known` tells an error that another start would meet again.
    """

    def __init__(self, text: str, detail: str = "", *, known: bool = True) -> None:
        super().__init__(text)
        self.detail = detail
        self.known = known


def first_lines(lines: Sequence[str], count: int = 8) -> str:
    """The first `count` lines as one text, which says how many more there are."""
    rest = [f"... and {len(lines) - count} more"] if len(lines) > count else []
    return "\n".join([*lines[:count], *rest])


def require(holds: bool, path: str, text: str, problems: list[tuple[str, str]]) -> None:
    """Note `text` against the field `path` unless `holds`."""
    if not holds:
        problems.append((path, text))
