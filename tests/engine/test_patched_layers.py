"""What stands in for mlx-lm's functions, and that it stands there only as long as it should."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import activations
from mlx_lm.models import llama as llama_module
from mlx_lm.models import qwen3_5 as qwen_module
from mlx_lm.tuner.lora import LoRALinear

from orpo_mlx.engine import patched_layers as lean
from orpo_mlx.engine.attention import model_attention
from orpo_mlx.engine.gated_delta import gated_delta_update, model_gated_delta_update
from orpo_mlx.engine.patched_layers import lean_agrees, lean_layers, lora_linear, swiglu
from orpo_mlx.models.adapters import add_adapters
from tests.conftest import make_model


def test_swiglu_against_float64() -> None:
    rng = np.random.default_rng(0)
    gate, up, cotangent = (3 * rng.standard_normal((4, 7)) for _ in range(3))
    arrays = [mx.array(each.astype(np.float32)) for each in (gate, up, cotangent)]
    (value,), (grad_gate, grad_up) = mx.vjp(swiglu, arrays[:2], arrays[2:])
    share = 1 / (1 + np.exp(-gate))
    np.testing.assert_allclose(np.array(value), gate * share * up, rtol=1e-4, atol=1e-6)
    slope = cotangent * up * (share + gate * share * (1 - share))
    np.testing.assert_allclose(np.array(grad_gate), slope, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(grad_up), cotangent * gate * share, rtol=1e-4, atol=1e-5)


def adapted(base: Any, *, dropout: float = 0.0) -> Any:
    """A LoRA layer over a frozen one, with a B that is not zero."""
    base.freeze()
    layer = LoRALinear.from_base(base, r=4, scale=3.0, dropout=dropout)
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [None, 8])
def test_lora_against_float64(bias: bool, bits: int | None) -> None:
    mx.random.seed(0)
    base: Any = nn.Linear(64, 32, bias=bias)
    weight = base.weight
    if bits is not None:
        base = nn.QuantizedLinear.from_linear(base, group_size=32, bits=bits)
        weight = mx.dequantize(base.weight, base.scales, base.biases, group_size=32, bits=bits)
    layer, x, cotangent = adapted(base), mx.random.normal((2, 5, 64)), mx.random.normal((2, 5, 32))

    def run(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        layer.lora_a, layer.lora_b = a, b
        return lora_linear(layer, x)

    primals = [x, layer.lora_a, layer.lora_b]
    (value,), gradients = mx.vjp(run, primals, [cotangent])
    rows, a, b = (np.array(each, np.float64) for each in primals)
    w, slopes = np.array(weight, np.float64), np.array(cotangent, np.float64)
    added = np.array(base.bias, np.float64) if bias else 0.0
    expected = [
        rows @ w.T + added + 3.0 * rows @ a @ b,
        slopes @ w + 3.0 * slopes @ b.T @ a.T,
        3.0 * np.einsum("nli,nlr->ir", rows, slopes @ b.T),
        3.0 * np.einsum("nlr,nlo->ro", rows @ a, slopes),
    ]
    for found, wanted in zip([value, *gradients], expected, strict=True):
        np.testing.assert_allclose(np.array(found), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("why", ["dropout", "dtype", "trained base"])
def test_lora_is_mlx_lms_own_where_sums_cannot_be_joined(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = adapted(nn.Linear(8, 8), dropout=0.5 if why == "dropout" else 0.0)
    x = mx.random.normal((2, 8)).astype(mx.bfloat16 if why == "dtype" else mx.float32)
    if why == "trained base":
        layer.linear.unfreeze()
    calls: list[Any] = []
    monkeypatch.setattr(lean, "model_lora_linear", lambda layer, _: calls.append(layer))
    lora_linear(layer, x)
    assert calls == [layer]
    layer.eval()
    lora_linear(layer, x)
    assert len(calls) == (1 if why == "dropout" else 2)


def test_functions_are_exchanged_within_the_block_only() -> None:
    llama: Any = llama_module
    own = LoRALinear.__call__

    def fail_inside() -> None:
        with lean_layers(make_model()):
            assert llama.swiglu is swiglu
            assert LoRALinear.__call__ is lora_linear
            assert mx.fast.scaled_dot_product_attention is not model_attention
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert llama.swiglu is activations.swiglu
    qwen: Any = qwen_module
    with lean_layers(make_model("qwen3_5")):
        assert qwen.gated_delta_update is gated_delta_update
    assert qwen.gated_delta_update is model_gated_delta_update
    assert mx.fast.scaled_dot_product_attention is model_attention
    assert LoRALinear.__call__ is own


def deep_half(kind: str) -> nn.Module:
    """A model of 12 layers in half precision, with rounding of its own in each."""
    model = make_model(kind)
    text = model.get("language_model", model)["model"]
    text.layers = [copy.deepcopy(layer) for _ in range(6) for layer in text.layers]
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen3_5"])
def test_functions_agree_one_by_one_where_whole_models_are_off_by_rounding(kind: str) -> None:
    model = deep_half(kind)
    ids = mx.array([[1, 2, 3, 4, 5, 6]])
    assert lean_agrees(model, lambda: model(ids))


@pytest.mark.parametrize("name", ["swiglu", "gated_delta_update", "attention", "lora_linear"])
def test_each_wrong_function_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen3_5")
    add_adapters(model, "lora", -1, {"rank": 2, "scale": 4.0, "dropout": 0.0})

    def off(ours: Any) -> Any:
        def wrong(*arguments: Any, **options: Any) -> Any:
            result = ours(*arguments, **options)
            return (result[0], 1.01 * result[1]) if isinstance(result, tuple) else 1.01 * result

        return wrong

    if name in lean._EXCHANGED:
        ours, theirs = lean._EXCHANGED[name]
        monkeypatch.setitem(lean._EXCHANGED, name, (off(ours), theirs))
    else:
        monkeypatch.setattr(lean, name, off(getattr(lean, name)))
    ids = mx.array([[1, 2, 3, 4, 5, 6]])
    assert not lean_agrees(model, lambda: model(ids))
