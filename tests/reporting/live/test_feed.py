"""A page that reads on from its marks has, at every moment, what the file holds: whatever is done to the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_mlx.folder_lock import LOCK
from orpo_mlx.reporting.live import feed as live
from orpo_mlx.reporting.live.feed import ENDED, GOING_ON, PREPARING, START, Feed, lines_after


class Reader:
    """What a page does with its answers."""

    def __init__(self, path: Path) -> None:
        self.path, self.mark, self.text, self.received = path, "", b"", 0

    def catch_up(self) -> None:
        while True:
            found = lines_after(self.path, self.mark)
            self.text = found.content if found.again else self.text + found.content
            self.mark, self.received = found.mark, self.received + len(found.content)
            if not found.more:
                return


def report(step: int, speed: float) -> bytes:
    return (json.dumps({"step": step, "split": "train", "loss": 0.5, "pair_tokens_per_s": speed}) + "\n").encode()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12), st.booleans()), max_size=12), st.randoms())
@settings(max_examples=60, deadline=None)
def test_a_reader_has_what_the_file_has(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int, bool]], random: Any
) -> None:
    """Cut to some number of lines, written on from there; read now and then, whole lines only."""
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    reader, lines = Reader(path), list[bytes]()
    for kept, added, reads in changes:
        lines = lines[:kept] + [report(min(kept, len(lines)) + step, random.random()) for step in range(added)]
        path.write_bytes(b"".join(lines) + b'{"step": 3, "spl')
        if reads:
            reader.catch_up()
            assert reader.text == b"".join(lines)


def test_nothing_is_sent_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PIECE", 1000)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(report(step, step / 3) for step in range(300)))
    reader = Reader(path)
    for step in range(300, 310):
        reader.catch_up()
        with path.open("ab") as file:
            file.write(report(step, 1.0))
    reader.catch_up()
    assert reader.text == path.read_bytes()
    assert reader.received == path.stat().st_size


def test_a_file_that_is_not_there_comes_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = lines_after(path, "")
    assert (first.mark, first.again, first.content) == (START, False, b"")
    path.write_bytes(report(1, 1.0))
    second = lines_after(path, first.mark)
    assert (second.again, second.content) == (False, report(1, 1.0))
    path.unlink()
    assert lines_after(path, second.mark)[:2] == (START, True)


def test_a_line_without_end_does_not_stop_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PIECE", 1000)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\0" * 5500 + b"\n" + report(1, 1.0))
    reader = Reader(path)
    reader.catch_up()
    assert reader.text.endswith(b"\n" + report(1, 1.0))


@pytest.mark.parametrize(
    "mark", ["x", "-1-0000000000000000", "5", "9999999999999999-0", "../../etc/passwd", "1-" + "g" * 16]
)
def test_what_is_no_mark_is_the_start(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(report(1, 1.0))
    assert lines_after(path, mark).content == report(1, 1.0)


def record(folder: Path, content: Any) -> None:
    (folder / "run.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_the_facts_of_a_run(tmp_path: Path) -> None:
    record(tmp_path, {"settings": {"method": "dpo", "model": "a\x1b[2Jb"}, "total_steps": 40, "resumed_at": [5, 12]})
    (tmp_path / "metrics.jsonl").write_bytes(report(20, 1.0))
    os.utime(tmp_path / "run.json", (1_000_000, 1_000_000))
    os.utime(tmp_path / "metrics.jsonl", (1_000_060, 1_000_060))
    facts = Feed(tmp_path, lambda: ["one\x07", "\ntwo\n\nthree"]).facts()
    assert facts["age_s"] > 1e6
    del facts["age_s"]
    assert facts == {
        "state": ENDED,
        "method": "dpo",
        "model": r"a\x1b[2Jb",
        "total": 40,
        "since": 12,
        "elapsed_s": 60.0,
        "said": [r"one\x07", "two", "three"],
    }
    (tmp_path / LOCK).write_text(f"{os.getpid()}\n")
    assert Feed(tmp_path).facts()["state"] == GOING_ON


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        "[" * 100_000,
        {},
        {"settings": [], "resumed_at": {}, "total_steps": "9"},
        {"total_steps": True},
        {"settings": {"method": 5, "model": None}, "total_steps": -1, "resumed_at": ["x"]},
    ],
)
def test_any_record_leaves_facts(tmp_path: Path, content: Any) -> None:
    record(tmp_path, content)
    facts = Feed(tmp_path).facts()
    assert [facts[key] for key in ("method", "model", "total", "since", "elapsed_s")] == [None, None, None, 0, None]


def test_an_earlier_runs_figures_are_not_shown_while_a_new_one_is_prepared(tmp_path: Path) -> None:
    record(tmp_path, {"total_steps": 40})
    (tmp_path / "metrics.jsonl").write_bytes(report(20, 1.0))
    feed = Feed(tmp_path, state=PREPARING)
    assert feed.lines("").content == b""
    assert feed.facts()["total"] is None
    feed.state = GOING_ON
    assert feed.lines(START).content == report(20, 1.0)
    assert feed.facts()["total"] == 40
