"""What the user sees while a run is under way: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mbfn.train.loop import Observer
from mbfn.train.state import Metrics, TrainState

_LINES = 20  # that a run prints where there is no terminal


@contextmanager
def progress(start: int, steps: int, console: Console) -> Iterator[Observer]:
    """An observer that shows every step from `start` to `steps`."""
    if not console.is_terminal:
        yield _plain(start, steps, console)
        return
    columns = (
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=steps, completed=start, figures="")

        def observe(_: TrainState, metrics: Metrics) -> None:
            bar.update(task, completed=metrics.step, figures=figures(metrics))
            if metrics.valid_loss is not None:
                bar.console.print(_evaluation(metrics), highlight=False)

        yield observe


def figures(metrics: Metrics) -> str:
    """The figures of a step as one short line."""
    text = (
        f"loss {metrics.loss:.4f}  grad norm {metrics.grad_norm:.3f}  lr {metrics.lr:.2e}  "
        f"{metrics.tokens_per_s:,.0f} tokens/s"
    )
    return text + ("  skipped: gradients overflowed" if metrics.skipped else "")


def _plain(start: int, steps: int, console: Console) -> Observer:
    every = max(1, steps // _LINES)
    spent: list[float] = []

    def observe(_: TrainState, metrics: Metrics) -> None:
        spent.append(metrics.seconds)
        if metrics.step % every == 0 or metrics.step in (start + 1, steps):
            left = timedelta(seconds=round(sum(spent) / len(spent) * (steps - metrics.step)))
            console.print(
                f"step {metrics.step}/{steps}  {figures(metrics)}  left {left}", highlight=False, soft_wrap=True
            )
        if metrics.valid_loss is not None:
            console.print(_evaluation(metrics), highlight=False, soft_wrap=True)

    return observe


def _evaluation(metrics: Metrics) -> str:
    return f"step {metrics.step}: held-out loss {metrics.valid_loss:.4f}"
