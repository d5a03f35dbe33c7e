"""Plans against measurements on H200s, and against throughput that others published."""

from __future__ import annotations

import pytest

from mbfn.config.compose import compose
from mbfn.plan.devices import DEVICES, DeviceName
from mbfn.plan.memory import GIB, stage_memory
from mbfn.plan.search import fits
from mbfn.plan.speed import estimate
from tests.plan.measured import MEMORY_ONLY, ROWS, Row

H200 = DEVICES["h200"]


@pytest.mark.parametrize("row", [*ROWS, *MEMORY_ONLY], ids=lambda row: row.name)
def test_peak_memory_is_the_measured_one(row: Row) -> None:
    planned = max(stage.peak for stage in stage_memory(row.run(), row.kernels)) / GIB
    assert planned == pytest.approx(row.peak_gib, rel=0.02)  # the promise is 10%
    assert fits(row.run(), H200)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_step_time_is_the_measured_one(row: Row) -> None:
    assert estimate(row.run(), H200).step * 1e3 == pytest.approx(row.step_ms, rel=0.1)


def test_18_bytes_a_parameter_do_not_fit_8b_on_one_h200() -> None:
    assert not fits(compose("model=llama31_8b", "precision=bf16", "train.seq_length=8192"), H200)


# (model, device, precision, overrides, global batch, tokens/s a GPU as published)
PUBLISHED: list[tuple[str, DeviceName, str, tuple[str, ...], int, float]] = [
    ("llama3_8b", "h100", "bf16", ("parallel.cp=2", "parallel.dp=4"), 128, 10_682),
    ("llama3_8b", "h100", "fp8_tensorwise", ("parallel.dp=8",), 128, 14_451),
    ("llama3_8b", "b200", "mxfp8", ("parallel.dp=8",), 128, 30_624),
    ("llama3_70b", "h100", "bf16", ("parallel=tp4pp4vpp5cp2", "parallel.dp=2"), 256, 1_118),
    ("llama3_70b", "h100", "fp8_tensorwise", ("parallel=tp4pp8vpp5", "parallel.dp=2"), 256, 1_664),
    ("llama31_405b", "h100", "fp8_tensorwise", ("parallel=tp8pp8vpp8cp2", "parallel.dp=8"), 1536, 326),
]


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def test_published_throughput_is_near(case: tuple[str, DeviceName, str, tuple[str, ...], int, float]) -> None:
    model, device, precision, layout, batch, published = case
    run = compose(
        f"model={model}",
        f"precision={precision}",
        *layout,
        "train.seq_length=8192",
        "train.micro_batch_size=1",
        f"train.global_batch_size={batch}",
        "optim.overlap_grad_reduce=true",
        "optim.overlap_param_gather=true",
    )
    planned = estimate(run, DEVICES[device]).tokens_per_second / run.parallel.world_size
    assert planned == pytest.approx(published, rel=0.2)
