"""The dtype that weights are to have: the config's, unless a cast is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mbfn.config.model import Dtype
from mbfn.convert.states import dtype_of
from mbfn.convert.table import Table
from mbfn.errors import ConversionError

DTYPES: Mapping[torch.dtype, Dtype] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BY_NAME: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPES.items()}
KEPT_FP32 = ("router.expert_bias",)  # Megatron's own dtype for it, and that of files on the Hub


def declared_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """What a config.json says of its weights; None where it says nothing."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def check_dtypes(
    table: Table, source: Mapping[str, Tensor], expected: torch.dtype | None, cast: torch.dtype | None, where: str
) -> None:
    """That every weight has the dtype that its config says, or is a float that can be cast.

    Raises: ConversionError naming the first that has not, and how many such there are.
    """
    wrong = []
    for name in table.hf_shapes:
        found = dtype_of(source, name)
        kept = found == torch.float32 and is_kept_fp32(table, name)
        fits = found in DTYPES if cast else found == expected or expected is None or kept
        if not fits:
            wrong.append((name, found))
    if wrong:
        name, found = wrong[0]
        wanted = "a float to cast" if cast else f"{expected} by the config"
        fix = "" if cast or found not in DTYPES else f"; ask for a cast, dtype={DTYPES.get(expected, 'bf16')}"  # type: ignore[arg-type]
        raise ConversionError(f"{where}: {name}: expected {wanted}, found {found} ({len(wrong)} such){fix}")


def is_kept_fp32(table: Table, name: str) -> bool:
    """Whether a Hugging Face tensor is one that Megatron holds in fp32 whatever the rest is in."""
    return any(tensor.rule.mc.endswith(KEPT_FP32) for tensor, _ in table.uses[name])
