"""A row of a chat set -> samples: tokens, and which of them are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbfn.config.data import ChatData
from mbfn.data.chat.forms import Conversation, conversations
from mbfn.data.chat.spans import Span, closes, reasoning_of, spans_of
from mbfn.data.chat.template import ChatTokenizer, Encoded, encode, guard, sentinel
from mbfn.data.sources import RowError


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ChatSample:
    """A conversation, or its part up to one turn, as tokens; `mask` is 1 where the token is trained."""

    ids: NDArray[np.int64]
    mask: NDArray[np.uint8]
    typed: int  # control tokens that stood in messages and became text


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Marked:
    """The text of a sample, with the characters that are trained."""

    text: str
    trained: tuple[tuple[int, int], ...]
    mark: str
    typed: int


def encode_rows(chat: ChatTokenizer, data: ChatData, rows: Sequence[Any]) -> list[list[ChatSample] | RowError]:
    """The samples of each row, or why there are none. A RowError among the rows stays what it is."""
    marked = [_marked(chat, data, row) for row in rows]
    flat = [part for parts in marked if not isinstance(parts, RowError) for part in parts]
    tokens = iter(encode(chat, [part.text for part in flat], [part.mark for part in flat]))
    return [
        parts if isinstance(parts, RowError) else _samples(chat, data, [(part, next(tokens)) for part in parts])
        for parts in marked
    ]


def _marked(chat: ChatTokenizer, data: ChatData, row: Any) -> list[Marked] | RowError:
    if isinstance(row, RowError):
        return row
    try:
        found = conversations(row, data.form, pairs=data.preference == "pairs")
        return [part for conversation in found for part in _parts(chat, data, conversation)]
    except RowError as error:
        return error


def _parts(chat: ChatTokenizer, data: ChatData, conversation: Conversation) -> Iterator[Marked]:
    """One sample, or one for each assistant turn that is trained."""
    if chat.bos and any(str(m["content"]).startswith(chat.bos) for m in conversation.messages):
        raise RowError(f"duplicated BOS: a message begins with {chat.bos!r}, which is the template's to write")
    if data.turns != "each":
        yield _mark(chat, data, conversation)
        return
    for number, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and message.get("weight", 1):
            part = replace(conversation, messages=conversation.messages[: number + 1])
            yield _mark(chat, data, part)


def _mark(chat: ChatTokenizer, data: ChatData, conversation: Conversation) -> Marked:
    guarded = guard(chat, conversation)
    safe, wanted = guarded.conversation, _wanted(data, conversation)
    text, spans = _plain(chat, safe) if chat.source is None else spans_of(chat, safe, wanted, sentinel(guarded))
    trained = [(0, len(text))] if data.train_on_prompt else [(span.start, span.stop) for span in spans]
    last = safe.messages[-1]["role"] == "assistant" and spans and spans[-1].message == len(safe.messages) - 1
    if last and chat.eos and not chat.marks_generation and closes(chat, text) is None:
        trained.append((len(text), len(text) + len(chat.eos)))
        text += chat.eos
    if not data.reasoning:
        hidden = [part for span in spans for part in reasoning_of(text, span)]
        trained = [piece for part in trained for piece in _without(part, hidden)]
    return Marked(text=text, trained=tuple(trained), mark=guarded.mark, typed=guarded.count)


def _wanted(data: ChatData, conversation: Conversation) -> list[int]:
    """Which messages are trained."""
    roles = [{"developer": "system"}.get(str(m["role"]), m["role"]) for m in conversation.messages]
    chosen = [number for number, role in enumerate(roles) if role in data.roles]
    if data.turns != "all":
        chosen = chosen[-1:]
    return [number for number in chosen if conversation.messages[number].get("weight", 1)]


def _plain(chat: ChatTokenizer, conversation: Conversation) -> tuple[str, list[Span]]:
    """Prompt and completion one after the other, for models without a template."""
    if [message["role"] for message in conversation.messages] != ["user", "assistant"]:
        raise RowError("more than a prompt and a completion, which chat_template=none cannot write")
    prompt, answer = (str(message["content"]) for message in conversation.messages)
    head = (chat.bos or "") + prompt
    return head + answer, [Span(1, len(head), len(head) + len(answer))]


def _samples(
    chat: ChatTokenizer, data: ChatData, parts: Sequence[tuple[Marked, Encoded | RowError]]
) -> list[ChatSample] | RowError:
    samples = []
    for marked, tokens in parts:
        if isinstance(tokens, RowError):
            return tokens
        mask = token_mask(tokens, marked.trained, chat.control_ids)
        if chat.bos and (tokens.ids[:2] == chat.tokenizer.bos_token_id).sum() == 2:
            return RowError(f"duplicated BOS: the text begins with {chat.bos!r} twice")
        if not mask[1:].any():
            return RowError("nothing to train on: no token of " + ", ".join(data.roles))
        samples.append(ChatSample(ids=tokens.ids, mask=mask, typed=marked.typed))
    return samples or RowError("nothing to train on: every turn has weight 0")


def token_mask(
    tokens: Encoded, trained: Sequence[tuple[int, int]], control_ids: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """1 for every token that holds a trained character, but for a control token before it that took the space."""
    mask = np.zeros(len(tokens.ids), dtype=np.uint8)
    for start, stop in trained:
        inside = (tokens.stops > start) & (tokens.starts < stop)
        inside[inside] &= (tokens.starts[inside] >= start) | ~np.isin(tokens.ids[inside], control_ids)
        mask[inside] = 1
    return mask


def _without(part: tuple[int, int], hidden: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """What is left of a stretch of characters."""
    pieces, start = [], part[0]
    for begin, end in sorted(hidden):
        if begin >= part[1] or end <= start:
            continue
        pieces.append((start, begin))
        start = max(start, end)
    return [(a, b) for a, b in [*pieces, (start, part[1])] if a < b]


def trained_text(row: Mapping[str, Any], chat: ChatTokenizer, data: ChatData) -> list[str]:
    """The trained characters of a row's first sample, for people to look at."""
    found = _marked(chat, data, row)
    if isinstance(found, RowError):
        raise found
    return [found[0].text[start:stop].replace(found[0].mark, "") for start, stop in found[0].trained]
