"""Put measured rows into docs/performance.md: `python tests/bench/performance.py FILE.jsonl ...`.

The files are what gpu.py, precisions.py and `bench=true` with `init.hf` leave; later ones win. Each table stands
between `<!-- rows: NAME -->` and `<!-- end -->`; rows that the files have nothing for stay as they are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs/performance.md"
Record = dict[str, Any]


def pairs(records: Sequence[Record]) -> Iterator[str]:
    """Rows that both sides ran in one call."""
    yield "| row | mbfn ms | plain ms | ratio | tokens/s | TFLOP/s a GPU | of the ceiling | peak GiB | measured |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for ours, other in _sides(records):
        if other is None:
            continue
        share = ", ".join(f"{value:.0%} {name}" for name, value in ours["utilisation"].items()) or "-"
        yield (
            f"| {ours['name']} | {ours['step_ms']:,.1f} | {other['step_ms']:,.1f} | "
            f"{ours['step_ms'] / other['step_ms']:.3f} | {ours['tokens_per_s']:,.0f} | {ours['tflops_causal']:.1f} | "
            f"{share} | {ours['peak_gib']:.1f} | {_when(ours)} |"
        )


def changes(records: Sequence[Record]) -> Iterator[str]:
    """Rows with changes, against the same row without them."""
    plain = {ours["name"]: ours for ours, _ in _sides(records) if "+" not in ours["name"]}
    yield "| row | step ms | without the change | gain | tokens/s | peak GiB | measured |"
    yield "|---|---|---|---|---|---|---|"
    for ours, _ in _sides(records):
        base = plain.get(ours["name"].partition("+")[0])
        if "+" not in ours["name"] or base is None:
            continue
        yield (
            f"| {ours['name']} | {ours['step_ms']:,.1f} | {base['step_ms']:,.1f} | "
            f"{base['step_ms'] / ours['step_ms'] - 1:+.1%} | {ours['tokens_per_s']:,.0f} | {ours['peak_gib']:.1f} | "
            f"{_when(ours)} |"
        )


def splits(records: Sequence[Record]) -> Iterator[str]:
    """Where the time of a step goes."""
    found = [ours for ours, _ in _sides(records) if ours["split_ms"]]
    kinds = sorted({kind for ours in found for kind in ours["split_ms"]}, key=lambda kind: -_most(found, kind))
    yield f"| row | {' | '.join(kinds)} |"
    yield "|---" * (len(kinds) + 1) + "|"
    for ours in found:
        shown = [f"{ours['split_ms'].get(kind, 0) / ours['profiled_ms']:.1%}" for kind in kinds]
        yield f"| {ours['name']} | {' | '.join(shown)} |"


def formats(records: Sequence[Record]) -> Iterator[str]:
    """200 steps of a small model in each number format."""
    yield "| format | loss at the end | off fp32's | at most |"
    yield "|---|---|---|---|"
    for record in {record["format"]: record for record in records if "format" in record}.values():
        yield f"| {record['format']} | {record['end']:.4f} | {record['off']:+.2%} | {record['tolerance']:.0%} |"


def starts(records: Sequence[Record]) -> Iterator[str]:
    """Seconds from the start of the process, with weights of a directory."""
    yield "| ranks ready | model built and weights read | first step done | measured |"
    yield "|---|---|---|---|"
    for record in records:
        if "startup_s" in record and any(text.startswith("init.hf=") for text in record.get("overrides", ())):
            times = record["startup_s"]
            yield f"| {times['opened']} s | {times['built']} s | {times['first_step']} s | {_when(record)} |"


TABLES = {"pairs": pairs, "changes": changes, "splits": splits, "formats": formats, "starts": starts}


def _sides(records: Sequence[Record]) -> list[tuple[Record, Record | None]]:
    last = {(record["name"], record["side"]): record for record in records if "side" in record and record.get("name")}
    names = dict.fromkeys(name for name, side in last if side == "mbfn")
    return [(last[name, "mbfn"], last.get((name, "plain"))) for name in names]


def _most(found: Sequence[Record], kind: str) -> float:
    return max(ours["split_ms"].get(kind, 0) / ours["profiled_ms"] for ours in found)


def _when(record: Record) -> str:
    return f"{record['date'][:10]}, {(record['commit'] or '-')[:7]}"


def merged(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """The rows of two tables, the new one's where both have one of a name; columns of either."""
    found: dict[str, dict[str, str]] = {}
    columns = dict.fromkeys(name for table in (new, old) for name in _cells(table[0]))
    for table in (old, new):
        for line in table[2:]:
            row = dict(zip(_cells(table[0]), _cells(line), strict=True))
            found[row[next(iter(columns))]] = row
    rows = [f"| {' | '.join(row.get(name, '-') for name in columns)} |" for row in found.values()]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def main() -> None:
    records = [json.loads(line) for name in sys.argv[1:] for line in Path(name).read_text().splitlines()]
    page = PAGE.read_text()
    for name, table in TABLES.items():
        lines = list(table(records))
        if len(lines) > 2:
            before, mark, rest = page.partition(f"<!-- rows: {name} -->\n")
            stood, end, after = rest.partition("<!-- end -->")
            page = before + mark + "\n".join(merged(stood.splitlines(), lines)) + "\n" + end + after
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
