"""Which outputs are kept, and that those which are stand for what was computed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.lora import LoRALinear

from orpo_mlx.engine.functions.patched_layers import lora_linear
from orpo_mlx.engine.kept_outputs import keeping, output, taking


def test_narrow_outputs_are_kept_but_for_the_last() -> None:
    x, wide, narrow, last = mx.ones((1, 8)), mx.ones((1, 8)), mx.ones((1, 4)), mx.ones((1, 2))
    calls = [wide, narrow, last]
    kept: list[list[mx.array]] = []
    with keeping(kept, 0.5):
        assert all(output(x, lambda y=y: y) is y for y in calls)  # type: ignore[misc]
    (own,) = kept
    assert len(own) == 1
    assert own[0] is narrow
    with taking([mx.zeros((1, 4))], 0.5):
        taken = [output(x, lambda y=y: y) for y in calls]  # type: ignore[misc]
    assert [float(y.sum()) for y in taken] == [8, 0, 2]
    with pytest.raises(ZeroDivisionError), keeping(kept, 0.5):
        output(x, lambda: mx.array(1 // 0))
    assert output(x, lambda: narrow) is narrow
    assert len(kept) == 1


def test_a_layer_with_a_kept_output_has_the_same_gradients() -> None:
    mx.random.seed(0)
    base = nn.Linear(8, 4)
    base.freeze()
    layer: Any = LoRALinear.from_base(base, r=2)
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    x, cotangent = mx.random.normal((3, 8)), mx.random.normal((3, 4))

    def run(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        layer.lora_a, layer.lora_b = a, b
        # Its gradient needs its argument.
        return lora_linear(layer, x).square()

    primals = [x, layer.lora_a, layer.lora_b]
    kept: list[list[mx.array]] = []
    with keeping(kept, 1.0):
        lora_linear(layer, x)
        lora_linear(layer, x)
    expected = mx.vjp(run, primals, [cotangent])[1]
    with taking(kept[0], 1.0):
        found = mx.vjp(run, primals, [cotangent])[1]
    with taking([2 * kept[0][0]], 1.0):
        other = mx.vjp(run, primals, [cotangent])[1]
    assert all(mx.array_equal(one, two).item() for one, two in zip(found, expected, strict=True))
    assert not any(mx.array_equal(one, two).item() for one, two in zip(other, expected, strict=True))
