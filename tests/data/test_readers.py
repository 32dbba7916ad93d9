"""Rows of every kind of file, each at its place."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_mlx.data.readers import READERS, read_rows
from orpo_mlx.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": f'Q{number}\n, "é"', "chosen": [{"role": "assistant", "content": "A"}], "rejected": f"B{number}"}
    for number in range(1500)
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".gz":
        plain = write(path.with_suffix(""), rows)
        path.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        return path
    kind = path.suffix
    table = pa.Table.from_pylist(rows)
    if kind in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == ".parquet":
        pq.write_table(table, path, row_group_size=400)
    elif kind == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if kind == ".tsv" else ",")
            writer.writerow(rows[0])
            for row in rows:
                writer.writerow(as_cells(row).values())
    return path


def as_cells(row: dict[str, Any]) -> dict[str, str]:
    return {name: json.dumps(cell) if isinstance(cell, list) else cell for name, cell in row.items()}


@pytest.mark.parametrize("kind", READERS)
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"rows{kind}", ROWS)
    rows = list(read_rows(path))
    # The cells of CSV are text; what is JSON in them is found where columns are known.
    cells = kind.startswith((".csv", ".tsv"))
    assert [row.value for row in rows] == ([as_cells(row) for row in ROWS] if cells else ROWS)
    places = [int(row.location.removeprefix(f"{path}:")) for row in rows]
    if kind.startswith((".json", ".csv", ".tsv")) and not kind.startswith(".jsonl"):
        text = gzip.decompress(path.read_bytes()) if kind.endswith(".gz") else path.read_bytes()
        lines = text.decode().replace("\r\n", "\n").split("\n")
        for row, place in zip(rows, places, strict=True):
            assert lines[place - 1].lstrip().startswith("{" if kind.startswith(".json") else '"Q')
            assert not isinstance(row.value, DataError)
            assert row.value["prompt"].split("\n")[0] in "".join(lines[place - 1 : place + 1])
    else:
        assert places == list(range(1, 1501))


def test_the_streaming_kind_of_arrow(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with (
        pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    assert [row.value for row in read_rows(tmp_path / "rows.arrow")] == ROWS


def test_a_json_list_is_the_same_however_it_is_cut_into_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"a": "x" * (number % 7), "b": [number, {"c": None}]} for number in range(40)]
    path = tmp_path / "rows.json"
    path.write_text("\n [" + ",\n".join(json.dumps(row) for row in rows) + "] \n")
    for block in (1, 2, 3, 17, 1000):
        monkeypatch.setattr("orpo_mlx.data.readers._BLOCK", block)
        assert [(row.location, row.value) for row in read_rows(path)] == [
            (f"{path}:{number + 2}", row) for number, row in enumerate(rows)
        ]


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('\n{"a": 1}\n{"a": 2}\n')
    assert [row.value for row in read_rows(path)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_and_crlf_are_passed_over(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"rows{kind}", [{"a": "1"}, {"a": "2"}])
    text = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text)
    assert [row.value for row in read_rows(path)] == [{"a": "1"}, {"a": "2"}]


def test_blank_lines_keep_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"a": 1}\n\n{"a": 2}')
    assert [row.location for row in read_rows(path)] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize("name", ["data", "rows", "examples"])
@pytest.mark.parametrize("before", ["", '"version": "1.0 [b]", "n": 3, "x": null, '])
def test_rows_inside_of_an_object(tmp_path: Path, name: str, before: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(f'{{ {before}"{name}":\n[{{"a": 1}},\n{{"a": [2]}}], "license": ["x"]}}')
    assert [(row.location, row.value) for row in read_rows(path)] == [
        (f"{path}:2", {"a": 1}),
        (f"{path}:3", {"a": [2]}),
    ]


def test_an_object_of_another_kind_is_a_json_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"prompt": "data", "x": {"data": [1]}}\n{"chosen": 2}')
    assert [row.value for row in read_rows(path)] == [{"prompt": "data", "x": {"data": [1]}}, {"chosen": 2}]


@pytest.mark.parametrize("cut", [5, -9])
def test_a_damaged_archive(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:cut])
    with pytest.raises(DataError, match=r"rows.jsonl.gz: cannot be read \("):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "x.jsonl",
            gzip.compress(b'{"a": 1}', mtime=0),
            "x.jsonl:1: the file is compressed with gzip; run gunzip on it, or let",
        ),
        ("x.csv", b"PAR1....", "x.csv:1: the file is a Parquet file; name it .parquet"),
        ("x.jsonl", b"\xff\xfe{\x00", "x.jsonl:1: the file is UTF-16 text; save it as UTF-8"),
        ("x.parquet", b"nothing of the sort", "x.parquet:1: not a Parquet file, or a damaged one"),
        ("x.arrow", b"nothing of the sort", "x.arrow:1: not an Arrow file, or a damaged one"),
        ("x.json", b'[{"a": 1},\n {"a": 2', "x.json:2: invalid JSON"),
        ("x.json", b'[{"a": 1},\n', "x.json:2: invalid JSON (the list breaks off)"),
        ("x.json", b'[{"a": 1} x', "x.json:1: invalid JSON (Expecting value at column"),
        ("x.json", b'"text"', "x.json:1: found text that begins with '\"', expected a JSON list of rows"),
        ("x.json", b'[{"a": "\xff"}]', "x.json:1: not UTF-8 text"),
        ("x.json", b"[" * 100_000, "x.json:1: invalid JSON (nested too deeply)"),
        ("x.csv", b"a,b\n1,\xff\n", "not UTF-8 text"),
        ("x.csv", b'a,b\n1,"2" 3\n', "x.csv:2: not valid CSV"),
        ("x.csv", b"a,b, a\n1,2,3\n", "x.csv:1: two columns are called 'a'"),
        ("x.csv", b"prompt;chosen\na;b\n", "x.csv:1: the columns are separated by ';', expected commas"),
        (
            "x.txt",
            b"",
            "x.txt: files of this kind are not read, expected .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path / name))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_that_breaks_off(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"rows.parquet:1: not a Parquet file, or a damaged one"):
        list(read_rows(path))


def test_broken_rows_are_handed_on_and_the_rest_read(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a, b\n1,2\n1\n3,4\n")
    rows = [row.value for row in read_rows(tmp_path / "x.csv")]
    assert rows[0] == {"a": "1", "b": "2"}
    assert "x.csv:3: found 1 cells, expected 2 (a, b)" in str(rows[1])
    assert rows[2] == {"a": "3", "b": "4"}


def test_a_list_under_the_name_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('[\n{"a": 1}\n]')
    first = next(read_rows(tmp_path / "x.jsonl"))
    assert "x.jsonl:1: found a JSON list, expected one JSON object per line; name it .json" in str(first.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x.jsonl: cannot be read \(No such file"):
        list(read_rows(tmp_path / "x.jsonl"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}]\n[{"a": 2}, {"a": 3}]', r"x\.json:2: found .* behind the end of the rows"),
        ('[{"a": 1}] garbage', r"x\.json:1: found 'garbage' behind the end of the rows"),
        ('{"data": [{"a": 1}]} {"data": [{"a": 2}]}', "behind the end of the rows"),
        ('{"data": [{"a": 1}], "more": ', "invalid JSON .* behind the list"),
    ],
)
def test_nothing_behind_a_list_is_passed_over(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_rows(tmp_path / "x.json"))


@pytest.mark.parametrize("name", ["data", "examples"])
def test_json_lines_whose_rows_hold_a_list_are_json_lines(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", name: [{"x": number}]} for number in range(2)]
    (tmp_path / "x.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.value for row in read_rows(tmp_path / "x.json")] == rows
    (tmp_path / "x.json").write_text(json.dumps({name: rows, "info": {"n": [1]}}) + "\n\n")
    assert [row.value for row in read_rows(tmp_path / "x.json")] == rows
