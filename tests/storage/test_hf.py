"""What is saved is what is read, by mbfn and by the safetensors library; what is broken is named in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mbfn.config.model import ModelConfig
from mbfn.errors import CheckpointError, ConversionError
from mbfn.storage import Declared, Streamed, carried_files, open_hf, save_hf
from mbfn.storage.headers import DTYPES
from mbfn.storage.hf import INDEX, SINGLE
from mbfn.storage.hf_shards import HEADER_ROOM

TENSOR = st.tuples(st.lists(st.integers(0, 6), max_size=3), st.sampled_from(sorted(DTYPES)))
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


def filled(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Random bytes, as booleans where the dtype is bool."""
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=torch.Generator().manual_seed(seed))
    return data.to(torch.uint8).view(dtype).reshape(shape)


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def whole(tensor: Tensor) -> Streamed:
    def read(start: int, stop: int, out: Tensor) -> None:
        out.copy_(tensor.reshape(-1)[start:stop])

    return Streamed(shape=tuple(tensor.shape), dtype=tensor.dtype, read=read)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, TENSOR, min_size=1, max_size=8), st.integers(1, 300), st.booleans(), st.randoms())
def test_saved_is_read(
    tmp_path_factory: pytest.TempPathFactory, declared: dict, limit: int, planned: bool, order: object
) -> None:
    folder = tmp_path_factory.mktemp("hf") / "out"
    tensors = {name: filled(shape, DTYPES[dtype], i) for i, (name, (shape, dtype)) in enumerate(declared.items())}
    plan = [Declared(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in tensors.items()] if planned else None
    items = list(tensors.items())
    order.shuffle(items)
    save_hf(folder, iter(items), config={"a": 1}, plan=plan, max_shard_bytes=limit)
    with open_hf(folder) as hf:
        assert hf.config() == {"a": 1}
        assert {name: (t.dtype, t.shape, raw(t)) for name, t in hf.items()} == {
            name: (t.dtype, t.shape, raw(t)) for name, t in tensors.items()
        }
        sizes = [sum(meta.nbytes for meta in hf.metas.values() if meta.file == file) for file in hf.files]
        assert all(size <= max(limit, max(meta.nbytes for meta in hf.metas.values())) for size in sizes)
    theirs = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            theirs.update({name: raw(opened.get_tensor(name)) for name in list(opened.keys())})
    assert theirs == {name: raw(t) for name, t in tensors.items()}


def test_streamed_larger_than_the_buffer(tmp_path: Path) -> None:
    tensor = torch.arange(7_000_003, dtype=torch.int32)
    save_hf(tmp_path / "out", {"a": torch.zeros(3), "t": tensor}, config={})
    save_hf(tmp_path / "out", iter([("t", whole(tensor)), ("a", torch.zeros(3))]), config={}, workers=3)
    assert torch.equal(load_file(tmp_path / "out" / SINGLE)["t"], tensor)


def test_a_file_ends_when_its_header_is_full(tmp_path: Path) -> None:
    tensors = {f"{i:04d}" + "x" * 1000: torch.tensor(i) for i in range(600)}
    save_hf(tmp_path / "out", iter(tensors.items()), config={})
    with open_hf(tmp_path / "out") as hf:
        assert len(hf.files) == 3
        assert min(meta.offset for meta in hf.metas.values()) == HEADER_ROOM
        assert {name: int(t) for name, t in hf.items()} == {name: int(t) for name, t in tensors.items()}


def test_files_that_travel_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    kept = ["LICENSE.txt", "generation_config.json", "merges.txt", "modeling_x.py", "tokenizer.json", "tokenizer.model"]
    for name in [
        *kept,
        "config.json",
        INDEX,
        "model.safetensors",
        "pytorch_model.bin",
        "mbfn.json",
        "consolidated.pth",
    ]:
        (source / name).write_text(name)
    assert [file.name for file in carried_files(source)] == kept
    save_hf(tmp_path / "out", {"t": torch.zeros(1)}, config={}, extra_files=carried_files(source))
    assert (tmp_path / "out" / "merges.txt").read_text() == "merges.txt"


@pytest.mark.parametrize(
    ("items", "line"),
    [
        ([("a", torch.zeros(2)), ("a", torch.zeros(2))], "a: given twice"),
        ([("a", torch.zeros(2))], "b: planned for the export but not given (1 such)"),
        ([("c", torch.zeros(2))], "c: not in the plan of the export"),
        ([("a", torch.zeros(3))], "a: expected torch.float32 of shape [2], found torch.float32 of shape [3]"),
    ],
)
def test_items_that_are_not_the_plan(tmp_path: Path, items: list, line: str) -> None:
    plan = [Declared(name=name, shape=(2,), dtype=torch.float32) for name in ("a", "b")]
    with pytest.raises(ConversionError) as error:
        save_hf(tmp_path / "out", items, config={}, plan=plan)
    assert str(error.value) == line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize(
    ("name", "tensor", "line"),
    [
        ("__metadata__", torch.zeros(2), "__metadata__: the format keeps this name"),
        ("c", torch.zeros(2, dtype=torch.complex128), "c: safetensors has no dtype torch.complex128"),
    ],
)
def test_what_the_format_cannot_hold(tmp_path: Path, planned: bool, name: str, tensor: Tensor, line: str) -> None:
    plan = [Declared(name=name, shape=(2,), dtype=tensor.dtype)] if planned else None
    with pytest.raises(CheckpointError) as error:
        save_hf(tmp_path / "out", {name: tensor}, config={}, plan=plan)
    assert str(error.value) == line
    assert not list(tmp_path.iterdir())


def test_a_plan_that_declares_twice(tmp_path: Path) -> None:
    plan = [Declared(name="a", shape=(2,), dtype=torch.float32)] * 2
    for limit, kind in ((100, CheckpointError), (8, ConversionError)):
        with pytest.raises(kind, match="a: declared twice"):
            save_hf(tmp_path / "out", {"a": torch.zeros(2)}, config={}, plan=plan, max_shard_bytes=limit)


def test_an_export_of_a_model_is_all_of_it(tmp_path: Path) -> None:
    model = ModelConfig(
        family="llama",
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=12,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=4,
        vocab_size=10,
        max_position_embeddings=16,
    )
    with pytest.raises(ConversionError, match=r"the model has shape \[10, 8\], the export no such tensor"):
        save_hf(tmp_path / "out", {"model.norm.weight": torch.zeros(8)}, model)
    assert not list(tmp_path.iterdir())


def header(text: str | dict, data: bytes = b"") -> bytes:
    encoded = (text if isinstance(text, str) else json.dumps(text)).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def entry(start: int, stop: int, shape: list[int], dtype: str = "U8") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


BROKEN_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes are too few for a safetensors file; fetch or export it again"),
    "not safetensors": (
        b"\x80\x02" * 40,
        "header of 180146733915832960 bytes in a file of 80: cut short or not safetensors",
    ),
    "git lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a Git LFS pointer, not the weights; run `git lfs pull` in its directory",
    ),
    "not json": (header("{nope"), "the header is not valid JSON (Expecting property name"),
    "a list": (header("[]"), "the header is a JSON list, expected an object of tensors"),
    "twice": (
        header('{"t": 1, "t": 2}'),
        "the header is not valid JSON ('t' is there twice); fetch or export the file again",
    ),
    "no offsets": (
        header({"t": {"dtype": "U8"}}),
        "t: expected dtype, shape and two data_offsets, found {'dtype': 'U8'}",
    ),
    "negative": (header({"t": entry(0, 1, [-1])}), "t: expected sizes and offsets of at least 0, found"),
    "dtype": (header({"t": entry(0, 1, [1], "Q7")}), "t: unknown dtype 'Q7'; known: BOOL, U8"),
    "lies": (header({"t": entry(0, 3, [2])}, b"123"), "t: U8 of shape (2,) takes 2 bytes, its header gives 3"),
    "overlap": (
        header({"s": entry(0, 2, [2]), "t": entry(1, 3, [2])}, b"123"),
        "t: starts at byte 129, expected 130: it overlaps the tensor before it",
    ),
    "hole": (header({"t": entry(1, 3, [2])}, b"123"), "t: starts at byte 69, expected 68: it leaves a hole before it"),
    "cut": (header({"t": entry(0, 3, [3])}, b"12"), "the header describes 71 bytes, the file has 70: it is cut short"),
    "longer": (
        header({"t": entry(0, 3, [3])}, b"1234"),
        "the header describes 71 bytes, the file has 72: it has bytes that no tensor owns",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_FILES)
def test_broken_files(tmp_path: Path, fault: str) -> None:
    content, line = BROKEN_FILES[fault]
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        open_hf(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / SINGLE}: {line}")
    assert "\n" not in str(error.value)


def _edit_index(edit: Callable[[dict], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        edit(index)
        (folder / INDEX).write_text(json.dumps(index))

    return apply


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BROKEN_DIRECTORIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda d: (d / TWO).unlink(), f"{{d}}/{TWO}: missing, though {INDEX} names it; fetch it again"),
    "duplicate": (
        lambda d: save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, d / TWO),
        f"{{d}}/{TWO}: a is also in {ONE}; keep one of the two",
    ),
    "tensor gone": (
        lambda d: save_file({"z": torch.zeros(2)}, d / TWO),
        f"{{d}}/{TWO}: b is missing, though {INDEX} says it is here",
    ),
    "unlisted": (
        lambda d: save_file({"b": torch.zeros(2), "z": torch.zeros(2)}, d / TWO),
        f"{{d}}/{TWO}: z is not in {INDEX} (1 such); remake the index",
    ),
    "swapped": (
        _edit_index(lambda index: index["weight_map"].update(a=TWO, b=ONE)),
        f"{{d}}/{TWO}: a is missing: {INDEX} says here, it is in {ONE}",
    ),
    "outside": (
        _edit_index(lambda index: index["weight_map"].update(a="../x.safetensors")),
        f"{{d}}/{INDEX}: a: expected the name of a file beside the index, found '../x.safetensors'",
    ),
    "no map": (
        _edit_index(lambda index: index.pop("weight_map")),
        f"{{d}}/{INDEX}: expected a weight_map of tensor names to files, found None",
    ),
    "index broken": (lambda d: (d / INDEX).write_text("{"), f"{{d}}/{INDEX}: not valid JSON: "),
    "two models": (
        lambda d: save_file({"a": torch.zeros(2)}, d / SINGLE),
        f"{{d}}: has both {SINGLE} and {INDEX}: two models in one place; remove one",
    ),
    "no weights": (
        lambda d: [file.unlink() for file in (d / ONE, d / TWO, d / INDEX)],
        f"{{d}}: expected {SINGLE} or {INDEX}, found no weight file",
    ),
    "no index": (lambda d: (d / INDEX).unlink(), f"{{d}}: expected {SINGLE} or {INDEX}, found {ONE}, {TWO}"),
    "no directory": (shutil.rmtree, f"{{d}}: no such directory; expected a Hugging Face directory with {SINGLE}"),
}


@pytest.mark.parametrize("fault", BROKEN_DIRECTORIES)
def test_broken_directories(tmp_path: Path, fault: str) -> None:
    damage, line = BROKEN_DIRECTORIES[fault]
    folder = tmp_path / "hf"
    save_hf(folder, {"a": torch.zeros(2), "b": torch.ones(2)}, config={}, max_shard_bytes=8)
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        open_hf(folder)
    assert str(error.value).startswith(line.format(d=folder))
    assert "\n" not in str(error.value)


def test_reading_after_close_is_an_error(tmp_path: Path) -> None:
    save_hf(tmp_path / "out", {"a": torch.zeros(2)}, config={})
    hf = open_hf(tmp_path / "out")
    hf.close()
    with pytest.raises(ValueError, match="read after close"):
        hf["a"]


def test_an_export_over_an_open_directory_does_not_change_what_it_reads(tmp_path: Path) -> None:
    save_hf(tmp_path / "out", {"a": torch.zeros(2)}, config={})
    with open_hf(tmp_path / "out") as hf:
        save_hf(tmp_path / "out", {"a": torch.ones(2)}, config={})
        assert hf["a"].tolist() == [0, 0]
