"""Attention in blocks against float64, in value and gradient."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from orpo_mlx.engine import attention as attention_module
from orpo_mlx.engine.attention import Block, attention, fits

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
@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])
@pytest.mark.parametrize("name", masks(3, 3))
@pytest.mark.parametrize(("length", "keys"), [(9, 9), (5, 12)])
def test_value_and_gradients(name: str, length: int, keys: int, kept_bytes: int, rows: int) -> None:
    rng = np.random.default_rng(0)
    # Two rows that see nothing at the start of a padded prompt mean nothing, so keys begin before the queries there.
    keys = keys + 2 if name == "rows" else keys
    given, seen = masks(length, keys)[name]
    q, k, v = (rng.standard_normal(shape) for shape in ((2, 6, length, 8), (2, 2, keys, 8), (2, 2, keys, 4)))
    cotangent = rng.standard_normal((2, 6, length, 4))
    primals = [mx.array(each.astype(np.float32)) for each in (q, k, v)]

    def run(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return attention(q, k, v, scale=SCALE, mask=given, kept_bytes=kept_bytes, rows=rows)

    outputs, gradients = mx.vjp(run, primals, [mx.array(cotangent.astype(np.float32))])
    for found, expected in zip([*outputs, *gradients], reference(q, k, v, seen, cotangent), strict=True):
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["none", "causal", "rows", "added"])
def test_on_other_devices_the_fused_kernel_runs_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, _ = masks(5, 7)[name]
    q, k, v, cotangent = (mx.random.normal((2, heads, length, 8)) for heads, length in ((4, 5), (2, 7), (2, 7), (4, 5)))

    def gradients() -> list[mx.array]:
        outputs, grads = mx.vjp(lambda *x: attention(*x, scale=SCALE, mask=given), [q, k, v], [cotangent])
        return [*outputs, *grads]

    here = gradients()
    calls: list[Any] = []
    kernel = attention_module.model_attention

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return kernel(*arguments, **options)

    monkeypatch.setattr(attention_module, "on_cpu", lambda: False)
    monkeypatch.setattr(attention_module, "model_attention", counted)
    for found, expected in zip(gradients(), here, strict=True):
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-5)
    assert len(calls) == 1


def test_weights_are_made_once_while_they_take_no_more_than_the_bytes_given(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = mx.random.normal((1, 4, 64, 8)), mx.random.normal((1, 2, 64, 8))
    taken = 4 * 64 * 64 * 4  # heads, rows, keys, bytes
    made: list[int] = []
    weights = attention_module._weights

    def counted(*arguments: Any) -> tuple[mx.array, mx.array]:
        made.append(1)
        return weights(*arguments)

    monkeypatch.setattr(attention_module, "_weights", counted)
    for kept_bytes, times in ((taken, 1), (taken - 1, 2)):
        made.clear()
        mx.eval(mx.vjp(lambda q, most=kept_bytes: attention(q, k, k, scale=SCALE, kept_bytes=most), [q], [q])[1])
        assert len(made) == times


def test_memory_grows_with_the_length_not_its_square() -> None:
    peaks = []
    for length in (1024, 2048):
        q, k, v = (mx.random.normal((1, heads, length, 16)) for heads in (4, 2, 2))
        mx.eval(q, k, v)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.vjp(lambda *x: attention(*x, scale=SCALE, mask="causal"), [q, k, v], [q]))
        peaks.append(mx.get_peak_memory() - before)
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
    weights, total = attention_module._weights(q, k, attention_module._added("causal", block, q, k))
    smallest = float(weights.min())
    assert smallest == 0 or 1e-26 < smallest < 1e-20
    # And they are nothing beside the others.
    assert (total + 16 * smallest == total).all().item()
