"""`python -m mbfn.models`: every family and every published size, and features that are those of the models."""

from __future__ import annotations

import json
import subprocess
import sys

import mbfn
from mbfn.models import family_facts, published


def test_every_family_and_size_is_listed_once() -> None:
    facts = family_facts()
    assert tuple(f.family for f in facts) == mbfn.families()
    assert sorted(size for f in facts for size in f.sizes) == sorted(published())
    assert all(f.sizes for f in facts)


def test_features_are_the_tables() -> None:
    found = {f.family: f for f in family_facts()}
    assert {"latent attention", "further tokens", "groups of experts"} <= {*found["deepseek_v3"].features}
    assert {"sinks", "expert bias", "window"} <= {*found["gpt_oss"].features}
    assert "experts" not in found["llama"].features
    assert found["llama"].forms == ("hub",)
    assert found["qwen3_moe"].forms == ("hub", "stacked")


def test_the_command() -> None:
    line = [sys.executable, "-m", "mbfn.models", "gemma2", "format=json"]
    found = subprocess.run(line, capture_output=True, text=True, check=True, timeout=120)
    (gemma,) = json.loads(found.stdout)
    assert gemma["architecture"] == "Gemma2ForCausalLM"
    assert "gemma2_27b" in gemma["sizes"]
