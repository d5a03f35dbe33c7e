"""What the model learns from: the `data` group."""

from __future__ import annotations

from dataclasses import dataclass

from mbfn.errors import ConfigError, require


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Plain text, tokenised once into a memory-mapped cache and read as an index map of the step.

    `path`: a text file, a directory of `*.txt` files, or `builtin:python-reference`, the language reference that
    ships with Python. `tokenizer`: a Hugging Face tokenizer directory or `tokenizer.json`; `auto` takes the one of
    `init.hf`, else trains a byte-level BPE of `model.vocab_size` entries on the text.
    """

    path: str = "builtin:python-reference"
    tokenizer: str = "auto"
    valid_fraction: float = 0.05  # the end of the text, held out for evaluation
    cache: str = "~/.cache/mbfn/data"

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        require(
            0 <= self.valid_fraction < 1, "valid_fraction", f"expected in [0, 1), got {self.valid_fraction}", problems
        )
        if problems:
            raise ConfigError(problems)
