"""Means, resampling and Student's t, written again from their definitions; nothing is imported from the package."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Table = np.ndarray[Any, Any]
"""(seeds, prompts)."""

RESAMPLES = 4000
ALPHA, POWER = 0.05, 0.8


def mean_and_error(rows: list[list[float]]) -> dict[str, float]:
    """The mean of some rows of prompts, a row for each seed, and its standard error."""
    total = sum(map(sum, rows)) / sum(map(len, rows))
    return {"mean": total, "standard_error": error_and_freedom(rows)[0]}


def error_and_freedom(rows: list[list[float]]) -> tuple[float, float]:
    """Standard error of a mean over seeds and prompts, both of them samples, and Satterthwaite's degrees of freedom."""
    by_seed = [sum(row) / len(row) for row in rows]
    by_prompt = [sum(column) / len(column) for column in zip(*rows, strict=True)]
    parts = [(variance_of_mean(values), len(values) - 1) for values in (by_seed, by_prompt)]
    total = parts[0][0] + parts[1][0]
    if total == 0:
        return 0.0, max(freedom for _, freedom in parts)
    return math.sqrt(total), total**2 / sum(part**2 / freedom for part, freedom in parts if part)


def variance_of_mean(values: list[float]) -> float:
    """s²/n; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)


def difference(table: Table) -> dict[str, float]:
    """A mean difference: the wider of the bootstrap's interval and Student's, the larger of their p.

    Resample by resample, where the package multiplies matrices; the draws are numpy's multinomial of seed 0.
    """
    seeds, prompts = table.shape
    rng = np.random.default_rng(0)
    seed_counts = rng.multinomial(seeds, [1 / seeds] * seeds, RESAMPLES)
    prompt_counts = rng.multinomial(prompts, [1 / prompts] * prompts, RESAMPLES)
    means = [float(a @ table @ b) / (seeds * prompts) for a, b in zip(seed_counts, prompt_counts, strict=True)]
    # A mean that is 0 but for rounding is on both sides.
    near = np.where(np.abs(means) < 1e-12, 0.0, means)
    side = min(int((near <= 0).sum()), int((near >= 0).sum()))
    low, high = map(float, np.percentile(means, [2.5, 97.5]))
    p = min(1.0, 2 * (side + 1) / (RESAMPLES + 1))
    mean = float(table.mean())
    error, freedom = error_and_freedom(table.tolist())
    if error:
        reach = quantile(0.05, freedom) * error
        low, high, p = min(low, mean - reach), max(high, mean + reach), max(p, student(mean / error, freedom))
    return {"mean": mean, "low": low, "high": high, "standard_error": error, "freedom": freedom, "p": p}


def holm(ps: dict[str, float]) -> dict[str, float]:
    """p values after Holm's correction: of the k-th smallest, the largest of the first k times what was left."""
    ordered = sorted(ps.items(), key=lambda each: (each[1], each[0]))
    count = len(ordered)
    return {
        name: min(1.0, max((count - before) * p for before, (_, p) in enumerate(ordered[: place + 1])))
        for place, (name, _) in enumerate(ordered)
    }


def detectable(error: float, tests: int, freedom: float, alpha: float = ALPHA) -> float:
    """What is found with the power, by the hardest of so many tests."""
    return error * (quantile(alpha / tests, freedom) + quantile(2 * (1 - POWER), freedom))


def quantile(p: float, freedom: float) -> float:
    """The t beyond which, on both sides together, p of Student's distribution lies: by doubling and halving."""
    high = 1.0
    while student(high, freedom) > p:
        high *= 2
    low = 0.0
    while high - low > 1e-8 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, freedom) > p else (low, middle)
    return low


def student(t: float, freedom: float) -> float:
    """Two-sided p: 1 - the integral of the density over [-|t|, |t|], by Simpson's rule."""
    if freedom > 1e4:
        return math.erfc(abs(t) / math.sqrt(2))
    # The density of a t of 1e3 is spread unevenly over the whole range: in u with t = sinh u it is not.
    count = 1_000
    us = np.linspace(0, math.asinh(abs(t)), count + 1)
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(log_scale - (freedom + 1) / 2 * np.log1p(np.sinh(us) ** 2 / freedom)) * np.cosh(us)
    weights = np.ones(count + 1)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return max(0.0, 1 - 2 * float((density * weights).sum()) * float(us[-1]) / count / 3)
