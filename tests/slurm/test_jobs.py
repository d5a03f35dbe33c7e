"""launch=slurm on a real cluster: what was printed is what runs, and every end has its cause and exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.slurm.box import Box
from tests.slurm.client import finish, start, submitted, wait_until
from tests.train.command import losses, records

WIDE = ("parallel=tp2pp2", "train.steps=12", "checkpoint.interval=5")
PAIR = ("parallel=tp2", "site.cpu_ranks_per_node=1")  # two nodes


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


def wrapper(path: Path, body: str) -> str:
    """A python of the job that does something first."""
    path.write_text(f'#!/bin/bash\n{body}\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


def state(box: Box, job: str) -> str:
    return box.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()


@pytest.fixture(scope="module")
def root(box: Box, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def whole(box: Box, root: Path) -> tuple[Path, str, str]:
    """A run of two nodes of two ranks to its end: its directory, the script printed before, what the client printed."""
    output = root / "whole"
    code, script, err = finish(start(box, output, *WIDE, "launch.dry_run=true"))
    assert (code, err) == (0, "")
    assert not (output / "slurm").exists()
    code, out, err = finish(start(box, output, *WIDE))
    assert (code, err) == (0, ""), out
    return output, script, out


def test_a_dry_run_prints_what_is_submitted(box: Box, whole: tuple[Path, str, str]) -> None:
    output, script, _ = whole
    job = json.loads((output / "slurm/submitted.json").read_text())["job_id"]
    assert box.run("scontrol", "write", "batch_script", job, "-") == script
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=2\n" in script


def test_two_nodes_of_two_ranks_train(box: Box, whole: tuple[Path, str, str]) -> None:
    output, _, printed = whole
    assert [record["step"] for record in records(output)] == list(range(1, 13))
    assert losses(output)[-1] < losses(output)[0]
    assert "4 ranks on cpu" in printed
    assert "continues:" in printed
    assert printed.splitlines()[1].endswith("PENDING") or printed.splitlines()[1].endswith("RUNNING")
    assert sorted(path.name for path in (output / "slurm").glob("*_0/*.log")) == [f"rank_{n}.log" for n in (1, 2, 3)]


def test_a_failing_rank_ends_the_job_with_its_traceback(box: Box, root: Path) -> None:
    python = wrapper(root / "bad_port", '[ "$SLURM_PROCID" = 1 ] && export MASTER_PORT=none')
    code, _, err = finish(start(box, root / "failing", *PAIR, f"site.python={python}"))
    assert code == 1
    assert err.count("Traceback (most recent call last)") == 1
    job = json.loads((root / "failing/slurm/submitted.json").read_text())["job_id"]
    assert state(box, job) == "FAILED"
    (line,) = errors(err)
    said = f"error: rank 1: ValueError: invalid literal for int() with base 10: 'none'; job {job} FAILED with exit code"
    assert line.startswith(said)


def test_a_file_edited_while_the_job_waits_changes_nothing(box: Box, root: Path) -> None:
    conf = root / "conf"
    (conf / "optim").mkdir(parents=True)
    (conf / "optim/mine.yaml").write_text("lr: 0.002\n")
    output, held = root / "edited", ("optim=mine", "train.steps=2", "site.sbatch_args=[--hold]")
    job = submitted(box, output, *held, MBFN_CONF=str(conf))
    code, _, err = finish(start(box, output, *held, MBFN_CONF=str(conf)))
    assert code == 1
    assert f"has job {job}: PENDING (JobHeldUser); wait, `scancel {job}`" in errors(err)[0]
    (conf / "optim/mine.yaml").write_text("lr: 0.5\nclip_grad: nonsense\n")
    box.run("scontrol", "release", job)
    wait_until(lambda: job not in box.jobs(), "the end of the job")
    assert state(box, job) == "COMPLETED"
    assert yaml.safe_load((output / "config.yaml").read_text())["optim"]["lr"] == 0.002
    assert len(losses(output)) == 2


def test_fake_gpus_are_given_out(box: Box, root: Path) -> None:
    if not box.gpus:
        pytest.skip("making the devices of fake GPUs needs root")
    python = wrapper(
        root / "devices",
        f'echo "$SLURM_PROCID $SLURM_LOCALID $CUDA_VISIBLE_DEVICES" >> {root}/devices_$SLURM_JOB_ID; sleep 3; exit 0',
    )
    gpus = ("launch.device=cuda", "site.gpus_per_node=2", "site.nodelist=n2", f"site.python={python}")
    jobs = [submitted(box, root / f"gpus{number}", "parallel=tp2", *gpus) for number in (1, 2)]
    wait_until(lambda: not box.jobs().keys() & set(jobs), "the end of both jobs")
    seen = [sorted((root / f"devices_{job}").read_text().splitlines()) for job in jobs]
    assert seen == [["0 0 0,1", "1 1 0,1"], ["0 0 2,3", "1 1 2,3"]]


def test_what_slurm_refuses_is_one_line(box: Box, root: Path) -> None:
    code, _, err = finish(start(box, root / "refused", "site.partition=nowhere"))
    assert (code, errors(err)) == (1, err.splitlines())
    assert "sbatch: invalid partition specified: nowhere" in err


def test_a_setup_line_that_fails_is_named(box: Box, root: Path) -> None:
    code, _, err = finish(start(box, root / "setup", "site.setup=[cd /nowhere]"))
    assert code == 1
    assert "error: site.setup: cd /nowhere failed" in err
    assert "ended without a word from its ranks" in errors(err)[0]  # then the end of its log


@pytest.mark.slow
def test_a_signal_saves_and_requeues_and_nothing_is_lost(box: Box, root: Path, whole: tuple[Path, str, str]) -> None:
    output = root / "requeued"
    process = start(box, output, *WIDE)
    wait_until(lambda: len(records(output)) >= 3, "the third step")
    job = json.loads((output / "slurm/submitted.json").read_text())["job_id"]
    box.run("scancel", "--signal=USR1", job)
    code, printed, err = finish(process)
    assert (code, err) == (0, ""), printed
    assert f"job {job}: RUNNING, start 2" in printed
    assert sorted(path.name for path in (output / "slurm").glob("*_?")) == [f"{job}_0", f"{job}_1"]
    assert records(output) == records(whole[0])
    exports = [(path / "hf/model.safetensors").read_bytes() for path in (output, whole[0])]
    assert exports[0] == exports[1]


@pytest.mark.slow
def test_the_time_limit_costs_nothing(box: Box, root: Path) -> None:
    # Limits are whole minutes, and the signal comes up to a minute early: steps long enough for several starts.
    output, long = root / "limited", (*PAIR, "train.steps=100", "train.global_batch_size=128", "train.eval_interval=50")
    often = ("launch.time_min=1", "launch.signal_s=15", "launch.max_requeues=100")
    code, printed, err = finish(start(box, output, *long, *often), 1800)
    assert (code, err) == (0, ""), printed
    assert "start 2" in printed
    code, printed, err = finish(start(box, root / "unlimited", *long))
    assert (code, err) == (0, ""), printed
    assert records(output) == records(root / "unlimited")
    exports = [(path / "hf/model.safetensors").read_bytes() for path in (output, root / "unlimited")]
    assert exports[0] == exports[1]


@pytest.mark.slow
def test_a_cancelled_job_is_saved_and_not_requeued(box: Box, root: Path) -> None:
    output = root / "cancelled"
    process = start(box, output, *PAIR, "train.steps=5000")
    wait_until(lambda: len(records(output)) >= 3, "the third step")
    job = json.loads((output / "slurm/submitted.json").read_text())["job_id"]
    box.run("scancel", job)
    code, _, err = finish(process)
    assert (code, state(box, job)) == (1, "CANCELLED")
    assert errors(err)[0].startswith(f"error: the job was cancelled; its state is saved; job {job} CANCELLED")
    assert list((output / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_a_lost_node_is_named(box: Box, root: Path) -> None:
    output = root / "lost"
    process = start(box, output, *PAIR, "train.steps=5000", "site.nodelist='n[3-4]'", "launch.max_requeues=0")
    wait_until(lambda: len(records(output)) >= 3, "the third step")
    box.run("scontrol", "update", "nodename=n4", "state=down", "reason=power supply")
    try:
        code, _, err = finish(process)
    finally:
        box.run("scontrol", "update", "nodename=n4", "state=resume")
    assert code == 1
    assert errors(err)[0].startswith("error: n4 is DOWN (power supply); ")


@pytest.mark.slow
def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(box: Box, root: Path) -> None:
    output = root / "moved"
    process = start(box, output, *PAIR, "train.steps=60", "checkpoint.interval=5", "site.exclude=n1")
    wait_until(lambda: len(records(output)) >= 8, "the eighth step")
    box.run("scontrol", "update", "nodename=n2", "state=down", "reason=power supply")
    try:
        code, printed, err = finish(process)
    finally:
        box.run("scontrol", "update", "nodename=n2", "state=resume")
    assert code == 0, err
    assert "start 2" in printed
    assert [record["step"] for record in records(output)] == list(range(1, 61))


@pytest.mark.slow
@pytest.mark.parametrize("spare", [120_000, 0], ids=["some bytes left", "none left"])
def test_a_full_disk_is_the_cause(box: Box, root: Path, spare: int) -> None:
    disk = root / f"disk{spare}"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk of its own needs root and mount")
    try:
        process = start(box, disk / "run", "train.steps=5000", "checkpoint.interval=200", f"data.cache={root}/cache")
        wait_until(lambda: len(records(disk / "run")) >= 3, "the third step")
        fill(disk / "filler", spare)
        code, _, err = finish(process)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert code == 1
    assert "the disk" in errors(err)[-1] or "No space left on device" in errors(err)[-1], err
    assert errors(err)[-1].startswith("error: rank 0")


@pytest.mark.slow
def test_a_chain_goes_on_where_the_job_before_it_ended(box: Box, root: Path) -> None:
    output, long = root / "chain", (*PAIR, "train.steps=40", "launch.max_requeues=0")
    first = submitted(box, output, *long)
    wait_until(lambda: len(records(output)) >= 3, "the third step")
    second = submitted(box, output, *long, f"launch.dependency=afterany:{first}")
    assert box.jobs()[second] == "PENDING"
    box.run("scancel", "--signal=USR1", first)
    wait_until(lambda: not box.jobs(), "the end of both jobs")
    assert (state(box, first), state(box, second)) == ("FAILED", "COMPLETED")
    assert [record["step"] for record in records(output)] == list(range(1, 41))


@pytest.mark.slow
def test_leaving_the_client_leaves_the_job(box: Box, root: Path) -> None:
    output = root / "left"
    process = start(box, output, "train.steps=5000")
    wait_until(lambda: len(records(output)) >= 3, "the third step")
    process.send_signal(signal.SIGINT)
    code, printed, _ = finish(process)
    job = json.loads((output / "slurm/submitted.json").read_text())["job_id"]
    assert code == 130
    assert f"job {job} goes on" in printed
    assert box.jobs()[job] == "RUNNING"
    box.run("scancel", job)
    wait_until(lambda: job not in box.jobs(), "the end of the job")


def fill(path: Path, spare: int) -> None:
    """Use up the disk but for `spare` bytes."""
    stat = os.statvfs(path.parent)
    size = stat.f_bavail * stat.f_frsize - spare
    path.write_bytes(bytes(size))
