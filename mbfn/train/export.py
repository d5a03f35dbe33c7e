"""Weights in from Hugging Face directories and out to them, without a checkpoint between."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mbfn import megatron
from mbfn.config.run import RunConfig
from mbfn.convert import to_hf, to_megatron
from mbfn.convert.table import table_of
from mbfn.data.tokenizer import TokenizerFiles
from mbfn.megatron import Models, World
from mbfn.megatron.settings import choose_impl
from mbfn.storage import Declared, open_hf, save_hf
from mbfn.train.gather import States, with_all_states


def initial_weights(run: RunConfig, world: World) -> Mapping[str, Tensor] | None:
    """This rank's slices of `init.hf`, read when they are asked for; none where weights start random."""
    if run.init.hf is None:
        return None
    source = open_hf(Path(run.init.hf).expanduser())
    return to_megatron(source, run.model, parallel=run.parallel, rank=world.rank, impl=choose_impl(world.device))


def export_hf(run: RunConfig, world: World, models: Models, tokenizer: TokenizerFiles | None, directory: Path) -> None:
    """Write the weights of all ranks as a Hugging Face directory, with its tokenizer where there is one. Collective.

    Rank 0 holds a tensor or two at a time. One dtype throughout: that of the parameters in training.
    """
    own = megatron.state_dict(models)
    dtype = next(iter(own.values())).dtype

    def write(states: States) -> None:
        items = to_hf(states, run.model, parallel=run.parallel, impl=models.impl)
        shapes = table_of(run.model, run.parallel).hf_shapes
        plan = [Declared(name=name, shape=shape, dtype=dtype) for name, shape in shapes.items()]
        save_hf(directory, items, run.model, plan=plan, extra_files=tokenizer.files if tokenizer else ())

    with_all_states(world, own, write)
