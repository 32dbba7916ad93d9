"""Processes that help: they end with the first, and one that fails is named."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from rich.console import Console

from orpo_mlx.compare.exercise import helpers as module
from orpo_mlx.compare.exercise.helpers import Helpers, helped
from orpo_mlx.compare.exercise.sizes import QUICK_EXACT
from orpo_mlx.reporting.console import Reporter


def start(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


def reporter(said: io.StringIO) -> Reporter:
    return Reporter(Console(file=said, highlight=False, width=200))


def test_helpers_that_fail_are_named_and_the_others_go_on(said: io.StringIO) -> None:
    good, bad, killed = (
        start(code) for code in ("input()", "exit(2)", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    )
    helpers = Helpers([good, bad, killed], reporter(said))
    for process in (bad, killed):
        process.wait()
    assert helpers.at_work()
    assert said.getvalue().split("\n")[:2] == [
        "A process that helped has ended (status 2); 2 go on.",
        "A process that helped has ended (SIGKILL); 1 go on.",
    ]
    before = said.getvalue()
    good.communicate(b"\n")
    # What ends well is not news.
    assert not helpers.at_work()
    assert said.getvalue() == before
    last = Helpers([start("exit(1)")], reporter(said))
    while last.at_work():
        time.sleep(0.01)
    assert "(status 1); this one goes on alone." in said.getvalue()


def test_helpers_end_with_the_context_even_those_that_will_not(
    said: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.2)
    deaf = start("import time; time.sleep(600)")
    Helpers([deaf], reporter(said)).end()
    assert deaf.returncode == -9
    # A module that waits as helpers do: for its input to end.
    monkeypatch.setattr(module, "_MODULE", "code")
    with helped(tmp_path, "exact", QUICK_EXACT, 2, reporter(said)) as helpers:
        living = list(helpers._living)
        assert len(living) == 2
        assert helpers.at_work()
    assert all(process.poll() is not None for process in living)


def test_a_cpu_has_a_training_for_each_core_that_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, gib, expected in ((2, 16, 2), (2, 4, 1), (1, 64, 1), (16, 64, 4), (8, 12, 3), (8, 2, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gib << 18}.__getitem__)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
        assert module.usual_processes() == expected
        # One GPU computes one thing at a time.
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        assert module.usual_processes() == 1
