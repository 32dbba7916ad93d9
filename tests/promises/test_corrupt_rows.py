"""Two hundred ways a file of pairs can be broken: each loads as specified or ends in one sentence at its place."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.cli.inspect import main
from tests.conftest import write_rows
from tests.data.shapes.test_formats import CASES, RATED, SINGLE
from tests.data.test_readers import write as write_kind

Row = dict[str, Any]
SEEDS = range(200)


def valid_rows(rng: random.Random) -> list[Row]:
    """Rows of one shape, picked at random."""
    make = rng.choice(CASES)[1]
    return [json.loads(json.dumps(make(*texts))) for texts in SINGLE]


def lines(rows: list[Row]) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


def in_row(change: Callable[[random.Random, Row], Any]) -> Callable[[random.Random, Path], None]:
    """A corruption of one row of a JSONL file."""

    def corrupt(rng: random.Random, path: Path) -> None:
        rows: list[Any] = valid_rows(rng)
        number = rng.randrange(len(rows))
        changed = change(rng, rows[number])
        rows[number] = rows[number] if changed is None else changed
        path.write_bytes(
            b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n"
        )

    return corrupt


def _key(rng: random.Random, row: Row) -> str:
    return rng.choice(sorted(row))


def _nested(rng: random.Random, row: Row, value: Any) -> None:
    """Put `value` somewhere deep."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, item in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(item, (dict, list)):
                walk(item)

    walk(row)
    node, key = rng.choice(places)
    node[key] = value


def _cut(rng: random.Random, row: Row) -> bytes:
    text = json.dumps(row).encode()
    return text[: rng.randrange(1, len(text))]


def _whole(change: Callable[[random.Random, bytes], bytes]) -> Callable[[random.Random, Path], None]:
    """A corruption of the bytes of a whole file."""

    def corrupt(rng: random.Random, path: Path) -> None:
        path.write_bytes(change(rng, b"\n".join(lines(valid_rows(rng))) + b"\n"))

    return corrupt


def _flip(rng: random.Random, text: bytes) -> bytes:
    number = rng.randrange(len(text))
    return text[:number] + bytes([text[number] ^ 1 << rng.randrange(8)]) + text[number + 1 :]


def _other_kind(kind: str) -> Callable[[random.Random, Path], None]:
    def corrupt(rng: random.Random, path: Path) -> None:
        other = write_kind(
            path.with_name(f"other{kind}"), [{"prompt": a, "chosen": b, "rejected": c} for a, b, c in SINGLE]
        )
        content = bytearray(other.read_bytes())
        other.unlink()
        for _ in range(rng.choice((0, 1, 30))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.5:
            content = content[: rng.randrange(len(content))]
        path.rename(path) if path.exists() else None
        path.with_suffix(rng.choice((kind, ".jsonl"))).write_bytes(content)

    return corrupt


def _mixed(rng: random.Random, path: Path) -> None:
    rows = [row for _ in range(3) for row in valid_rows(rng)] + ([rng.choice(RATED)] if rng.random() < 0.3 else [])
    rng.shuffle(rows)
    path.write_bytes(b"\n".join(lines(rows)))


CORRUPTIONS: dict[str, Callable[[random.Random, Path], None]] = {
    "truncated JSON": in_row(_cut),
    "wrong type": in_row(lambda rng, row: row.update({_key(rng, row): rng.choice([3, 1.5, True, [], {}, [[]], [3]])})),
    "missing key": in_row(lambda rng, row: row.pop(_key(rng, row)) and None),
    "null": in_row(lambda rng, row: row.update({_key(rng, row): None})),
    "nested null": in_row(lambda rng, row: _nested(rng, row, None)),
    "nested wrong type": in_row(lambda rng, row: _nested(rng, row, rng.choice([0, -1e400, "", [], {}, False]))),
    "lone surrogate": in_row(lambda rng, row: _nested(rng, row, "a\ud800b")),
    "bytes that are not UTF-8": in_row(lambda rng, row: json.dumps(row).encode().replace(b"a", b"\xff", 1)),
    "a row that is no object": in_row(lambda rng, row: rng.choice([b"[]", b"3", b"null", b"{}", b"NaN", b"[[["])),
    "a long line": in_row(lambda rng, row: _nested(rng, row, "x y" * 50_000)),
    "an endless number": in_row(lambda rng, row: b'{"prompt": ' + b"9" * 5000 + b"}"),
    "control characters": in_row(lambda rng, row: _nested(rng, row, "\x00\x1b[2J\u202e")),
    "CRLF": _whole(lambda rng, text: text.replace(b"\n", b"\r\n")),
    "byte order mark": _whole(lambda rng, text: b"\xef\xbb\xbf" + text),
    "UTF-16": _whole(lambda rng, text: text.decode().encode("utf-16")),
    "gzip by mistake": _whole(lambda rng, text: gzip.compress(text)),
    "nothing": _whole(lambda rng, text: rng.choice([b"", b"\n\n", b" ", b"\xef\xbb\xbf"])),
    "one line": _whole(lambda rng, text: text.replace(b"\n", b" ")),
    "a JSON list": _whole(lambda rng, text: b"[" + b",".join(text.splitlines()) + b"]"),
    "a flipped bit": _whole(_flip),
    "a folder": lambda rng, path: path.mkdir(),
    "mixed shapes": _mixed,
    "Parquet": _other_kind(".parquet"),
    "Arrow": _other_kind(".arrow"),
    "CSV": _other_kind(".csv"),
    "JSON": _other_kind(".json"),
}


def test_a_line_of_5_mb(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    path = write_rows(tmp_path / "train.jsonl", [good, {**good, "prompt": "x" * 5_000_000}, good])
    assert main(["--data", str(path), "--model", str(model_folder), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["rows_kept"], figures["rows_dropped"]) == (2, {"too_long": 1})


@pytest.mark.parametrize("seed", SEEDS)
def test_a_corruption_loads_as_specified_or_is_one_sentence(
    tmp_path: Path, model_folder: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    name = list(CORRUPTIONS)[seed % len(CORRUPTIONS)]
    folder = tmp_path / "data"
    folder.mkdir()
    CORRUPTIONS[name](rng, folder / "train.jsonl")
    command = ["--data", str(folder), "--model", str(model_folder), "--json", "--max-seq-length", "100000"]
    for extra in ([], ["--skip-bad-rows"]):
        status = main([*command, *extra])
        output = capsys.readouterr()
        if status == 0:
            figures = json.loads(output.out)
            assert figures["rows_read"] == figures["rows_kept"] + sum(figures["rows_dropped"].values()) > 0
            assert bool(figures["rows_dropped"].get("bad_row")) <= bool(extra)
        else:
            assert status == 2
            assert output.err.count("\n") == 1, output.err
            place = rf"{re.escape(str(folder))}/train\.\w+"
            assert re.search(rf"error: {place}(:\d+)?: \S", output.err), output.err
            assert "Traceback" not in output.err
            if not (folder / "train.jsonl").is_dir() and "no pair can be used" not in output.err:
                assert re.search(rf"{place}:\d+: ", output.err), output.err
