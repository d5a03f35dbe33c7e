"""What the user sees of a run: a live bar on a terminal, plain lines elsewhere, a summary at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from mbfn.train.loop import Observer
from mbfn.train.record import Record
from mbfn.train.state import Metrics, TrainState

_LINES = 20  # that a run prints where there is no terminal
_REFRESHES = 2  # a second: drawing takes milliseconds of the interpreter, which the steps need too


@contextmanager
def progress(start: int, steps: int, console: Console) -> Iterator[Observer]:
    """An observer that shows every step from `start` to `steps`."""
    if not console.is_terminal:
        yield _plain(start, steps, console)
        return
    bar = Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=None),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        auto_refresh=False,
        expand=True,
        console=console,
    )
    task = bar.add_task("training", total=steps, completed=start)
    last: list[Metrics] = []

    def view() -> Group:
        return Group(bar, Text(figures(last[-1]) if last else "the first step sets up most", style="cyan"))

    with Live(get_renderable=view, console=console, refresh_per_second=_REFRESHES):

        def observe(_: TrainState, metrics: Metrics) -> None:
            last[:] = [metrics]
            bar.update(task, completed=metrics.step)
            if metrics.valid_loss is not None:
                console.print(_evaluation(metrics), highlight=False)

        yield observe


def figures(metrics: Metrics) -> str:
    """The figures of a step as one short line."""
    parts = [
        f"loss {metrics.loss:.4f}",
        f"grad norm {metrics.grad_norm:.3f}",
        f"lr {metrics.lr:.2e}",
        f"{metrics.tokens_per_s:,.0f} tokens/s",
        f"{metrics.tflops:.3g} TFLOP/s a GPU",
        *([f"{metrics.memory_gb:.1f} GiB"] if metrics.memory_gb else []),
    ]
    if metrics.skipped:
        parts.append(f"skipped: {metrics.fault or 'gradients overflowed'}")
    return "  ".join(parts)


def summary(records: Sequence[Record]) -> str:
    """What a run came to, from its records: losses, tokens, time, speed, memory."""
    last = records[-1]
    held_out = [record["valid_loss"] for record in records if record.get("valid_loss") is not None]
    spent = [record["seconds"] or 0.0 for record in records]
    lines = [
        ("steps", f"{last['step']:,}, {last['tokens']:,} tokens in {timedelta(seconds=round(sum(spent)))}"),
        ("loss", f"{_number(records[0]['loss'])} at first, {_number(last['loss'])} at last"),
        *([("held-out loss", f"{_number(held_out[-1])}, at best {_number(min(held_out))}")] if held_out else []),  # type: ignore[type-var]
        ("speed", f"{_median(records, 'tokens_per_s'):,.0f} tokens/s, {_median(records, 'tflops'):.3g} TFLOP/s a GPU"),
        ("memory", f"{max(record.get('memory_gb') or 0.0 for record in records):.1f} GiB at most, of rank 0"),
    ]
    skipped = sum(bool(record.get("skipped")) for record in records)
    lines += [("skipped", f"{skipped} steps")] if skipped else []
    return "\n".join(f"{name:<13}  {text}" for name, text in lines)


def _plain(start: int, steps: int, console: Console) -> Observer:
    every = max(1, steps // _LINES)
    spent: list[float] = []

    def observe(_: TrainState, metrics: Metrics) -> None:
        spent.append(metrics.seconds)
        if metrics.step % every == 0 or metrics.step in (start + 1, steps) or metrics.skipped:
            left = timedelta(seconds=round(sum(spent) / len(spent) * (steps - metrics.step)))
            console.print(
                f"step {metrics.step}/{steps}  {figures(metrics)}  left {left}", highlight=False, soft_wrap=True
            )
        if metrics.valid_loss is not None:
            console.print(_evaluation(metrics), highlight=False, soft_wrap=True)

    return observe


def _evaluation(metrics: Metrics) -> str:
    return f"step {metrics.step}: held-out loss {metrics.valid_loss:.4f}  perplexity {metrics.valid_perplexity:,.2f}"


def _median(records: Sequence[Record], name: str) -> float:
    values = sorted(record.get(name) or 0.0 for record in records)
    return values[len(values) // 2]


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4f}"
