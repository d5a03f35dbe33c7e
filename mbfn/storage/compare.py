"""Whether two stores hold the same weights, bit for bit, read piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mbfn.convert.copies import Copy, TensorPlan
from mbfn.convert.plans import Layout, checkpoint_hf_plans, hf_plans, rank_plans
from mbfn.convert.states import PlannedState, RankStates, dtype_of, one_dtype
from mbfn.convert.table import Table
from mbfn.storage.planned import reader
from mbfn.storage.regions import BITS
from mbfn.storage.streams import pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One tensor that is not the same on both sides."""

    name: str
    text: str  # what differs

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


def compare_checkpoint(
    hf: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor], table: Table
) -> Iterator[Difference | None]:
    """For every Hugging Face tensor, how its weights in a Megatron checkpoint differ; None where they do not."""
    for plan in checkpoint_hf_plans(table):
        yield _compare(hf, plan, checkpoint)


def compare_round_trip(hf: Mapping[str, Tensor], table: Table, layout: Layout) -> Iterator[Difference | None]:
    """The same after HF -> every rank's state -> HF, tensor by tensor, without a file in between."""
    ranks = range(layout.parallel.world_size)
    states = {rank: PlannedState(rank_plans(table, layout, rank), hf) for rank in ranks}
    for plan in hf_plans(table, layout, ranks):
        yield _compare(hf, plan, RankStates(states))


def _compare(hf: Mapping[str, Tensor], plan: TensorPlan, other: Mapping[str, Tensor]) -> Difference | None:
    expected, found = dtype_of(hf, plan.name), one_dtype(plan, other)
    if expected != found:
        return Difference(name=plan.name, text=f"expected {expected}, found {found}")
    here = reader(TensorPlan(plan.name, plan.shape, (_whole(plan),), plan.name), hf)
    there = reader(plan, other)
    differing = 0
    for start, stop in pieces(plan.shape, expected.itemsize):
        left, right = (torch.empty(stop - start, dtype=expected) for _ in range(2))
        here(start, stop, left)
        there(start, stop, right)
        bits = BITS[expected.itemsize]
        differing += int((left.view(bits) != right.view(bits)).sum())
    if differing:
        return Difference(name=plan.name, text=f"{differing} of {plan.numel} elements differ")
    return None


def _whole(plan: TensorPlan) -> Copy:
    return Copy(plan.name, (plan.numel,), 0, (1,), 0, (1,))
