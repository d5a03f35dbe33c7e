"""`events.jsonl`: what went wrong in a run and was dealt with, one JSON object each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"


def note_event(output_dir: Path, event: Mapping[str, Any]) -> None:
    """Append `event`. A resumed run that meets the same fault again notes it once."""
    plain = {name: None if _odd(value) else value for name, value in event.items()}
    line = json.dumps(plain)
    path = output_dir / EVENTS
    known = path.read_text().splitlines() if path.is_file() else []
    if line not in known:
        with path.open("a") as file:
            file.write(line + "\n")


def _odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
