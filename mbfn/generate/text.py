"""One rank's part in making text: the model opened, its tokens chosen, rank 0 printing them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from mbfn import megatron
from mbfn.config.precision import PrecisionConfig
from mbfn.config.run import RunConfig
from mbfn.config.train import LaunchConfig, TrainConfig
from mbfn.convert import to_megatron
from mbfn.errors import ConfigError
from mbfn.generate.options import GenerateConfig
from mbfn.generate.source import Source, encoded, end_tokens, find_source, open_tokenizer
from mbfn.megatron import World
from mbfn.megatron.settings import choose_impl
from mbfn.storage import open_hf


def write_text(config: GenerateConfig) -> int:
    """Print the continuation as it is made; 0. Collective."""
    source = find_source(config)
    tokenizer = open_tokenizer(source.tokenizer)
    prompt = encoded(tokenizer, config)
    _check_length(source, prompt, config)
    run = run_of(source, config)
    with megatron.open_world(run.parallel, device=config.device) as world:
        chunks = open_model(run, world, source)
        if world.world_size > 1 and world.device.type == "cpu":
            torch.set_num_threads(1)
        started = time.perf_counter()
        stop = () if config.ignore_eos else end_tokens(source, tokenizer)
        tokens = megatron.continuation(
            world, chunks, prompt, new_tokens=config.max_tokens, sampling=sampling_of(config), stop=stop
        )
        live = world.rank == 0 and config.format == "text"
        new = list(_printed(tokens, tokenizer) if live else tokens)
        seconds = time.perf_counter() - started
        if world.rank == 0:
            _report(config, tokenizer, prompt, new, seconds)
    return 0


def run_of(source: Source, config: GenerateConfig) -> RunConfig:
    """The model, its layout and number format, as a run that trains nothing."""
    gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    params = ("bf16" if gpu else "fp32") if config.dtype == "auto" else config.dtype
    parallel = config.parallel
    batch = parallel.data_parallel_size * parallel.pp
    length = 2 * parallel.cp * parallel.tp
    return RunConfig(
        model=source.model,
        parallel=parallel,
        precision=PrecisionConfig(params=params),
        train=TrainConfig(global_batch_size=batch, micro_batch_size=1, seq_length=length),
        launch=LaunchConfig(device=config.device),
    )


def open_model(run: RunConfig, world: World, source: Source) -> tuple[Any, ...]:
    """This rank's share of the model with its weights. Collective."""
    if source.checkpoint is not None:
        chunks = megatron.empty_model(run, world)
        megatron.load_model(source.checkpoint, world, chunks)
        return chunks
    with ExitStack() as stack:
        weights = _weights(source, stack)
        impl = choose_impl(world.device)
        own = to_megatron(weights, run.model, parallel=run.parallel, rank=world.rank, impl=impl)
        return megatron.build_model(run, world, own)


def _weights(source: Source, stack: ExitStack) -> Mapping[str, Tensor]:
    assert source.hf is not None
    weights = stack.enter_context(open_hf(source.hf))
    if source.adapter is None:
        return weights
    from mbfn.convert.merge import Merged
    from mbfn.storage.adapters import open_adapter

    found = stack.enter_context(open_adapter(source.adapter, source.model))
    return Merged(weights, source.model, found.adapters, found.table, found.tensors)


def sampling_of(config: GenerateConfig) -> megatron.Sampling:
    """How tokens are drawn."""
    return megatron.Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed)


def _check_length(source: Source, prompt: list[int], config: GenerateConfig) -> None:
    room = source.model.max_position_embeddings - len(prompt)
    if config.max_tokens > room:
        raise ConfigError(
            [
                (
                    "max_tokens",
                    f"{len(prompt)} tokens of prompt and {config.max_tokens} new ones are beyond the model's "
                    f"{source.model.max_position_embeddings} positions; at most {max(room, 0)} fit",
                )
            ]
        )


def _printed(tokens: Iterator[int], tokenizer: Any) -> Iterator[int]:
    """`tokens`, their text printed as soon as it is whole: a character can take several."""
    new: list[int] = []
    shown = 0
    for token in tokens:
        new.append(token)
        text = tokenizer.decode(new, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)
        yield token
    sys.stdout.write(tokenizer.decode(new, skip_special_tokens=True)[shown:] + "\n")
    sys.stdout.flush()


def _report(config: GenerateConfig, tokenizer: Any, prompt: list[int], new: list[int], seconds: float) -> None:
    rate = len(new) / seconds
    if config.format == "text":
        print(f"[{len(prompt)} + {len(new)} tokens, {rate:.1f} tokens/s]", file=sys.stderr)
        return
    record = {
        "prompt": config.prompt,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": prompt,
        "tokens": new,
        "seconds": round(seconds, 4),
        "tokens_per_s": round(rate, 1),
    }
    print(json.dumps(record, ensure_ascii=False))
