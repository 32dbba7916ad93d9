"""Log-space functions, in value and gradient, at their ends."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from orpo_mlx.losses.numerics import log1mexp, log_odds, positive_part


def test_log1mexp_at_the_ends_and_at_the_branch() -> None:
    ln_2 = math.log(2)
    x = np.array([-1e-12, -1e-9, -ln_2 + 1e-6, -ln_2, -ln_2 - 1e-6, -3.0, -30.0], np.float32)
    value, gradient = np.array(log1mexp(mx.array(x))), np.array(mx.grad(lambda x: log1mexp(x).sum())(mx.array(x)))
    exact = [math.log(-math.expm1(each)) if each > -1 else math.log1p(-math.exp(each)) for each in x.tolist()]
    np.testing.assert_allclose(value, exact, rtol=2e-6)
    np.testing.assert_allclose(gradient, [-1 / math.expm1(-each) for each in x.tolist()], rtol=1e-5)
    for end in (0.0, -1e4):
        assert math.isfinite(float(log1mexp(mx.array(end))))
        assert math.isfinite(float(mx.grad(log1mexp)(mx.array(end))))


def test_log_odds_of_a_probability_that_rounds_to_one_is_finite() -> None:
    assert math.isfinite(float(log_odds(mx.array(0.0))))
    assert math.isfinite(float(mx.grad(log_odds)(mx.array(0.0))))


def test_positive_part_is_flat_where_it_is_0() -> None:
    x = mx.array([-1.0, 0.0, 2.0])
    assert positive_part(x).tolist() == [0.0, 0.0, 2.0]
    assert mx.grad(lambda x: positive_part(x).sum())(x).tolist() == [0.0, 0.0, 1.0]
