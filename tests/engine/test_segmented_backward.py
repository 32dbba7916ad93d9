"""The backward pass in segments gives the plain forward's loss and gradients."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.llama import TransformerBlock

from orpo_mlx.data.batching import collate
from orpo_mlx.engine import segmented_backward as segments_module
from orpo_mlx.engine.gated_delta import model_gated_delta_update
from orpo_mlx.engine.pair_scorer import PairScorer, pair_logps
from orpo_mlx.engine.segmented_backward import find_walk, whole_value_and_grad
from orpo_mlx.models.adapters import add_adapters
from orpo_mlx.types import States
from tests.conftest import PROVABLE, make_model, make_pairs, quantise

BATCH = collate(make_pairs(4))
Result = tuple[float, dict[str, Any]]


def trained_model(
    kind: str, fine_tune_type: str, *, layers: int = -1, quantised: bool = False, **lora: Any
) -> nn.Module:
    model = make_model(kind)
    if quantised:
        quantise(model)
    mx.random.seed(1)
    add_adapters(model, fine_tune_type, layers, {"rank": 2, "scale": 4.0, "dropout": 0.0, **lora})
    if fine_tune_type != "full":
        for name, array in dict(tree_flatten(model.trainable_parameters())).items():
            model.load_weights([(name, array + 0.1 * mx.random.normal(array.shape))], strict=False)
    return model


def result(scorer: PairScorer, segments: tuple[int, int] | None) -> Result:
    """Loss and gradients, in segments of so many layers with so many kept, or (None) in one graph."""

    def share(states: States) -> tuple[mx.array, mx.array]:
        logps = pair_logps(scorer, BATCH, nll_tokens_per_pair=7.0, states=states)
        weights = mx.arange(1, logps.chosen.size + 1)
        return (logps.nll * weights).sum() + (
            logps.rejected * weights
        ).sum() - logps.chosen.square().sum() / 50, weights

    if segments is None:
        (value, _), gradients = whole_value_and_grad(scorer, BATCH, share)
    else:
        walk = find_walk(scorer, segment_layers=segments[0], kept_layers=segments[1])
        assert walk is not None
        (value, _), gradients = walk.value_and_grad(BATCH, share)
    return float(value), {name: np.array(array, np.float64) for name, array in gradients.items()}


def assert_same(found: Result, expected: Result) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, array in expected[1].items():
        assert np.abs(array).max() > 0, name
        np.testing.assert_allclose(found[1][name], array, rtol=0, atol=1e-4 * np.abs(array).max(), err_msg=name)


@pytest.mark.parametrize("segments", [(1, 0), (1, 1), (5, 0)])
@pytest.mark.parametrize("kind", [kind for kind in PROVABLE if kind != "gemma4_shared"])
def test_segments_change_nothing(kind: str, segments: tuple[int, int]) -> None:
    model = trained_model(kind, "lora")
    plain = PairScorer(model, share_prompt=False, split_head=False, lean=False)
    before = dict(tree_flatten(model.trainable_parameters()))
    assert_same(result(PairScorer(model), segments), result(plain, None))
    after = dict(tree_flatten(model.trainable_parameters()))
    assert all(mx.array_equal(after[name], array).item() for name, array in before.items())


@pytest.mark.parametrize(
    "how",
    [
        {"fine_tune_type": "dora"},
        {"fine_tune_type": "full"},
        {"fine_tune_type": "lora", "layers": 1},
        {"fine_tune_type": "lora", "quantised": True},
        {"fine_tune_type": "lora", "keys": ["self_attn.q_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("switches", [{}, {"share_prompt": False}, {"lean": False}], ids=str)
def test_whatever_is_trained(how: dict[str, Any], switches: dict[str, bool]) -> None:
    model = trained_model("llama", **how)
    plain = PairScorer(model, share_prompt=False, split_head=False, lean=False)
    assert_same(result(PairScorer(model, **switches), (1, 0)), result(plain, None))


def test_dropout_is_drawn_once() -> None:
    # With dropout, the loss at weights moved along the gradient must change as the gradient says.
    model = trained_model("llama", "lora", dropout=0.5)
    scorer = PairScorer(model)
    walk = find_walk(scorer, segment_layers=1, kept_layers=0)
    assert walk is not None
    model.train()

    def share(states: States) -> tuple[mx.array, None]:
        return pair_logps(scorer, BATCH, states=states).chosen.sum(), None

    def loss() -> float:
        mx.random.seed(3)
        return float(walk.value_and_grad(BATCH, share)[0][0])

    mx.random.seed(3)
    _, gradients = walk.value_and_grad(BATCH, share)
    assert loss() == loss()
    for name in ("model.layers.0.self_attn.q_proj.lora_b", "model.layers.1.mlp.down_proj.lora_b"):
        start = dict(tree_flatten(model.trainable_parameters()))[name]
        direction = gradients[name] / mx.sqrt(gradients[name].square().sum())
        values = []
        for step in (0.01, -0.01):
            model.load_weights([(name, start + step * direction)], strict=False)
            values.append(loss())
        model.load_weights([(name, start)], strict=False)
        slope = float((gradients[name] * direction).sum())
        assert (values[0] - values[1]) / 0.02 == pytest.approx(slope, rel=2e-2)


def test_no_kernel_without_a_gradient_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # In evaluation mode Qwen3.5 runs a kernel on Metal that cannot be differentiated.
    kernels: list[bool] = []

    def spy(*arguments: Any, use_kernel: bool, **rest: Any) -> Any:
        kernels.append(use_kernel)
        return model_gated_delta_update(*arguments, use_kernel=use_kernel, **rest)

    monkeypatch.setattr("mlx_lm.models.qwen3_5.gated_delta_update", spy)
    model = trained_model("qwen3_5", "lora")
    assert not model.training
    assert find_walk(PairScorer(model), segment_layers=1, kept_layers=0) is not None
    assert set(kernels) == {False}
    assert not model.training


def test_a_layer_is_of_its_own_class_to_those_who_ask() -> None:
    (first, *_), kind = make_model("llama")["model"].layers, TransformerBlock
    assert isinstance(first, kind)
    assert isinstance(segments_module._StandIn(first, True, None), kind)


def test_models_that_cannot_be_walked_have_no_walk() -> None:
    class Summed(nn.Module):
        """Layers whose output depends on a state beside the one that is passed on."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.embed_tokens, self.layers, self.norm = model.embed_tokens, model.layers, model.norm

        def __call__(self, ids: mx.array, cache: Any = None, embeddings: Any = None) -> mx.array:
            states = self.embed_tokens(ids)
            total = states
            for layer, one in zip(self.layers, cache or [None] * len(self.layers), strict=True):
                states = layer(states, "causal", one)
                total = total + states
            normed: mx.array = self.norm(total)
            return normed

    model = trained_model("llama", "lora")
    model.model = Summed(model.model)
    scorer = PairScorer(model)
    assert scorer.splits_head
    assert find_walk(scorer, segment_layers=1, kept_layers=0) is None
    hidden = PairScorer(make_model("mamba"), split_head=False)
    assert find_walk(hidden, segment_layers=1, kept_layers=0) is None
    # Its last layers take keys and values from earlier ones.
    shared = PairScorer(trained_model("gemma4_shared", "lora"))
    assert shared.splits_head
    assert find_walk(shared, segment_layers=1, kept_layers=0) is None
