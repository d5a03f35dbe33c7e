"""Chat sets from file to rows: forms, bad rows, what is too long, order, packing, weights."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mbfn.data.sources
from mbfn.config.run import RunConfig
from mbfn.data import Dataset, open_dataset, read_batch
from mbfn.data.chat.build import BAD_ROWS
from mbfn.data.chat.dataset import ChatRows
from mbfn.errors import ConfigError, DataError
from mbfn.preview import samples_of
from tests.data.families import BY_NAME, build_tokenizer
from tests.data.runs import make_run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tokenizer(BY_NAME["phi4"], tmp_path_factory.mktemp("chat") / "tokenizer")


def chats(path: Path, count: int = 60) -> Path:
    """Conversations of different lengths, no two alike."""
    with path.open("w") as out:
        for i in range(count):
            turns = [
                {"role": role, "content": f"{text} {i}.{turn}" + " sunny" * (i % 5)}
                for turn in range(1 + i % 3)
                for role, text in (("user", "city"), ("assistant", "weather"))
            ]
            out.write(json.dumps({"messages": turns}) + "\n")
    return path


def chat_run(root: Path, tokenizer: Path, path: Path, /, **fields: Any) -> RunConfig:
    names = ("seq_length", "micro_batch_size", "global_batch_size", "seed")
    train = {"seq_length": 256} | {name: fields.pop(name) for name in names if name in fields}
    dp = fields.pop("dp", 1)
    data = {"kind": "chat", "path": str(path), "tokenizer": str(tokenizer), "workers": 1, **fields}
    return make_run(root / "cache", data=data, dp=dp, **train)


def texts(data: Dataset, run: RunConfig, numbers: np.ndarray) -> Counter[str]:
    """Every sample of these rows as text, trained parts in brackets."""
    loaded, rows = data.tokenizer.load(), data.train.read(numbers)  # type: ignore[union-attr]
    shown: Counter[str] = Counter()
    for number in range(len(numbers)):
        for pieces in samples_of(rows, number):
            said = (loaded.decode(ids, skip_special_tokens=False) for ids, _ in pieces)
            shown["".join(f"[{s}]" if t else s for s, (_, t) in zip(said, pieces, strict=True))] += 1
    return shown


@pytest.mark.parametrize("shard", [100, 1 << 20])
def test_bad_rows_are_counted_and_named(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, shard: int
) -> None:
    monkeypatch.setattr(mbfn.data.sources, "_SHARD_BYTES", (shard, shard))
    family = BY_NAME["mistral"]
    tokenizer = build_tokenizer(family, tmp_path_factory.mktemp("bos") / "tokenizer")
    path = chats(tmp_path / "chats.jsonl", 20)
    lines = [line.encode() for line in path.read_text().splitlines()]
    bad = {
        2: b'{"messages": [',
        4: json.dumps({"messages": [{"content": "a"}]}).encode(),
        7: json.dumps({"prompt": "a", "completion": " "[:0]}).encode(),
        9: b'{"prompt": "caf\xe9", "completion": "a"}',
        12: json.dumps({"prompt": "<s>a", "completion": "b"}).encode(),
    }
    for number, line in bad.items():
        lines[number - 1] = line
    path.write_bytes(b"\n".join([*lines[:5], b"", *lines[5:]]) + b"\n")
    with pytest.raises(DataError) as error:
        open_dataset(chat_run(tmp_path, tokenizer, path))
    shown, counted = str(error.value).split("; and 2 more ")
    assert shown == (
        f"data.path: 5 of 20 rows of {path} cannot be used: {path}:2: broken JSON: Expecting value at character "
        f"16; {path}:4: missing role: message 1 has no 'role'; {path}:8: empty completion: the last assistant "
        "turn says nothing"
    )
    assert counted == (
        "(1 broken JSON, 1 missing role, 1 empty completion, 1 wrong encoding, 1 duplicated BOS); mend them, or leave "
        "them out with data.bad_rows=skip"
    )
    data = open_dataset(chat_run(tmp_path, tokenizer, path, bad_rows="skip", valid_fraction=0.0))
    assert data.description.startswith(f"15 samples of {path} in 15 rows, 0 held out; ")
    assert (
        "bad rows skipped: 1 broken JSON, 1 missing role, 1 empty completion, 1 wrong encoding, 1 duplicated BOS"
        in (data.description)
    )
    assert isinstance(data.train, ChatRows)
    listed = (data.train.samples.entry / BAD_ROWS).read_text().splitlines()
    assert [json.loads(line)["line"] for line in listed] == [2, 4, 8, 10, 13]
    assert data.train.samples.place(2) == f"{path}:5"


def test_what_is_too_long_goes_by_the_policy(tmp_path: Path, tokenizer: Path) -> None:
    path = chats(tmp_path / "chats.jsonl")
    fields = {"seq_length": 64, "valid_fraction": 0.0}
    with pytest.raises(
        DataError, match=r"data.over_long: \d+ of 60 samples are longer than train.seq_length=64 \(the "
    ):
        open_dataset(chat_run(tmp_path, tokenizer, path, **fields))
    whole = open_dataset(chat_run(tmp_path, tokenizer, path, valid_fraction=0.0, seq_length=512)).train
    assert isinstance(whole, ChatRows)
    long = int((whole.samples.positions > 64).sum())
    assert 0 < long < 60
    dropped = open_dataset(chat_run(tmp_path, tokenizer, path, over_long="drop", **fields))
    assert f"; {long} dropped as longer than train.seq_length" in dropped.description
    assert len(dropped.train.chosen) == 60 - long  # type: ignore[attr-defined]
    cut = open_dataset(chat_run(tmp_path, tokenizer, path, over_long="truncate", **fields))
    assert f"; {long} cut at train.seq_length" in cut.description
    rows = cut.train.read(np.arange(60))
    assert (rows.loss_mask.sum(axis=1) > 0).all()
    everything = chat_run(tmp_path, tokenizer, path, over_long="drop", seq_length=4)
    with pytest.raises(DataError, match="has no conversation left to train on; 60 dropped"):
        open_dataset(everything)


def test_an_epoch_reads_every_sample_once_packed_or_not_whatever_dp(tmp_path: Path, tokenizer: Path) -> None:
    path = chats(tmp_path / "chats.jsonl")
    seen = []
    for fields in (
        {},
        {"packing": "ffd", "micro_batch_size": 1},
        {"packing": "in_order", "micro_batch_size": 1, "workers": 2},
        {"packing": "ffd", "micro_batch_size": 1, "pack_every_epoch": True},
    ):
        run = chat_run(tmp_path, tokenizer, path, seq_length=256, **fields)
        data = open_dataset(run)
        assert isinstance(data.train, ChatRows)
        rows = len(data.train.epoch_bins(0))
        first = texts(data, run, np.arange(rows))
        second = texts(data, run, rows + np.arange(len(data.train.epoch_bins(1))))
        assert first == second
        assert set(first.values()) == {1}
        seen.append(first)
        again = open_dataset(run)
        assert np.array_equal(again.train.read(np.arange(7, 9)).tokens, data.train.read(np.arange(7, 9)).tokens)
        two = replace(run, parallel=replace(run.parallel, dp=2))
        shares = [micro["tokens"] for rank in range(2) for micro in read_batch(data.train, two, 3, rank)]
        alone = [micro["tokens"] for micro in read_batch(data.train, run, 3, 0)]
        assert sorted(torch.cat(shares).tolist()) == sorted(torch.cat(alone).tolist())
    assert all(one == seen[0] for one in seen)
    assert len(seen[0]) == 57
    assert all(text.count("[weather") == text.count("<|im_end|>]") >= 1 for text in seen[0])


def test_packing_anew_gives_samples_other_neighbours(tmp_path: Path, tokenizer: Path) -> None:
    path = chats(tmp_path / "chats.jsonl")
    run = chat_run(tmp_path, tokenizer, path, seq_length=256, micro_batch_size=1, packing="ffd", pack_every_epoch=True)
    train = open_dataset(run).train
    assert isinstance(train, ChatRows)
    together = [{tuple(sorted(bins[i].tolist())) for i in range(len(bins))} for bins in map(train.epoch_bins, range(2))]
    assert together[0] != together[1]


def test_held_out_conversations_are_never_trained_on(tmp_path: Path, tokenizer: Path) -> None:
    path, other = chats(tmp_path / "chats.jsonl"), chats(tmp_path / "others.jsonl", 7)
    data = open_dataset(chat_run(tmp_path, tokenizer, path, seq_length=256, valid_fraction=0.2))
    assert isinstance(data.train, ChatRows)
    assert isinstance(data.valid, ChatRows)
    assert sorted([*data.train.chosen, *data.valid.chosen]) == list(range(60))
    assert len(data.valid.chosen) == 12
    other_seed = open_dataset(chat_run(tmp_path, tokenizer, path, seq_length=256, valid_fraction=0.2, seed=7))
    assert np.array_equal(other_seed.valid.chosen, data.valid.chosen)  # type: ignore[union-attr]
    named = open_dataset(chat_run(tmp_path, tokenizer, path, seq_length=256, valid_path=str(other)))
    assert len(named.train.chosen) == 60  # type: ignore[attr-defined]
    assert len(named.valid.chosen) == 7  # type: ignore[union-attr]


def test_weights_make_the_mean_of_samples_means(tmp_path: Path, tokenizer: Path) -> None:
    path = chats(tmp_path / "chats.jsonl")
    for fields in ({}, {"packing": "ffd", "micro_batch_size": 1}):
        run = chat_run(tmp_path, tokenizer, path, seq_length=256, loss_weights="sample", valid_fraction=0.0, **fields)
        train = open_dataset(run).train
        assert isinstance(train, ChatRows)
        rows = train.read(np.arange(len(train.epoch_bins(0))))
        assert rows.loss_mask.sum() == pytest.approx(60, rel=1e-5)
        plain = open_dataset(replace(run, data=replace(run.data, loss_weights="token"))).train  # type: ignore[type-var]
        assert set(np.unique(plain.read(np.arange(5)).loss_mask)) == {0.0, 1.0}


def test_pairs_come_chosen_then_rejected(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"city {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = chat_run(tmp_path, tokenizer, path, preference="pairs", valid_fraction=0.1)
    data = open_dataset(run)
    assert data.valid is not None
    loaded, seen = data.tokenizer.load(), set()  # type: ignore[union-attr]
    for batch in range(4):
        for micro in read_batch(data.train, run, batch, 0):
            said = [
                loaded.decode(row[mask > 0].tolist())
                for row, mask in zip(micro["labels"], micro["loss_mask"], strict=True)
            ]
            for chosen, rejected in zip(said[::2], said[1::2], strict=True):
                assert chosen == rejected.replace("no", "yes")
                seen.add(chosen)
    assert 14 <= len(seen) <= 18
    with pytest.raises(ConfigError, match=r"train.micro_batch_size: data.preference=pairs needs an even size, got 1"):
        chat_run(tmp_path, tokenizer, path, preference="pairs", micro_batch_size=1)
    with pytest.raises(ConfigError, match=r"data.packing makes one row a micro-batch, got 2; set it to 1"):
        chat_run(tmp_path, tokenizer, path, packing="ffd")


@pytest.mark.parametrize("form", ["parquet", "datasets", "json", "directory"])
def test_every_container_gives_the_same_samples(tmp_path: Path, tokenizer: Path, form: str) -> None:
    path = chats(tmp_path / "chats.jsonl")
    rows, other = [json.loads(line) for line in path.read_text().splitlines()], tmp_path / f"chats.{form}"
    if form == "json":
        other.write_text(json.dumps(rows))
    elif form == "directory":
        other.mkdir()
        for i in range(3):
            part = rows[20 * i : 20 * i + 20]
            (other / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    else:
        datasets = pytest.importorskip("datasets")
        made = datasets.Dataset.from_list(rows)
        made.to_parquet(other) if form == "parquet" else made.save_to_disk(other, num_shards=2)
    one, two = (open_dataset(chat_run(tmp_path, tokenizer, p, valid_fraction=0.0)).train for p in (path, other))
    assert isinstance(one, ChatRows)
    assert isinstance(two, ChatRows)
    for name in ("tokens", "mask", "offsets"):
        assert np.array_equal(getattr(one.samples, name), getattr(two.samples, name))


def test_the_cache_is_read_again_and_knows_what_changed(tmp_path: Path, tokenizer: Path) -> None:
    path = chats(tmp_path / "chats.jsonl")
    run = chat_run(tmp_path, tokenizer, path)
    first = open_dataset(run)
    entries = {entry: os.stat(entry).st_mtime_ns for entry in (tmp_path / "cache").rglob("*")}
    assert open_dataset(run).digest == first.digest
    assert {entry: os.stat(entry).st_mtime_ns for entry in (tmp_path / "cache").rglob("*")} == entries
    digests = {first.digest}
    for fields in ({"turns": "last"}, {"over_long": "drop"}, {"train_on_prompt": True}, {"valid_fraction": 0.5}):
        digests.add(open_dataset(chat_run(tmp_path, tokenizer, path, **fields)).digest)
    template = tmp_path / "other.jinja"
    template.write_text((tokenizer / "chat_template.jinja").read_text().replace("<|im_sep|>", "<|im_sep|>\n"))
    other = open_dataset(chat_run(tmp_path, tokenizer, path, chat_template=str(template)))
    digests.add(other.digest)
    chats(path, 61)
    digests.add(open_dataset(run).digest)
    assert len(digests) == 7
    assert other.tokenizer is not None
    assert (other.tokenizer.directory / "chat_template.jinja").read_text() == template.read_text()


def test_what_is_missing_is_said(tmp_path: Path, tokenizer: Path) -> None:
    path = chats(tmp_path / "chats.jsonl")
    run = chat_run(tmp_path, tokenizer, path)
    with pytest.raises(DataError, match=r"data=chat takes the model's own; give init.hf=DIR or data.tokenizer=DIR"):
        open_dataset(replace(run, data=replace(run.data, tokenizer="auto")))  # type: ignore[type-var]
    with pytest.raises(DataError, match=r"data.path: no file or directory .*none; give one of .jsonl"):
        open_dataset(chat_run(tmp_path, tokenizer, tmp_path / "none"))
    with pytest.raises(DataError, match=r"data.chat_template: no file .*none.jinja; give a Jinja file, auto or none"):
        open_dataset(chat_run(tmp_path, tokenizer, path, chat_template=str(tmp_path / "none.jinja")))
