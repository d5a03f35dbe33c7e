"""Layers with a state on one GPU: kernels beside torch, both held against fp32, and packed rows.

    python -m tests.bench.hybrids out=DIR [only=mamba] [tries=3] [cpu=true]

A line a finding, into DIR/hybrids.jsonl too: errors of the output and of every gradient, of their length, and the
milliseconds of a layer and of its part between the projections, forward and backward. Kernels are good where errors
are at most twice those of torch in bf16; samples of a packed row must be what each is alone. `tries` bounds what the
tuning of a kernel compares, 0 is everything that it knows. `cpu=true` is a rehearsal with torch in place of kernels.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mbfn import megatron
from mbfn.config.mixers import GatedDeltaNetConfig, MambaConfig
from mbfn.config.parallel import ParallelConfig
from mbfn.megatron import World, recurrent
from mbfn.megatron.delta_net import GatedDeltaNet
from mbfn.megatron.device import attributes
from mbfn.megatron.mamba import Mamba
from mbfn.megatron.packed import Segments, segments
from mbfn.megatron.recurrent import StateMixer
from mbfn.megatron.scans import Scans, choose_scans, torch_scans

LENGTHS, TINY = (1000, 37, 1859, 1200), (13, 1, 16)


def layer(name: str, world: World) -> StateMixer:
    """A layer of Nemotron-H 8B or Qwen3-Next 80B as at the start of training, in bf16; on a CPU hardly anything."""
    heads, groups, hidden, size = (4, 2, 16, 8) if world.device.type == "cpu" else (128, 8, 4096, 128)
    config = TransformerConfig(
        num_layers=1, hidden_size=hidden if name == "mamba" else hidden // 2, num_attention_heads=1, bf16=True,
        params_dtype=torch.bfloat16, use_cpu_initialization=True, perform_initialization=False,
    )  # fmt: skip
    linears = ColumnParallelLinear, RowParallelLinear
    if name == "mamba":
        own = {"num_heads": heads, "num_groups": groups, "head_dim": size // 2, "state_dim": size}
        sizes = MambaConfig(**{f"mamba_{of}": number for of, number in own.items()})
        made: StateMixer = Mamba(config, sizes, linears, world.groups)
    else:
        own = {"num_key_heads": 2 * groups, "num_value_heads": 4 * groups, "key_head_dim": size, "value_head_dim": size}
        sizes = GatedDeltaNetConfig(**{f"linear_{of}": number for of, number in own.items()})
        made = GatedDeltaNet(config, sizes, linears, world.groups)
    made.to(world.device)
    for of, weight in made.named_parameters():
        if of == "A_log":
            weight.data.uniform_(1, 16).log_()
        elif of == "dt_bias":
            step = torch.empty_like(weight, dtype=torch.float32).uniform_(-7, -2.3).exp()
            weight.data.copy_(step.expm1().log())  # softplus gives the step again
        elif "norm" in of or of == "D":
            weight.data.fill_(1)
        else:
            weight.data.normal_(std=0.3 if "conv" in of else config.hidden_size**-0.5)
    return made


def gradients(made: StateMixer, scans: Scans, x: Tensor, given: Tensor, rows: Segments | None) -> dict[str, Tensor]:
    """The output, and the gradients of everything. Shapes: x and given (S, 1, H)."""
    x = x.detach().requires_grad_()
    with attributes(recurrent, {"choose_scans": lambda *_: (scans, "")}):
        out, _ = made(x, packed_seq_params=rows)
    names, weights = zip(*made.named_parameters(), strict=True)
    found = torch.autograd.grad(out, [x, *weights], given.type_as(out))
    return {"out": out.detach(), **dict(zip(("x", *names), found, strict=True))}


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """How far each is from what it should be, of its length."""
    return {name: float(f"{(found[name].to(x) - x).norm() / x.norm():.2e}") for name, x in wanted.items()}


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of five runs after two others."""
    wait, times = torch.cuda.synchronize if device.type == "cuda" else lambda: None, []
    for _ in range(7):
        wait()
        begun = time.perf_counter()
        run()
        wait()
        times.append(1000 * (time.perf_counter() - begun))
    return round(statistics.median(times[2:]), 3)


def examine(name: str, world: World, tries: int) -> Iterator[dict[str, Any]]:
    """Both sets of scans on one row, then the kernels on a packed one."""
    device, made, exactly = world.device, layer(name, world), layer(name, world)
    lengths = TINY if device.type == "cpu" else LENGTHS
    kernels, why = choose_scans(device, torch.bfloat16, made.head_sizes)
    yield {"scans": kernels.name, "why": why, "good": (kernels.name == "torch") == (device.type == "cpu")}
    limit_tuning(tries)
    exactly.load_state_dict(made.state_dict())
    x, given = torch.randn(2, sum(lengths), 1, made.config.hidden_size, device=device).bfloat16()
    exact = gradients(exactly.float(), torch_scans(), x.float(), given, None)
    projected = made.in_proj(x)[0].transpose(0, 1).detach().requires_grad_()
    errors, times = {}, {}
    for kind, scans in {"torch": torch_scans(), "kernels": kernels}.items():

        def between(scans: Scans = scans) -> None:
            made.mixed(projected, scans, None).sum().backward()

        errors[kind] = apart(gradients(made, scans, x, given, None), exact)
        layer_ms = milliseconds(lambda scans=scans: gradients(made, scans, x, given, None), device)
        times[kind] = {"layer_ms": layer_ms, "between_ms": milliseconds(between, device)}
        yield {"set": kind, **times[kind], "errors": errors[kind]}
    good = all(error <= 2 * errors["torch"][of] + 1e-3 for of, error in errors["kernels"].items())
    yield {"faster": {of: round(ms / times["kernels"][of], 2) for of, ms in times["torch"].items()}, "good": good}
    rows = segments(torch.tensor([0, *lengths]).cumsum(0), world)
    samples = zip(x.split(lengths), given.split(lengths), strict=True)
    alone = [gradients(made, kernels, *sample, None) for sample in samples]
    joined = {of: torch.cat([one.pop(of) for one in alone]) for of in ("out", "x")}
    summed = {of: torch.stack([one[of].float() for one in alone]).sum(0) for of in alone[0]}
    found = apart(gradients(made, kernels, x, given, rows), joined | summed)
    ms = milliseconds(lambda: gradients(made, kernels, x, given, rows), device)
    yield {"set": "packed", "layer_ms": ms, "errors": found, "good": all(error < 2e-2 for error in found.values())}


def limit_tuning(tries: int) -> None:
    """Let each kernel of the package compare only so many of its configurations."""
    loaded = [module for name, module in sys.modules.items() if tries and name.startswith("fla.")]
    for found in [value for module in loaded for value in vars(module).values()]:
        while not isinstance(found, type) and type(found).__module__.startswith(("triton.runtime", "fla.ops.utils")):
            if hasattr(found, "configs"):
                found.configs = found.configs[:: -(-len(found.configs) // tries)]
            found = getattr(found, "fn", None)


def main() -> None:
    given, begun = dict(text.split("=", 1) for text in sys.argv[1:]), time.monotonic()
    device, out = "cpu" if given.get("cpu") == "true" else "cuda", Path(given["out"])
    out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(1)
    about = {"torch": torch.__version__, "device": device if device == "cpu" else torch.cuda.get_device_name()}
    with megatron.open_world(ParallelConfig(), device=device, timeout_s=60) as world:
        for name in given.get("only", "mamba,delta").split(","):
            try:
                for line in examine(name, world, int(given.get("tries", 3))):
                    told = {"case": name, **line, "seconds": round(time.monotonic() - begun, 1)}
                    print("BAD" if told.get("good") is False else "   ", json.dumps(told), flush=True)
                    with (out / "hybrids.jsonl").open("a") as file:
                        file.write(json.dumps({**told, **about}) + "\n")
            except Exception as error:
                print("BAD", json.dumps({"case": name, "error": f"{type(error).__name__}: {error}"[:900]}), flush=True)


if __name__ == "__main__":
    main()
