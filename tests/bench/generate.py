"""Tokens a second of `mbfn.megatron.generate` beside transformers: `python -m tests.bench.generate [HF_DIR]`.

Without a directory: a model of random weights that fits the machine. Greedy, one text, keys and values kept by both.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mbfn import megatron
from mbfn.families import model_from_hf
from mbfn.generate.options import GenerateConfig
from mbfn.generate.source import Source
from mbfn.generate.text import open_model, run_of

PROMPT, NEW = 64, 64


def rate(make: Callable[[int], list[int]]) -> tuple[float, list[int]]:
    """Tokens a second after the first ones, which warm up, and the text."""
    make(4)
    started = time.perf_counter()
    text = make(NEW)
    return NEW / (time.perf_counter() - started), text


def random_model(directory: Path) -> None:
    """28 M parameters on a CPU, 0.4 B on a GPU."""
    hidden, layers = (1024, 24) if torch.cuda.is_available() else (512, 8)
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128, "vocab_size": 8192}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False)).save_pretrained(directory)


def transformers_rate(directory: Path, prompt: list[int]) -> tuple[float, list[int]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    ids = torch.tensor([prompt], device=device)

    def make(new: int) -> list[int]:
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()

    return rate(make)


def megatron_rate(directory: Path, prompt: list[int]) -> tuple[float, list[int]]:
    source = Source(model=model_from_hf(directory), tokenizer=directory, hf=directory)
    run = run_of(source, GenerateConfig(hf=str(directory), prompt="-"))
    with megatron.open_world(run.parallel) as world:
        chunks = open_model(run, world, source)
        return rate(lambda new: megatron.generate(world, chunks, prompt, new_tokens=new))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch)
        if len(sys.argv) == 1:
            random_model(directory)
        size = model_from_hf(directory).vocab_size
        prompt = torch.randint(3, size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
        theirs, expected = transformers_rate(directory, prompt)
        ours, found = megatron_rate(directory, prompt)
        same = sum(a == b for a, b in zip(found, expected, strict=True)) - PROMPT
        print(f"transformers {theirs:.1f} tokens/s, mbfn {ours:.1f} tokens/s, {same} of {NEW} tokens equal")


if __name__ == "__main__":
    main()
