"""How findings are measured and worded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.doctor import findings
from orpo_mlx.doctor.findings import Finding, guarded, on_a_cpu, peak_mib, random_arrays, relative_error, seconds


def test_relative_error_is_the_norm_of_the_difference() -> None:
    expected = mx.array([3.0, 4.0])
    assert relative_error(expected + mx.array([0.0, 0.5]), expected) == pytest.approx(0.1)
    assert relative_error(mx.array([float("nan"), 4.0]), expected) == float("inf")
    assert relative_error(mx.array([3.0]), expected) == float("inf")


@pytest.mark.parametrize(("error", "allowed"), [(1e-7, 1e-4), (3e-4, 5e-3)])
def test_float32_is_allowed_more_where_products_round_to_tf32(
    error: float, allowed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "product_error", lambda: error)
    assert findings.tolerance("float32") == allowed
    assert findings.tolerance("bfloat16") == 3e-2


def test_the_error_of_a_product_tells_float32_from_tf32() -> None:
    assert findings.product_error.__wrapped__() < findings.TF32_FROM
    rng = np.random.default_rng(0)
    first = mx.array(rng.standard_normal((256, 256)).astype(np.float32))
    # TF32 keeps ten bits of a factor, as float16 does.
    assert relative_error(first.astype(mx.float16), first) > findings.TF32_FROM


def test_an_exception_becomes_a_finding_of_one_line() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("modes", "first", True, "fine")
        raise RuntimeError("the kernel\n at /Users/ada/code/x.metal failed.")

    found = list(guarded("modes", "second", check))
    assert found[0].passed
    assert found[1] == Finding("modes", "second", False, "RuntimeError: the kernel at x.metal failed")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/Users/ada/a b.py: 3/4", "a b.py: 3/4"),
        (f"see {Path.home()}/secret/file.py", "see file.py"),
        ("tokens/s and/or 1/2", "tokens/s and/or 1/2"),
    ],
)
def test_paths_lose_their_folders(text: str, shown: str) -> None:
    assert findings.without_paths(text) == shown


def test_time_and_memory_of_work() -> None:
    (array,) = random_arrays([(512, 512)], "float32")
    mx.eval(array)
    assert 0 < seconds(lambda: array @ array, 2) < 10
    assert peak_mib(lambda: array + 1) == pytest.approx(1.0, abs=0.2)


def test_nothing_is_compiled_on_the_cpu() -> None:
    before = mx.default_device()
    with on_a_cpu():
        assert mx.default_device() == mx.Device(mx.cpu)
    assert mx.default_device() == before
