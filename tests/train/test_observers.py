"""What a run writes and shows, from metrics alone."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from mbfn.train.curve import draw_curve, smoothed
from mbfn.train.events import note_event
from mbfn.train.guard import Guard
from mbfn.train.progress import figures, progress, summary
from mbfn.train.record import read_records, recorded
from mbfn.train.state import Metrics, TrainState

STATE = TrainState(step=0, tokens=0, models=None, guard=Guard())  # type: ignore[arg-type]


def metrics(step: int, **changes: float) -> Metrics:
    fields = {
        "loss": 4.0 / step,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "tokens": 64 * step,
        "seconds": 0.25,
        "tokens_per_s": 256.0,
        "tflops": 1.5,
        "memory_gb": 2.0,
    }
    return Metrics(step=step, **fields | changes)  # type: ignore[arg-type]


def run_steps(path: Path, start: int, stop: int, *, interval: int = 1, steps: int = 9) -> None:
    with recorded(path, interval, steps, start) as observe:
        for step in range(start + 1, stop + 1):
            observe(STATE, metrics(step, **({"valid_loss": 3.0} if step == 4 else {})))


def test_a_resumed_record_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    run_steps(tmp_path / "whole.jsonl", 0, 9)
    resumed = tmp_path / "resumed.jsonl"
    run_steps(resumed, 0, 7)
    with resumed.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    run_steps(resumed, 5, 9)
    assert resumed.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_records_are_thinned_out_but_keep_evaluations_and_the_end(tmp_path: Path) -> None:
    run_steps(tmp_path / "m.jsonl", 0, 9, interval=5)
    records = read_records(tmp_path / "m.jsonl")
    assert [record["step"] for record in records] == [4, 5, 9]
    assert [record.get("valid_loss") for record in records] == [3.0, None, None]
    assert records[0]["valid_perplexity"] == pytest.approx(math.exp(3.0))


def test_figures_that_are_not_finite_are_valid_json(tmp_path: Path) -> None:
    with recorded(tmp_path / "m.jsonl", 1, 9, 0) as observe:
        observe(STATE, metrics(1, loss=math.nan, grad_norm=math.inf))
    record = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)
    assert record["loss"] is None
    assert record["grad_norm"] is None


def test_no_file_is_no_records(tmp_path: Path) -> None:
    assert read_records(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_curve_is_a_picture_of_readable_size(tmp_path: Path, evaluated: bool) -> None:
    records = [metrics(step, **({"valid_loss": 4.0 / step} if evaluated else {})).record() for step in range(1, 40)]
    draw_curve(records, tmp_path / "curve.png", "llama")
    content = (tmp_path / "curve.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
    assert (width, height) == (1040, 715)


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value() -> None:
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
    assert smoothed([5.0, 1.0])[0] == pytest.approx(5.0)
    assert smoothed([]) == []


def shown(terminal: bool, steps: int) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=150, color_system=None)
    with progress(0, steps, console) as observe:
        for step in range(1, steps + 1):
            observe(STATE, metrics(step, **({"valid_loss": 3.25} if step == steps else {})))
    return output.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    lines = shown(terminal=False, steps=100).splitlines()
    assert len(lines) == 22
    assert lines[0] == (
        "step 1/100  loss 4.0000  grad norm 0.500  lr 1.00e-03  256 tokens/s  1.5 TFLOP/s a GPU  2.0 GiB  left 0:00:25"
    )
    assert lines[-1] == "step 100: held-out loss 3.2500  perplexity 25.79"


def test_a_bar_on_a_terminal() -> None:
    text = shown(terminal=True, steps=7)
    for part in (
        "7/7",
        "loss 0.5714",
        "grad norm 0.500",
        "lr 1.00e-03",
        "256 tokens/s",
        "1.5 TFLOP/s a GPU",
        "left",
        "held-out loss 3.2500",
    ):
        assert part in text


def test_a_skipped_step_says_so() -> None:
    assert figures(metrics(1, skipped=True)).endswith("skipped: gradients overflowed")
    assert figures(metrics(1, skipped=True, fault="nan")).endswith("skipped: nan")  # type: ignore[arg-type]


def test_the_summary_says_what_a_run_came_to() -> None:
    records = [metrics(step, **({"valid_loss": 5.0 - step} if step in (2, 3) else {})).record() for step in range(1, 5)]
    assert summary(records).splitlines() == [
        "steps          4, 256 tokens in 0:00:01",
        "loss           4.0000 at first, 1.0000 at last",
        "held-out loss  2.0000, at best 2.0000",
        "speed          256 tokens/s, 1.5 TFLOP/s a GPU",
        "memory         2.0 GiB at most, of rank 0",
    ]


def test_events_are_noted_once(tmp_path: Path) -> None:
    for loss in (math.nan, 3.0, math.nan):
        note_event(tmp_path, {"step": 3, "event": "nan", "loss": loss})
    assert [json.loads(line)["loss"] for line in (tmp_path / "events.jsonl").read_text().splitlines()] == [None, 3.0]
