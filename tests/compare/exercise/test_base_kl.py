"""KL to the base model against the library's own, prompt and reply run together, and against float64 sums."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.compare.exercise.base_kl import BaseKL, reply_kl
from orpo_mlx.engine.head_logps import log_softmax
from orpo_mlx.judging.divergence import sequence_kl
from orpo_mlx.models.adapters import adapter_weights, add_adapters
from tests.conftest import make_model

# More replies than one pass has, of unequal lengths, to prompts of unequal lengths.
REPLIES = 37


def test_replies_are_as_far_from_the_base_as_each_by_itself() -> None:
    model = make_model()
    add_adapters(model, "lora", -1, {"rank": 2, "dropout": 0.0, "scale": 20.0})
    model.eval()
    adapters = adapter_weights(model)
    rng = np.random.default_rng(0)
    prompts = [[int(token) for token in rng.integers(3, 250, rng.integers(2, 9))] for _ in range(REPLIES)]
    replies = [[int(token) for token in rng.integers(3, 250, rng.integers(1, 12))] for _ in range(REPLIES)]
    kl = BaseKL(model, prompts)

    def logps() -> list[mx.array]:
        rows = zip(prompts, replies, strict=True)
        return [log_softmax(model(mx.array([[*p, *r]]))[0, len(p) - 1 : -1]) for p, r in rows]

    for change in (0.0, 0.05, -0.2):
        model.load_weights([(name, value + change) for name, value in adapters.items()], strict=False)
        expected = [float(sequence_kl(model, p, r)) for p, r in zip(prompts, replies, strict=True)]
        assert kl(replies, logps()) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert max(expected) > 0.01 or change == 0


def test_a_replys_kl_is_the_sum_in_float64() -> None:
    rng = np.random.default_rng(1)
    p, q = (rng.normal(scale=4, size=(5, 3000)) for _ in range(2))
    logps, base = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in (p, q))
    expected = (np.exp(logps) * (logps - base)).sum()
    # Neither needs to be normalised.
    found = reply_kl((logps - 0.01).astype(np.float32), (q + 70).astype(np.float32))
    assert found == pytest.approx(expected, rel=1e-5)
    assert reply_kl(logps.astype(np.float32) + 0.01, logps.astype(np.float32)) == pytest.approx(0, abs=1e-6)
