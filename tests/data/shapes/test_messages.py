"""Texts and turns out of a row's values."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest

from orpo_mlx.data.shapes.messages import is_empty, kind, message, text_or_turns, texts, unpacked
from orpo_mlx.errors import DataError


def test_a_message_keeps_what_a_template_may_want_and_loses_nulls() -> None:
    given = {"role": "assistant", "content": "A", "reasoning_content": "because", "tool_calls": None}
    assert message(given, "m", "f:1") == {"role": "assistant", "content": "A", "reasoning_content": "because"}


def test_strings_messages_and_lists() -> None:
    assert text_or_turns("Q", "prompt", "f:1", "user") == "Q"
    turn = {"role": "user", "content": "Q"}
    assert text_or_turns(turn, "prompt", "f:1", "user") == (turn,)
    assert texts("Q", "prompt", "f:1") == (turn,)
    assert texts([{"from": "human", "value": "Q"}], "prompt", "f:1") == (turn,)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert texts([{"role": "user", "content": parts}], "prompt", "f:1") == ({"role": "user", "content": "ab"},)


@pytest.mark.parametrize(
    ("spelled", "role"),
    [
        ("Human", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("MODEL", "assistant"),
        ("observation", "tool"),
    ],
)
def test_speakers_by_the_names_that_templates_know(spelled: str, role: str) -> None:
    assert message({"role": spelled, "content": "A"}, "m", "f:1") == {"role": role, "content": "A"}
    assert message({"from": spelled, "value": "A"}, "m", "f:1") == {"role": role, "content": "A"}


def test_a_speaker_nobody_knows() -> None:
    assert message({"role": "ipython", "content": "A"}, "m", "f:1")["role"] == "ipython"
    with pytest.raises(DataError, match=r"f:1: m.from is 'narrator', expected a speaker: system"):
        message({"from": "narrator", "value": "A"}, "m", "f:1")


def test_parts_of_text_in_all_their_spellings() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, {"type": "output_text", "text": "c"}]
    assert message({"role": "user", "content": parts}, "m", "f:1")["content"] == "abc"


CALL = {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"content": None, "tool_calls": [{"type": "function", "function": {**CALL, "arguments": '{"x": 1}'}}]},
        {"content": "", "tool_calls": json.dumps([{"type": "function", "function": CALL}])},
        {"content": None, "tool_calls": {"type": "function", "function": CALL}},
        {"content": None, "function_call": {**CALL, "arguments": '{"x": 1}'}},
    ],
)
def test_tool_calls_in_all_their_spellings(turn: dict[str, Any]) -> None:
    expected = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    assert message({"role": "assistant", **turn}, "m", "f:1") == expected


@pytest.mark.parametrize(("given", "arguments"), [("", {}), (None, {}), ("x=1", "x=1"), ("[1]", "[1]")])
def test_arguments_that_are_no_object(given: Any, arguments: Any) -> None:
    turn = message({"role": "assistant", "tool_calls": [{"name": "f", "arguments": given}]}, "m", "f:1")
    assert turn["tool_calls"] == [{"name": "f", "arguments": arguments}]


def test_values_that_json_does_not_have() -> None:
    when = [{"name": "f", "arguments": {"day": datetime.date(2024, 5, 1)}}]
    with pytest.raises(DataError, match=r"f:1: 'm.tool_calls' holds a date, which JSON does not have"):
        message({"role": "assistant", "tool_calls": when}, "m", "f:1")


MESSAGES = [{"role": "user", "content": "Hi"}, {"from": "gpt", "value": "x"}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(MESSAGES),
        json.dumps(MESSAGES, indent=1),
        f"  {json.dumps(MESSAGES)}",
        json.dumps(json.dumps(MESSAGES)),
    ],
)
def test_messages_in_a_text_are_messages(text: str) -> None:
    assert unpacked(text, "prompt", "f:1") == MESSAGES
    capitals = [{"role": "User", "content": "Hi"}]
    assert unpacked(json.dumps(capitals), "prompt", "f:1") == capitals


@pytest.mark.parametrize(
    "text",
    [
        "Hi",
        "[1, 2]",
        '{"role": "admin", "content": "x"}',
        '{"role": "user", "content": "x"} is a turn',
        "[",
        '{"role": 1}',
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert unpacked(text, "prompt", "f:1") == text


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(MESSAGES)[:-1],
        str(MESSAGES),
        "[{'role': 'user', 'content': 'a'}\n {'role': 'x'}]",
        f"array({MESSAGES})",
    ],
)
def test_messages_that_are_no_json_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="f:1: 'prompt' holds messages as text that is not JSON"):
        unpacked(text, "prompt", "f:1")


@pytest.mark.parametrize(
    ("text", "empty"),
    [
        ("", True),
        (" \n", True),
        ("x", False),
        ((), True),
        (({"role": "assistant", "content": " "},), True),
        (({"role": "assistant", "content": "", "tool_calls": [1]},), False),
    ],
)
def test_empty(text: Any, empty: bool) -> None:
    assert is_empty(text) is empty


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        1.5,
        True,
        [],
        [None],
        ["x"],
        [{}],
        [{"role": "user"}],
        {"content": "x"},
        [{"role": None, "content": "x"}],
        [{"role": "user", "content": {"a": 1}}],
        [{"role": "user", "content": ["x"]}],
        "\udc80",
        {"from": "gpt"},
        {"from": 1, "value": "x"},
        [{"role": "user", "content": "\ud800"}],
    ],
)
def test_whatever_is_not_text_is_refused_at_its_place(value: Any) -> None:
    with pytest.raises(DataError, match=r"^f:1: "):
        text_or_turns(value, "prompt", "f:1", "user")


def test_names_of_types() -> None:
    values: tuple[Any, ...] = (None, True, 1, 1.5, "x", [], {})
    assert [kind(value) for value in values] == ["null", "boolean", "number", "number", "string", "list", "object"]
