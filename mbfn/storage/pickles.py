"""Pickles without running what they name: a reader that turns every class into a plain record, and a small writer.

Both work by name, so that torch's checkpoint classes (0.6 s of imports) and Megatron's (seconds) are never needed.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mbfn.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function, by name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What the pickle makes by calling `function`."""

    function: Global
    args: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Instance:
    """An object of `cls` with this state."""

    cls: Global
    state: Any


@dataclass(frozen=True, slots=True)
class Persistent:
    """A reference that the reader resolves: torch's storages."""

    key: Any


@dataclass(frozen=True, slots=True)
class Pairs:
    """A dict whose keys are such objects."""

    items: tuple[tuple[Any, Any], ...]


class Record:
    """Any object of a pickle that was read: its class by name, its arguments, its state as attributes."""

    pickled: Global

    def __new__(cls, *args: Any, **_: Any) -> Record:
        found = super().__new__(cls)
        found.__dict__["args"] = args
        return found

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})

    def append(self, _: Any) -> None:
        """Content of a list subclass: not kept."""

    def extend(self, _: Any) -> None:
        """Content of a list subclass: not kept."""

    def __setitem__(self, _: Any, __: Any) -> None:
        pass


class _Reader(pickle.Unpickler):
    """Knows plain containers, sizes and dtypes; everything else becomes a `Record`."""

    def __init__(self, data: bytes, storage: Callable[[Any], Any], known: Mapping[Global, Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._storage = storage
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        pickled = Global(module, name)
        if pickled in self._known:
            return self._known[pickled]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        return _record(pickled)

    def persistent_load(self, pid: Any) -> Any:
        return self._storage(pid)


@cache
def _record(pickled: Global) -> type[Record]:
    """The stand-in for a class."""
    return type(pickled.name, (Record,), {"pickled": pickled})


_KNOWN: Mapping[Global, Any] = {
    Global("torch", "Size"): tuple,
    Global("collections", "OrderedDict"): OrderedDict,
    Global("builtins", "set"): set,
    Global("builtins", "frozenset"): frozenset,
    Global("builtins", "complex"): complex,
}


def loads(
    data: bytes,
    path: Path,
    *,
    storage: Callable[[Any], Any] = lambda key: key,
    known: Mapping[Global, Any] | None = None,
) -> Any:
    """The value of a pickle; no code that it names runs.

    Raises: CheckpointError when the bytes are not a whole pickle.
    """
    try:
        return _Reader(data, storage, {**_KNOWN, **(known or {})}).load()
    except CheckpointError:
        raise
    except Exception as error:  # a broken pickle can raise anything
        raise CheckpointError(f"{path}: not a readable pickle: {type(error).__name__}: {error}") from None


def dumps(value: Any) -> bytes:
    """A pickle of plain values, `Global`, `Call`, `Instance` and `Persistent`, in opcodes that torch.load accepts."""
    return b"\x80\x02" + _encode(value) + b"."


def _encode(value: Any) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return _encode_int(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = value.encode()
            return b"X" + struct.pack("<I", len(text)) + text
        case tuple():
            return b"(" + b"".join(map(_encode, value)) + b"t" if value else b")"
        case list():
            return b"](" + b"".join(map(_encode, value)) + b"e"
        case dict():
            return _encode(Pairs(tuple(value.items())))
        case Pairs(items):
            return b"}(" + b"".join(_encode(key) + _encode(item) for key, item in items) + b"u"
        case Global(module, name):
            return b"c" + module.encode() + b"\n" + name.encode() + b"\n"
        case Call(function, args):
            return _encode(function) + _encode(args) + b"R"
        case Instance(cls, state):
            return _encode(cls) + b")\x81" + _encode(state) + b"b"
        case Persistent(key):
            return _encode(key) + b"Q"
    raise TypeError(f"no pickle for {type(value).__name__}")


def _encode_int(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    number = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(number)]) + number


def tensor_pickle(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    """What torch.save writes as data.pkl of one contiguous CPU tensor, whose bytes are storage `0`."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    hooks = Call(Global("collections", "OrderedDict"))
    name = str(dtype).removeprefix("torch.")
    if dtype in STORAGES:
        storage = ("storage", Global("torch", STORAGES[dtype]), "0", "cpu", math.prod(shape))
        args: tuple[Any, ...] = (Persistent(storage), 0, shape, strides, False, hooks)
        return dumps(Call(Global("torch._utils", "_rebuild_tensor_v2"), args))
    storage = ("storage", Global("torch.storage", "UntypedStorage"), "0", "cpu", math.prod(shape) * dtype.itemsize)
    args = (Persistent(storage), 0, shape, strides, False, hooks, Global("torch", name))
    return dumps(Call(Global("torch._utils", "_rebuild_tensor_v3"), args))


STORAGES: Mapping[torch.dtype, str] = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
}
