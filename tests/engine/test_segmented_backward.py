"""The backward pass in segments gives the plain forward's loss and gradients."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.llama import TransformerBlock

from orpo_mlx.device_profile import CPU, GPU, DeviceProfile
from orpo_mlx.engine.functions.gated_delta import model_gated_delta_update
from orpo_mlx.engine.layer_calls import RecordingLayer, layer_kind
from orpo_mlx.engine.pair_scorer import PairScorer, pair_logps
from orpo_mlx.engine.segmented_backward import (
    SegmentedBackward,
    Share,
    find_segmented,
    whole_value_and_grad,
)
from orpo_mlx.models.adapters import add_adapters
from orpo_mlx.types import Batch
from tests.conftest import CONFIGS, PROVABLE, make_model, make_pairs, quantise

SHORT = make_pairs(4)
# Prompts that a GPU's layout shares in part.
LONG = [pair._replace(prompt_ids=tuple(range(1, 40)) + pair.prompt_ids) for pair in make_pairs(2, seed=3)]
PLAIN: dict[str, Any] = {"share_prompt": False, "split_head": False, "lean": False}
Result = tuple[float, dict[str, Any]]


@pytest.fixture(params=[CPU, GPU], ids=["cpu", "gpu"])
def profile(request: pytest.FixtureRequest) -> DeviceProfile:
    chosen: DeviceProfile = request.param
    return chosen


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


def share_of(scorer: PairScorer) -> Share:
    """A loss that weighs each side of each pair differently."""

    def share(states: mx.array, batch: Batch, _: Any) -> tuple[mx.array, mx.array]:
        logps = pair_logps(scorer, batch, nll_tokens_per_pair=7.0, states=states)
        weights = mx.arange(1, logps.chosen.size + 1)
        loss = (logps.nll * weights).sum() + (logps.rejected * weights).sum() - logps.chosen.square().sum() / 50
        return loss, weights

    return share


def segmented_of(scorer: PairScorer, layers: int = 1, kept: int = 0) -> SegmentedBackward:
    segmented, why_not = find_segmented(scorer, segment_layers=layers, kept_layers=kept)
    assert segmented is not None, why_not
    return segmented


def assert_same(model: nn.Module, scorer: PairScorer, segments: tuple[int, int]) -> None:
    """Loss and gradients of several batches in segments of so many layers, so many kept, are the plain forward's."""
    plain = PairScorer(model, **PLAIN)
    segmented = segmented_of(scorer, *segments)
    share, plain_share = share_of(scorer), share_of(plain)
    # The first batch twice: what was compiled for it is then used again.
    for pairs in (SHORT, LONG, SHORT):
        batch, whole = (each.collate(pairs, with_prompt=True) for each in (scorer, plain))
        (found, _), gradients = segmented.value_and_grad(batch, (), share)
        (expected, _), expected_gradients = whole_value_and_grad(plain, whole, (), plain_share)
        assert float(found) == pytest.approx(float(expected), rel=1e-5, abs=1e-4)
        assert gradients.keys() == expected_gradients.keys()
        for name, array in expected_gradients.items():
            largest = float(mx.abs(array).max())
            assert largest > 0, name
            np.testing.assert_allclose(np.array(gradients[name]), array, rtol=0, atol=1e-4 * largest, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "segments"),
    [
        *((kind, (1, 0)) for kind in PROVABLE if kind != "gemma4_shared"),
        *((kind, segments) for kind in ("llama", "gemma3", "qwen3_5") for segments in ((1, 1), (5, 0))),
    ],
)
def test_segments_change_nothing(kind: str, segments: tuple[int, int], profile: DeviceProfile) -> None:
    model = trained_model(kind, "lora")
    before = dict(tree_flatten(model.trainable_parameters()))
    assert_same(model, PairScorer(model, profile=profile), segments)
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
def test_whatever_is_trained(how: dict[str, Any], switches: dict[str, bool], profile: DeviceProfile) -> None:
    model = trained_model("llama", **how)
    assert_same(model, PairScorer(model, profile=profile, **switches), (1, 0))


def test_each_kind_of_layer_is_compiled_once() -> None:
    model = trained_model("llama", "lora")
    assert len({layer_kind(layer) for layer in model.layers}) == 1
    scorer = PairScorer(model, profile=GPU)
    segmented = segmented_of(scorer)
    for pairs in (LONG, LONG):
        segmented.value_and_grad(scorer.collate(pairs), (), _chosen_sum(scorer))
    traced = {key[:2]: function.traced for key, function in segmented._functions.items()}
    # Both layers go forward by one trace; the first one's backward pass gives no gradient to what enters it.
    assert sorted(key[0] for key in traced) == ["backward", "backward", "forward", "last"]
    # Each with its own share, which is another function in each call.
    assert all(count == 1 for key, count in traced.items() if key[0] != "last")


def test_layers_that_differ_in_anything_their_code_may_read_are_of_other_kinds() -> None:
    kinds = [layer_kind(layer) for layer in trained_model("sliding", "lora").layers]
    assert kinds[0] != kinds[1]
    gemma = trained_model("gemma3", "lora")
    assert len({layer_kind(layer) for layer in gemma.layers}) == 2
    first, second = trained_model("llama", "lora").layers
    second.self_attn.rope.base = 7.0
    assert layer_kind(first) != layer_kind(second)


def test_dropout_is_drawn_once(profile: DeviceProfile) -> None:
    # With dropout, the loss at weights moved along the gradient must change as the gradient says.
    model = trained_model("llama", "lora", dropout=0.5)
    scorer = PairScorer(model, profile=profile)
    segmented = segmented_of(scorer)
    batch, share = scorer.collate(SHORT), _chosen_sum(scorer)
    model.train()

    def loss() -> float:
        mx.random.seed(3)
        return float(segmented.value_and_grad(batch, (), share)[0][0])

    mx.random.seed(3)
    _, gradients = segmented.value_and_grad(batch, (), share)
    assert loss() == loss()
    for name in ("model.layers.0.self_attn.q_proj.lora_b", "model.layers.1.mlp.down_proj.lora_b"):
        start = dict(tree_flatten(model.trainable_parameters()))[name]
        direction = gradients[name] / mx.sqrt(gradients[name].square().sum())
        values = []
        for step in (0.002, -0.002):
            model.load_weights([(name, start + step * direction)], strict=False)
            values.append(loss())
        model.load_weights([(name, start)], strict=False)
        slope = float((gradients[name] * direction).sum())
        assert (values[0] - values[1]) / 0.004 == pytest.approx(slope, rel=1e-2)


def _chosen_sum(scorer: PairScorer) -> Share:
    return lambda states, batch, _: (pair_logps(scorer, batch, states=states).chosen.sum(), mx.array(0))


def test_segments_that_are_given_to_a_device_together_do_not_live_together(monkeypatch: pytest.MonkeyPatch) -> None:
    # Per layer there is what stays between segments, not what a segment makes.
    pair = make_pairs(1, longest=3)[0]._replace(prompt_ids=tuple(range(1, 70)), chosen_ids=tuple(range(1, 120)))
    growth = []
    for run in ("segmented", "whole"):
        peaks = []
        for layers in (6, 12):
            monkeypatch.setitem(CONFIGS["llama"], "num_hidden_layers", layers)
            scorer = PairScorer(trained_model("llama", "lora"), profile=GPU)
            segmented, batch, share = segmented_of(scorer), scorer.collate([pair]), _chosen_sum(scorer)
            for _ in range(2):  # Once to be compiled.
                mx.reset_peak_memory()
                before = mx.get_active_memory()
                if run == "segmented":
                    mx.eval(segmented.value_and_grad(batch, (), share))
                else:
                    mx.eval(whole_value_and_grad(scorer, batch, (), share))
            peaks.append(mx.get_peak_memory() - before)
        growth.append(peaks[1] - peaks[0])
    assert growth[0] < 0.2 * growth[1]


def test_no_kernel_without_a_gradient_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # In evaluation mode Qwen3.5 runs a kernel on Metal that cannot be differentiated.
    kernels: list[bool] = []

    def spy(*arguments: Any, use_kernel: bool, **rest: Any) -> Any:
        kernels.append(use_kernel)
        return model_gated_delta_update(*arguments, use_kernel=use_kernel, **rest)

    monkeypatch.setattr("mlx_lm.models.qwen3_5.gated_delta_update", spy)
    model = trained_model("qwen3_5", "lora")
    assert not model.training
    segmented_of(PairScorer(model))
    assert set(kernels) == {False}
    assert not model.training


def test_a_layer_is_of_its_own_class_to_those_who_ask() -> None:
    (first, *_), kind = make_model("llama")["model"].layers, TransformerBlock
    assert isinstance(first, kind)
    assert isinstance(RecordingLayer(first, None), kind)


def test_models_that_cannot_be_run_in_segments_say_why() -> None:
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
    assert find_segmented(scorer, segment_layers=1, kept_layers=0) == (
        None,
        "its states or gradients differ from those of the whole graph",
    )
    hidden = PairScorer(make_model("mamba"), split_head=False)
    assert find_segmented(hidden, segment_layers=1, kept_layers=0) == (
        None,
        "its head cannot be told apart from its body",
    )
    # Its last layers take keys and values from earlier ones.
    shared = PairScorer(trained_model("gemma4_shared", "lora"))
    assert shared.splits_head
    assert find_segmented(shared, segment_layers=1, kept_layers=0)[0] is None
