"""Expected time of a step: what each stage computes and moves at a device's rates, then the pipeline round it.

Nothing here is fitted to the layout: matrix products, attention, passes over memory and exposed communication add up.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from mbfn.config.precision import PrecisionConfig
from mbfn.config.run import RunConfig
from mbfn.config.train import recomputing
from mbfn.plan.activations import BYTES, Kernels, layer_input, logits
from mbfn.plan.comm import Traffic, bandwidth, traffic
from mbfn.plan.devices import SHARES, Device
from mbfn.plan.flops import Flops, layer_flops, run_flops, step_tokens
from mbfn.plan.kept import layer_saved
from mbfn.plan.memory import cuts_weights, optimizer_bytes, owned
from mbfn.plan.weights import StageWeights, is_sparse, stage_weights

_LOGIT_PASSES = 6  # reads and writes of the logits between output layer and its backward pass
_BACKWARD_OF_ATTENTION = 2.5  # of its forward operations, which FLOP conventions count as 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Seconds of one micro-batch, forward and backward."""

    gemm: float = 0.0
    attention: float = 0.0
    memory: float = 0.0  # norms, activations, casts, loss: bound by memory bandwidth
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0  # what attention does not hide
    expert_parallel: float = 0.0
    pipeline_parallel: float = 0.0

    @property
    def total(self) -> float:
        """All of them, one after the other."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One step on a device."""

    stages: tuple[Parts, ...]  # one micro-batch through each stage
    pipeline: float  # seconds of all micro-batches, waiting included
    waiting: float  # of these, seconds that the busiest stage waits
    data_parallel: float  # exposed gradient and parameter collectives
    update: float  # the optimizer
    step: float
    tokens_per_second: float
    tflops: float  # a GPU, causal convention

    def days(self, tokens: float) -> float:
        """Days that `tokens` take."""
        return tokens / self.tokens_per_second / 86400


def estimate(run: RunConfig, device: Device) -> Speed:
    """The time of a step of `run` on GPUs of one kind."""
    moved = traffic(run)
    stages = tuple(_parts(run, device, moved, weights) for weights in stage_weights(run.model, run.parallel))
    totals = [parts.total for parts in stages]
    slowest = max(totals)
    waiting = (sum(totals) - slowest) / run.parallel.vpp
    pipeline = run.num_microbatches * slowest + waiting
    exposed, update = _data_parallel(run, device, moved, slowest), _update(run, device)
    step = pipeline + exposed + update
    flops = run_flops(run).causal * step_tokens(run)
    return Speed(
        stages=stages,
        pipeline=pipeline,
        waiting=waiting,
        data_parallel=exposed,
        update=update,
        step=step,
        tokens_per_second=step_tokens(run) / step,
        tflops=flops / step / run.parallel.world_size / 1e12,
    )


def peak_rate(run: RunConfig, device: Device) -> float:
    """Published operations a second of the format that the layers' products use."""
    rates = {"none": device.bf16, "nvfp4": device.fp4}
    return rates.get(run.precision.fp8, device.fp8)


def _parts(run: RunConfig, device: Device, moved: tuple[Traffic, ...], weights: StageWeights) -> Parts:
    kinds = _kinds(run, device)
    layers = [kinds[layer] for chunk in weights.chunks for layer in chunk] + [kinds[-1]] * weights.mtp
    parts = Parts(
        gemm=sum(layer.gemm for layer in layers),
        attention=sum(layer.attention for layer in layers),
        memory=sum(layer.memory for layer in layers),
    )
    if weights.output:
        parts = replace(
            parts,
            gemm=parts.gemm + _output_gemm(run, device),
            memory=parts.memory + _LOGIT_PASSES * logits(run) / device.memory_bandwidth,
        )
    return _communicating(run, device, moved, weights, parts)


def _communicating(
    run: RunConfig, device: Device, moved: tuple[Traffic, ...], weights: StageWeights, parts: Parts
) -> Parts:
    """`parts` with what the stage sends: its share, by layers, of what the busiest one does."""
    busiest = max(stage.num_layers + stage.mtp for stage in stage_weights(run.model, run.parallel))
    share = (weights.num_layers + weights.mtp) / busiest / run.num_microbatches
    sends = 2 * layer_input(run) / _stage_link(moved, device) if run.parallel.pp > 1 and run.parallel.vpp == 1 else 0.0
    return replace(
        parts,
        tensor_parallel=_seconds(moved, "tp", device) * share,
        context_parallel=max(0.0, _seconds(moved, "cp", device) * share - parts.attention),
        expert_parallel=_seconds(moved, "ep", device) * share,
        pipeline_parallel=sends,
    )


def _kinds(run: RunConfig, device: Device) -> tuple[Parts, ...]:
    """Every decoder layer on one micro-batch, without communication; equal layers are computed once."""
    model, length = run.model, run.train.seq_length
    formats = PrecisionConfig(params="bf16") if run.precision.quantized else run.precision
    plain = replace(run, train=recomputing(run.train, "none"), precision=formats)
    kept = {sparse: layer_saved(plain, Kernels(), sparse=sparse).kept for sparse in {False, model.moe is not None}}
    found: dict[tuple[Flops, bool], Parts] = {}
    layers = []
    for number in range(model.num_layers):
        key = layer_flops(model, number, length), is_sparse(model, number)
        if key not in found:
            found[key] = _layer(run, device, key[0], kept[key[1]])
        layers.append(found[key])
    return tuple(layers)


def _layer(run: RunConfig, device: Device, flops: Flops, kept: float) -> Parts:
    """One decoder layer of these operations a token, which keeps that many bytes in bf16."""
    tokens = run.train.micro_batch_size * run.train.seq_length / (run.parallel.tp * run.parallel.cp)
    again = 1 if run.train.recompute == "full" else 0
    frozen = run.peft.kind != "none"  # and so without gradients of weights
    fp8 = run.precision.quantized
    bf16 = _bf16_rate(run, device)
    rate = peak_rate(run, device) * SHARES.gemm[run.precision.fp8] if fp8 else bf16 * SHARES.gemm["none"]
    narrow = run.model.kv_channels < 128
    products = (flops.layers + flops.experts / _grouped(run)) * tokens * (3 - frozen + again) / 3
    passes = (SHARES.passes_fp8 if fp8 else SHARES.passes) * (3 + again) / 3
    return Parts(
        gemm=products / rate,
        attention=flops.attention
        * tokens
        * (1 + again + _BACKWARD_OF_ATTENTION)
        / 3
        / (bf16 * (SHARES.attention_narrow if narrow else SHARES.attention)),
        memory=passes * kept / device.memory_bandwidth,
    )


def _grouped(run: RunConfig) -> float:
    """What experts' products reach of the rate of one large product."""
    moe = run.model.moe
    widths = (run.model.hidden_size, moe.moe_ffn_hidden_size // run.parallel.etp) if moe else ()
    apart = run.precision.quantized or any(width % 128 for width in widths)
    return SHARES.grouped_apart if apart else SHARES.grouped


def _output_gemm(run: RunConfig, device: Device) -> float:
    """The output layer stays in the parameters' format."""
    tokens = run.train.micro_batch_size * run.train.seq_length / (run.parallel.tp * run.parallel.cp)
    flops = run_flops(run).output * tokens
    return flops / (_bf16_rate(run, device) * SHARES.gemm["none"])


def _bf16_rate(run: RunConfig, device: Device) -> float:
    """Fp32 runs on TF32 tensor cores at half the rate."""
    return device.bf16 / 2 if run.precision.params == "fp32" else device.bf16


def _seconds(moved: tuple[Traffic, ...], group: str, device: Device) -> float:
    return sum(item.sent / bandwidth(item, device) for item in moved if item.group == group)


def _stage_link(moved: tuple[Traffic, ...], device: Device) -> float:
    return next(bandwidth(item, device) for item in moved if item.group == "pp")


def _data_parallel(run: RunConfig, device: Device, moved: tuple[Traffic, ...], microbatch: float) -> float:
    """Overlapped collectives hide behind the last backward and the first forward pass."""
    hidden = {
        "gradients": 2 / 3 * microbatch if run.optim.overlap_grad_reduce else 0.0,
        "parameters": 1 / 3 * microbatch if run.optim.overlap_param_gather else 0.0,
    }
    seconds = [
        (item, item.sent / bandwidth(item, device)) for item in moved if item.group in ("dp", "edp", "embedding")
    ]
    if cuts_weights(run):  # each layer's weights come while the one before it computes
        return max(0.0, sum(time for _, time in seconds) - run.num_microbatches * microbatch)
    return sum(max(0.0, time - hidden.get(item.purpose, 0.0)) for item, time in seconds)


def _update(run: RunConfig, device: Device) -> float:
    """State read and written, gradients read twice, weights written."""
    busiest = max(stage_weights(run.model, run.parallel), key=lambda stage: stage.held.parameters)
    formats = run.precision
    moved = owned(run, busiest) * (2 * optimizer_bytes(run) + 2 * BYTES[formats.grads] + 2 * BYTES[formats.params])
    return (moved + busiest.held.parameters * BYTES[formats.grads]) / device.memory_bandwidth
