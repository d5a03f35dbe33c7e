"""Losses that a step minimises beside its own, as figures: balance of experts, router scores, further tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker, set_moe_metrics_tracker

from mbfn.config.run import RunConfig
from mbfn.megatron.mtp import FurtherTokens
from mbfn.megatron.world import World

_BALANCE = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


@contextlib.contextmanager
def side_losses(run: RunConfig, world: World, chunks: Sequence[FurtherTokens]) -> Iterator[dict[str, float]]:
    """Collect them over the passes inside; the dict is filled at the end, alike on every rank. Collective.

    Balance and router losses are means over layers with experts and over micro-batches, without their coefficients;
    that of further tokens is a mean over tokens.
    """
    tracker = MoEMetricsTracker()  # Megatron keeps one for all models of a process
    set_moe_metrics_tracker(tracker)
    for chunk in chunks:
        chunk.further_sums.clear()
    found: dict[str, float] = {}
    yield found
    names = _names(run)
    sums = [_recorded(tracker, name) for name in names]
    further = [part for chunk in chunks for part in chunk.further_sums] if run.model.mtp_num_layers else []
    if not names and not run.model.mtp_num_layers:
        return
    zero = torch.zeros(2, dtype=torch.float64, device=world.device)
    own = torch.stack([zero.new_tensor(total) for total in sums] + list(sum((part.double() for part in further), zero)))
    dist.all_reduce(own)
    *totals, loss, weight = own.tolist()
    found |= {name: total / _count(run, name) for name, total in zip(names, totals, strict=True)}
    if run.model.mtp_num_layers:
        found["mtp_loss"] = loss / weight if weight else 0.0


def _names(run: RunConfig) -> list[str]:
    moe = run.model.moe
    if moe is None:
        return []
    balance = [_BALANCE[moe.moe_router_load_balancing_type]] if moe.moe_aux_loss_coeff else []
    return balance + (["z_loss"] if moe.moe_z_loss_coeff else [])


def _recorded(tracker: MoEMetricsTracker, name: str) -> float:
    entry = tracker.metrics.get(name)
    return 0.0 if entry is None else float(entry.values.sum())


def _count(run: RunConfig, name: str) -> float:
    """What a total over all ranks is divided by: those that share a layer hold parts of a balance loss."""
    moe, parallel = run.model.moe, run.parallel
    assert moe is not None
    layers = run.model.num_layers - len(moe.dense_layers) + run.model.mtp_num_layers
    replicas = {"global_load_balancing_loss": 1, "z_loss": parallel.tp * parallel.cp * parallel.data_parallel_size}
    return layers * run.num_microbatches * replicas.get(name, parallel.data_parallel_size)
