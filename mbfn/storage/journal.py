"""What a conversion has finished so far: a note for each file, beside the files, that is whole or not there."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a conversion grows, and where it is to stand."""

    target: Path
    box: Path
    name: str

    @property
    def out(self) -> Path:
        """The directory that grows."""
        return self.box / "out"

    @property
    def journal(self) -> Path:
        """The notes."""
        return self.box / "journal"


def note_file(site: Site, file: str) -> Path:
    """Where the note of a file stands."""
    return site.journal / f"{file}.json"


def noted(site: Site, file: str) -> bool:
    """Whether the file was finished once."""
    return note_file(site, file).exists()


def note(site: Site, file: str) -> dict[str, Any]:
    """The run that finished the file and the CRC-32 of each part; empty when none did."""
    try:
        found: dict[str, Any] = json.loads(note_file(site, file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def put_note(site: Site, file: str, crcs: Iterable[int], run: str) -> None:
    """Whole or not at all: a note that stands says that its file does."""
    note = note_file(site, file)
    draft = note.with_suffix(f".{uuid.uuid4().hex[:8]}")
    with draft.open("w", encoding="utf-8") as stream:
        json.dump({"run": run, "crc32": list(crcs)}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    draft.rename(note)
