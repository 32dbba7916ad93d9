"""Seconds by hand, on a chip that does not exist."""

from __future__ import annotations

import mlx.core as mx
import pytest

from scripts.graph import cost_model
from scripts.graph.cost_model import (
    BANDWIDTH,
    CHIPS,
    EFFICIENCY,
    EVAL_WAIT,
    GAP,
    NODE_PASS,
    NODE_TAPE,
    Chip,
    Input,
    build_on_mac,
    build_unit,
    estimate,
    totals,
)
from scripts.graph.count import Cost, counting
from scripts.graph.walker import zeros

F32 = mx.float32


def given(value: float) -> Input:
    return Input(value, "made up")


CHIP = Chip(cores=given(10), teraflops=given(1.0), gigabytes=given(100.0), bfloat16=given(0.5), float16=given(2.0))


def product(m: int, n: int, k: int, dtype: mx.Dtype = F32, batch: int = 2) -> Cost:
    with counting() as cost:
        cost.add(zeros((batch, m, k), dtype) @ zeros((batch, k, n), dtype))
    return cost


def test_a_large_product_runs_at_the_peak() -> None:
    # 2 · 16 · 5 = 160 tiles of 64 x 64: 16 full rounds of 10 cores.
    one = estimate(product(1024, 320, 4096).nodes, CHIP)
    assert one.device == pytest.approx(2 * 2 * 1024 * 320 * 4096 / (1e12 * EFFICIENCY.value))
    assert one.families == {"products": one.device}


@pytest.mark.parametrize(("dtype", "factor"), [(mx.bfloat16, 2.0), (mx.float16, 0.5)])
def test_products_in_other_dtypes(dtype: mx.Dtype, factor: float) -> None:
    whole = estimate(product(1024, 320, 4096).nodes, CHIP).device
    assert estimate(product(1024, 320, 4096, dtype).nodes, CHIP).device == pytest.approx(factor * whole)


def test_a_product_that_fills_few_cores_is_slower() -> None:
    # 2 · 3 tiles on 10 cores, and 2 · 6 in two rounds.
    for n, filled in ((192, 0.6), (384, 0.6)):
        one = estimate(product(64, n, 4096).nodes, CHIP)
        assert one.device == pytest.approx(2 * 2 * 64 * n * 4096 / (1e12 * EFFICIENCY.value * filled))


def test_what_multiplies_nothing_waits_for_memory() -> None:
    with counting() as cost:
        cost.add(zeros((1000, 1000), F32) + zeros((1000, 1000), F32))
    one = estimate(cost.nodes, CHIP)
    assert one.device == pytest.approx(3 * 4e6 / (100e9 * BANDWIDTH.value))
    assert totals(cost.nodes) == pytest.approx((1, 0.0, 0.012))


def test_gaps_evaluations_and_the_host_come_on_top() -> None:
    cost = product(1024, 320, 4096)
    one = estimate(cost.nodes, CHIP, waits=3, build_seconds=0.25)
    host = 0.25 + NODE_TAPE.value + 3 * EVAL_WAIT.value
    assert one.seconds == pytest.approx([one.device + gap.value + host for gap in GAP])


def test_a_host_that_is_slower_than_the_device_decides() -> None:
    with counting() as cost:
        array = zeros((1,), F32)
        for _ in range(100):
            array = mx.exp(array).reshape(1, 1).reshape(1)
        cost.add(array)
    low, _ = estimate(cost.nodes, CHIP, waits=0).seconds
    assert low == pytest.approx(cost.nodes.total() * (NODE_PASS.value + NODE_TAPE.value))


def test_chips_are_ordered_as_they_are() -> None:
    cost = product(2048, 2048, 2048)
    device = {name: estimate(cost.nodes, chip).device for name, chip in CHIPS.items()}
    assert device["M1"] > device["M2"] > device["M1 Max"] > device["M4 Max"] > device["M2 Ultra"]


def test_each_input_says_where_it_is_from() -> None:
    constants = [value for value in vars(cost_model).values() if isinstance(value, Input)]
    fields = [value for chip in CHIPS.values() for value in vars(chip).values()]
    assert len(constants) >= 6
    assert all(one.source and one.value > 0 for one in (*constants, *GAP, *fields))
    assert any(one.guess for one in fields)


def test_building_is_scaled_by_what_this_machine_takes() -> None:
    unit = build_unit()
    assert 1e-8 < unit < 1e-4
    assert build_on_mac(2.0, 1e-6) == pytest.approx(2.0 * cost_model.NODE_BUILD.value / 1e-6)
