"""From text and a tokenizer to the token file: cached, deterministic, and clear about what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mbfn.data import open_dataset
from mbfn.data.text import _BLOCK, blocks, read_documents, text_digest
from mbfn.data.tokenizer import copy_tokenizer, train_bpe
from mbfn.errors import DataError
from tests.data.runs import make_run

TEXT = "The quick brown fox jumps over the lazy dog, naïve café 東京.\n" * 60


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_tokens_are_the_text(tmp_path: Path, text: Path) -> None:
    data = open_dataset(make_run(tmp_path / "cache", data={"path": str(text)}))
    tokenizer = data.tokenizer.load()
    assert data.train.tokens[-1] == tokenizer.token_to_id("<|endoftext|>")
    assert tokenizer.decode(data.train.tokens[:-1].tolist()) == TEXT


def test_a_second_run_reads_the_cache(tmp_path: Path, text: Path) -> None:
    run = make_run(tmp_path / "cache", data={"path": str(text)})
    first = open_dataset(run)
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    second = open_dataset(run)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == entries
    assert np.array_equal(first.train.tokens, second.train.tokens)
    text.write_text(TEXT + "more\n")
    assert open_dataset(run).digest != first.digest


def test_an_end_of_text_beyond_the_tokenizer(tmp_path: Path, text: Path) -> None:
    run = make_run(tmp_path / "cache", vocab_size=70000, data={"path": str(text)})
    run = replace(run, model=replace(run.model, eos_token_id=(69999,)))
    assert open_dataset(run).train.tokens[-1] == 69999


def test_a_directory_is_its_text_files_in_order(tmp_path: Path) -> None:
    for name, content in (("b.txt", "second " * 80), ("a.txt", "first " * 80), ("c.md", "not text")):
        (tmp_path / name).write_text(content)
    data = open_dataset(make_run(tmp_path / "cache", data={"path": str(tmp_path)}))
    end = data.tokenizer.load().token_to_id("<|endoftext|>")
    assert np.flatnonzero(data.train.tokens == end)[-1] == len(data.train.tokens) - 1
    first, second, rest = (
        data.tokenizer.load().decode(data.train.tokens.tolist(), skip_special_tokens=False).split("<|endoftext|>")
    )
    assert (first, second, rest) == ("first " * 80, "second " * 80, "")


def test_the_default_text_is_long_enough_for_the_default_run(tmp_path: Path) -> None:
    data = open_dataset(make_run(tmp_path / "cache", vocab_size=2048, seq_length=128))
    assert data.train.count > 500
    assert data.valid.count > 20


def test_ranks_may_ask_for_the_same_data_at_once(tmp_path: Path, text: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from mbfn.data import open_dataset\n"
        "from tests.data.runs import make_run\n"
        "print(open_dataset(make_run(Path(sys.argv[1]), data={'path': sys.argv[2]})).digest)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "cache"), str(text)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    digests = {rank.communicate(timeout=60)[0] for rank in ranks}
    assert len(digests) == 1
    assert all(rank.returncode == 0 for rank in ranks)
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 2


def test_training_a_tokenizer_is_deterministic() -> None:
    documents = read_documents("builtin:python-reference")
    sizes = (700, 700)
    one, two = (train_bpe(documents, size).to_str() for size in sizes)
    assert one == two
    assert train_bpe(documents, 700).get_vocab_size() == 700


def test_long_documents_are_cut_after_lines() -> None:
    document = "a line of text\n" * 150_000 + "x" * (_BLOCK + 5)
    pieces = list(blocks(document))
    assert "".join(pieces) == document
    assert len(pieces) > 2
    assert max(map(len, pieces)) <= _BLOCK
    assert all(piece.endswith("\n") for piece in pieces[:2])


def test_the_digest_knows_where_documents_end() -> None:
    assert text_digest(["ab", "c"]) != text_digest(["a", "bc"])


def test_init_hf_brings_its_own_tokenizer(tmp_path: Path, text: Path) -> None:
    source = open_dataset(make_run(tmp_path / "cache", data={"path": str(text)}, vocab_size=300))
    hf = tmp_path / "hf"
    hf.mkdir()
    copy_tokenizer(source.tokenizer, hf)
    data = open_dataset(make_run(tmp_path / "cache", data={"path": str(text)}, init=str(hf)))
    assert data.tokenizer.files[0] == hf / "tokenizer.json"
    assert data.tokenizer.digest == source.tokenizer.digest


def refused(cache: Path, **kwargs: object) -> str:
    with pytest.raises(DataError) as error:
        open_dataset(make_run(cache, **kwargs))  # type: ignore[arg-type]
    return str(error.value)


def test_what_is_wrong_with_the_text(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    short, empty, latin = tmp_path / "short.txt", tmp_path / "empty.txt", tmp_path / "latin.txt"
    short.write_text("too short")
    empty.write_text("")
    latin.write_bytes("caf\xe9".encode("latin-1"))
    bare = tmp_path / "bare"
    bare.mkdir()
    assert refused(cache, data={"path": str(tmp_path / "no.txt")}) == (
        f"data.path: no file or directory {tmp_path}/no.txt; give a text file, a directory of *.txt files, or "
        "builtin:python-reference"
    )
    assert (
        refused(cache, data={"path": str(bare)})
        == f"data.path: {bare} has no *.txt file; put text there or name one file"
    )
    assert refused(cache, data={"path": str(empty)}) == (
        f"data.path: {empty} holds no text; give a file or a directory of *.txt files with text in them"
    )
    assert refused(cache, data={"path": str(latin)}) == (
        f"data.path: {latin} is not UTF-8 at byte 3; convert it, for instance with `iconv -t utf-8`"
    )
    assert refused(cache, data={"path": "builtin:poems"}) == (
        "data.path: unknown source builtin:poems; the only builtin one is builtin:python-reference"
    )
    assert "is 9 tokens" not in refused(cache, data={"path": str(short)})
    assert "seq_length=16 needs at least 33; use more text or a smaller train.seq_length" in refused(
        cache, data={"path": str(short)}
    )


def test_what_is_wrong_with_the_tokenizer(tmp_path: Path, text: Path) -> None:
    cache = tmp_path / "cache"
    path = {"path": str(text)}
    big = open_dataset(make_run(cache, data=path, vocab_size=320)).tokenizer.files[0]
    size = len(json.loads(big.read_text())["model"]["vocab"])
    assert size > 300
    assert refused(cache, data=path | {"tokenizer": str(big)}, vocab_size=300) == (
        f"data.tokenizer: {big} has {size} tokens, model.vocab_size is 300; choose a smaller tokenizer or a model with "
        "a larger vocabulary"
    )
    assert refused(cache, data=path | {"tokenizer": str(tmp_path / "none")}) == (
        f"data.tokenizer: no tokenizer.json at {tmp_path}/none; give a tokenizer directory, that file, or auto"
    )
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"model": 3}))
    assert refused(cache, data=path | {"tokenizer": str(broken)}).startswith(
        f"data.tokenizer: {broken} is not a tokenizer: "
    )
    assert refused(cache, data=path, vocab_size=200) == (
        "model.vocab_size: a byte-level tokenizer has at least 257 entries, got 200; raise it or give data.tokenizer"
    )
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "tokenizer.model").write_bytes(b"sentencepiece")
    assert refused(cache, data=path, init=str(hf)).startswith(
        f"init.hf: {hf} has tokenizer.model but no tokenizer.json; make one with transformers"
    )


def test_a_cache_that_cannot_be_written_is_named(text: Path) -> None:
    message = refused(Path("/proc/mbfn"), data={"path": str(text)})
    assert message.startswith("data.cache: cannot write /proc/mbfn/tokenizer-")
    assert message.endswith("set data.cache to a directory with room")
