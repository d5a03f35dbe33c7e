"""A checkpoint written anew for another layout continues the run that saved it, optimizer and all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mbfn.config.parallel import ParallelConfig
from mbfn.storage import check_digests, open_torch_dist
from mbfn.storage.jobs import checkpoint_to_checkpoint
from tests.megatron.tiny import config_of, hf_model, run_config, train, weights_of
from tests.ranks import run_ranks

STOP, END = 2, 4


@pytest.mark.parametrize("target", [ParallelConfig(), ParallelConfig(tp=2, pp=2, vpp=2)], ids=["tp1", "tp2pp2vpp2"])
def test_moments_and_master_weights_move_with_the_weights(target: ParallelConfig, tmp_path: Path) -> None:
    model, weights = config_of(hf_model("llama")), weights_of(hf_model("llama"))
    before, after = tmp_path / "before", tmp_path / "after"
    run = run_config(model, ParallelConfig(tp=2))
    run_ranks(2, train, run, weights, steps=range(STOP), save_to=str(before))
    checkpoint_to_checkpoint(before, after, target)
    with open_torch_dist(before) as old, open_torch_dist(after) as new:
        assert old.keys() == new.keys()
        assert old.objects.keys() == new.objects.keys()
        assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in new)
        assert all(torch.equal(old[key], new[key]) for key in old)
        files = {chunk.file.name for meta in new.metas.values() for chunk in meta.chunks}
        assert len(files) == target.world_size
    assert check_digests(after) > 0
    (expected, _), _ = run_ranks(2, train, run, None, steps=range(STOP, END), load_from=str(before))
    (continued, _), _ = run_ranks(2, train, run, None, steps=range(STOP, END), load_from=str(after))
    assert continued == expected
