"""Log-space functions that stay finite, in value and gradient, at both ends."""

from __future__ import annotations

import math

import mlx.core as mx

_LN_2 = math.log(2.0)

# A float32 mean log-prob can round to exactly 0, where the odds are infinite: the largest that is not taken for it.
_LARGEST_LOGP = -1e-20
_LARGEST_EXPONENT = 80.0


def log1mexp(x: mx.array) -> mx.array:
    """log(1 - eˣ) for x <= 0, accurate and with a finite gradient at both ends.

    Branches at -ln 2 (Mächler 2012, eq. 7). Both branches see guarded inputs: `where` multiplies the gradient of the
    branch not taken by zero, and 0·inf is NaN.
    """
    # At 0 the value is -inf, and so is everything computed from it.
    x = mx.minimum(x, _LARGEST_LOGP)
    near_zero = x > -_LN_2
    small = mx.log(-mx.expm1(mx.where(near_zero, x, -_LN_2)))
    large = mx.log1p(-mx.exp(mx.where(near_zero, -_LN_2, x)))
    return mx.where(near_zero, small, large)


def log_odds(logps: mx.array) -> mx.array:
    """log(P / (1 - P)) of P = exp(logps) (Hong et al. 2024, eq. 4), computed without leaving log space."""
    return mx.minimum(logps, _LARGEST_LOGP) - log1mexp(logps)


def log_sigmoid(x: mx.array) -> mx.array:
    """log σ(x) = -log(1 + e⁻ˣ), finite for every finite x.

    Two branches, each with guarded input. The gradient of `mx.logaddexp` has an absolute error of 8e-8, which beyond
    x = 17 is the whole of it, and the log odds multiply it by 1 / (1 - P).
    """
    positive = x >= 0
    above = -mx.log1p(mx.exp(-mx.where(positive, x, 0.0)))
    below = mx.where(positive, 0.0, x)
    return mx.where(positive, above, below - mx.log1p(mx.exp(below)))


def positive_part(x: mx.array) -> mx.array:
    """max(0, x), with gradient 0 at 0.

    DPO-Positive starts at 0 on every pair, so the choice is made here and not left to `mx.maximum`.
    """
    return mx.where(x > 0, x, 0.0)


def power_gain(logs: mx.array, power: float) -> mx.array:
    """(1 - u^-power) / power of u = exp(logs), and `logs`, its limit, at power 0.

    Where u^-power is above e⁸⁰ it is taken for that, as TRL does for its α-divergence: float32 ends at e⁸⁸, and a loss
    that is infinite says less than one that is merely absurd. There is no gradient beyond.
    """
    if power == 0:
        return logs
    return -mx.expm1(mx.minimum(-power * logs, _LARGEST_EXPONENT)) / power
