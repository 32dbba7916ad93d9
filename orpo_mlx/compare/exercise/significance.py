"""What differences between methods are worth: paired bootstrap, Student's t, Holm's correction, power, a null of
shuffles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

RESAMPLES = 4000
_ZERO = 1e-12
# Steps of the numerical integral of Student's density by Simpson's rule; its error is below 1e-7.
_INTEGRAL_STEPS = 2000
# From here on the normal distribution's p is within 1e-5.
_MANY = 1e4
# Bisections of an interval of this width leave an error of 1e-8.
_WIDEST_T, _BISECTIONS = 1000.0, 37


class Difference(NamedTuple):
    """A mean difference between two methods."""

    mean: float
    low: float
    """Of the 95 % interval."""
    high: float
    standard_error: float
    freedom: float
    """Degrees of freedom of the standard error (`two_way_error`)."""
    p: float
    """Two-sided, of no difference."""


def mean_with_error(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean of `values[seed][prompt]` and its standard error over seeds and prompts (`two_way_variance`)."""
    table = np.asarray(values, np.float64)
    return float(table.mean()), two_way_error(table)[0]


def two_way_error(table: Floats) -> tuple[float, float]:
    """Standard error of the mean of `table[seed, prompt]` where both seeds and prompts are samples, and its degrees of
    freedom.

    √(s²(prompt means)/prompts + s²(seed means)/seeds): the variance that the bootstrap of both (`paired_bootstrap`)
    estimates (Owen 2007, "The pigeonhole bootstrap", eq. 6, of which it leaves out the correction for noise of single
    cells: it errs on the wide side). With one seed or one prompt that part is unknown and left out. The degrees of
    freedom are Satterthwaite's (1946): (Σ v)² / Σ v²/(n - 1) over the two parts v.
    """
    parts = [
        (float(means.var(ddof=1)) / len(means), len(means) - 1)
        for means in (table.mean(axis=0), table.mean(axis=1))
        if len(means) > 1
    ]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return 0.0, float(max(table.shape) - 1)
    return math.sqrt(variance), variance**2 / sum(part**2 / freedom for part, freedom in parts)


def paired_bootstrap(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """The difference of two methods measured under the same seeds on the same prompts.

    Seeds and prompts are each drawn with replacement, the same for both methods (Owen 2007's pigeonhole bootstrap). The
    interval of percentiles is widened to Student's by `two_way_error` where that is wider, and p is the larger of the
    two: of few seeds a bootstrap by itself finds too much (with five of them that outweigh the prompts, three times as
    often as it says). Its p is twice the share of resampled means on the far side of 0, counting the measured one, so
    never below 2/(resamples + 1).

    Args:
        ours: for each seed, a value for each prompt.
        theirs: the same of the other method.
        seed: of the resampling.
        resamples: how many.

    Raises:
        ValueError: the two were not measured under as many seeds, on as many prompts.
    """
    table = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    if np.shape(ours) != np.shape(theirs) or table.ndim != 2 or table.size == 0:
        raise ValueError(f"pairs need the same seeds and prompts, found {np.shape(ours)} and {np.shape(theirs)}.")
    seeds, prompts = table.shape
    rng = np.random.default_rng(seed)
    # Counts of how often each was drawn: the mean of a resample is one product of two vectors with the table.
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    by_prompt = rng.multinomial(prompts, np.full(prompts, 1 / prompts), resamples) / prompts
    means = np.einsum("rs,sp,rp->r", by_seed, table, by_prompt, optimize=True)
    # A mean that is 0 but for the order of its sum counts on both sides, whoever adds it up.
    means = np.where(np.abs(means) < _ZERO, 0.0, means)
    low, high = map(float, np.quantile(means, (0.025, 0.975)))
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (int(beyond) + 1) / (resamples + 1))
    mean = float(table.mean())
    error, freedom = two_way_error(table)
    if error:
        half = student_quantile(0.05, freedom) * error
        low, high, p = min(low, mean - half), max(high, mean + half), max(p, student_p(mean / error, freedom))
    return Difference(mean, low, high, error, freedom, p)


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """p values corrected for their number by Holm's step-down procedure (1979), which bounds the chance of any false
    finding among them; monotone, at most 1."""
    corrected: dict[str, float] = {}
    largest = 0.0
    # By name among equals, so that the order in which methods are given changes nothing.
    for rank, name in enumerate(sorted(ps, key=lambda name: (ps[name], name))):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in ps}


def detectable(
    standard_error: float, tests: int, freedom: float = math.inf, *, alpha: float = 0.05, power: float = 0.8
) -> float:
    """The smallest true difference that is found with a chance of `power`.

    (t(1 - α/2m) + t(power)) · SE, for the hardest of m tests by Holm's procedure (Cohen 1988, chapter 2, with quantiles
    of Student's distribution in the place of normal ones).

    Args:
        standard_error: of a measured difference.
        tests: m, in one family.
        freedom: degrees of freedom of the standard error.
        alpha: chance of any false finding.
        power: of finding it, above one half.
    """
    quantiles = student_quantile(alpha / tests, freedom) + student_quantile(2 * (1 - power), freedom)
    return quantiles * standard_error


class NullTest(NamedTuple):
    """Whether measures of several shuffles are what chance gives."""

    mean: float
    standard_error: float
    freedom: float
    p: float
    """Two-sided, of the mean being what was expected."""


def null_test(values: Sequence[float], expected: float) -> NullTest:
    """Student's one-sample t test; where all values are the same, p is 1 if they are as expected, else 0.

    Raises:
        ValueError: fewer than three values, which say nothing of their spread.
    """
    if len(values) < 3:
        raise ValueError("a null needs at least three shuffles.")
    table = np.asarray(values, np.float64)
    mean = float(table.mean())
    error = float(table.std(ddof=1)) / math.sqrt(len(values))
    freedom = len(values) - 1
    if error == 0:
        return NullTest(mean, 0.0, freedom, 1.0 if mean == expected else 0.0)
    return NullTest(mean, error, freedom, student_p((mean - expected) / error, freedom))


def student_quantile(p: float, freedom: float) -> float:
    """The t >= 0 with P(|T| >= t) = p: the inverse of `student_p`."""
    low, high = 0.0, _WIDEST_T
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, freedom) > p else (low, middle)
    return (low + high) / 2


def student_p(t: float, freedom: float) -> float:
    """P(|T| >= |t|) of Student's distribution with `freedom` degrees of freedom; the normal one's where many."""
    if freedom > _MANY:
        return math.erfc(abs(t) / math.sqrt(2))
    # Substituting x = √ν tan θ makes the tail a bounded smooth integral: c ∫ cos^(ν-1) θ dθ up to π/2.
    start = math.atan(abs(t) / math.sqrt(freedom))
    log_c = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)
    angles = np.linspace(start, math.pi / 2, _INTEGRAL_STEPS + 1)
    heights = np.cos(angles) ** (freedom - 1)
    total = heights[0] + heights[-1] + 4 * heights[1:-1:2].sum() + 2 * heights[2:-1:2].sum()
    return float(min(1.0, 2 * math.exp(log_c) * total * (math.pi / 2 - start) / _INTEGRAL_STEPS / 3))


def rounded(value: Any, digits: int = 5) -> Any:
    """Floats in nested lists and dictionaries, rounded: what is published is what everything is computed from."""
    # Otherwise a figure recomputed from the published numbers would differ in its last digits.
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, Mapping):
        return {key: rounded(each, digits) for key, each in value.items()}
    return [rounded(each, digits) for each in value] if isinstance(value, list | tuple) else value
