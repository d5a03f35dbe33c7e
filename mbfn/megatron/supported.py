"""What of a model's config the Megatron side computes; the rest is refused, never left out in silence."""

from __future__ import annotations

from mbfn.config.model import ModelConfig
from mbfn.errors import LaunchError

NOT_YET: dict[str, object] = {  # field: the value that every model had before there was the field
}


def check_supported(model: ModelConfig) -> None:
    """Refuse a model that the modules here would compute wrongly.

    Raises: LaunchError naming the fields.
    """
    used = [name for name, neutral in NOT_YET.items() if getattr(model, name) != neutral]
    if used:
        raise LaunchError(
            f"model.{used[0]}: family {model.family} converts but does not train yet: its {', '.join(used)} "
            f"{'is' if len(used) == 1 else 'are'} not built on Megatron"
        )
