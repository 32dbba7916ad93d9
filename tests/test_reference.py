"""Reference log-probs: the model as it was before training, remembered per pair."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from orpo_mlx.batching import collate
from orpo_mlx.logprobs import PairScorer, pair_logps
from orpo_mlx.lora import adapter_weights, add_adapters
from orpo_mlx.reference import ReferenceLogProbs, pair_key, with_reference
from orpo_mlx.types import TokenizedPair
from tests.conftest import make_model, make_pairs


def disturb(model: nn.Module) -> None:
    model.load_weights([(name, value + 0.1) for name, value in adapter_weights(model).items()], strict=False)


def adapted(fine_tune_type: str = "lora") -> nn.Module:
    model = make_model()
    add_adapters(model, fine_tune_type, -1, {"rank": 2, "scale": 4.0, "dropout": 0.0})
    return model


def test_live_reference_is_the_base_model_whatever_the_adapters_are() -> None:
    pairs = make_pairs(4)
    batch = collate(pairs)
    base = pair_logps(PairScorer(make_model()), batch)
    model = adapted()
    disturb(model)
    chosen, rejected = ReferenceLogProbs(PairScorer(model), adapters_are_new=True)(pairs, batch)
    assert mx.array_equal(chosen, base.chosen).item()
    assert mx.array_equal(rejected, base.rejected).item()


def test_a_pair_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_pairs(4)
    reference = ReferenceLogProbs(PairScorer(adapted()), adapters_are_new=True)
    first = reference(pairs, collate(pairs))
    monkeypatch.setattr(PairScorer, "__call__", None)
    again = reference(pairs[::-1], collate(pairs[::-1]))
    assert np.array(again[0]).tolist() == np.array(first[0]).tolist()[::-1]


@pytest.mark.parametrize("fine_tune_type", ["lora", "full"])
def test_a_warm_start_keeps_the_model_it_started_from(fine_tune_type: str) -> None:
    pairs = make_pairs(4)
    batch = collate(pairs)
    model = adapted(fine_tune_type)
    disturb(model)
    scorer = PairScorer(model)
    reference = ReferenceLogProbs(scorer, adapters_are_new=False)
    assert reference.needs_precomputing
    start = pair_logps(scorer, batch)
    reference.remember([pairs])
    disturb(model)
    chosen, _ = reference(pairs, batch)
    assert mx.array_equal(chosen, start.chosen).item()
    assert not mx.allclose(chosen, pair_logps(scorer, batch).chosen, atol=1e-3).item()


def test_a_pair_that_can_no_longer_be_computed_is_an_error() -> None:
    reference = ReferenceLogProbs(PairScorer(adapted("full")), adapters_are_new=False)
    with pytest.raises(KeyError, match="no reference log-probs"):
        reference(make_pairs(1), collate(make_pairs(1)))


def test_keys_tell_apart_what_differs_only_in_the_boundary() -> None:
    keys = {
        pair_key(TokenizedPair(*sides))
        for sides in [((1, 2), (3,), (4,)), ((1,), (2, 3), (4,)), ((1,), (2,), (3, 4)), ((1, 2), (4,), (3,))]
    }
    assert len(keys) == 4
    assert pair_key(TokenizedPair((1,), (2,), (3,), "a:1")) == pair_key(TokenizedPair((1,), (2,), (3,), "b:9"))


def test_with_reference_fills_in_both_sides() -> None:
    logps = pair_logps(PairScorer(make_model()), collate(make_pairs(2)))
    assert with_reference(logps, None) is logps
    filled = with_reference(logps, (logps.chosen, logps.rejected))
    assert filled.reference_chosen is logps.chosen
    assert filled.reference_rejected is logps.rejected
