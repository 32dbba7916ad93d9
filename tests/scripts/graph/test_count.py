"""Steps whose graphs, evaluations and waits are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from scripts.graph.count import Cost, arrays_in, counting
from scripts.graph.walker import zeros


def names(cost: Cost) -> dict[str, int]:
    """How often each primitive was counted."""
    found: dict[str, int] = {}
    for node, times in cost.nodes.items():
        found[node.name] = found.get(node.name, 0) + times
    return found


@pytest.fixture
def x() -> mx.array:
    array = mx.random.normal((4, 8))
    mx.eval(array)
    return array


def test_what_compile_fuses_is_one_dispatch(x: mx.array) -> None:
    def step(x: mx.array) -> mx.array:
        return mx.exp(x * 2.0 + 1.0) * mx.sin(x)

    with counting() as eager:
        eager.add(step(x))
    with counting() as compiled:
        compiled.add(mx.compile(step)(x))
    assert eager.dispatches == 5
    assert names(compiled) == {"Compiled": 1}
    assert (compiled.dispatches, compiled.launches) == (1, 1)


def test_views_and_depends_launch_nothing(x: mx.array) -> None:
    with counting() as cost:
        cost.add(mx.depends([x.reshape(8, 4).T[1:]], [mx.stop_gradient(x[None])])[0])
    assert cost.nodes.total() == 6
    assert cost.dispatches == cost.launches == 0


def test_a_custom_gradient_is_what_was_written(x: mx.array) -> None:
    cube: Any = mx.custom_function(lambda x: x * x * x)
    cube.vjp(lambda x, cotangent, output: mx.tan(x) * cotangent)

    with counting() as cost:
        cost.add(mx.grad(lambda x: cube(x).sum())(x))
    assert names(cost)["Tan"] == 1
    assert cost.dispatches == 2


def test_a_checkpoint_computes_again(x: mx.array) -> None:
    def layer(x: mx.array) -> mx.array:
        return mx.sin(mx.exp(x))

    def step(function: Any) -> Cost:
        with counting() as cost:
            cost.add(mx.value_and_grad(lambda x: function(x).sum())(x))
        return cost

    kept, again = step(layer), step(mx.checkpoint(layer))
    assert names(kept)["Exp"] == 1
    assert names(again)["Exp"] == 2
    assert again.dispatches == kept.dispatches + 1  # The gradient needs exp(x) again, and not its sine.


@pytest.mark.parametrize("evaluate", [False, True])
def test_evaluations_within_a_step(x: mx.array, evaluate: bool) -> None:
    with counting(evaluate=evaluate) as cost:
        middle = mx.exp(x)
        mx.eval({"kept": [middle]}, 3, None)
        mx.eval(middle)
        end = mx.sin(middle)
        mx.async_eval(end)
        mx.eval(end)
    assert names(cost) == {"Exp": 1, "Sin": 1}
    assert (cost.evals, cost.async_evals, cost.host_waits) == (2, 1, 0)


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize(
    "read",
    [
        lambda array: array.item(),
        lambda array: array.tolist(),
        lambda array: np.array(array),
        lambda array: np.asarray(array, np.float64),
        float,
        int,
        bool,
        str,
    ],
)
def test_reading_waits_once(x: mx.array, read: Callable[[mx.array], object], evaluate: bool) -> None:
    with counting(evaluate=evaluate) as cost:
        total = x.sum()
        read(total)
        read(total)
        read(x[0, 0] if evaluate else mx.array(3.0))
    assert (cost.evals, cost.host_waits) == ((2, 2) if evaluate else (1, 1))
    assert names(cost)["Sum"] == 1


def test_reading_what_runs_waits(x: mx.array) -> None:
    with counting() as cost:
        end = mx.exp(x)
        mx.async_eval(end)
        np.array(end)
        mx.synchronize()
        mx.async_eval(mx.sin(x))
        mx.synchronize()
    assert (cost.evals, cost.async_evals, cost.host_waits, cost.stops) == (2, 2, 2, 2)


def test_unread_numbers_are_zeros_and_true(x: mx.array) -> None:
    with counting():
        assert mx.exp(x).tolist() == [[0.0] * 8] * 4
        assert mx.isfinite(x * 2).all().item() is True
        assert np.array((x * 2).astype(mx.bfloat16), dtype=np.float64).dtype == np.float64
        assert float(x[0, 0].astype(mx.float16)) == 0.0
        assert x.tolist() == np.array(x).tolist() != [[0.0] * 8] * 4


def test_evaluating_gives_the_numbers_and_the_same_counts(x: mx.array) -> None:
    def step() -> float:
        hidden = mx.exp(x)
        mx.eval(hidden)
        return float((hidden @ hidden.T).sum())

    expected = step()
    with counting(evaluate=True) as evaluated:
        assert step() == expected
    with counting() as counted:
        step()
    assert evaluated.nodes == counted.nodes
    assert (evaluated.evals, evaluated.host_waits) == (counted.evals, counted.host_waits) == (2, 1)


def test_nothing_is_computed() -> None:
    large = zeros((1 << 17, 1 << 17), mx.float32)
    before = mx.get_active_memory()
    with counting() as cost:
        total = (large @ large).sum()
        mx.eval(total)
    assert names(cost) == {"Matmul": 1, "Sum": 1, "Squeeze": 1}
    assert mx.get_active_memory() - before < 1 << 20


def test_everything_is_put_back_after_an_error() -> None:
    def state() -> list[object]:
        reads = [getattr(mx.array, name) for name in ("item", "tolist", "__float__", "__format__")]
        return [mx.eval, mx.async_eval, mx.vjp, mx.grad, mx.fast.rope, mx.default_device, np.array, *reads]

    before = state()

    def fail() -> None:
        with counting():
            assert state() != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert state() == before
    assert float(mx.array(2.0) * 3) == 6.0
    assert f"{mx.array(2):d}" == "2"


def test_time_without_counting(x: mx.array) -> None:
    with counting(walk=False) as cost:
        for _ in range(300):
            x = x + 1.0
        cost.add(x)
    assert cost.nodes.total() == 0
    assert 0 < cost.build_seconds < 1


def test_arrays_of_trees() -> None:
    one = mx.array(1)
    assert len(arrays_in([{"a": one, "b": (one, None)}, "text", [one]])) == 3
