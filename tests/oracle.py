"""The papers' equations in float64 NumPy. Nothing here comes from orpo_mlx.

`c` and `r` are summed log-probs of the chosen and rejected completion, `nc` and `nr` their token counts, `rc` and `rr`
the reference's log-probs. Everything is per pair, and takes complex arguments as well, so that `gradient` can
differentiate without cancellation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]


def gradient(f: Callable[[Columns], Array], x: Columns, name: str) -> Array:
    """d f / d x[name] by complex step: Im f(x + ih) / h, exact to rounding for any tiny h."""
    step = 1e-40
    slope: Array = f({**x, name: x[name] + 1j * step}).imag / step
    return slope


def log_sigmoid(x: Array) -> Array:
    """-log(1 + exp(-x)), without overflow on either side."""
    positive = x.real > 0
    up, down = np.where(positive, x, 0.0), np.where(positive, 0.0, x)
    return np.where(positive, -np.log1p(np.exp(-up)), down - np.log1p(np.exp(down)))


def log_odds(logp: Array) -> Array:
    """log(p / (1 - p))."""
    near_zero = logp.real > -0.5
    near, far = np.where(near_zero, logp, -1.0), np.where(near_zero, -1.0, logp)
    return logp - np.where(near_zero, np.log(-np.expm1(near)), np.log1p(-np.exp(far)))


def printed_odds_ratio(chosen: Array, rejected: Array) -> Array:
    """The chapter's formula as it is printed: probabilities, and 1e-8 in the denominators."""
    p_chosen, p_rejected = np.exp(chosen), np.exp(rejected)
    return (p_chosen / (1 - p_chosen + 1e-8)) / (p_rejected / (1 - p_rejected + 1e-8))


def orpo(c: Array, r: Array, nc: Array, nr: Array, beta: float) -> Array:
    """Hong et al. 2024, eqs. 6 and 7, NLL over the chosen completion's tokens."""
    return -c / nc - beta * log_sigmoid(log_odds(c / nc) - log_odds(r / nr))


def orpo_style(c: Array, r: Array, nc: Array, nr: Array, beta: float) -> Array:
    """The chapter: -log(r / (1 + r)) + beta (logp_rejected - logp_chosen), length-normalised."""
    return -log_sigmoid(log_odds(c / nc) - log_odds(r / nr)) + beta * (r / nr - c / nc)


def dpo(c: Array, r: Array, rc: Array, rr: Array, beta: float) -> Array:
    """Rafailov et al. 2023, eq. 7."""
    return -log_sigmoid(beta * ((c - rc) - (r - rr)))


def token_logps(logits: Array, ids: npt.NDArray[np.int64]) -> Array:
    """log softmax of `logits` (T, V) picked at `ids` (T,)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logps = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.take_along_axis(logps, ids[:, None], axis=-1)[:, 0]
