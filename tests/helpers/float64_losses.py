"""The papers' equations in float64 NumPy. Nothing here comes from orpo_mlx.

`c` and `r` are summed log-probs of the chosen and rejected completion, `nc` and `nr` their token counts, `rc` and `rr`
the reference's log-probs. `d` is the loss margin; `tc`, `tr`, `rtc` and `rtr` are the parts of `c`, `r`,
`rc` and `rr` beyond the shorter completion's length; `ac` and `ar` the mean of log p(y_t) - log Σ_v p(v)². Everything
is per pair, and takes complex arguments as well, so that `gradient` can differentiate without cancellation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]


class Oracle(NamedTuple):
    """A loss in float64."""

    loss: Callable[..., Array]
    """`loss(columns, **parameters)`, a value for each pair."""
    tries: tuple[dict[str, float], ...]
    """Hyper-parameters to hold it against the package's with."""
    compares_sums: bool
    """Whether a loss without a reference compares summed log-probs, not means."""
    kink_at_equal_means: bool
    """Whether it has no gradient where both sides' means are equal."""
    reward: Callable[..., tuple[Array, Array]] | None
    """What is logged as the rewards of both sides, without beta, where it is neither log-prob nor log-ratio."""


ORACLES: dict[str, Oracle] = {}


def tried(
    *tries: dict[str, float],
    compares_sums: bool = False,
    kink_at_equal_means: bool = False,
    reward: Callable[..., tuple[Array, Array]] | None = None,
) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Make a function the oracle of the loss of that name."""

    def register(loss: Callable[..., Array]) -> Callable[..., Array]:
        ORACLES[loss.__name__] = Oracle(loss, tries, compares_sums, kink_at_equal_means, reward)
        return loss

    return register


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


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return np.exp(log_sigmoid(x))


def positive(x: Array) -> Array:
    """max(0, x)."""
    return np.where(x.real > 0, x, 0.0)


def power_reward(logp: Array, power: float) -> Array:
    """(1 - exp(logp)^-power) / power, log p at power 0; the exponent stops at 80, as in TRL's."""
    if power == 0:
        return logp
    return (1 - np.exp(np.where(-power * logp.real < 80, -power * logp, 80.0))) / power


def ranked(x: Array) -> Array:
    """x in ascending order of its real part."""
    return x[np.argsort(x.real, kind="stable")]


def m(x: Columns) -> tuple[Array, Array]:
    """Length-normalised log-probs."""
    return x["c"] / x["nc"], x["r"] / x["nr"]


def h(x: Columns) -> tuple[Array, Array]:
    """Log-ratios to the reference."""
    return x["c"] - x["rc"], x["r"] - x["rr"]


@tried({"beta": 0.1}, {"beta": 2.0})
def orpo(x: Columns, beta: float) -> Array:
    """Hong et al. 2024, eqs. 6 and 7, NLL over the chosen completion's tokens."""
    chosen, rejected = m(x)
    return -chosen - beta * log_sigmoid(log_odds(chosen) - log_odds(rejected) - x["d"])


@tried({"beta": 0.5}, {"beta": 0.05})
def orpo_style(x: Columns, beta: float) -> Array:
    """The chapter: -log(r / (1 + r)) + beta (logp_rejected - logp_chosen), length-normalised."""
    chosen, rejected = m(x)
    return -log_sigmoid(log_odds(chosen) - log_odds(rejected)) + beta * (rejected - chosen)


@tried({"beta": 2.0, "gamma": 1.0}, {"beta": 0.5, "gamma": 0.0})
def simpo(x: Columns, beta: float, gamma: float) -> Array:
    """Meng et al. 2024, eq. 6."""
    return -log_sigmoid(beta * x["c"] / x["nc"] - beta * x["r"] / x["nr"] - gamma - x["d"])


@tried(
    {"beta": 2.0, "gamma": 1.0, "alpha": 0.25},
    {"beta": 0.5, "gamma": 0.0, "alpha": -0.5},
    {"beta": 0.5, "gamma": 0.5, "alpha": 0.0},
    reward=lambda x, alpha, **_: (power_reward(m(x)[0], alpha), power_reward(m(x)[1], alpha)),
)
def alphapo(x: Columns, beta: float, gamma: float, alpha: float) -> Array:
    """Gupta et al. 2025: SimPO with the reward (1 - P^-α)/α, P length-normalised, and log P at α = 0."""
    chosen, rejected = (power_reward(side, alpha) for side in m(x))
    return -log_sigmoid(beta * chosen - beta * rejected - gamma - x["d"])


@tried(
    {"beta": 0.1, "alpha": 1.0},
    {"beta": 0.5, "alpha": 0.25},
    compares_sums=True,
)
def cpo(x: Columns, beta: float, alpha: float) -> Array:
    """Xu et al. 2024, eqs. 4 and 5, NLL per token."""
    return -log_sigmoid(beta * x["c"] - beta * x["r"] - x["d"]) - alpha * x["c"] / x["nc"]


@tried({"alpha": 1.0}, {"alpha": 0.1}, kink_at_equal_means=True)
def rrhf(x: Columns, alpha: float) -> Array:
    """Yuan et al. 2023, eqs. 2 to 4."""
    chosen, rejected = m(x)
    return positive(rejected - chosen) - alpha * x["c"]


@tried(
    {"delta": 1.0, "alpha": 1.0},
    {"delta": 5.0, "alpha": 0.1},
    compares_sums=True,
)
def slic(x: Columns, delta: float, alpha: float) -> Array:
    """Zhao et al. 2023, eq. 1."""
    return positive(delta + x["d"] - x["c"] + x["r"]) - alpha * x["c"]


@tried({})
def simper(x: Columns) -> Array:
    """Xiao et al. 2025: the inverse perplexity of the chosen side is raised, that of the rejected side lowered."""
    chosen, rejected = m(x)
    return -np.exp(chosen) + np.exp(rejected)


@tried({})
def sft(x: Columns) -> Array:
    """Mean negative log-likelihood of the chosen side's tokens."""
    return -x["c"] / x["nc"]


@tried(
    {"beta": 0.1, "label_smoothing": 0.0},
    {"beta": 1.0, "label_smoothing": 0.2},
    {"beta": 0.1, "label_smoothing": 0.1},
)
def dpo(x: Columns, beta: float, label_smoothing: float) -> Array:
    """Rafailov et al. 2023, eq. 7, with the label noise of conservative DPO and ODPO's offset."""
    chosen, rejected = h(x)
    z = beta * chosen - beta * rejected - x["d"]
    return -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)


@tried({"beta": 0.1}, {"beta": 5.0})
def sigmoid_norm(x: Columns, beta: float) -> Array:
    """Lambert et al. 2024, eq. 5."""
    chosen, rejected = h(x)
    return -log_sigmoid(beta * chosen / x["nc"] - beta * rejected / x["nr"] - x["d"])


@tried({"beta": 0.1}, {"beta": 1.0})
def hinge(x: Columns, beta: float) -> Array:
    """Liu et al. 2023, table 1."""
    chosen, rejected = h(x)
    return positive(1 + x["d"] - beta * (chosen - rejected))


@tried({"beta": 0.1}, {"beta": 1.0})
def ipo(x: Columns, beta: float) -> Array:
    """Azar et al. 2023, eq. 17, means over tokens."""
    chosen, rejected = h(x)
    return (chosen / x["nc"] - rejected / x["nr"] - 1 / (2 * beta)) ** 2


@tried({"beta": 0.1, "label_smoothing": 0.1}, {"beta": 1.0, "label_smoothing": 0.3})
def robust(x: Columns, beta: float, label_smoothing: float) -> Array:
    """Chowdhury et al. 2024, eq. 12."""
    x = {**x, "d": np.zeros_like(x["d"])}
    other_way_round = {**x, "c": x["r"], "r": x["c"], "rc": x["rr"], "rr": x["rc"]}
    plain, flipped = dpo(x, beta, 0.0), dpo(other_way_round, beta, 0.0)
    return ((1 - label_smoothing) * plain - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@tried({"beta": 0.1, "label_smoothing": 1e-3}, {"beta": 1.0, "label_smoothing": 0.2})
def exo_pair(x: Columns, beta: float, label_smoothing: float) -> Array:
    """Ji et al. 2024, eq. 16: KL of the policy's preference from the smoothed label."""
    chosen, rejected = h(x)
    z = beta * (chosen - rejected)
    target = (1 - label_smoothing, label_smoothing)
    up, down = (sigmoid(side) * (log_sigmoid(side) - np.log(p)) for side, p in zip((z, -z), target, strict=True))
    losses: Array = up + down
    return losses


@tried({"beta": 0.1}, {"beta": 1.0})
def nca_pair(x: Columns, beta: float) -> Array:
    """Chen et al. 2024, eq. 11, for two responses."""
    chosen, rejected = h(x)
    both = log_sigmoid(-beta * chosen) + log_sigmoid(-beta * rejected)
    return -log_sigmoid(beta * chosen) - both / 2


@tried({"beta": 0.1, "delta": 0.0}, {"beta": 1.0, "delta": 0.7})
def bco_pair(x: Columns, beta: float, delta: float) -> Array:
    """Jung et al. 2024, eq. 6."""
    chosen, rejected = h(x)
    return -log_sigmoid(beta * chosen - delta) - log_sigmoid(-(beta * rejected - delta))


@tried({"beta": 0.1}, {"beta": 1.0})
def sppo_hard(x: Columns, beta: float) -> Array:
    """Wu et al. 2024, eq. 4.7 with P = 1 for the winner and 0 for the loser."""
    chosen, rejected = h(x)
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


@tried({"beta": 0.1, "label_smoothing": 0.0}, {"beta": 1.0, "label_smoothing": 0.2})
def aot(x: Columns, beta: float, label_smoothing: float) -> Array:
    """Melnyk et al. 2024, section 3, paired."""
    z = beta * (ranked(x["c"] - x["r"]) - ranked(x["rc"] - x["rr"]))
    return -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)


@tried({"beta": 0.1, "label_smoothing": 0.0}, {"beta": 1.0, "label_smoothing": 0.2})
def aot_unpaired(x: Columns, beta: float, label_smoothing: float) -> Array:
    """Melnyk et al. 2024, section 3, unpaired."""
    chosen, rejected = h(x)
    z = beta * (ranked(chosen) - ranked(rejected))
    return -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)


@tried({"beta": 0.1}, {"beta": 1.0})
def apo_zero(x: Columns, beta: float) -> Array:
    """D'Oosterlinck et al. 2024, eq. 7."""
    chosen, rejected = h(x)
    return sigmoid(-beta * chosen) + sigmoid(beta * rejected)


@tried({"beta": 0.1}, {"beta": 1.0})
def apo_down(x: Columns, beta: float) -> Array:
    """D'Oosterlinck et al. 2024, eq. 8."""
    chosen, rejected = h(x)
    return sigmoid(beta * chosen) + sigmoid(-beta * (chosen - rejected))


@tried({"beta": 0.05, "tau": 0.05}, {"beta": 1.0, "tau": 0.5})
def discopop(x: Columns, beta: float, tau: float) -> Array:
    """Lu et al. 2024, eq. 5; the product of σ(z/τ) and e⁻ᶻ in logs, since each alone leaves float64."""
    chosen, rejected = h(x)
    z = beta * (chosen - rejected)
    return (1 - sigmoid(z / tau)) * -log_sigmoid(z) + np.exp(log_sigmoid(z / tau) - z)


@tried({"beta": 0.1, "delta": 50.0}, {"beta": 1.0, "delta": 5.0})
def dpop(x: Columns, beta: float, delta: float) -> Array:
    """Pal et al. 2024, eq. 3."""
    chosen, rejected = h(x)
    return -log_sigmoid(beta * (chosen - rejected - delta * positive(-chosen)))


def f_dpo(derivative: Callable[..., Array]) -> Callable[..., tuple[Array, Array]]:
    """Both sides' f'(u), from log u."""
    return lambda x, beta, **rest: tuple(derivative(side, **rest) for side in h(x))


def forward_kl(h: Array) -> Array:
    """Wang et al. 2023, table 1: f(u) = -log u, f'(u) = -1/u, and a constant that cancels."""
    return power_reward(h, 1.0)


def jensen_shannon(h: Array) -> Array:
    """Wang et al. 2023, table 1: f'(u) = log 2u/(1 + u)."""
    derivative: Array = np.log(2) + log_sigmoid(h)
    return derivative


def alpha_divergence(h: Array, alpha: float) -> Array:
    """Wang et al. 2023, table 1: f'(u) = (1 - u^-α)/α."""
    return power_reward(h, alpha)


@tried({"beta": 0.1}, {"beta": 1.0}, reward=f_dpo(forward_kl))
def dpo_forward_kl(x: Columns, beta: float) -> Array:
    """Wang et al. 2023, eq. 9."""
    chosen, rejected = map(forward_kl, h(x))
    return -log_sigmoid(beta * chosen - beta * rejected - x["d"])


@tried({"beta": 0.1}, {"beta": 1.0}, reward=f_dpo(jensen_shannon))
def dpo_js(x: Columns, beta: float) -> Array:
    """Wang et al. 2023, eq. 9."""
    chosen, rejected = map(jensen_shannon, h(x))
    return -log_sigmoid(beta * chosen - beta * rejected - x["d"])


@tried(
    {"beta": 0.1, "alpha": 0.5},
    {"beta": 1.0, "alpha": 0.2},
    reward=f_dpo(alpha_divergence),
)
def dpo_alpha(x: Columns, beta: float, alpha: float) -> Array:
    """Wang et al. 2023, eq. 9."""
    chosen, rejected = (alpha_divergence(side, alpha) for side in h(x))
    return -log_sigmoid(beta * chosen - beta * rejected - x["d"])


@tried(
    {"beta": 0.1, "label_smoothing": 0.0},
    {"beta": 1.0, "label_smoothing": 0.2},
)
def wpo(x: Columns, beta: float, label_smoothing: float) -> Array:
    """Zhou et al. 2024, eqs. 2 and 3."""
    weight: Array = np.exp(x["ac"]) * np.exp(x["ar"])
    return weight * dpo(x, beta, label_smoothing)


def within_shared_length(x: Columns, ld_alpha: float) -> Columns:
    """Log-probs of policy and reference with those of the tail multiplied by ld_alpha."""
    parts = {"c": "tc", "r": "tr", "rc": "rtc", "rr": "rtr"}
    return {**x, **{whole: (x[whole] - x[tail]) + ld_alpha * x[tail] for whole, tail in parts.items()}}


@tried(
    {"beta": 0.1, "ld_alpha": 0.5, "label_smoothing": 0.0},
    {"beta": 1.0, "ld_alpha": 0.0, "label_smoothing": 0.2},
    {"beta": 0.1, "ld_alpha": 1.0, "label_smoothing": 0.0},
    reward=lambda x, ld_alpha, **_: h(within_shared_length(x, ld_alpha)),
)
def ld_dpo(x: Columns, beta: float, ld_alpha: float, label_smoothing: float) -> Array:
    """Liu et al. 2024: DPO of log-probs in which tokens beyond the shared length count for less."""
    return dpo(within_shared_length(x, ld_alpha), beta, label_smoothing)


def token_logps(logits: Array, ids: npt.NDArray[np.int64]) -> Array:
    """log softmax of `logits` (T, V) picked at `ids` (T,)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logps = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.take_along_axis(logps, ids[:, None], axis=-1)[:, 0]
