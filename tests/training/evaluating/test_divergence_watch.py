"""Troubles that are there are reported, once; noise, and runs that go well, are left in peace."""

from __future__ import annotations

import json

import numpy as np
import pytest

from orpo_mlx.training.checkpoints.progress import Progress
from orpo_mlx.training.evaluating.divergence_watch import ALWAYS_RIGHT, ALWAYS_WRONG, FALLING, SPAN, DivergenceWatch


def reported(chosen: list[float], rejected: list[float], accuracy: list[float]) -> list[str]:
    watch, said = DivergenceWatch(), []
    for number, values in enumerate(zip(chosen, rejected, accuracy, strict=True)):
        said += watch.add(dict(zip(("rewards/chosen", "rewards/rejected", "rewards/accuracies"), values, strict=True)))
        # A watch that is saved and read again goes on as if it had not been.
        if number % 7 == 0:
            watch = DivergenceWatch.from_json(json.loads(json.dumps(watch.to_json())))
    return said


def series(trend: float, *, seed: int, length: int = 3 * SPAN, noise: float = 0.1) -> list[float]:
    rng = np.random.default_rng(seed)
    return [float(value) for value in trend * np.arange(length) + noise * rng.standard_normal(length)]


MIXED = [0.5, 1.0] * (3 * SPAN // 2)


def test_both_sides_falling_is_told_once() -> None:
    said = reported(series(-0.02, seed=0), series(-0.03, seed=1), MIXED)
    assert said == [FALLING.format(span=SPAN)]


@pytest.mark.parametrize(("chosen", "rejected"), [(0.02, -0.03), (-0.02, 0.03), (0.02, 0.02)])
def test_one_side_falling_is_how_it_should_be(chosen: float, rejected: float) -> None:
    assert reported(series(chosen, seed=0), series(rejected, seed=1), MIXED) == []


def test_noise_is_seldom_taken_for_a_fall() -> None:
    alarms = sum(bool(reported(series(0, seed=seed), series(0, seed=1000 + seed), MIXED)) for seed in range(200))
    assert alarms == 0


@pytest.mark.parametrize(("value", "text"), [(1.0, ALWAYS_RIGHT), (0.0, ALWAYS_WRONG)])
def test_accuracy_that_does_not_move(value: float, text: str) -> None:
    length = 3 * SPAN
    rising, falling = series(0.02, seed=0), series(-0.02, seed=1)
    assert reported(rising, falling, [value] * length) == [text.format(span=SPAN)]
    assert reported(rising, falling, ([value] * (SPAN - 1) + [0.5]) * 3) == []


def test_a_checkpoint_keeps_it_under_the_name_it_always_had() -> None:
    progress = Progress()
    progress.watch.add({"rewards/chosen": 0.5, "rewards/rejected": 0.25, "rewards/accuracies": 1.0})
    saved = progress.to_json()
    assert saved["watch"] == {"seen": [[0.5, 0.25, 1.0]], "said": []}
    assert Progress.from_json(json.loads(json.dumps(saved))).watch.to_json() == saved["watch"]
