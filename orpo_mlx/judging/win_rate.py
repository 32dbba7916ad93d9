"""Win rates from preferences, with intervals that know that prompts repeat, and with the length of replies controlled.

Everything here is float64 and knows nothing of models: preferences p_i in 0..1 (1: the candidate wins, 1/2: a tie),
clusters c_i (the prompt), and lengths.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orpo_mlx.judging.intervals import Z_95, Interval, wilson

Array = npt.NDArray[np.float64]

# Ridge of the two coefficients: φ, of a length difference within ±1, is a standard normal a priori; θ is let go nearly
# as far as it wants, and stays finite where every reply won.
_RIDGE = np.array([0.01, 1.0])
_MOST_NEWTON = 100
_CONVERGED = 1e-12


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """Mean of values in 0..1 with its 95 % interval, where values of one cluster are not independent.

    Wilson's interval with the number of trials that would have the mean's variance, Σ_c (Σ_{i in c} (p_i - p))² / n²
    (the clusters' part in the variance of a ratio estimate, Cochran 1977). Where every cluster is one value of 0 or 1
    it is Wilson's interval, exactly.

    Args:
        values: p_i, 0..1.
        clusters: the cluster of each.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value.")
    mean = math.fsum(values) / len(values)
    totals: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        totals[cluster] = totals.get(cluster, 0.0) + value - mean
    variance = math.fsum(total * total for total in totals.values()) / len(values) ** 2
    # Where nothing varies, the clusters are what is known.
    # Not above 0: deviations that cancel but for rounding leave a tiny variance, and no end of trials.
    trials = mean * (1 - mean) / variance if variance > 1e-18 else float(len(totals))
    low, high = wilson(mean, trials)
    return Interval(mean, low, high)


class LengthControlled(NamedTuple):
    """A win rate as it would be if replies were equally long."""

    rate: Interval
    length_coefficient: float
    """φ: above 0, the judge prefers the longer reply (or longer replies are better)."""


def length_controlled(
    preferences: Sequence[float], differences: Sequence[float], clusters: Sequence[Hashable]
) -> LengthControlled:
    """The length-controlled win rate of AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475), for one pair of models.

    P(candidate preferred)_i = σ(θ + φ·tanh(Δ_i / sd(Δ))), Δ_i being candidate's length minus baseline's; the rate is
    σ(θ), what is left at equal lengths. Their third term, how hard an instruction is, needs the judgements of many
    models and is left out. θ, φ minimise Σ_i -[p_i log σ_i + (1 - p_i) log(1 - σ_i)] + 0.005·θ² + 0.5·φ², by Newton's
    method. The interval of θ is from the larger of two variances: the sandwich over clusters, and the inverse of the
    curvature, without which a candidate that wins everywhere would seem certain after three prompts.

    Args:
        preferences: p_i, 0..1.
        differences: Δ_i, in whatever unit.
        clusters: the cluster of each.

    Raises:
        ValueError: no preferences.
    """
    if not preferences:
        raise ValueError("a win rate needs at least one preference.")
    wanted = np.asarray(preferences, np.float64)
    design = length_design(differences)
    beta = fit_logistic(design, wanted)
    share = sigmoid(design @ beta)
    scores = design * (wanted - share)[:, None]
    totals: dict[Hashable, Array] = {}
    for score, cluster in zip(scores, clusters, strict=True):
        totals[cluster] = totals.get(cluster, np.zeros(2)) + score
    outer = sum((np.outer(total, total) for total in totals.values()), np.zeros((2, 2)))
    bread = np.linalg.inv(curvature(design, share))
    error = math.sqrt(max((bread @ outer @ bread)[0, 0], bread[0, 0]))
    low, middle, high = (float(sigmoid(beta[0] + side * Z_95 * error)) for side in (-1, 0, 1))
    return LengthControlled(Interval(middle, low, high), float(beta[1]))


def length_design(differences: Sequence[float]) -> Array:
    """(n, 2): ones, and tanh of the differences in units of their standard deviation; 0 where all are equal."""
    deltas = np.asarray(differences, np.float64)
    spread = float(deltas.std())
    # Equal but for rounding, as a constant's own deviation need not be exactly 0.
    scaled = deltas / spread if spread > 1e-9 * max(1.0, float(np.abs(deltas).max())) else np.zeros_like(deltas)
    return np.stack([np.ones_like(scaled), np.tanh(scaled)], axis=1)


def fit_logistic(design: Array, wanted: Array) -> Array:
    """Coefficients of a logistic regression on shares, with the ridge of `length_controlled`."""
    beta = np.zeros(2)
    for _ in range(_MOST_NEWTON):
        share = sigmoid(design @ beta)
        gradient = design.T @ (wanted - share) - _RIDGE * beta
        step = np.linalg.solve(curvature(design, share), gradient)
        # A whole step from far away can overshoot; the objective is convex, so short ones arrive.
        step *= min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-300))
        beta = beta + step
        if float(np.abs(step).max()) < _CONVERGED:
            break
    return beta


def curvature(design: Array, share: Array) -> Array:
    """The second derivative of the regression's objective, (2, 2)."""
    matrix: Array = (design * (share * (1 - share))[:, None]).T @ design + np.diag(_RIDGE)
    return matrix


def sigmoid(values: Any) -> Any:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(values, np.float64)))


class WinRate(NamedTuple):
    """How a candidate fares against a baseline."""

    wins: int
    losses: int
    ties: int
    rate: Interval
    """Ties, and prompts whose two orders contradict each other, count half."""
    controlled: LengthControlled


def win_rate(preferences: Sequence[float], differences: Sequence[float], clusters: Sequence[Hashable]) -> WinRate:
    """Counts and rates of preferences; ValueError where there are none."""
    return WinRate(
        wins=sum(value > 0.5 for value in preferences),
        losses=sum(value < 0.5 for value in preferences),
        ties=sum(value == 0.5 for value in preferences),
        rate=mean_interval(preferences, clusters),
        controlled=length_controlled(preferences, differences, clusters),
    )
