"""Whether an output directory holds a finished run, and how good it is."""

from __future__ import annotations

from pathlib import Path

from mbfn.config.run import RunConfig
from mbfn.train.checkpoints import checkpoint_path
from mbfn.train.record import read_records


def finished(run: RunConfig, path: Path) -> bool:
    """Whether the output directory holds everything that the run makes."""
    steps, records = run.train.steps, read_records(path / "metrics.jsonl")
    whole = bool(records) and (records[-1]["step"] or 0) >= steps
    saved = not run.checkpoint.save_at_end or checkpoint_path(path / "checkpoints", steps).exists()
    return whole and saved and (not run.checkpoint.export_hf or (path / "hf").is_dir())


def result(path: Path) -> float | None:
    """The loss of a run that sweepers compare: the last held-out one, else the last of training."""
    records = read_records(path / "metrics.jsonl")
    held_out = [record["valid_loss"] for record in records if record.get("valid_loss") is not None]
    return held_out[-1] if held_out else records[-1]["loss"] if records else None
