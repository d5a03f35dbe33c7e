"""Comparisons as text for a terminal, Markdown for a pull request, or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from mbfn.config.diff import ABSENT, Change
from mbfn.diff.compare import Comparison, Derived

Row = tuple[str, str, str, str]  # name, before, after, how much more
_FOLDED = 8  # names that a line still carries
_TITLES = {"both": "", "new": " (new)", "removed": " (removed)", "broken": " (does not compose)"}


def as_text(found: Sequence[Comparison]) -> str:
    """Effects as headings, one field a line."""
    parts = [_text(comparison, names) for comparison, names in _distinct(found)]
    return "\n".join([*parts, _unchanged(found)])


def as_markdown(found: Sequence[Comparison]) -> str:
    """A table for each comparison."""
    parts = [_markdown(comparison, names) for comparison, names in _distinct(found)]
    return "\n".join(["## Configuration", "", _headline(found), "", *parts, _unchanged(found)])


def as_json(found: Sequence[Comparison]) -> str:
    """Everything, for programs; an absent value is left out."""
    return json.dumps(
        [
            {
                "name": comparison.name,
                "status": comparison.status,
                "numerics": comparison.difference.numerics,
                "changes": [_present(asdict(change)) for change in comparison.difference.changes],
                "defaults": list(comparison.difference.defaults),
                "derived": [_present(asdict(derived)) for derived in comparison.derived],
                "equal": comparison.difference.equal,
                "errors": [error for error in comparison.errors if error],
            }
            for comparison in found
        ],
        indent=2,
    )


def _text(comparison: Comparison, names: Sequence[str]) -> str:
    lines = [f"{comparison.name}{_TITLES[comparison.status]}"]
    lines += [f"  {error}" for error in comparison.errors if error]
    for heading, rows in _groups(comparison):
        width = max(len(row[0]) for row in rows)
        lines.append(f"  {heading}")
        lines += [f"    {name:<{width}}  {_arrow(old, new)}{more and f'  ({more})'}" for name, old, new, more in rows]
    return "\n".join([*lines, *(f"  {line}" for line in _footer(comparison, names)), ""])


def _markdown(comparison: Comparison, names: Sequence[str]) -> str:
    lines = [f"### `{comparison.name}`{_TITLES[comparison.status]}", ""]
    lines += [f"> {error}" for error in comparison.errors if error]
    rows = [(heading, *row) for heading, group in _groups(comparison) for row in group]
    if rows:
        lines += ["| changes | field | before | after | |", "|---|---|---|---|---|"]
        lines += [
            f"| {' | '.join([heading, _code(name), _code(a), _code(b), more])} |" for heading, name, a, b, more in rows
        ]
    return "\n".join([*lines, "", *_footer(comparison, names), ""])


def _groups(comparison: Comparison) -> Iterator[tuple[str, list[Row]]]:
    for effect, changes in groupby(comparison.difference.changes, key=lambda change: change.effect):
        yield effect, [_row(change.path, change) for change in changes]
    if comparison.derived:
        yield "derived", [_row(derived.name, derived) for derived in comparison.derived]


def _row(name: str, change: Change | Derived) -> Row:
    return name, _value(change.before), _value(change.after), _ratio(change.before, change.after)


def _footer(comparison: Comparison, names: Sequence[str]) -> Iterator[str]:
    if folded := comparison.difference.defaults:
        more = f" and {len(folded) - _FOLDED} more" if len(folded) > _FOLDED else ""
        yield f"on one side only, at the default: {', '.join(folded[:_FOLDED])}{more}"
    if comparison.difference.changes:
        yield f"{comparison.difference.equal} fields are equal"
    if names:
        yield f"the same in: {', '.join(names)}"


def _headline(found: Sequence[Comparison]) -> str:
    changed = [comparison.name for comparison in found if comparison.difference.numerics]
    if not changed:
        return "No run computes anything different."
    return f"**Numerics change** in {', '.join(f'`{name}`' for name in changed)}."


def _unchanged(found: Sequence[Comparison]) -> str:
    equal = [comparison.name for comparison in found if comparison.is_equal]
    return f"unchanged: {', '.join(equal)}" if equal else ""


def _distinct(found: Sequence[Comparison]) -> list[tuple[Comparison, list[str]]]:
    """What differs, each difference once with the names of the others that differ likewise."""
    seen: dict[tuple[object, ...], tuple[Comparison, list[str]]] = {}
    for comparison in found:
        if comparison.is_equal:
            continue
        key = (comparison.status, comparison.errors, repr(comparison.difference.changes), repr(comparison.derived))
        if key in seen:
            seen[key][1].append(comparison.name)
        else:
            seen[key] = (comparison, [])
    return list(seen.values())


def _value(value: Any) -> str:
    return "" if value is ABSENT else json.dumps(value)


def _arrow(before: str, after: str) -> str:
    if not before or not after:
        return f"+ {after}" if after else f"- {before}"
    return f"{before} -> {after}"


def _ratio(before: Any, after: Any) -> str:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (before, after))
    if not numbers or not before:
        return ""
    ratio = after / before
    return f"x{ratio:.3g}" if ratio >= 2 or 0 <= ratio <= 0.5 else f"{(ratio - 1) * 100:+.3g}%"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else ""


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if not isinstance(value, type(ABSENT))}
