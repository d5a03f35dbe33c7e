"""The nearest valid name, for every message about a name that is not one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LISTED = 12  # names that a line still carries


def hint(name: str, names: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the valid names where none is near."""
    known = sorted(set(names))
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"choose among {', '.join(known[:_LISTED])}{more}" if known else "there are none"
