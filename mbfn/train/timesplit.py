"""Where the time of a step goes, by kind of work, from torch's profiler."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from mbfn.train.ceiling import synchronize

# The first kind whose pattern a kernel's name (on the CPU, an operator's) contains. Order decides: Transformer
# Engine's casts carry "cast_transpose", cuDNN's attention "sdpa" beside "gemm".
KINDS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|gloo|all_reduce|all_gather|reduce_scatter|^c10d::|sendrecv"),
    ("attention", r"sdpa|fmha|flash|scaled_dot_product|fused_attn|_attention"),
    ("optimizer", r"multi_tensor|adam|l2norm|foreach"),
    ("gemm", r"cutlass|^_product|^_add_gradient"),  # names that tell of transposes too, and those of all experts
    ("cast", r"cast|transpose|amax|quantiz|_to_fp8|compute_scale|scale_inv|block_scaled|nvfp4|mxfp8|aten::_to_copy"),
    ("gemm", r"gemm|nvjet|xmma|cublas|splitk|aten::(mm|addmm|bmm|linear|matmul|_scaled_mm)\b"),
    ("loss", r"softmax|cross_entropy|log_softmax|nll_loss"),
    ("rope", r"rope|rotary"),
    ("norm", r"norm|rmsnorm|layer_norm"),
    ("activation", r"swiglu|silu|gelu|sigmoid"),
    ("routing", r"permute|topk|sort|scatter|gather|router|moe_"),
    ("memory", r"memcpy|memset|copy|fill|zero"),
)
OTHER, GAPS = "elementwise", "gaps"
_COMPILED = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in KINDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of work on the device."""

    name: str
    start: float  # ms
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSplit:
    """The milliseconds of one step: those of each kind add up with the gaps to the whole where nothing overlaps."""

    wall: float
    kinds: dict[str, float]
    top: tuple[tuple[str, float, int], ...]  # the longest kernels: name, ms, calls


def kind_of(name: str) -> str:
    """The kind of work of a kernel or operator."""
    return next((kind for kind, pattern in _COMPILED if pattern.search(name)), OTHER)


def split(spans: Iterable[Span], wall: float, top: int = 12) -> TimeSplit:
    """Milliseconds by kind; gaps are what no span covers, on any stream."""
    found, kinds, names = sorted(spans, key=lambda span: span.start), dict[str, float](), dict[str, list[float]]()
    busy, until = 0.0, float("-inf")
    for span in found:
        spent = span.end - span.start
        kind = kind_of(span.name)
        kinds[kind] = kinds.get(kind, 0.0) + spent
        names.setdefault(span.name, []).append(spent)
        busy += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    kinds = dict(sorted(kinds.items(), key=lambda item: -item[1])) | {GAPS: max(0.0, wall - busy)}
    longest = sorted(((name, sum(spent), len(spent)) for name, spent in names.items()), key=lambda row: -row[1])
    return TimeSplit(wall=wall, kinds=kinds, top=tuple(longest[:top]))


def profiled(run: Callable[[], object], device: torch.device) -> TimeSplit:
    """The split of `run()`, by kernels on a GPU and by operators on the CPU."""
    cuda = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        before = time.perf_counter()
        run()
        synchronize(device)
        wall = 1000 * (time.perf_counter() - before)
    return split(_kernels(profiler) if cuda else _operators(profiler), wall)


def _kernels(profiler: profile) -> list[Span]:
    """Work on the GPU without the ranges that annotate it."""
    result = profiler.profiler.kineto_results  # type: ignore[union-attr]
    assert result is not None
    return [
        Span(name=event.name(), start=event.start_ns() / 1e6, end=(event.start_ns() + event.duration_ns()) / 1e6)
        for event in result.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    ]


def _operators(profiler: profile) -> list[Span]:
    """The innermost operators, one after the other: on the CPU an operator's time includes those it calls."""
    spans, clock = [], 0.0
    for event in profiler.events() or ():
        spent = event.self_cpu_time_total / 1000
        if spent > 0 and event.name.startswith(("aten::", "c10d::", "gloo", "autograd::", "Optimizer")):
            spans.append(Span(name=event.name, start=clock, end=clock + spent))
            clock += spent
    return spans
