"""Intervals over pairs and seeds."""

from __future__ import annotations

import numpy as np
import pytest

from orpo_mlx.judging.intervals import clustered_interval, spread, wilson


def test_one_seed_is_wilson() -> None:
    wins = [1] * 13 + [0] * 7
    found = clustered_interval([wins])
    assert (found.low, found.high) == pytest.approx(wilson(13 / 20, 20))
    assert found.mean == 0.65


@pytest.mark.parametrize("wins", [[1] * 13 + [0] * 7, [1] * 20, [0] * 20])
def test_seeds_that_agree_on_every_pair_count_once(wins: list[int]) -> None:
    assert clustered_interval([wins] * 5) == pytest.approx(clustered_interval([wins]))


def test_seeds_that_differ_widen_it() -> None:
    steady = [[1, 0] * 50, [0, 1] * 50]
    torn = [[1] * 75 + [0] * 25, [1] * 25 + [0] * 75]
    first, second = clustered_interval(steady), clustered_interval(torn)
    assert first.mean == second.mean == 0.5
    assert second.high - second.low > 2 * (first.high - first.low)


def test_it_covers_the_truth_where_pairs_and_seeds_both_vary() -> None:
    """Pairs of unequal difficulty, seeds of unequal skill: at least 93 % of intervals hold the expected accuracy."""
    generator = np.random.default_rng(0)
    trials, covered, pooled = 600, 0, 0
    truth = np.mean(1 / (1 + np.exp(-(1 + generator.normal(0, 2, 200_000) + generator.normal(0, 0.2, 200_000)))))
    for _ in range(trials):
        difficulty, skill = generator.normal(0, 2, (1, 80)), generator.normal(0, 0.2, (3, 1))
        chances = 1 / (1 + np.exp(-(1 + difficulty + skill)))
        wins = (generator.random(chances.shape) < chances).astype(int)
        found = clustered_interval(wins.tolist())
        covered += bool(found.low <= truth <= found.high)
        low, high = wilson(float(wins.mean()), wins.size)
        pooled += bool(low <= truth <= high)
    assert covered / trials > 0.93
    # What pooling all seeds in one interval would have claimed.
    assert pooled / trials < 0.9


@pytest.mark.parametrize("wins", [[], [[]], [[1, 0], [1]]])
def test_nothing_to_measure(wins: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="same pairs"):
        clustered_interval(wins)


def test_spread() -> None:
    assert list(spread([1.0, 3.0])) == pytest.approx([2.0, 2**0.5, 1.0, 3.0])
    assert spread([1.5]).sd is None
    with pytest.raises(ValueError, match="at least one"):
        spread([])
