"""What `python -m mbfn.generate` takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mbfn.config.parallel import ParallelConfig
from mbfn.errors import ConfigError, require


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """Which model continues which text. Give one of `hf`, `megatron` and `run`."""

    prompt: str = ""
    hf: str | None = None  # a Hugging Face directory
    adapter: str | None = None  # a PEFT directory, added to the weights of hf
    megatron: str | None = None  # a torch_dist checkpoint of any layout, of a run or a conversion
    run: str | None = None  # a directory of mbfn.train: its last checkpoint
    config: str | None = None  # for a checkpoint that does not describe its model: where a config.json does
    tokenizer: str | None = None  # a directory with a tokenizer.json; none: the model's
    chat: bool = False  # put the prompt into the tokenizer's chat template, as the user's turn
    system: str = ""  # the system's turn before it
    max_tokens: int = 128
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # draw among the so many likeliest; 0: all
    top_p: float = 1.0  # draw among the likeliest that together have this probability
    seed: int = 1234
    ignore_eos: bool = False  # go on after the token that ends a text
    parallel: ParallelConfig = ParallelConfig()  # the ranks that hold the model
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU, fp32 elsewhere
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        given = sum(source is not None for source in (self.hf, self.megatron, self.run))
        require(given == 1, "hf", "give one model: hf=DIR, megatron=DIR or run=DIR", problems)
        require(bool(self.prompt), "prompt", 'give the text to continue: prompt="Once upon a time"', problems)
        require(self.adapter is None or self.hf is not None, "adapter", "is added to hf=DIR; give that", problems)
        fits = self.config is None or self.megatron is not None
        require(fits, "config", "describes a Megatron checkpoint: give it with megatron=DIR", problems)
        require(self.chat or not self.system, "system", "is a turn of a chat: give it with chat=true", problems)
        require(self.max_tokens >= 1, "max_tokens", f"expected at least 1, got {self.max_tokens}", problems)
        require(self.top_k >= 0, "top_k", f"expected at least 0, got {self.top_k}", problems)
        require(self.temperature >= 0, "temperature", f"expected at least 0, got {self.temperature}", problems)
        require(0 < self.top_p <= 1, "top_p", f"expected above 0 and at most 1, got {self.top_p}", problems)
        drawn = self.temperature > 0 or (self.top_k == 0 and self.top_p == 1)
        require(drawn, "temperature", "top_k and top_p are for drawing: set temperature above 0", problems)
        if problems:
            raise ConfigError(problems)
