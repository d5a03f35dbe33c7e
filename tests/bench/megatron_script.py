"""A hand-written Megatron-core training loop without mbfn, the other side of tests/bench/gpu.py.

    python tests/bench/megatron_script.py shape=8b fp8=tensorwise steps=8 out=plain.jsonl
    torchrun --nproc-per-node 2 tests/bench/megatron_script.py shape=8b tp=2 batch=8

Random tokens, new ones for every micro-batch: on a repeated batch gradients vanish within a few steps, and matrix
products of near-zero operands run faster. One line of JSON is appended to `out`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

STARTED = time.time()
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402


def wgrad(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """Accumulate a weight gradient: what the output layer takes from Apex, by Transformer Engine."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    out = {"out_dtype": main_grad.dtype, "out": main_grad}
    general_gemm(total_input, grad_output, layout="NT", accumulate=True, grad=True, **out)


APEX = types.ModuleType("fused_weight_gradient_mlp_cuda")
APEX.wgrad_gemm_accum_fp32 = APEX.wgrad_gemm_accum_fp16 = wgrad  # type: ignore[attr-defined]
sys.modules[APEX.__name__] = APEX  # before Megatron looks for it

import transformer_engine.pytorch  # noqa: E402, F401
from megatron.core import parallel_state as ps  # noqa: E402
from megatron.core.distributed import DistributedDataParallel as Ddp  # noqa: E402
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    tied: bool = False
    rotary_base: int = 500000
    experts: int = 0
    chosen: int = 0
    qk_norm: bool = False


SHAPES = {
    "1b": Shape(layers=16, hidden=2048, ffn=8192, heads=32, groups=8, head_dim=64, vocab=128256, tied=True),
    "8b": Shape(layers=32, hidden=4096, ffn=14336, heads=32, groups=8, head_dim=128, vocab=128256),
    "moe": Shape(
        layers=48,
        hidden=2048,
        ffn=768,
        heads=32,
        groups=4,
        head_dim=128,
        vocab=151936,
        rotary_base=1000000,
        experts=128,
        chosen=8,
        qk_norm=True,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What to run: the arguments."""

    shape: str = "8b"
    layers: int = 0  # 0: the shape's
    seq: int = 8192
    micro: int = 1
    batch: int = 4
    fp8: str = ""
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    overlap: bool = False
    warmup: int = 3
    steps: int = 8
    name: str = "plain"
    out: str = "plain.jsonl"

    @property
    def model(self) -> Shape:
        return SHAPES[self.shape]

    @property
    def depth(self) -> int:
        return self.layers or self.model.layers


def case(arguments: list[str]) -> Case:
    """The `key=value` arguments as a case."""
    kinds = {field.name: type(field.default) for field in fields(Case)}
    given: dict[str, Any] = {}
    for key, _, value in (text.partition("=") for text in arguments):
        given[key] = value == "true" if kinds[key] is bool else kinds[key](value)
    return Case(**given)


def settings(what: Case) -> TransformerConfig:
    """Every fusion that runs on this machine, bf16 parameters, FP8 products where asked for."""
    shape, more = what.model, dict[str, Any]()
    if what.fp8:
        more |= {"fp8": "e4m3" if what.fp8 == "blockwise" else "hybrid", "fp8_recipe": what.fp8}
    if what.fp8 == "delayed":
        more |= {"fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"}
    if shape.experts:
        more |= {
            "num_moe_experts": shape.experts,
            "moe_router_topk": shape.chosen,
            "moe_ffn_hidden_size": shape.ffn,
            "moe_grouped_gemm": True,
            "moe_permute_fusion": True,
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.001,
        }
    return TransformerConfig(
        num_layers=what.depth,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        qk_layernorm=shape.qk_norm,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        tensor_model_parallel_size=what.tp,
        pipeline_model_parallel_size=what.pp,
        virtual_pipeline_model_parallel_size=what.vpp if what.vpp > 1 else None,
        sequence_parallel=what.tp > 1,
        gradient_accumulation_fusion=True,
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="te",
        apply_rope_fusion=True,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        overlap_p2p_comm=what.vpp > 1,
        batch_p2p_comm=what.vpp == 1,
        deallocate_pipeline_outputs=what.pp > 1,
        attention_backend=AttnBackend.fused,
        **more,
    )


def chunks(what: Case, config: TransformerConfig) -> list[torch.nn.Module]:
    """This rank's parts of the model, in bf16 on its GPU."""
    shape, built = what.model, []
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=shape.experts or None, moe_grouped_gemm=shape.experts > 0, qk_layernorm=shape.qk_norm
    )
    for number in range(what.vpp):
        where: dict[str, Any] = {"ignore_virtual": False, "vp_stage": number} if what.vpp > 1 else {}
        model = GPTModel(
            config,
            spec,
            shape.vocab,
            what.seq,
            pre_process=ps.is_pipeline_first_stage(**where),
            post_process=ps.is_pipeline_last_stage(**where),
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope",
            rotary_base=shape.rotary_base,
            vp_stage=number if what.vpp > 1 else None,
        )
        built.append(model.cuda().bfloat16())
    return built


def optimizer_of(models: list[Ddp]) -> Any:
    """Adam with bf16 gradients and moments; of its fp32 weights the 16 bits that bf16 lacks are kept."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-5,
        min_lr=1e-5,
        weight_decay=0.1,
        clip_grad=1.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
        overlap_param_gather=models[0].ddp_config.overlap_param_gather,
        use_precision_aware_optimizer=True,
        main_grads_dtype=torch.bfloat16,
        exp_avg_dtype=torch.bfloat16,
        exp_avg_sq_dtype=torch.bfloat16,
    )
    return get_megatron_optimizer(config, models, use_gloo_process_groups=False)


def hook(config: TransformerConfig, models: list[Ddp], optimizer: Any, *, overlap: bool) -> None:
    """Tell Megatron's schedule how gradients are held back, reduced and scaled."""

    def each(name: str) -> Any:
        found = [getattr(model, name) for model in models]
        return found if len(found) > 1 else found[0]

    config.no_sync_func = each("no_sync")
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if overlap:
        config.grad_sync_func, config.param_sync_func = each("start_grad_sync"), each("start_param_sync")


def tokens(what: Case) -> Iterator[dict[str, torch.Tensor]]:
    """New random micro-batches without end."""
    draw = torch.Generator(device="cuda").manual_seed(1234 + ps.get_data_parallel_rank())
    positions = torch.arange(what.seq, device="cuda").expand(what.micro, -1).contiguous()
    while True:
        rows = torch.randint(what.model.vocab, (what.micro, what.seq + 1), device="cuda", generator=draw)
        yield {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous(), "positions": positions}


def forward(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro-batch, and how Megatron makes its losses one."""
    batch = next(batches)

    def total(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        count = torch.tensor(losses.numel(), dtype=torch.int, device="cuda")
        loss = losses.float().sum()
        return loss, count, {"loss": loss.detach() / count}

    return model(batch["tokens"], batch["positions"], None, labels=batch["labels"]), total


def measure(what: Case) -> dict[str, Any]:
    """Build, warm up, and time the steps."""
    config = settings(what)
    reduce = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=what.overlap, overlap_param_gather=what.overlap
    )
    models = [Ddp(config, reduce, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks(what, config))]
    optimizer = optimizer_of(models)
    hook(config, models, optimizer, overlap=what.overlap)
    schedule, data = get_forward_backward_func(), [tokens(what) for _ in models]
    micro_batches = what.batch // (what.micro * ps.get_data_parallel_world_size())
    losses, times = [], []
    for number in range(what.warmup + what.steps):
        if number == what.warmup:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        before = time.perf_counter()
        for model in models:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        records = schedule(
            forward_step_func=forward,
            data_iterator=data if what.vpp > 1 else data[0],
            model=models if what.vpp > 1 else models[0],
            num_microbatches=micro_batches,
            seq_length=what.seq,
            micro_batch_size=what.micro,
            forward_only=False,
        )
        optimizer.step()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - before))
        losses += [sum(float(record["loss"]) for record in records) / len(records)] if records else []
    return {"times_ms": [round(ms, 1) for ms in times[what.warmup :]], "losses": losses[:1] + losses[-1:]}


def main() -> None:
    what = case(sys.argv[1:])
    if what.tp > 1:
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # so that Megatron's collectives start before the products
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        torch.distributed.init_process_group("nccl")
    else:
        torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    ps.initialize_model_parallel(what.tp, what.pp, what.vpp if what.vpp > 1 else None, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1234)
    found = measure(what)
    peaks = torch.tensor([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()], device="cuda")
    torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
    if torch.distributed.get_rank() == 0:
        step = statistics.median(found["times_ms"])
        allocated, reserved = (round(size / 2**30, 1) for size in peaks.tolist())
        rate = round(what.batch * what.seq / step * 1000)
        record = {"name": what.name, "side": "plain", "step_ms": step, "tokens_per_s": rate, "peak_gib": allocated}
        record |= found | {"reserved_gib": reserved, "seconds": round(time.time() - STARTED, 1)}
        with Path(what.out).open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
