"""What a step costs, and what mlx-lm-lora takes for it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from orpo_mlx.doctor import speed
from orpo_mlx.doctor.findings import SIZES
from orpo_mlx.doctor.speed import Evaluations, check_rival, check_steps

SMALL = SIZES["cpu quick"]._replace(pair=(8, 8), steps=2, product=64, half_product=64, copied=1 << 16)


def test_evaluations_are_counted_and_timed() -> None:
    own = mx.eval
    evaluations = Evaluations()
    with evaluations.counted():
        mx.eval(mx.zeros((2,)) + 1)
        mx.async_eval(mx.zeros((2,)) + 1)
    assert mx.eval is own
    assert evaluations.count == 2
    assert evaluations.seconds > 0


def test_a_step_is_timed_and_its_peak_predicted() -> None:
    (found,) = check_steps("tiny", SMALL, "float32", "fast")
    figures = found.figures
    # So small a peak is not judged.
    assert found.passed is None
    assert len(figures["steps_s"]) == 2
    assert 0 <= figures["host_s"] < sum(figures["steps_s"])
    assert figures["evals"] >= 1
    assert figures["pair_tokens_per_s"] == pytest.approx(2 * 32 / figures["step_s"])
    assert 0 < figures["peak_gib"] < 1
    assert 0 < figures["predicted_gib"] < 1


@pytest.mark.parametrize(("predicted", "passed"), [(1.0, False), (0.4, None)])
def test_a_peak_beyond_its_prediction_fails(
    predicted: float, passed: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "predicted_peak", lambda *_, **__: predicted)
    (found,) = check_steps("tiny", SMALL, "float32", "plain")
    assert found.passed is passed


def test_a_rival_that_is_not_there() -> None:
    (found,) = check_rival("tiny", SMALL, "float32")
    assert found.passed is None
    assert "is not installed, so nothing is compared" in found.sentence


def test_a_rival_that_is_there_and_one_that_cannot_train(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = ModuleType("mlx_lm_lora.trainer.orpo_trainer")
    trainer.ORPOTrainingArgs = SimpleNamespace

    def train_orpo(model: Any, optimiser: Any, rows: Any, *, args: Any, training_callback: Any) -> None:
        assert [len(rows[0][side]) for side in ("chosen", "rejected")] == [16, 16]
        assert rows[0]["chosen_prompt_length"] == 8
        assert len(model.trainable_parameters()["model"]["layers"]) == 3
        for rate in (1.0, 1.0, 4.0, 4.0):
            training_callback.on_train_loss_report({"iterations_per_second": rate, "peak_memory": 2.0})

    trainer.train_orpo = train_orpo
    for name in ("mlx_lm_lora", "mlx_lm_lora.trainer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, trainer.__name__, trainer)
    monkeypatch.setattr(speed, "version", lambda name: "9.9")
    (found,) = check_rival("tiny", SMALL, "float32")
    # The first two steps compile.
    assert found.figures["step_s"] == 0.25
    assert found.name == "mlx-lm-lora 9.9, tiny, float32"
    del trainer.train_orpo
    (found,) = check_rival("tiny", SMALL, "float32")
    assert found.passed is None
    assert "cannot train here: AttributeError" in found.sentence
