"""A plan as pictures: memory of every stage, and the pipeline's timeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbfn.config.run import RunConfig
from mbfn.plan.devices import SHARES, Device
from mbfn.plan.memory import COMPONENTS, GIB, StageMemory, stage_memory
from mbfn.plan.schedule import Kind, Slot, bubble, timeline
from mbfn.plan.speed import estimate
from mbfn.plan.weights import stage_weights

_COLORS = {
    "weights": "#1f5fa8",
    "fp8_weights": "#5b8fc7",
    "gradients": "#e0a030",
    "optimizer": "#8a6bb8",
    "activations": "#4a9d6e",
    "temporary": "#b8b8b8",
}
_SHADES: dict[Kind, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "forward": ((0.12, 0.37, 0.66), (0.70, 0.81, 0.91)),
    "backward": ((0.82, 0.38, 0.18), (0.96, 0.79, 0.71)),
}
_NAMED_CHUNKS = 6
_LABELLED = 400  # tasks that still leave room for their numbers


def draw_memory(run: RunConfig, device: Device, path: Path) -> None:
    """Stacked bars of one rank of each stage under the device's memory, as a PNG."""
    stages = stage_memory(run)
    figure, axes = _figure(max(5.5, 2.5 + 0.55 * len(stages)), 4.2)
    base = [0.0] * len(stages)
    for name in COMPONENTS:
        heights = [getattr(stage, name) / GIB for stage in stages]
        if any(heights):
            label = name.replace("_", " ")
            axes.bar(range(len(stages)), heights, bottom=base, width=0.7, color=_COLORS[name], label=label)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    _memory_axes(axes, stages, device)
    axes.set_title(f"memory of one rank, {_layout(run)}", loc="left", fontsize=10)
    figure.savefig(path, dpi=130)


def draw_pipeline(run: RunConfig, device: Device, path: Path) -> None:
    """The first micro-batches of a step on every stage, forward and backward, as a PNG."""
    shown = min(run.num_microbatches, 2 * run.parallel.pp if run.parallel.pp > 1 else 8)
    slots = timeline(run.parallel, shown, _durations(run, device))
    figure, axes = _figure(11, 1.6 + 0.32 * run.parallel.pp)
    for slot in slots:
        _task(axes, slot, run.parallel.vpp, labelled=len(slots) <= _LABELLED)
    share = bubble(run.parallel, run.num_microbatches)
    axes.set_title(
        f"pipeline of {_layout(run)}: {shown} of {run.num_microbatches} micro-batches; a whole step idles {share:.1%}",
        loc="left",
        fontsize=10,
    )
    axes.set(xlabel="ms", ylabel="stage", yticks=range(run.parallel.pp), ylim=(run.parallel.pp - 0.5, -0.5))
    axes.set_xlim(0, max(slot.stop for slot in slots) * 1e3)
    _chunk_legend(axes, run.parallel.vpp)
    figure.savefig(path, dpi=130)


def _memory_axes(axes: Any, stages: Sequence[StageMemory], device: Device) -> None:
    peaks = [stage.peak / GIB for stage in stages]
    free = (device.memory - SHARES.reserved) / GIB
    axes.axhline(free, color="#c03030", linewidth=1.2, linestyle="--", label=f"{device.label}, usable")
    for place, peak in enumerate(peaks):
        axes.text(place, peak, f"{peak:.1f}", ha="center", va="bottom", fontsize=7)
    axes.set(xlabel="pipeline stage", ylabel="GiB", xticks=range(len(stages)), ylim=(0, max(*peaks, free) * 1.12))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _task(axes: Any, slot: Slot, chunks: int, *, labelled: bool) -> None:
    start, width = slot.start * 1e3, (slot.stop - slot.start) * 1e3
    color = _shade(slot.task.kind, slot.task.chunk, chunks)
    axes.barh(slot.stage, width, left=start, height=0.86, color=color, edgecolor="white", linewidth=0.4)
    if labelled:
        place = (start + width / 2, slot.stage)
        axes.annotate(str(slot.task.microbatch), place, ha="center", va="center", fontsize=5.5, color="white")


def _chunk_legend(axes: Any, chunks: int) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(color=_shade(kind, chunk, chunks), label=kind if chunks == 1 else f"{kind}, chunk {chunk}")
        for kind in ("forward", "backward")
        for chunk in range(chunks)
        if chunk < _NAMED_CHUNKS
    ]
    axes.legend(handles=patches, frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _shade(kind: Kind, chunk: int, chunks: int) -> tuple[float, ...]:
    """From dark, the first chunk, to light, the last."""
    dark, light = _SHADES[kind]
    share = chunk / max(chunks - 1, 1)
    return tuple(a + share * (b - a) for a, b in zip(dark, light, strict=True))


def _durations(run: RunConfig, device: Device) -> list[list[tuple[float, float]]]:
    """Forward and backward seconds of each stage and chunk, by the layers they hold."""
    parts = estimate(run, device).stages
    forward = 1 / 4 if run.train.recompute == "full" else 1 / 3
    times = []
    for part, weights in zip(parts, stage_weights(run.model, run.parallel), strict=True):
        each = [part.total * len(chunk) / max(weights.num_layers, 1) for chunk in weights.chunks]
        times.append([(seconds * forward, seconds * (1 - forward)) for seconds in each])
    return times


def _layout(run: RunConfig) -> str:
    sizes = ((name, getattr(run.parallel, name)) for name in ("tp", "pp", "vpp", "cp", "ep", "dp"))
    return " ".join(f"{name}{size}" for name, size in sizes if size > 1) or "one rank"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
