"""`python -m mbfn.verify`: that a conversion is right. Bits against bits, and logits against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mbfn.config.compose import RunContext, hydra_main
from mbfn.config.parallel import ParallelConfig
from mbfn.errors import ConfigError, ConversionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from mbfn.config.model import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyConfig:
    """What to verify. `hf` alone: the round trip through every rank of `parallel`; with `megatron`: that checkpoint."""

    hf: str
    megatron: str | None = None
    parallel: ParallelConfig = ParallelConfig()
    logits: bool = False  # run both models in fp32 on the CPU; needs memory for both
    tokens: int = 64  # length of the sequence that both read
    tolerance: float = 1e-4  # largest difference of two logits

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError([("tokens", f"expected at least 1, got {self.tokens}")])


def verify(config: VerifyConfig, context: RunContext) -> None:
    """Print what is equal.

    Raises: ConversionError naming the tensors, or the logits, that are not.
    """
    del context
    hf_dir = Path(config.hf).expanduser()
    checkpoint = Path(config.megatron).expanduser() if config.megatron else None
    _verify_weights(hf_dir, checkpoint, config.parallel)
    if config.logits:
        _verify_logits(hf_dir, checkpoint, config)


def _verify_weights(hf_dir: Path, checkpoint: Path | None, parallel: ParallelConfig) -> None:
    from mbfn.convert.plans import Layout
    from mbfn.convert.states import check_hf
    from mbfn.convert.table import table_of
    from mbfn.families import model_from_hf
    from mbfn.storage import open_hf, open_torch_dist
    from mbfn.storage.compare import compare_checkpoint, compare_round_trip
    from mbfn.storage.described import checkpoint_table

    model = model_from_hf(hf_dir)
    with open_hf(hf_dir) as hf:
        table = table_of(model, parallel)
        check_hf(table, hf, str(hf_dir))
        if checkpoint is None:
            found = list(compare_round_trip(hf, table, Layout(parallel=parallel)))
            where = f"after the round trip over {parallel.world_size} ranks"
        else:
            with open_torch_dist(checkpoint) as stored:
                found = list(compare_checkpoint(hf, stored, checkpoint_table(model, stored)))
            where = f"in {checkpoint}"
        differences = [str(difference) for difference in found if difference is not None]
        if differences:
            rest = [f"... and {len(differences) - 8} more"] if len(differences) > 8 else []
            raise ConversionError("\n".join(f"{where}: {line}" for line in [*differences[:8], *rest]))
        print(f"weights: {len(found)} tensors, {hf.nbytes / 1e9:.2f} GB, bitwise equal {where}")


def _verify_logits(hf_dir: Path, checkpoint: Path | None, config: VerifyConfig) -> None:
    """One random sequence through both models in fp32."""
    import torch
    import transformers

    from mbfn.families import model_from_hf

    model = model_from_hf(hf_dir)
    length = min(config.tokens, model.max_position_embeddings)
    tokens = torch.randint(model.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    transformers.logging.disable_progress_bar()
    reference = transformers.AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(tokens).logits
    del reference
    with _weights_fp32(hf_dir, checkpoint, model) as weights:
        found = megatron_logits(model, weights, tokens)
    difference = float((found - expected).abs().max())
    agree = int((found.argmax(-1) == expected.argmax(-1)).sum())
    line = f"logits: {length} tokens, largest difference {difference:.1e}, the same next token at {agree} of {length}"
    if not difference <= config.tolerance:
        raise ConversionError(f"{line}; expected at most {config.tolerance:.1e}")
    print(f"{line} (fp32; transformers {transformers.__version__})")


@contextmanager
def _weights_fp32(hf_dir: Path, checkpoint: Path | None, model: ModelConfig) -> Iterator[Mapping[str, Tensor]]:
    """Hugging Face tensors in fp32, from the checkpoint where there is one."""
    from mbfn.convert.plans import checkpoint_hf_plans
    from mbfn.convert.states import PlannedState
    from mbfn.storage import open_hf, open_torch_dist
    from mbfn.storage.described import checkpoint_table

    if checkpoint is None:
        with open_hf(hf_dir) as hf:
            yield {name: hf[name].float() for name in hf}
        return
    with open_torch_dist(checkpoint) as stored:
        plans = {plan.name: plan for plan in checkpoint_hf_plans(checkpoint_table(model, stored))}
        state = PlannedState(plans, stored)
        yield {name: state[name].float() for name in state}


def megatron_logits(model: ModelConfig, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of the Megatron model with these Hugging Face tensors, one process on the CPU.

    Shapes: tokens (B, S) -> (B, S, V)
    """
    from mbfn import megatron
    from mbfn.config.run import RunConfig
    from mbfn.config.train import TrainConfig
    from mbfn.convert import to_megatron

    train = TrainConfig(global_batch_size=1, micro_batch_size=1, seq_length=tokens.shape[1])
    run = RunConfig(model=replace(model, params_dtype="fp32"), train=train)
    with megatron.open_world(run.parallel, device="cpu") as world:
        chunks = megatron.build_model(run, world, to_megatron(weights, run.model, parallel=run.parallel))
        return megatron.logits(world, chunks, tokens)


if __name__ == "__main__":
    hydra_main(verify, root=VerifyConfig, config_name="verify", outputs=False)
