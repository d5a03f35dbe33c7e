"""Every form in which people keep conversations becomes messages, or says what is missing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mbfn.data.chat.forms import conversations
from mbfn.data.sources import RowError

ASKED, SAID = "What is the weather in Rome?", "It is sunny."
PAIR = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
CALL = {"name": "weather", "arguments": {"city": "Rome"}}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": PAIR}, PAIR),
        ({"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]}, PAIR),
        ({"instruction": ASKED, "input": "", "output": SAID}, PAIR),
        ({"instruction": "Tell.", "input": ASKED, "output": SAID, "system": "Be brief."}, [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Tell.\n\n{ASKED}"}, PAIR[1]]),
        ({"prompt": ASKED, "completion": SAID}, PAIR),
        ({"prompt": PAIR[:1], "completion": PAIR[1:]}, PAIR),
        ({"prompt": ASKED, "chosen": SAID, "rejected": "No."}, PAIR),
        ({"chosen": PAIR, "rejected": PAIR}, PAIR),
        ({"messages": [PAIR[0] | {"content": [{"type": "text", "text": ASKED}]}, PAIR[1] | {"tool_calls": None}]},
         PAIR),
        ({"conversations": [{"from": "human", "value": ASKED}, {"from": "function_call", "value": json.dumps(CALL)},
                            {"from": "observation", "value": "Sun"}, {"from": "gpt", "value": SAID}]}, [
            PAIR[0], {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "content": "Sun"}, PAIR[1]]),
    ],
)  # fmt: skip
def test_forms_are_told_by_their_keys(row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    (found,) = conversations(row, "auto", pairs=False)
    assert [dict(message) for message in found.messages] == messages


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a"}, "none of messages, conversations, instruction and output, prompt and completion, chosen and "
                        "rejected; found 'text'"),
        ({"messages": [{"content": "a"}]}, "missing role: message 1 has no 'role'"),
        ({"messages": [{"role": "narrator", "content": "a"}]},
         "missing role: message 1 has 'narrator', expected one of system, developer, user, assistant, tool"),
        ({"messages": PAIR[:1]}, "no assistant turn"),
        ({"messages": [PAIR[0], {"role": "assistant"}]}, "message 2 has no 'content'"),
        ({"prompt": ASKED, "completion": ""}, "empty completion: the last assistant turn says nothing"),
        ({"messages": [PAIR[0] | {"content": [{"type": "image"}]}, PAIR[1]]},
         "message 1: content is neither a text nor a list of texts"),
        ({"conversations": [{"value": "a"}]}, "missing role: turn 1 has no 'from'"),
        ({"messages": []}, "'messages' is empty, expected a list"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as error:
        conversations(row, "auto", pairs=False)
    assert str(error.value) == reason
