"""Batch scripts are functions of the configuration, and a submitted job is the run that was composed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbfn.config import CheckpointConfig, LaunchConfig, ParallelConfig, RunConfig, SiteConfig
from mbfn.config.compose import compose
from mbfn.errors import ConfigError, LaunchError
from mbfn.launch.slurm import frozen_job
from mbfn.launch.slurm_files import job_from_text, job_text, read_job, write_job
from mbfn.launch.slurm_queue import parse_job
from mbfn.launch.slurm_script import Batch, Entry, batch_script, nodes_of
from mbfn.train.job import Job
from tests.data.runs import make_run


def run(*, device: str = "auto", dp: int = 1, **site: object) -> RunConfig:
    base = make_run(Path("cache"), global_batch_size=192)
    launch = LaunchConfig(kind="slurm", device=device)  # type: ignore[arg-type]
    parallel = ParallelConfig(dp=dp)
    return replace(base, launch=launch, parallel=parallel, site=SiteConfig(**site))  # type: ignore[arg-type]


def script(config: RunConfig, *runs: str, parallel_runs: int = 0) -> str:
    entries = tuple(Entry(output_dir=Path(run), job_file=Path(run) / "slurm/job_0.json") for run in runs)
    log = Path("/lustre/logs/%j.log")
    python = config.site.python or "/venv/bin/python"
    return batch_script(
        Batch(run=config, entries=entries, log=log, cwd=Path("/lustre/me"), python=python, parallel_runs=parallel_runs)
    )


@pytest.mark.parametrize(
    ("dp", "site", "device", "expected"),
    [
        (32, {}, "auto", (4, 8, 8)),
        (4, {}, "cuda", (1, 4, 4)),
        (12, {"gpus_per_node": 4}, "auto", (3, 4, 4)),
        (4, {"gpus_per_node": 0, "cpu_ranks_per_node": 2}, "auto", (2, 2, 0)),
        (3, {}, "cpu", (3, 1, 0)),
    ],
)
def test_nodes_follow_from_the_layout(
    dp: int, site: dict[str, int], device: str, expected: tuple[int, int, int]
) -> None:
    nodes = nodes_of(run(dp=dp, device=device, **site))
    assert (nodes.nodes, nodes.ranks_per_node, nodes.gpus_per_node) == expected


def test_layouts_that_do_not_fit_the_nodes() -> None:
    with pytest.raises(LaunchError) as uneven:
        nodes_of(run(dp=12))
    assert str(uneven.value) == (
        "parallel: 12 ranks do not fill nodes of 8; use a multiple of 8 (parallel.dp), or site.gpus_per_node=6"
    )
    with pytest.raises(LaunchError) as no_gpus:
        nodes_of(run(device="cuda", gpus_per_node=0))
    assert str(no_gpus.value).startswith("site.gpus_per_node: launch.device=cuda needs GPUs")


@pytest.mark.parametrize("site", ["modules", "pyxis", "cloud"])
def test_the_worked_examples(site: str, golden: Callable[[str], Callable[[str], None]]) -> None:
    fields = ("model=llama31_70b", "parallel=tp8pp4", "precision=fp8", "train.micro_batch_size=1", "launch=slurm")
    config = compose(*fields, f"site={site}")
    golden(f"slurm/{site}.sh")(script(config, "/lustre/me/runs/70b"))


def test_every_line_of_a_script_is_shell(tmp_path: Path) -> None:
    config = run(setup=("module() { return 0; }", "module load 'a b'"), environment=("A=$HOME and 'more'",))
    text = script(config, "/lustre/me/a b", "/lustre/me/$c", parallel_runs=2)
    path = tmp_path / "script"
    path.write_text(text)
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, check=False).stderr == b""
    assert "#SBATCH --array=0-1%2\n" in text
    places = "\n".join(line for line in text.splitlines() if line.startswith(("runs=", "run=", "export 'A")))
    shown = subprocess.run(
        ["bash", "-c", f'SLURM_ARRAY_TASK_ID=1\n{places}\necho "$run" "${{runs[0]}}" "$A"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "/lustre/me/$c /lustre/me/a b $HOME and 'more'\n"


def test_a_container_has_to_see_the_results() -> None:
    config = run(container_image="x.sqsh", container_mounts=("/data:/data", "/lustre/me:/home/me"), python="python")
    with pytest.raises(LaunchError) as hidden:
        script(config, "/lustre/me/run")
    assert str(hidden.value) == (
        "site.container_mounts: /lustre/me is not mounted at the same path in x.sqsh; add /lustre/me:/lustre/me"
    )


def test_a_site_is_checked_when_it_is_made() -> None:
    with pytest.raises(ConfigError) as caught:
        SiteConfig(gpus_per_node=-1, environment=("NCCL",), sbatch_args=("mail",), container_mounts=("/data",))
    assert [path for path, _ in caught.value.problems] == [
        "gpus_per_node",
        "sbatch_args",
        "environment",
        "container_mounts",
    ]
    with pytest.raises(ConfigError, match="180 s leave nothing of time_min=3"):
        LaunchConfig(time_min=3, signal_s=180)


@given(
    lr=st.floats(1e-12, 1e3),
    seed=st.integers(0, 2**31),
    lines=st.lists(st.text(max_size=20), max_size=3),
    command=st.lists(st.text(max_size=20), max_size=3),
)
def test_a_submitted_job_is_the_composed_run(lr: float, seed: int, lines: list[str], command: list[str]) -> None:
    base = run(setup=tuple(lines))
    config = replace(base, optim=replace(base.optim, lr=lr), train=replace(base.train, seed=seed))
    job = Job(run=config, output_dir=Path("/runs/a"), command=tuple(command))
    assert job_from_text(job_text(job)) == job


def test_what_was_submitted_cannot_be_changed(tmp_path: Path) -> None:
    job = Job(run=run(), output_dir=tmp_path)
    path = write_job(job)
    assert read_job(path) == job
    path.write_text(path.read_text().replace('"seed": 1234', '"seed": 7'))
    with pytest.raises(LaunchError, match=r"job_\w+\.json: was changed after it was submitted"):
        read_job(path)
    path.unlink()
    with pytest.raises(LaunchError, match="cannot be read"):
        read_job(path)


def test_a_dry_run_is_of_the_same_job() -> None:
    plain = Job(run=run(), output_dir=Path("/runs/a"), command=("python", "-m", "mbfn.train", "launch=slurm"))
    dry = Job(
        run=replace(plain.run, launch=replace(plain.run.launch, dry_run=True, detach=True)),
        output_dir=plain.output_dir,
        command=(*plain.command, "launch.dry_run=true", "launch.detach=true"),
    )
    assert frozen_job(dry) == frozen_job(plain)


def test_a_job_that_may_start_again_has_to_resume() -> None:
    config = replace(run(), checkpoint=CheckpointConfig(resume="never"))
    with pytest.raises(LaunchError, match=r"checkpoint\.resume: never, but launch\.max_requeues=20"):
        frozen_job(Job(run=config, output_dir=Path("/runs/a")))
    once = replace(config, launch=replace(config.launch, max_requeues=0))
    frozen_job(Job(run=once, output_dir=Path("/runs/a")))


def test_the_digest_names_what_is_computed() -> None:
    here = run()
    assert here.digest == replace(here, site=SiteConfig(partition="gpu"), launch=LaunchConfig(kind="local")).digest
    assert here.digest != replace(here, launch=LaunchConfig(device="cpu")).digest
    assert here.digest != replace(here, optim=replace(here.optim, lr=1.0)).digest


def test_states_of_an_array() -> None:
    waiting = (
        "JobId=12 ArrayJobId=12 ArrayTaskId=1-2,5%2 JobName=my job UserId=me(1) JobState=PENDING "
        "Reason=Resources Dependency=(null) Restarts=0 ExitCode=0:0 NodeList= Comment=rank 0: no space left on /runs"
    )
    states = parse_job(waiting)
    assert [state.job_id for state in states] == ["12_1", "12_2", "12_5"]
    assert (states[0].state, states[0].reason, states[0].over) == ("PENDING", "Resources", False)
    assert states[0].comment == "rank 0: no space left on /runs"
    (failed,) = parse_job("JobId=14 ArrayJobId=12 ArrayTaskId=0 JobState=FAILED Reason=None ExitCode=3:0 Restarts=2")
    assert (failed.job_id, failed.raw_id, failed.over, failed.restarts) == ("12_0", "14", True, 2)
