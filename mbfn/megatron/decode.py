"""Text from a rank's models, a token at a time, at any layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mbfn.megatron.cache import Cursor, cached
from mbfn.megatron.forward import evaluating, from_last_stage, length_multiple, over_vocabulary, pass_through
from mbfn.megatron.model import LanguageModel
from mbfn.megatron.rotary import short_context
from mbfn.megatron.sparse import check_length
from mbfn.megatron.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen from the scores. Temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int = 0  # only the so many likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that together have this probability
    seed: int = 0


GREEDY = Sampling()


def generate(
    world: World,
    chunks: Sequence[LanguageModel],
    prompt: Sequence[int],
    *,
    new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[int] = (),
) -> list[int]:
    """`prompt` continued by up to `new_tokens`, ending after one of `stop`. Collective; equal on every rank."""
    return [*prompt, *continuation(world, chunks, prompt, new_tokens=new_tokens, sampling=sampling, stop=stop)]


def continuation(
    world: World,
    chunks: Sequence[LanguageModel],
    prompt: Sequence[int],
    *,
    new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[int] = (),
) -> Iterator[int]:
    """The tokens that `generate` adds, each as soon as it is chosen. Collective.

    Keys and values of the text are kept, so that each token costs a pass of one token; with layers that carry a state
    along, one of the whole text.
    """
    config = chunks[0].config
    if config.dsa_indexer_n_heads:
        check_length(config.dsa_indexer_topk or 0, len(prompt) + new_tokens, "new_tokens")
    sampler = torch.Generator().manual_seed(sampling.seed)
    whole = len(prompt) + new_tokens
    multiple = _multiple(world, chunks[0], whole, whole)
    longest = short_context(chunks[0])
    with evaluating(chunks), cached(chunks, whole + 2 * multiple) as cursor:
        own = text = list(prompt)
        for _ in range(new_tokens):
            token = _agreed(choose(next_scores(world, chunks, own, cursor), sampling, sampler), world)
            yield token
            if token in stop:
                return
            text, own = [*text, token], [token]
            if chunks[0].has_state or (longest is not None and len(text) == longest + 1):
                cursor.start, own = 0, text  # states are not kept; from here on all keys turn at other frequencies


def next_scores(world: World, chunks: Sequence[LanguageModel], tokens: Sequence[int], cursor: Cursor) -> Tensor:
    """Scores of the token after `tokens`, which follow those of the passes before; the cursor moves behind them.

    To be called inside `cached`. Collective. Shapes: -> (V,) fp32
    """
    start, count = cursor.start, len(tokens)
    padded = count + -count % _multiple(world, chunks[0], count, start + count)
    batch = torch.zeros(1, padded, dtype=torch.int64)
    batch[0, :count] = torch.tensor(tokens)
    positions = torch.arange(start, start + padded, device=world.device)
    with torch.no_grad():
        own = pass_through(world, chunks, batch.to(world.device), positions, at=slice(count - 1, count))
        whole = None if own is None else over_vocabulary(own, world)
        scores = from_last_stage(whole, (1, 1, chunks[0].unpadded_vocab_size), world)
    cursor.start += count
    return scores[0, 0]


def choose(scores: Tensor, sampling: Sampling, sampler: torch.Generator) -> int:
    """The next token. Of those with `top_p` of the probability, the one that passes it counts too."""
    if sampling.temperature == 0:
        return int(scores.argmax())
    shares = (scores.float().cpu() / sampling.temperature).softmax(-1)
    shares, order = shares.sort(descending=True, stable=True)
    keep = shares.cumsum(-1) - shares < sampling.top_p
    keep[sampling.top_k or len(keep) :] = False
    return int(order[torch.multinomial(shares * keep, 1, generator=sampler)])


def _multiple(world: World, model: LanguageModel, count: int, text: int) -> int:
    """What the length of a pass of `count` tokens has to divide by. What fills it up comes after the text, unseen."""
    parallel = world.parallel
    multiple = parallel.tp if parallel.sequence_parallel else 1
    if count > 1:
        multiple = length_multiple(world, model, multiple, text)
    return math.lcm(multiple, 16 * multiple) if model.config.fp8 else multiple


def _agreed(token: int, world: World) -> int:
    """The first rank's choice: others may have rounded the scores differently."""
    if world.world_size == 1:
        return token
    chosen = torch.tensor([token], device=world.device)
    dist.broadcast(chosen, src=0)
    return int(chosen)
