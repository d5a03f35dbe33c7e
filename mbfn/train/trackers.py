"""Further places for the metrics: TensorBoard, Weights & Biases, MLflow. Each is imported where it is asked for."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mbfn.config.run import RunConfig
from mbfn.config.schema import to_dict
from mbfn.errors import LaunchError
from mbfn.train.loop import Observer
from mbfn.train.state import Metrics, TrainState

Points = Sequence[tuple[int, Mapping[str, float]]]  # step, and its figures by name
Write = Callable[[Points], None]

_EVERY_S = 1.0  # between two writings, on a thread of their own
_GROUPS = {"valid_loss": "valid/loss", "loss": "train/loss"} | {
    name: f"{group}/{name}"
    for group, names in {
        "train": ("grad_norm", "lr", "tokens", "skipped"),
        "speed": ("seconds", "data_s", "tokens_per_s", "tflops", "memory_gb"),
    }.items()
    for name in names
}


@contextmanager
def tracking(run: RunConfig, output_dir: Path, start: int, warn: Callable[[str], object]) -> Iterator[Observer]:
    """An observer that hands the metrics of every `log.interval`-th step to `log.trackers`.

    A tracker that fails is left out from then on, with one line of warning: training goes on.
    """
    openers = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    with ExitStack() as stack:
        writes = []
        for name in run.log.trackers:
            write = stack.enter_context(_opened(openers[name](run, output_dir, start), name))
            writes.append(_warning(write, name, warn))
        put = stack.enter_context(_background(lambda points: [write(points) for write in writes]))

        def observe(_: TrainState, metrics: Metrics) -> None:
            if metrics.step % run.log.interval == 0 or metrics.valid_loss is not None:
                put((metrics.step, _figures(metrics)))

        yield observe


@contextmanager
def _opened(tracker: AbstractContextManager[Write], name: str) -> Iterator[Write]:
    with ExitStack() as stack:
        try:
            write = stack.enter_context(tracker)
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise LaunchError(f"log.trackers: {name} cannot start: {text}; mend that, or leave it out") from error
        yield write


def _figures(metrics: Metrics) -> dict[str, float]:
    fields = {name: value for name, value in metrics.record().items() if isinstance(value, int | float)}
    return {_GROUPS.get(name, f"train/{name}"): float(value) for name, value in fields.items() if name != "step"}


@contextmanager
def _background(write: Callable[[Points], object]) -> Iterator[Callable[[Any], None]]:
    """A function that takes points, which a thread writes together now and then, and at the end."""
    waiting: list[tuple[int, Mapping[str, float]]] = []
    over = threading.Event()

    def work() -> None:
        while not over.wait(_EVERY_S):
            _drain()
        _drain()

    def _drain() -> None:
        count = len(waiting)
        if count:
            write(waiting[:count])
            del waiting[:count]

    thread = threading.Thread(target=work, name="trackers", daemon=True)
    thread.start()
    try:
        yield waiting.append
    finally:
        over.set()
        thread.join()


def _warning(write: Write, name: str, warn: Callable[[str], object]) -> Write:
    failed: list[str] = []

    def tried(points: Points) -> None:
        try:
            if not failed:
                write(points)
        except Exception as error:  # of a service that is no part of the run
            failed.append(str(error))
            warn(f"log.trackers: {name} gets nothing from here on: {' '.join(str(error).split())[:300]}")

    return tried


@contextmanager
def _tensorboard(run: RunConfig, output_dir: Path, start: int) -> Iterator[Write]:
    from torch.utils.tensorboard import SummaryWriter

    from mbfn.config import to_yaml

    with SummaryWriter(log_dir=str(output_dir / "tensorboard"), purge_step=start + 1) as writer:
        writer.add_text("config", f"```yaml\n{to_yaml(run)}\n```", start)

        def write(points: Points) -> None:
            for step, figures in points:
                for name, value in figures.items():
                    writer.add_scalar(name, value, step)
            writer.flush()

        yield write


@contextmanager
def _wandb(run: RunConfig, output_dir: Path, start: int) -> Iterator[Write]:
    import wandb

    del start
    place = output_dir.absolute()
    with wandb.init(
        project=run.log.project,
        name=place.name,
        id=hashlib.sha256(str(place).encode()).hexdigest()[:12],  # the same run after a stop
        resume="allow",
        dir=str(place),
        mode="online" if run.log.online else "offline",
        config=to_dict(run),
        settings=wandb.Settings(silent=True, console="off"),
    ) as record:
        record.define_metric("*", step_metric="step")

        def write(points: Points) -> None:
            for step, figures in points:
                record.log({"step": step, **figures})

        yield write


@contextmanager
def _mlflow(run: RunConfig, output_dir: Path, start: int) -> Iterator[Write]:
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    del start
    place = output_dir.absolute()
    if not run.log.mlflow_uri:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files need no database beside mlflow-skinny
    client = MlflowClient(tracking_uri=run.log.mlflow_uri or (place / "mlruns").as_uri())
    known = place / "mlflow_run"
    if known.is_file():
        run_id = known.read_text()
    else:
        found = client.get_experiment_by_name(run.log.project)
        experiment = found.experiment_id if found else client.create_experiment(run.log.project)
        run_id = client.create_run(experiment, run_name=place.name).info.run_id
        known.write_text(run_id)
        client.log_batch(run_id, params=[Param(name, str(value)[:500]) for name, value in _leaves(to_dict(run))][:100])

    def write(points: Points) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for step, figures in points for name, value in figures.items()]
        for first in range(0, len(metrics), 1000):
            client.log_batch(run_id, metrics=metrics[first : first + 1000])

    yield write
    client.set_terminated(run_id)


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
