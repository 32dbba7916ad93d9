"""How sure a measured share is, and how far repetitions lie apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

Z_95 = 1.959963984540054
"""The standard normal's 97.5 % point."""


def wilson(share: float, trials: float) -> tuple[float, float]:
    """95 % interval of a share: bounds in 0..1, sensible at 0 and 1 where the normal one is not.

    Args:
        share: wins over trials, 0..1.
        trials: how many; an effective number need not be whole.

    Raises:
        ValueError: no trials.
    """
    if trials <= 0:
        raise ValueError("an interval needs at least one trial.")
    z = Z_95
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # The exact bound at 0 or all successes is 0 or 1; rounding must not leave it a hair inside.
    return (0.0 if share <= 0 else centre - half), (1.0 if share >= 1 else centre + half)


class Interval(NamedTuple):
    """A share in 0..1 with its 95 % interval."""

    mean: float
    low: float
    high: float


class Spread(NamedTuple):
    """Repetitions over seeds."""

    mean: float
    sd: float | None
    """Sample standard deviation; None for a single seed."""
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and range of a measure over seeds; ValueError where there are no values."""
    if not values:
        raise ValueError("a spread needs at least one value.")
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), sd, min(values), max(values))


def clustered_interval(wins: Sequence[Sequence[int]]) -> Interval:
    """95 % interval of an accuracy measured by several seeds on the same held-out pairs.

    Wilson's interval (1927) with the number of trials that would have the variance of the mean, which is the sum of two
    parts: that of the pairs' win rates over the number of pairs, and that of the seeds' accuracies over the number of
    seeds. For one seed it is Wilson's interval of its wins, exactly.

    Args:
        wins: for each seed, 1 or 0 for each held-out pair, in the same order.

    Raises:
        ValueError: no wins, or seeds of different lengths.
    """
    if not wins or not wins[0] or any(len(row) != len(wins[0]) for row in wins):
        raise ValueError("an interval needs the wins of the same pairs for every seed.")
    # Every seed is judged by the same pairs, so seeds x pairs are not that many independent trials: a pair that is hard
    # for one seed is hard for the others. Pooling them in one Wilson interval would be too narrow by up to the square
    # root of the number of seeds; an interval over the seeds' accuracies alone would forget that other pairs could have
    # been held out, and three seeds make a poor standard deviation. The chance of a single pair under a single seed is
    # in both parts, which errs on the wide side.
    seeds = len(wins)
    pairs = len(wins[0])
    rates = [sum(column) / seeds for column in zip(*wins, strict=True)]
    mean = statistics.fmean(rates)
    variance = statistics.pvariance(rates) / pairs
    if seeds > 1:
        variance += statistics.variance([sum(row) / pairs for row in wins]) / seeds
    # Where nothing varies, the pairs are what is known.
    trials = mean * (1 - mean) / variance if variance > 0 else float(pairs)
    low, high = wilson(mean, trials)
    return Interval(mean, low, high)
