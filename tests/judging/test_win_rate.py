"""Win rates against other ways to compute them in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from orpo_mlx.judging.intervals import wilson
from orpo_mlx.judging.win_rate import length_controlled, length_design, mean_interval, win_rate


def objective(theta: float, phi: float, preferences: list[float], scaled: list[float]) -> float:
    """The negative log-likelihood with its ridge, term by term."""
    total = 0.005 * theta * theta + 0.5 * phi * phi
    for wanted, length in zip(preferences, scaled, strict=True):
        logit = theta + phi * length
        total += math.log1p(math.exp(-abs(logit))) + max(logit, 0.0) - wanted * logit
    return total


def minimised(preferences: list[float], differences: list[float]) -> tuple[float, float]:
    """Its minimum by a search that halves its steps: no derivative, no linear algebra."""
    spread = math.sqrt(sum((d - sum(differences) / len(differences)) ** 2 for d in differences) / len(differences))
    scaled = [math.tanh(d / spread) for d in differences]
    at, step = (0.0, 0.0), 4.0
    best = objective(*at, preferences, scaled)
    while step > 1e-9:
        moves = [(at[0] + a * step, at[1] + b * step) for a, b in itertools.product((-1, 0, 1), repeat=2)]
        value, place = min((objective(*move, preferences, scaled), move) for move in moves)
        if value < best:
            best, at = value, place
        else:
            step /= 2
    return at


@pytest.mark.parametrize("seed", range(4))
def test_length_control_finds_the_minimum_of_its_objective(seed: int) -> None:
    rng = np.random.default_rng(seed)
    differences = [float(value) for value in rng.normal(30, 80, 60)]
    longer = 1 / (1 + np.exp(-(0.3 + 1.5 * np.tanh(np.array(differences) / 80))))
    preferences = [
        float(value) for value in rng.choice([0, 0.25, 0.5, 0.75, 1], 60) * 0.3 + 0.7 * (rng.random(60) < longer)
    ]
    theta, phi = minimised(preferences, differences)
    found = length_controlled(preferences, differences, range(60))
    assert found.rate.mean == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-6)
    assert found.length_coefficient == pytest.approx(phi, abs=1e-6)


def test_a_judge_that_only_likes_length_is_taken_back_to_even() -> None:
    rng = np.random.default_rng(0)
    differences = rng.normal(60, 100, 4000)
    preferences = [
        float(value) for value in rng.random(4000) < 1 / (1 + np.exp(-3 * np.tanh(differences / differences.std())))
    ]
    found = win_rate(preferences, [float(value) for value in differences], range(4000))
    assert found.rate.mean > 0.6
    assert found.controlled.rate.low < 0.5 < found.controlled.rate.high


@pytest.mark.parametrize("preferences", [[1.0] * 9, [0.0] * 9, [0.5] * 9])
@pytest.mark.parametrize("differences", [[0.0] * 9, [7.0] * 9, [float(n) for n in range(9)]])
def test_extremes_stay_finite_and_inside(preferences: list[float], differences: list[float]) -> None:
    found = win_rate(preferences, differences, range(9))
    for rate in (found.rate, found.controlled.rate):
        assert 0 <= rate.low <= rate.mean <= rate.high <= 1
    assert abs(found.controlled.rate.mean - preferences[0]) < 0.05
    # Nine prompts are not enough to be sure of anything.
    assert found.controlled.rate.high - found.controlled.rate.low > 0.25
    assert np.isfinite(length_design(differences)).all()


def test_the_interval_is_wilsons_where_no_prompt_repeats_and_wider_where_prompts_do() -> None:
    values = [1.0] * 30 + [0.0] * 10
    alone = mean_interval(values, range(40))
    assert alone[1:] == pytest.approx(wilson(0.75, 40))
    # The same 20 values twice are no more than 20 values.
    twice = mean_interval(values[::2] * 2, [*range(20), *range(20)])
    assert twice[1:] == pytest.approx(wilson(0.75, 20))
    assert twice.high - twice.low > alone.high - alone.low


def test_the_interval_covers_what_it_says_where_prompts_repeat() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        # 40 prompts of 5 replies each, whose win rate differs from prompt to prompt; 0.6 on average.
        rates = rng.beta(1.2, 0.8, 40)
        values = (rng.random((40, 5)) < rates[:, None]).astype(float)
        found = mean_interval(values.ravel().tolist(), np.repeat(np.arange(40), 5).tolist())
        covered += found.low <= 0.6 <= found.high
    assert 0.91 <= covered / 400 <= 0.98
