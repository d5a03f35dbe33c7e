"""What the model learns from: the `data` group, one dataclass a kind of data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mbfn.errors import ConfigError, require

CACHE = "~/.cache/mbfn/data"
Role = Literal["assistant", "tool", "user", "system"]
Problems = list[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextData:
    """Plain text, tokenised once into a memory-mapped cache and read as an index map of the step.

    `path`: a text file, a directory of `*.txt` files, or `builtin:python-reference`, the language reference that
    ships with Python. `tokenizer`: a Hugging Face tokenizer directory or `tokenizer.json`; `auto` takes the one of
    `init.hf`, else trains a byte-level BPE of `model.vocab_size` entries on the text.
    """

    kind: Literal["text"] = "text"
    path: str = "builtin:python-reference"
    tokenizer: str = "auto"
    valid_fraction: float = 0.05  # the end of the text, held out for evaluation
    cache: str = CACHE

    def __post_init__(self) -> None:
        problems: Problems = []
        _require_fraction(self.valid_fraction, problems)
        _raise(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedData:
    """Megatron's tokenised corpora, `PREFIX.bin` and `PREFIX.idx`, as `python -m mbfn.tokenize` writes them.

    `path`: one prefix or several. Documents follow one another in an order of each epoch's own and are cut into rows.
    """

    kind: Literal["indexed"] = "indexed"
    path: str | tuple[str, ...]
    weights: tuple[float, ...] = ()  # shares of the rows by corpus; empty: each by its length
    split: tuple[float, ...] = (969.0, 30.0, 1.0)  # shares of each corpus to train on, to hold out, to leave alone
    valid_path: tuple[str, ...] = ()  # corpora to hold out instead, by their length; `split` is for `path` alone then
    tokenizer: str = "auto"  # that made them, for exports: a directory; auto: the corpus names it, else init.hf's
    separate_documents: bool = False  # no attention across documents, positions from 0 in each; micro_batch_size 1
    eod_mask_loss: bool = False  # do not learn to predict what follows the end of a document
    cache: str = CACHE

    def __post_init__(self) -> None:
        problems: Problems = []
        count, weights = len(self.paths), self.weights
        require(count > 0, "path", "expected a prefix, got an empty list", problems)
        fits = not weights or (len(weights) == count and min(weights) > 0)
        require(fits, "weights", f"expected {count} numbers above 0, one a corpus, got {list(weights)}", problems)
        shares = 1 <= len(self.split) <= 3 and min(self.split) >= 0 and self.split[0] > 0
        text = f"expected up to three shares, the first above 0, got {list(self.split)}"
        require(shares, "split", text, problems)
        _raise(problems)

    @property
    def paths(self) -> tuple[str, ...]:
        """The prefixes."""
        return (self.path,) if isinstance(self.path, str) else self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatData:
    """Conversations to fine-tune on: JSONL, Parquet, a Hugging Face `datasets` directory, or a directory of files.

    The model's own chat template renders each; the loss counts what the assistant said, and nothing else by default.
    """

    kind: Literal["chat"] = "chat"
    path: str
    form: Literal["auto", "messages", "sharegpt", "alpaca", "completion", "preference"] = "auto"  # of the rows
    tokenizer: str = "auto"  # a Hugging Face tokenizer directory; auto: the one of init.hf
    chat_template: str = "auto"  # auto: the tokenizer's; a Jinja file; none: prompt, completion and eos as they are
    turns: Literal["all", "last", "each"] = "all"  # trained ones of a conversation; each: one sample a turn
    roles: tuple[Role, ...] = ("assistant",)  # whose turns are trained
    train_on_prompt: bool = False  # every token, not only the turns of `roles`
    reasoning: bool = True  # train on what stands between <think> and </think> and the like
    date: str = "2026-01-01"  # today, for templates that tell the date: the same tokens on every day
    over_long: Literal["error", "drop", "truncate"] = "error"  # samples beyond train.seq_length
    bad_rows: Literal["error", "skip"] = "error"  # rows that cannot be read; skipped ones are counted and listed
    packing: Literal["none", "in_order", "ffd"] = "none"  # several samples a row; ffd: first-fit decreasing
    pack_every_epoch: bool = False  # samples meet others in each epoch; else rows are made once and cached
    loss_weights: Literal["token", "sample"] = "token"  # the loss is a mean over tokens, or over samples' means
    preference: Literal["chosen", "pairs"] = "chosen"  # pairs: rows 2i chosen and 2i+1 rejected, for steps that compare
    valid_fraction: float = 0.05  # conversations drawn to be held out, the same ones in every run
    valid_path: str | None = None  # conversations to hold out instead
    workers: int = 0  # processes that tokenise; 0: one a core
    cache: str = CACHE

    def __post_init__(self) -> None:
        problems: Problems = []
        _require_fraction(self.valid_fraction, problems)
        require(bool(self.roles), "roles", "expected some, such as [assistant]", problems)
        require(self.workers >= 0, "workers", f"expected at least 0, got {self.workers}", problems)
        dated = re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", self.date) is not None
        require(dated, "date", f"expected YYYY-MM-DD, got {self.date!r}", problems)
        paired = self.preference == "pairs"
        text = "preference=pairs keeps a row for each answer; set packing=none"
        require(not paired or self.packing == "none", "packing", text, problems)
        require(not paired or self.turns == "all", "turns", "preference=pairs needs turns=all", problems)
        again = not self.pack_every_epoch or self.packing != "none"
        require(again, "pack_every_epoch", "needs packing=in_order or packing=ffd", problems)
        text = f"chat_template=none takes prompts and completions as they are, roles are {list(self.roles)}; give one"
        plain = self.chat_template != "none" or self.roles == ("assistant",)
        require(plain, "chat_template", text, problems)
        _raise(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class MockData:
    """Random tokens, the same for the same seed: for runs that look at speed and memory."""

    kind: Literal["mock"] = "mock"
    tokenizer: str | None = None  # a directory for exports to carry; the tokens do not come from it


DataConfig = TextData | IndexedData | ChatData | MockData


def row_problems(data: DataConfig, micro_batch_size: int, cp: int) -> Problems:
    """Why rows of `data` cannot come in micro-batches of this size on `cp` ranks; empty when they can."""
    problems: Problems = []
    field, size = "train.micro_batch_size", micro_batch_size
    if packs_rows(data):
        name = "data.separate_documents" if isinstance(data, IndexedData) else "data.packing"
        require(size == 1, field, f"{name} makes one row a micro-batch, got {size}; set it to 1", problems)
    apart = isinstance(data, IndexedData) and data.separate_documents
    text = f"documents of any length cannot be shared by cp={cp} ranks; set parallel.cp=1"
    require(not apart or cp == 1, "data.separate_documents", text, problems)
    if isinstance(data, ChatData) and data.preference == "pairs":
        require(size % 2 == 0, field, f"data.preference=pairs needs an even size, got {size}", problems)
    return problems


def packs_rows(data: DataConfig) -> bool:
    """Whether a row holds several samples that do not see each other."""
    if isinstance(data, ChatData):
        return data.packing != "none"
    return isinstance(data, IndexedData) and data.separate_documents


def _require_fraction(value: float, problems: Problems) -> None:
    require(0 <= value < 1, "valid_fraction", f"expected in [0, 1), got {value}", problems)


def _raise(problems: Problems) -> None:
    if problems:
        raise ConfigError(problems)
