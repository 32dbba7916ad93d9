"""Held-out metrics do not depend on how the split is cut into batches."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from orpo_mlx.data import batching as module
from orpo_mlx.data.batching import length_order, padded_tokens
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.losses.recipe import make_recipe
from orpo_mlx.models.adapters import adapter_weights, add_adapters
from orpo_mlx.training.checkpoints.random_numbers import random_state
from orpo_mlx.training.data_order import evaluation_groups
from orpo_mlx.training.evaluating.evaluation import evaluate
from orpo_mlx.training.references.other_references import SecondModel
from orpo_mlx.training.references.reference import ReferenceLogProbs
from orpo_mlx.training.steps.step_values import mismatched
from orpo_mlx.types import Batch, Example
from tests.conftest import make_model, make_pairs
from tests.engine.test_pair_scorer import oracle_logps
from tests.helpers.quiet_training import make_run

# No row is cut.
LONG: dict[str, Any] = {"max_seq_length": 1000}


def scorer_with_adapters() -> PairScorer:
    model = make_model()
    add_adapters(model, "lora", -1, {"rank": 2, "scale": 4.0, "dropout": 0.5})
    model.train()
    return PairScorer(model)


@pytest.mark.parametrize("nll", ["completion", "sequence"])
@pytest.mark.parametrize("method", ["orpo", "dpo", "aot", "sft", "wpo", "ld_dpo"])
def test_batch_size_changes_no_metric(method: str, nll: str) -> None:
    pairs, recipe = make_pairs(9), make_recipe(method, {})
    results = []
    for size in (1, 4, 9):
        scorer = scorer_with_adapters()
        reference = (
            ReferenceLogProbs(scorer, adapters_are_new=True, wanted=recipe.wanted) if recipe.needs_reference else None
        )
        results.append(evaluate(scorer, pairs, recipe, batch_size=size, nll=nll, reference=reference, **LONG).metrics)
    for result in results[1:]:
        # Rewards of an untrained policy are rounding errors, and so is who wins by them.
        for key in set(result) - ({"rewards/accuracies"} if recipe.needs_reference else set()):
            assert result[key] == pytest.approx(results[0][key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_no_more_tokens_are_run_at_a_time_than_in_a_step(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    found = []
    for most in (4096, 60):
        run = make_run(settings, method=method, batch_size=6, micro_batch_tokens=most)
        run.loaded.model.load_weights(moved(run.loaded.model), strict=False)
        groups: list[list[Example]] = []

        def collate(self: PairScorer, pairs: list[Example], groups: Any = groups, **options: Any) -> Batch:
            groups.append(list(pairs))
            return module.collate(pairs, self.layout, **options)

        monkeypatch.setattr(PairScorer, "collate", collate)
        found.append(
            evaluate(
                run.scorer,
                run.splits["valid"].pairs,
                run.method,
                batch_size=6,
                nll="completion",
                reference=run.reference,
                micro_batch_tokens=most,
                max_seq_length=run.max_seq_length,
            ).metrics
        )
        layout = run.scorer.layout
        assert all(padded_tokens(group, layout) <= most or len(group) == 1 for group in groups)
        # Another composition would give the reference sums in another order.
        run.splits.pop("test")
        assert groups == evaluation_groups(run)
        assert len(groups) > 2 or most > 60
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5)


def moved(model: Any) -> list[tuple[str, mx.array]]:
    """Adapters with which the policy is no longer the reference."""
    return [(name, value + 0.1) for name, value in adapter_weights(model).items()]


def test_means_are_the_oracles_and_dropout_is_off_for_the_length_of_it() -> None:
    scorer, pairs = scorer_with_adapters(), make_pairs(7)
    seen: list[int] = []
    found = evaluate(
        scorer,
        pairs,
        make_recipe("sft", {}),
        batch_size=3,
        nll="completion",
        reference=None,
        progress=seen.append,
        **LONG,
    ).metrics
    base = make_model()
    chosen, rejected = (
        [oracle_logps(base, pair.prompt_ids, getattr(pair, side)) for pair in pairs]
        for side in ("chosen_ids", "rejected_ids")
    )
    assert found["nll_loss"] == pytest.approx(-np.mean([values.mean() for values in chosen]), rel=1e-5)
    by_mean, by_sum = (
        np.mean([f(one) > f(other) for one, other in zip(chosen, rejected, strict=True)]) for f in (np.mean, np.sum)
    )
    assert found["accuracies/mean_logps"] == pytest.approx(by_mean)
    assert found["accuracies/sum_logps"] == pytest.approx(by_sum)
    assert seen == [3, 6, 7]
    assert scorer.model.training


def test_an_untrained_policy_is_its_own_reference_and_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, scorer = make_pairs(5), scorer_with_adapters()
    reference = ReferenceLogProbs(scorer, adapters_are_new=True)
    calls: list[int] = []
    original = PairScorer.__call__

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(PairScorer, "__call__", counted)
    recipe = make_recipe("dpo", {})
    first = evaluate(scorer, pairs, recipe, batch_size=5, nll="completion", reference=reference, untrained=True, **LONG)
    assert len(calls) == 1
    again = evaluate(scorer, pairs, recipe, batch_size=5, nll="completion", reference=reference, **LONG)
    assert len(calls) == 2
    assert first == again
    assert first.metrics["loss"] == pytest.approx(np.log(2), abs=1e-7)


def test_another_references_divergence_is_there_before_the_first_step() -> None:
    recipe, pairs = make_recipe("kto", {}), make_pairs(6)
    policy, other = make_model(seed=1), make_model()
    reference = SecondModel(PairScorer(other), wanted=recipe.wanted)
    found = evaluate(
        PairScorer(policy), pairs, recipe, batch_size=3, nll="completion", reference=reference, untrained=True, **LONG
    ).metrics
    crossed = mismatched([pairs[index] for index in itertools.chain(*length_order(pairs, 3))], **LONG)

    def total(model: nn.Module, example: Example) -> float:
        return float(sum(oracle_logps(model, example.prompt_ids, ids).sum() for ids in example.completions))

    expected = sum(total(policy, each) - total(other, each) for each in crossed) / 12
    assert found["kl"] == pytest.approx(max(0.0, expected), rel=1e-4)
    assert found["kl"] > 1


def test_the_divergence_is_taken_without_dropout_and_draws_no_numbers() -> None:
    recipe, pairs = make_recipe("kto", {}), make_pairs(6)
    scorer = scorer_with_adapters()
    scorer.model.load_weights(moved(scorer.model), strict=False)
    reference = ReferenceLogProbs(scorer, adapters_are_new=True, wanted=recipe.wanted)
    found = []
    for seed in (1, 2):
        mx.random.seed(seed)
        before = random_state()
        found.append(evaluate(scorer, pairs, recipe, batch_size=3, nll="completion", reference=reference, **LONG))
        assert random_state() == before
    assert found[0] == found[1]
    assert found[0].metrics["kl"] > 0
    assert scorer.model.training
