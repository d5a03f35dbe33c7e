"""Groups are Megatron's own, worlds follow one another, and a wrong number of ranks is named."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from mbfn.config.parallel import ParallelConfig, coordinates
from mbfn.errors import LaunchError
from mbfn.megatron import open_world
from mbfn.megatron.groups import group_ranks
from tests.ranks import RankError, run_ranks

LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(tp=2, cp=3, pp=2, dp=5),
    ParallelConfig(tp=2, pp=4, dp=3, ep=3, etp=2),
    ParallelConfig(tp=2, pp=2, dp=4, ep=4, etp=1),
]


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_groups_are_those_of_parallel_state(parallel: ParallelConfig) -> None:
    ranks = group_ranks(parallel)
    for rank in range(parallel.world_size):
        dist.init_process_group("fake", rank=rank, world_size=parallel.world_size, store=FakeStore())
        try:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tp,
                pipeline_model_parallel_size=parallel.pp,
                context_parallel_size=parallel.cp,
                expert_model_parallel_size=parallel.ep,
                expert_tensor_parallel_size=parallel.etp,
                create_gloo_process_groups=False,
            )
            found = {name: _mine(rank, groups) for name, groups in ranks.items() if name in _EXPECTED}
            expected = {name: tuple(dist.get_process_group_ranks(get())) for name, get in _EXPECTED.items()}
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
        assert found == expected


_EXPECTED = {
    "tp": parallel_state.get_tensor_model_parallel_group,
    "cp": parallel_state.get_context_parallel_group,
    "dp": parallel_state.get_data_parallel_group,
    "pp": parallel_state.get_pipeline_model_parallel_group,
    "dp_cp": lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),
    "tp_cp": parallel_state.get_tensor_and_context_parallel_group,
    "tp_dp_cp": lambda: parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
    "mp": parallel_state.get_model_parallel_group,
    "ep": parallel_state.get_expert_model_parallel_group,
    "expt_tp": parallel_state.get_expert_tensor_parallel_group,
    "expt_dp": parallel_state.get_expert_data_parallel_group,
    "tp_ep": parallel_state.get_expert_tensor_and_model_parallel_group,
    "tp_ep_pp": parallel_state.get_expert_tensor_model_pipeline_parallel_group,
}


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_a_rank_stands_in_its_groups_where_its_coordinates_say(parallel: ParallelConfig) -> None:
    ranks = group_ranks(parallel)
    for rank in range(parallel.world_size):
        place = coordinates(parallel, rank)
        for axis in ("tp", "cp", "dp", "pp", "ep"):
            assert _mine(rank, ranks[axis]).index(rank) == getattr(place, axis)


def test_worlds_follow_one_another_in_a_process() -> None:
    assert run_ranks(2, _two_worlds) == [((0, 1), (0, 1), (1.0, 2.0))] * 2


def _two_worlds() -> tuple:
    members = []
    for parallel in (ParallelConfig(tp=2), ParallelConfig(pp=2)):
        with open_world(parallel, device="cpu", timeout_s=30) as world:
            group = world.groups.tp if parallel.tp > 1 else world.groups.pp
            members.append(tuple(dist.get_process_group_ranks(group)))
            ones = torch.ones(1, device="cuda")  # the runtime sends Megatron's literal device to the CPU
            alone = float(ones)
            dist.all_reduce(ones, group=group)
    return *members, (alone, float(ones))


def test_a_wrong_number_of_ranks_is_named_before_anything_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with (
        pytest.raises(LaunchError, match=r"^parallel: the layout has 2 ranks \(dp=1\), the launcher started 3; "),
        open_world(ParallelConfig(tp=2), device="cpu"),
    ):
        pass


def test_a_failing_rank_ends_the_others_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 failed:.*ZeroDivisionError"):
        run_ranks(2, _fail_on_one)


def _fail_on_one() -> None:
    with open_world(ParallelConfig(dp=2), device="cpu", timeout_s=60) as world:
        if world.rank == 1:
            raise ZeroDivisionError
        dist.barrier()


def _mine(rank: int, groups: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    (own,) = [members for members in groups if rank in members]
    return own
