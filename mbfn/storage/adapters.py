"""Adapter directories of PEFT: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mbfn.config.adapters import Adapter
from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.convert.adapters import adapter_table
from mbfn.convert.merge import Merged
from mbfn.convert.states import check_hf
from mbfn.convert.table import Table
from mbfn.errors import CheckpointError
from mbfn.families import model_from_hf
from mbfn.storage.atomic import atomic_directory
from mbfn.storage.headers import make_header
from mbfn.storage.hf import HfDirectory, open_hf, read_json
from mbfn.storage.hf_shards import Declared
from mbfn.storage.hf_write import METADATA, carried_files, save_hf
from mbfn.storage.peft_config import adapter_form, adapters_in, peft_config
from mbfn.storage.streams import write_exactly, write_tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterDirectory:
    """An open directory: which adapters it holds, and their tensors, read when they are asked for."""

    path: Path
    config: Mapping[str, Any]
    adapters: tuple[Adapter, ...]
    table: Table  # of these adapters, in the form of the file
    tensors: HfDirectory


@contextmanager
def open_adapter(path: str | os.PathLike[str], model: ModelConfig) -> Iterator[AdapterDirectory]:
    """Open a directory that PEFT or mbfn wrote, for weights of `model`.

    Raises: CheckpointError when files are missing or broken, ConversionError when they are not adapters of the model.
    """
    root = Path(path).expanduser()
    if not (root / CONFIG).is_file() or not (root / WEIGHTS).is_file():
        raise CheckpointError(f"{root}: expected an adapter directory with {CONFIG} and {WEIGHTS}")
    config = read_json(root / CONFIG)
    with open_hf(root / WEIGHTS) as tensors:
        adapters = adapters_in(config, tensors, model)
        table = adapter_table(model, adapters, ParallelConfig(), adapter_form(tensors))
        check_hf(table, tensors, str(root))
        yield AdapterDirectory(path=root, config=config, adapters=adapters, table=table, tensors=tensors)


def save_adapter(
    path: str | os.PathLike[str],
    items: Iterable[tuple[str, Tensor]],
    model: ModelConfig,
    adapters: tuple[Adapter, ...],
    *,
    base: str | None = None,
    extra_files: Iterable[Path] = (),
) -> None:
    """Write tensors under PEFT's names, with the file that describes them, whole or not at all.

    `base`: where the frozen weights are, for PEFT to load. Raises: CheckpointError when it cannot be written.
    """
    found = dict(items)
    declared = [Declared(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in found.items()]
    config = peft_config(model, adapters, adapter_form(found)) | {"base_model_name_or_path": base}
    manifest: dict[str, Any] = {}
    with atomic_directory(path, kind="adapter", manifest=manifest, nbytes=sum(d.nbytes for d in declared)) as draft:
        manifest["crc32"] = _write(draft / WEIGHTS, declared, found)
        (draft / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in extra_files:
            shutil.copyfile(file, draft / file.name)


def _write(file: Path, declared: list[Declared], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """CRC-32 of every tensor's bytes."""
    header, crcs = make_header(((d.name, d.shape, d.dtype) for d in declared), METADATA), {}
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_exactly(fd, header, 0)
        position = len(header)
        for d in declared:
            crcs[d.name] = write_tensor(fd, position, d.shape, d.dtype, tensors[d.name])
            position += d.nbytes
    finally:
        os.close(fd)
    return crcs


def merge_adapter(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str], out: str | os.PathLike[str], *, workers: int = 1
) -> int:
    """Write the weights of the Hugging Face directory `base` with an adapter directory added; how many tensors.

    A tensor at a time is in memory, in fp32. Raises: CheckpointError, ConversionError.
    """
    model = model_from_hf(Path(base))
    with open_hf(base) as weights, open_adapter(adapter, model) as found:
        merged = Merged(weights, model, found.adapters, found.table, found.tensors)
        plan = [Declared(name=n, shape=weights.meta(n).shape, dtype=weights.meta(n).dtype) for n in weights]
        save_hf(
            out,
            ((name, merged[name]) for name in merged),
            model,
            config=weights.config(),
            plan=plan,
            extra_files=carried_files(base),
            workers=workers,
        )
        return len(plan)
