"""What stands in for mlx-lm's functions, and that it stands there only as long as it should."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import activations
from mlx_lm.models import llama as llama_module

from orpo_mlx.attention import model_attention
from orpo_mlx.lean import lean_layers, swiglu
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


def test_functions_are_exchanged_within_the_block_only() -> None:
    llama: Any = llama_module

    def fail_inside() -> None:
        with lean_layers(make_model()):
            assert llama.swiglu is swiglu
            assert mx.fast.scaled_dot_product_attention is not model_attention
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert llama.swiglu is activations.swiglu
    assert mx.fast.scaled_dot_product_attention is model_attention
