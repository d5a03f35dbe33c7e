"""Where the model and its tokenizer are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbfn.config.layout import layout_problems
from mbfn.config.model import ModelConfig
from mbfn.errors import CheckpointError, ConfigError, DataError
from mbfn.families import model_from_hf
from mbfn.generate.options import GenerateConfig
from mbfn.storage.described import checkpoint_model
from mbfn.storage.torch_dist_write import HF_FOLDER
from mbfn.train.checkpoints import DIRECTORY, complete_checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model on disk: in a Hugging Face directory, perhaps with an adapter, or in a checkpoint."""

    model: ModelConfig
    tokenizer: Path
    hf: Path | None = None
    adapter: Path | None = None
    checkpoint: Path | None = None


def find_source(config: GenerateConfig) -> Source:
    """What `config` names, before any weight is read.

    Raises: ConfigError for a model that the layout cannot hold; CheckpointError or DataError for what is not there.
    """
    source = _source(config)
    if problems := layout_problems(source.model, config.parallel):
        raise ConfigError(problems)
    return source


def _source(config: GenerateConfig) -> Source:
    if config.hf is not None:
        hf = Path(config.hf).expanduser()
        adapter = None if config.adapter is None else Path(config.adapter).expanduser()
        return Source(model=model_from_hf(hf), tokenizer=_tokenizer(config, [hf]), hf=hf, adapter=adapter)
    if config.run is not None:
        return _of_run(config, Path(config.run).expanduser())
    checkpoint = Path(str(config.megatron)).expanduser()
    named = None if config.config is None else Path(config.config).expanduser()
    model = checkpoint_model(checkpoint) if named is None else model_from_hf(named)
    beside = [checkpoint / HF_FOLDER, *([named] if named else []), checkpoint.parent.parent / HF_FOLDER]
    return Source(model=model, tokenizer=_tokenizer(config, beside), checkpoint=checkpoint)


def _of_run(config: GenerateConfig, run: Path) -> Source:
    """The last checkpoint of a run; what it exported, where it kept none or trained an adapter."""
    settings = _settings(run)
    base = settings.get("init", {}).get("hf")
    places = [run / HF_FOLDER, settings.get("data", {}).get("tokenizer"), base]
    tokenizer = _tokenizer(config, [Path(place).expanduser() for place in places if place])
    if settings.get("peft", {}).get("kind", "none") != "none":
        hf = Path(base).expanduser()
        return Source(model=model_from_hf(hf), tokenizer=tokenizer, hf=hf, adapter=run / "adapter")
    if found := complete_checkpoints(run / DIRECTORY):
        return Source(model=checkpoint_model(found[-1]), tokenizer=tokenizer, checkpoint=found[-1])
    hf = run / HF_FOLDER
    if not (hf / "config.json").is_file():
        raise CheckpointError(f"{run}: expected a run with a checkpoint or an export, found neither")
    return Source(model=model_from_hf(hf), tokenizer=tokenizer, hf=hf)


def _settings(run: Path) -> dict[str, Any]:
    import yaml

    try:
        return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{run}: expected the directory of a run, with its config.yaml: {error.strerror}"
        ) from error


def _tokenizer(config: GenerateConfig, places: list[Path]) -> Path:
    if config.tokenizer is not None:
        places = [Path(config.tokenizer).expanduser()]
    for place in places:
        if (place / "tokenizer.json").is_file():
            return place
    where = ", ".join(map(str, places))
    raise DataError(f"tokenizer: no tokenizer.json in {where}; give tokenizer=DIR")


def open_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers reads it.

    Raises: DataError for one that it cannot read.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever a tokenizer's own class raises
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise DataError(f"tokenizer: transformers cannot read {directory}: {reason}") from error


def encoded(tokenizer: PreTrainedTokenizerBase, config: GenerateConfig) -> list[int]:
    """The prompt as tokens, in the chat template if asked for.

    Raises: DataError for a tokenizer without one, or a prompt that it makes nothing of.
    """
    if not config.chat:
        ids = tokenizer(config.prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise DataError("chat: the tokenizer has no chat template; set chat=false or give tokenizer=DIR with one")
    else:
        turns = [{"role": "system", "content": config.system}] if config.system else []
        turns.append({"role": "user", "content": config.prompt})
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    if not ids:
        raise DataError(f"prompt: the tokenizer makes no token of {config.prompt!r}; give some text")
    return list(ids)


def end_tokens(source: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a text: the model's, the tokenizer's, and those of generation_config.json."""
    import json

    found = {*source.model.eos_token_id, tokenizer.eos_token_id}
    for place in filter(None, (source.hf, source.tokenizer)):
        file = place / "generation_config.json"
        named = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        found |= set(named) if isinstance(named, list) else {named}
    return tuple(sorted(token for token in found if token is not None))
