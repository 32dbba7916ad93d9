"""The activation the checkpoint names, on this model only."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
import pytest

from orpo_mlx.models.activations import match_activation
from orpo_mlx.models.adapters import add_adapters
from tests.conftest import make_model


def tanh_gelu(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def feed_forward(model: nn.Module, x: mx.array) -> npt.NDArray[np.float64]:
    return np.array(model.model.layers[0].mlp(x), np.float64)


def test_gemma_gets_the_tanh_approximation() -> None:
    model, untouched = make_model("gemma"), make_model("gemma")
    x = 3 * mx.random.normal((5, 32))
    before = feed_forward(untouched, x)
    assert match_activation(model, {"hidden_act": "gelu_pytorch_tanh"}) == ["MLP"]
    layer = model.model.layers[0].mlp
    gate, up, down = (np.array(part.weight, np.float64) for part in (layer.gate_proj, layer.up_proj, layer.down_proj))
    states = np.array(x, np.float64)
    expected = (tanh_gelu(states @ gate.T) * (states @ up.T)) @ down.T
    np.testing.assert_allclose(feed_forward(model, x), expected, rtol=1e-4, atol=1e-3)
    assert np.abs(before - expected).max() > 1e-3
    # Nothing is patched for other models of the same class.
    assert (feed_forward(untouched, x) == before).all()


def test_hidden_activation_goes_before_hidden_act() -> None:
    assert match_activation(make_model("gemma"), {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}) == [
        "MLP"
    ]


@pytest.mark.parametrize(
    ("kind", "activation"), [("gemma", "gelu"), ("gemma2", "gelu_pytorch_tanh"), ("llama", "silu"), ("llama", "gelu")]
)
def test_what_is_right_already_is_left_alone(kind: str, activation: str) -> None:
    assert match_activation(make_model(kind), {"hidden_act": activation}) == []


def test_adapters_go_on_top() -> None:
    model = make_model("gemma")
    match_activation(model, {"hidden_act": "gelu_pytorch_tanh"})
    ids = mx.array([[1, 2, 3]])
    before = model(ids)
    add_adapters(model, "lora", -1, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    np.testing.assert_allclose(np.array(model(ids)), np.array(before), rtol=1e-5, atol=1e-5)
