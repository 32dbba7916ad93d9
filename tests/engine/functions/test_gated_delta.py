"""The gated delta rule in chunks against the recurrence it stands for, token by token in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from orpo_mlx.device_profile import CPU, GPU
from orpo_mlx.engine.functions import gated_delta as module
from orpo_mlx.engine.functions.gated_delta import CHUNK, gated_delta, model_gated_delta_update, unit_lower_inverse
from tests.helpers.least_peak import least_peak

gated_delta_update = partial(module.gated_delta_update, profile=CPU)

Array = npt.NDArray[np.float64]
NAMES = ("q", "k", "v", "decay", "beta", "state")


def recurrence(q: Array, k: Array, v: Array, decay: Array, beta: Array, state: Array) -> tuple[Array, Array]:
    """Yang et al. 2024, eq. 10: S_t = S_{t-1} α_t (I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ with α_t = e^γ_t, y_t = S_t q_t."""
    heads = v.shape[2]
    q, k = (np.repeat(each, heads // each.shape[2], axis=2) for each in (q, k))
    outputs = []
    for t in range(v.shape[1]):
        forget = np.eye(k.shape[-1]) - beta[:, t, :, None, None] * k[:, t, :, :, None] * k[:, t, :, None, :]
        write = beta[:, t, :, None, None] * v[:, t, :, :, None] * k[:, t, :, None, :]
        state = np.exp(decay[:, t, :, None, None]) * state @ forget + write
        outputs.append(np.einsum("bhvd,bhd->bhv", state, q[:, t]))
    return np.stack(outputs, axis=1), state


def drawn(length: int, *, seed: int = 0) -> list[Array]:
    """(q, k, v, decay, beta, state) of 2 rows, 2 heads of keys and 4 of values; keys have length 1, as in models."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 2, length, 2, 8))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, state = rng.standard_normal((2, length, 4, 6)), rng.standard_normal((2, 4, 6, 8))
    return [q, k, v, -rng.exponential(0.3, (2, length, 4)), rng.uniform(0, 1, (2, length, 4)), state]


def arrays(values: list[Array]) -> list[mx.array]:
    return [mx.array(value.astype(np.float32)) for value in values]


@pytest.mark.parametrize("length", [1, 5, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
def test_values_and_gradients(length: int) -> None:
    values = drawn(length)
    rng = np.random.default_rng(1)
    weights, last = rng.standard_normal((2, length, 4, 6)), rng.standard_normal((2, 4, 6, 8))

    def loss(*inputs: mx.array) -> mx.array:
        out, state = gated_delta(*inputs)
        return (out * mx.array(weights.astype(np.float32))).sum() + (state * mx.array(last.astype(np.float32))).sum()

    def expected_loss(inputs: list[Array]) -> float:
        out, state = recurrence(*inputs)
        return float((out * weights).sum() + (state * last).sum())

    out, state = gated_delta(*arrays(values))
    for found, wanted in zip((out, state), recurrence(*values), strict=True):
        np.testing.assert_allclose(np.array(found), wanted, rtol=1e-4, atol=1e-5)
    _, gradients = mx.value_and_grad(loss, argnums=list(range(6)))(*arrays(values))
    for place, name in enumerate(NAMES):
        direction = rng.standard_normal(values[place].shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = list(values)
            moved[place] = values[place] + step * direction
            ends.append(expected_loss(moved))
        slope = float((np.array(gradients[place], np.float64) * direction).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-3), name


def test_without_a_state_it_begins_with_none() -> None:
    values = drawn(7)
    q, k, v, decay, beta, _ = arrays(values)
    wanted, _ = recurrence(*[*values[:-1], np.zeros((2, 4, 6, 8))])
    np.testing.assert_allclose(np.array(gated_delta(q, k, v, decay, beta)[0]), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 40.0, 1e4])
def test_tokens_that_repeat_and_any_decay_stay_exact(strength: float) -> None:
    # One key over and over, written whole: where a series for the inverse would lose every digit.
    values = drawn(2 * CHUNK)
    values[1] = np.broadcast_to(values[1][:, :1], values[1].shape)
    values[3], values[4] = np.full_like(values[3], -strength), np.ones_like(values[4])
    out, state = gated_delta(*arrays(values))
    wanted, last = recurrence(*values)
    np.testing.assert_allclose(np.array(out), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(state), last, rtol=1e-4, atol=1e-4)
    gradients = mx.grad(lambda *inputs: gated_delta(*inputs)[0].sum(), argnums=list(range(6)))(*arrays(values))
    assert all(mx.isfinite(gradient).all().item() for gradient in gradients)


def test_the_inverse_and_its_gradient() -> None:
    rng = np.random.default_rng(0)
    below, cotangent = np.tril(rng.standard_normal((3, 16, 16)), -1), rng.standard_normal((3, 16, 16))
    (found,), (gradient,) = mx.vjp(unit_lower_inverse, arrays([below]), arrays([cotangent]))
    inverse = np.linalg.inv(np.eye(16) + below)
    turned = inverse.swapaxes(-1, -2)
    np.testing.assert_allclose(np.array(found), inverse, rtol=1e-3, atol=1e-3 * np.abs(inverse).max())
    wanted = -turned @ cotangent @ turned
    np.testing.assert_allclose(np.array(gradient), wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def settled(length: int, *, vector: bool = False) -> dict[str, Any]:
    """Arguments as mlx-lm's layers give them."""
    q, k, v, _, b, state = arrays(drawn(length))
    mx.random.seed(0)
    a = mx.random.normal((2, length, 4, 8) if vector else (2, length, 4))
    parameters = {"A_log": mx.log(mx.random.uniform(0, 16, (4, 1) if vector else (4,))), "dt_bias": mx.ones(4)}
    if vector:
        parameters["dt_bias"] = mx.ones((4, 8))
    return {"q": q, "k": k, "v": v, "a": a, "b": b, **parameters, "state": state}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_it_is_what_mlx_lm_computes(dtype: mx.Dtype) -> None:
    arguments = settled(70)
    half: dict[str, Any] = {
        name: value if name == "state" else value.astype(dtype) for name, value in arguments.items()
    }
    out, state = gated_delta_update(**half, use_kernel=False)
    wanted, last = model_gated_delta_update(**half, use_kernel=False)
    assert (out.dtype, state.dtype) == (wanted.dtype, last.dtype)
    tolerance = 1e-4 if dtype == mx.float32 else 2e-2
    for found, expected in ((out, wanted), (state, last)):
        whole = np.array(expected.astype(mx.float32))
        gap = np.abs(np.array(found.astype(mx.float32)) - whole).max()
        assert gap <= tolerance * np.abs(whole).max()


def test_masked_tokens_might_as_well_not_be_there() -> None:
    arguments = settled(70)
    kept = [place for place in range(70) if place not in (0, 3, 65)]
    mask = mx.array([[place in kept for place in range(70)]] * 2)
    out, state = gated_delta_update(**arguments, mask=mask, use_kernel=False)
    names = ("q", "k", "v", "a", "b")
    fewer: dict[str, Any] = {
        name: value[:, mx.array(kept)] if name in names else value for name, value in arguments.items()
    }
    wanted, last = gated_delta_update(**fewer, use_kernel=False)
    np.testing.assert_allclose(np.array(out[:, mx.array(kept)]), np.array(wanted), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.array(state), np.array(last), rtol=1e-3, atol=1e-5)


def test_what_it_does_not_know_is_left_to_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def own(*_: Any, **options: Any) -> tuple[mx.array, mx.array]:
        calls.append(options)
        return mx.zeros(1), mx.zeros(1)

    monkeypatch.setattr(module, "model_gated_delta_update", own)
    gated_delta_update(**settled(3, vector=True), use_kernel=False)
    gated_delta_update(**settled(3), use_kernel=False, lower_bound=-5.0)
    gated_delta_update(**settled(3), use_kernel=False, allow_neg_eigval=True)
    # Metal's kernel is for where no gradient is asked for.
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    gated_delta_update(**settled(3))
    monkeypatch.undo()
    monkeypatch.setattr(module, "model_gated_delta_update", own)
    assert calls == [
        {"use_kernel": False},
        {"use_kernel": False, "lower_bound": -5.0},
        {"use_kernel": False, "allow_neg_eigval": True},
        {"use_kernel": True},
    ]
    gated_delta_update(**settled(3), use_kernel=False, lower_bound=None, allow_neg_eigval=False)
    assert len(calls) == 4


def test_a_state_is_kept_for_each_chunk_and_not_for_each_token() -> None:
    length, width = 4 * CHUNK, 64
    mx.random.seed(0)
    q, k, v = (mx.random.normal((1, length, 4, width)) / 8 for _ in range(3))
    gates, zeros = mx.random.normal((1, length, 4)), mx.zeros(4)
    mx.eval(q, k, v, gates, zeros)

    def peak(function: Any, enough: float = 0) -> int:
        def loss(keys: mx.array) -> mx.array:
            found: mx.array = function(q, keys, v, gates, gates, zeros, zeros, use_kernel=False)[0].sum()
            return found

        return least_peak(lambda: mx.eval(mx.grad(loss)(k)), enough)

    own = peak(model_gated_delta_update)
    chunked = peak(gated_delta_update, own / 3)
    assert own > 4 * length * 4 * width * width, "no longer a state for each token: is this module still needed?"
    assert 3 * chunked < own


NATIVE = GPU._replace(native_gated_delta=True)


@pytest.mark.skipif(not hasattr(mx.fast, "gated_delta_update"), reason="this MLX has no such function")
@pytest.mark.parametrize("with_state", [False, True])
def test_the_kernel_is_called_for_some_tokens_after_another(with_state: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU MLX's function runs token by token, which gives what the kernel must.
    monkeypatch.setattr(module, "has_kernel", lambda k, v: True)
    monkeypatch.setattr(module, "_NATIVE_TOKENS", 4)
    arguments = settled(11)
    names = ["q", "k", "v", "a", "b", "A_log", "dt_bias", *(["state"] if with_state else [])]
    weights = mx.random.normal((2, 11, 4, 6))

    def loss(function: Any, *values: mx.array) -> mx.array:
        out, last = function(**dict(zip(names, values, strict=True)), use_kernel=False)
        total: mx.array = (out * weights).sum() + last.square().sum()
        return total

    found, wanted = (
        mx.value_and_grad(partial(loss, function), argnums=list(range(len(names))))(*map(arguments.get, names))
        for function in (partial(module.gated_delta_update, profile=NATIVE), model_gated_delta_update)
    )
    for one, other in zip([found[0], *found[1]], [wanted[0], *wanted[1]], strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "values", "width", "taken"),
    [
        (16, 32, 128, True),
        (16, 16, 128, True),
        (32, 32, 128, True),
        (2, 4, 128, False),
        (16, 32, 64, False),
    ],
)
def test_where_there_is_a_kernel(
    keys: int, values: int, width: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[mx.Dtype]] = []

    def kernel(*arrays: mx.array | None) -> list[mx.array]:
        calls.append([each.dtype for each in arrays if each is not None])
        return [mx.zeros((1, 3, values, width)), mx.zeros((1, values, width, width))]

    monkeypatch.setattr(mx.fast, "gated_delta_update", kernel)
    q, k, v = (mx.zeros((1, 3, heads, width), mx.bfloat16) for heads in (keys, keys, values))
    gates, each = mx.zeros((1, 3, values), mx.bfloat16), mx.zeros(values)
    for profile in (NATIVE, CPU):
        out, _ = module.gated_delta_update(q, k, v, gates, gates, each, each, profile=profile, use_kernel=False)
        assert out.dtype == mx.bfloat16
    # In float32, or a decay near 1 would be rounded to 1.
    assert calls == ([[mx.float32] * 5] if taken else [])
