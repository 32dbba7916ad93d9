"""Attention of the package and of MLX, call by call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest

from orpo_mlx.doctor import attention
from orpo_mlx.doctor.attention import COLUMNS, check_attention
from orpo_mlx.doctor.findings import SIZES

SMALL = SIZES["cpu quick"]._replace(queries=(4, 9), half_queries=4)
OWN = mx.fast.scaled_dot_product_attention


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_call_has_two_rows(dtype: str) -> None:
    (found,) = check_attention(dtype, 64, SMALL)
    assert found.passed, found.sentence
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in found.figures["rows"]]
    queries = {4, 9} if dtype == "float32" else {4}
    assert {row["queries"] for row in rows} == queries
    assert len(rows) == len(queries) * 3 * 2 * 2
    assert all(row["runs"] and row["reason"] is None and row["microseconds"] > 0 for row in rows)
    assert max(row["relative error"] for row in rows) < found.figures["tolerance"]


def test_what_mlx_cannot_do_is_a_fact_and_what_the_package_cannot_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(q: mx.array, *rest: Any, mask: Any = None, **options: Any) -> mx.array:
        if q.shape[2] <= 8 and not isinstance(mask, mx.array):
            raise RuntimeError("the vector kernels do not produce a logsumexp")
        return OWN(q, *rest, mask=mask, **options)

    @contextmanager
    def in_place() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(mx.fast, "scaled_dot_product_attention", OWN)
            yield

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", raises)
    monkeypatch.setattr(attention, "functions_in_place", in_place)
    (found,) = check_attention("float32", 64, SMALL)
    assert found.passed
    assert "MLX's own raises in 4" in found.sentence
    reasons = {row[8] for row in found.figures["rows"] if row[3] == "mlx" and not row[4]}
    assert reasons == {"RuntimeError: the vector kernels do not produce a logsumexp"}

    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    monkeypatch.setattr(attention, "functions_in_place", nothing)
    (found,) = check_attention("float32", 64, SMALL)
    assert found.passed is False
    assert "4 of 12 calls of the package fail: 4 queries, mask none, gradient False: RuntimeError" in found.sentence


def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        # The value is right; keys have no gradient.
        return OWN(q, mx.stop_gradient(k), v, **options)

    @contextmanager
    def in_place() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(mx.fast, "scaled_dot_product_attention", spoiled)
            yield

    monkeypatch.setattr(attention, "functions_in_place", in_place)
    (found,) = check_attention("float32", 64, SMALL)
    assert found.passed is False
    assert "gradient True: off by" in found.sentence
