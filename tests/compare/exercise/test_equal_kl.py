"""Where a training had a given KL."""

from __future__ import annotations

import math

import pytest

from orpo_mlx.compare.exercise.equal_kl import at_targets, crossing


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
