"""Where a training had a given KL."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from orpo_mlx.compare.exercise.analysis import tokens_at_kl
from orpo_mlx.compare.exercise.equal_kl import at_targets, crossing
from orpo_mlx.compare.exercise.tables import courses, lengths_at_kl


class Course:
    """A training whose gold is √KL times a factor for each prompt; counts what is asked."""

    factors = (1.0, 2.0, 3.0)

    def __init__(self, kls: list[float]) -> None:
        self.kls = kls
        self.asked: set[int] = set()

    def look(self, place: int) -> dict[str, list[float]]:
        self.asked.add(place)
        kl = self.kls[place]
        return {"kl": [kl - 0.01, kl, kl + 0.01], "gold": [each * math.sqrt(kl) for each in self.factors]}


@pytest.mark.parametrize("valid", [[0.0, 0.1, 0.4, 0.9], [0.0, 0.6, 0.7, 0.8], [0.0, 0.01, 0.02, 0.03]])
def test_gold_that_grows_as_the_root_is_found_exactly(valid: list[float]) -> None:
    """Wherever looks on other prompts say that it is."""
    course = Course([0.0, 0.09, 0.36, 1.0])
    found = at_targets((0.25, 0.64, 2.0), valid, [0, 8, 16, 24], course.look)
    assert list(found) == ["0.25", "0.64"]
    assert found["0.25"]["gold"] == pytest.approx([0.5, 1.0, 1.5])
    assert found["0.25"]["step"] == pytest.approx(8 + 8 * (0.5 - 0.3) / 0.3)
    assert found["0.64"]["gold"] == pytest.approx([0.8, 1.6, 2.4])


def test_few_looks_are_measured() -> None:
    course = Course([0.0, *(0.1 * place for place in range(1, 12))])
    at_targets((0.55,), course.kls, list(range(12)), course.look)
    assert course.asked == {5, 6}


def test_a_training_that_was_never_there_is_not_said_to_be() -> None:
    assert crossing(0.5, [0.0], lambda place: 9.0) is None
    assert crossing(0.5, [0.0, 0.6], lambda place: 0.4 * place) is None


def test_lengths_at_a_kl_are_compared_over_seeds() -> None:
    """KL is (step/8)², and tokens are 20 and so many more for each step: at KL 0.25 half of the steps to KL 1."""

    def seed(more: float) -> dict[str, Any]:
        looks = [{"step": step, "kl": (step / 8) ** 2, "tokens": 20.0 + more * step} for step in (2, 8)]
        return {"curve": [{"step": 0, "kl": 0.0}, *looks], "at_kl": {"0.25": {"step": 4.0}}}

    of_dpo = [0.5, 0.6, 0.7, 0.6]
    slopes = {"dpo": of_dpo, "orpo": [2 * each for each in of_dpo], "ipo": of_dpo, "sft": of_dpo}
    variant = {name: {"seeds": [seed(each) for each in more]} for name, more in slopes.items()}
    del variant["sft"]["seeds"][1]["at_kl"]["0.25"]
    study = {"size": {"fixed_steps": True}, "base": {"tokens": [19.0, 21.0]}}
    found = tokens_at_kl(variant, study)["0.25"]
    assert set(found["methods"]) == {"dpo", "orpo", "ipo"}
    for name, more in slopes.items():
        if name != "sft":
            expected = 20 + 4 * np.mean(more), 4 * np.std(more, ddof=1) / 2
            assert tuple(found["methods"][name].values()) == pytest.approx(expected)
    gap = found["differences"]["orpo"]
    assert gap["mean"] == pytest.approx(4 * np.mean(of_dpo))
    # Student's distribution of three degrees of freedom.
    x = float(np.mean(of_dpo) / np.std(of_dpo, ddof=1) * 2 / math.sqrt(3))
    assert gap["p"] >= (1 - 2 * (x / (1 + x * x) + math.atan(x)) / math.pi) * (1 - 1e-5)
    assert found["differences"]["ipo"]["p_holm"] == 1
    # Looks of valid prompts are no looks of the test prompts; where replies have one length there is nothing to say.
    assert tokens_at_kl(variant, {**study, "size": {}}) == {}
    assert tokens_at_kl(variant, {**study, "base": {"gold": [0.0]}}) == {}
    tier = {"variants": {"clean": variant}, "analysis": {"tokens_at_kl": {"clean": {"0.25": found}}}}
    results = {"tiers": {"open": tier}}
    shown = {row[1].text: row[2].text for row in lengths_at_kl(results).rows}
    assert shown == {"dpo": "22.4 (0.2)", "orpo": "24.8 (0.3)*", "ipo": "22.4 (0.2)", "sft": "–"}


def test_courses_are_means_over_seeds_at_the_steps_that_all_have() -> None:
    def seeds(*curves: list[tuple[int, float, float]]) -> dict[str, Any]:
        keys = ("step", "kl", "gold")
        return {"seeds": [{"test_curve": [dict(zip(keys, look, strict=True)) for look in curve]} for curve in curves]}

    start = (0, 0.0, 0.2)
    methods = {
        "sft": seeds([start, (4, 1.0, 0.3)], [start, (4, 2.0, 0.5), (8, 3.0, 0.7)]),
        "dpo": seeds([start, (4, 1.0, 0.3), (8, 3.0, 0.9)], [start, (4, 1.0, 0.3), (8, 4.0, 0.8)]),
    }
    tier: dict[str, Any] = {"size": {"fixed_steps": True}, "variants": {"clean": methods}}
    found = courses({"tiers": {"open": tier}}, "open")
    assert found.header == ("variant", "method", "step 4, KL: gold", "step 8, KL: gold")
    assert [[cell.text for cell in row] for row in found.rows] == [
        ["clean", "sft", "1.50: 0.400", "–"],
        ["clean", "dpo", "1.00: 0.300", "3.50: 0.850"],
    ]
    # Elsewhere trainings are measured at steps of their own.
    assert courses({"tiers": {"open": {**tier, "size": {}}}}, "open").rows == ()
