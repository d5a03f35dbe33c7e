"""RunConfig: everything that defines a training run, validated across groups when it is made."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from mbfn.config.data import DataConfig
from mbfn.config.guard import GuardConfig
from mbfn.config.model import ModelConfig
from mbfn.config.optim import OptimConfig, ScheduleConfig
from mbfn.config.parallel import ParallelConfig, pipeline_layers
from mbfn.config.peft import PeftConfig
from mbfn.config.precision import PrecisionConfig
from mbfn.config.profile import ProfileConfig
from mbfn.config.site import SiteConfig
from mbfn.config.train import CheckpointConfig, InitConfig, LaunchConfig, LogConfig, TrainConfig
from mbfn.config.watch import watch_problems
from mbfn.errors import ConfigError, require


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run. Frozen and hashable; two equal configs give the same run."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    peft: PeftConfig = PeftConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()
    launch: LaunchConfig = LaunchConfig()
    site: SiteConfig = SiteConfig()
    train: TrainConfig = TrainConfig()
    init: InitConfig = InitConfig()

    def __post_init__(self) -> None:
        problems = [*layout_problems(self.model, self.parallel), *_batch_problems(self), *_schedule_problems(self)]
        problems += watch_problems(self)
        if problems:
            raise ConfigError(problems)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that each data-parallel replica accumulates in a step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.parallel.data_parallel_size)

    @property
    def digest(self) -> str:
        """A name for the run: 16 hex digits of the SHA-256 of everything but how and on which cluster it starts."""
        what = {name: value for name, value in asdict(self).items() if name not in ("launch", "site")}
        text = json.dumps(what | {"device": self.launch.device}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def layout_problems(model: ModelConfig, parallel: ParallelConfig) -> list[tuple[str, str]]:
    """Why `model` cannot be cut as `parallel` says; empty when it can."""
    problems: list[tuple[str, str]] = []
    tp = parallel.tp
    groups = model.num_query_groups
    require(
        model.num_attention_heads % tp == 0,
        "parallel.tp",
        f"num_attention_heads={model.num_attention_heads} does not divide by tp={tp}: "
        f"{_fits(model.num_attention_heads)}",
        problems,
    )
    require(
        groups % tp == 0 or tp % groups == 0,
        "parallel.tp",
        f"tp={tp} is neither a divisor nor a multiple of num_query_groups={groups}",
        problems,
    )
    require(
        model.ffn_hidden_size % tp == 0,
        "parallel.tp",
        f"ffn_hidden_size={model.ffn_hidden_size} does not divide by tp={tp}: {_fits(model.ffn_hidden_size)}",
        problems,
    )
    require(
        groups % tp == 0 or not model.qk_layernorm_full,
        "parallel.tp",
        f"num_query_groups={groups} does not divide by tp={tp}, and keys are normed over all heads: {_fits(groups)}",
        problems,
    )
    problems += _expert_problems(model, parallel)
    try:
        pipeline_layers(model.num_layers, parallel)
    except ConfigError as error:
        problems.extend(error.problems)
    return problems


def _expert_problems(model: ModelConfig, parallel: ParallelConfig) -> list[tuple[str, str]]:
    problems: list[tuple[str, str]] = []
    ep, etp, moe = parallel.ep, parallel.etp, model.moe
    if moe is None:
        require(ep == 1, "parallel.ep", f"ep={ep} needs a model with experts; set ep=1", problems)
        require(etp == 1, "parallel.etp", f"etp={etp} needs a model with experts; set etp=1", problems)
        return problems
    sizes = (
        ("ep", ep, "num_moe_experts", moe.num_moe_experts),
        ("etp", etp, "moe_ffn_hidden_size", moe.moe_ffn_hidden_size),
        ("tp", parallel.tp, "moe_shared_expert_intermediate_size", moe.moe_shared_expert_intermediate_size),
    )
    for name, size, field, whole in sizes:
        text = f"{field}={whole} does not divide by {name}={size}: {_fits(whole)}"
        require(whole % size == 0, f"parallel.{name}", text, problems)
    return problems


def _batch_problems(run: RunConfig) -> list[tuple[str, str]]:
    problems: list[tuple[str, str]] = []
    train, parallel = run.train, run.parallel
    require(
        run.model.moe is None or parallel.tp == 1 or parallel.sequence_parallel,
        "parallel.sequence_parallel",
        f"experts train with tp={parallel.tp} only where the sequence is cut too; set it to true",
        problems,
    )
    per_pass = train.micro_batch_size * parallel.data_parallel_size
    require(
        train.global_batch_size % per_pass == 0,
        "train.global_batch_size",
        f"{train.global_batch_size} does not divide by micro_batch_size * data parallel size = "
        f"{train.micro_batch_size} * {parallel.data_parallel_size}; use a multiple of {per_pass}",
        problems,
    )
    microbatches = train.global_batch_size // per_pass
    require(
        parallel.vpp == 1 or microbatches % parallel.pp == 0,
        "train.global_batch_size",
        f"vpp={parallel.vpp} needs micro-batches in multiples of pp={parallel.pp}, got {microbatches}",
        problems,
    )
    slices = 2 * parallel.cp if parallel.cp > 1 else 1
    slices *= parallel.tp if parallel.sequence_parallel else 1
    require(
        train.seq_length % slices == 0,
        "train.seq_length",
        f"{train.seq_length} does not divide by {slices} (2 * cp where cp > 1, times tp with sequence_parallel)",
        problems,
    )
    require(
        train.seq_length <= run.model.max_position_embeddings,
        "train.seq_length",
        f"{train.seq_length} is beyond model.max_position_embeddings={run.model.max_position_embeddings}",
        problems,
    )
    return problems


def _schedule_problems(run: RunConfig) -> list[tuple[str, str]]:
    problems: list[tuple[str, str]] = []
    total = run.schedule.decay_steps or run.train.steps
    ramp = run.schedule.warmup_steps + run.schedule.wsd_decay_steps
    require(
        ramp <= total,
        "schedule.warmup_steps",
        f"warmup_steps + wsd_decay_steps = {ramp} is longer than the {total} steps of the schedule",
        problems,
    )
    return problems


def _fits(size: int) -> str:
    return f"choose among {[n for n in (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64) if size % n == 0]}"
