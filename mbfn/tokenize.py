"""`python -m mbfn.tokenize`: documents into a Megatron corpus."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mbfn.config.command import RunContext, hydra_main
from mbfn.errors import ConfigError, require


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeConfig:
    """What to tokenise, with what, and where to."""

    path: str  # JSONL, JSON, Parquet, a datasets directory, text files, or a directory of them
    out: str  # the corpus: OUT.bin and OUT.idx
    tokenizer: str  # a Hugging Face directory, or a tokenizer.json
    text_key: str = "text"  # the field of a row that holds the document
    prepend_bos: bool = False  # the tokenizer's bos_token before every document
    append_eod: bool = True  # its eos_token after every document
    bad_rows: Literal["error", "skip"] = "error"  # rows that cannot be read; skipped ones are counted and listed
    workers: int = 0  # processes; 0: one a core
    overwrite: bool = False  # replace a corpus that is there

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        require(self.workers >= 0, "workers", f"expected at least 0, got {self.workers}", problems)
        suffixed = Path(self.out).suffix in (".bin", ".idx")
        require(not suffixed, "out", f"expected a prefix without .bin or .idx, got {self.out}", problems)
        if problems:
            raise ConfigError(problems)


def tokenize(config: TokenizeConfig, context: RunContext) -> None:
    """Write the corpus and say what is in it and what is not."""
    from mbfn.data.bad_rows import counts, reasons, write_bad_rows
    from mbfn.data.corpus import files_of
    from mbfn.data.tokenise import order_of, tokenise
    from mbfn.data.tokenizer import open_tokenizer

    del context
    binary, index = files_of(config.out)
    if index.exists() and not config.overwrite:
        raise ConfigError([("out", f"{index} is there already; choose another out, or overwrite=true")])
    order = order_of(
        config.path,
        config.out,
        open_tokenizer(Path(config.tokenizer).expanduser(), "tokenizer"),
        text_key=config.text_key,
        bos=config.prepend_bos,
        eod=config.append_eod,
        bad_rows=config.bad_rows,
        workers=config.workers,
    )
    started = time.perf_counter()
    written = tokenise(order)
    seconds = time.perf_counter() - started
    print(
        f"{binary}: {written.documents:,} documents, {written.tokens:,} tokens, "
        f"{written.tokens / seconds:,.0f} tokens/s in {seconds:.1f} s"
    )
    if written.empty:
        print(f"{written.empty:,} empty rows left out")
    if written.bad:
        listed = binary.with_name(f"{Path(config.out).name}.bad_rows.jsonl")
        write_bad_rows(listed, written.bad)
        print(f"{len(written.bad):,} bad rows left out, listed in {listed}: {reasons(counts(written.bad))}")


if __name__ == "__main__":
    hydra_main(tokenize, root=TokenizeConfig, config_name="tokenize", outputs=False)
