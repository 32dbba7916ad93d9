"""What differences between methods are worth: paired bootstrap, Holm's correction, power, a null of shuffles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_NORMAL = NormalDist()
RESAMPLES = 4000
_ZERO = 1e-12
# Steps of the numerical integral of Student's density; its error is below 1e-8 for 2 and more degrees of freedom.
_INTEGRAL_STEPS = 20_000


class Difference(NamedTuple):
    """A mean difference between two methods."""

    mean: float
    low: float
    """Of the 95 % interval."""
    high: float
    standard_error: float
    p: float
    """Two-sided, of no difference."""


def mean_with_error(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean of `values[seed][prompt]` and its standard error over seeds and prompts (`two_way_variance`)."""
    table = np.asarray(values, np.float64)
    return float(table.mean()), math.sqrt(two_way_variance(table))


def two_way_variance(table: Floats) -> float:
    """Variance of the mean of `table[seed, prompt]` where both seeds and prompts are samples.

    s²(prompt means)/prompts + s²(seed means)/seeds, the variance that the bootstrap of both (`paired_bootstrap`)
    estimates (Owen 2007, "The pigeonhole bootstrap", eq. 6, of which it leaves out the correction for noise of single
    cells: it errs on the wide side). With one seed or one prompt that part is unknown and left out.
    """
    seeds, prompts = table.shape
    variance = table.mean(axis=0).var(ddof=1) / prompts if prompts > 1 else 0.0
    return float(variance + (table.mean(axis=1).var(ddof=1) / seeds if seeds > 1 else 0.0))


def paired_bootstrap(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """The difference of two methods measured under the same seeds on the same prompts.

    Seeds and prompts are each drawn with replacement, the same for both methods (Owen 2007's pigeonhole bootstrap);
    the interval is that of percentiles. p is twice the share of resampled means on the far side of 0, counting the
    measured one, so never below 2/(resamples + 1).

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
    low, high = np.quantile(means, (0.025, 0.975))
    beyond = min((means <= 0).sum(), (means >= 0).sum())
    p = min(1.0, 2 * (int(beyond) + 1) / (resamples + 1))
    return Difference(float(table.mean()), float(low), float(high), math.sqrt(two_way_variance(table)), p)


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


def detectable(standard_error: float, tests: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that is found with a chance of `power`.

    (z(1 - α/2m) + z(power)) · SE, for the hardest of m tests by Holm's procedure (Cohen 1988, chapter 2, for a normal
    mean).

    Args:
        standard_error: of a measured difference.
        tests: m, in one family.
        alpha: chance of any false finding.
        power: of finding it.
    """
    return (_NORMAL.inv_cdf(1 - alpha / (2 * tests)) + _NORMAL.inv_cdf(power)) * standard_error


class NullTest(NamedTuple):
    """Whether measures of several shuffles are what chance gives."""

    mean: float
    standard_error: float
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
    if error == 0:
        return NullTest(mean, 0.0, 1.0 if mean == expected else 0.0)
    return NullTest(mean, error, student_p((mean - expected) / error, len(values) - 1))


def student_p(t: float, freedom: int) -> float:
    """P(|T| >= |t|) of Student's distribution with `freedom` degrees of freedom."""
    # Substituting x = √ν tan θ makes the tail a bounded smooth integral: c ∫ cos^(ν-1) θ dθ up to π/2.
    start = math.atan(abs(t) / math.sqrt(freedom))
    log_c = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)
    width = (math.pi / 2 - start) / _INTEGRAL_STEPS
    middles = start + width * (np.arange(_INTEGRAL_STEPS) + 0.5)
    return float(min(1.0, 2 * math.exp(log_c) * (np.cos(middles) ** (freedom - 1)).sum() * width))


def rounded(value: Any, digits: int = 5) -> Any:
    """Floats in nested lists and dictionaries, rounded: what is published is what everything is computed from."""
    # Otherwise a figure recomputed from the published numbers would differ in its last digits.
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, Mapping):
        return {key: rounded(each, digits) for key, each in value.items()}
    return [rounded(each, digits) for each in value] if isinstance(value, list | tuple) else value
