"""A command that takes long says so every few seconds."""

from __future__ import annotations

import inspect
import io
import sys
import time
from functools import partial

import pytest

from orpo_mlx.cli import fit
from orpo_mlx.cli.common.heartbeat import heartbeat


@pytest.mark.parametrize("terminal", [False, True])
def test_it_beats_until_the_end(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with heartbeat("working", every=0.02):
        time.sleep(0.2)
    said = stream.getvalue()
    assert said.count("working: 0 s") >= 2
    assert said.endswith("\r" if terminal else "\n")
    time.sleep(0.1)
    assert stream.getvalue() == said


def test_what_is_quick_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with heartbeat("working"):
        pass
    assert capsys.readouterr().err == ""


def test_fit_is_never_silent(
    model_folder: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import orpo_mlx.memory.fit as prediction

    predicted = prediction.predicted

    def slowly(*arguments: object) -> object:
        time.sleep(0.5)
        return predicted(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(prediction, "predicted", slowly)
    # Nobody waits here for what three seconds of silence would show.
    assert inspect.signature(heartbeat).parameters["every"].default < 3
    monkeypatch.setattr(fit, "heartbeat", partial(heartbeat, every=0.1))
    assert fit.main(["--model", str(model_folder), "--max-seq-length", "16"]) == 0
    assert "running steps of small models of this shape: " in capsys.readouterr().err
