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

from orpo_mlx.data.batching import collate, sequence_tokens
from orpo_mlx.engine.equivalence import probe_batch, same_states
from orpo_mlx.engine.pair_scorer import PairScorer, pair_logps
from orpo_mlx.models.adapters import add_adapters
from orpo_mlx.models.loading import load
from orpo_mlx.types import Batch, States, TokenizedPair
from tests.conftest import CONFIGS, PROVABLE, VOCABULARY, make_model, make_pairs
from tests.helpers import float64_losses as oracle

SWITCHES: list[dict[str, bool]] = [
    {"share_prompt": share, "split_head": split, "lean": lean}
    for share in (True, False)
    for split in (True, False)
    for lean in (True, False)
]
PLAIN_SWITCHES = SWITCHES[-1]


PLAIN = PairScorer(make_model(), **PLAIN_SWITCHES)
SHARED = PairScorer(make_model())


def oracle_logps(model: nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> oracle.Array:
    """log p of every completion token, from the model's logits on the bare row."""
    ids = [*prompt, *completion]
    logits = np.array(model(mx.array([ids])).astype(mx.float32), np.float64)[0]
    return oracle.token_logps(logits[len(prompt) - 1 : -1], np.array(completion))


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_token_of_every_pair_matches_the_oracle(kind: str, switches: dict[str, bool]) -> None:
    model = make_model(kind)
    pairs = make_pairs(6)
    tokens = PairScorer(model, **switches)(collate(pairs), with_prompt=True)
    assert tokens.prompt is not None
    prompts, chosen, rejected = (np.array(part) for part in tokens)
    for row, pair in enumerate(pairs):
        for grid, ids in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
            np.testing.assert_allclose(
                grid[row, : len(ids)], oracle_logps(model, pair.prompt_ids, ids), rtol=2e-6, atol=5e-5
            )
            assert not grid[row, len(ids) :].any()
        before = prompts.shape[1] - len(pair.prompt_ids)
        assert not prompts[row, : before + 1].any()
        if len(pair.prompt_ids) > 1:
            expected = oracle_logps(model, pair.prompt_ids[:1], pair.prompt_ids[1:])
            np.testing.assert_allclose(prompts[row, before + 1 :], expected, rtol=2e-6, atol=5e-5)


@pytest.mark.parametrize("kind", PROVABLE)
def test_what_can_be_proven_is(kind: str) -> None:
    scorer = PairScorer(make_model(kind))
    assert scorer.shares_prompt
    assert scorer.splits_head
    assert scorer.lean


def test_a_recurrent_model_shares_the_prompt_of_pairs_one_at_a_time() -> None:
    scorer = PairScorer(make_model("mamba"))
    # mlx-lm's Mamba takes no mask, so that a padded prompt would run into its state.
    assert scorer.shares_prompt
    assert not scorer._padded_prefix


@pytest.mark.parametrize("kind", PROVABLE)
def test_gradients_do_not_depend_on_the_path(kind: str) -> None:
    batch = collate(make_pairs(4))
    plain = adapter_gradients(kind, batch, **PLAIN_SWITCHES)
    for switches in SWITCHES[:-1]:
        for name, gradient in adapter_gradients(kind, batch, **switches).items():
            scale = np.abs(plain[name]).max()
            np.testing.assert_allclose(gradient, plain[name], rtol=0, atol=1e-4 * scale, err_msg=f"{name} {switches}")


def adapter_gradients(kind: str, batch: Batch, **switches: bool) -> dict[str, oracle.Array]:
    """Gradients of every adapter for a loss that weighs each side of each pair differently."""
    model = make_model(kind)
    mx.random.seed(1)
    add_adapters(model, "lora", -1, {"rank": 2, "scale": 4.0, "dropout": 0.0})
    for name, array in dict(tree_flatten(model.trainable_parameters())).items():
        model.load_weights([(name, mx.random.normal(array.shape) * 0.1)], strict=False)
    scorer = PairScorer(model, **switches)

    def loss(batch: Batch) -> mx.array:
        logps = pair_logps(scorer, batch, nll_tokens_per_pair=7.0)
        weights = mx.arange(1, logps.chosen.size + 1)
        return (logps.nll * weights).sum() + (logps.rejected * weights).sum() - (logps.chosen**2).sum() / 50

    _, gradients = nn.value_and_grad(model, loss)(batch)
    found = {name: np.array(value, np.float64) for name, value in dict(tree_flatten(gradients)).items()}
    assert all(np.abs(value).max() > 0 for value in found.values()), "an adapter without gradient"
    return found


def test_gradient_matches_finite_differences() -> None:
    model = make_model()
    add_adapters(model, "lora", -1, {"rank": 2, "scale": 4.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]})
    scorer, batch = PairScorer(model), collate(make_pairs(3))
    name = "model.layers.0.self_attn.q_proj.lora_b"
    start = 0.1 * mx.random.normal(dict(tree_flatten(model.trainable_parameters()))[name].shape)
    direction = mx.random.normal(start.shape)
    direction = direction / mx.sqrt((direction**2).sum())

    def loss(batch: Batch) -> mx.array:
        return pair_logps(scorer, batch).chosen.sum()

    def at(step: float) -> float:
        model.load_weights([(name, start + step * direction)], strict=False)
        return float(loss(batch))

    slope = (at(0.02) - at(-0.02)) / 0.04
    at(0.0)
    gradient = dict(tree_flatten(nn.value_and_grad(model, loss)(batch)[1]))[name]
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
def test_row_order_padding_and_company_change_nothing(kind: str) -> None:
    model = make_model(kind)
    scorer, pairs = PairScorer(model), make_pairs(6)
    together = np.array(pair_logps(scorer, collate(pairs)).chosen)
    turned = np.array(pair_logps(scorer, collate(pairs[::-1])).chosen)[::-1]
    alone = np.concatenate([np.array(pair_logps(scorer, collate([pair])).chosen) for pair in pairs])
    np.testing.assert_allclose(turned, together, atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(alone, together, atol=1e-5, rtol=1e-6)


def outlier_model(kind: str) -> nn.Module:
    """In half precision, with one channel that is far larger than all others, as trained models have them."""
    model = make_model(kind)
    embedding: Any = model["backbone"].embeddings if kind == "mamba" else model["model"].embed_tokens
    shift = 30 * mx.abs(embedding.weight).mean() * (mx.arange(embedding.weight.shape[1]) == 0)
    embedding.weight = embedding.weight + shift
    model.set_dtype(mx.bfloat16)
    return model


def test_padding_that_runs_into_a_state_is_seen_in_half_precision_too() -> None:
    # mlx-lm's Mamba takes no mask; llama's attention does.
    assert not PairScorer(outlier_model("mamba"))._padded_prefix
    assert PairScorer(outlier_model("llama"))._padded_prefix


def test_what_one_large_channel_would_hide() -> None:
    batch = probe_batch(padded=True)
    rng = np.random.default_rng(0)
    shapes = [(*mask.shape, 64) for mask in (batch.prompt_mask, batch.chosen_mask, batch.rejected_mask)]
    expected = [rng.standard_normal(shape) + 100 * (np.arange(64) == 0) for shape in shapes]

    def states(error: float, rows: list[float]) -> States:
        parts = [part + error * np.array(rows)[:, None, None] * rng.standard_normal(part.shape) for part in expected]
        first, second, third = (mx.array(part.astype(np.float32)).astype(mx.bfloat16) for part in parts)
        return first, second, third

    def same(error: float, rows: list[float]) -> bool:
        return same_states(states(error, rows), states(0, rows), batch)

    assert same(0.02, [1, 1])
    assert not same(0.2, [0, 1])
    # Where the row without padding is as far off, it is rounding.
    assert same(0.2, [1, 1])
    assert not same(0.5, [1, 1])
    assert float(mx.abs(states(0.2, [0, 1])[1] - states(0, [0, 1])[1]).max()) < 0.05 * 100


def test_sums_and_counts_are_each_sides_own() -> None:
    model, pairs = make_model(), make_pairs(6)
    logps = pair_logps(PairScorer(model), collate(pairs))
    assert np.array(logps.chosen_tokens).tolist() == [len(pair.chosen_ids) for pair in pairs]
    assert np.array(logps.rejected_tokens).tolist() == [len(pair.rejected_ids) for pair in pairs]
    for found, side in ((logps.chosen, "chosen_ids"), (logps.rejected, "rejected_ids")):
        expected = [oracle_logps(model, pair.prompt_ids, getattr(pair, side)).sum() for pair in pairs]
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-5)


token = st.integers(1, VOCABULARY - 1)
sides = st.lists(token, min_size=1, max_size=9).map(tuple)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.lists(st.builds(TokenizedPair, sides, sides, sides), min_size=1, max_size=5), st.data())
def test_shared_is_plain_for_any_pairs_in_any_order(pairs: list[TokenizedPair], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(pairs))))
    plain = pair_logps(PLAIN, collate(pairs), nll_tokens_per_pair=3.0)
    shared = pair_logps(SHARED, collate([pairs[index] for index in order]), nll_tokens_per_pair=3.0)
    for one, other in zip(plain[:5], shared[:5], strict=True):
        np.testing.assert_allclose(np.array(other), np.array(one)[list(order)], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_models_are_reduced_in_float32(dtype: mx.Dtype) -> None:
    model = make_model()
    model.set_dtype(dtype)
    pair = make_pairs(3)[2]
    expected = oracle_logps(model, pair.prompt_ids, pair.chosen_ids)
    batch = collate([pair])
    exact = PairScorer(model, **PLAIN_SWITCHES)(batch).chosen
    assert exact.dtype == mx.float32
    # The same logits, so nothing but the reduction could differ: half precision there would be 1e-2 off.
    np.testing.assert_allclose(np.array(exact)[0, : len(expected)], expected, rtol=0, atol=1e-5)
    split = PairScorer(model)
    assert split.shares_prompt
    assert split.splits_head
    rounding = 50 * float(mx.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.array(split(batch).chosen)[0, : len(expected)], expected, rtol=rounding, atol=rounding
    )


def test_nll_of_completion_and_of_sequence() -> None:
    model = make_model()
    pairs = make_pairs(4)
    scorer, batch = PairScorer(model), collate(pairs)
    completion = np.array(pair_logps(scorer, batch).nll)
    per_token = [oracle_logps(model, pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    np.testing.assert_allclose(completion, [-values.mean() for values in per_token], rtol=1e-5)
    tokens = sequence_tokens(pairs)
    sequence = np.array(pair_logps(scorer, batch, nll_tokens_per_pair=tokens / 4).nll)
    total = sum(
        oracle_logps(model, pair.prompt_ids[:1], (*pair.prompt_ids[1:], *pair.chosen_ids)).sum() for pair in pairs
    )
    assert sequence.mean() == pytest.approx(-total / tokens, rel=1e-5)


def test_a_trained_head_gets_its_gradient() -> None:
    model = make_model("qwen2")
    model.unfreeze()
    scorer, batch = PairScorer(model), collate(make_pairs(3))
    assert scorer.splits_head
    plain = PairScorer(model, **PLAIN_SWITCHES)
    gradients = [
        dict(tree_flatten(nn.value_and_grad(model, lambda batch, s=each: pair_logps(s, batch).chosen.sum())(batch)[1]))
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
    found = np.array(scorer(collate([pair])).chosen)[0, : len(pair.chosen_ids)]
    np.testing.assert_allclose(found, oracle_logps(make_model(), pair.prompt_ids, pair.chosen_ids), atol=2e-5)


@pytest.mark.parametrize("name", ["gemma2", "llama_tied", "phi3", "qwen2", "granite", "qwen3_moe"])
def test_agrees_with_pytorch(shared: Path, name: str, parity: Callable[[str], nn.Module]) -> None:
    rows = json.loads((shared / "parity" / name / "reference.json").read_text())
    scorer = PairScorer(parity(name))
    pairs = [
        TokenizedPair(tuple(row["prompt_ids"]), tuple(row["chosen_ids"]), tuple(row["rejected_ids"])) for row in rows
    ]
    tokens = scorer(collate(pairs))
    for number, row in enumerate(rows):
        for grid, side in ((tokens.chosen, "chosen"), (tokens.rejected, "rejected")):
            expected = row[f"{side}_token_logps"]
            np.testing.assert_allclose(np.array(grid)[number, : len(expected)], expected, atol=1e-4)


@pytest.fixture
def parity(shared: Path) -> Callable[[str], nn.Module]:
    return lambda name: load(str(shared / "parity" / name)).model
