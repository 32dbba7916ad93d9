"""Losses of single completions and of lists in float64 NumPy, written from their papers. Nothing comes from orpo_mlx.

A group is a row of `s` (summed log-probs), `n` (tokens), `ref` (the reference's sums) and `score`, (B, K) each; `n` is
0 where there is no completion. Arguments may be complex, so that gradients need no differences. `kl`, and `running`
(mean and number of rewards before), are numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.helpers.float64_losses import log_sigmoid, sigmoid

Array = npt.NDArray[Any]
Groups = Mapping[str, Any]


class Oracle(NamedTuple):
    """A loss in float64."""

    loss: Callable[..., Array]
    """`loss(groups, **parameters)`: (B, K) of completions, 0 where there is none, or (B,) of lists."""
    tries: tuple[dict[str, float], ...]
    """Hyper-parameters to hold it against the package's with."""


ORACLES: dict[str, Oracle] = {}


def tried(*tries: dict[str, float]) -> Callable[[Callable[..., Array]], Callable[..., Array]]:
    """Make a function the oracle of the loss of that name."""

    def register(loss: Callable[..., Array]) -> Callable[..., Array]:
        ORACLES[loss.__name__] = Oracle(loss, tries)
        return loss

    return register


def of_completions(x: Groups, good: Array, bad: Array) -> Array:
    """One value where the label is 1, another where it is 0, none where there is no completion."""
    return np.where(x["n"] > 0, np.where(x["score"] == 1, good, bad), 0.0)


@tried(
    {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    {"beta": 0.5, "desirable_weight": 0.7, "undesirable_weight": 2.0},
)
def kto(x: Groups, beta: float, desirable_weight: float, undesirable_weight: float) -> Array:
    """Ethayarajh et al. 2024, eq. 8 as in TRL 1.16: λ_y - v(x, y), the KL estimate at least 0."""
    h, z = x["s"] - x["ref"], max(x["kl"], 0.0)
    good = desirable_weight * sigmoid(-beta * (h - z))
    return of_completions(x, good, undesirable_weight * sigmoid(-beta * (z - h)))


@tried(
    {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    {"beta": 0.5, "desirable_weight": 0.7, "undesirable_weight": 2.0},
)
def apo_zero_unpaired(x: Groups, beta: float, desirable_weight: float, undesirable_weight: float) -> Array:
    """D'Oosterlinck et al. 2024, eq. 7, as in TRL 1.16 for single completions."""
    h = x["s"] - x["ref"]
    return of_completions(x, desirable_weight * sigmoid(-beta * h), undesirable_weight * sigmoid(beta * h))


@tried({"beta": 0.1}, {"beta": 0.5})
def bco(x: Groups, beta: float) -> Array:
    """Jung et al. 2024, eq. 6 with the running mean of all rewards, this batch's included, as the shift."""
    reward = beta * (x["s"] - x["ref"])
    there = x["n"] > 0
    mean, number = x["running"]
    shift = (mean * number + reward.real[there].sum()) / (number + there.sum())
    return of_completions(x, -log_sigmoid(reward - shift), -log_sigmoid(shift - reward))


def log_of_sum(exponents: list[Any]) -> Any:
    """log Σ eˣ."""
    largest = max(exponent.real for exponent in exponents)
    return np.log(sum(np.exp(exponent - largest) for exponent in exponents)) + largest


def softplus(x: Any) -> Any:
    """log(1 + eˣ)."""
    return -log_sigmoid(np.asarray(-x))


def lists(x: Groups) -> list[list[int]]:
    """The places of each group's completions, the best first."""
    return [
        sorted(np.flatnonzero(n > 0).tolist(), key=lambda place: -score[place])
        for n, score in zip(x["n"], x["score"], strict=True)
    ]


@tried({"beta": 0.1}, {"beta": 1.0})
def pl(x: Groups, beta: float) -> Array:
    """Rafailov et al. 2023, eq. 20; equals are left out of each other's sums."""
    losses = []
    for row, order in enumerate(lists(x)):
        reward, score = beta * (x["s"][row] - x["ref"][row]), x["score"][row]
        below = {k: [reward[j] - reward[k] for j in order if score[j] < score[k]] for k in order}
        losses.append(sum(softplus(log_of_sum(each)) for each in below.values() if each))
    return np.array(losses)


@tried({"beta": 0.1}, {"beta": 1.0})
def lipo(x: Groups, beta: float) -> Array:
    """Liu et al. 2024, eqs. 9 and 10, labels scaled to [0, 1]; of equals the mean over all of their ranks."""
    losses = []
    for row, order in enumerate(lists(x)):
        reward, score = beta * (x["s"][row] - x["ref"][row]), x["score"][row]
        low, high = (f(score[place] for place in order) for f in (min, max))
        by_reward = sorted(sorted(order), key=lambda place: -reward[place].real)
        shared: dict[float, list[int]] = {}
        for number, place in enumerate(by_reward, 1):
            shared.setdefault(float(reward[place].real), []).append(number)
        total = 0.0
        for i in order:
            for j in order:
                if score[i] > score[j]:
                    gain = 2 ** ((score[i] - low) / (high - low)) - 2 ** ((score[j] - low) / (high - low))
                    ranks = itertools.product(shared[reward[i].real], shared[reward[j].real])
                    discount = np.mean([abs(1 / np.log(1 + a) - 1 / np.log(1 + b)) for a, b in ranks if a != b])
                    total -= abs(gain) * discount * log_sigmoid(np.asarray(reward[i] - reward[j]))
        losses.append(total)
    return np.array(losses)


@tried({"alpha": 0.05}, {"alpha": 0.45})
def pro(x: Groups, alpha: float) -> Array:
    """Song et al. 2023, eqs. 7, 9 and 10, with the likelihood of the best per token."""
    losses = []
    for row, order in enumerate(lists(x)):
        score = x["score"][row]
        mean = x["s"][row] / np.maximum(x["n"][row], 1)
        total = 0.0
        for k in order:
            apart = {j: score[k] - score[j] for j in order if score[j] < score[k]}
            if apart:
                own = mean[k] * max(apart.values())
                total += softplus(log_of_sum([mean[j] * by - own for j, by in apart.items()]))
        best = [mean[place] for place in order if score[place] == score[order[0]]]
        losses.append(total - alpha * sum(best) / len(best))
    return np.array(losses)
