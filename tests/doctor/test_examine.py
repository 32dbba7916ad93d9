"""The examination as a whole, and what becomes of it where its process dies."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from orpo_mlx.doctor import examine as module
from orpo_mlx.doctor.examine import Event, Process, Say, Unit, events, examine, planned, record_of, record_text
from orpo_mlx.doctor.findings import GROUPS, Finding
from tests.doctor.conftest import TINY, Examined

# Examines four units. The process that begins before the second dies there, as one does whose GPU fails.
CHILD = """
import json, os, signal, sys, time
for number in range(int(sys.argv[1]), 4):
    print(json.dumps({"unit": number, "of": 4, "group": "modes", "name": f"part {number}"}), flush=True)
    if number == 1:
        print("/Users/ada/metal.cpp: the command buffer failed", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGABRT)
    if number == 2:
        time.sleep(0.5)
    finding = {"group": "modes", "name": f"part {number}", "passed": True, "sentence": "well", "figures": {}}
    print(json.dumps({"finding": finding}), flush=True)
print(json.dumps({"done": True}), flush=True)
"""


def nothing_said(line: str) -> None:
    pass


def test_a_whole_examination_passes_on_this_machine(examined: Examined) -> None:
    record = record_of(examined.findings, "quick", 9.0)
    assert record["failures"] == []
    assert record["verdict"] == "PASS"
    assert list(record["checks"]) == list(GROUPS[1:])
    assert len(examined.said) == examined.units
    assert json.loads(record_text(record)) == json.loads(json.dumps(record))
    # A list of figures takes a line: a record of a thousand calls can be read, and compared in a pull request.
    assert max(map(len, record_text(record).splitlines())) < 1000
    assert '["queries", "mask"' in record_text(record)


def test_a_record_has_no_path() -> None:
    found = Finding("paths", "fast", False, "is off", {"notes": ["OSError in /Users/ada/.venv/lib/mlx.metallib: no"]})
    text = record_text(record_of([found], "quick", 1.0))
    assert "ada" not in text
    assert json.loads(text)["checks"]["paths"][0]["notes"] == ["OSError in mlx.metallib: no"]


def test_a_gpu_has_more_to_examine() -> None:
    cpu, gpu = (planned(TINY, full=True, bench=False, gpu=gpu) for gpu in (False, True))
    names = {(unit.group, unit.name) for unit in gpu} - {(unit.group, unit.name) for unit in cpu}
    assert ("modes", "bfloat16, 4 bits") in names
    assert ("speed", "Llama-3.2-3B, 4 of 28 layers, fast") in names
    assert not [name for name in names if name[1].endswith("layers, plain")]


def test_a_process_that_dies_fails_its_unit_and_the_others_are_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HEARTBEAT_S", 0.1)
    said: list[str] = []
    findings = examine(Process([sys.executable, "-c", CHILD]), said.append)
    assert [(found.name, found.passed) for found in findings] == [
        ("part 0", True),
        ("part 1", False),
        ("part 2", True),
        ("part 3", True),
    ]
    assert findings[1].sentence == "the process was ended by SIGABRT: metal.cpp: the command buffer failed"
    assert [line for line in said if line[0] != " "] == [f"{n + 1}/4 modes: part {n}" for n in range(4)]
    assert any(line.startswith("  still at it, ") for line in said)


def test_a_check_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HEARTBEAT_S", 0.05)
    monkeypatch.setattr(module, "_LONGEST_S", 0.3)
    monkeypatch.setattr(module, "_MOST_DEATHS", 1)
    hangs = 'import time; print(\'{"unit": 0, "of": 1, "group": "modes", "name": "x"}\', flush=True); time.sleep(60)'
    started = time.monotonic()
    findings = examine(Process([sys.executable, "-c", hangs]), nothing_said)
    assert time.monotonic() - started < 30
    assert findings[0].sentence == "the process was ended by SIGKILL"


def test_a_process_that_cannot_begin_is_not_tried_again() -> None:
    tries: list[int] = []

    def run(first: int, say: Say) -> Iterator[Event]:
        tries.append(first)
        yield {"died": "the process ended with status 1: ImportError: no Metal here"}

    findings = examine(run, nothing_said)
    assert tries == [0]
    assert findings[0].passed is False
    record = record_of(findings, "full", 1.0)
    assert record["verdict"] == "FAIL"
    assert record["failures"][0] == "machine: start: the process ended with status 1: ImportError: no Metal here"


def test_processes_that_die_again_and_again_end_the_examination() -> None:
    def run(first: int, say: Say) -> Iterator[Event]:
        yield {"unit": first, "of": 99, "group": "modes", "name": f"part {first}"}
        yield {"died": "killed"}

    findings = examine(run, nothing_said)
    assert [found.name for found in findings] == [f"part {n}" for n in (0, 1, 2, 3, 4, 4)]
    assert "was not examined" in findings[-1].sentence


def test_an_exception_ends_its_unit_alone() -> None:
    def broken() -> Iterator[Finding]:
        raise MemoryError("too large")
        yield

    def well() -> Iterator[Finding]:
        yield Finding("speed", "second", None, "measured", {"x": 1})

    units = [Unit("modes", "first", broken), Unit("speed", "second", well)]
    found: list[Any] = [event["finding"] for event in events(units) if "finding" in event]
    assert [(each["name"], each["passed"]) for each in found] == [("first", False), ("second", None)]
