"""Runs as the rows of a table, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbfn.launch.runs import RunStatus, differing
from mbfn.train.curve import smoothed

_NOTE = 100  # characters of an error that a row still carries


def table(runs: Sequence[RunStatus], root: Path) -> list[list[str]]:
    """A header and one row a run: its directory, the fields in which the runs differ, how far it is, how good."""
    fields = differing([run.run for run in runs])
    header = ["run", *fields, "state", "job", "step", "loss", "held-out loss", "note"]
    rows = [
        [
            str(run.path.relative_to(root)),
            *(_text(values[index]) for values in fields.values()),
            run.state,
            run.job_id,
            f"{run.step}/{run.run.train.steps}",
            _loss(run.loss),
            _loss(run.valid_loss),
            run.note if len(run.note) <= _NOTE else f"{run.note[: _NOTE - 3]}...",
        ]
        for index, run in enumerate(runs)
    ]
    filled = [column for column in range(len(header)) if column < 1 or any(row[column] for row in rows)]
    return [[row[column] for column in filled] for row in [header, *rows]]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows as lines of text with even columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def draw_sweep(runs: Sequence[RunStatus], path: Path) -> None:
    """Write the loss curves of all runs, and their results over the field that differs, as a PNG."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fields = differing([run.run for run in runs])
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    curves, results = figure.subplots(1, 2)
    colours = [colormaps["viridis"](0.9 * index / max(1, len(runs) - 1)) for index in range(len(runs))]
    for index, (run, colour) in enumerate(zip(runs, colours, strict=True)):
        label = ", ".join(f"{name.rpartition('.')[2]} {_text(values[index])}" for name, values in fields.items())
        losses = [record["loss"] or 0.0 for record in run.records]
        steps = [record["step"] or 0 for record in run.records]
        curves.plot(steps, smoothed(losses), color=colour, linewidth=1.6, label=label or run.path.name)
    curves.set(xlabel="step", ylabel="training loss, smoothed (nats a token)")
    curves.legend(frameon=False, fontsize="small")
    _draw_results(results, runs, colours, fields)
    for axes in (curves, results):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _draw_results(axes: Any, runs: Sequence[RunStatus], colours: Sequence[Any], fields: dict[str, list[Any]]) -> None:
    """Results over the first field of numbers; over the runs in order where there is none."""
    numeric = [name for name, values in fields.items() if all(type(value) in (int, float) for value in values)]
    name, places = (numeric[0], fields[numeric[0]]) if numeric else ("run", list(range(len(runs))))
    shown = [(x, run.rank_by, colour) for x, run, colour in zip(places, runs, colours, strict=True) if run.records]
    axes.scatter([x for x, _, _ in shown], [y for _, y, _ in shown], color=[colour for _, _, colour in shown], s=50)
    if numeric and min(places) > 0 and max(places) >= 10 * min(places):
        axes.set_xscale("log")
    axes.set(xlabel=name, ylabel="held-out loss at the end" if any(run.valid_loss for run in runs) else "loss")


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
