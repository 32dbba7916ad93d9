"""What a run is told before its first step, and the mode `--memory auto` takes."""

from __future__ import annotations

import os
import re
from typing import Any

import mlx.core as mx
import pytest

from orpo_mlx.cli.train import main
from orpo_mlx.config.checks import make_config
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.engine.segmented_backward import SegmentedBackward
from orpo_mlx.errors import ModelError, TrainingError
from orpo_mlx.memory import choose_mode as memory_plan
from orpo_mlx.memory.choose_mode import plan_memory
from orpo_mlx.memory.predict import Prediction
from orpo_mlx.train import train
from orpo_mlx.training.prepare import prepare
from orpo_mlx.training.run import Run
from tests.helpers.quiet_training import flags, rows, run_quietly

PEAKS = {"fast": 4.0, "balanced": 2.0, "thrift": 1.0, "plain": 8.0}


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Modes that were predicted, whose peaks are `PEAKS`."""
    asked: list[str] = []

    def predict(config: TrainingConfig, *_: Any) -> Prediction:
        asked.append(config.memory)
        return Prediction(PEAKS[config.memory], 0, 0, 0, 0, 0)

    monkeypatch.setattr(memory_plan, "predict", predict)
    return asked


def planned(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, limit: float | None, *, check: bool = True
) -> tuple[Run, list[str]]:
    monkeypatch.setattr(memory_plan, "device_working_set", lambda: limit)
    said: list[str] = []
    run = prepare(make_config({**settings, "memory_check": check}))
    plan_memory(run, said.append)
    return run, said


@pytest.mark.parametrize(
    ("limit", "mode", "kept"), [(4.5, "fast", None), (4.2, "balanced", 0), (2.3, "balanced", 0), (2.1, "thrift", 0)]
)
def test_auto_is_the_fastest_that_is_predicted_to_fit(
    settings: dict[str, Any],
    predicted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    limit: float,
    mode: str,
    kept: int | None,
) -> None:
    run, said = planned({**settings, "method": "dpo"}, monkeypatch, limit)
    assert run.memory.mode == mode == predicted[-1]
    segmented = getattr(run.memory.value_and_grad, "__self__", None)
    assert isinstance(segmented, SegmentedBackward) == (kept is not None)
    assert run.reference is not None
    assert run.reference.scorer is run.scorer
    assert said == [f"Predicted peak {PEAKS[mode]:.2f} GiB (weights {PEAKS[mode]:.2f})."]


def test_where_none_fits_the_smallest_is_refused_by_name(
    settings: dict[str, Any], predicted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = r"take 1.00 GiB, this device recommends 0.50 .* `memory=thrift` `memory_check=False` tries"
    with pytest.raises(TrainingError, match=expected):
        planned(settings, monkeypatch, 0.5)
    assert predicted == ["fast", "balanced", "thrift"]


def test_a_mode_that_was_asked_for_stays(
    settings: dict[str, Any], predicted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = planned({**settings, "memory": "plain"}, monkeypatch, 7.9)
    assert (run.memory.mode, predicted) == ("plain", ["plain"])
    assert said[1] == "Warning: a step is predicted to take 8.00 GiB, this device recommends 7.90 GiB at most."


def test_without_the_check_nothing_is_predicted(
    settings: dict[str, Any], predicted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = planned(settings, monkeypatch, 0.1, check=False)
    assert (run.memory.mode, predicted, said) == ("fast", [], [])


def test_where_nothing_is_recommended_half_of_the_machine_counts_and_nothing_is_refused(
    settings: dict[str, Any], predicted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"SC_PAGE_SIZE": 2**20, "SC_PHYS_PAGES": 1024}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    run, said = planned(settings, monkeypatch, None)
    assert run.memory.mode == "thrift"
    assert len(said) == 1


def test_auto_that_cannot_be_predicted_is_the_smallest(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def predict(*_: Any) -> Prediction:
        raise ModelError("no such layer")

    monkeypatch.setattr(memory_plan, "predict", predict)
    run, said = planned(settings, monkeypatch, 100.0)
    assert run.memory.mode == "thrift"
    assert said == ["The peak of memory cannot be predicted: no such layer"]


def test_a_gpu_with_memory_of_its_own_counts_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda *_: {"total_memory": 24 * 2**30})
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert memory_plan._unstated_room() == pytest.approx(21.6)


def test_the_prediction_comes_first_and_changes_no_number(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings["lora_parameters"] = {"dropout": 0.1}
    run_quietly(settings)
    first = [row["loss"] for row in rows(settings)]
    train(make_config({**settings, "memory_check": True}))
    assert [row["loss"] for row in rows(settings)] == first
    assert re.search(r"^Predicted peak 0\.0\d GiB", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(("share", "expected"), [(2.0, "Predicted"), (0.95, "Warning: a step is"), (0.5, "refused")])
def test_a_run_beyond_the_device_is_warned_of_or_refused(
    settings: dict[str, Any],
    share: float,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    peak = Prediction(1.0, 0.5, 0.25, 0.125, 0.125, 0.0)
    monkeypatch.setattr("orpo_mlx.memory.choose_mode.predict", lambda *_: peak)
    monkeypatch.setattr("orpo_mlx.memory.choose_mode.device_working_set", lambda: share * peak.peak)
    argv = [word for word in flags(settings) if word != "--no-memory-check"]
    assert main(argv) == (2 if expected == "refused" else 0)
    out, err = capsys.readouterr()
    if expected == "refused":
        assert "a step is predicted to take 2.00 GiB, this device recommends 1.00 GiB at most; orpo-mlx fit" in err
        assert main([*argv, "--no-memory-check"]) == 0
    else:
        assert expected in out
        assert ("Warning" in out) == (expected != "Predicted")
        assert "Predicted peak 2.00 GiB (weights 1.00, adapters 0.50, optimiser 0.25" in out


def test_a_run_whose_peak_cannot_be_predicted_goes_on(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: Any) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("orpo_mlx.memory.predict.build", build)
    assert main([word for word in flags(settings) if word != "--no-memory-check"]) == 0
    expected = "The peak of memory cannot be predicted: a model like this one with 2 layers cannot be run (list index"
    assert expected in capsys.readouterr().out
