"""What differs between two configurations, and what each difference can change. Pure: trees in, values out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Effect = Literal["numerics", "memory", "speed", "bookkeeping"]
Leaves = Mapping[str, Any]
Tree = Mapping[str, Any]

ORDER: tuple[Effect, ...] = ("numerics", "memory", "speed", "bookkeeping")

# The strongest effect of a field, by its path or the longest prefix of it that is here. Numerics: what is computed,
# beyond the order in which floats are added. Whole sections are numerics unless a field says otherwise, so a new field
# counts as one until somebody has thought about it; sections of mixed fields name each.
EFFECTS: Mapping[str, Effect] = {
    "model": "numerics",
    "model.make_vocab_size_divisible_by": "memory",
    "precision": "numerics",
    "fusion": "speed",
    "peft": "numerics",
    "data": "numerics",
    "data.cache": "bookkeeping",
    "data.workers": "speed",
    "loss": "numerics",
    "optim": "numerics",
    "optim.overlap_grad_reduce": "speed",
    "optim.overlap_param_gather": "speed",
    "optim.optimizer_offload_fraction": "memory",
    "optim.overlap_cpu_optimizer_d2h_h2d": "speed",
    "schedule": "numerics",
    "init": "numerics",
    "parallel.tp": "memory",
    "parallel.pp": "memory",
    "parallel.vpp": "speed",
    "parallel.cp": "memory",
    "parallel.ep": "memory",
    "parallel.etp": "memory",
    "parallel.dp": "speed",
    "parallel.sequence_parallel": "memory",
    "parallel.num_layers_in_first_pipeline_stage": "memory",
    "parallel.num_layers_in_last_pipeline_stage": "memory",
    "parallel.account_for_embedding_in_pipeline_split": "memory",
    "parallel.account_for_loss_in_pipeline_split": "memory",
    "parallel.pipeline_model_parallel_layout": "memory",
    "parallel.sharding": "memory",
    "parallel.num_distributed_optimizer_instances": "memory",
    "parallel.cp_comm_type": "speed",
    "parallel.hierarchical_context_parallel_sizes": "speed",
    "parallel.overlap_p2p_comm": "speed",
    "parallel.tp_comm_overlap": "speed",
    "parallel.moe_token_dispatcher_type": "speed",
    "parallel.moe_flex_dispatcher_backend": "speed",
    "parallel.moe_shared_expert_overlap": "speed",
    "parallel.overlap_moe_expert_parallel_comm": "speed",
    "parallel.delay_wgrad_compute": "speed",
    "train.steps": "numerics",
    "train.global_batch_size": "numerics",
    "train.micro_batch_size": "memory",
    "train.seq_length": "numerics",
    "train.recompute": "memory",
    "train.recompute_method": "memory",
    "train.recompute_num_layers": "memory",
    "train.recompute_modules": "memory",
    "train.offload_modules": "memory",
    "train.offload_num_layers": "memory",
    "train.cuda_graph_impl": "speed",
    "train.cuda_graph_modules": "speed",
    "train.deterministic": "speed",
    "train.seed": "numerics",
    "train.eval_interval": "bookkeeping",
    "train.eval_batches": "bookkeeping",
    "checkpoint": "bookkeeping",
    "guard": "numerics",
    "profile": "bookkeeping",
    "log": "bookkeeping",
    "launch": "bookkeeping",
    "launch.device": "speed",
    "site": "bookkeeping",
    "bench": "bookkeeping",
    "benchmark": "bookkeeping",
}


class _Absent:
    """A field that one side does not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One leaf that differs."""

    path: str
    before: Any
    after: Any
    effect: Effect


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """All that differs between two configurations."""

    changes: tuple[Change, ...]  # strongest effect first
    defaults: tuple[str, ...]  # fields that only one side has, at that side's default: no change of a run
    equal: int  # leaves that do not differ

    @property
    def numerics(self) -> bool:
        """Whether the two runs compute something different."""
        return any(change.effect == "numerics" for change in self.changes)


def effect_of(path: str) -> Effect:
    """What a field can change; a field that nobody has classified may change anything."""
    while path:
        if path in EFFECTS:
            return EFFECTS[path]
        path = path.rpartition(".")[0]
    return "numerics"


def flatten(tree: Tree, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every leaf; a list is one leaf."""
    for name, value in tree.items():
        inner = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping) and value:
            yield from flatten(value, inner)
        else:
            yield inner, value


def difference(before: Tree, after: Tree, defaults_before: Tree, defaults_after: Tree) -> Difference:
    """What differs between the configurations `before` and `after`; the defaults are those of each side's classes."""
    old, new = dict(flatten(before)), dict(flatten(after))
    plain = {**dict(flatten(defaults_before)), **dict(flatten(defaults_after))}
    changes, folded = [], []
    for path in dict.fromkeys((*old, *new)):
        a, b = old.get(path, ABSENT), new.get(path, ABSENT)
        if same(a, b):
            continue
        only = b if a is ABSENT else a if b is ABSENT else ABSENT
        if only is not ABSENT and path in plain and same(only, plain[path]):
            folded.append(path)
        else:
            changes.append(Change(path=path, before=a, after=b, effect=effect_of(path)))
    changes.sort(key=lambda change: ORDER.index(change.effect))
    equal = sum(same(value, new.get(path, ABSENT)) for path, value in old.items())
    return Difference(changes=tuple(changes), defaults=tuple(folded), equal=equal)


def same(before: Any, after: Any) -> bool:
    """Equal in value and type: 1 is not 1.0, nor true."""
    return type(before) is type(after) and before == after
