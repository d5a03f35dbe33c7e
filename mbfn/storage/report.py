"""A progress bar in bytes for commands that move weights."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WEIGHTS = (".safetensors", ".distcp")


@contextmanager
def progress_of(title: str, source: Path) -> Iterator[Callable[[int], None]]:
    """Yield `on_bytes(count)`, which any thread may call; a bar with GB/s and time left on a terminal, else silent."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    total = sum(file.stat().st_size for file in source.glob("*") if file.suffix in WEIGHTS) if source.is_dir() else None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    lock = threading.Lock()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)

        def on_bytes(count: int) -> None:
            with lock:
                progress.advance(task, count)

        yield on_bytes
