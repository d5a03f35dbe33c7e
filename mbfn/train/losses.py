"""The loss of a run as a value: of its configuration, of a teacher, or a user's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from mbfn.config.groups import experiments_dir
from mbfn.config.loss import DistillLoss, FunctionLoss, TokenLoss
from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig, pipeline_layers
from mbfn.config.peft import PeftConfig
from mbfn.config.run import RunConfig
from mbfn.config.train import InitConfig
from mbfn.errors import ConfigError, require
from mbfn.families import model_from_hf
from mbfn.megatron import Distillation, Frozen, Loss, World, distillation, open_frozen
from mbfn.train.export import initial_weights


def make_loss(run: RunConfig, world: World) -> Loss:
    """What `run.loss` names, on the ranks of `world`. Collective.

    Raises: ConfigError for a teacher that does not fit the model, or a function that is not there.
    """
    match run.loss:
        case DistillLoss():
            return _distill(run, run.loss, world)
        case FunctionLoss():
            return _own(run, run.loss, world)
        case _:
            return Loss()


def open_hf_model(run: RunConfig, world: World, directory: str) -> Frozen:
    """The model of a Hugging Face directory, cut as the run is, without gradients. Collective.

    Raises: ConfigError for a model that cannot be cut so.
    """
    source = Path(directory).expanduser()
    divisor = run.model.make_vocab_size_divisible_by
    model = replace(model_from_hf(source), make_vocab_size_divisible_by=divisor)
    try:
        looked_at = replace(run, model=model, init=InitConfig(hf=str(source)), loss=TokenLoss(), peft=PeftConfig())
    except ConfigError as error:
        raise ConfigError([(f"{source}: {field}", text) for field, text in error.problems]) from error
    return open_frozen(looked_at, world, initial_weights(looked_at, world))


def _distill(run: RunConfig, loss: DistillLoss, world: World) -> Loss:
    teacher = model_from_hf(Path(loss.teacher).expanduser())
    if problems := teacher_problems(run.model, teacher, run.parallel, loss.layer_pairs):
        raise ConfigError(problems)
    settings = Distillation(
        temperature=loss.temperature,
        top_k=loss.top_k,
        token_share=loss.token_share,
        hidden_layers=loss.layer_pairs,
        hidden_weight=loss.hidden_weight,
    )
    return distillation(settings, open_hf_model(run, world, loss.teacher), vocab_size=run.model.vocab_size)


def teacher_problems(
    model: ModelConfig, teacher: ModelConfig, parallel: ParallelConfig, pairs: tuple[tuple[int, int], ...]
) -> list[tuple[str, str]]:
    """Why `model` cannot learn from `teacher`; empty when it can."""
    problems: list[tuple[str, str]] = []
    sizes = (teacher.vocab_size, model.vocab_size)
    text = f"has {sizes[0]} tokens, the model {sizes[1]}; choose a teacher with the same tokenizer"
    require(sizes[0] == sizes[1], "loss.teacher", text, problems)
    if not pairs:
        return problems
    text = f"layers are {teacher.hidden_size} wide, the model's {model.hidden_size}; leave out loss.hidden_layers"
    require(teacher.hidden_size == model.hidden_size, "loss.teacher", text, problems)
    last = max(layer for _, layer in pairs)
    text = f"expected numbers from 0 to {teacher.num_layers - 1}, got {last}"
    require(last < teacher.num_layers, "loss.teacher_layers", text, problems)
    if problems:
        return problems
    own, other = _places(model, parallel), _places(teacher, parallel)
    for layer, taught in pairs:
        text = f"layer {layer} and the teacher's {taught} are on different pipeline stages; pair those of one"
        require(own[layer] == other[taught], "loss.hidden_layers", text, problems)
    return problems


def _places(model: ModelConfig, parallel: ParallelConfig) -> dict[int, tuple[int, int]]:
    """The stage and chunk of each layer."""
    stages = pipeline_layers(model.num_layers, parallel)
    return {i: (s, c) for s, chunks in enumerate(stages) for c, layers in enumerate(chunks) for i in layers}


def _own(run: RunConfig, loss: FunctionLoss, world: World) -> Loss:
    file, _, name = loss.path.rpartition(":")
    function: Callable[..., Loss] | None = getattr(_module(Path(file).expanduser()), name, None)
    if function is None:
        raise ConfigError([("loss.path", f"{file} has no {name}")])
    made = function(run, world, **loss.arguments)
    if not isinstance(made, Loss):
        raise ConfigError([("loss.path", f"{name} gave {type(made).__name__}, expected an mbfn.megatron.Loss")])
    return made


def _module(file: Path) -> ModuleType:
    ours = experiments_dir() / file
    file = ours if ours.is_file() and not file.is_file() else file
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ConfigError([("loss.path", f"{file}: expected a Python file")])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
