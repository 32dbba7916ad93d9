"""Modes against each other, steps against a CPU's, interrupt and resume."""

from __future__ import annotations

import json
import math
from importlib.resources import files

import mlx.core as mx
import pytest

from orpo_mlx.doctor.package import MEMORY_MODES
from orpo_mlx.doctor.training import (
    INTERRUPTED_AFTER,
    STEPS,
    STORED,
    Step,
    against_plain,
    against_stored,
    near_stored,
    resumed_finding,
    stored_steps,
)
from tests.doctor.conftest import Examined

A = {"a": mx.array([1.0, 2.0])}


def off_by(share: float) -> dict[str, mx.array]:
    return {"a": A["a"] * (1 + share)}


def test_every_mode_is_plain(examined: Examined) -> None:
    found = examined.of("modes")
    assert len(found) == 2 * len(MEMORY_MODES)
    assert all(each.passed for each in found)
    assert max(each.figures["gradient_error"] for each in found) < 1e-5


def test_training_gives_the_stored_steps_and_resumes_bit_for_bit(examined: Examined) -> None:
    defaults, stored, resumed = examined.of("training")
    assert defaults.passed, defaults.sentence
    assert len(defaults.figures["losses"]) == 3
    assert stored.passed, stored.sentence
    assert len(stored.figures["losses"]) == STEPS
    assert resumed.passed
    assert f"interrupted after step {INTERRUPTED_AFTER} and resumed: equal bit for bit" in resumed.sentence


@pytest.mark.parametrize(
    ("dtype", "loss", "gradient", "passed"),
    [
        ("float32", 1e-6, 1e-5, True),
        ("float32", 1e-4, 1e-5, False),
        ("float32", 1e-6, 1e-3, False),
        # `plain` is 4 % off itself.
        ("bfloat16", 0.05, 0.05, True),
        ("bfloat16", 0.05, 0.12, False),
    ],
)
def test_a_mode_that_is_off_fails(dtype: str, loss: float, gradient: float, passed: bool) -> None:
    rounding = 0.0 if dtype == "float32" else 0.04
    steps = {name: Step(1 + off, off_by(off)) for name, off in (("exact", 0.0), ("plain", rounding))}
    found = {"fast": Step(1 + loss, off_by(gradient)), "plain": steps["plain"]}
    fast, plain = against_plain("all", dtype, found, steps["exact"])
    assert fast.passed is passed, fast.sentence
    assert plain.passed


def test_steps_that_are_not_the_stored_ones_fail() -> None:
    stored = json.loads(files("orpo_mlx.doctor").joinpath(STORED).read_text(encoding="utf-8"))
    rows = [{"loss": loss, "grad_norm": norm} for loss, norm in zip(stored["loss"], stored["grad_norm"], strict=True)]
    assert against_stored(rows).passed
    rows[-1]["loss"] *= 1.01
    assert against_stored(rows).passed is False


def test_a_first_loss_that_no_rounding_explains_fails() -> None:
    expected = stored_steps()["loss"][0]
    assert near_stored([{"loss": 1.01 * expected}]).passed
    for wrong in (1.1 * expected, math.nan):
        assert near_stored([{"loss": wrong}]).passed is False


@pytest.mark.parametrize(
    ("second", "resumed", "passed", "words"),
    [
        (0.0, 0.0, True, "equal bit for bit"),
        (0.0, 1e-6, False, "adapters differ by 9.5e-07"),
        (1e-6, 2e-6, True, "the same run twice differs by"),
        (1e-6, 1e-2, False, "adapters differ by 1.0e-02"),
    ],
)
def test_a_resumed_run_may_differ_where_equal_runs_do(second: float, resumed: float, passed: bool, words: str) -> None:
    found = resumed_finding(A, off_by(second), off_by(resumed))
    assert found.passed is passed
    assert words in found.sentence
