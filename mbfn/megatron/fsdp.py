"""Weights, gradients and optimizer state cut over data-parallel ranks, by torch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mbfn.megatron.device import attributes


class FullyShardedDataParallel(_BaseDataParallel):
    """A model whose layers gather their weights when they run, and scatter the sum of their gradients.

    Megatron's own wrapper takes the mean of gradients, which Megatron then does not divide by the number of tokens, and
    keeps bf16 weights; here the cut weights are the fp32 masters, gathered in the model's format. Weights outside the
    layers are gathered together, so that tied embeddings are whole wherever they are used.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ddp_config: DistributedDataParallelConfig,
        module: nn.Module,
        group: ProcessGroup,
    ) -> None:
        super().__init__(config=config, module=module)
        self.ddp_config = ddp_config
        kept = {name: dict(vars(param)) for name, param in module.named_parameters()}
        device = "cpu" if config.use_cpu_initialization else "cuda"
        settings: dict[str, Any] = {
            "mesh": DeviceMesh.from_group(group, device),
            "reshard_after_forward": True,
            "mp_policy": _policy(config, ddp_config),
        }
        for param in module.parameters():
            param.data = param.data.float()
        root = _bare(module)
        for unit in [*(part for part in root.modules() if isinstance(part, TransformerLayer)), root]:
            fully_shard(unit, **settings)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        for name, param in module.named_parameters():
            vars(param).update(kept[name], is_torch_fsdp2_param=True)

    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        """Multiply every gradient."""
        for grad in self._gradients():
            grad.mul_(scaling_factor)

    def zero_grad_buffer(self) -> None:
        """Forget the gradients."""
        for param in self.parameters():
            param.grad = None

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Nothing is left to do: each backward pass scatters its gradients, and streams are joined at its end."""

    def _gradients(self) -> Iterator[Tensor]:
        for param in self.parameters():
            if isinstance(param.grad, DTensor):
                yield param.grad.to_local()


def _policy(config: TransformerConfig, ddp_config: DistributedDataParallelConfig) -> MixedPrecisionPolicy:
    if not config.bf16:
        return MixedPrecisionPolicy()
    reduce = torch.float32 if ddp_config.grad_reduce_in_fp32 else torch.bfloat16
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce, cast_forward_inputs=False)


def _bare(module: nn.Module) -> Any:
    """The model inside Megatron's wrapper for 16-bit weights, which is no part of what is gathered."""
    inner = getattr(module, "module", module)
    assert not isinstance(inner, FSDPModule)
    return inner


def megatron_fsdp(
    config: TransformerConfig,
    ddp_config: DistributedDataParallelConfig,
    module: nn.Module,
    groups: ProcessGroupCollection,
    device: torch.device,
) -> nn.Module:
    """Megatron's own fully sharded wrapper."""
    from megatron.core.distributed.fsdp import mcore_fsdp_adapter

    mesh = _CpuMesh if device.type == "cpu" else DeviceMesh
    with attributes(mcore_fsdp_adapter, {"DeviceMesh": mesh, "_get_dp_tp_mesh": _mesh_ranks}):
        return mcore_fsdp_adapter.FullyShardedDataParallel(
            config, ddp_config, module, device=device, pg_collection=groups
        )


def _mesh_ranks(replicas: ProcessGroup, tensor: ProcessGroup, ep_size: int = 1) -> Tensor:
    """The ranks that share this one's weights and the parts of them; Megatron's own needs a package for that."""
    del ep_size
    rows = torch.tensor(get_process_group_ranks(replicas), device="cpu")[:, None] - tensor.rank()
    return rows + torch.arange(tensor.size(), device="cpu")


class _CpuMesh(DeviceMesh):
    """Megatron names CUDA as the device of its mesh."""

    @staticmethod
    def from_group(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return DeviceMesh.from_group(group, "cpu", *args, **kwargs)
