"""Masks of conversations against what the family's oracle says by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbfn.config.data import ChatData
from mbfn.data.chat.encode import ChatSample, encode_rows
from mbfn.data.chat.template import ChatTokenizer, open_chat_tokenizer
from mbfn.data.sources import RowError
from mbfn.errors import DataError
from tests.data.families import BY_NAME, DATE, FAMILIES, TEMPLATES, Family, Pieces, build_tokenizer

PLAIN = ChatData(path="unused", date=DATE)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def said(*turns: str, **last: Any) -> list[dict[str, Any]]:
    """user, assistant, user, ...; a system message first where a turn begins with `system:`."""
    head = [{"role": "system", "content": turns[0].removeprefix("system:")}] if turns[0].startswith("system:") else []
    roles = ("user", "assistant")
    turns = turns[len(head) :]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    messages[-1] |= last
    return head + messages


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "system": said("system:Be brief.", "What is the capital of France?", "Paris."),
    "turns": said("system:Be brief.", "Rome?", "Sunny.", "And Paris? naïve café 東京", "Twenty degrees, 東京 too."),
    "spaces": said("Rome?", "  Sunny, \n twenty\n\ndegrees.", "Paris?", "Sunny.\n"),
    "empty": said("", "", "And?", "Sunny."),
    "repeats": said("Sunny.", "Sunny.", "Sunny.", "Sunny."),
    "tools": [
        {"role": "user", "content": "What is the weather in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "Sunny, twenty degrees"},
        {"role": "assistant", "content": "It is sunny in Rome."},
    ],
    "reasoning": said("Rome?", "Sunny.", reasoning_content="The weather is sunny."),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each family's tokenizer, made once."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def of(family: Family, template: str | None = None) -> ChatTokenizer:
        text = None if template is None else (TEMPLATES / f"{template}.jinja").read_text()
        directory = build_tokenizer(family, root / f"{family.name}-{template}", text)
        return open_chat_tokenizer(directory, "auto", DATE)

    return of


def encoded(chat: ChatTokenizer, messages: list[dict[str, Any]], data: ChatData = PLAIN) -> ChatSample | RowError:
    (result,) = encode_rows(chat, data, [{"messages": messages}])
    return result if isinstance(result, RowError) else result[0]


def runs(chat: ChatTokenizer, sample: ChatSample) -> Pieces:
    """The text of every stretch of tokens that are all trained or all not."""
    edges = np.flatnonzero(np.diff(sample.mask, prepend=2, append=2))
    return [
        (chat.backend.decode(sample.ids[a:b].tolist(), skip_special_tokens=False), bool(sample.mask[a]))
        for a, b in pairwise(edges)
    ]


def joined(pieces: Pieces) -> Pieces:
    """Neighbours of one kind as one piece."""
    out: Pieces = []
    for text, trained in pieces:
        if text and out and out[-1][1] == trained:
            out[-1] = (out[-1][0] + text, trained)
        elif text:
            out.append((text, trained))
    return out


def moved(family: Family, pieces: Pieces) -> Pieces:
    """Where control tokens take the space behind them, it belongs to the piece before."""
    if not family.rstrip:
        return pieces
    out: Pieces = []
    for text, trained in pieces:
        rest = text.lstrip() if out and out[-1][0].rstrip().endswith(family.special) else text
        out.append((rest, trained))
    return [(text if not text.endswith("\n") else text.rstrip(), trained) for text, trained in out]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_masks_are_what_the_oracle_says(opened: Any, family: Family, name: str) -> None:
    messages = CONVERSATIONS[name]
    if name == "tools" and not family.tools:
        pytest.skip("its template knows no tools")
    chat = opened(family)
    sample = encoded(chat, messages)
    assert isinstance(sample, ChatSample), sample
    assert runs(chat, sample) == joined(moved(family, family.oracle(messages)))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_special_tokens_in_messages_stay_text(opened: Any, family: Family) -> None:
    chat = opened(family)
    typed = f"ignore this {family.closing}{family.special[0]} and that"
    messages = said("system:Be brief.", typed, f"no {family.closing} here", "And?", "Sunny.")
    plain = said("system:Be brief.", "ignore this", "no here", "And?", "Sunny.")
    sample, clean = encoded(chat, messages), encoded(chat, plain)
    assert isinstance(sample, ChatSample), sample
    assert isinstance(clean, ChatSample)
    assert sample.typed == 3
    assert np.isin(sample.ids, chat.control_ids).sum() == np.isin(clean.ids, chat.control_ids).sum()
    if not family.rstrip:
        assert runs(chat, sample) == joined(family.oracle(messages))


def test_markup_is_text_in_what_others_say(opened: Any) -> None:
    chat = opened(BY_NAME["qwen3"])
    thinking, ids = chat.markup.index("<think>"), {}
    ids = {name: chat.tokenizer.convert_tokens_to_ids(name) for name in ("<think>", "<tool_call>")}
    assert thinking >= 0
    sample = encoded(chat, said("a <think> b <tool_call>", "<think>\nhm\n</think>\n\nSunny."))
    assert isinstance(sample, ChatSample)
    assert (sample.ids == ids["<think>"]).sum() == 1
    assert (sample.ids == ids["<tool_call>"]).sum() == 0


REASONED = said("Rome?", "Sunny.", "Paris?", "Rain.", reasoning_content="Clouds.")


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, ["Sunny.<|im_end|>", "<think>\nClouds.\n</think>\n\nRain.<|im_end|>"]),
        ({"turns": "last"}, ["<think>\nClouds.\n</think>\n\nRain.<|im_end|>"]),
        ({"reasoning": False}, ["Sunny.<|im_end|>", "\n\nRain.<|im_end|>"]),
        ({"roles": ("user",)}, ["Rome?<|im_end|>", "Paris?<|im_end|>"]),
        ({"roles": ("user", "assistant"), "turns": "last"}, ["<think>\nClouds.\n</think>\n\nRain.<|im_end|>"]),
    ],
)
def test_options_choose_what_is_trained(opened: Any, options: dict[str, Any], trained: list[str]) -> None:
    chat = opened(BY_NAME["qwen3"])
    sample = encoded(chat, REASONED, replace(PLAIN, **options))
    assert isinstance(sample, ChatSample), sample
    assert [text for text, learned in runs(chat, sample) if learned] == trained


def test_system_and_tool_turns_and_the_whole_prompt(opened: Any) -> None:
    chat = opened(BY_NAME["gpt_oss"])
    messages = [{"role": "system", "content": "Be brief."}, *CONVERSATIONS["tools"]]
    sample = encoded(chat, messages, replace(PLAIN, roles=("system",)))
    assert isinstance(sample, ChatSample), sample
    assert [text for text, learned in runs(chat, sample) if learned] == ["Be brief.\n\n<|end|>"]
    whole = encoded(chat, messages, replace(PLAIN, train_on_prompt=True))
    assert isinstance(whole, ChatSample)
    assert whole.mask.all()
    qwen = opened(BY_NAME["qwen25"])
    tool = encoded(qwen, messages, replace(PLAIN, roles=("tool",)))
    assert isinstance(tool, ChatSample), tool
    assert [text for text, learned in runs(qwen, tool) if learned] == ["Sunny, twenty degrees"]


def test_each_turn_is_a_sample_with_the_prompt_that_it_had(opened: Any) -> None:
    """Reasoning of earlier turns is in no later prompt, and every turn is trained with its own."""
    chat = opened(BY_NAME["qwen3"])
    messages = said("Rome?", "Sunny.", reasoning_content="Light.") + REASONED[2:]
    (samples,) = encode_rows(chat, replace(PLAIN, turns="each"), [{"messages": messages}])
    assert isinstance(samples, list)
    trained = [[text for text, learned in runs(chat, sample) if learned] for sample in samples]
    assert trained == [
        ["<think>\nLight.\n</think>\n\nSunny.<|im_end|>"],
        ["<think>\nClouds.\n</think>\n\nRain.<|im_end|>"],
    ]
    assert "Light" not in chat.backend.decode(samples[1].ids.tolist())


def test_messages_of_weight_0_are_not_trained(opened: Any) -> None:
    chat = opened(BY_NAME["llama3"])
    messages = said("Rome?", "Sunny.", "Paris?", "Rain.")
    messages[1]["weight"] = 0
    sample = encoded(chat, messages)
    assert isinstance(sample, ChatSample)
    assert [text for text, learned in runs(chat, sample) if learned] == ["Rain.<|eot_id|>"]


def test_a_template_that_marks_its_generation_is_believed(opened: Any) -> None:
    chat = opened(BY_NAME["phi4"], "generation")
    messages = said("Rome?", "Sunny.", "Paris?", "Rain.")
    sample = encoded(chat, messages)
    assert isinstance(sample, ChatSample), sample
    assert [text for text, learned in runs(chat, sample) if learned] == ["Sunny.<|im_end|>", "Rain.<|im_end|>"]


def test_no_mask_is_guessed(opened: Any) -> None:
    neither = encoded(opened(BY_NAME["phi4"], "neither"), said("Rome?", "Sunny."))
    assert isinstance(neither, RowError)
    assert str(neither) == (
        "message 2: the chat template has neither {% generation %} nor a generation prompt, so that "
        "'<|im_start|>assistant' before the turn cannot be told from it; give a data.chat_template=FILE.jinja with one"
    )
    moving = opened(BY_NAME["mistral"], "mistral_v3")  # writes the system message into the last user turn
    messages = said("system:Be brief.", "Rome?", "Sunny.", "Paris?", "Rain.")
    refused = encoded(moving, messages)
    assert isinstance(refused, RowError)
    assert str(refused).startswith(
        "message 3: what the chat template writes before it changes as the conversation goes on"
    )
    assert isinstance(encoded(moving, messages, replace(PLAIN, turns="last")), RowError)  # there it writes none at all
    chat = opened(BY_NAME["qwen3"])  # whose second turn saw the reasoning that is gone in the end
    called = [{**message} for message in CONVERSATIONS["tools"]] + said("Paris?", "Rain.")
    called[1]["reasoning_content"] = "Look it up."
    assert isinstance(encoded(chat, called), RowError)
    last = encoded(chat, called, replace(PLAIN, turns="last"))
    assert isinstance(last, ChatSample), last
    assert [text for text, learned in runs(chat, last) if learned] == ["<think>\n\n</think>\n\nRain.<|im_end|>"]
    odd = encoded(opened(BY_NAME["gemma"]), [*said("Rome?", "Sunny."), *said("Paris?", "Rain.")[1:]])
    assert (
        str(odd) == "the chat template refuses it: Conversation roles must alternate user/assistant/user/assistant/..."
    )


def test_a_tokenizer_without_template_is_an_error(tmp_path: Path) -> None:
    directory = build_tokenizer(BY_NAME["phi4"], tmp_path / "bare", "")
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"^data.chat_template: .*bare has no chat template; give"):
        open_chat_tokenizer(directory, "auto", DATE)
    chat = open_chat_tokenizer(directory, "none", DATE)
    (samples,) = encode_rows(chat, replace(PLAIN, chat_template="none"), [{"prompt": "Rome?", "completion": " Sunny."}])
    assert isinstance(samples, list), samples
    assert runs(chat, samples[0]) == [("Rome?", False), (" Sunny.<|im_end|>", True)]
