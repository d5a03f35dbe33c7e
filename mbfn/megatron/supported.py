"""What of a model's config the Megatron side does not compute: refused, never left out in silence."""

from __future__ import annotations

from mbfn.config.model import ModelConfig
from mbfn.errors import LaunchError


def check_supported(model: ModelConfig) -> None:
    """Refuse a model that the modules here would compute wrongly.

    Raises: LaunchError naming the field.
    """
    for field, refused, why in _limits(model):
        if refused:
            raise LaunchError(f"model.{field}: family {model.family} converts but does not train so: {why}")


def _limits(model: ModelConfig) -> tuple[tuple[str, bool, str], ...]:
    scaling, moe, latent = model.rope_scaling, model.moe, model.mla is not None
    kind = scaling.rope_type
    one = moe is not None and moe.moe_router_topk == 1 and moe.moe_router_score_function == "softmax"
    return (
        (
            "rope_scaling.rope_type",
            latent and kind not in ("default", "yarn"),
            f"latent attention has no {kind} positions; expected default or yarn",
        ),
        (
            "rope_scaling.truncate",
            latent and kind == "yarn" and not scaling.truncate,
            "latent attention rounds yarn's range to whole channels; expected true",
        ),
        (
            "moe.moe_router_topk",
            one and moe is not None and not moe.moe_router_pre_softmax,
            "a softmax over the one chosen expert is always 1; expected moe_router_pre_softmax=true, or more experts",
        ),
        (
            "mtp_num_layers",
            model.mtp_num_layers > 0 and model.share_embeddings_and_output_weights,
            "further tokens need an output layer of their own; expected share_embeddings_and_output_weights=false",
        ),
        (
            "rotary_interleaved",
            model.rotary_interleaved and not latent,
            "pairs of neighbours turn in latent attention only; expected false",
        ),
    )
