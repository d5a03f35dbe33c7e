"""`python -m mbfn.train data=chat` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.families import BY_NAME, build_tokenizer
from tests.train.command import SMALL, losses, train

pytestmark = pytest.mark.slow


def prepared(root: Path) -> tuple[str, ...]:
    """Eight conversations, a tokenizer, and the overrides that train on them."""
    tokenizer = build_tokenizer(BY_NAME["qwen25"], root / "tokenizer")
    path = root / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"Rome {i}?"}, {"role": "assistant", "content": "sunny " * (1 + i)}]
        for i in range(8)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    fields = ("data=chat", f"data.path={path}", f"data.tokenizer={tokenizer}", "data.valid_fraction=0", "train.steps=3")
    return (*SMALL, *fields, "model.max_position_embeddings=512", "train.seq_length=384", "log.sample_prompt=")


@pytest.mark.parametrize("weights", ["token", "sample"])
def test_packed_rows_learn_what_padded_rows_learn(tmp_path: Path, weights: str) -> None:
    """All eight samples in each step, one a row or several: the same losses, step after step."""
    fields = (*prepared(tmp_path), f"data.loss_weights={weights}")
    said = train(tmp_path / "padded", *fields, "train.global_batch_size=8")
    assert "8 samples of" in said
    packed = train(
        tmp_path / "packed", *fields, "train.global_batch_size=2", "train.micro_batch_size=1", "data.packing=ffd"
    )
    assert "in 2 rows" in packed
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), rel=2e-5)
    assert losses(tmp_path / "padded")[-1] < losses(tmp_path / "padded")[0]


def test_a_continued_run_reads_the_rows_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    fields = (*prepared(tmp_path), "data.packing=in_order", "data.pack_every_epoch=true", "train.micro_batch_size=1")
    fields = (*fields, "train.global_batch_size=1", "schedule=constant")
    train(tmp_path / "whole", *fields, "train.steps=6")
    train(tmp_path / "parts", *fields, "train.steps=3")
    train(tmp_path / "parts", *fields, "train.steps=6")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
