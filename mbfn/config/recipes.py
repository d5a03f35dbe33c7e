"""Which FP8 recipes a GPU runs, and which one suits it: pure functions of its compute capability."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from mbfn.config.data import packs_rows
from mbfn.config.precision import Fp8Recipe, PrecisionConfig
from mbfn.errors import LaunchError, require

if TYPE_CHECKING:
    from mbfn.config.run import RunConfig

Capability = tuple[int, int]

# The first compute capability of a recipe, and the first that lacks it again.
# Source: TransformerEngine@transformer_engine/pytorch/quantization.py
_RUNS: Mapping[Fp8Recipe, tuple[Capability, Capability]] = {
    "delayed": ((8, 9), (99, 0)),
    "tensorwise": ((8, 9), (99, 0)),
    "blockwise": ((9, 0), (99, 0)),
    "mxfp8": ((10, 0), (12, 0)),
    "nvfp4": ((10, 0), (99, 0)),
}
# What `auto` takes, from the first that runs, and why.
_BEST: tuple[tuple[Fp8Recipe, str], ...] = (
    ("mxfp8", "the GPU's matrix units apply the scales of its blocks of 32 themselves"),
    ("tensorwise", "1.36 times bf16 on an H200, with scales of the tensors at hand (delayed: 1.38, of earlier steps)"),
)
_UNITS: Mapping[Fp8Recipe, int] = {"mxfp8": 32, "nvfp4": 32}


def recipes_of(capability: Capability) -> tuple[Fp8Recipe, ...]:
    """The recipes that a GPU runs."""
    return tuple(recipe for recipe, (first, end) in _RUNS.items() if first <= capability < end)


def resolved_precision(precision: PrecisionConfig, capability: Capability, device: str) -> tuple[PrecisionConfig, str]:
    """`precision` with its recipe named, and why it is this one; `device` is what messages call the GPU.

    Raises: LaunchError for a recipe that the GPU does not run, with those it does.
    """
    if not precision.quantized:
        return precision, "no FP8 recipe asked for"
    found, shown = recipes_of(capability), ".".join(map(str, capability))
    _check_attention(precision, capability, device)
    if precision.fp8 in found:
        return precision, "as configured"
    for recipe, reason in _BEST if precision.fp8 == "auto" else ():
        if recipe in found:
            return replace(precision, fp8=recipe), f"fp8=auto on {device}: {reason}"
    runs = f"it runs fp8={', '.join(found)} and bf16" if found else "it runs precision=bf16, fp16 and fp32"
    raise LaunchError(f"precision.fp8: {precision.fp8} does not run on {device}, compute capability {shown}; {runs}")


def attention_environment(precision: PrecisionConfig, capability: Capability) -> dict[str, str]:
    """What Transformer Engine reads for the scales of attention in FP8, where they are not those of the recipe.

    Before Blackwell only scales of earlier steps exist there, and linears may keep current ones beside them.
    """
    if precision.fp8_attention == "none" or precision.fp8 != "tensorwise" or capability >= (10, 0):
        return {}
    return {
        "NVTE_DPA_FP8_RECIPE": "DelayedScaling",
        "NVTE_DPA_FP8DS_AMAX_ALGO": "max",
        "NVTE_DPA_FP8DS_AMAX_HISTLEN": str(precision.fp8_amax_history_len),
    }


def precision_problems(run: RunConfig) -> list[tuple[str, str]]:
    """What the number formats need of the model, the layout and the batch."""
    problems: list[tuple[str, str]] = []
    model, parallel, precision, train = run.model, run.parallel, run.precision, run.train
    if not precision.quantized:
        return problems
    unit = _UNITS.get(precision.fp8, 16)
    cuts = parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
    tokens = train.micro_batch_size * train.seq_length // cuts
    text = f"fp8={precision.fp8} takes tokens in multiples of {unit} a rank, got {tokens}; lengthen seq_length"
    require(tokens % unit == 0, "train.seq_length", text, problems)
    text = f"fp8={precision.fp8} takes sizes in multiples of {unit}, got {model.hidden_size}; use precision=bf16"
    require(model.hidden_size % unit == 0, "model.hidden_size", text, problems)
    width = model.ffn_hidden_size // parallel.tp
    text = f"fp8={precision.fp8} takes sizes in multiples of {unit} a rank, got {width}; lower tp or use precision=bf16"
    require(width % unit == 0, "model.ffn_hidden_size", text, problems)
    capped = model.attention_sinks or model.attn_logit_softcapping or model.mla or packs_rows(run.data)
    text = "there is no FP8 kernel for attention with sinks, soft caps, latents or packed rows; set it to none"
    require(precision.fp8_attention == "none" or not capped, "precision.fp8_attention", text, problems)
    tied = model.share_embeddings_and_output_weights
    text = "needs an output layer of its own, this model's is the embedding; set it to false"
    require(not (precision.fp8_output_proj and tied), "precision.fp8_output_proj", text, problems)
    text, cut = f"needs parallel.sharding=zero1, got {parallel.sharding}", parallel.sharding == "zero1"
    require(cut or not precision.fp8_param_gather, "precision.fp8_param_gather", text, problems)
    text = f"is of SwiGLU, this model has {model.activation}; set it to false"
    swiglu = model.activation == "swiglu" or not precision.activation_func_fp8_input_store
    require(swiglu, "precision.activation_func_fp8_input_store", text, problems)
    most = model.num_layers // parallel.pp
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        count = getattr(precision, name)
        require(count <= most, f"precision.{name}", f"a stage has {most} layers, got {count}", problems)
    return problems


def _check_attention(precision: PrecisionConfig, capability: Capability, device: str) -> None:
    if precision.fp8_attention != "none" and capability < (9, 0):
        raise LaunchError(
            f"precision.fp8_attention: {device} has no attention in FP8, which Hopper and later have; set it to none"
        )
