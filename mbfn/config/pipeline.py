"""Explicit pipeline layouts in Megatron's notation: which layers every stage and chunk holds, written out."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mbfn.errors import ConfigError

FIELD = "pipeline_model_parallel_layout"
_LAYERS = {"E": "the embedding", "t": "a decoder layer", "m": "a layer for further tokens", "L": "the loss"}
# Repetitions, innermost first: a bracket without brackets in it, then a single layer.
_REPEATED = (re.compile(r"\(([^()]*)\)\*(\d+)"), re.compile(r"([EtmL|])\*(\d+)"))


def parse_layout(text: str) -> tuple[str, ...]:
    """The layers of each slot in the order that a token passes them: `E`, `t`, `m` and `L`, one letter a layer.

    `Ettt|(tt|)*2tL` is `("Ettt", "tt", "tt", "tL")`: bars part the slots, `*n` repeats a layer or a bracket, commas
    mean nothing. Source: megatron-core@transformer/pipeline_parallel_layer_layout.py.

    Raises: ConfigError for a letter or an order that no pipeline has.
    """
    flat = text.replace(",", "").replace(" ", "")
    for pattern in _REPEATED:
        flat = pattern.sub(lambda found: found[1] * int(found[2]), flat)
    problems = [(FIELD, problem) for problem in _faults(flat)]
    if problems:
        raise ConfigError(problems)
    return tuple(flat.split("|"))


def layout_layers(slots: tuple[str, ...]) -> list[int]:
    """Decoder layers of each slot."""
    return [slot.count("t") for slot in slots]


def _faults(flat: str) -> Iterator[str]:
    unknown = sorted(set(flat) - {*_LAYERS, "|"})
    if unknown:
        known = ", ".join(f"{letter} for {meaning}" for letter, meaning in _LAYERS.items())
        yield f"expected {known}, | between stages and *n after a layer or a bracket; found {unknown}"
        return
    layers = flat.replace("|", "")
    for letter, place, holds in (
        ("E", "first", layers.startswith("E")),
        ("L", "last", layers.endswith("L")),
    ):
        if layers.count(letter) != 1 or not holds:
            yield f"expected {letter} ({_LAYERS[letter]}) once, as the {place} layer; found {layers.count(letter)}"
    last = flat.rpartition("|")[2]
    if "m" in layers and (layers.count("m") != last.count("m") or "t" in last[last.find("m") :]):
        yield "expected every m in the last stage, after its t and before L; write for example tm*1L there"
