"""What a run minimises: the `loss` group, one dataclass a kind of loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mbfn.errors import ConfigError, require

if TYPE_CHECKING:
    from mbfn.config.run import RunConfig

Problems = list[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """The cross entropy of the next tokens; the data say which count, and how much each."""

    kind: Literal["token"] = "token"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillLoss:
    """The model learns from a teacher of the same vocabulary, which is cut over the ranks as it is.

    A token's loss is (1 - token_share) * temperature^2 * KL(teacher || model) + token_share * its cross entropy, and
    hidden_weight times the mean squared distance of each pair of layers.
    """

    kind: Literal["distill"] = "distill"
    teacher: str  # a Hugging Face directory
    temperature: float = 1.0  # divides the scores of both; above 1 the teacher's unlikely tokens count for more
    top_k: int = 0  # best tokens of the teacher that count, little to keep with pipeline stages; 0: all
    token_share: float = 0.0  # of the labels' cross entropy in the loss, from 0 to 1
    hidden_layers: tuple[int, ...] = ()  # decoder layers, from 0, whose outputs are to be like the teacher's
    teacher_layers: tuple[int, ...] = ()  # its layers that they are paired with; empty: the same numbers
    hidden_weight: float = 1.0

    def __post_init__(self) -> None:
        problems: Problems = []
        require(self.temperature > 0, "temperature", f"expected more than 0, got {self.temperature}", problems)
        require(self.top_k >= 0, "top_k", f"expected at least 0, got {self.top_k}", problems)
        share = self.token_share
        require(0 <= share <= 1, "token_share", f"expected from 0 to 1, got {share}", problems)
        require(self.hidden_weight > 0, "hidden_weight", f"expected more than 0, got {self.hidden_weight}", problems)
        own, other = len(self.hidden_layers), len(self.teacher_layers)
        text = f"expected {own}, one for each of hidden_layers, or none; got {other}"
        require(other in (0, own), "teacher_layers", text, problems)
        once = len(set(self.hidden_layers)) == own
        require(once, "hidden_layers", f"a layer twice: {list(self.hidden_layers)}", problems)
        require(min(self.teacher_layers, default=0) >= 0, "teacher_layers", "expected numbers from 0", problems)
        if problems:
            raise ConfigError(problems)

    @property
    def layer_pairs(self) -> tuple[tuple[int, int], ...]:
        """Each layer with the teacher's."""
        return tuple(zip(self.hidden_layers, self.teacher_layers or self.hidden_layers, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionLoss:
    """A loss of your own: a function of Python that gives one for the run on the ranks it runs on."""

    kind: Literal["function"] = "function"
    path: str  # FILE.py:NAME, a file here or in experiments/; NAME(run, world, **settings) gives an mbfn.megatron.Loss
    settings: tuple[str, ...] = ()  # further arguments, numbers: [beta:0.1]

    def __post_init__(self) -> None:
        problems: Problems = []
        file, _, name = self.path.rpartition(":")
        require(bool(file) and name.isidentifier(), "path", f"expected FILE.py:NAME, got {self.path!r}", problems)
        for setting in self.settings:
            key, _, value = setting.partition(":")
            good = key.isidentifier() and _is_number(value)
            require(good, "settings", f"expected NAME:NUMBER, got {setting!r}", problems)
        if problems:
            raise ConfigError(problems)

    @property
    def arguments(self) -> dict[str, float]:
        """The settings by their names."""
        pairs = (setting.partition(":") for setting in self.settings)
        return {key: float(value) for key, _, value in pairs}


LossConfig = TokenLoss | DistillLoss | FunctionLoss


def loss_problems(run: RunConfig) -> Problems:
    """Why the loss cannot be what `run.loss` says; empty when it can."""
    problems: Problems = []
    loss, layers, further = run.loss, run.model.num_layers, run.model.mtp_num_layers
    if not isinstance(loss, DistillLoss):
        return problems
    text = f"{further}: layers for further tokens learn from labels alone, not with loss=distill; set it to 0"
    require(not further, "model.mtp_num_layers", text, problems)
    held = all(0 <= layer < layers for layer in loss.hidden_layers)
    text = f"expected numbers from 0 to {layers - 1}, got {list(loss.hidden_layers)}"
    require(held, "loss.hidden_layers", text, problems)
    text = "layers that are made again in the backward pass are not compared; set train.recompute=none or selective"
    require(not loss.hidden_layers or run.train.recompute != "full", "train.recompute", text, problems)
    text = "recorded layers are not compared with the teacher's; set train.cuda_graph_impl=none"
    require(not loss.hidden_layers or run.train.cuda_graph_impl == "none", "train.cuda_graph_impl", text, problems)
    return problems


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
