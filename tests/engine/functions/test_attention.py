"""Attention in blocks against float64, in value and gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import create_causal_mask

from orpo_mlx.device_profile import CPU, GPU, DeviceProfile
from orpo_mlx.engine.equivalence import relative_error
from orpo_mlx.engine.functions import attention as attention_module
from orpo_mlx.engine.functions.attention import Block, attention, fits, guarded_attention, is_fused, model_attention
from tests.helpers.least_peak import least_peak
from tests.helpers.metal_attention import NoLogSumExpError, raise_as_metal_does

Array = np.ndarray[Any, Any]
SCALE = 0.3


def reference(q: Array, k: Array, v: Array, seen: Array | None, cotangent: Array) -> list[Array]:
    """Output and gradients from the definition, in float64; `seen` is boolean or added, (B, 1, L, K)."""
    repeats = q.shape[1] // k.shape[1]
    keys, values = (np.repeat(each, repeats, axis=1) for each in (k, v))
    scores = SCALE * q @ keys.swapaxes(-1, -2)
    if seen is not None:
        scores = np.where(seen, scores, -np.inf) if seen.dtype == bool else scores + seen
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    slopes = cotangent @ values.swapaxes(-1, -2)
    slopes = probs * (slopes - (slopes * probs).sum(axis=-1, keepdims=True))

    def per_key_head(grads: Array) -> Array:
        return np.asarray(grads.reshape(k.shape[0], k.shape[1], repeats, *grads.shape[2:]).sum(axis=2))

    grad_k = per_key_head(SCALE * slopes.swapaxes(-1, -2) @ q)
    return [probs @ values, SCALE * slopes @ keys, grad_k, per_key_head(probs.swapaxes(-1, -2) @ cotangent)]


def causal(length: int, keys: int) -> Array:
    return (np.arange(keys)[None] <= np.arange(length)[:, None] + keys - length)[None, None]


def masks(length: int, keys: int) -> dict[str, tuple[Any, Array | None]]:
    """What `attention` is given, and what it means."""
    seen = causal(length, keys)
    window = seen & (np.arange(keys)[None] > np.arange(length)[:, None] + keys - length - 3)
    padded = np.concatenate([seen, seen & (np.arange(keys) >= 2)])
    added = np.where(seen, 0.5 * np.arange(keys), -1e9)
    return {
        "none": (None, None),
        "causal": ("causal", seen),
        "boolean": (mx.array(seen), seen),
        "two axes": (mx.array(seen[0, 0]), seen),
        "window": (mx.array(window), window),
        "rows": (mx.array(padded), padded),
        "added": (mx.array(added.astype(np.float32)), added),
    }


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize(("profile", "kept_bytes"), [(CPU, 0), (CPU, 1 << 20), (GPU, 0)], ids=["cpu", "kept", "gpu"])
@pytest.mark.parametrize("name", masks(3, 3))
@pytest.mark.parametrize(("length", "keys"), [(9, 9), (5, 12)])
def test_value_and_gradients(
    name: str, length: int, keys: int, profile: DeviceProfile, kept_bytes: int, rows: int
) -> None:
    rng = np.random.default_rng(0)
    # Two rows that see nothing at the start of a padded prompt mean nothing, so keys begin before the queries there.
    keys = keys + 2 if name == "rows" else keys
    given, seen = masks(length, keys)[name]
    q, k, v = (rng.standard_normal(shape) for shape in ((2, 6, length, 8), (2, 2, keys, 8), (2, 2, keys, 4)))
    cotangent = rng.standard_normal((2, 6, length, 4))
    primals = [mx.array(each.astype(np.float32)) for each in (q, k, v)]

    def run(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return attention(q, k, v, scale=SCALE, mask=given, profile=profile, kept_bytes=kept_bytes, rows=rows)

    outputs, gradients = mx.vjp(run, primals, [mx.array(cotangent.astype(np.float32))])
    for found, expected in zip([*outputs, *gradients], reference(q, k, v, seen, cotangent), strict=True):
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [9, 2048])
def test_a_gpu_takes_longer_blocks_and_keeps_nothing(queries: int) -> None:
    q, k = mx.zeros((1, 4, queries, 8)), mx.zeros((1, 2, queries, 8))
    blocks = attention_module.query_blocks("causal", q, k, None, GPU)
    assert all(block.last - block.first >= min(512, queries) for block in blocks)
    assert blocks[-1].last == queries
    assert not GPU.kept_attention


@pytest.mark.parametrize("length", range(1, 10))
@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize("sinks", [False, True])
def test_few_queries_keep_clear_of_the_kernel_that_has_no_gradient(
    length: int, mask: str | None, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"scale": SCALE, "mask": mask, "sinks": mx.random.normal((4,)) if sinks else None}
    q, k, v, cotangent = (
        mx.random.normal((1, heads, rows, 64)) for heads, rows in ((4, length), (2, 11), (2, 11), (4, length))
    )
    expected = mx.vjp(lambda *x: model_attention(*x, **options), [q, k, v], [cotangent])
    mx.eval(expected)
    raise_as_metal_does(monkeypatch)
    found = mx.vjp(lambda *x: guarded_attention(*x, **options), [q, k, v], [cotangent])
    for one, other in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))
    if length <= 8:
        with pytest.raises(NoLogSumExpError):
            mx.vjp(lambda *x: attention_module.model_attention(*x, **options), [q, k, v], [cotangent])


def test_which_calls_mlx_has_kernels_for() -> None:
    q, few, odd = mx.zeros((1, 4, 9, 64)), mx.zeros((1, 4, 8, 64)), mx.zeros((1, 4, 9, 32))
    array = mx.zeros((9, 9), mx.bool_)
    assert is_fused(q, q, "causal", GPU)
    assert is_fused(q, q, None, GPU)
    # An array mask, or another width: MLX would make and keep all scores.
    assert not is_fused(q, q, array, GPU)
    assert not is_fused(odd, odd, "causal", GPU)
    assert not is_fused(q, odd, "causal", GPU)
    # Of eight rows that is nothing.
    assert is_fused(few, few, array, GPU)
    for profile in (CPU, GPU._replace(native_attention=False)):
        assert not any(is_fused(each, each, "causal", profile) for each in (q, few, odd))


def errors(found: list[mx.array], exact: list[mx.array]) -> list[float]:
    return [float(np.array(relative_error(*pair))) for pair in zip(found, exact, strict=True)]


@pytest.mark.parametrize("profile", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("length", [256, pytest.param(2048, marks=pytest.mark.slow)])
def test_half_precision_is_no_further_off_than_mlx_itself(length: int, dtype: mx.Dtype, profile: DeviceProfile) -> None:
    mx.random.seed(0)
    heads = (3, 1, 1, 3)
    primals = [mx.random.normal((1, each, length, 64)).astype(dtype) for each in heads]

    def run(function: Any, arrays: list[mx.array], **options: Any) -> list[mx.array]:
        outputs, grads = mx.vjp(lambda *x: function(*x, scale=0.125, mask="causal", **options), arrays[:3], [arrays[3]])
        return [*outputs, *grads]

    exact = run(model_attention, [each.astype(mx.float32) for each in primals])
    found = run(attention, primals, profile=profile, rows=32, kept_bytes=64 << 20)
    theirs = run(model_attention, primals)
    assert [each.dtype for each in found] == [each.dtype for each in theirs]
    for own, other in zip(errors(found, exact), errors(theirs, exact), strict=True):
        assert own < other


@pytest.mark.parametrize("profile", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_rows_that_see_nothing_spoil_no_other_number(dtype: mx.Dtype, profile: DeviceProfile) -> None:
    # Scores so low that float16's lowest number, added to them, is no number any more.
    mx.random.seed(0)
    q, k, v, cotangent = (3 * mx.random.normal((1, 4, 16, 64)).astype(dtype) for _ in range(4))
    q, k = -mx.abs(q), mx.abs(k)
    mask = create_causal_mask(16, left_padding=mx.array([6]))
    assert np.array((0.125 * q @ k.swapaxes(-1, -2)).astype(mx.float32)).max() < -16
    cotangent = mx.where(mx.arange(16)[:, None] >= 6, cotangent, mx.array(0, dtype))

    def run(function: Any, *arrays: mx.array, **options: Any) -> list[mx.array]:
        outputs, grads = mx.vjp(
            lambda *x: function(*x, scale=0.125, mask=mask, **options), list(arrays[:3]), list(arrays[3:])
        )
        return [*outputs, *grads]

    arrays = [q, k, v, cotangent]
    found = run(attention, *arrays, profile=profile, rows=4)
    assert all(mx.isfinite(each).all().item() for each in found)
    exact = run(model_attention, *(each.astype(mx.float32) for each in arrays))
    # What the first six give means nothing.
    found[0], exact[0] = found[0][:, :, 6:], exact[0][:, :, 6:]
    assert max(errors(found, exact)) < {mx.float32: 1e-4, mx.bfloat16: 1e-2, mx.float16: 2e-3}[dtype]


@pytest.mark.parametrize("name", ["none", "causal", "window", "rows", "added"])
@pytest.mark.parametrize("profile", [CPU, GPU], ids=["cpu", "gpu"])
def test_it_can_be_traced(name: str, profile: DeviceProfile) -> None:
    given, _ = masks(9, 11)[name]
    q, k, v = (mx.random.normal((2, heads, rows, 8)) for heads, rows in ((4, 9), (2, 11), (2, 11)))

    def gradients(q: mx.array, k: mx.array, v: mx.array, mask: Any) -> Any:
        def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return attention(q, k, v, scale=SCALE, mask=mask, profile=profile, rows=4).square().sum()

        return mx.grad(loss, argnums=(0, 1, 2))(q, k, v)

    mask_is_traced = isinstance(given, mx.array)
    traced: Any = mx.compile(gradients if mask_is_traced else partial(gradients, mask=given))
    found = traced(q, k, v, *([given] if mask_is_traced else []))
    for one, other in zip(found, gradients(q, k, v, given), strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-4, atol=1e-5)


def test_weights_are_made_once_while_they_take_no_more_than_the_bytes_given(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = mx.random.normal((1, 4, 64, 8)), mx.random.normal((1, 2, 64, 8))
    taken = 4 * 64 * 64 * 4  # heads, rows, keys, bytes
    made: list[int] = []
    weights = attention_module.unnormalised_weights

    def counted(*arguments: Any) -> tuple[mx.array, mx.array]:
        made.append(1)
        return weights(*arguments)

    monkeypatch.setattr(attention_module, "unnormalised_weights", counted)
    for kept_bytes, times in ((taken, 1), (taken - 1, 2)):
        made.clear()
        mx.eval(
            mx.vjp(lambda q, most=kept_bytes: attention(q, k, k, scale=SCALE, profile=CPU, kept_bytes=most), [q], [q])[
                1
            ]
        )
        assert len(made) == times


def test_memory_grows_with_the_length_not_its_square() -> None:
    peaks: list[int] = []
    for length in (1024, 2048):
        q, k, v = (mx.random.normal((1, heads, length, 16)) for heads in (4, 2, 2))
        mx.eval(q, k, v)

        def compute(inputs: list[mx.array]) -> None:
            mx.eval(mx.vjp(lambda *x: attention(*x, scale=SCALE, mask="causal", profile=CPU), inputs, inputs[:1]))

        peaks.append(least_peak(partial(compute, [q, k, v]), min(2.2 * peaks[0], 64e6) if peaks else 0))
    # The scores of 2,048 rows alone would take 67 MB.
    assert peaks[1] < 2.2 * peaks[0]
    assert peaks[1] < 64e6


def test_calls_that_are_left_to_mlx() -> None:
    q = mx.zeros((1, 4, 5, 8))
    assert fits(q, "causal", {"sinks": None})
    assert not fits(q, "causal", {"sinks": mx.zeros(4)})
    assert not fits(q[:, :, :1], None, {})
    assert not fits(q, mx.zeros((1, 4, 5, 5)), {})


def test_weights_of_hidden_keys_stay_clear_of_subnormal_numbers() -> None:
    # Gradients as small as 1e-12 times such a weight are still normal float32 numbers, which start at 1.2e-38.
    q, k = mx.random.normal((1, 2, 16, 8)), mx.random.normal((1, 2, 16, 8))
    block = Block(0, 16, 0, 16)
    work = attention_module.Work([block], SCALE, "causal", False, True)
    weights, total = attention_module.unnormalised_weights(q, k, work, block, 0)
    smallest = float(weights.min())
    assert smallest == 0 or 1e-26 < smallest < 1e-20
    # And they are nothing beside the others.
    assert (total + 16 * smallest == total).all().item()
