"""Attention by number of queries, head dimension, mask and dtype: MLX's own, and what the package's layers call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import mlx.core as mx

from orpo_mlx.doctor.findings import (
    Finding,
    Sizes,
    on_a_cpu,
    peak_mib,
    random_arrays,
    reason_of,
    relative_error,
    seconds,
    tolerance,
)
from orpo_mlx.doctor.functions import gradients
from orpo_mlx.doctor.package import functions_in_place

GROUP = "attention"
MASKS = ("none", "causal", "array")
COLUMNS = (
    "queries",
    "mask",
    "gradient",
    "whose",
    "runs",
    "relative error",
    "peak, MiB",
    "microseconds",
    "reason",
)
"""Of a finding's `rows`."""
_HEADS, _KEY_HEADS, _FEWEST_KEYS = 8, 2, 64


class Case(NamedTuple):
    """One call of attention."""

    queries: int
    mask: str
    gradient: bool


def check_attention(dtype: str, head_dim: int, sizes: Sizes) -> Iterator[Finding]:
    """All cases of a dtype and head dimension, against softmax(QKᵀ/√D)V in float32 on a CPU stream.

    Whether MLX's own runs is a fact of the machine. What the package's layers call must run and be right.
    """
    most = sizes.half_queries if dtype != "float32" else max(sizes.queries)
    queries = [count for count in sizes.queries if count <= most]
    allowed, rows, wrong, raised = tolerance(dtype), [], [], 0
    for count, mask in itertools.product(queries, MASKS):
        arrays, expected = inputs_and_expected(count, head_dim, mask, dtype)
        for gradient, whose in itertools.product((False, True), ("mlx", "package")):
            row = row_of(Case(count, mask, gradient), whose, arrays, expected)
            rows.append(row)
            right = row[4] and row[5] <= allowed
            raised += whose == "mlx" and not row[4]
            if whose == "package" and not right:
                wrong.append(f"{count} queries, mask {mask}, gradient {gradient}: {row[8] or f'off by {row[5]:.1e}'}")
    name = f"{dtype}, head dim {head_dim}"
    sentence = f"{len(rows) // 2} calls, MLX's own raises in {raised}; within {allowed:.0e}"
    if wrong:
        sentence = f"{len(wrong)} of {len(rows) // 2} calls of the package fail: {wrong[0]}"
    figures = {"tolerance": allowed, "columns": list(COLUMNS), "rows": rows}
    yield Finding(GROUP, name, not wrong, sentence, figures)


class Arrays(NamedTuple):
    """Arguments of a call, and the weights of what is differentiated."""

    q: mx.array
    k: mx.array
    v: mx.array
    mask: Any
    weights: mx.array


def inputs_and_expected(queries: int, head_dim: int, mask: str, dtype: str) -> tuple[Arrays, list[mx.array]]:
    """A call's arguments, and its value and gradients by the formula."""
    keys = max(queries, _FEWEST_KEYS)
    sizes = [(1, _HEADS, queries, head_dim), *[(1, _KEY_HEADS, keys, head_dim)] * 2]
    q, k, v = random_arrays(sizes, dtype)
    seen = mx.arange(queries)[:, None] + (keys - queries) >= mx.arange(keys)[None]
    given: dict[str, Any] = {"none": None, "causal": "causal", "array": seen}
    (weights,) = random_arrays(sizes[:1], "float32", seed=1)
    with on_a_cpu():
        scores_seen = mx.ones_like(seen) if mask == "none" else seen

        def formula(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            k, v = (mx.repeat(each, _HEADS // _KEY_HEADS, axis=1) for each in (k, v))
            scores = mx.where(scores_seen, (q @ k.swapaxes(-1, -2)) * head_dim**-0.5, -mx.inf)
            return mx.softmax(scores, axis=-1) @ v

        exact = [each.astype(mx.float32) for each in (q, k, v)]
        expected = [formula(*exact), *gradients(formula, exact, weights)]
        mx.eval(expected, q, k, v, seen, weights)
    return Arrays(q, k, v, given[mask], weights), expected


def row_of(case: Case, whose: str, arrays: Arrays, expected: list[mx.array]) -> list[Any]:
    start = [case.queries, case.mask, case.gradient, whose]
    inputs = list(arrays[:3])

    def call(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        scale = q.shape[-1] ** -0.5
        # Looked up here: within the block below it is the package's.
        output: mx.array = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=arrays.mask)
        return output

    work: Callable[[], Any] = lambda: [call(*inputs)]  # noqa: E731
    if case.gradient:
        work = lambda: gradients(call, inputs, arrays.weights)  # noqa: E731
    try:
        with functions_in_place() if whose == "package" else nullcontext():
            found = work()
            mx.eval(found)
            peak, taken = peak_mib(work), seconds(work, 2, warm_up=False)
    # A kernel that is missing, or has no gradient, is a finding like any other.
    except Exception as error:
        return [*start, False, None, None, None, reason_of(error)]
    wanted = expected[1:] if case.gradient else expected[:1]
    worst = max(relative_error(*pair) for pair in zip(found, wanted, strict=True))
    return [*start, True, float(f"{worst:.2e}"), round(peak, 2), round(1e6 * taken, 1), None]
