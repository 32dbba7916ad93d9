"""Reading rows: every accepted shape, and one sentence with file and line for every other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orpo_mlx.data import file_sha256, find_splits, load_pairs
from orpo_mlx.errors import DataError
from orpo_mlx.types import Pair, TokenizedPair
from tests.conftest import write_rows

GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}


def test_strings_messages_and_ids(tmp_path: Path) -> None:
    messages = {
        "prompt": [{"role": "user", "content": "Q"}],
        "chosen": [{"role": "assistant", "content": "A"}],
        "rejected": [{"role": "assistant", "content": "B"}],
    }
    ids = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, messages, ids])
    first, second, third = load_pairs(path)
    assert first == Pair("Q", "A", "B", f"{path}:1")
    assert isinstance(second, Pair)
    assert second.prompt == ({"role": "user", "content": "Q"},)
    assert second.chosen == ({"role": "assistant", "content": "A"},)
    assert third == TokenizedPair((1, 2), (3,), (4, 5), f"{path}:3")


def test_a_bare_string_beside_messages_becomes_a_turn(tmp_path: Path) -> None:
    row = {"prompt": "Q", "chosen": [{"role": "assistant", "content": "A"}], "rejected": "B"}
    (pair,) = load_pairs(write_rows(tmp_path / "rows.jsonl", [row]))
    assert isinstance(pair, Pair)
    assert pair.prompt == ({"role": "user", "content": "Q"},)
    assert pair.rejected == ({"role": "assistant", "content": "B"},)


def test_blank_lines_keep_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "Q", "chosen": "A", "rejected": "B"}\n\n')
    assert [pair.place for pair in load_pairs(path)] == [f"{path}:2"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "Q", "chosen": ', "invalid JSON"),
        ("[1, 2]", "found a JSON list"),
        ("[" * 100_000, "invalid JSON"),
        ('{"prompt_ids": [' + "9" * 5000 + "]}", "a number that is too long"),
        (
            '{"prompt": "\\ud800", "chosen": "A", "rejected": "B"}',
            "'prompt' holds half of a surrogate pair ('\\ud800')",
        ),
        ("null", "found a JSON null"),
        ('{"prompt": "Q", "chosen": "A"}', "no 'rejected'; found chosen, prompt"),
        ('{"prompt_ids": [1], "chosen_ids": [2]}', "no 'rejected_ids'"),
        ('{"prompt": "Q", "chosen": null, "rejected": "B"}', "'chosen' is a JSON null"),
        ('{"prompt": "Q", "chosen": 3, "rejected": "B"}', "'chosen' is a JSON number"),
        ('{"prompt": "Q", "chosen": " ", "rejected": "B"}', "'chosen' is empty"),
        ('{"prompt": [], "chosen": "A", "rejected": "B"}', "'prompt' is an empty list"),
        ('{"prompt": [{"role": "user"}], "chosen": "A", "rejected": "B"}', "prompt[0].content must be a string"),
        ('{"prompt": [{"role": 1, "content": ""}], "chosen": "A", "rejected": "B"}', "prompt[0].role must be a string"),
        ('{"prompt": ["x"], "chosen": "A", "rejected": "B"}', "prompt[0] is a JSON string"),
        ('{"prompt_ids": [1.5], "chosen_ids": [2], "rejected_ids": [3]}', "'prompt_ids' must be a list of token ids"),
        ('{"prompt_ids": [true], "chosen_ids": [2], "rejected_ids": [3]}', "'prompt_ids' must be a list of token ids"),
        ('{"prompt_ids": [-1], "chosen_ids": [2], "rejected_ids": [3]}', "'prompt_ids' must be a list of token ids"),
        ('{"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [3]}', "'chosen_ids' is an empty list"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Q", "chosen": "A", "rejected": "B"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        load_pairs(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert expected in message
    assert "\n" not in message


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1: not UTF-8"):
        load_pairs(path)


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match="has no rows"):
        load_pairs(path)


def test_a_json_file_is_a_list_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, GOOD], indent=1))
    assert [pair.place for pair in load_pairs(path)] == [f"{path}: row 1", f"{path}: row 2"]
    for text, expected in [
        ("{}", "found a JSON object, expected a list of rows"),
        ("[]", "has no rows"),
        ("[1]", "rows.json: row 1: found a JSON number"),
        ("[", "rows.json: invalid JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=expected):
            load_pairs(path)


def test_splits_of_a_folder_and_of_a_file(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", [GOOD])
    valid = write_rows(tmp_path / "real.valid.jsonl", [GOOD])
    assert find_splits(tmp_path) == {"train": train, "valid": valid}
    assert find_splits(valid) == {"train": valid}


def test_an_exact_name_wins_over_an_infix(tmp_path: Path) -> None:
    write_rows(tmp_path / "old.train.jsonl", [GOOD])
    exact = write_rows(tmp_path / "train.jsonl", [GOOD])
    assert find_splits(tmp_path)["train"] == exact


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], "no train.jsonl"),
        (["a.train.jsonl", "b.train.jsonl"], "2 files for the train split"),
        (["x.json"], "found x.json"),
    ],
)
def test_a_folder_without_one_train_split(tmp_path: Path, names: list[str], expected: str) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=expected):
        find_splits(tmp_path)


def test_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_splits(tmp_path / "nowhere")


def test_hash_is_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223")
