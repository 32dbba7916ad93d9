"""The functions that stand in for mlx-lm's, against their formulas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import pytest
from mlx_lm.models import gated_delta, llama

from orpo_mlx.doctor import functions
from orpo_mlx.doctor.findings import SIZES, Finding
from orpo_mlx.doctor.functions import NAMES, check_function
from tests.helpers.as_on_a_gpu import answer_as_a_gpu

SMALL = SIZES["cpu quick"]._replace(tokens=12)


def finding(name: str, dtype: str) -> Finding:
    (found,) = check_function(name, dtype, SMALL)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_each_is_right(name: str) -> None:
    found = finding(name, "float32")
    assert found.passed, found.sentence
    assert found.figures["error"] < 1e-5


def test_on_metal_no_kernel_without_a_gradient_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_as_a_gpu(monkeypatch, metal=True)

    def kernel(*_: object) -> mx.array:
        raise ValueError("[Primitive::vjp] Not implemented for CustomKernel.")

    monkeypatch.setattr(gated_delta, "gated_delta_kernel", kernel)
    found = finding("gated delta", "float32")
    assert found.passed, found.sentence


def test_half_precision_is_allowed_its_rounding() -> None:
    found = finding("swiglu", "bfloat16")
    assert found.passed
    assert 1e-4 < found.figures["error"] < found.figures["tolerance"]


def test_a_spoiled_backward_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    @mx.custom_function
    def spoiled(gate: mx.array, up: mx.array) -> mx.array:
        return gate * mx.sigmoid(gate) * up

    @spoiled.vjp
    def backward(primals: tuple[mx.array, ...], cotangent: mx.array, _: object) -> tuple[mx.array, mx.array]:
        gate, up = primals
        return cotangent * up * mx.sigmoid(gate), cotangent * gate * mx.sigmoid(gate)

    @contextmanager
    def in_place() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(llama, "swiglu", spoiled)
            yield

    monkeypatch.setattr(functions, "functions_in_place", in_place)
    found = finding("swiglu", "float32")
    assert found.passed is False
    assert found.figures["replaced"] is True
    assert found.figures["error"] > 0.1


def test_it_is_said_where_mlx_lms_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    monkeypatch.setattr(functions, "functions_in_place", nothing)
    found = finding("lora", "float32")
    assert found.passed
    assert found.figures["replaced"] is False
