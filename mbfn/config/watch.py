"""What the groups that watch a run need of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mbfn.errors import require

if TYPE_CHECKING:
    from mbfn.config.run import RunConfig


def watch_problems(run: RunConfig) -> list[tuple[str, str]]:
    """Why `checkpoint`, `profile` and `launch` cannot do what they say in this run; empty when they can."""
    problems: list[tuple[str, str]] = []
    every, resume = run.checkpoint.interval, run.checkpoint.resume
    again = run.launch.max_restarts
    text = f"{again} needs checkpoints to go back to; set checkpoint.interval above 0"
    require(every > 0 or not again, "launch.max_restarts", text, problems)
    text = f"{again} starts the run again from its checkpoint; set checkpoint.resume=auto"
    require(resume == "auto" or not again, "launch.max_restarts", text, problems)
    if run.checkpoint.keep_best:
        evaluated = run.train.eval_interval
        judged = every > 0 and evaluated > 0 and every % evaluated == 0
        text = f"needs a held-out loss at each checkpoint; set checkpoint.interval={every} to a multiple of "
        require(judged, "checkpoint.keep_best", f"{text}train.eval_interval={evaluated}, above 0", problems)
    if run.profile.kind != "none":
        problems += _profile_problems(run)
    return problems


def _profile_problems(run: RunConfig) -> list[tuple[str, str]]:
    problems: list[tuple[str, str]] = []
    last, ranks = run.profile.last, run.parallel.world_size
    text = f"steps {run.profile.start} to {last} are beyond train.steps={run.train.steps}; choose earlier ones"
    require(last <= run.train.steps, "profile.start", text, problems)
    far = max(run.profile.ranks)
    require(
        far < ranks, "profile.ranks", f"{far} is not among the {ranks} ranks of the layout, 0 to {ranks - 1}", problems
    )
    device = run.launch.device == "cpu" and run.profile.kind != "torch"
    text = f"{run.profile.kind} records CUDA, this run is on launch.device=cpu; profile=torch runs there"
    require(not device, "profile.kind", text, problems)
    return problems
