"""Each loss against its paper's equation in float64, in value and gradient, over a grid that includes extremes.

Adding a loss takes its oracle in `tests/helpers/float64_losses.py`.
"""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.losses.numerics import log_sigmoid
from orpo_mlx.losses.registry import METHODS, PAIR
from orpo_mlx.losses.terms import log_odds_ratio, mean_logps
from orpo_mlx.types import PairLogProbs
from tests.helpers import float64_losses as oracle
from tests.helpers.float64_losses import ORACLES

CASES = [(name, parameters) for name, entry in ORACLES.items() for parameters in entry.tries]
OF_PAIRS = [name for name, method in METHODS.items() if method.unit == PAIR]
COUPLED = [name for name in OF_PAIRS if METHODS[name].couples_pairs]


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
    x = with_the_rest(dict(zip(("c", "r", "nc", "nr", "rc", "rr"), columns, strict=True)))
    return {**x, "d": 0 * x["d"]}


def with_the_rest(x: dict[str, oracle.Array]) -> dict[str, oracle.Array]:
    """The same with loss margins, tails and alignments: the last third of the longer completion is its tail."""
    rng = np.random.default_rng(1)
    count = len(x["c"])
    chosen_longer = x["nc"] > x["nr"]
    more = {
        "d": np.where(rng.random(count) < 0.1, -2.0, rng.uniform(0, 9, count)),
        "tc": np.where(chosen_longer, x["c"] / 3, 0.0),
        "tr": np.where(chosen_longer, 0.0, x["r"] / 3),
        "rtc": np.where(chosen_longer, x["rc"] / 3, 0.0),
        "rtr": np.where(chosen_longer, 0.0, x["rr"] / 3),
        "ac": rng.normal(-0.5, 1, count),
        "ar": rng.normal(-0.5, 1, count),
    }
    return {**{name: values.astype(np.float32).astype(np.float64) for name, values in more.items()}, **x}


def as_logps(x: dict[str, oracle.Array], dtype: mx.Dtype = mx.float32) -> PairLogProbs:
    y = {name: mx.array(values, dtype) for name, values in with_the_rest(x).items()}
    return PairLogProbs(
        y["c"], y["r"], y["nc"], y["nr"], -y["c"] / y["nc"], y["rc"], y["rr"], None, y["d"],
        y["tc"], y["tr"], y["rtc"], y["rtr"], y["ac"], y["ar"],
    )  # fmt: skip


def inputs(name: str) -> dict[str, oracle.Array]:
    """The grid; for a loss that couples pairs a batch without ties, where its gradient is defined."""
    return random_pairs(24, seed=0) if name in COUPLED else grid()


def random_pairs(count: int, seed: int) -> dict[str, oracle.Array]:
    """Log-probs over nine decades, references near and, of every fourth pair, anywhere."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 20, (2, count))
    sums = -np.exp(rng.uniform(-12, 9, (2, count))) * counts
    anywhere = -np.exp(rng.uniform(-12, 9, (2, count))) * counts
    reference = np.where(np.arange(count) % 4, sums + rng.normal(0, 3, (2, count)), anywhere)
    columns = np.array([*sums, *counts, *reference], np.float32).astype(np.float64)
    return with_the_rest(dict(zip(("c", "r", "nc", "nr", "rc", "rr"), columns, strict=True)))


def oracle_gradient(name: str, parameters: dict[str, float], x: dict[str, oracle.Array], side: str) -> oracle.Array:
    """Gradient of the sum of losses towards each entry of `side`."""
    f = ORACLES[name].loss
    if name not in COUPLED:
        return oracle.gradient(lambda x: f(x, **parameters), x, side)
    gradients = []
    for row in np.eye(len(x[side])):

        def along(y: oracle.Columns, row: oracle.Array = row) -> oracle.Array:
            losses: oracle.Array = f({**x, side: x[side] + row * y["step"]}, **parameters)
            return losses

        gradients.append(oracle.gradient(along, {"step": 0.0 * row}, "step").sum())
    return np.array(gradients)


def test_every_method_has_an_oracle() -> None:
    assert set(ORACLES) == set(OF_PAIRS)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_value(name: str, parameters: dict[str, float]) -> None:
    x = inputs(name)
    found = np.array(METHODS[name].loss(as_logps(x), **parameters).losses, np.float64)
    expected = ORACLES[name].loss(x, **parameters)
    assert np.isfinite(found).all()
    # SimPER is a difference of two exp, which on a GPU (CUDA, seen) are each an ulp of 1.2e-7 off near 1.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2.5e-7)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_gradient(name: str, parameters: dict[str, float]) -> None:
    x = inputs(name)
    logps = as_logps(x)

    def total(chosen: mx.array, rejected: mx.array) -> mx.array:
        both = logps._replace(chosen=chosen, rejected=rejected, nll=-chosen / logps.chosen_tokens)
        losses: mx.array = METHODS[name].loss(both, **parameters).losses
        return losses.sum()

    gradients = mx.grad(total, argnums=(0, 1))(logps.chosen, logps.rejected)
    for gradient, side in zip(gradients, ("c", "r"), strict=True):
        assert np.isfinite(np.array(gradient)).all()
        expected = oracle_gradient(name, parameters, x, side)
        # At a kink there is no gradient, and float32 and float64 land on different sides of it.
        equal_means = np.isclose(x["c"] / x["nc"], x["r"] / x["nr"], rtol=1e-5, atol=0)
        smooth = ~(equal_means & ORACLES[name].kink_at_equal_means)
        np.testing.assert_allclose(np.array(gradient)[smooth], expected[smooth], rtol=1e-4, atol=1e-6, err_msg=side)


@pytest.mark.usefixtures("exact_exp")
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_in_float64(name: str, parameters: dict[str, float]) -> None:
    """1,000 random pairs without float32's rounding: an equation that differs by little shows as well."""
    x = random_pairs(24 if name in COUPLED else 1000, seed=2)
    with mx.stream(mx.cpu):
        logps = as_logps(x, mx.float64)
        sides = {"c": "chosen", "r": "rejected", "tc": "chosen_tail", "tr": "rejected_tail"}

        def losses(values: dict[str, mx.array]) -> mx.array:
            moved = logps._replace(**values)
            moved = moved._replace(nll=-moved.chosen / moved.chosen_tokens)
            found: mx.array = METHODS[name].loss(moved, **parameters).losses
            return found

        values = {side: getattr(logps, side) for side in sides.values()}
        found = np.array(losses(values))
        gradients = mx.grad(lambda values: losses(values).sum())(values)
    np.testing.assert_allclose(found, ORACLES[name].loss(x, **parameters), rtol=1e-6, atol=1e-12)
    for column, side in sides.items():
        expected = oracle_gradient(name, parameters, x, column)
        np.testing.assert_allclose(np.array(gradients[side]), expected, rtol=1e-6, atol=1e-12, err_msg=side)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_a_margin_is_heeded_where_the_card_says_so(name: str) -> None:
    logps = as_logps(random_pairs(24, seed=3))
    with_margin, without = (METHODS[name].loss(each).losses for each in (logps, logps._replace(margin=None)))
    assert mx.allclose(with_margin, without).item() != METHODS[name].takes_margin


@pytest.mark.parametrize("name", OF_PAIRS)
def test_defaults_are_among_what_is_tried(name: str) -> None:
    assert METHODS[name].defaults in ORACLES[name].tries


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_what_is_logged(name: str, parameters: dict[str, float]) -> None:
    """Rewards: beta times the log-ratios, sums or means a method compares; logps: those, without the reference."""
    x = inputs(name)
    sums, means = (x["c"], x["r"]), oracle.m(x)
    logps = sums if METHODS[name].needs_reference or ORACLES[name].compares_sums else means
    compared = oracle.h(x) if METHODS[name].needs_reference else logps
    reward = ORACLES[name].reward
    if reward is not None:
        compared = reward(x, **parameters)
    expected = [*(parameters.get("beta", 1.0) * side for side in compared), *logps]
    for found, side in zip(METHODS[name].loss(as_logps(x), **parameters)[1:], expected, strict=True):
        np.testing.assert_allclose(np.array(found), side, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_rewards_are_logged_without_gradient(name: str) -> None:
    logps = as_logps(inputs(name))

    def logged(chosen: mx.array) -> mx.array:
        return mx.stack(list(METHODS[name].loss(logps._replace(chosen=chosen))[1:])).sum()

    assert not np.array(mx.grad(logged)(logps.chosen)).any()


@pytest.mark.parametrize("name", OF_PAIRS)
def test_compiled_is_eager(name: str) -> None:
    logps = as_logps(inputs(name))
    eager = np.array(METHODS[name].loss(logps).losses)
    compiled = np.array(mx.compile(lambda logps: METHODS[name].loss(logps).losses)(logps))
    np.testing.assert_allclose(compiled, eager, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in OF_PAIRS if METHODS[name].needs_reference])
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
    swapped = {"c": x["r"], "r": x["c"], "nc": x["nr"], "nr": x["nc"], "rc": x["rr"], "rr": x["rc"], "d": x["d"]}
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


finite_logps = st.floats(-1e4, -(2.0**-20), width=32)


@hypothesis.settings(deadline=None)  # A loaded machine is no fault of a loss.
@hypothesis.given(finite_logps, finite_logps, st.integers(1, 500), st.integers(1, 500), st.floats(-100, 100, width=32))
def test_dpo_losses_see_only_differences_from_the_reference(c: float, r: float, nc: int, nr: int, shift: float) -> None:
    """Adding one number to policy and reference of a side changes no loss that is made of log-ratios."""
    one = {"c": c, "r": r, "nc": nc, "nr": nr, "rc": c + 1.0, "rr": r - 2.0}
    x = {name: np.array([value], np.float32).astype(np.float64) for name, value in one.items()}
    moved = {**x, "c": x["c"] + shift, "rc": x["rc"] + shift}
    for name in ("dpo", "ipo", "hinge", "apo_zero", "nca_pair"):
        before, after = (np.array(METHODS[name].loss(as_logps(each)).losses) for each in (x, moved))
        # The sums are rounded at the size of the log-probs before they are subtracted.
        np.testing.assert_allclose(after, before, rtol=1e-2, atol=1e-2)


@hypothesis.settings(deadline=None)  # A loaded machine is no fault of a loss.
@hypothesis.given(finite_logps, finite_logps, st.integers(1, 500), st.integers(1, 500))
def test_raising_the_chosen_side_never_raises_a_preference_loss(c: float, r: float, nc: int, nr: int) -> None:
    x = {name: np.array([value], np.float64) for name, value in {"c": c * nc, "r": r * nr, "nc": nc, "nr": nr}.items()}
    x |= {"rc": x["c"] + 0.5, "rr": x["r"] - 0.5}
    better = {**x, "c": x["c"] * 0.9}
    for name in ("orpo", "orpo_style", "simpo", "cpo", "rrhf", "slic", "sft", "dpo", "hinge", "robust"):
        before, after = (float(METHODS[name].loss(as_logps(each)).losses) for each in (x, better))
        assert after <= before + 1e-5 * abs(before) + 1e-6, name


def test_means_divide_by_completion_tokens() -> None:
    chosen, rejected = mean_logps(
        PairLogProbs(mx.array([-6.0]), mx.array([-6.0]), mx.array([3.0]), mx.array([2.0]), mx.array([0.0]))
    )
    assert (float(chosen), float(rejected)) == (-2.0, -3.0)
