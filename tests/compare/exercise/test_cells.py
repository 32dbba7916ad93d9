"""Cells by one process and by several: each is computed once, and nobody's end holds up the others."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orpo_mlx.compare.exercise.cells import BusyError, Cells, every, until_done
from orpo_mlx.errors import ConfigError

NAMED = {"method": "dpo", "seed": 0}
# A process that holds a cell until its input ends, and then dies within it.
HOLDER = """
import os, sys
from pathlib import Path
from orpo_mlx.compare.exercise.cells import Cells

def compute():
    print("at it", flush=True)
    sys.stdin.read()
    os._exit(9)

Cells(Path(sys.argv[1]), {}, lambda *told: None).get({"method": "dpo", "seed": 0}, compute)
"""


def ignore(done: int, name: str, seconds: float) -> None:
    pass


def never() -> dict[str, Any]:
    raise AssertionError("computed again")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is at the cell of `NAMED`."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at it\n"
        yield process


def test_a_cell_that_another_process_is_at_is_left_to_it_and_taken_over_when_it_dies(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    cells = Cells(tmp_path, {}, ignore)
    with pytest.raises(BusyError):
        cells.get(NAMED, never)
    assert cells.get({"method": "dpo", "seed": 1}, lambda: {"a": 1}) == {"a": 1}
    assert holder.stdin is not None
    holder.stdin.close()
    assert holder.wait() == 9
    assert cells.get(NAMED, lambda: {"a": 2}) == {"a": 2}
    assert Cells(tmp_path, {}, ignore).get(NAMED, never) == {"a": 2}


def test_what_is_no_cell_is_computed_and_a_damaged_folder_is_one_sentence(tmp_path: Path) -> None:
    Cells(tmp_path, {}, ignore).get(NAMED, lambda: {"a": 1})
    (cell,) = (path for path in tmp_path.glob("*.json") if path.name != "exercise.json")
    for text in ("[]", '"a"', '{"ident', "{}"):
        cell.write_text(text)
        assert Cells(tmp_path, {}, ignore).get(NAMED, lambda: {"a": 2}) == {"a": 2}
    for text in ("[]", '{"half', ""):
        (tmp_path / "exercise.json").write_text(text)
        with pytest.raises(ConfigError, match=r"exercise\.json"):
            Cells(tmp_path, {}, ignore)


def test_cells_are_rounded_and_what_they_are_computed_from_is_not(tmp_path: Path) -> None:
    exact = 1.000000123456789
    for cells in (Cells(tmp_path, {}, ignore), Cells(tmp_path, {}, ignore)):
        assert cells.get({"what": "a"}, lambda: {"value": exact}) == {"value": 1.0}
        assert cells.keep({"what": "b"}, lambda: {"value": exact}) == {"value": exact}


def test_what_is_left_to_others_is_not_computed_but_read_once_it_is_there(tmp_path: Path) -> None:
    told: list[tuple[int, str, float]] = []
    cells = Cells(tmp_path, {}, lambda *words: told.append(words))
    cells.left_to_others = lambda: True
    with pytest.raises(BusyError):
        cells.get(NAMED, never)
    Cells(tmp_path, {}, ignore).get(NAMED, lambda: {"a": 1})
    for _ in range(2):
        assert cells.get(NAMED, never) == {"a": 1}
    # Told once, with the time that the other process took; a later command is told that it was there.
    assert [words[:2] for words in told] == [(1, "dpo 0")]
    assert told[0][2] > 0
    told.clear()
    Cells(tmp_path, {}, lambda *words: told.append(words)).get(NAMED, never)
    assert told == [(1, "dpo 0", 0.0)]


def test_what_nobody_is_at_is_not_held_up_by_what_somebody_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    held = {"b": 2, "c": 1}

    def call(name: str) -> Callable[[], str]:
        def make() -> str:
            made.append(name)
            if held.get(name, 0):
                raise BusyError
            return name

        return make

    calls = [call(name) for name in "abcd"]
    with pytest.raises(BusyError):
        every(calls)
    assert made == list("abcd")
    pauses: list[float] = []

    def others_finish(seconds: float) -> None:
        pauses.append(seconds)
        held.update({name: left - 1 for name, left in held.items() if left})

    monkeypatch.setattr(time, "sleep", others_finish)
    until_done(calls)
    assert len(pauses) == 2
    assert every(calls) == list("abcd")
