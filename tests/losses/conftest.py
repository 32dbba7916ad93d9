"""MLX's functions with the digits that float64 has."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import pytest

from orpo_mlx.losses.numerics import log_sigmoid


@pytest.fixture
def exact_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's exp and what is made of it are good to 7e-7 only, in float64 as well; its power is exact."""

    def exp(x: mx.array) -> mx.array:
        powers: mx.array = mx.power(mx.array(math.e, x.dtype), x)
        return powers

    def logsumexp(x: mx.array, axis: int) -> mx.array:
        largest: Any = mx.stop_gradient(x.max(axis=axis, keepdims=True))
        total: mx.array = mx.log(exp(x - largest).sum(axis=axis)) + largest.squeeze(axis)
        return total

    monkeypatch.setattr(mx, "exp", exp)
    monkeypatch.setattr(mx, "sigmoid", lambda x: exp(log_sigmoid(x)))
    monkeypatch.setattr(mx, "logsumexp", logsumexp)
