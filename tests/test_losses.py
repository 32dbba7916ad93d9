"""Each loss against its paper's equation in float64, in value and gradient, over a grid that includes extremes.

Adding a method takes one row in `ORACLES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.losses import log1mexp, log_odds, log_odds_ratio, log_sigmoid, mean_logps
from orpo_mlx.methods import METHODS
from orpo_mlx.types import PairLogProbs
from tests import oracle

# name: (oracle, parameters to try)
ORACLES: dict[str, tuple[Callable[..., oracle.Array], list[dict[str, float]]]] = {
    "orpo": (lambda x, beta: oracle.orpo(x["c"], x["r"], x["nc"], x["nr"], beta), [{"beta": 0.1}, {"beta": 2.0}]),
    "orpo_style": (
        lambda x, beta: oracle.orpo_style(x["c"], x["r"], x["nc"], x["nr"], beta),
        [{"beta": 0.5}, {"beta": 0.05}],
    ),
    "dpo": (lambda x, beta: oracle.dpo(x["c"], x["r"], x["rc"], x["rr"], beta), [{"beta": 0.1}, {"beta": 1.0}]),
    "sft": (lambda x: -x["c"] / x["nc"], [{}]),
}
CASES = [(name, parameters) for name, (_, grid) in ORACLES.items() for parameters in grid]


def grid() -> dict[str, oracle.Array]:
    """Pairs over ordinary and extreme log-probs, token counts and references."""
    means = [-1e-9, -1e-6, -1e-3, -0.3, -math.log(2), -0.7, -2.0, -50.0, -1e4]
    rows = [
        (chosen * nc, rejected * nr, nc, nr, chosen * nc + shift_chosen, rejected * nr + shift_rejected)
        for chosen in means
        for rejected in means
        for nc, nr in ((1, 1), (3, 17))
        for shift_chosen, shift_rejected in ((0.0, 0.0), (1.5, -2.0), (-4.0, -1.0))
    ]
    # The inputs the code sees are float32; the oracle must see the same numbers.
    columns = np.array(rows, np.float32).astype(np.float64).T
    return dict(zip(("c", "r", "nc", "nr", "rc", "rr"), columns, strict=True))


def as_logps(x: dict[str, oracle.Array]) -> PairLogProbs:
    arrays = {name: mx.array(values.astype(np.float32)) for name, values in x.items()}
    nll = -arrays["c"] / arrays["nc"]
    return PairLogProbs(arrays["c"], arrays["r"], arrays["nc"], arrays["nr"], nll, arrays["rc"], arrays["rr"])


def test_every_method_has_an_oracle() -> None:
    assert set(ORACLES) == set(METHODS)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_value(name: str, parameters: dict[str, float]) -> None:
    x = grid()
    found = np.array(METHODS[name].loss(as_logps(x), **parameters).losses, np.float64)
    expected = ORACLES[name][0](x, **parameters)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_gradient(name: str, parameters: dict[str, float]) -> None:
    x = grid()
    logps = as_logps(x)

    def total(chosen: mx.array, rejected: mx.array) -> mx.array:
        both = logps._replace(chosen=chosen, rejected=rejected, nll=-chosen / logps.chosen_tokens)
        return METHODS[name].loss(both, **parameters).losses.sum()

    gradients = mx.grad(total, argnums=(0, 1))(logps.chosen, logps.rejected)
    for gradient, side in zip(gradients, ("c", "r"), strict=True):
        expected = oracle.gradient(lambda x: ORACLES[name][0](x, **parameters), x, side)
        assert np.isfinite(np.array(gradient)).all()
        np.testing.assert_allclose(np.array(gradient), expected, rtol=1e-4, atol=1e-6, err_msg=side)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs_reference])
def test_a_reference_that_is_missing_is_an_error(name: str) -> None:
    bare = as_logps(grid())._replace(reference_chosen=None, reference_rejected=None)
    with pytest.raises(ValueError, match="reference"):
        METHODS[name].loss(bare)


def test_dpo_is_ln_2_where_policy_and_reference_agree() -> None:
    logps = as_logps(grid())
    same = logps._replace(reference_chosen=logps.chosen, reference_rejected=logps.rejected)
    assert np.array(METHODS["dpo"].loss(same).losses) == pytest.approx(math.log(2), abs=1e-7)


def test_swapping_the_pair_mirrors_the_preference() -> None:
    x = grid()
    swapped = {"c": x["r"], "r": x["c"], "nc": x["nr"], "nr": x["nc"], "rc": x["rr"], "rr": x["rc"]}
    np.testing.assert_allclose(
        np.array(log_odds_ratio(as_logps(x))), -np.array(log_odds_ratio(as_logps(swapped))), rtol=1e-6
    )
    one, other = (METHODS["dpo"].loss(as_logps(each)) for each in (x, swapped))
    # log σ(z) - log σ(-z) = z
    z = np.array(one.chosen_rewards - one.rejected_rewards)
    np.testing.assert_allclose(np.array(other.losses - one.losses), z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("chosen", "rejected", "odds", "log_sigmoid_of_it"),
    [(-0.2, -1.0, 2.049096655583438, -0.1212005210271727), (-1e-8, -1.0, 18.96200559, -5.81976708e-9)],
)
def test_golden_orpo(chosen: float, rejected: float, odds: float, log_sigmoid_of_it: float) -> None:
    one = mx.array([1.0])
    logps = PairLogProbs(mx.array([chosen]), mx.array([rejected]), one, one, one)
    assert float(log_odds_ratio(logps)) == pytest.approx(odds, rel=1e-6)
    assert float(log_sigmoid(log_odds_ratio(logps))) == pytest.approx(log_sigmoid_of_it, rel=1e-5)


def test_golden_dpo() -> None:
    one = mx.array([1.0])
    logps = PairLogProbs(mx.array([-10.0]), mx.array([-12.0]), one, one, one, mx.array([-11.0]), mx.array([-11.5]))
    assert float(METHODS["dpo"].loss(logps, beta=0.1).losses) == pytest.approx(0.6209570478, rel=1e-7)


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


def test_means_divide_by_completion_tokens() -> None:
    chosen, rejected = mean_logps(
        PairLogProbs(mx.array([-6.0]), mx.array([-6.0]), mx.array([3.0]), mx.array([2.0]), mx.array([0.0]))
    )
    assert (float(chosen), float(rejected)) == (-2.0, -3.0)
