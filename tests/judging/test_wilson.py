"""Wilson's bounds are the shares from which the one measured lies exactly 1.96 standard errors away."""

from __future__ import annotations

import math

import pytest

from orpo_mlx.judging.intervals import wilson


@pytest.mark.parametrize(("share", "trials"), [(0.5, 10), (0.985, 200), (0.2, 7.5), (0.0, 20), (1.0, 20)])
def test_bounds_solve_the_defining_equation(share: float, trials: float) -> None:
    low, high = wilson(share, trials)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(share - bound) / math.sqrt(bound * (1 - bound) / trials) == pytest.approx(1.959964, rel=1e-5)


def test_no_trials() -> None:
    with pytest.raises(ValueError, match="at least one"):
        wilson(0.5, 0)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Wilson intervals from Newcombe 1998, Statistics in Medicine 17, table I.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes / trials, trials) == pytest.approx((low, high), abs=5e-5)


def test_interval_at_the_ends() -> None:
    assert wilson(1.0, 20)[1] == 1.0
    assert not any(math.isnan(bound) for bound in wilson(1.0, 1))
