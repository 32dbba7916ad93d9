"""The chapter's functions and training step."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

import orpo_mlx
from orpo_mlx.chapter import compute_odds_ratio, odds_ratio_loss
from orpo_mlx.data.batching import collate
from orpo_mlx.engine.pair_scorer import PairScorer, pair_logps
from orpo_mlx.models.adapters import add_adapters
from tests.conftest import make_model, make_pairs
from tests.helpers import float64_losses as oracle


def test_metrics_are_the_chapters_and_steps_learn() -> None:
    model, batch = make_model(), collate(make_pairs(6))
    logps = pair_logps(PairScorer(model), batch)
    chosen, rejected = (
        np.array(x, np.float64) for x in (logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens)
    )
    ratio = oracle.printed_odds_ratio(chosen, rejected)
    add_adapters(model, "lora", -1, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    optimizer = optim.Adam(learning_rate=1e-3)
    first = orpo_mlx.orpo_training_step(model, batch, optimizer)
    assert set(first) == {"loss", "accuracy", "odds_ratio"}
    loss = -np.log(ratio / (1 + ratio)) + 0.5 * (rejected - chosen)
    assert first["loss"] == pytest.approx(loss.mean(), rel=1e-4)
    assert first["accuracy"] == pytest.approx((chosen > rejected).mean())
    assert first["odds_ratio"] == pytest.approx(ratio.mean(), rel=1e-3)
    scorer = PairScorer(model)
    for _ in range(20):
        last = orpo_mlx.orpo_training_step(scorer, batch, optimizer)
    assert last["loss"] < first["loss"] - 0.5
    assert last["accuracy"] == 1.0
    assert last["odds_ratio"] > first["odds_ratio"]


def printed_loss(chosen: oracle.Array, rejected: oracle.Array, beta: float) -> oracle.Array:
    """The chapter's formula as printed, in float64."""
    ratio = oracle.printed_odds_ratio(chosen, rejected)
    loss: oracle.Array = -np.log(ratio / (1 + ratio)) + beta * (rejected - chosen)
    return loss


def printed_grid() -> tuple[oracle.Array, oracle.Array]:
    values = np.array([-1e-9, -1e-6, -1e-3, -0.1, -1.0, -5.0, -30.0, -80.0], np.float32).astype(np.float64)
    chosen, rejected = np.meshgrid(values, values)
    return chosen.ravel(), rejected.ravel()


def test_the_chapters_ratio_is_the_printed_one_where_that_is_finite() -> None:
    chosen, rejected = printed_grid()
    found = np.array(compute_odds_ratio(mx.array(chosen), mx.array(rejected)))
    expected = oracle.printed_odds_ratio(chosen, rejected)
    within = (expected < 1e38) & (expected > 1e-37)
    # exp turns an absolute error of its argument into a relative one; arguments here go up to 80.
    np.testing.assert_allclose(found[within], expected[within], rtol=3e-5)
    assert (found[expected > 1e38] > 1e38).all()
    assert (found[expected < 1e-37] < 1e-37).all()


@pytest.mark.parametrize("beta", [0.5, 0.0])
def test_the_chapters_loss_is_the_printed_one_where_that_is_finite(beta: float) -> None:
    chosen, rejected = printed_grid()
    found = np.array(odds_ratio_loss(mx.array(chosen), mx.array(rejected), beta=beta))
    # r / (1 + r) is 1 to float64 where r is large: the printed logarithm then has lost what ours still has.
    np.testing.assert_allclose(found, printed_loss(chosen, rejected, beta), rtol=1e-5, atol=1e-7)
    both = mx.grad(lambda c, r: odds_ratio_loss(c, r, beta).sum(), argnums=(0, 1))
    for side, gradient in enumerate(both(mx.array(chosen), mx.array(rejected))):
        step = 1e-40j
        shifted = printed_loss(chosen + step * (side == 0), rejected + step * (side == 1), beta)
        np.testing.assert_allclose(np.array(gradient), shifted.imag / 1e-40, rtol=1e-4, atol=1e-6)


def test_the_chapters_loss_is_right_where_the_printed_one_is_not() -> None:
    chosen, rejected = np.array([-1e4, -900.0, -1e4, -1e-9]), np.array([-900.0, -1e4, -1e4, -1e4])
    with np.errstate(all="ignore"):
        assert not np.isfinite(printed_loss(chosen, rejected, 0.5)).all()
    loss = np.array(odds_ratio_loss(mx.array(chosen), mx.array(rejected)))
    # For P so small that 1 - P is 1, the log odds are the log-prob itself.
    odds = np.where(chosen < -1, chosen, -np.log(1.1e-8))
    np.testing.assert_allclose(
        loss, -oracle.log_sigmoid(odds - rejected) + 0.5 * (rejected - chosen), rtol=1e-5, atol=1e-6
    )
    gradients = mx.grad(lambda c, r: odds_ratio_loss(c, r).sum(), argnums=(0, 1))(mx.array(chosen), mx.array(rejected))
    np.testing.assert_allclose(np.array(gradients[1])[:3], [1.5, 0.5, 1.0], rtol=1e-4)
    assert all(np.isfinite(np.array(gradient)).all() for gradient in gradients)
    ratio = np.array(compute_odds_ratio(mx.array(chosen), mx.array(rejected)))
    np.testing.assert_allclose(ratio[[0, 2]], [0.0, 1.0])
    assert np.isfinite(ratio).all()


def test_the_chapters_names_are_at_the_top() -> None:
    assert orpo_mlx.odds_ratio_loss is odds_ratio_loss
    assert orpo_mlx.compute_odds_ratio is compute_odds_ratio
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = orpo_mlx.nothing
