"""Every method gets the same number of trainings of the same lengths, and a grid of the same size."""

from __future__ import annotations

import pytest

from orpo_mlx.compare.exercise.contenders import CONTENDERS, grid
from orpo_mlx.compare.exercise.halving import Round, successive_halving
from orpo_mlx.compare.exercise.sizes import EXTENTS


def test_the_best_go_on_and_the_last_entry_won() -> None:
    worth = {"a": 1.0, "b": 4.0, "c": 3.0, "d": 4.0}
    asked: list[tuple[str, int]] = []

    def score(setting: str, each: Round) -> float:
        asked.append((setting, each.steps))
        # What is best after few steps need not be so after many.
        return worth[setting] if each.steps < 9 else -worth[setting]

    found = successive_halving(list(worth), [Round(4, 2), Round(2, 9)], score)
    assert asked == [("a", 2), ("b", 2), ("c", 2), ("d", 2), ("b", 9), ("d", 9)]
    assert found[-1].setting == "b"
    with pytest.raises(ValueError, match="as many"):
        successive_halving(["a"], [Round(2, 1)], score)


def test_all_methods_get_the_same_budget() -> None:
    for extent in EXTENTS.values():
        for size in extent:
            count = size.rounds[0].settings
            for contender in CONTENDERS:
                settings = grid(contender, size.rates, count)
                assert len(set(settings)) == count, contender.name
                assert {settings[0].rate, settings[-1].rate} == {size.rates[0], size.rates[-1]}
    full = EXTENTS["full"].exact
    # What was promised of the full one.
    assert full.rounds[0].settings // len(full.rates) >= 4
    assert full.seeds >= 10
    assert full.test_prompts * full.samples >= 4096
    assert EXTENTS["full"].open.seeds >= 5
    assert EXTENTS["full"].open.pairs >= 180
