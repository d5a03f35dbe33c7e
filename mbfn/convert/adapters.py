"""The table of a model's adapters: Megatron's tensors beside the weights, and PEFT's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from mbfn.config.adapters import Adapter
from mbfn.config.model import ModelConfig, padded_vocab_size
from mbfn.config.parallel import ParallelConfig
from mbfn.convert.plans import Layout, hf_plans, rank_plans
from mbfn.convert.states import PlannedState, RankStates, check_hf, check_states, gather
from mbfn.convert.table import Impl, Table
from mbfn.errors import ConversionError
from mbfn.families import family_of
from mbfn.families.adapters import adapter_rules, rank_sizes
from mbfn.families.decoder import axis_sizes
from mbfn.families.rule import Form


def adapter_table(
    model: ModelConfig, adapters: Iterable[Adapter], parallel: ParallelConfig, form: Form = "stacked"
) -> Table:
    """The tensors of `adapters`, in PEFT's names on Hugging Face's side.

    `form`: experts as PEFT adapts the stacked tensors of transformers 5, or one linear each as it did before.
    """
    adapters = tuple(adapters)
    sizes = axis_sizes(model, padded_vocab_size(model, parallel)) | rank_sizes(adapters)
    rules = adapter_rules(family_of(model).rules(model, form), adapters, form)
    return Table(model, rules, sizes, stacked_layers=False)


def adapter_to_peft(
    states: Mapping[int, Mapping[str, Tensor]],
    model: ModelConfig,
    adapters: Iterable[Adapter],
    *,
    parallel: ParallelConfig,
    impl: Impl = "local",
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by PEFT's name from the adapters of any set of ranks that covers them, one alive at a time.

    Raises: ConversionError naming the first tensor that is missing, of another shape, or not covered by these ranks.
    """
    table, layout = adapter_table(model, adapters, parallel), Layout(parallel=parallel, impl=impl)
    check_states(table, layout, states)
    plans, source = tuple(hf_plans(table, layout, states)), RankStates(states)
    return ((plan.name, gather(plan, source)) for plan in plans)


def adapter_to_megatron(
    source: Mapping[str, Tensor],
    model: ModelConfig,
    adapters: Iterable[Adapter],
    *,
    parallel: ParallelConfig,
    rank: int = 0,
    impl: Impl = "local",
) -> PlannedState:
    """`rank`'s tensors of the adapters from those by PEFT's names, each made when it is asked for.

    Raises: ConversionError for names or shapes that are not those of `adapters`.
    """
    table = adapter_table(model, adapters, parallel)
    check_hf(table, source, "adapter")
    check_repeats(table, source, "adapter")
    return PlannedState(rank_plans(table, Layout(parallel=parallel, impl=impl), rank), source)


def check_repeats(table: Table, source: Mapping[str, Tensor], where: str) -> None:
    """That parts which share one A hold the same one.

    Raises: ConversionError naming the first two that differ.
    """
    for tensor in table.tensors.values():
        for copy in tensor.repeats:
            first = tensor.plan.copies[0].source
            if not torch.equal(source[first], source[copy.source]):
                raise ConversionError(
                    f"{where}: {copy.source} differs from {first}; adapters of parts that were trained apart need "
                    "peft=lora_canonical"
                )
