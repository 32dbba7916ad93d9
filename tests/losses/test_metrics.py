"""Metrics are per pair, strict where they compare, and averaged over pairs."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.losses import dpo, orpo
from orpo_mlx.losses.metrics import METRICS, OF_ONE_SIDE, MetricMeans, pair_metrics
from orpo_mlx.types import PairLogProbs
from tests.helpers import float64_losses as oracle

CHOSEN, REJECTED = np.array([-4.0, -6.0, -3.0]), np.array([-6.0, -4.0, -3.0])
CHOSEN_TOKENS, REJECTED_TOKENS = np.array([2.0, 3.0, 1.0]), np.array([6.0, 2.0, 1.0])


def logps() -> PairLogProbs:
    c, r, nc, nr = (mx.array(x.astype(np.float32)) for x in (CHOSEN, REJECTED, CHOSEN_TOKENS, REJECTED_TOKENS))
    return PairLogProbs(c, r, nc, nr, -c / nc, mx.array([-4.0, -5.0, -3.0]), mx.array([-6.0, -5.0, -3.0]))


def test_orpo_metrics() -> None:
    found = {key: np.array(value) for key, value in pair_metrics(logps(), orpo(logps(), beta=0.1)).items()}
    mean_c, mean_r = CHOSEN / CHOSEN_TOKENS, REJECTED / REJECTED_TOKENS
    ratio = oracle.log_odds(mean_c) - oracle.log_odds(mean_r)
    np.testing.assert_allclose(found["log_odds_chosen"], ratio, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["log_odds_ratio"], oracle.log_sigmoid(ratio), rtol=1e-5)
    np.testing.assert_allclose(found["nll_loss"], -mean_c, rtol=1e-6)
    np.testing.assert_allclose(found["logps/chosen"], mean_c, rtol=1e-6)
    np.testing.assert_allclose(found["rewards/chosen"], 0.1 * mean_c, rtol=1e-6)
    np.testing.assert_allclose(found["rewards/margins"], 0.1 * (mean_c - mean_r), rtol=1e-5, atol=1e-7)
    # A tie is no preference; by mean the first pair's rejected side wins, by sum its chosen side.
    assert found["accuracies/mean_logps"].tolist() == [0.0, 0.0, 0.0]
    assert found["accuracies/sum_logps"].tolist() == [1.0, 0.0, 0.0]
    assert found["rewards/accuracies"].tolist() == [0.0, 0.0, 0.0]


def test_dpo_logs_sums_and_rewards_against_the_reference() -> None:
    found = {key: np.array(value) for key, value in pair_metrics(logps(), dpo(logps(), beta=0.5)).items()}
    assert found["logps/chosen"].tolist() == CHOSEN.tolist()
    assert found["rewards/chosen"].tolist() == [0.0, -0.5, 0.0]
    assert found["rewards/rejected"].tolist() == [0.0, 0.5, 0.0]
    assert found["rewards/accuracies"].tolist() == [0.0, 0.0, 0.0]


def test_means_weigh_pairs_not_batches() -> None:
    means = MetricMeans()
    means.add({"loss": mx.array([1.0, 2.0, 3.0])})
    other = MetricMeans()
    other.add({"loss": mx.array([10.0])})
    means.merge(other)
    assert means.pairs == 4
    assert means.means() == {"loss": pytest.approx(4.0)}


def test_single_completions_count_for_their_own_metrics_alone() -> None:
    values = np.arange(len(METRICS) * 3, dtype=np.float64).reshape(-1, 3)
    means, reversed_order = MetricMeans(), MetricMeans()
    batches = [(values, None), (values[:, :2], np.array([False, True])), (values[:, :1], np.array([False]))]
    for batch in batches:
        means.add_array(*batch)
    for batch in reversed(batches):
        reversed_order.add_array(*batch)
    whole = np.concatenate([values, values[:, :2], values[:, :1]], axis=1)
    two_sided = np.array([True, True, True, False, True, False])
    for found in (means.means(), MetricMeans.from_json(reversed_order.to_json()).means()):
        for key, row in zip(METRICS, whole, strict=True):
            assert found[key] == pytest.approx(row.mean() if key in OF_ONE_SIDE else row[two_sided].mean()), key
    alone = MetricMeans()
    alone.add_array(*batches[2])
    assert set(alone.means()) == set(OF_ONE_SIDE)
