"""Layouts of a model over a number of GPUs that fit, fastest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import RunConfig, layout_problems
from mbfn.config.train import TrainConfig, recomputing
from mbfn.errors import ConfigError
from mbfn.plan.devices import SHARES, Device
from mbfn.plan.memory import peak
from mbfn.plan.speed import Speed, estimate

_TP = (1, 2, 4, 8)
_CP = (1, 2, 4, 8, 16)
_MICRO = (1, 2, 4, 8)
_MOST_CHUNKS = 10  # of a stage: more send more often for little less waiting
_SHORTEST = 1024  # tokens of a sequence that context parallelism leaves a rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout that fits."""

    run: RunConfig
    peak: float
    speed: Speed


def fits(run: RunConfig, device: Device) -> bool:
    """Whether the fullest rank leaves the reserve free."""
    return peak(run) + SHARES.reserved <= device.memory


def search(run: RunConfig, device: Device, gpus: int) -> list[Candidate]:
    """Layouts of `run`'s model and batch on `gpus` GPUs that fit, fastest first; of each tp, pp, cp and ep the best.

    Varies tp (inside a node), pp, vpp, cp, ep, dp, the micro-batch, and recomputation where nothing fits without.
    """
    found = [
        Candidate(run=candidate, peak=peak(candidate), speed=estimate(candidate, device))
        for parallel in layouts(run, device, gpus)
        for candidate in _batches(run, parallel, device)
    ]
    best: dict[tuple[int, ...], Candidate] = {}
    for candidate in sorted(found, key=lambda candidate: (candidate.speed.step, candidate.peak)):
        parallel = candidate.run.parallel
        best.setdefault((parallel.tp, parallel.pp, parallel.cp, parallel.ep), candidate)
    return list(best.values())


def layouts(run: RunConfig, device: Device, gpus: int) -> Iterator[ParallelConfig]:
    """The layouts of exactly `gpus` ranks that the model can be cut into."""
    sizes = [tp for tp in _TP if tp <= device.node_size]
    contexts = [cp for cp in _CP if cp == 1 or run.train.seq_length >= _SHORTEST * cp]
    stages = range(1, min(gpus, run.model.num_layers) + 1)
    for tp, cp, pp, ep in itertools.product(sizes, contexts, stages, _expert_groups(run)):
        if gpus % (tp * cp * pp) or gpus % (pp * ep):
            continue
        for vpp, counted in itertools.product(_interleavings(run, pp), (False, True)[: 1 + (pp > 1)]):
            parallel = ParallelConfig(
                tp=tp,
                cp=cp,
                pp=pp,
                vpp=vpp,
                ep=ep,
                dp=gpus // (tp * cp * pp),
                sequence_parallel=tp > 1,
                account_for_embedding_in_pipeline_split=counted,
                account_for_loss_in_pipeline_split=counted,
            )
            if not layout_problems(run.model, parallel):
                yield parallel


def _expert_groups(run: RunConfig) -> list[int]:
    """Expert-parallel sizes: powers of two that divide the experts."""
    experts = run.model.moe.num_moe_experts if run.model.moe else 1
    return [size for size in (1, 2, 4, 8, 16, 32, 64) if experts % size == 0 and size <= experts]


def _interleavings(run: RunConfig, pp: int) -> list[int]:
    """Chunks a stage that divide the layers, with or without embedding and loss counted as two more."""
    layers = run.model.num_layers
    if pp == 1:
        return [1]
    return [
        n
        for n in range(1, min(layers // pp + 1, _MOST_CHUNKS) + 1)
        if layers % (pp * n) == 0 or (layers + 2) % (pp * n) == 0
    ]


def _batches(run: RunConfig, parallel: ParallelConfig, device: Device) -> Iterator[RunConfig]:
    """The micro-batches that fit; with recomputation only if none fits without."""
    for kind in dict.fromkeys((run.train, recomputing(run.train, "full"))):
        trains = (replace(kind, micro_batch_size=size) for size in _MICRO)
        valid = (candidate for train in trains if (candidate := _valid(run, parallel, train)) is not None)
        fitting = list(itertools.takewhile(lambda candidate: fits(candidate, device), valid))
        if fitting:
            yield from fitting
            return


def _valid(run: RunConfig, parallel: ParallelConfig, train: TrainConfig) -> RunConfig | None:
    try:
        return replace(run, parallel=parallel, train=train)
    except ConfigError:
        return None
