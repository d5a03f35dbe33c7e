"""Megatron corpora: files byte for byte Megatron's, rows of documents in order, splits and weights as it cuts them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

import mbfn.data.sources
from mbfn.data import open_dataset, read_batch
from mbfn.data.blend import blended, split_bounds
from mbfn.data.corpus import about_file, files_of, index_bytes, open_corpus, token_type
from mbfn.data.tokenizer import train_bpe
from mbfn.errors import ConfigError, DataError
from tests.data.runs import make_run

DOCUMENTS = [list(range(start, start + length)) for start, length in ((0, 40), (40, 1), (41, 200), (241, 7), (248, 90))]


def write_corpus(prefix: Path, documents: list[list[int]], vocab_size: int = 400) -> Path:
    """What mbfn.tokenize writes, of given tokens."""
    binary, index = files_of(prefix)
    dtype = token_type(vocab_size)
    np.concatenate([np.asarray(document, dtype=dtype) for document in documents]).tofile(binary)
    index.write_bytes(index_bytes(np.asarray([len(document) for document in documents]), dtype))
    return prefix


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), vocab_size=st.sampled_from([400, 65499, 65500]))
def test_files_are_megatrons_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], vocab_size: int
) -> None:
    root = tmp_path_factory.mktemp("corpus")
    documents = [[(7 * i + j) % vocab_size for j in range(length)] for i, length in enumerate(lengths)]
    write_corpus(root / "ours", documents, vocab_size)
    builder = IndexedDatasetBuilder(str(root / "theirs.bin"), dtype=token_type(vocab_size))
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(root / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (root / f"ours{suffix}").read_bytes() == (root / f"theirs{suffix}").read_bytes()
    ours, theirs = open_corpus(str(root / "theirs")), IndexedDataset(str(root / "ours"))
    for i, document in enumerate(documents):
        found = ours.tokens[ours.starts[i] : ours.starts[i] + ours.lengths[i]]
        assert found.tolist() == theirs[i].tolist() == document


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 10**6), shares=st.lists(st.integers(0, 1000), min_size=1, max_size=3))
def test_splits_are_megatrons(count: int, shares: list[int]) -> None:
    if not sum(shares):
        return
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(",".join(map(str, shares))))
    ours = split_bounds(count, [float(share) for share in shares])
    for bounds, theirs in zip(ours, matrix, strict=True):
        if theirs is None:
            assert bounds[0] == bounds[1]
        else:
            assert bounds == (round(theirs[0] * float(count)), round(theirs[1] * float(count)))


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), start=st.integers(0, 10**9))
def test_a_blend_gives_each_corpus_its_share_at_every_row(weights: list[float], start: int) -> None:
    corpora, counts = blended(np.arange(400), weights)
    shares = np.asarray(weights) / np.sum(weights)
    taken = np.cumsum(corpora[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(taken - shares * np.arange(1, 401)[:, None]).max() < len(weights)
    for d in range(len(weights)):
        assert counts[corpora == d].tolist() == list(range(int(taken[-1, d])))
    far = start + np.arange(50)
    together, alone = blended(far, weights), [blended(far[[i]], weights) for i in range(50)]
    assert [int(one[0][0]) for one in alone] == together[0].tolist()
    assert [int(one[1][0]) for one in alone] == together[1].tolist()
    theirs, numbers = np.zeros(400, dtype=np.int16), np.zeros(400, dtype=np.int64)
    helpers.build_blending_indices(theirs, numbers, shares, len(weights), 400, False)
    megatrons = np.cumsum(theirs[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(megatrons - taken).max() <= 1 + len(weights) / 2


def indexed(prefix: Path | tuple[str, ...], **fields: Any) -> dict[str, Any]:
    path = prefix if isinstance(prefix, tuple) else str(prefix)
    return {"kind": "indexed", "path": path, "split": (1.0,), **fields}


def test_an_epoch_reads_documents_whole_and_in_order(tmp_path: Path) -> None:
    """Windows of an epoch laid behind one another are the documents, in the epoch's order."""
    write_corpus(tmp_path / "corpus", DOCUMENTS)
    run = make_run(tmp_path / "cache", data=indexed(tmp_path / "corpus"))
    data = open_dataset(run)
    (stretch,) = data.train.stretches  # type: ignore[attr-defined]
    assert stretch.windows == (338 - 1) // 16
    starts = []
    for epoch in range(2):
        windows = stretch.read(epoch * stretch.windows + np.arange(stretch.windows))
        chain = {window.tokens[0]: window for window in windows}
        assert len(chain) == stretch.windows
        assert all(len(window.tokens) == 17 and sum(window.parts) == 17 for window in windows)
        follows = {int(document[-1]) for document in DOCUMENTS}
        breaks = [(a, b) for window in windows for a, b in pairwise(window.tokens.tolist()) if b != a + 1]
        assert {a for a, _ in breaks} <= follows
        assert {b for _, b in breaks} <= {document[0] for document in DOCUMENTS}
        starts.append([int(window.tokens[0]) for window in windows])
    assert starts[0] != starts[1]


def test_rows_know_where_documents_end(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", DOCUMENTS)
    ends = {document[-1] for document in DOCUMENTS}
    run = make_run(tmp_path / "c", data=indexed(tmp_path / "corpus", eod_mask_loss=True))
    rows = open_dataset(run).train.read(np.arange(21))
    assert rows.segments is None
    assert np.array_equal(rows.loss_mask == 0, np.isin(rows.tokens, list(ends)) & (rows.labels != rows.tokens + 1))
    apart = make_run(tmp_path / "c", data=indexed(tmp_path / "corpus", separate_documents=True), micro_batch_size=1)
    packed = open_dataset(apart).train.read(np.arange(21))
    assert packed.segments is not None
    for row, lengths in enumerate(packed.segments):
        assert sum(lengths) == 16
        assert packed.position_ids[row].tolist() == [i for length in lengths for i in range(length)]
        for start, stop in pairwise(np.cumsum([0, *lengths]).tolist()):
            assert np.array_equal(np.diff(packed.tokens[row, start:stop]), np.ones(stop - start - 1))
    assert {"cu_seqlens"} < set(read_batch(open_dataset(apart).train, apart, 0, 0)[0])


def test_held_out_documents_and_weights(tmp_path: Path) -> None:
    for name, low in (("a", 0), ("b", 200)):
        write_corpus(tmp_path / name, [[low + i] * 40 for i in range(100)])
    paths = (str(tmp_path / "a"), str(tmp_path / "b"))
    fields = indexed(paths, weights=(3.0, 1.0), split=(80.0, 15.0, 5.0))
    data = open_dataset(make_run(tmp_path / "cache", data=fields))
    assert data.valid is not None
    train, valid = (part.read(np.arange(400)).tokens for part in (data.train, data.valid))
    assert ((train < 200).any(axis=1)).sum() == 300
    assert set(np.unique(train % 200)) == set(range(80))
    assert set(np.unique(valid % 200)) == set(range(80, 95))
    own = indexed(paths[0], valid_path=(paths[1],))
    held = open_dataset(make_run(tmp_path / "cache", data=own)).valid
    assert held is not None
    assert held.read(np.arange(300)).tokens.min() == 200
    assert data.digest != open_dataset(make_run(tmp_path / "cache", data=own)).digest


def test_what_is_wrong_with_a_corpus(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "corpus", DOCUMENTS)

    def refused(**kwargs: Any) -> str:
        with pytest.raises(DataError) as error:
            open_dataset(make_run(tmp_path / "cache", data=indexed(prefix), **kwargs)).train.read(np.arange(21))
        return str(error.value)

    assert "needs 401; use more text, another data.split or a smaller train.seq_length" in refused(seq_length=400)
    assert "is beyond model.vocab_size=300; it was made with another tokenizer" in refused(vocab_size=300)
    binary, index = files_of(prefix)
    whole = index.read_bytes()
    index.write_bytes(b"not an index of megatron at all, but as long as one")
    assert "is not an index of Megatron's; expected it to begin with MMIDIDX" in refused()
    index.write_bytes(whole[:60])
    assert "5 sequences need" in refused()
    index.write_bytes(whole)
    binary.write_bytes(binary.read_bytes()[:-2])
    assert refused() == f"data.path: {binary} has 674 bytes, its index needs 676; copy or make it again"
    index.unlink()
    assert refused().startswith(f"data.path: no file {index}; `python -m mbfn.tokenize out={prefix}` writes")
    with pytest.raises(ConfigError, match="weights: expected 1 numbers above 0"):
        make_run(tmp_path, data=indexed(prefix, weights=(1.0, 2.0)))
    run = make_run(tmp_path, data=indexed(prefix, separate_documents=True), micro_batch_size=1)
    with pytest.raises(ConfigError, match="cannot be shared by cp=2 ranks"):
        replace(run, parallel=replace(run.parallel, cp=2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer with an end of text."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["some words and 東京 in a text\n" * 20], 300).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return directory


def command(*overrides: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mbfn.tokenize", *overrides], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("form", ["jsonl", "parquet", "datasets", "directory"])
def test_documents_come_back(tmp_path: Path, tokenizer: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mbfn.data.sources, "_SHARD_BYTES", (3000, 3000))
    from mbfn.data.tokenise import order_of, tokenise
    from mbfn.data.tokenizer import open_tokenizer

    texts = [f"words {i}\nand 東京 {'x' * (i % 7)}" for i in range(300)]
    source = tmp_path / f"texts.{form}"
    if form == "jsonl":
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif form == "directory":
        source.mkdir()
        for i, text in enumerate(texts):
            (source / f"{i:03}.txt").write_text(text)
    else:
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_dict({"text": texts})
        rows.to_parquet(source) if form == "parquet" else rows.save_to_disk(source, num_shards=3)
    order = order_of(
        str(source), str(tmp_path / "out"), open_tokenizer(tokenizer), text_key="text", bos=False, eod=True,
        bad_rows="error", workers=2 if form == "jsonl" else 1,
    )  # fmt: skip
    written = tokenise(order)
    corpus, loaded = IndexedDataset(str(tmp_path / "out")), open_tokenizer(tokenizer).load()
    assert written.documents == len(corpus) == 300
    end = loaded.token_to_id("<|endoftext|>")
    assert [loaded.decode(corpus[i][:-1].tolist()) for i in range(300)] == texts
    assert {int(corpus[i][-1]) for i in range(300)} == {end}
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx", "out.json"]


def test_the_command_writes_a_corpus_that_trains_and_names_bad_rows(tmp_path: Path, tokenizer: Path) -> None:
    source, out = tmp_path / "texts.jsonl", tmp_path / "corpus"
    lines = [json.dumps({"text": f"words and more words {i}"}) for i in range(400)]
    lines[3], lines[7], lines[9] = '{"text": ', json.dumps({"body": "no text"}), json.dumps({"text": ""})
    data = "\n".join(lines).encode() + b'\n{"text": "caf\xe9"}\n'
    source.write_bytes(data)
    fields = (f"path={source}", f"out={out}", f"tokenizer={tokenizer}")
    code, _, error = command(*fields, "workers=2")
    assert code == 1
    assert error.startswith(f"error: path: 3 of 401 rows of {source} cannot be used: {source}:4: broken JSON: ")
    assert f"{source}:8: no 'text': found 'body'; text_key names the field; " in error
    assert f"{source}:401: wrong encoding: not UTF-8 at byte 13 of the line" in error
    assert error.endswith("mend them, or leave them out with bad_rows=skip\n")
    assert list(tmp_path.glob("corpus*")) == []
    code, printed, error = command(*fields, "bad_rows=skip")
    assert code == 0, error
    assert "397 documents" in printed
    assert "1 empty rows left out" in printed
    assert "1 broken JSON, 1 no 'text', 1 wrong encoding" in printed
    assert len(out.with_name("corpus.bad_rows.jsonl").read_text().splitlines()) == 3
    again = command(*fields)
    assert again[0] == 2
    assert again[2] == f"error: out: {out}.idx is there already; choose another out, or overwrite=true\n"
    opened = open_dataset(make_run(tmp_path / "cache", data=indexed(out)))
    assert opened.tokenizer is not None
    assert opened.tokenizer.directory == tokenizer
    about = json.loads(about_file(out).read_text())
    about_file(out).write_text(json.dumps(about | {"tokenizer_digest": "another"}))
    with pytest.raises(DataError, match="was made with"):
        open_dataset(make_run(tmp_path / "cache", data=indexed(out)))
