"""Reference log-probs: the model as it was before training, remembered per pair."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from orpo_mlx.data.batching import collate
from orpo_mlx.engine.pair_scorer import PairScorer, pair_logps
from orpo_mlx.models.adapters import adapter_weights, add_adapters
from orpo_mlx.training.references.reference import ReferenceLogProbs, ReferenceValues, keys_of, with_reference
from orpo_mlx.types import Batch, TokenizedPair, Wanted
from tests.conftest import make_model, make_pairs
from tests.helpers.quiet_training import rows, run_quietly


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
    found = ReferenceLogProbs(PairScorer(model), adapters_are_new=True)(pairs, batch)
    assert mx.array_equal(found.chosen, base.chosen).item()
    assert mx.array_equal(found.rejected, base.rejected).item()


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
    chosen = reference(pairs, batch).chosen
    assert mx.array_equal(chosen, start.chosen).item()
    assert not mx.allclose(chosen, pair_logps(scorer, batch).chosen, atol=1e-3).item()


@pytest.mark.parametrize("fine_tune_type", ["lora", "dora", "full"])
def test_what_is_on_disk_is_what_is_computed_bit_for_bit(
    fine_tune_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [make_pairs(3), make_pairs(2, seed=1)]
    live = fine_tune_type != "full"

    def reference() -> ReferenceLogProbs:
        scorer = PairScorer(adapted(fine_tune_type))
        made = ReferenceLogProbs(scorer, adapters_are_new=live, wanted=Wanted(tails=True))
        made.keep_in(tmp_path, {"rope_theta": 1e4})
        return made

    first = reference()
    first.remember(groups)
    first.table.save()
    computed = [first(group, collate(group)) for group in groups]
    again = reference()
    assert len(again.table) == 10  # Of each pair the whole completions, and their tails.
    monkeypatch.setattr(PairScorer, "__call__", None)
    again.remember(groups)
    for group, expected in zip(groups, computed, strict=True):
        found = again(group, collate(group))
        for one, other in zip(found, expected, strict=True):
            assert one is not None
            assert other is not None
            assert mx.array_equal(one, other).item()


def test_only_the_missing_pairs_of_a_batch_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_pairs(4)
    scorer = PairScorer(adapted())
    base = pair_logps(PairScorer(make_model()), collate(pairs))
    reference = ReferenceLogProbs(scorer, adapters_are_new=True)
    reference.table.add(keys_of(pairs[1])[0], -1.5, -2.5)
    sizes = []
    call = PairScorer.__call__

    def counted(self: PairScorer, batch: Batch, **keywords: Any) -> mx.array:
        sizes.append(len(batch.chosen))
        return call(self, batch, **keywords)

    monkeypatch.setattr(PairScorer, "__call__", counted)
    chosen, rejected, *_ = reference(pairs, collate(pairs))
    assert sizes == [3]
    assert (chosen[1].item(), rejected[1].item()) == (-1.5, -2.5)
    np.testing.assert_allclose(np.delete(np.array(chosen), 1), np.delete(np.array(base.chosen), 1), rtol=1e-5)
    np.testing.assert_allclose(np.delete(np.array(rejected), 1), np.delete(np.array(base.rejected), 1), rtol=1e-5)


def file_of(model: nn.Module, folder: Path, *, config: float = 1e4, live: bool = True, prompt: bool = False) -> str:
    """The name of the file a reference is kept in."""
    reference = ReferenceLogProbs(PairScorer(model), adapters_are_new=live, with_prompt=prompt)
    reference.keep_in(folder, {"rope_theta": config})
    reference.remember([make_pairs(1)])
    before = set(folder.glob("*"))
    reference.table.save()
    new = set(folder.glob("*")) - before
    return new.pop().name if new else "known"


def test_another_reference_is_another_file(tmp_path: Path) -> None:
    disturbed = adapted()
    assert file_of(disturbed, tmp_path) != "known"
    disturb(disturbed)
    assert file_of(disturbed, tmp_path) == "known"  # The adapters are off in a reference whose adapters are new.
    assert file_of(disturbed, tmp_path, live=False) != "known"
    assert file_of(adapted(), tmp_path, prompt=True) != "known"
    assert file_of(adapted(), tmp_path, config=2e4) != "known"
    other = adapted()
    weight = other.layers[0].mlp.down_proj.linear.weight
    other.layers[0].mlp.down_proj.linear.weight = weight + 1e-6 * (mx.arange(weight.size).reshape(weight.shape) == 5)
    assert file_of(other, tmp_path) != "known"


def test_a_pair_that_can_no_longer_be_computed_is_an_error() -> None:
    reference = ReferenceLogProbs(PairScorer(adapted("full")), adapters_are_new=False)
    with pytest.raises(KeyError, match="no reference log-probs"):
        reference(make_pairs(1), collate(make_pairs(1)))


def test_keys_tell_apart_what_differs_only_in_the_boundary() -> None:
    keys = {
        keys_of(TokenizedPair(*sides))
        for sides in [((1, 2), (3,), (4,)), ((1,), (2, 3), (4,)), ((1,), (2,), (3, 4)), ((1, 2), (4,), (3,))]
    }
    assert len(keys) == 4
    assert keys_of(TokenizedPair((1,), (2,), (3,), "a:1")) == keys_of(TokenizedPair((1,), (2,), (3,), "b:9"))


def test_with_reference_fills_in_both_sides() -> None:
    logps = pair_logps(PairScorer(make_model()), collate(make_pairs(2)))
    assert with_reference(logps, None) is logps
    filled = with_reference(logps, ReferenceValues(logps.chosen, logps.rejected))
    assert filled.reference_chosen is logps.chosen
    assert filled.reference_rejected is logps.rejected


@pytest.mark.parametrize("start", ["fresh", "warm", "full", "dora"])
def test_the_first_dpo_loss_is_ln_2(settings: dict[str, Any], start: str, tmp_path: Path) -> None:
    if start == "warm":
        run_quietly({**settings, "adapter_path": str(tmp_path / "first"), "learning_rate": 0.1})
        settings["resume_adapter_file"] = str(tmp_path / "first")
    fine_tune_type = start if start in ("full", "dora") else "lora"
    run_quietly({**settings, "method": "dpo", "fine_tune_type": fine_tune_type})
    assert rows(settings, "train")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows(settings, "valid")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows(settings, "train")[-1]["loss"] != pytest.approx(math.log(2), abs=1e-6)
