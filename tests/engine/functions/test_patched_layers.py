"""What stands in for mlx-lm's functions, and that it stands there only as long as it should."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import activations
from mlx_lm.models import llama as llama_module
from mlx_lm.models import qwen3_5 as qwen_module
from mlx_lm.tuner.lora import LoRALinear

from orpo_mlx.device_profile import CPU, GPU, VARIABLE, DeviceProfile, device_profile
from orpo_mlx.engine.equivalence import relative_error
from orpo_mlx.engine.functions import patched_layers as module
from orpo_mlx.engine.functions.attention import guarded_attention, model_attention
from orpo_mlx.engine.functions.gated_delta import model_gated_delta_update
from orpo_mlx.engine.functions.patched_layers import (
    ATTENTION,
    GATED_DELTA,
    LORA,
    SWIGLU,
    exchanges,
    joins_lora,
    lora_linear,
    model_lora_linear,
    patched_layers,
    swiglu,
)
from orpo_mlx.models.adapters import add_adapters
from tests.conftest import make_model, quantise
from tests.helpers.metal_attention import NoLogSumExpError, raise_as_metal_does

ALL = (ATTENTION, SWIGLU, LORA, GATED_DELTA)
PROFILES = pytest.mark.parametrize("profile", [CPU, GPU], ids=["cpu", "gpu"])


@pytest.mark.parametrize("polynomial", [True, False])
def test_swiglu_against_float64(polynomial: bool) -> None:
    rng = np.random.default_rng(0)
    gate, up, cotangent = (3 * rng.standard_normal((4, 7)) for _ in range(3))
    arrays = [mx.array(each.astype(np.float32)) for each in (gate, up, cotangent)]
    (value,), (grad_gate, grad_up) = mx.vjp(partial(swiglu, polynomial_exp=polynomial), arrays[:2], arrays[2:])
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


def half_lora(dtype: mx.Dtype, bits: int | None) -> tuple[Any, list[mx.array], mx.array]:
    """A layer in half precision with float32 masters of A and B, what it is called with, and a cotangent."""
    mx.random.seed(0)
    base: Any = nn.Linear(64, 32, bias=True)
    base.set_dtype(dtype)
    if bits is not None:
        base = nn.QuantizedLinear.from_linear(base, group_size=32, bits=bits)
    layer = adapted(base)
    x, cotangent = mx.random.normal((2, 40, 64)).astype(dtype), mx.random.normal((2, 40, 32)).astype(dtype)
    return layer, [x, layer.lora_a, layer.lora_b], cotangent


def lora_value_and_gradients(function: Any, layer: Any, primals: list[mx.array], cotangent: mx.array) -> list[mx.array]:
    def run(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        layer.lora_a, layer.lora_b = a, b
        result: mx.array = function(layer, x)
        return result

    outputs, gradients = mx.vjp(run, primals, [cotangent])
    layer.lora_a, layer.lora_b = primals[1:]
    return [*outputs, *gradients]


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_lora_in_half_precision_is_off_by_its_rounding(dtype: mx.Dtype, bits: int | None) -> None:
    layer, primals, cotangent = half_lora(dtype, bits)
    assert joins_lora(layer, primals[0], GPU)
    wide = [each.astype(mx.float32) for each in primals]
    exact = lora_value_and_gradients(model_lora_linear, layer, wide, cotangent.astype(mx.float32))
    theirs = lora_value_and_gradients(model_lora_linear, layer, primals, cotangent)
    found = lora_value_and_gradients(exchanges(GPU)[LORA].ours, layer, primals, cotangent)
    # The gradients of A and B are the masters' own: float32.
    assert [each.dtype for each in found] == [each.dtype for each in theirs] == [dtype, dtype, mx.float32, mx.float32]
    last_place = 2.0**-8 if dtype == mx.bfloat16 else 2.0**-10
    for own, true in zip(found, exact, strict=True):
        assert float(np.array(relative_error(own, true))) < last_place


def test_small_gradients_of_lora_are_not_lost_in_float16() -> None:
    layer, primals, cotangent = half_lora(mx.float16, None)
    small = cotangent * 2.0**-10
    _, _, *large = lora_value_and_gradients(lora_linear, layer, primals, cotangent)
    _, _, *found = lora_value_and_gradients(lora_linear, layer, primals, small)
    for one, other in zip(found, large, strict=True):
        assert float(np.array(relative_error(one * 2.0**10, other))) < 2e-3


@pytest.mark.parametrize("bits", [None, 4])
def test_lora_can_be_traced(bits: int | None) -> None:
    layer, primals, cotangent = half_lora(mx.bfloat16, bits)
    run = partial(lora_value_and_gradients, lora_linear, layer)
    found = mx.compile(lambda *arrays: run(list(arrays[:3]), arrays[3]))(*primals, cotangent)
    layer.lora_a, layer.lora_b = primals[1:]
    for one, other in zip(found, run(primals, cotangent), strict=True):
        assert float(np.array(relative_error(one, other))) < 1e-2


@pytest.mark.parametrize("why", ["dropout", "dtype", "masters", "trained base"])
def test_lora_is_mlx_lms_own_where_sums_cannot_be_joined(why: str) -> None:
    layer = adapted(nn.Linear(8, 8), dropout=0.5 if why == "dropout" else 0.0)
    x = mx.random.normal((2, 8)).astype(mx.bfloat16 if why == "dtype" else mx.float32)
    if why == "trained base":
        layer.linear.unfreeze()
    if why == "masters":
        layer.lora_a = layer.lora_a.astype(mx.bfloat16)
    assert not joins_lora(layer, x, CPU)
    # A device that multiplies half precision as fast takes it.
    assert joins_lora(layer, x, GPU) == (why == "dtype")
    layer.eval()
    assert joins_lora(layer, x, CPU) == (why == "dropout")


def test_functions_are_exchanged_within_the_block_only() -> None:
    llama: Any = llama_module
    qwen: Any = qwen_module
    own = LoRALinear.__call__

    def fail_inside() -> None:
        with patched_layers(make_model(), ALL, CPU):
            assert llama.swiglu is not activations.swiglu
            assert LoRALinear.__call__ is not own
            assert mx.fast.scaled_dot_product_attention is not model_attention
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    with patched_layers(make_model("qwen3_5"), ALL, CPU):
        assert qwen.gated_delta_update is not model_gated_delta_update
    assert qwen.gated_delta_update is model_gated_delta_update
    assert llama.swiglu is activations.swiglu
    assert mx.fast.scaled_dot_product_attention is model_attention
    assert LoRALinear.__call__ is own


@pytest.mark.parametrize("enabled", [(), *([name] for name in ALL)], ids=str)
def test_each_function_is_exchanged_by_itself(enabled: list[str]) -> None:
    llama: Any = llama_module
    qwen: Any = qwen_module
    own = LoRALinear.__call__
    with patched_layers(make_model(), enabled, CPU), patched_layers(make_model("qwen3_5"), enabled, CPU):
        exchanged = {
            # Kept clear of what has no gradient in any case.
            ATTENTION: mx.fast.scaled_dot_product_attention is not guarded_attention,
            SWIGLU: llama.swiglu is not activations.swiglu,
            LORA: LoRALinear.__call__ is not own,
            GATED_DELTA: qwen.gated_delta_update is not model_gated_delta_update,
        }
        assert mx.fast.scaled_dot_product_attention is not model_attention
    assert [name for name, different in exchanged.items() if different] == list(enabled)


def adapted_model(kind: str, *, quantised: bool = False, **config: Any) -> nn.Module:
    model = make_model(kind)
    if quantised:
        quantise(model)
    add_adapters(model, "lora", -1, {"rank": 2, "scale": 4.0, "dropout": 0.0})
    parameters: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    keys = mx.random.split(mx.random.key(1), len(parameters))
    drawn = [
        (name, 0.3 * mx.random.normal(each.shape, key=keys[number]))
        for number, (name, each) in enumerate(parameters.items())
    ]
    model.load_weights(drawn, strict=False)
    model.train()
    return model


def gradients(model: nn.Module, ids: mx.array, enabled: Any, profile: DeviceProfile) -> dict[str, mx.array]:
    weights = mx.random.normal((*ids.shape, 1), key=mx.random.key(0))

    def loss() -> mx.array:
        with patched_layers(model, enabled, profile):
            logits: mx.array = model(ids)
        return (mx.logsumexp(logits, axis=-1, keepdims=True) * weights + logits.square().mean()).sum()

    value, found = nn.value_and_grad(model, loss)()
    return {"value": value, **dict(tree_flatten(found))}


def largest_gap(found: dict[str, mx.array], expected: dict[str, mx.array]) -> float:
    return max(float(np.array(relative_error(found[name], expected[name]))) for name in expected)


@pytest.mark.parametrize("kind", ["llama", "sliding", "gemma2", "qwen3_5"])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_model_has_the_same_gradients_on_either_profile(
    kind: str, quantised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted_model(kind, quantised=quantised)
    ids = mx.random.randint(1, 200, (2, 21), key=mx.random.key(2))
    plain = gradients(model, ids, (), CPU)
    for name in ("cpu", "gpu"):
        monkeypatch.setenv(VARIABLE, name)
        profile = device_profile()
        assert profile.name == name
        # Rounding: 2e-5 with OpenBLAS, 1.1e-4 with the BLAS that MLX's Linux wheel brings.
        assert largest_gap(gradients(model, ids, ALL, profile), plain) < 3e-4


WIDE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 200,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
}


@PROFILES
@pytest.mark.parametrize("enabled", [(), ALL], ids=["plain", "patched"])
def test_no_length_reaches_a_kernel_without_a_gradient(
    enabled: tuple[str, ...], profile: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama: Any = llama_module
    model = llama.Model(llama.ModelArgs.from_dict(WIDE))
    rows = [mx.arange(1, length + 1)[None] for length in range(1, 10)]
    expected = [gradients(model, ids, (), CPU) for ids in rows]
    mx.eval(expected)
    raise_as_metal_does(monkeypatch)
    for ids, wanted in zip(rows, expected, strict=True):
        assert largest_gap(gradients(model, ids, enabled, profile), wanted) < 1e-4
    monkeypatch.setattr(module, "guarded_attention", mx.fast.scaled_dot_product_attention)
    with pytest.raises(NoLogSumExpError):
        gradients(model, rows[0], (), profile)
