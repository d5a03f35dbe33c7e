"""A model's chat template and tokenizer: messages -> text, text -> tokens, with what people wrote kept harmless."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mbfn.data.chat.forms import Conversation, Message
from mbfn.data.sources import RowError
from mbfn.errors import DataError

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # noncharacters: no text means anything by them
_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ChatTokenizer:
    """How one model writes conversations. `source` is its Jinja template; none: prompts and completions as they are."""

    tokenizer: Any  # of transformers
    backend: Any  # of tokenizers, without a post-processor: no tokens added, offsets whole
    source: str | None
    special: tuple[str, ...]  # control tokens
    markup: tuple[str, ...]  # tokens that the template writes and that are not special, such as <think>
    control_ids: NDArray[np.int64]  # of the special tokens but the unknown one
    bos: str | None
    eos: str | None

    @property
    def marks_generation(self) -> bool:
        """Whether the template itself says what the model generates."""
        return self.source is not None and _GENERATION.search(self.source) is not None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Encoded:
    """Tokens and where each lies in the text."""

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarded:
    """A conversation in which every control token that somebody typed is broken by `mark`."""

    conversation: Conversation
    mark: str
    count: int


def open_chat_tokenizer(directory: Path, chat_template: str, today: str) -> ChatTokenizer:
    """The tokenizer of a directory with its template, that of a file, or none.

    Raises: DataError where there is no template, or the tokenizer cannot say where tokens lie.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # transformers raises whatever its readers do
        raise DataError(
            f"data.tokenizer: transformers cannot read {directory}: {str(error).splitlines()[0]}"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(f"data.tokenizer: {directory} has no tokenizer.json, without which no mask can be placed")
    source = template_source(tokenizer, chat_template, directory)
    fixed = None if source is None else _DATE.sub(lambda found: _told(found[2], today), source)
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    special = tuple(sorted({token.content for token in added if token.special}, key=len, reverse=True))
    control = tokenizer.convert_tokens_to_ids([token for token in special if token != tokenizer.unk_token])
    return ChatTokenizer(
        tokenizer=tokenizer,
        backend=_bare(tokenizer),
        source=fixed,
        special=special,
        markup=tuple(token.content for token in added if not token.special and token.content in (source or "")),
        control_ids=np.asarray(control, dtype=np.int64),
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
    )


def template_source(tokenizer: Any, chat_template: str, directory: Path) -> str | None:
    """The Jinja text that `data.chat_template` names."""
    if chat_template == "none":
        return None
    if chat_template == "auto":
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:
            raise DataError(
                f"data.chat_template: {directory} has no chat template; give data.chat_template=FILE.jinja, or none "
                "for prompts and completions as they are"
            ) from error
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"data.chat_template: cannot read {chat_template}: {error.strerror}") from error


def render(chat: ChatTokenizer, conversation: Conversation, *, prompt: bool = False) -> str:
    """The text of a conversation; with `prompt`, as it is when the model is to speak next.

    Raises: RowError where the template refuses it.
    """
    return _render(chat, conversation, prompt=prompt, tracked=False)[0]


def render_tracked(chat: ChatTokenizer, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """The text and the spans between `{% generation %}` and `{% endgeneration %}`."""
    return _render(chat, conversation, prompt=False, tracked=True)


def guard(chat: ChatTokenizer, conversation: Conversation) -> Guarded:
    """Break every control token that stands in a message, so that it is tokenised as the text that it is.

    Special tokens lose their meaning everywhere. Markup keeps it in what the assistant says, where it belongs.
    """
    whole = _everything(conversation)
    free = [mark for mark in _MARKS if mark not in whole]
    if len(free) < 2:
        raise RowError("wrong encoding: the noncharacters U+FDD0 to U+FDEF are all in the text")
    mark, count = free[0], [0]
    special, every = _pattern(chat.special), _pattern((*chat.special, *chat.markup))

    def broken(value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            text, found = pattern.subn(lambda match: match[0][0] + mark + match[0][1:], value)
            count[0] += found
            return text
        if isinstance(value, Mapping):
            return {broken(key, pattern): broken(item, pattern) for key, item in value.items()}
        return [broken(item, pattern) for item in value] if isinstance(value, list | tuple) else value

    def message(given: Message) -> Message:
        content = special if given["role"] == "assistant" else every
        return {
            key: value if key in ("role", "weight") else broken(value, content if key == "content" else every)
            for key, value in given.items()
        }

    tools = None if conversation.tools is None else tuple(broken(tool, every) for tool in conversation.tools)
    messages = tuple(message(given) for given in conversation.messages)
    return Guarded(conversation=Conversation(messages=messages, tools=tools), mark=mark, count=count[0])


def sentinel(guarded: Guarded) -> str:
    """A character that stands nowhere in the conversation."""
    whole = _everything(guarded.conversation)
    return next(mark for mark in reversed(_MARKS) if mark not in whole and mark != guarded.mark)


def encode(chat: ChatTokenizer, texts: Sequence[str], marks: Sequence[str]) -> list[Encoded | RowError]:
    """The tokens of each text without those of its mark."""
    found = chat.backend.encode_batch(list(texts), add_special_tokens=False)
    return [_unmarked(chat, *item) for item in zip(found, texts, marks, strict=True)]


def _unmarked(chat: ChatTokenizer, encoding: Any, text: str, mark: str) -> Encoded | RowError:
    ids = np.asarray(encoding.ids, dtype=np.int64)
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    starts, stops = offsets[:, 0], offsets[:, 1]
    if mark in text:
        keep = np.ones(len(ids), dtype=bool)
        for place in (match.start() for match in re.finditer(re.escape(mark), text)):
            inside = (starts < place + 1) & (stops > place)
            if not inside.any() or (starts[inside] < place).any() or (stops[inside] > place + 1).any():
                return RowError("a special token in the text cannot be told from a control token by this tokenizer")
            keep &= ~inside
        ids, starts, stops = ids[keep], starts[keep], stops[keep]
    written = sum(token != chat.tokenizer.unk_token for token in _pattern(chat.special).findall(text))
    if np.isin(ids, chat.control_ids).sum() != written:
        return RowError("the text makes control tokens that the template did not write")
    return Encoded(ids=ids, starts=starts, stops=stops)


def _render(
    chat: ChatTokenizer, conversation: Conversation, *, prompt: bool, tracked: bool
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[[_plain(message) for message in conversation.messages]],
            tools=None if conversation.tools is None else list(conversation.tools),
            chat_template=chat.source,
            return_assistant_tokens_mask=tracked,
            add_generation_prompt=prompt,
            **chat.tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        said = str(error).splitlines()[:1] or [type(error).__name__]
        raise RowError(f"the chat template refuses it: {said[0]}") from error
    return texts[0], [tuple(span) for span in spans[0]] if tracked else []


def _plain(message: Message) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "weight"}


def _told(form: str, today: str) -> str:
    """A Jinja string: the day in the form that the template wants."""
    return repr(date.fromisoformat(today).strftime(form))


def _bare(tokenizer: Any) -> Any:
    """The backend with offsets that cover spaces and with no tokens of its own added."""
    from tokenizers import Tokenizer

    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    backend = Tokenizer.from_str(json.dumps(tree | {"post_processor": None, "truncation": None, "padding": None}))
    backend.encode_special_tokens = False
    return backend


def _everything(conversation: Conversation) -> str:
    return json.dumps([conversation.messages, conversation.tools], ensure_ascii=False, default=str)


@lru_cache(maxsize=64)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or r"(?!)")
