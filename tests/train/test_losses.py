"""The group `loss`: runs of each kind as a user starts them, and combinations that cannot work named beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mbfn.config.compose import compose
from mbfn.config.loss import DistillLoss, FunctionLoss
from mbfn.config.model import ModelConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.config.run import RunConfig
from mbfn.errors import ConfigError
from mbfn.families import model_from_hf
from mbfn.train.losses import teacher_problems
from tests.train.command import SMALL, finish, records, start, train

TEACHER = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SQUARED = """
from mbfn.megatron import Loss, Term

def squared(run, world, *, weight):
    def function(losses, batch):
        mask = batch["loss_mask"]
        squares = (losses.square() * mask).sum()
        return Term(total=weight * squares, weight=mask.sum(), metrics={"squares": squares.detach()})
    return Loss(function=function, metrics=("squares",))
"""


def _teacher(directory: Path, **sizes: int) -> Path:
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**TEACHER, **sizes}))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # a teacher that is sure of what it says
    model.save_pretrained(directory)
    return directory


def test_a_run_learns_from_a_teacher(tmp_path: Path) -> None:
    teacher = _teacher(tmp_path / "teacher")
    chosen = ("loss=distill", f"loss.teacher={teacher}", "loss.temperature=2", "loss.top_k=20", "loss.token_share=0.25")
    train(tmp_path / "run", *SMALL, *chosen, "train.steps=8", "checkpoint=none", "log=quiet")
    first, *_, last = found = records(tmp_path / "run")
    assert last["distillation"] < first["distillation"] - 0.05
    for record in found:
        assert record["loss"] == pytest.approx(0.75 * record["distillation"] + 0.25 * record["cross_entropy"], abs=1e-5)
    assert last["valid_loss"] < found[3]["valid_loss"]


@pytest.mark.slow
def test_a_run_minimises_a_function_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SQUARED)
    chosen = ("loss=function", f"loss.path={tmp_path / 'mine.py'}:squared", "loss.settings=[weight:0.5]")
    train(
        tmp_path / "run",
        *SMALL,
        *chosen,
        "parallel=dp2",
        "launch=local",
        "train.steps=4",
        "checkpoint=none",
        "log=quiet",
    )
    assert all(r["loss"] == pytest.approx(0.5 * r["squares"]) for r in records(tmp_path / "run"))
    wrong = (*chosen[:1], f"loss.path={tmp_path / 'mine.py'}:cubed")
    code, _, err = finish(start(tmp_path / "wrong", *SMALL, *wrong))
    assert (code, err.strip()) == (2, f"error: loss.path: {tmp_path / 'mine.py'} has no cubed")


def _run(*overrides: str) -> RunConfig:
    return compose("loss=distill", "loss.teacher=somewhere", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("loss.temperature=0",), "loss.temperature: expected more than 0, got 0.0"),
        (("loss.token_share=1.5",), "loss.token_share: expected from 0 to 1, got 1.5"),
        (
            ("loss.hidden_layers=[1,2]", "loss.teacher_layers=[1]"),
            "loss.teacher_layers: expected 2, one for each of hidden_layers, or none; got 1",
        ),
        (("loss.hidden_layers=[9]",), "loss.hidden_layers: expected numbers from 0 to 3, got [9]"),
        (
            ("loss.hidden_layers=[1]", "train.recompute=full"),
            "train.recompute: layers that are made again in the backward pass are not compared; "
            "set train.recompute=none or selective",
        ),
        (
            ("model=deepseek_v3_tiny",),
            "model.mtp_num_layers: 1: layers for further tokens learn from labels alone, not with loss=distill; "
            "set it to 0",
        ),
    ],
)
def test_what_cannot_work_is_named_beforehand(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        _run(*overrides)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "mine.py"}, "path: expected FILE.py:NAME, got 'mine.py'"),
        ({"path": "mine.py:f", "settings": ("beta",)}, "settings: expected NAME:NUMBER, got 'beta'"),
    ],
)
def test_functions_are_named_by_file_and_name(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        FunctionLoss(**settings)
    assert str(error.value) == message


def _model(**sizes: int) -> ModelConfig:
    return model_from_hf({**LlamaConfig(**{**TEACHER, **sizes}).to_dict(), "architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize(
    ("teacher", "pairs", "message"),
    [
        (
            {"vocab_size": 600},
            (),
            "loss.teacher: has 600 tokens, the model 512; choose a teacher with the same tokenizer",
        ),
        (
            {"hidden_size": 64},
            ((0, 0),),
            "loss.teacher: layers are 64 wide, the model's 48; leave out loss.hidden_layers",
        ),
        ({}, ((0, 7),), "loss.teacher_layers: expected numbers from 0 to 3, got 7"),
        (
            {"num_hidden_layers": 8},
            ((0, 0), (1, 4)),
            "loss.hidden_layers: layer 1 and the teacher's 4 are on different pipeline stages; pair those of one",
        ),
    ],
)
def test_teachers_that_do_not_fit_are_named(teacher: dict, pairs: tuple, message: str) -> None:
    sizes = {"num_hidden_layers": 4}
    (found,) = teacher_problems(_model(**sizes), _model(**{**sizes, **teacher}), ParallelConfig(pp=2), pairs)
    assert ": ".join(found) == message


def test_layers_are_paired_by_their_numbers_unless_told() -> None:
    loss = DistillLoss(teacher="somewhere", hidden_layers=(1, 3))
    assert loss.layer_pairs == ((1, 1), (3, 3))
    assert replace(loss, teacher_layers=(2, 7)).layer_pairs == ((1, 2), (3, 7))
