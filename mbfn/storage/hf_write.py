"""A Hugging Face directory written as a whole: weights streamed to places known beforehand, config, tokenizer."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbfn.config.model import ModelConfig
from mbfn.errors import CheckpointError, ConversionError
from mbfn.storage.atomic import MANIFEST, atomic_directory
from mbfn.storage.headers import NAMES, make_header
from mbfn.storage.hf import INDEX, SINGLE
from mbfn.storage.streams import Read, run_all, write_exactly, write_tensor

MAX_SHARD_BYTES = 5 << 30
_CARRIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md")
_CARRIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that its data takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def save_hf(
    path: str | os.PathLike[str],
    items: Iterable[tuple[str, Tensor | Read]] | Mapping[str, Tensor],
    model: ModelConfig | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    plan: Sequence[Declared] | None = None,
    extra_files: Iterable[Path] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    workers: int = 1,
) -> None:
    """Write `items` as the directory `path`, whole or not at all; an older export of mbfn is replaced.

    `plan`: every tensor in the order of the files; `items` may then come in any order and are let go one by one.
    Without a plan all items are held at once. `config`: config.json; default: that of `model`.
    Raises: CheckpointError when the target cannot be written; ConversionError when items and plan differ.
    """
    if isinstance(items, Mapping):
        items = items.items()
    if plan is None:
        items = list(items)
        plan = [_declared(name, data) for name, data in items]
    shards = plan_shards(plan, max_shard_bytes)
    nbytes = sum(entry.nbytes for entry in plan)
    manifest: dict[str, Any] = {"model": asdict(model) if model else None}
    with atomic_directory(path, kind="hf", manifest=manifest, nbytes=nbytes) as draft:
        manifest["crc32"] = _write_weights(draft, shards, items, metadata=metadata or {"format": "pt"}, workers=workers)
        if len(shards) > 1:
            _write_json(draft / INDEX, _index(shards, nbytes))
        for file in extra_files:
            shutil.copyfile(file, draft / file.name)
        _write_json(draft / "config.json", config if config is not None else _config_of(model))


def carried_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """What a conversion carries over unchanged: tokenizer, generation config, remote code, licence; not the weights."""
    found = (file for file in sorted(Path(path).iterdir()) if file.is_file())
    return tuple(
        file
        for file in found
        if (file.suffix in _CARRIED or file.name.startswith(_CARRIED_NAMES))
        and file.name not in ("config.json", MANIFEST)
        and not file.name.endswith(".index.json")
    )


def plan_shards(plan: Sequence[Declared], max_shard_bytes: int) -> dict[str, tuple[Declared, ...]]:
    """Files and their tensors, in order: a file ends before the tensor that would make it larger than the limit."""
    groups: list[list[Declared]] = [[]]
    size = 0
    for entry in plan:
        if groups[-1] and size + entry.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return {SINGLE: tuple(groups[0])}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": tuple(group) for i, group in enumerate(groups, 1)}


def _write_weights(
    draft: Path,
    shards: Mapping[str, tuple[Declared, ...]],
    items: Iterable[tuple[str, Tensor | Read]],
    *,
    metadata: Mapping[str, str],
    workers: int,
) -> dict[str, int]:
    """CRC-32 of every tensor's bytes, by name."""
    with ExitStack() as open_files:
        places: dict[str, tuple[int, int, Declared]] = {}
        for name, entries in shards.items():
            fd = os.open(draft / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            open_files.callback(os.close, fd)
            header = make_header(((entry.name, entry.shape, entry.dtype) for entry in entries), metadata)
            write_exactly(fd, header, 0)
            position = len(header)
            for entry in entries:
                places[entry.name] = (fd, position, entry)
                position += entry.nbytes
            os.ftruncate(fd, position)
        names: list[str] = []
        crcs = run_all(_jobs(items, places, names), workers)
        missing = [name for name in places if name not in set(names)]
        if missing:
            raise ConversionError(f"{missing[0]}: planned for the export but not given ({len(missing)} such)")
    return dict(zip(names, crcs, strict=True))


def _jobs(
    items: Iterable[tuple[str, Tensor | Read]], places: Mapping[str, tuple[int, int, Declared]], names: list[str]
) -> Iterator[partial[int]]:
    """Writing each item; its name is noted in `names`."""
    seen: set[str] = set()
    for name, data in items:
        if name not in places or name in seen:
            fault = "given twice" if name in seen else "not in the plan of the export"
            raise ConversionError(f"{name}: {fault}")
        fd, position, entry = places[name]
        if isinstance(data, Tensor) and (tuple(data.shape), data.dtype) != (entry.shape, entry.dtype):
            raise ConversionError(
                f"{name}: expected {entry.dtype} of shape {entry.shape}, got {data.dtype} of shape {tuple(data.shape)}"
            )
        seen.add(name)
        names.append(name)
        yield partial(write_tensor, fd, position, entry.shape, entry.dtype, data)


def _declared(name: str, data: Tensor | Read) -> Declared:
    if not isinstance(data, Tensor):
        raise ValueError(f"{name}: a reader has no shape: pass `plan`")
    if data.dtype not in NAMES:
        raise CheckpointError(f"{name}: safetensors has no dtype {data.dtype}")
    return Declared(name=name, shape=tuple(data.shape), dtype=data.dtype)


def _config_of(model: ModelConfig | None) -> Mapping[str, Any]:
    if model is None:
        raise ValueError("pass `model` or `config`")
    from mbfn.families import model_to_hf

    return model_to_hf(model)


def _index(shards: Mapping[str, tuple[Declared, ...]], nbytes: int) -> dict[str, Any]:
    weight_map = {entry.name: file for file, entries in shards.items() for entry in entries}
    return {"metadata": {"total_size": nbytes}, "weight_map": weight_map}


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
