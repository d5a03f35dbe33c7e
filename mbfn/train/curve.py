"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mbfn.train.record import Record

_SMOOTHING = 0.9  # of the line drawn over the raw losses


def draw_curve(records: Sequence[Record], path: Path, title: str) -> None:
    """Write training and held-out loss over steps, with the learning rate below, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps, values = _points(records, "loss")
    losses.plot(steps, values, color="#9bb8d9", linewidth=1, label="training, each step")
    losses.plot(steps, smoothed(values), color="#1f5fa8", linewidth=2, label="training, smoothed")
    held_out = _points(records, "valid_loss")
    if held_out[0]:
        losses.plot(*held_out, color="#d1602e", marker="o", markersize=4, linewidth=1.5, label="held-out text")
    losses.set(ylabel="loss (nats a token)", title=title)
    losses.legend(frameon=False)
    rates.plot(*_points(records, "lr"), color="#555555", linewidth=1.2)
    rates.set(xlabel="step", ylabel="learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    for axes in (losses, rates):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def smoothed(values: Sequence[float]) -> list[float]:
    """The exponential moving average with its start-up bias divided out."""
    average, result = 0.0, []
    for count, value in enumerate(values, start=1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * value
        result.append(average / (1 - _SMOOTHING**count))
    return result


def _points(records: Sequence[Record], name: str) -> tuple[list[float], list[float]]:
    pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in pairs if step is not None], [value for _, value in pairs if value is not None]
