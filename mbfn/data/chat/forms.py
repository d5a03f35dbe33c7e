"""The forms in which people keep conversations, each turned into messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mbfn.data.sources import RowError

Form = Literal["messages", "sharegpt", "alpaca", "completion", "preference"]
Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_KEYS: dict[Form, tuple[str, ...]] = {  # that tell a form, the first of them a list of messages or a text
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages as chat templates take them, and the tools that the model may call."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None = None


def conversations(row: Mapping[str, Any], form: Form | Literal["auto"], *, pairs: bool) -> tuple[Conversation, ...]:
    """The conversation of a row; with `pairs` the chosen one, then the rejected one.

    Raises: RowError saying what is missing.
    """
    row = {key: value for key, value in row.items() if value is not None}
    known = form_of(row) if form == "auto" else form
    missing = [key for key in _KEYS[known] if key not in row]
    if missing:
        raise RowError(f"no {missing[0]!r} for the form {known}; found {', '.join(map(repr, row)) or 'nothing'}")
    if pairs and known != "preference":
        raise RowError(f"no pair of 'chosen' and 'rejected'; found {', '.join(map(repr, row))}")
    tools = _tools(row.get("tools"))
    sides = ("chosen", "rejected") if pairs else ("chosen",)
    found = [_preference(row, side) for side in sides] if known == "preference" else [_READERS[known](row)]
    return tuple(Conversation(messages=_checked(messages), tools=tools) for messages in found)


def form_of(row: Mapping[str, Any]) -> Form:
    """The form that the keys tell."""
    for form, keys in _KEYS.items():
        if all(key in row for key in keys):
            return form
    raise RowError(
        "none of messages, conversations, instruction and output, prompt and completion, chosen and rejected; found "
        + (", ".join(map(repr, row)) or "nothing")
    )


def _messages(row: Mapping[str, Any]) -> Sequence[Any]:
    return _listed(row["messages"], "messages")


def _sharegpt(row: Mapping[str, Any]) -> Sequence[Any]:
    turns = _listed(row["conversations"], "conversations")
    head = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return head + [_sharegpt_turn(turn, number) for number, turn in enumerate(turns, start=1)]


def _sharegpt_turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping) or turn.get("from", turn.get("role")) is None:
        raise RowError(f"missing role: turn {number} has no 'from'")
    speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    extra = {key: turn[key] for key in ("weight",) if key in turn}
    if speaker == "function_call":
        call = _json(text, f"turn {number}: a function_call")
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}], **extra}
    if speaker not in _SHAREGPT:
        raise RowError(f"missing role: turn {number} is from {speaker!r}, expected one of {', '.join(_SHAREGPT)}")
    return {"role": _SHAREGPT[speaker], "content": text, **extra}


def _alpaca(row: Mapping[str, Any]) -> Sequence[Any]:
    asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    head = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    past = [
        {"role": role, "content": text}
        for pair in row.get("history") or []
        for role, text in zip(("user", "assistant"), pair, strict=False)
    ]
    return [*head, *past, {"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def _completion(row: Mapping[str, Any]) -> Sequence[Any]:
    return _joined(row["prompt"], row["completion"])


def _preference(row: Mapping[str, Any], side: str) -> Sequence[Any]:
    if "prompt" not in row and not isinstance(row[side], list):
        raise RowError(f"no 'prompt' before {side!r}, which is a text")
    return _joined(row.get("prompt", []), row[side])


def _joined(prompt: Any, answer: Any) -> Sequence[Any]:
    """A prompt and an answer, each a text or a list of messages."""
    head = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    tail = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    return [*head, *tail]


_READERS: dict[Form, Callable[[Mapping[str, Any]], Sequence[Any]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "completion": _completion,
}


def _checked(messages: Sequence[Any]) -> tuple[Message, ...]:
    found = tuple(_message(message, number) for number, message in enumerate(messages, start=1))
    answers = [message for message in found if message["role"] == "assistant"]
    if not answers:
        raise RowError("no assistant turn")
    if not any(answers[-1].get(key) for key in ("content", "tool_calls", "reasoning_content")):
        raise RowError("empty completion: the last assistant turn says nothing")
    return found


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, Mapping) or message.get("role") is None:
        raise RowError(f"missing role: message {number} has no 'role'")
    known = {key: value for key, value in message.items() if value is not None}
    if known["role"] not in ROLES:
        raise RowError(f"missing role: message {number} has {known['role']!r}, expected one of {', '.join(ROLES)}")
    if "content" not in known and not known.get("tool_calls"):
        raise RowError(f"message {number} has no 'content'")
    known["content"] = _text(known.get("content", ""), number)
    if known.get("tool_calls"):
        known["tool_calls"] = [_call(call, number) for call in _listed(known["tool_calls"], "tool_calls")]
    else:
        known.pop("tool_calls", None)
    if known.get("weight", 1) not in (0, 1):
        raise RowError(f"message {number}: weight is 0 or 1, found {known['weight']!r}")
    return known


def _text(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise RowError(f"message {number}: content is neither a text nor a list of texts")
    return "".join(map(str, texts))


def _call(call: Any, number: int) -> Message:
    """A tool call whose arguments are an object, as templates expect them, not JSON in a text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise RowError(f"message {number}: a tool call without 'name'")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments, f"message {number}: the arguments of {function['name']}")
    plain = {key: call[key] for key in ("id",) if call.get(key) is not None}
    return {"type": "function", **plain, "function": {**function, "arguments": arguments}}


def _tools(tools: Any) -> tuple[Any, ...] | None:
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else None
    return tuple(tools) if tools else None


def _listed(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        value = _json(value, name)
    if not isinstance(value, list) or not value:
        raise RowError(f"{name!r} is {'empty' if value == [] else type(value).__name__}, expected a list")
    return value


def _json(text: Any, what: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise RowError(f"broken JSON: {what}: {error}") from error
