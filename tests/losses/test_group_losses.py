"""Losses of single completions and of lists against their papers in float64, over random and extreme inputs."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.losses.metrics import GROUP_METRICS, MetricMeans, metric_array
from orpo_mlx.losses.recipe import make_recipe
from orpo_mlx.losses.registry import COMPLETION, METHODS, PAIR
from orpo_mlx.types import GroupLogProbs, PairLogProbs
from tests.helpers.float64_group_losses import ORACLES, Array

CASES = [(name, parameters) for name, entry in ORACLES.items() for parameters in entry.tries]
ROWS = 400


def random_groups(name: str, *, count: int = ROWS, width: int = 6) -> dict[str, Any]:
    """Groups of 1 (lists: 2) to `width` completions, with ties, log-probs of 1e-9 to 1e5 nats and references that are
    far off or, of some completions in every fifth group, the policy's."""
    rng = np.random.default_rng(0)
    shape = (count, width)
    tokens = rng.integers(1, 60, shape)
    of_completions = METHODS[name].unit == COMPLETION
    there = np.arange(width) < rng.integers(1 if of_completions else 2, width + 1, count)[:, None]
    s = -np.exp(rng.uniform(-20, 7.5, shape)) * tokens
    apart = rng.normal(0, 1, shape) * np.exp(rng.uniform(-6, 6, shape))
    apart[::5] *= rng.integers(0, 2, apart[::5].shape)
    score = rng.integers(0, 2, shape) if of_completions else rng.integers(0, 5, shape) * rng.choice([0.25, 1, 3], shape)
    if not of_completions:
        # A list with one score is none: it is left out when it is read.
        score[:, 1] = score[:, 0] + 1
    x: dict[str, Any] = {"s": s, "n": tokens, "ref": s + apart, "score": score.astype(float)}
    return {name: np.where(there, values, 0.0) for name, values in x.items()} | {"kl": 1.7, "running": (0.3, 5.0)}


def as_logps(x: dict[str, Any], dtype: mx.Dtype = mx.float64) -> GroupLogProbs:
    s, n, score, ref = (mx.array(x[name], dtype) for name in ("s", "n", "score", "ref"))
    return GroupLogProbs(s, n, score, ref, kl=mx.array([x["kl"]], dtype), running=mx.array(x["running"], dtype))


def test_every_method_of_groups_has_an_oracle_that_tries_its_defaults() -> None:
    methods = {name: method for name, method in METHODS.items() if method.unit != PAIR}
    assert set(ORACLES) == set(methods)
    for name, method in methods.items():
        assert method.defaults in ORACLES[name].tries


@pytest.mark.usefixtures("exact_exp")
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_values_and_gradients(name: str, parameters: dict[str, float]) -> None:
    x = random_groups(name)

    def losses(logps: Any) -> mx.array:
        found: mx.array = METHODS[name].loss(as_logps(x)._replace(logps=logps), **parameters).losses
        return found

    with mx.stream(mx.cpu):
        logps = as_logps(x).logps
        found, gradient = np.array(losses(logps)), np.array(mx.grad(lambda logps: losses(logps).sum())(logps))
        assert METHODS[name].loss(as_logps(x, mx.float32), **parameters).losses.dtype == mx.float32
    oracle = ORACLES[name].loss
    np.testing.assert_allclose(found, oracle(x, **parameters).real, rtol=1e-6, atol=1e-12)
    expected = np.zeros_like(x["s"])
    for place in range(x["s"].shape[1]):
        # Groups do not touch each other: one complex step moves a completion in each of them.
        step = np.zeros_like(x["s"], complex)
        step[:, place] = 1e-40j
        slope = oracle({**x, "s": x["s"] + step}, **parameters).imag / 1e-40
        expected[:, place] = slope if slope.ndim == 1 else slope.sum(axis=1)
    there = x["n"] > 0
    np.testing.assert_allclose(gradient[there], expected[there], rtol=1e-6, atol=1e-12)
    assert not gradient[~there].any()


@pytest.mark.parametrize("name", ORACLES)
def test_float32_is_finite_and_nothing_that_is_logged_has_a_gradient(name: str) -> None:
    x = random_groups(name)
    x["s"][0, 0], x["ref"][1, 0] = -1e6, -1e6
    logps = as_logps(x, mx.float32)
    output = METHODS[name].loss(logps)
    compiled = mx.compile(lambda logps: METHODS[name].loss(logps).losses)(logps)
    np.testing.assert_allclose(np.array(compiled), np.array(output.losses), rtol=1e-5, atol=1e-6)
    gradient = mx.grad(lambda values: METHODS[name].loss(logps._replace(logps=values)).losses.sum())(logps.logps)
    for array in (*output, gradient, metric_array(logps, output)):
        assert np.isfinite(np.array(array)).all()
    logged = mx.grad(lambda values: sum(each.sum() for each in METHODS[name].loss(logps._replace(logps=values))[1:]))
    assert not np.array(logged(logps.logps)).any()
    if METHODS[name].needs_reference:
        with pytest.raises(ValueError, match="reference"):
            METHODS[name].loss(logps._replace(reference=None))


@pytest.mark.parametrize("name", ["pl", "lipo", "pro"])
def test_lists_do_not_depend_on_order_or_on_what_is_not_there(name: str) -> None:
    x = random_groups(name, count=50)
    order = np.random.default_rng(1).permutation(6)
    moved = {key: value[:, order] if isinstance(value, np.ndarray) else value for key, value in x.items()}
    wider = {
        key: np.pad(value, ((0, 0), (0, 3))) if isinstance(value, np.ndarray) else value for key, value in x.items()
    }
    with mx.stream(mx.cpu):
        first, *others = (np.array(METHODS[name].loss(as_logps(each)).losses) for each in (x, moved, wider))
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-9)


def as_pairs(x: dict[str, Any]) -> PairLogProbs:
    sides = [mx.array(x[name][:, place].astype(np.float32)) for name in ("s", "n", "ref") for place in (0, 1)]
    s, r, ns, nr, ref, other = sides
    return PairLogProbs(s, r, ns, nr, -s / ns, ref, other)


def test_a_list_of_two_is_a_pair_and_an_unpaired_pair_two_completions() -> None:
    x: dict[str, Array] = {**random_groups("kto", width=2), "score": np.tile([1.0, 0.0], (ROWS, 1))}
    x["n"] = np.maximum(x["n"], 1)
    logps = as_logps(x, mx.float32)
    dpo = np.array(METHODS["dpo"].loss(as_pairs(x)).losses)
    np.testing.assert_allclose(np.array(METHODS["pl"].loss(logps).losses), dpo, rtol=1e-5, atol=1e-6)
    both = np.array(METHODS["apo_zero_unpaired"].loss(logps).losses).sum(axis=1)
    np.testing.assert_allclose(both, np.array(METHODS["apo_zero"].loss(as_pairs(x)).losses), rtol=1e-5, atol=1e-6)


def test_metrics_of_completions_and_lists() -> None:
    nan = 0.0
    logps = GroupLogProbs(
        mx.array([[-4.0, -6.0], [-3.0, nan]]),
        mx.array([[2.0, 2.0], [3.0, 0.0]]),
        mx.array([[1.0, 0.0], [0.0, 0.0]]),
        mx.array([[-5.0, -5.0], [-5.0, nan]]),
        kl=mx.array([0.5]),
    )
    means = MetricMeans()
    means.add_array(np.array(metric_array(logps, METHODS["kto"].loss(logps, beta=1.0))))
    found = MetricMeans.from_json(means.to_json()).means()
    # Rewards 1, -1 and 2 above 0.5: the last is bad and above.
    assert found["rewards/chosen"] == 1.0
    assert found["rewards/rejected"] == 0.5
    assert found["rewards/margins"] == 0.5
    assert found["rewards/accuracies"] == pytest.approx(2 / 3)
    assert (found["accuracies/mean_logps"], found["logps/rejected"]) == (1.0, -4.5)
    ranked = MetricMeans()
    ranked.add_array(np.array(metric_array(logps, METHODS["pl"].loss(logps, beta=1.0))))
    assert set(ranked.means()) == set(GROUP_METRICS)
    assert ranked.means()["rewards/margins"] == 2.0
    # Good ones alone: nothing is said of bad ones.
    alone = MetricMeans()
    alone.add_array(np.array(metric_array(logps, METHODS["kto"].loss(logps)))[:, :, :0])
    alone.add_array(np.array(metric_array(logps._replace(scores=mx.ones((2, 2))), METHODS["kto"].loss(logps))))
    assert not {"rewards/rejected", "rewards/margins", "accuracies/mean_logps"} & set(alone.means())


def test_sums_of_one_kind_weigh_and_sums_of_two_are_refused() -> None:
    logps = as_logps(random_groups("kto", count=8), mx.float32)._replace(weight=mx.arange(8).astype(mx.float32))
    recipe = make_recipe("kto + 0.5*bco", {"beta": 0.3})
    expected = METHODS["kto"].loss(logps, beta=0.3).losses + 0.5 * METHODS["bco"].loss(logps, beta=0.3).losses
    weighted = np.array(expected) * np.arange(8)[:, None]
    np.testing.assert_allclose(np.array(recipe.loss(logps).losses), weighted, rtol=1e-5)
    with pytest.raises(Exception, match="dpo is a loss of a pair and kto is a loss of a completion"):
        make_recipe("dpo + kto", {})
