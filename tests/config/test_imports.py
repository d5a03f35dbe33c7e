"""What importing the configuration costs."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("hydra", "omegaconf", "yaml", "torch", "numpy", "jax", "transformers", "megatron")


def test_config_values_and_composition_load_lazily() -> None:
    code = f"import sys, mbfn.config.compose; print(sorted(set({HEAVY}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
