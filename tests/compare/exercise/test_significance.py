"""Statistics against scipy, statsmodels and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from orpo_mlx.compare.exercise.significance import (
    detectable,
    holm,
    null_test,
    paired_bootstrap,
    rounded,
    student_p,
    student_quantile,
    two_way_error,
)


def test_student_is_scipys() -> None:
    # scipy 1.17.1: 2 * scipy.stats.t.sf(t, df)
    for t, freedom, p in SCIPY_T:
        assert student_p(t, freedom) == pytest.approx(p, rel=1e-6)


SCIPY_T = (
    (0.5, 2, 0.6666666666666667),
    (2.0, 3, 0.13932596855884305),
    (4.5, 7, 0.0027983300778426316),
    (-1.2, 9, 0.2607731973901615),
    (12.0, 30, 5.580185415199261e-13),
)


def test_a_null_is_scipys() -> None:
    # scipy.stats.ttest_1samp
    found = null_test(NULL_VALUES, 0.5)
    assert found.p == pytest.approx(SCIPY_NULL_P, rel=1e-6)
    assert null_test([0.5, 0.5, 0.5], 0.5).p == 1
    assert null_test([0.6, 0.6, 0.6], 0.5).p == 0
    with pytest.raises(ValueError, match="three"):
        null_test([0.5, 0.6], 0.5)


NULL_VALUES = (0.52, 0.47, 0.55, 0.51, 0.58, 0.49)
SCIPY_NULL_P = 0.27521973197398386


def test_holm_is_statsmodels() -> None:
    # statsmodels 0.15.0: multipletests(ps, method="holm")
    found = holm(dict(zip("abcde", (0.01, 0.04, 0.03, 0.005, 0.9), strict=True)))
    assert list(found) == list("abcde")
    assert list(found.values()) == pytest.approx(STATSMODELS_HOLM)


STATSMODELS_HOLM = [0.04, 0.09, 0.09, 0.025, 0.9]


def test_the_bootstrap_of_one_seed_has_the_variance_of_a_mean() -> None:
    values = np.random.default_rng(3).normal(0.3, 1.0, (1, 400))
    found = paired_bootstrap(values.tolist(), np.zeros_like(values).tolist())
    error = values.std(ddof=1) / math.sqrt(400)
    assert found.standard_error == pytest.approx(error)
    # A percentile interval of a mean of 400 is the normal one but for some percent.
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.08)
    assert found.p < 0.01
    assert found == paired_bootstrap(values.tolist(), np.zeros_like(values).tolist())


@pytest.mark.parametrize(("seeds", "of_seeds", "of_prompts"), [(5, 1.0, 0.3), (8, 0.2, 0.5), (5, 0.1, 2.0)])
def test_no_difference_is_found_as_often_as_alpha_says(seeds: int, of_seeds: float, of_prompts: float) -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for trial in range(200):
        table = of_seeds * rng.normal(size=(seeds, 1)) + of_prompts * rng.normal(size=(1, 60))
        table = table + rng.normal(size=(seeds, 60))
        wrong += paired_bootstrap(table.tolist(), np.zeros_like(table).tolist(), seed=trial, resamples=400).p < 0.05
    # Three standard errors of 200 trials; a bootstrap by itself has 16 % in the first.
    assert wrong / 200 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_few_seeds_have_students_interval() -> None:
    # Every prompt alike: a t test of three numbers (scipy.stats.ttest_1samp([1, 2, 4], 0), its confidence_interval()).
    found = paired_bootstrap([[1.0] * 4, [2.0] * 4, [4.0] * 4], [[0.0] * 4] * 3)
    assert (found.low, found.high) == pytest.approx((-1.4612498, 6.1279165), abs=1e-6)
    assert (found.p, found.freedom) == pytest.approx((0.11808290, 2))
    assert paired_bootstrap([[1.0] * 4] * 3, [[0.0] * 4] * 3).low == 1.0


def test_quantiles_invert_p() -> None:
    for p, freedom, t in ((0.05, 4, 2.7764451), (0.05, 9, 2.2621572), (0.01, 5.5, 3.8499115), (0.4, 1e9, 0.8416212)):
        # scipy.stats.t.isf(p / 2, freedom)
        assert student_quantile(p, freedom) == pytest.approx(t, rel=2e-5)


def test_the_variance_is_that_of_both() -> None:
    rng = np.random.default_rng(1)
    means = [(0.3 * rng.normal(size=(5, 1)) + 0.5 * rng.normal(size=(1, 40))).mean() for _ in range(2000)]
    found = [
        two_way_error(0.3 * rng.normal(size=(5, 1)) + 0.5 * rng.normal(size=(1, 40)) + np.zeros((5, 40)))[0] ** 2
        for _ in range(500)
    ]
    assert np.mean(found) == pytest.approx(np.var(means), rel=0.15)
    assert np.mean(found) == pytest.approx(0.3**2 / 5 + 0.5**2 / 40, rel=0.1)


def test_what_is_detectable_is_detected_with_the_power() -> None:
    assert detectable(1.0, 1) == pytest.approx(1.959964 + 0.841621, abs=1e-5)
    smallest = detectable(0.1, 5)
    draws = np.random.default_rng(2).normal(smallest, 0.1, 20000)
    assert (draws > 0.1 * 2.5758293).mean() == pytest.approx(0.8, abs=0.01)


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="same seeds"):
        paired_bootstrap([[1.0, 2.0]], [[1.0]])


def test_rounding_reaches_everything() -> None:
    assert rounded({"a": [0.123456789, (1, "x")], "b": None}) == {"a": [0.12346, [1, "x"]], "b": None}
