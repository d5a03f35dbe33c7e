"""What trains of the weights that a rank holds, where adapters stand beside frozen ones."""

from __future__ import annotations

from mbfn.config.adapters import Adapter, adapters_of
from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import RunConfig
from mbfn.plan.weights import StageWeights, Weights


def added(run: RunConfig, weights: StageWeights) -> Weights:
    """The adapters of one rank of a stage; nothing where every weight trains."""
    layers = {layer for chunk in weights.chunks for layer in chunk}
    here = (adapter for adapter in adapters_of(run.model, run.peft) if adapter.layer in layers)
    return sum((_on_rank(adapter, run.parallel) for adapter in here), Weights())


def trained(run: RunConfig, weights: StageWeights) -> Weights:
    """What one rank of a stage updates: its weights, or its adapters."""
    return weights.held if run.peft.kind == "none" else added(run, weights)


def _on_rank(adapter: Adapter, parallel: ParallelConfig) -> Weights:
    """Tensor parallelism cuts B with the rows of the weight, or A with its columns."""
    linear, spec = adapter.linear, adapter.spec
    size = parallel.etp if linear.experts else parallel.tp
    rows = linear.out_size // (size if linear.cut == "out" else 1)
    columns = linear.in_size // (size if linear.cut == "in" else 1)
    count = spec.rank * (columns * max(1, len(spec.parts)) + rows) + spec.use_dora * rows
    if not linear.experts:
        return Weights(parameters=count, matrices=count)
    each = count * (linear.experts // parallel.ep)
    return Weights(parameters=each, matrices=each, expert_parameters=each, expert_matrices=each)
