"""The exponential against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.engine.fast_exp import exp, on_cpu, sigmoid


def test_exp_is_exact_to_1e5_relative() -> None:
    x = np.concatenate([np.linspace(-87, 87, 100_001), np.linspace(-1, 1, 1001), [0.0, -1e-30]]).astype(np.float32)
    np.testing.assert_allclose(np.array(exp(mx.array(x)), np.float64), np.exp(x.astype(np.float64)), rtol=1e-5)
    assert float(exp(mx.array(0.0))) == 1.0


def test_far_below_zero_is_nothing_and_nothing_is_not_a_number() -> None:
    assert (np.array(exp(mx.array([-88.0, -1e4, -1e9, -np.inf]))) < 2e-38).all()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_keeps_its_type(dtype: mx.Dtype) -> None:
    x = mx.array([-3.0, 0.0, 2.0]).astype(dtype)
    assert exp(x).dtype == dtype
    np.testing.assert_allclose(np.array(exp(x).astype(mx.float32)), np.exp([-3, 0, 2]), rtol=1e-2)


def test_sigmoid_far_out_and_near() -> None:
    x = np.array([-1e4, -90, -20, -1, 0, 1, 20, 90, 1e4])
    expected = [0, 0, *(1 / (1 + np.exp(-x[2:7]))), 1, 1]
    np.testing.assert_allclose(np.array(sigmoid(mx.array(x.astype(np.float32)))), expected, rtol=1e-5, atol=1e-37)


def test_other_devices_use_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert not on_cpu()
    assert float(exp(mx.array(1.0))) == float(mx.exp(mx.array(1.0)))
