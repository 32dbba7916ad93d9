"""Texts and turns out of a row's values."""

from __future__ import annotations

from typing import Any

import pytest

from orpo_mlx.data.messages import is_empty, kind, message, text_or_turns, texts
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
