"""Small tokenizers with the chat templates of ten families, and what each says by hand: the oracle of the masks.

The templates beside this file are written after the published ones. An oracle knows neither Jinja nor prefixes: it
lists the pieces of a conversation's text and says which of them the assistant generates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEMPLATES = Path(__file__).parent / "templates"
DATE = "2026-03-05"
Pieces = list[tuple[str, bool]]
Message = Mapping[str, Any]
_TEXT = [
    "The capital of France is Paris. What is the weather in Rome? Sunny, twenty degrees. {}[]:,<|>/_ name city\n"
] * 3


@dataclass(frozen=True, kw_only=True)
class Family:
    """A template, its tokens, and the oracle."""

    name: str
    oracle: Callable[[Sequence[Message]], Pieces]
    special: tuple[str, ...]
    markup: tuple[str, ...] = ()
    bos: str | None = None
    eos: str
    closing: str  # what a user would type to end a turn
    pieces: bool = False  # SentencePiece's alphabet with bytes to fall back on, not bytes
    rstrip: bool = False  # control tokens take the space behind them
    tools: bool = True


def build_tokenizer(family: Family, directory: Path, template: str | None = None) -> Path:
    """The family's tokenizer as a Hugging Face directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(_trained(family.pieces))
    added = [AddedToken(text, special=True, normalized=False, rstrip=family.rstrip) for text in family.special]
    tokenizer.add_tokens([*added, *(AddedToken(text, special=False, normalized=False) for text in family.markup)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": family.eos, "bos_token": family.bos}
    (directory / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v}))
    text = template if template is not None else (TEMPLATES / f"{family.name}.jinja").read_text()
    (directory / "chat_template.jinja").write_text(text)
    return directory


@cache
def _trained(pieces: bool) -> str:
    if not pieces:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(_TEXT, trainer)
        return str(tokenizer.to_str())
    plain = Tokenizer(models.BPE())
    plain.normalizer = normalizers.Replace(" ", "▁")
    plain.train_from_iterator(_TEXT, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    tree = json.loads(plain.to_str())
    found = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    found |= {token: len(found) + rank for token, rank in tree["model"]["vocab"].items()}
    merges = [tuple(pair) for pair in tree["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=found, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return str(tokenizer.to_str())


def _call(message: Message) -> Mapping[str, Any]:
    return dict(message["tool_calls"][0]["function"])


def _arguments(message: Message) -> str:
    return json.dumps(_call(message)["arguments"])


def llama3(messages: Sequence[Message]) -> Pieces:
    has_system = messages[0]["role"] == "system"
    system = messages[0]["content"] if has_system else ""
    head = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 05 Mar 2026\n\n"
    pieces: Pieces = [(f"{head}{system}<|eot_id|>", False)]
    for m in messages[has_system:]:
        role = {"tool": "ipython"}.get(m["role"], m["role"])
        content = json.dumps(m["content"]) if m["role"] == "tool" else m["content"].strip()
        if "tool_calls" in m:
            content = f'{{"name": "{_call(m)["name"]}", "parameters": {_arguments(m)}}}'
        pieces += [
            (f"<|start_header_id|>{role}<|end_header_id|>\n\n", False),
            (f"{content}<|eot_id|>", role == "assistant"),
        ]
    return pieces


def mistral(messages: Sequence[Message]) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for m in messages:
        content = m["content"]
        if m["role"] == "system":
            pieces.append((f"[SYSTEM_PROMPT]{content}[/SYSTEM_PROMPT]", False))
        elif m["role"] == "user":
            pieces.append((f"[INST]{content}[/INST]", False))
        elif m["role"] == "tool":
            pieces.append((f'[TOOL_RESULTS] {{"content": {json.dumps(content)}}}[/TOOL_RESULTS]', False))
        elif "tool_calls" in m:
            pieces.append((f"[TOOL_CALLS] [{json.dumps(_call(m))}]</s>", True))
        else:
            pieces.append((f" {content}</s>", True))
    return pieces


def _chatml(messages: Sequence[Message], default: str = "") -> Pieces:
    pieces: Pieces = [(f"<|im_start|>system\n{default}<|im_end|>\n", False)] if default else []
    for m in messages:
        content, role = m["content"], m["role"]
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        if "tool_calls" in m:
            call = f'<tool_call>\n{{"name": "{_call(m)["name"]}", "arguments": {_arguments(m)}}}\n</tool_call>'
            content = f"{content}\n{call}" if content else call
        pieces += [(f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>", role == "assistant"), ("\n", False)]
    return pieces


def qwen25(messages: Sequence[Message]) -> Pieces:
    return _chatml(messages, "" if messages[0]["role"] == "system" else "You are Qwen.")


def qwen3(messages: Sequence[Message]) -> Pieces:
    last_user = max(i for i, m in enumerate(messages) if m["role"] == "user")
    pieces: Pieces = []
    for i, m in enumerate(messages):
        head, said, tail = _chatml([m])
        reasoning = m.get("reasoning_content", "")
        if m["role"] == "assistant" and i > last_user and (i == len(messages) - 1 or reasoning):
            said = (f"<think>\n{reasoning}\n</think>\n\n{said[0]}", True)
        pieces += [head, said, tail]
    return pieces


def gemma(messages: Sequence[Message]) -> Pieces:
    has_system = messages[0]["role"] == "system"
    head = messages[0]["content"] + "\n\n" if has_system else ""
    pieces: Pieces = [("<bos>", False)]
    for i, m in enumerate(messages[has_system:]):
        role = {"assistant": "model"}.get(m["role"], m["role"])
        said = f"{head if i == 0 else ''}{m['content'].strip()}<end_of_turn>"
        pieces += [(f"<start_of_turn>{role}\n", False), (said, role == "model"), ("\n", False)]
    return pieces


def deepseek(messages: Sequence[Message]) -> Pieces:
    system = "".join(m["content"] for m in messages if m["role"] == "system")
    pieces: Pieces = [("<｜begin▁of▁sentence｜>" + system, False)]
    after_tool = False
    for m in messages:
        content = m["content"]
        if m["role"] == "user":
            pieces.append((f"<｜User｜>{content}", False))
        elif m["role"] == "tool":
            inner = f"<｜tool▁output▁begin｜>{content}<｜tool▁output▁end｜>"
            pieces.append((f"<｜tool▁outputs▁begin｜>{inner}<｜tool▁outputs▁end｜>", False))
        elif m["role"] == "assistant":
            if "tool_calls" in m:
                call = f"function<｜tool▁sep｜>{_call(m)['name']}\n```json\n{_arguments(m)}\n```<｜tool▁call▁end｜>"
                content = f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{call}<｜tool▁calls▁end｜>"
            pieces += [("" if after_tool else "<｜Assistant｜>", False), (content + "<｜end▁of▁sentence｜>", True)]
        after_tool = m["role"] == "tool"
    return pieces


def gpt_oss(messages: Sequence[Message]) -> Pieces:
    pieces: Pieces = [("<|start|>system<|message|>You are ChatGPT.\nCurrent date: 2026-03-05<|end|>", False)]
    name = ""
    for i, m in enumerate(messages):
        content, thought = m["content"], m.get("reasoning_content")
        if m["role"] == "system":
            pieces.append((f"<|start|>developer<|message|># Instructions\n\n{content}\n\n<|end|>", False))
        elif m["role"] == "user":
            pieces.append((f"<|start|>user<|message|>{content}<|end|>", False))
        elif m["role"] == "tool":
            head = f"<|start|>functions.{name} to=assistant<|channel|>commentary<|message|>"
            pieces.append((f"{head}{json.dumps(content)}<|end|>", False))
        else:
            last = i == len(messages) - 1
            said = f"<|channel|>final<|message|>{content}{'<|return|>' if last else '<|end|>'}"
            if "tool_calls" in m:
                name = _call(m)["name"]
                said = f" to=functions.{name}<|channel|>commentary json<|message|>{_arguments(m)}<|call|>"
            if thought and (last or "tool_calls" in m):
                said = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant{said}"
            pieces += [("<|start|>assistant", False), (said, True)]
    return pieces


def glm4(messages: Sequence[Message]) -> Pieces:
    pieces: Pieces = [("[gMASK]<sop>", False)]
    for i, m in enumerate(messages):
        role, last = {"tool": "observation"}.get(m["role"], m["role"]), i == len(messages) - 1
        said = f"\n{m['content']}" if "tool_calls" not in m else f"{_call(m)['name']}\n{_arguments(m)}"
        end = "<|endoftext|>" if last and role == "assistant" else ""  # nothing else tells the model to stop
        pieces += [(f"<|{role}|>", False), (said + end, role == "assistant")]
    return pieces


def phi3(messages: Sequence[Message]) -> Pieces:
    pieces: Pieces = []
    for m in messages:
        said = (f"{m['content']}<|end|>", m["role"] == "assistant")
        pieces += [(f"<|{m['role']}|>\n", False), said, ("\n", False)]
    return [*pieces, ("<|endoftext|>", False)]


def phi4(messages: Sequence[Message]) -> Pieces:
    return [
        piece
        for m in messages
        for piece in (
            (f"<|im_start|>{m['role']}<|im_sep|>", False),
            (f"{m['content']}<|im_end|>", m["role"] == "assistant"),
        )
    ]


_CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_TOOLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_CALLS = tuple(
    f"<｜tool▁{what}｜>"
    for what in (
        "calls▁begin calls▁end call▁begin call▁end sep outputs▁begin outputs▁end output▁begin output▁end"
    ).split()
)
_HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>", "<|return|>", "<|startoftext|>")
_LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "[TOOL_RESULTS]")
_GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>")
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")

FAMILIES = (
    Family(
        name="llama3", oracle=llama3, special=_LLAMA, bos="<|begin_of_text|>", eos="<|eot_id|>", closing="<|eot_id|>"
    ),
    Family(
        name="mistral",
        oracle=mistral,
        special=(*_MISTRAL, "[/TOOL_RESULTS]"),
        bos="<s>",
        eos="</s>",
        closing="[/INST]",
        pieces=True,
    ),
    Family(name="qwen25", oracle=qwen25, special=_CHATML, markup=_TOOLS, eos="<|im_end|>", closing="<|im_end|>"),
    Family(
        name="qwen3",
        oracle=qwen3,
        special=_CHATML,
        markup=(*_TOOLS, "<think>", "</think>"),
        eos="<|im_end|>",
        closing="<|im_end|>",
    ),
    Family(
        name="gemma",
        oracle=gemma,
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        closing="<end_of_turn>",
        pieces=True,
        tools=False,
    ),
    Family(
        name="deepseek",
        oracle=deepseek,
        special=(*_DEEPSEEK, *_CALLS),
        markup=("<think>", "</think>"),
        bos=_DEEPSEEK[0],
        eos=_DEEPSEEK[1],
        closing=_DEEPSEEK[1],
    ),
    Family(
        name="gpt_oss", oracle=gpt_oss, special=_HARMONY, bos="<|startoftext|>", eos="<|return|>", closing="<|end|>"
    ),
    Family(name="glm4", oracle=glm4, special=_GLM, eos="<|endoftext|>", closing="<|user|>"),
    Family(name="phi3", oracle=phi3, special=_PHI, eos="<|endoftext|>", closing="<|end|>", rstrip=True, tools=False),
    Family(
        name="phi4", oracle=phi4, special=(*_CHATML, "<|im_sep|>"), eos="<|im_end|>", closing="<|im_end|>", tools=False
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}
