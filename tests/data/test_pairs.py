"""From rows to pairs: what is taken, what is left out with a count, and one sentence for every bad row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.data.pairs import SCORED_WRONGLY, Reading, load_pairs, parse_columns, read_pairs
from orpo_mlx.data.row_counts import RowReport
from orpo_mlx.data.sources import FileSource
from orpo_mlx.errors import ConfigError, DataError
from orpo_mlx.types import Pair, TokenizedPair
from tests.conftest import write_rows

GOOD = {"prompt": "Q", "chosen": "A", "rejected": "B"}


def read(path: Path, **options: Any) -> tuple[list[Any], RowReport]:
    report = RowReport()
    rows = list(read_pairs(FileSource([path]), Reading(**options), report))
    assert report.rows_read == len(rows) + sum(report.dropped.values())
    return [pair for row in rows for pair in row.pairs], report


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


BAD_LINES = [
    ('{"prompt": "Q", "chosen": ', "invalid JSON"),
    ("[1, 2]", "found a JSON list"),
    ("[" * 100_000, "invalid JSON"),
    ('{"prompt_ids": [' + "9" * 5000 + "]}", "a number that is too long"),
    ('{"prompt": "\\ud800", "chosen": "A", "rejected": "B"}', "'prompt' holds half of a surrogate pair ('\\ud800')"),
    ("null", "found a JSON null"),
    ('{"prompt": "Q", "chosen": "A"}', "no 'rejected'; found chosen, prompt"),
    ('{"prompt_ids": [1], "chosen_ids": [2]}', "no 'rejected_ids'"),
    ('{"prompt": "Q", "chosen": null, "rejected": "B"}', "'chosen' is a JSON null"),
    ('{"prompt": null, "chosen": "A", "rejected": "B"}', "'prompt' is a JSON null"),
    ('{"prompt": "Q", "chosen": 3, "rejected": "B"}', "'chosen' is a JSON number"),
    ('{"prompt": [], "chosen": "A", "rejected": "B"}', "'prompt' is an empty list"),
    ('{"prompt": [{"role": "user"}], "chosen": "A", "rejected": "B"}', "prompt[0].content must be a string"),
    ('{"prompt": [{"role": 1, "content": ""}], "chosen": "A", "rejected": "B"}', "prompt[0].role must be a string"),
    ('{"prompt": ["x"], "chosen": "A", "rejected": "B"}', "prompt[0] is a JSON string"),
    ('{"prompt_ids": [1.5], "chosen_ids": [2], "rejected_ids": [3]}', "'prompt_ids' must be a list of token ids"),
    ('{"prompt_ids": [true], "chosen_ids": [2], "rejected_ids": [3]}', "'prompt_ids' must be a list of token ids"),
    ('{"prompt_ids": [-1], "chosen_ids": [2], "rejected_ids": [3]}', "'prompt_ids' must be a list of token ids"),
]


@pytest.mark.parametrize(("line", "expected"), BAD_LINES)
def test_a_bad_row_is_named_by_file_and_line_or_left_out_and_listed(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = '{"prompt": "Q", "chosen": "A", "rejected": "B"}'
    path.write_text(f"{good}\n{line}\n{good}\n")
    for attempt in (load_pairs, read):
        with pytest.raises(DataError) as caught:
            attempt(path)
        message = str(caught.value)
        assert message.startswith(f"{path}:2: ")
        assert expected in message
        assert "\n" not in message
    pairs, report = read(path, skip_bad_rows=True)
    assert [pair.location for pair in pairs] == [f"{path}:1", f"{path}:3"]
    assert report.dropped == {"bad_row": 1}
    assert report.places == {"bad_row": [f"{path}:2"]}
    assert expected in report.left_out[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GOOD, "chosen": " \n"}, "empty_side"),
        ({**GOOD, "rejected": [{"role": "assistant", "content": ""}]}, "empty_side"),
        ({**GOOD, "prompt": ""}, "empty_prompt"),
        ({"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [3]}, "empty_side"),
        ({"prompt_ids": [], "chosen_ids": [2], "rejected_ids": [3]}, "empty_prompt"),
    ],
)
def test_empty_rows_are_left_out_with_a_count(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, row])
    pairs, report = read(path)
    assert len(pairs) == 1
    assert report.dropped == {reason: 1}
    with pytest.raises(DataError, match=r"rows.jsonl:2: .* is empty"):
        load_pairs(path)


def test_a_margin_leaves_out_what_is_too_close(tmp_path: Path) -> None:
    rows = [{**GOOD, "score_chosen": high, "score_rejected": low} for high, low in [(5, 4), (3.5, 3), (2, 4)]]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    pairs, report = read(path, min_margin=1.0)
    assert [pair.location for pair in pairs] == [f"{path}:1"]
    assert report.dropped == {"low_margin": 2}
    pairs, report = read(path)
    assert len(pairs) == 3
    notes = {row.location: row.notes for row in read_pairs(FileSource([path]), Reading(), RowReport())}
    assert notes == {f"{path}:1": (), f"{path}:2": (), f"{path}:3": (SCORED_WRONGLY,)}
    with pytest.raises(DataError, match=r"rows.jsonl:1: `min_margin=1` needs scores"):
        read(write_rows(path, [GOOD]), min_margin=1.0)


def test_columns_under_other_names(tmp_path: Path) -> None:
    rows = [{"q": "Q", "chosen": "worse", "good": "A", "bad": "B"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    columns = parse_columns("prompt=q, chosen=good,rejected=bad")
    assert read(path, columns=columns)[0] == [Pair("Q", "A", "B", f"{path}:1")]
    with pytest.raises(DataError, match=r"rows.jsonl:1: `columns=prompt=x`: no such column, found bad, chosen"):
        read(path, columns={"prompt": "x"})
    for text in ("prompt", "prompt=", "=q", "prompt=a,prompt=b"):
        with pytest.raises(ConfigError, match="`columns`: found"):
            parse_columns(text)
    with pytest.raises(ConfigError, match=r"`columns`: 'promt' is not a name .*; did you mean prompt\?"):
        parse_columns("promt=q")
    assert parse_columns(None) == {}


def test_a_file_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n")
    for attempt in (load_pairs, read):
        with pytest.raises(DataError, match=r"rows.jsonl:1: the file has no rows"):
            attempt(path)
