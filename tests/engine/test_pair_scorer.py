"""Log-probs against a float64 oracle over the model's own logits, one unpadded row at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from orpo_mlx.data.batching import collate, sequence_tokens, split_by_completion
from orpo_mlx.data.tokens.trained_turns import learned_places, read_ids
from orpo_mlx.device_profile import CPU, GPU, DeviceProfile
from orpo_mlx.engine.equivalence import same_states
from orpo_mlx.engine.pair_scorer import PairScorer, pair_logps
from orpo_mlx.models.adapters import add_adapters
from orpo_mlx.models.loading import load
from orpo_mlx.types import PairLogProbs, TokenizedPair, Wanted
from tests.conftest import CONFIGS, PROVABLE, VOCABULARY, make_model, make_pairs
from tests.helpers import float64_losses as oracle

SWITCHES: list[dict[str, Any]] = [
    {"share_prompt": share, "split_head": split, "lean": lean}
    for share in (True, False)
    for split in (True, False)
    for lean in (True, False)
]
PLAIN_SWITCHES = SWITCHES[-1]
PAIRS = make_pairs(6)
# Prompts that a GPU's layout shares in part.
LONG = [pair._replace(prompt_ids=tuple(range(1, 50)) + pair.prompt_ids) for pair in make_pairs(3, seed=2)]

PLAIN = PairScorer(make_model(), **PLAIN_SWITCHES)
SHARED = PairScorer(make_model())


@pytest.fixture(params=[CPU, GPU], ids=["cpu", "gpu"])
def profile(request: pytest.FixtureRequest) -> DeviceProfile:
    chosen: DeviceProfile = request.param
    return chosen


def oracle_logps(model: nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> oracle.Array:
    """log p of every completion token, from the model's logits on the bare row."""
    ids = [*prompt, *completion]
    logits = np.array(model(mx.array([ids])).astype(mx.float32), np.float64)[0]
    return oracle.token_logps(logits[len(prompt) - 1 : -1], np.array(completion))


def logps_of(scorer: PairScorer, pairs: list[TokenizedPair], tokens: float | None = None) -> PairLogProbs:
    batch = scorer.collate(pairs, with_prompt=tokens is not None)
    return pair_logps(scorer, batch, nll_tokens_per_pair=tokens)


PATHS = [*((CPU, switches) for switches in SWITCHES), (GPU, SWITCHES[0]), (GPU, PLAIN_SWITCHES)]


@pytest.mark.parametrize(("profile", "switches"), PATHS, ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_token_of_every_pair_matches_the_oracle(
    kind: str, switches: dict[str, bool], profile: DeviceProfile
) -> None:
    model = make_model(kind)
    scorer = PairScorer(model, profile=profile, **switches)
    for pairs in (PAIRS, LONG):
        logps = np.array(scorer(scorer.collate(pairs, with_prompt=True)))
        for pair, found in zip(pairs, split_by_completion(pairs, logps), strict=True):
            for values, ids in zip(found, (pair.chosen_ids, pair.rejected_ids), strict=True):
                np.testing.assert_allclose(values, oracle_logps(model, pair.prompt_ids, ids), rtol=1e-5, atol=5e-5)
        start = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
        for pair in pairs:
            values, start = logps[start : start + len(pair.prompt_ids) - 1], start + len(pair.prompt_ids) - 1
            if len(pair.prompt_ids) > 1:
                expected = oracle_logps(model, pair.prompt_ids[:1], pair.prompt_ids[1:])
                np.testing.assert_allclose(values, expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize(("profile", "switches"), [PATHS[0], PATHS[-2], PATHS[-1]], ids=str)
def test_tokens_that_are_not_learned_are_read_and_not_counted(
    switches: dict[str, bool], profile: DeviceProfile
) -> None:
    model, rng = make_model(), np.random.default_rng(3)
    scorer = PairScorer(model, profile=profile, **switches)

    def partly(ids: tuple[int, ...]) -> tuple[int, ...]:
        # The last token stays: a completion of nothing is no row.
        return (*(int(token) if rng.random() < 0.5 else ~int(token) for token in ids[:-1]), ids[-1])

    pairs = [pair._replace(chosen_ids=partly(pair.chosen_ids), rejected_ids=partly(pair.rejected_ids)) for pair in LONG]
    batch = scorer.collate(pairs, with_prompt=True)
    found = pair_logps(scorer, batch, nll_tokens_per_pair=2.0)
    split = split_by_completion(pairs, np.array(scorer(batch)))
    for number, (pair, values) in enumerate(zip(pairs, split, strict=True)):
        prompt = oracle_logps(model, pair.prompt_ids[:1], pair.prompt_ids[1:]).sum()
        for side, of_side in zip(("chosen", "rejected"), values, strict=True):
            ids = getattr(pair, f"{side}_ids")
            expected = oracle_logps(model, pair.prompt_ids, tuple(read_ids(ids)))[learned_places(ids)]
            np.testing.assert_allclose(of_side, expected, rtol=1e-5, atol=5e-5)
            np.testing.assert_allclose(np.array(getattr(found, side))[number], expected.sum(), rtol=1e-5, atol=5e-5)
            assert np.array(getattr(found, f"{side}_tokens"))[number] == len(expected)
            if side == "chosen":
                np.testing.assert_allclose(np.array(found.nll)[number], -(prompt + expected.sum()) / 2, rtol=1e-5)


@pytest.mark.parametrize(("profile", "switches"), [PATHS[0], PATHS[-3], PATHS[-2]], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "mamba"])
def test_tails_and_alignment_match_the_oracle(kind: str, switches: dict[str, bool], profile: DeviceProfile) -> None:
    model = make_model(kind)
    scorer = PairScorer(model, profile=profile._replace(head_tile_tokens=100, head_tile_rows=5), **switches)
    wanted = Wanted(tails=True, alignment=True)
    found = pair_logps(scorer, scorer.collate(LONG, with_prompt=True), nll_tokens_per_pair=3.0, wanted=wanted)
    for number, pair in enumerate(LONG):
        shared = min(len(pair.chosen_ids), len(pair.rejected_ids))
        for side in ("chosen", "rejected"):
            ids = getattr(pair, f"{side}_ids")
            logps = oracle_logps(model, pair.prompt_ids, ids)
            logits = np.array(model(mx.array([[*pair.prompt_ids, *ids]])), np.float64)[0, len(pair.prompt_ids) - 1 : -1]
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            collisions = np.log(np.square(p / p.sum(axis=1, keepdims=True)).sum(axis=1))
            tail, alignment = (np.array(getattr(found, f"{side}_{what}"))[number] for what in ("tail", "alignment"))
            np.testing.assert_allclose(tail, logps[shared:].sum(), rtol=1e-5, atol=5e-5)
            np.testing.assert_allclose(alignment, np.mean(logps - collisions), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("kind", [*PROVABLE, "mamba"])
def test_what_can_be_proven_is(kind: str, profile: DeviceProfile) -> None:
    scorer = PairScorer(make_model(kind), profile=profile)
    assert scorer.shares_prompt
    assert not scorer.notes
    assert scorer.proofs.enabled >= ({"head"} if kind != "mamba" else set())
    # mlx-lm's Mamba has its head in its backbone.
    assert scorer.splits_head == (kind != "mamba")


@pytest.mark.parametrize("kind", PROVABLE)
def test_gradients_do_not_depend_on_the_path(kind: str) -> None:
    for pairs in (PAIRS[:4], LONG):
        plain = adapter_gradients(kind, pairs, CPU, **PLAIN_SWITCHES)
        for profile, switches in PATHS[1:] if pairs is LONG else [PATHS[0], PATHS[-2]]:
            for name, gradient in adapter_gradients(kind, pairs, profile, **switches).items():
                atol = 1e-4 * np.abs(plain[name]).max()
                np.testing.assert_allclose(gradient, plain[name], rtol=0, atol=atol, err_msg=f"{name} {switches}")


def adapter_gradients(
    kind: str, pairs: list[TokenizedPair], profile: DeviceProfile, **switches: bool
) -> dict[str, oracle.Array]:
    """Gradients of every adapter for a loss that weighs each side of each pair differently."""
    model = make_model(kind)
    mx.random.seed(1)
    add_adapters(model, "lora", -1, {"rank": 2, "scale": 4.0, "dropout": 0.0})
    for name, array in dict(tree_flatten(model.trainable_parameters())).items():
        model.load_weights([(name, mx.random.normal(array.shape) * 0.1)], strict=False)
    scorer = PairScorer(model, profile=profile, **switches)

    def loss(pairs: list[TokenizedPair]) -> mx.array:
        logps = logps_of(scorer, pairs, 7.0)
        weights = mx.arange(1, logps.chosen.size + 1)
        return (logps.nll * weights).sum() + (logps.rejected * weights).sum() - (logps.chosen**2).sum() / 50

    _, gradients = nn.value_and_grad(model, loss)(pairs)
    found = {name: np.array(value, np.float64) for name, value in dict(tree_flatten(gradients)).items()}
    assert all(np.abs(value).max() > 0 for value in found.values()), "an adapter without gradient"
    return found


def test_gradient_matches_finite_differences() -> None:
    model = make_model()
    add_adapters(model, "lora", -1, {"rank": 2, "scale": 4.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]})
    scorer = PairScorer(model)
    name = "model.layers.0.self_attn.q_proj.lora_b"
    start = 0.1 * mx.random.normal(dict(tree_flatten(model.trainable_parameters()))[name].shape)
    direction = mx.random.normal(start.shape)
    direction = direction / mx.sqrt((direction**2).sum())

    def loss(pairs: list[TokenizedPair]) -> mx.array:
        return logps_of(scorer, pairs).chosen.sum()

    def at(step: float) -> float:
        model.load_weights([(name, start + step * direction)], strict=False)
        return float(loss(PAIRS[:3]))

    slope = (at(0.02) - at(-0.02)) / 0.04
    at(0.0)
    gradient = dict(tree_flatten(nn.value_and_grad(model, loss)(PAIRS[:3])[1]))[name]
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral", "mamba"])
def test_row_order_padding_and_company_change_nothing(kind: str, profile: DeviceProfile) -> None:
    scorer, pairs = PairScorer(make_model(kind), profile=profile), [*PAIRS, *LONG]
    together = np.array(logps_of(scorer, pairs).chosen)
    turned = np.array(logps_of(scorer, pairs[::-1]).chosen)[::-1]
    alone = np.concatenate([np.array(logps_of(scorer, [pair]).chosen) for pair in pairs])
    np.testing.assert_allclose(turned, together, atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(alone, together, atol=1e-5, rtol=1e-6)


def test_what_one_large_channel_would_hide() -> None:
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((60, 64)) + 100 * (np.arange(64) == 0)

    def states(error: float) -> mx.array:
        values = expected + error * rng.standard_normal(expected.shape)
        return mx.array(values.astype(np.float32)).astype(mx.bfloat16)

    assert same_states(states(0.02), states(0))
    # Of the largest channel this is half a percent: rounding, were it not for all the others.
    assert not same_states(states(0.5), states(0))


def test_a_batch_that_shares_prompts_is_refused_where_they_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="cannot share prompts"):
        PLAIN(collate(LONG, CPU.layout))
    with pytest.raises(ValueError, match="collated with its prompts"):
        pair_logps(PLAIN, PLAIN.collate(LONG), nll_tokens_per_pair=1.0)


def test_sums_and_counts_are_each_sides_own(profile: DeviceProfile) -> None:
    model = make_model()
    logps = logps_of(PairScorer(model, profile=profile), PAIRS)
    assert np.array(logps.chosen_tokens).tolist() == [len(pair.chosen_ids) for pair in PAIRS]
    assert np.array(logps.rejected_tokens).tolist() == [len(pair.rejected_ids) for pair in PAIRS]
    for found, side in ((logps.chosen, "chosen_ids"), (logps.rejected, "rejected_ids")):
        expected = [oracle_logps(model, pair.prompt_ids, getattr(pair, side)).sum() for pair in PAIRS]
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-5)


token = st.integers(1, VOCABULARY - 1)
sides = st.lists(token, min_size=1, max_size=9).map(tuple)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.lists(st.builds(TokenizedPair, sides, sides, sides), min_size=1, max_size=5), st.data())
def test_shared_is_plain_for_any_pairs_in_any_order(pairs: list[TokenizedPair], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(pairs))))
    plain = logps_of(PLAIN, pairs, 3.0)
    shared = logps_of(SHARED, [pairs[index] for index in order], 3.0)
    for one, other in zip(plain[:5], shared[:5], strict=True):
        np.testing.assert_allclose(np.array(other), np.array(one)[list(order)], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_models_are_reduced_in_float32(dtype: mx.Dtype) -> None:
    model = make_model()
    model.set_dtype(dtype)
    pair = make_pairs(3)[2]
    expected = oracle_logps(model, pair.prompt_ids, pair.chosen_ids)
    plain = PairScorer(model, **PLAIN_SWITCHES)
    exact = plain(plain.collate([pair]))
    assert exact.dtype == mx.float32
    # The same logits, so nothing but the reduction could differ: half precision there would be 1e-2 off.
    np.testing.assert_allclose(np.array(exact)[: len(expected)], expected, rtol=0, atol=1e-5)
    split = PairScorer(model)
    assert split.shares_prompt
    assert split.splits_head
    found = np.array(split(split.collate([pair])))[: len(expected)]
    rounding = 50 * float(mx.finfo(dtype).eps)
    np.testing.assert_allclose(found, expected, rtol=rounding, atol=rounding)


def test_nll_of_completion_and_of_sequence() -> None:
    model = make_model()
    pairs = make_pairs(4)
    scorer = PairScorer(model)
    completion = np.array(logps_of(scorer, pairs).nll)
    per_token = [oracle_logps(model, pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    np.testing.assert_allclose(completion, [-values.mean() for values in per_token], rtol=1e-5)
    tokens = sequence_tokens(pairs)
    sequence = np.array(logps_of(scorer, pairs, tokens / 4).nll)
    total = sum(
        oracle_logps(model, pair.prompt_ids[:1], (*pair.prompt_ids[1:], *pair.chosen_ids)).sum() for pair in pairs
    )
    assert sequence.mean() == pytest.approx(-total / tokens, rel=1e-5)


def test_a_trained_head_gets_its_gradient() -> None:
    model = make_model("qwen2")
    model.unfreeze()
    scorer = PairScorer(model)
    assert scorer.splits_head
    plain = PairScorer(model, **PLAIN_SWITCHES)
    gradients = [
        dict(
            tree_flatten(nn.value_and_grad(model, lambda pairs, s=each: logps_of(s, pairs).chosen.sum())(PAIRS[:3])[1])
        )
        for each in (scorer, plain)
    ]
    embedding = "model.embed_tokens.weight"
    assert float(mx.abs(gradients[1][embedding]).max()) > 0
    for name, value in gradients[1].items():
        scale = float(mx.abs(value).max())
        np.testing.assert_allclose(np.array(gradients[0][name]), np.array(value), atol=1e-4 * scale, err_msg=name)


def test_a_model_that_hides_its_head_falls_back() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()
            self.args = self.inner.args

        @property
        def layers(self) -> Any:
            return self.inner.layers

        def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
            logits: mx.array = self.inner(ids, cache)
            return logits

    scorer = PairScorer(Wrapped())
    assert not scorer.splits_head
    pair = make_pairs(3)[2]
    found = np.array(scorer(scorer.collate([pair])))[: len(pair.chosen_ids)]
    np.testing.assert_allclose(found, oracle_logps(make_model(), pair.prompt_ids, pair.chosen_ids), atol=2e-5)


@pytest.mark.parametrize("name", ["gemma2", "llama_tied", "phi3", "qwen2", "granite", "qwen3_moe"])
def test_agrees_with_pytorch(shared: Path, name: str, parity: Callable[[str], nn.Module]) -> None:
    rows = json.loads((shared / "parity" / name / "reference.json").read_text())
    scorer = PairScorer(parity(name))
    pairs = [
        TokenizedPair(tuple(row["prompt_ids"]), tuple(row["chosen_ids"]), tuple(row["rejected_ids"])) for row in rows
    ]
    logps = np.array(scorer(scorer.collate(pairs)))
    for row, (chosen, rejected) in zip(rows, split_by_completion(pairs, logps), strict=True):
        np.testing.assert_allclose(chosen, row["chosen_token_logps"], atol=1e-4)
        np.testing.assert_allclose(rejected, row["rejected_token_logps"], atol=1e-4)


@pytest.fixture
def parity(shared: Path) -> Callable[[str], nn.Module]:
    return lambda name: load(str(shared / "parity" / name)).model
