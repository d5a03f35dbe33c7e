"""The pure part of diffs: every field has an effect, changes are found and ordered, defaults fold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbfn.config.diff import ABSENT, EFFECTS, ORDER, difference, effect_of, flatten
from mbfn.config.overrides import leaves
from mbfn.config.run import RunConfig

LEAVES = tuple(leaves(RunConfig))
trees = st.recursive(
    st.integers(0, 2) | st.booleans() | st.none() | st.lists(st.integers(0, 2), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3),
    max_leaves=8,
).filter(lambda tree: isinstance(tree, dict))


@pytest.mark.parametrize("path", LEAVES)
def test_every_field_of_a_run_has_an_effect(path: str) -> None:
    parts = path.split(".")
    prefixes = {".".join(parts[: depth + 1]) for depth in range(len(parts))}
    assert prefixes & EFFECTS.keys(), f"{path}: add it to EFFECTS in mbfn/config/diff.py"


def test_every_effect_is_of_a_field() -> None:
    stale = {name for name in EFFECTS if not any(path == name or path.startswith(f"{name}.") for path in LEAVES)}
    assert stale == set()


@pytest.mark.parametrize(
    ("path", "effect"),
    [
        ("model.num_layers", "numerics"),
        ("model.rope_scaling.factor", "numerics"),
        ("model.make_vocab_size_divisible_by", "memory"),
        ("optim.lr", "numerics"),
        ("optim.overlap_grad_reduce", "speed"),
        ("parallel.vpp", "speed"),
        ("train.recompute", "memory"),
        ("log.interval", "bookkeeping"),
        ("something.of.another.revision", "numerics"),
    ],
)
def test_the_longest_prefix_decides(path: str, effect: str) -> None:
    assert effect_of(path) == effect


@given(trees)
def test_a_tree_does_not_differ_from_itself(tree: dict[str, object]) -> None:
    found = difference(tree, tree, {}, {})
    assert not found.changes
    assert not found.numerics
    assert found.equal == len(dict(flatten(tree)))


@given(trees, trees)
def test_both_ways_name_the_same_changes(a: dict[str, object], b: dict[str, object]) -> None:
    there, back = difference(a, b, {}, {}), difference(b, a, {}, {})
    assert {(c.path, repr(c.before), repr(c.after)) for c in there.changes} == {
        (c.path, repr(c.after), repr(c.before)) for c in back.changes
    }
    patched = dict(flatten(a)) | {c.path: c.after for c in there.changes}
    assert {path: value for path, value in patched.items() if value is not ABSENT} == dict(flatten(b))


def test_types_count() -> None:
    assert [c.path for c in difference({"a": 1, "b": True}, {"a": 1.0, "b": 1}, {}, {}).changes] == ["a", "b"]


def test_changes_come_strongest_first() -> None:
    before = {"log": {"interval": 1}, "parallel": {"dp": 1, "tp": 1}, "optim": {"lr": 0.1}}
    after = {"log": {"interval": 2}, "parallel": {"dp": 2, "tp": 2}, "optim": {"lr": 0.2}}
    assert [change.effect for change in difference(before, after, {}, {}).changes] == list(ORDER)


def test_a_new_field_at_its_default_is_no_change() -> None:
    before, plain = {"train": {"old": 1}}, {"train": {"old": 1, "new": 3, "other": 5}}
    found = difference(before, {"train": {"old": 1, "new": 3, "other": 4}}, {}, plain)
    assert found.defaults == ("train.new",)
    assert [(c.path, c.before, c.after) for c in found.changes] == [("train.other", ABSENT, 4)]
