"""A run on packed conversations takes the steps of the run that reads them one a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.command import SMALL, records, train

ANSWERS = ("A list is a sequence.", "A tuple is a sequence that stays.", "A string is text.", "It is a file.", "None.")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp2", "cp2"])
def test_packed_conversations_are_learned_as_one_a_row(tmp_path: Path, layout: str) -> None:
    train(tmp_path / "start", *SMALL, "train.steps=1", "log=quiet")
    rows = [{"prompt": f"Question {i}?", "completion": f" {answer}"} for i, answer in enumerate(ANSWERS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chat = (f"data.path={tmp_path / 'rows.jsonl'}", "data.form=completion", "data.chat_template=none")
    fixed = (f"init.hf={tmp_path / 'start' / 'hf'}", "data=chat", *chat, "data.loss_weights=sample")
    fixed += ("data.valid_fraction=0", "train.seq_length=96", "train.micro_batch_size=1", "train.steps=3")
    fixed += ("checkpoint=none", "log=quiet", "train.eval_interval=0")
    train(tmp_path / "alone", *fixed, f"train.global_batch_size={len(ANSWERS)}")
    cut = (f"parallel={layout}", "launch=local", "data.packing=ffd", "train.global_batch_size=1")
    train(tmp_path / "packed", *fixed, *cut)
    for alone, packed in zip(records(tmp_path / "alone"), records(tmp_path / "packed"), strict=True):
        assert packed["tokens"] == alone["tokens"]
        assert packed["loss"] == pytest.approx(alone["loss"], abs=2e-5)
        assert packed["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
