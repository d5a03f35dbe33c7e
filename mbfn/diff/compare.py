"""Two sides -> comparisons, one for each configuration that both can make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mbfn.config.diff import ABSENT, Difference, difference, same
from mbfn.diff.sides import Side
from mbfn.diff.snapshot import Snapshot

Status = Literal["both", "new", "removed", "broken"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """A figure that follows from the configuration and differs."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One configuration on both sides."""

    name: str
    status: Status
    difference: Difference
    derived: tuple[Derived, ...]
    errors: tuple[str, str] = ("", "")  # why a side does not compose

    @property
    def is_equal(self) -> bool:
        """Whether nothing is to be shown."""
        return (
            self.status == "both" and not self.difference.changes and not self.difference.defaults and not self.derived
        )


_NOTHING = Difference(changes=(), defaults=(), equal=0)


def comparisons(before: Side, after: Side, extra: Sequence[str]) -> list[Comparison]:
    """The configuration that `extra` makes; between two trees without `extra`, the defaults and every recipe."""
    jobs: list[list[str]] = [list(extra)]
    if before.tree and after.tree and not extra:
        jobs += [[f"+experiment={name}"] for name in sorted(before.experiments() | after.experiments())]
    pairs = zip(jobs, before.snapshots(jobs), after.snapshots(jobs), strict=True)
    return [compared(_name(job, before, after), old, new) for job, old, new in pairs]


def compared(name: str, old: Snapshot | None, new: Snapshot | None) -> Comparison:
    """Both snapshots of one configuration; none is a side that does not have it."""
    errors = tuple((side or {}).get("error", "") for side in (old, new))
    if any(errors):
        return Comparison(name=name, status="broken", difference=_NOTHING, derived=(), errors=(errors[0], errors[1]))
    if old is None or new is None:
        facts = _derived((old or {}).get("facts", {}), (new or {}).get("facts", {}))
        return Comparison(name=name, status="new" if old is None else "removed", difference=_NOTHING, derived=facts)
    found = difference(old["config"], new["config"], old["defaults"], new["defaults"])
    known = old["facts"].keys() & new["facts"].keys()  # an older revision derives fewer
    facts = _derived(*({k: v for k, v in side["facts"].items() if k in known} for side in (old, new)))
    return Comparison(name=name, status="both", difference=found, derived=facts)


def _derived(old: dict[str, Any], new: dict[str, Any]) -> tuple[Derived, ...]:
    pairs = ((name, old.get(name, ABSENT), new.get(name, ABSENT)) for name in dict.fromkeys((*old, *new)))
    return tuple(Derived(name=name, before=a, after=b) for name, a, b in pairs if not same(a, b))


def _name(job: Sequence[str], before: Side, after: Side) -> str:
    said = " ".join(job).removeprefix("+")
    return said or ("defaults" if before.tree and after.tree else f"{before.label} -> {after.label}")
