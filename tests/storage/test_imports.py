"""Reading and writing weights needs torch and the standard library: no training library is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
for name in ("megatron", "transformer_engine", "transformers", "hydra", "omegaconf", "jax", "safetensors"):
    sys.modules[name] = None  # importing it fails
import torch
from mbfn.storage import Chunk, check_digests, open_hf, open_torch_dist, save_hf, write_torch_dist
save_hf("hf", {"t": torch.arange(6).view(2, 3)}, config={})
with open_hf("hf") as hf:
    t = hf["t"]
write_torch_dist("dist", [Chunk(key="t", global_shape=(2, 3), offset=(0, 0), shape=(2, 3), dtype=t.dtype, data=t)])
with open_torch_dist("dist") as checkpoint:
    assert checkpoint["t"].tolist() == [[0, 1, 2], [3, 4, 5]], checkpoint["t"]
assert check_digests("hf") == check_digests("dist") == 1
assert "torch.distributed.checkpoint" not in sys.modules
"""


def test_no_training_library_is_imported(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
