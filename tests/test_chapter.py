"""The chapter's training step."""

from __future__ import annotations

import mlx.optimizers as optim
import numpy as np
import pytest

import orpo_mlx
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
