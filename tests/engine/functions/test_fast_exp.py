"""The exponential against float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.engine.functions.fast_exp import exp, sigmoid


def test_exp_is_exact_to_1e5_relative() -> None:
    x = np.concatenate([np.linspace(-87, 87, 100_001), np.linspace(-1, 1, 1001), [0.0, -1e-30]]).astype(np.float32)
    np.testing.assert_allclose(
        np.array(exp(mx.array(x), polynomial=True), np.float64), np.exp(x.astype(np.float64)), rtol=1e-5
    )
    assert exp(mx.array(0.0), polynomial=True).item() == 1.0


def test_far_below_zero_is_nothing_and_nothing_is_not_a_number() -> None:
    assert (np.array(exp(mx.array([-88.0, -1e4, -1e9, -np.inf]), polynomial=True)) < 2e-38).all()


@pytest.mark.parametrize("function", [exp, sigmoid])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_rounded_once(dtype: mx.Dtype, function: Any) -> None:
    x = mx.linspace(-5, 5, 1001).astype(dtype)
    found, exact = function(x, polynomial=True), function(x.astype(mx.float32), polynomial=False)
    assert found.dtype == dtype
    np.testing.assert_array_max_ulp(
        np.array(found.astype(mx.float32)), np.array(exact.astype(dtype).astype(mx.float32)), 2**16
    )


def test_sigmoid_far_out_and_near() -> None:
    x = np.array([-1e4, -90, -20, -1, 0, 1, 20, 90, 1e4])
    expected = [0, 0, *(1 / (1 + np.exp(-x[2:7]))), 1, 1]
    np.testing.assert_allclose(
        np.array(sigmoid(mx.array(x.astype(np.float32)), polynomial=True)), expected, rtol=1e-5, atol=1e-37
    )


def test_other_devices_use_their_own() -> None:
    x = mx.linspace(-100, 100, 11)
    np.testing.assert_array_equal(np.array(exp(x, polynomial=False)), np.array(mx.exp(x)))
    np.testing.assert_array_equal(np.array(sigmoid(x, polynomial=False)), np.array(mx.sigmoid(x)))
