"""Prompts of rows with answers and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.data.prompts import distinct, read_prompt, read_prompts
from orpo_mlx.data.sources import FileSource
from orpo_mlx.errors import DataError
from tests.conftest import write_rows

USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("row", "question", "reference"),
    [
        ({"prompt": "Q"}, "Q", None),
        ({"prompt": [USER]}, "Q", None),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "Q", "A"),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, "Q", "A"),
        ({"prompt": "Q", "chosen": "A"}, "Q", "A"),
        ({"prompt": "Q", "completion": "A"}, "Q", "A"),
        ({"question": "Q", "answer": "A"}, "Q", "A"),
        ({"system": "S", "question": "Q", "chosen": "A", "rejected": "B"}, "Q", "A"),
        ({"instruction": "Q", "input": "I", "output": "A"}, "Q\nI", "A"),
        ({"messages": [USER, ANSWER]}, "Q", "A"),
        ({"messages": [USER]}, "Q", None),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "Q", "A"),
        ({"messages": [USER, {"role": "Assistant", "content": "A"}]}, "Q", "A"),
        ({"messages": [USER, {"role": "model", "content": [{"type": "text", "text": "A"}]}]}, "Q", "A"),
        ({"messages": json.dumps([USER, ANSWER])}, "Q", "A"),
        ({"messages": json.dumps([{"role": "User", "content": "Q"}, {"role": "Model", "content": "A"}])}, "Q", "A"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "chatgpt", "value": "A"}]}, "Q", "A"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]}, "Q", None),
        ({"prompt": "Q", "completion": [ANSWER]}, "Q", "A"),
        ({"prompt": "Q", "completion": json.dumps(ANSWER)}, "Q", "A"),
        ({"prompt": "Q", "answer": ["A", "B"]}, "Q", None),
        ({"prompt": "Q", "completions": ["A", "B"], "scores": [1, 2]}, "Q", None),
        ({"prompt": "Q", "completion": "A", "label": True}, "Q", "A"),
        ({"prompt": "Q", "completion": "B", "label": False}, "Q", None),
        ({"messages": [USER, ANSWER], "label": 0}, "Q", None),
        # In words that only --labels explains.
        ({"prompt": "Q", "completion": "A", "label": "schlecht"}, "Q", None),
        ({"chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "B"}]}, "Q", "A"),
    ],
)
def test_prompts_of_every_kind_of_row(row: dict[str, Any], question: str, reference: str | None) -> None:
    found = read_prompt(row, "f:1")
    assert (found.question, found.reference, found.location) == (question, reference, "f:1")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "Q"}, "the row has no prompt; found text"),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, "token ids, which nobody can judge"),
        ({"prompt_ids": [1]}, "token ids, which nobody can judge"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 3}, "'prompt' is a JSON number"),
        ([], "found a JSON list"),
    ],
)
def test_rows_without_a_prompt_are_named(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_prompt(row, "f:1")
    assert str(caught.value).startswith("f:1: ")


def test_a_file_is_read_in_order_with_columns_renamed_and_prompts_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"ask": text, "subset": "s"} for text in ("b", "a", "b")])
    found = list(read_prompts(FileSource([path]), {"prompt": "ask"}))
    assert [prompt.question for prompt in found] == ["b", "a", "b"]
    assert [prompt.location for prompt in distinct(found)] == [f"{path}:1", f"{path}:2"]
    assert {prompt.category for prompt in found} == {"s"}
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows"):
        list(read_prompts(FileSource([tmp_path / "empty.jsonl"])))
