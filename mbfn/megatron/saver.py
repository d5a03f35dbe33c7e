"""Checkpoints written by all ranks at once, in a thread of each, while training goes on or waits."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mbfn.errors import CheckpointError
from mbfn.megatron.sharded import Held, Ident, divide, gather_holdings
from mbfn.megatron.staging import Staged, host_buffer, stage
from mbfn.megatron.world import World
from mbfn.storage.atomic import FULL, atomic_directory
from mbfn.storage.dist_metadata import BACKEND, COMMON
from mbfn.storage.shares import DIGESTS, SUM, Share, describe_shares, record_sum, write_share
from mbfn.storage.torch_dist_write import Chunk, saved


def nothing() -> None:
    """No more to do."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """A save as one rank's thread carries it out."""

    number: int  # of the save, over the life of the saver
    rank: int
    world_size: int
    target: Path
    record: Mapping[str, Any]  # for the manifest
    nbytes: int  # of the whole checkpoint
    chunks: Sequence[Chunk]
    blobs: Mapping[str, bytes]
    staged: Staged | None
    then: Callable[[], None]


class Saver:
    """Writes one checkpoint at a time. Every rank makes one, and calls its methods at the same steps.

    The threads talk through the store of the process group, apart from the collectives of training: each tells rank 0
    what it wrote; rank 0 describes the whole, puts it in place, and tells the others how it went.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        store: Any = dist.distributed_c10d._get_default_store()  # a clone has a connection of its own
        maker = store.add(f"savers/{world.rank}", 1)  # every rank makes its savers in one order
        self._store = dist.PrefixStore(f"saver/{maker}", store.clone())
        self._number = 0
        self._plan: tuple[Mapping[Ident, int], frozenset[Ident], int] | None = None
        self._host: Tensor | None = None
        self._thread: threading.Thread | None = None
        self._error = ""
        self.held_s = 0.0  # seconds that updates waited for copies, in all

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def ended(self) -> bool:
        """Whether a save has ended whose outcome nobody has asked for."""
        return self._thread is not None and not self._thread.is_alive()

    def begin(
        self,
        target: Path,
        state: Held,
        record: Mapping[str, Any],
        *,
        changing: Callable[[Tensor], bool] | None = None,
        then: Callable[[], None] = nothing,
    ) -> Staged | None:
        """Start to write `state` to `target`, which appears whole. Collective; waits for the save before.

        With `changing`, which tells the tensors that may change before the next update, a copy of the state is written;
        the caller calls `hold` with the returned value before that update. Without it the state has to stay as it is
        until `finish`.

        Raises: CheckpointError where the save before failed.
        """
        if error := self.finish():
            raise CheckpointError(error)
        mine, nbytes = self._share({box.ident: box.nbytes for box in state.boxes})
        boxes = list({box.ident: box for box in state.boxes if box.ident in mine}.values())
        tensors, staged = [box.data for box in boxes], None
        if changing is not None:
            self._host = host_buffer(tensors, self._host)
            staged = stage(tensors, [changing(tensor) for tensor in tensors], self._host)
            tensors = list(staged.tensors)
        blobs = {key: saved(value) for key, value in state.objects.items()}
        order = Order(
            number=self._number,
            rank=self._world.rank,
            world_size=self._world.world_size,
            target=target,
            record=record,
            nbytes=nbytes,
            chunks=[box.chunk(tensor) for box, tensor in zip(boxes, tensors, strict=True)],
            blobs=blobs if self._world.rank else {COMMON: saved(dict(state.common)), **blobs},
            staged=staged,
            then=then,
        )
        self._number += 1
        self._thread = threading.Thread(target=self._run, args=(order,), name="checkpoint", daemon=True)
        self._thread.start()
        return staged

    def hold(self, staged: Staged) -> None:
        """Wait until the copy is whole: what the next update does first."""
        started = time.perf_counter()
        staged.hold()
        self.held_s += time.perf_counter() - started

    def finish(self) -> str:
        """Wait for the save under way; why it failed, empty where it did not or there is none."""
        if self._thread is None:
            return ""
        self._thread.join()
        self._thread = None
        return self._error

    def _share(self, own: Mapping[Ident, int]) -> tuple[frozenset[Ident], int]:
        """The boxes that this rank writes, and the bytes of all; agreed once for as long as the state has its form."""
        if not _everywhere(self._plan is not None and self._plan[0] == own, self._world):
            holdings = gather_holdings(own)
            shares = divide(holdings)
            total = sum(holdings[rank][ident] for rank, share in enumerate(shares) for ident in share)
            self._plan = own, shares[self._world.rank], total
        assert self._plan is not None
        return self._plan[1:]

    def _run(self, order: Order) -> None:
        if order.staged is not None:
            order.staged.finish()
        try:
            self._error = (_follow if order.rank else _lead)(self._store, order)
        except Exception as fault:  # the run has to learn of it, whatever it is
            self._error = f"{order.target}: cannot write: {_reason(fault)}"


def _lead(store: dist.Store, order: Order) -> str:
    """Rank 0's part: the directory, its own files, the description of all, and the word to the others."""
    manifest, told = dict(order.record), False
    try:
        with atomic_directory(order.target, kind=BACKEND, manifest=manifest, nbytes=order.nbytes) as draft:
            store.set(f"{order.number}/draft", str(draft))
            told = True
            words: list[Share | str] = [_write(order, draft)]
            words += [pickle.loads(store.get(f"{order.number}/{rank}")) for rank in range(1, order.world_size)]
            failed = [f"rank {rank}: {word}" for rank, word in enumerate(words) if isinstance(word, str)]
            if failed:
                raise CheckpointError(f"{order.target}: cannot write: {failed[0]}; nothing was left there")
            manifest[DIGESTS] = describe_shares(draft, [word for word in words if not isinstance(word, str)])
            manifest[SUM] = record_sum(manifest, manifest)
        order.then()
        error = ""
    except Exception as fault:  # the other ranks wait for the word, whatever it is
        error = str(fault) if isinstance(fault, CheckpointError) else f"{order.target}: cannot write: {_reason(fault)}"
    if not told:
        store.set(f"{order.number}/draft", "")
    store.set(f"{order.number}/outcome", error)
    _forget(store, order)
    return error


def _follow(store: dist.Store, order: Order) -> str:
    """Every other rank's part."""
    draft = store.get(f"{order.number}/draft").decode()
    if draft:
        word: Any = pickle.dumps(_write(order, Path(draft)))  # the store takes bytes, its annotation only text
        store.set(f"{order.number}/{order.rank}", word)
    return store.get(f"{order.number}/outcome").decode()


def _write(order: Order, draft: Path) -> Share | str:
    """This rank's files; what is in them, or why they could not be written."""
    try:
        return write_share(draft, order.rank, order.chunks, order.blobs)
    except Exception as fault:
        return _reason(fault)


def _reason(fault: Exception) -> str:
    if isinstance(fault, OSError) and fault.errno in FULL:
        return "the disk is full or its quota reached"
    return str(fault.strerror) if isinstance(fault, OSError) and fault.strerror else f"{type(fault).__name__}: {fault}"


def _forget(store: dist.Store, order: Order) -> None:
    """Clear the store of what all have read: the words of this save to rank 0, and rank 0's of the one before last."""
    old = [f"{order.number - 2}/{what}" for what in ("draft", "outcome") if order.number > 1]
    for key in [*(f"{order.number}/{rank}" for rank in range(1, order.world_size)), *old]:
        store.delete_key(key)


def _everywhere(here: bool, world: World) -> bool:
    """Whether it holds on every rank. Collective."""
    if world.world_size == 1:
        return here
    flag = torch.tensor([int(here)], device=world.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
