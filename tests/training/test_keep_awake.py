"""A Mac is kept awake while a run lasts; a run that is stopped and woken is the run it would have been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_mlx.training.keep_awake import kept_awake
from tests.helpers.kill_and_resume import FEW_THREADS, same
from tests.helpers.quiet_training import run_quietly
from tests.training.checkpoints.test_resume import LONG


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A caffeinate that writes down what it was asked and goes on until it is ended."""
    noted = folder / "asked"
    program = folder / "bin" / "caffeinate"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {noted}\nexec sleep 60\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("orpo_mlx.training.keep_awake.platform.system", lambda: "Darwin")
    return noted


def test_on_a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = stand_in(tmp_path, monkeypatch)
    said: list[str] = []
    with kept_awake(True, said.append):
        deadline = time.monotonic() + 20
        while not (noted.is_file() and noted.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert noted.read_text() == f"-i -w {os.getpid()}\n"
    assert said == ["The Mac is kept awake while the run lasts; `keep_awake=False` lets it sleep."]
    noted.unlink()
    with kept_awake(False, said.append):
        pass
    assert not noted.exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    with kept_awake(True, said.append):
        pass
    assert "caffeinate cannot be started (No such file or directory)" in said[1]


def test_elsewhere_nothing_is_started_or_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = stand_in(tmp_path, monkeypatch)
    monkeypatch.setattr("orpo_mlx.training.keep_awake.platform.system", lambda: "Linux")
    said: list[str] = []
    with kept_awake(True, said.append):
        pass
    assert (said, noted.exists()) == ([], False)


@pytest.mark.slow
def test_a_run_that_sleeps_and_wakes_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {**LONG, "iters": 30}
    whole, folder = tmp_path / "whole", Path(settings["adapter_path"])
    run_quietly({**settings, "adapter_path": str(whole)})
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    environment = {**os.environ, **FEW_THREADS}
    argv = [sys.executable, "-m", "orpo_mlx.train", "-c", str(config)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(5):
            # What a Mac that falls asleep does to its processes.
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.1)
        process.communicate()
    assert process.returncode == 0
    assert same(whole, folder)
