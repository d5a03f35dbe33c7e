"""Where each turn lies in the text of a conversation: said by the template, or proven by rendering its prefixes.

A template without `{% generation %}` is asked three questions for an assistant's turn. Is the text before the turn,
rendered as a prompt, the beginning of the whole text? Is the text up to the turn's end? And does the turn hold the
words of its message? Where a template writes a turn differently once others follow (it drops old reasoning, say), the
end is the last token between the turn's start and the next message's words that closes turns elsewhere in this
conversation. What cannot be answered so is a RowError: there is no guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mbfn.data.chat.forms import Conversation
from mbfn.data.chat.template import ChatTokenizer, render, render_tracked
from mbfn.data.sources import RowError

REASONING = (  # what stands round a model's reasoning; of gpt-oss, a channel and the end of its message
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
)
_ADVICE = "use data.turns=each or data.turns=last, or a template with {% generation %}"


@dataclass(frozen=True, slots=True)
class Span:
    """Characters of the text that message number `message` (from 0) wrote."""

    message: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Rendered:
    """A conversation's text."""

    chat: ChatTokenizer
    conversation: Conversation
    sentinel: str  # a character that is nowhere in it
    text: str

    def before(self, count: int) -> Conversation:
        """The first messages."""
        return replace(self.conversation, messages=self.conversation.messages[:count])

    def saying(self, number: int, words: str, *, last: bool = False) -> Conversation:
        """The conversation in which message `number` says something else; with `last`, and nothing after it."""
        messages = list(self.conversation.messages)
        messages[number] = {**messages[number], "content": words}
        return replace(self.conversation, messages=tuple(messages[: number + 1] if last else messages))


def spans_of(
    chat: ChatTokenizer, conversation: Conversation, wanted: Sequence[int], sentinel: str
) -> tuple[str, list[Span]]:
    """The text of a conversation and the spans of its messages `wanted` (from 0), in order.

    Raises: RowError where the template does not let them be told.
    """
    messages = conversation.messages
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if chat.marks_generation:
        text, found = render_tracked(chat, conversation)
        if len(found) != len(answers):
            raise RowError(f"the chat template marks {len(found)} spans for {len(answers)} assistant turns")
        told = dict(zip(answers, found, strict=True))
    else:
        text, told = render(chat, conversation), {}
    rendered = Rendered(chat=chat, conversation=conversation, sentinel=sentinel, text=text)
    spans = [
        Span(number, *told[number])
        if number in told
        else _assistant(rendered, number)
        if number in answers
        else _other(rendered, number)
        for number in wanted
    ]
    for first, second in pairwise(spans):
        if second.start < first.stop:
            raise RowError(f"messages {first.message + 1} and {second.message + 1} overlap in the text; {_ADVICE}")
    return text, spans


def reasoning_of(text: str, span: Span) -> list[tuple[int, int]]:
    """The parts of a span that are reasoning, from the opening to the closing mark."""
    found = []
    for opening, closing in REASONING:
        place, shut = span.start, text.find(closing, span.start, span.stop)
        opened = text.find(opening, span.start, span.stop)
        if shut >= 0 and "think" in closing.lower() and (opened < 0 or shut < opened):
            found.append((span.start, shut + len(closing)))  # opened by the prompt
            place = shut + len(closing)
        while (start := text.find(opening, place, span.stop)) >= 0:
            stop = text.find(closing, start, span.stop)
            place = span.stop if stop < 0 else stop + len(closing)
            found.append((start, place))
    return found


def closes(chat: ChatTokenizer, text: str) -> str | None:
    """The control token that a text ends with, whatever space follows it."""
    shown = text.rstrip()
    return next((token for token in chat.special if shown.endswith(token)), None)


def _assistant(rendered: Rendered, number: int) -> Span:
    start = _start(rendered, number)
    stop = _stop(rendered, number, start)
    said = str(rendered.conversation.messages[number]["content"]).rpartition("</think>")[2].strip()
    if said and said not in rendered.text[start:stop]:
        raise RowError(f"message {number + 1}: the chat template does not write what it says; {_ADVICE}")
    return Span(number, start, stop)


def _start(rendered: Rendered, number: int) -> int:
    text, before = rendered.text, rendered.before(number)
    prompt = _try(rendered, before, prompt=True)
    if prompt is None:
        raise RowError(f"message {number + 1}: the chat template cannot write a prompt for it; {_ADVICE}")
    opened = next((opening for opening, _ in REASONING if prompt.rstrip().endswith(opening)), None)
    for head in [prompt] if opened is None else [prompt, prompt.rstrip().removesuffix(opened)]:
        if text.startswith(head):
            _require_prompt(rendered, number, head)
            return len(head)
    raise RowError(
        f"message {number + 1}: what the chat template writes before it changes as the conversation goes on; {_ADVICE}"
    )


def _require_prompt(rendered: Rendered, number: int, head: str) -> None:
    """A template that ignores `add_generation_prompt` must not write anything before the words of a turn."""
    if head != _try(rendered, rendered.before(number), prompt=False):
        return
    other = {"role": "assistant", "content": rendered.sentinel}
    probe = replace(rendered.conversation, messages=(*rendered.conversation.messages[:number], other))
    rest = (_try(rendered, probe, prompt=False) or "")[len(head) :].partition(rendered.sentinel)[0]
    for opening, closing in REASONING:
        rest = rest.replace(opening, "").replace(closing, "")
    if rest.strip():
        raise RowError(
            f"message {number + 1}: the chat template has neither {{% generation %}} nor a generation prompt, so that "
            f"{rest.strip()!r} before the turn cannot be told from it; give a data.chat_template=FILE.jinja with one"
        )


def _stop(rendered: Rendered, number: int, start: int) -> int:
    text, message = rendered.text, rendered.conversation.messages[number]
    whole = _try(rendered, rendered.before(number + 1), prompt=False)
    kept = whole is not None and len(whole) >= start and text.startswith(whole)
    turn = (whole or "")[start:].rstrip() if kept else ""
    closing = closes(rendered.chat, turn)
    if closing and not any(token in turn.removesuffix(closing) for token in rendered.chat.special):
        return start + len(turn)
    if not message.get("tool_calls") and (stop := _after_words(rendered, number)) is not None:
        return stop
    if kept and whole is not None:
        return start + len(turn) if closing else len(whole)
    return _last_closing(rendered, number, start)


def _after_words(rendered: Rendered, number: int) -> int | None:
    """The end of the token that closes the turn right behind its words when nothing follows, if it does here too."""
    try:
        stop = _words(rendered, number)[1]
    except RowError:
        return None
    alone = _try(rendered, rendered.saying(number, rendered.sentinel, last=True), prompt=False) or ""
    tail, rest = alone.partition(rendered.sentinel)[2].lstrip(), rendered.text[stop:]
    if not tail:
        return stop
    token = _opens(rendered.chat, tail)
    if token is None or not rest.lstrip().startswith(token):
        return None
    return stop + len(rest) - len(rest.lstrip()) + len(token)


def _last_closing(rendered: Rendered, number: int, start: int) -> int:
    """The last token before the next message's words that closes turns elsewhere in the conversation."""
    text, messages = rendered.text, rendered.conversation.messages
    limit = len(text)
    if number + 1 < len(messages):
        limit = _agree(text, _try(rendered, rendered.saying(number + 1, rendered.sentinel), prompt=False) or "")
    ends = [_try(rendered, rendered.before(count), prompt=False) for count in range(1, len(messages) + 1)]
    tokens = {token for end in ends if end and (token := closes(rendered.chat, end))}
    places = [place + len(token) for token in tokens if (place := text.rfind(token, start, limit)) >= 0]
    if not places:
        raise RowError(f"message {number + 1}: it cannot be told where the chat template ends it; {_ADVICE}")
    return max(places)


def _other(rendered: Rendered, number: int) -> Span:
    """The words of a system, user or tool message, and the token that closes it."""
    start, stop = _words(rendered, number)
    return Span(number, start, _after_words(rendered, number) or stop)


def _words(rendered: Rendered, number: int) -> tuple[int, int]:
    """Where the content of a message lies, proven by putting other words in its place."""
    said = str(rendered.conversation.messages[number]["content"])
    head, found, tail = (_try(rendered, rendered.saying(number, rendered.sentinel), prompt=False) or "").partition(
        rendered.sentinel
    )
    for words in (said, said.strip(), said.rpartition("</think>")[2].strip()):
        if found and rendered.text == head + words + tail:
            return len(head), len(head) + len(words)
    raise RowError(f"message {number + 1}: it cannot be told where the chat template writes it; {_ADVICE}")


def _try(rendered: Rendered, conversation: Conversation, *, prompt: bool) -> str | None:
    try:
        return render(rendered.chat, conversation, prompt=prompt)
    except RowError:
        return None


def _opens(chat: ChatTokenizer, text: str) -> str | None:
    return next((token for token in chat.special if text.startswith(token)), None)


def _agree(first: str, second: str) -> int:
    """Length of the common beginning."""
    differing = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))
