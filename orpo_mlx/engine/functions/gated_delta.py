"""The gated delta rule in chunks: the recurrence of Qwen3.5's linear attention as matrix products.

mlx-lm runs it token by token where a gradient is taken, and its backward pass keeps several states for each token: with
32 heads of 128 x 128 that is some 8 GiB a layer for 1,024 tokens. Here a state is kept for each chunk of 64. Where MLX
has a kernel for the rule with a gradient (`mx.fast.gated_delta_update`, on Metal), that one is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta as model_module

from orpo_mlx.device_profile import DeviceProfile

# As in the paper's own kernels: longer chunks are more work within them, shorter ones more steps between them. A power
# of two, which `inverse_by_halves` needs.
CHUNK = 64
# The only head width that MLX's kernel is made for.
_NATIVE_WIDTH = 128
# (key heads, value heads) for which MLX 0.32.4 has kernels; for others its function runs token by token.
_NATIVE_HEADS = ((16, 16), (16, 32), (16, 48), (16, 64), (24, 24), (32, 32))
# On chips before the M5 the kernel's backward pass keeps a state for each token of a call: 64 KiB a head.
_NATIVE_TOKENS = 128

model_gated_delta_update: Callable[..., tuple[mx.array, mx.array]] = model_module.gated_delta_update
"""mlx-lm's own, whatever stands in its place later."""


def gated_delta_update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,  # noqa: N803
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    profile: DeviceProfile,
    use_kernel: bool = True,
    **other: Any,
) -> tuple[mx.array, mx.array]:
    """What `mlx_lm.models.gated_delta.gated_delta_update` gives, arguments as there; computed by `gated_delta` or,
    where `profile` says so and it fits, by MLX's kernel.

    A gate for each channel, other settings, and mlx-lm's own kernel where no gradient is asked for are left to mlx-lm.
    """
    # That is when mlx-lm takes its kernel, which has no gradient.
    without_gradient = use_kernel and mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)
    if without_gradient or a.ndim != 3 or any(value is not None and value is not False for value in other.values()):
        return model_gated_delta_update(q, k, v, a, b, A_log, dt_bias, state, mask, use_kernel=use_kernel, **other)
    decay = -mx.exp(A_log.astype(mx.float32)) * nn.softplus(a + dt_bias)
    beta = mx.sigmoid(b).astype(mx.float32)
    if mask is not None:
        decay, beta = decay * mask[..., None], beta * mask[..., None]
    native = profile.native_gated_delta and has_kernel(k, v)
    out, state = (native_gated_delta if native else gated_delta)(q, k, v, decay, beta, state)
    return out.astype(q.dtype), state


def has_kernel(k: mx.array, v: mx.array) -> bool:
    """Whether MLX has a kernel for such keys and values."""
    widths = (k.shape[-1], v.shape[-1])
    return widths == (_NATIVE_WIDTH, _NATIVE_WIDTH) and (k.shape[2], v.shape[2]) in _NATIVE_HEADS


def native_gated_delta(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array | None
) -> tuple[mx.array, mx.array]:
    """What `gated_delta` gives, by MLX's kernel, a few tokens at a time."""
    # In float32: in half precision the kernel would round e^γ, which is near 1, for each token of a long sequence.
    parts = [each.astype(mx.float32) for each in (q, k, v, mx.exp(decay), beta)]
    kernel: Callable[..., list[mx.array]] = mx.fast.gated_delta_update
    outputs = []
    for start in range(0, v.shape[1], _NATIVE_TOKENS):
        tokens = [part[:, start : start + _NATIVE_TOKENS] for part in parts]
        out, state = kernel(*tokens, state)
        outputs.append(out)
    assert state is not None
    return mx.concatenate(outputs, axis=1), state


def gated_delta(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """For each head and token t, in float32:

        S_t = e^γ_t S_{t-1} + β_t (v_t - e^γ_t S_{t-1} k_t) k_tᵀ,   y_t = S_t q_t

    from Yang et al. 2024, "Gated Delta Networks", eq. 10, in the chunks of its section 3.3: with Γ_t = Σ_{i≤t} γ_i in a
    chunk, the rows δ_t of what is written solve

        (I + A) δ = β (V - e^Γ K S₀ᵀ),   A_ti = β_t e^(Γ_t - Γ_i) k_t·k_i for i < t

    and Y = e^Γ Q S₀ᵀ + [i ≤ t] e^(Γ_t - Γ_i) (Q Kᵀ) δ, S = e^Γ_C S₀ + δᵀ e^(Γ_C - Γ) K.

    Args:
        q, k: (B, T, Hk, D); Hk divides H.
        v: (B, T, H, Dv).
        decay: γ ≤ 0, (B, T, H); 0 keeps the state whole.
        beta: (B, T, H); 0 writes nothing.
        state: S before the first token, (B, H, Dv, D) float32; None for 0.

    Returns:
        Y (B, T, H, Dv) and the state after the last token, both float32.
    """
    batch, length, heads, width = v.shape
    q, k = (mx.repeat(each, heads // each.shape[2], axis=2) for each in (q, k))
    q, k, v, decay, beta = (in_chunks(each) for each in (q, k, v, decay[..., None], beta[..., None]))
    total = mx.cumsum(decay, axis=-2)
    # e^(Γ_t - Γ_i) for i <= t: never above 1, however strong the decay.
    causal = mx.tril(mx.ones((CHUNK, CHUNK), mx.bool_))
    ratio = mx.exp(mx.where(causal, total - total.swapaxes(-1, -2), -mx.inf))
    inverse = unit_lower_inverse(mx.tril(beta * ratio * (k @ k.swapaxes(-1, -2)), -1))
    grown = mx.exp(total)
    written, read = inverse @ (beta * v), inverse @ (beta * grown * k)
    seen = ratio * (q @ k.swapaxes(-1, -2))
    q, kept = q * grown, k * mx.exp(total[..., -1:, :] - total)
    if state is None:
        state = mx.zeros((batch, heads, width, k.shape[-1]), mx.float32)
    outputs = []
    for chunk in range(v.shape[0]):
        delta = written[chunk] - read[chunk] @ state.swapaxes(-1, -2)
        outputs.append(q[chunk] @ state.swapaxes(-1, -2) + seen[chunk] @ delta)
        state = grown[chunk, ..., -1:, :] * state + delta.swapaxes(-1, -2) @ kept[chunk]
    whole = mx.stack(outputs).transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, width)
    return whole[:, :length], state


def in_chunks(x: mx.array) -> mx.array:
    """(B, T, H, D) to (T / CHUNK, B, H, CHUNK, D) in float32, zeros behind."""
    batch, length, heads, width = x.shape
    x = mx.pad(x.astype(mx.float32), [(0, 0), (0, -length % CHUNK), (0, 0), (0, 0)])
    return x.reshape(batch, -1, CHUNK, heads, width).transpose(1, 0, 3, 2, 4)


def inverse_by_halves(below: mx.array) -> mx.array:
    """(I + L)⁻¹ of (m, n, n)."""
    size = below.shape[-1]
    if size == 1:
        return mx.ones_like(below)
    half = size // 2
    # One below the other, not along a new axis at each level: CUDA's kernels take 10 axes at most.
    blocks = inverse_by_halves(mx.concatenate([below[:, :half, :half], below[:, half:, half:]]))
    first, second = mx.split(blocks, 2)
    corner = -second @ below[:, half:, :half] @ first
    upper = mx.concatenate([first, mx.zeros_like(corner)], axis=-1)
    return mx.concatenate([upper, mx.concatenate([corner, second], axis=-1)], axis=-2)


def unit_lower_inverse(below: mx.array) -> mx.array:
    """(I + L)⁻¹ of a strictly lower triangular L, (..., n, n) with n a power of two, by halves.

    As stable as forward substitution: it multiplies by inverses of diagonal blocks alone. The series Σ (-L)ⁿ is not,
    its terms grow by orders of magnitude where tokens repeat.
    """
    function: Any = mx.custom_function(
        lambda below: inverse_by_halves(below.reshape(-1, *below.shape[-2:])).reshape(below.shape)
    )

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(_: mx.array, cotangent: mx.array, inverse: mx.array) -> mx.array:
        turned = inverse.swapaxes(-1, -2)
        return -turned @ cotangent @ turned

    result: mx.array = function(below)
    return result
