"""compose(): groups, users' directories, init.hf, and the message of every mistake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import yaml

from mbfn.config import ModelConfig, RopeScaling, RunConfig, to_yaml
from mbfn.config.build import build
from mbfn.config.compose import compose, compose_as
from mbfn.config.groups import conf_dir, experiments_dir, header
from mbfn.config.precision import Fp8Recipe, PrecisionConfig
from mbfn.config.recipes import resolved_precision
from mbfn.errors import ConfigError, LaunchError

OPTIONS = sorted(
    path.relative_to(conf_dir()).with_suffix("")
    for path in conf_dir().glob("*/*.yaml")
    if path.parent.name != "recipe"  # what recipes include; no group of a command
)
EXPERIMENTS = sorted(path.relative_to(experiments_dir()).with_suffix("") for path in experiments_dir().rglob("*.yaml"))


def message(*overrides: str, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(*overrides, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_the_default_run(golden: Callable[[str], Callable[[str], None]]) -> None:
    config = compose()
    assert isinstance(config, RunConfig)
    assert config == compose()
    golden("config/default.yaml")(to_yaml(config))


def test_overrides_reach_every_kind_of_field() -> None:
    config = compose(
        "train.steps=7", "optim.lr=1", "model.eos_token_id=[1,2]", "schedule.decay_steps=null", "log.progress=false"
    )
    assert (config.train.steps, config.optim.lr, config.model.eos_token_id) == (7, 1.0, (1, 2))
    assert (config.schedule.decay_steps, config.log.progress) == (None, False)
    assert replace(config, train=replace(config.train, steps=8)) == compose(*_FIVE, "train.steps=8")


_FIVE = ("optim.lr=1", "model.eos_token_id=[1,2]", "log.progress=false")


@pytest.mark.parametrize("option", [str(path) for path in OPTIONS])
def test_every_option_composes_and_says_what_it_is(option: str) -> None:
    group, _, name = option.partition("/")
    assert header(conf_dir() / f"{option}.yaml"), "the first line has to be a comment"
    model = "llama31_405b" if "account_for" in (conf_dir() / f"{option}.yaml").read_text() else "llama31_70b"
    overrides = [f"model={model}", "train.global_batch_size=512", "train.micro_batch_size=1", "train.seq_length=8192"]
    needed = [*(overrides if group == "parallel" else []), *_NEEDED.get(option, [])]
    config = compose(*needed, f"{group}={name}")
    if group == "parallel" and name != "single":
        sizes = "".join(f"{key}{size}" for key in _SIZES if (size := getattr(config.parallel, key)) > 1)
        assert sizes == name
        assert config.parallel.sequence_parallel is (config.parallel.tp > 1)


_NEEDED = {
    "data/chat": ["data.path=chats.jsonl"],
    "data/indexed": ["data.path=corpus"],
    "loss/distill": ["loss.teacher=DIR"],
    "loss/function": ["loss.path=FILE.py:NAME"],
}
_SIZES = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")


@pytest.mark.parametrize("name", [str(path) for path in EXPERIMENTS])
def test_every_experiment_composes(name: str) -> None:
    assert header(experiments_dir() / f"{name}.yaml"), "the first line after @package has to be a comment"
    assert compose(f"+experiment={name}") == compose(f"experiment={name}")


def test_fp8_names_its_recipe_where_the_gpu_is_known() -> None:
    run = compose("model=llama31_8b", "precision=fp8")
    assert run.precision.fp8 == "auto"
    named = compose("model=llama31_8b", "precision=fp8_tensorwise").precision
    found, reason = resolved_precision(run.precision, (9, 0), "H200")
    assert found == named
    assert reason.startswith("fp8=auto on H200: 1.36 times bf16")
    assert resolved_precision(named, (9, 0), "H200") == (named, "as configured")
    assert resolved_precision(run.precision, (10, 3), "B300")[0].fp8 == "mxfp8"
    assert resolved_precision(run.precision, (8, 9), "L40")[0].fp8 == "tensorwise"


@pytest.mark.parametrize(
    ("recipe", "capability", "runs"),
    [
        ("mxfp8", (9, 0), "it runs fp8=delayed, tensorwise, blockwise and bf16"),
        ("nvfp4", (9, 0), "it runs fp8=delayed, tensorwise, blockwise and bf16"),
        ("blockwise", (8, 9), "it runs fp8=delayed, tensorwise and bf16"),
        ("mxfp8", (12, 0), "it runs fp8=delayed, tensorwise, blockwise, nvfp4 and bf16"),
        ("auto", (8, 0), "it runs precision=bf16, fp16 and fp32"),
    ],
)
def test_recipes_that_a_gpu_lacks(recipe: Fp8Recipe, capability: tuple[int, int], runs: str) -> None:
    with pytest.raises(LaunchError) as caught:
        resolved_precision(PrecisionConfig(params="bf16", fp8=recipe), capability, "GPU")
    shown = ".".join(map(str, capability))
    assert str(caught.value) == (f"precision.fp8: {recipe} does not run on GPU, compute capability {shown}; {runs}")


MISTAKES = [
    (("modle=tiny",), "modle: no such field; did you mean 'model'?"),
    (("model=lama_tiny",), "model: no option 'lama_tiny'; did you mean 'llama_tiny'?"),
    (("parallel=zzz",), "parallel: no option 'zzz'; choose among "),
    (("modl/x=y",), "modl/x: no such group; did you mean 'model'?"),
    (("+nothing=x",), "nothing: no such field; "),
    (("train.stesp=3",), "train.stesp: no such field; did you mean 'train.steps'?"),
    (("lr=3",), "lr: no such field; did you mean 'optim.lr'?"),
    (("train.steps.x=3",), "train.steps.x: no such field; train.steps is a value, not a section"),
    (("train.steps=abc",), "train.steps: expected an integer, got 'abc'"),
    (("schedule.decay=cosin",), "schedule.decay: expected one of constant, cosine, linear, inverse_sqrt, wsd, got"),
    (("data.path=7",), "data.path: expected text, got 7; quote it: 'data.path=\"7\"'"),
    (
        ("data.path=/a/step=3",),
        "data.path: cannot read the value '/a/step=3'; quote = , : and spaces twice: 'data.path=\"/a/step=3\"'",
    ),
    (
        ("precision=bf16", "precision.fp8_attention=dot_product"),
        "precision.fp8_attention: needs an FP8 recipe; set fp8=auto, or leave it out",
    ),
    (
        ("precision=fp8_blockwise", "precision.fp8_attention=dot_product"),
        "precision.fp8_attention: the blockwise recipe has no attention in FP8; use tensorwise or delayed",
    ),
    (
        ("precision=fp8_delayed", "precision.num_layers_at_end_in_bf16=1"),
        "precision.num_layers_at_end_in_bf16: needs an FP8 recipe other than delayed, got delayed",
    ),
    (
        ("model=llama32_1b", "precision=fp8_tensorwise", "precision.fp8_output_proj=true"),
        "precision.fp8_output_proj: needs an output layer of its own, this model's is the embedding; set it to false",
    ),
    (
        ("precision=fp8", "model=llama31_8b", "train.seq_length=130", "train.micro_batch_size=1"),
        "train.seq_length: fp8=auto takes tokens in multiples of 16 a rank, got 130; lengthen seq_length",
    ),
    (("fusion.moe_router_fusion=true",), "fusion.moe_router_fusion: needs a model with experts; set it to false"),
    (("train",), "train: expected KEY=VALUE or GROUP=OPTION (--help lists both)"),
    (("hydra.searchpath=[/x]",), "hydra.searchpath: name your directories with --config-dir or MBFN_CONF"),
    (("hydra/launcher=foo",), "hydra/launcher: no option 'foo'; choose among basic"),
    (("train.seed=${nope}",), "train.seed: Interpolation key 'nope' not found"),
    (("model=from_hf",), "model: model=from_hf takes the config of init.hf; give init.hf=DIR"),
    (("optim.lr=-1", "train.steps=0"), "optim.lr: expected above 0, got -1.0\ntrain.steps: expected at least 1, got 0"),
    (
        ("model=x", "train.stepz=1", "optim.lr=no", "a=/b=c"),
        "a: cannot read the value '/b=c'; quote = , : and spaces twice: 'a=\"/b=c\"'\n"
        "model: no option 'x'; choose among ",
    ),
]


@pytest.mark.parametrize(("overrides", "start"), MISTAKES)
def test_mistakes(overrides: tuple[str, ...], start: str) -> None:
    text = message(*overrides)
    assert text.startswith(start)
    assert "\n\n" not in text


def test_all_mistakes_of_a_command_line_are_listed() -> None:
    assert message("train.stepz=1", "optim.lr=no", "a=/b=c").splitlines() == [
        "a: cannot read the value '/b=c'; quote = , : and spaces twice: 'a=\"/b=c\"'",
        "train.stepz: no such field; did you mean 'train.steps'?",
        "optim.lr: expected a number, got 'no'",
    ]


def test_a_value_with_an_equals_sign_when_quoted() -> None:
    assert compose('data.path="/a/step=3"').data.path == "/a/step=3"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    write(tmp_path / "conf/model/mine.yaml", "# Mine\ndefaults:\n  - qwen3_tiny\nnum_layers: 3\n")
    write(
        tmp_path / "conf/experiment/small.yaml",
        "# @package _global_\ndefaults:\n  - override /model: mine\n  - override /schedule: wsd\ntrain:\n  steps: 30\n",
    )
    return tmp_path / "conf"


def test_users_groups_extend_ours(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose("+experiment=small", conf_dirs=[mine])
    assert (config.model.num_layers, config.model.family, config.schedule.decay) == (3, "qwen3", "wsd")
    assert config.train.steps == 30
    assert compose("experiment=small", "train.steps=31", conf_dirs=[mine]).train.steps == 31
    monkeypatch.setenv("MBFN_CONF", str(mine))
    assert compose("model=mine").model == config.model


def test_broken_files_of_users(mine: Path) -> None:
    bad = write(mine / "model/bad.yaml", "a: 1\n b: [\n")
    assert message("model=bad", conf_dirs=[mine]) == (
        f'mapping values are not allowed here in "{bad}", line 2, column 3'
    )
    write(mine / "model/odd.yaml", "defaults: [llama_tiny]\nnum_layer: 1\nhidden_size: x\nrope_scaling: {factr: 2}\n")
    assert message("model=odd", conf_dirs=[mine]).splitlines() == [
        "model.num_layer: no such field; did you mean 'model.num_layers'?",
        "model.hidden_size: expected an integer, got 'x'",
        "model.rope_scaling.factr: no such field; did you mean 'model.rope_scaling.factor'?",
    ]
    write(mine / "model/lacking.yaml", "family: llama\n")
    assert message("model=lacking", conf_dirs=[mine]).splitlines()[0] == (
        "model.num_layers: is required and has no value; give model.num_layers=..."
    )


def test_an_experiment_without_its_package(mine: Path) -> None:
    file = write(mine / "experiment/bare.yaml", "# Bare\ntrain:\n  steps: 3\n")
    assert message("experiment=bare", conf_dirs=[mine]) == (
        f"experiment: {file}: the first line has to be `# @package _global_`"
    )


def test_one_option_in_two_places(mine: Path) -> None:
    ours, theirs = conf_dir() / "model/llama_tiny.yaml", write(mine / "model/llama_tiny.yaml", "family: x\n")
    assert message(conf_dirs=[mine]) == f"model=llama_tiny: is both {ours} and {theirs}; rename yours"


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert message(conf_dirs=[tmp_path / "no"]) == (
        f"{tmp_path}/no: expected a directory of configuration groups (--config-dir, MBFN_CONF)"
    )


def read_model(directory: str) -> ModelConfig:
    return build(ModelConfig, yaml.safe_load((Path(directory) / "model.yaml").read_text()))


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    model = replace(compose("model=qwen2_tiny").model, num_layers=6, vocab_size=777)
    return write(tmp_path / "hf/model.yaml", to_yaml(model)).parent


def test_init_hf_brings_its_model(hf: Path, mine: Path) -> None:
    config = compose(f"init.hf={hf}", model_from_hf=read_model)
    assert config.model == read_model(str(hf))
    assert config.init.hf == str(hf)
    longer = compose(f"init.hf={hf}", "model.max_position_embeddings=4096", model_from_hf=read_model)
    assert longer.model == replace(config.model, max_position_embeddings=4096)
    assert compose(f"init.hf={hf}", "model=from_hf", model_from_hf=read_model) == config
    write(mine / "experiment/tune.yaml", f"# @package _global_\ninit: {{hf: {hf}}}\noptim: {{lr: 1.0e-5}}\n")
    tuned = compose("experiment=tune", conf_dirs=[mine], model_from_hf=read_model)
    assert tuned.model == config.model


def test_a_chosen_model_must_fit_init_hf(hf: Path) -> None:
    fitting = compose(
        f"init.hf={hf}", "model=qwen2_tiny", "model.num_layers=6", "model.vocab_size=777", model_from_hf=read_model
    )
    assert fitting.model == read_model(str(hf))
    assert message(f"init.hf={hf}", "model=qwen2_tiny", model_from_hf=read_model).splitlines() == [
        f"model.num_layers: 2 contradicts 6 in the config of init.hf={hf}; leave it out",
        f"model.vocab_size: 512 contradicts 777 in the config of init.hf={hf}; leave it out",
    ]
    assert message(f"init.hf={hf}", "model.num_layers=5", model_from_hf=read_model) == (
        f"model.num_layers: 5 contradicts 6 in the config of init.hf={hf}; leave it out"
    )


def test_composing_inside_a_hydra_job_leaves_it_alone() -> None:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        compose("train.steps=3")
        assert GlobalHydra.instance().hydra is outer
    assert not GlobalHydra.instance().is_initialized()


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    kind: Literal["whole"] = "whole"


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    kind: Literal["low_rank"] = "low_rank"
    rank: int = 8
    alpha: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    adapter: Whole | LowRank = Whole()
    rope: RopeScaling | None = None


def test_a_group_whose_options_are_of_different_classes(tmp_path: Path) -> None:
    write(tmp_path / "tune.yaml", "defaults: [tune_schema, {adapter: whole}, _self_]\n")
    write(tmp_path / "adapter/whole.yaml", "kind: whole\n")
    write(tmp_path / "adapter/low_rank.yaml", "kind: low_rank\nrank: 4\n")

    def tune(*overrides: str) -> TuneConfig:
        return compose_as(TuneConfig, "tune", *overrides, conf_dirs=[tmp_path])

    assert tune() == TuneConfig()
    assert tune("adapter=low_rank").adapter == LowRank(rank=4)
    assert tune("adapter=low_rank", "adapter.alpha=2", "rope.factor=3") == TuneConfig(
        adapter=LowRank(rank=4, alpha=2.0), rope=RopeScaling(factor=3.0)
    )
    with pytest.raises(ConfigError, match=r"^adapter.rank: no such field; did you mean 'adapter.kind'\?$"):
        tune("adapter.rank=3")
    with pytest.raises(ConfigError, match=r"^adapter.rnk: no such field; did you mean 'adapter.rank'\?$"):
        tune("adapter=low_rank", "adapter.rnk=3")
