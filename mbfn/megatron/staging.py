"""A copy of the state in host memory, made while the next forward and backward pass run: only an update changes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ALIGN = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Staged:
    """Where a copy is being made."""

    tensors: tuple[Tensor, ...]  # on CPU, in the order asked for; whole after `finish`
    finish: Callable[[], None]  # in the writing thread: make the copy, or wait until the device has made it
    hold: Callable[[], None]  # before the state changes: wait until it is copied


def stage(tensors: Sequence[Tensor], now: Sequence[bool], host: Tensor) -> Staged:
    """Begin to copy `tensors` into `host`; those marked in `now` before this returns.

    On a GPU the copies queue on a stream of their own, and an update waits for them there. On the CPU the writing
    thread makes them.
    """
    views, end = [], 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.dtype.itemsize
        views.append(host[end : end + nbytes].view(tensor.dtype).view(tensor.shape))
        end += -(-nbytes // _ALIGN) * _ALIGN
    pairs = list(zip(views, (tensor.detach() for tensor in tensors), strict=True))
    if any(tensor.is_cuda for tensor in tensors):
        return _on_gpu(pairs)
    for (view, tensor), wanted in zip(pairs, now, strict=True):
        if wanted:
            view.copy_(tensor)
    return _in_thread([pair for pair, wanted in zip(pairs, now, strict=True) if not wanted], tuple(views))


def host_buffer(tensors: Sequence[Tensor], before: Tensor | None) -> Tensor:
    """Memory for `stage`: `before`, if it is large enough. Page-locked where tensors come from a GPU."""
    nbytes = sum(-(-tensor.numel() * tensor.dtype.itemsize // _ALIGN) * _ALIGN for tensor in tensors)
    if before is not None and before.numel() >= nbytes:
        return before
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=any(tensor.is_cuda for tensor in tensors))


def _in_thread(pairs: Sequence[tuple[Tensor, Tensor]], views: tuple[Tensor, ...]) -> Staged:
    copied = threading.Event()

    def finish() -> None:
        try:
            for view, tensor in pairs:
                view.copy_(tensor)
        finally:
            copied.set()

    def hold() -> None:
        copied.wait()

    return Staged(tensors=views, finish=finish, hold=hold)


def _on_gpu(pairs: Sequence[tuple[Tensor, Tensor]]) -> Staged:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for view, tensor in pairs:
            view.copy_(tensor, non_blocking=True)
            if tensor.is_cuda:
                tensor.record_stream(stream)
        copied = torch.cuda.Event()
        copied.record(stream)
    return Staged(
        tensors=tuple(view for view, _ in pairs),
        finish=copied.synchronize,
        hold=lambda: torch.cuda.current_stream().wait_event(copied),
    )
