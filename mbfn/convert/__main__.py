"""`python -m mbfn.convert`: between Hugging Face directories and Megatron checkpoints, with no GPU and no Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mbfn.config.compose import RunContext, hydra_main
from mbfn.config.parallel import ParallelConfig
from mbfn.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig:
    """What to convert. Give `hf` or `megatron`; the result is of the other kind."""

    out: str  # directory to write, whole or not at all
    hf: str | None = None  # a Hugging Face directory
    megatron: str | None = None  # a torch_dist checkpoint directory
    config: str | None = None  # for a checkpoint that does not describe its model: where a config.json does
    parallel: ParallelConfig = ParallelConfig()  # the layout whose files a checkpoint gets; any layout can load it
    workers: int = 2  # threads that read and write

    def __post_init__(self) -> None:
        problems = []
        if (self.hf is None) == (self.megatron is None):
            problems.append(("hf", "give one source: hf=DIR or megatron=DIR"))
        if self.config is not None and self.megatron is None:
            problems.append(("config", "describes a Megatron checkpoint: give it with megatron=DIR"))
        if self.workers < 1:
            problems.append(("workers", f"expected at least 1, got {self.workers}"))
        if problems:
            raise ConfigError(problems)


def convert(config: ConvertConfig, context: RunContext) -> None:
    """Carry out one conversion and say what was written."""
    from mbfn.storage.jobs import checkpoint_to_hf, hf_to_checkpoint
    from mbfn.storage.report import progress_of

    del context
    out = _path(config.out)
    source = _path(config.hf or config.megatron or "")
    with progress_of(f"{source.name} -> {out.name}", source) as on_bytes:
        if config.hf:
            done = hf_to_checkpoint(source, out, config.parallel, workers=config.workers, on_bytes=on_bytes)
        else:
            from mbfn.families import model_from_hf

            model = model_from_hf(_path(config.config)) if config.config else None
            done = checkpoint_to_hf(source, out, model=model, workers=config.workers, on_bytes=on_bytes)
    print(f"{out}: {done.tensors} tensors, {done.nbytes / 1e9:.2f} GB")


def _path(text: str) -> Path:
    return Path(text).expanduser()


if __name__ == "__main__":
    hydra_main(convert, root=ConvertConfig, config_name="convert", outputs=False)
