"""Metrics under the names TRL logs them: per pair, then averaged over pairs, so that uneven batches weigh right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from orpo_mlx.losses.numerics import log_sigmoid
from orpo_mlx.losses.terms import log_odds_ratio, mean_logps
from orpo_mlx.types import LossOutput, PairLogProbs

METRICS = (
    "loss",
    "nll_loss",
    "log_odds_ratio",
    "log_odds_chosen",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "accuracies/mean_logps",
    "accuracies/sum_logps",
)
"""Keys of `pair_metrics`, in its order."""


def pair_metrics(logps: PairLogProbs, output: LossOutput) -> dict[str, mx.array]:
    """Per-pair values, shape (B,), of each metric; their mean over pairs is what is logged.

    Keys: `loss`, `nll_loss`, `log_odds_ratio` (log σ of the log odds ratio), `log_odds_chosen` (the log odds ratio),
    `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies` (reward of the chosen side strictly
    greater), `logps/chosen`, `logps/rejected` (nats, as the method compares them), and `accuracies/mean_logps` and
    `accuracies/sum_logps` (the policy alone prefers the chosen side, by mean or by summed log-prob), which mean the
    same for every method and for the base model.
    """
    ratio = log_odds_ratio(logps)
    mean_chosen, mean_rejected = mean_logps(logps)
    values = (
        output.losses,
        logps.nll,
        log_sigmoid(ratio),
        ratio,
        output.chosen_rewards,
        output.rejected_rewards,
        (output.chosen_rewards > output.rejected_rewards).astype(mx.float32),
        output.chosen_rewards - output.rejected_rewards,
        output.chosen_logps,
        output.rejected_logps,
        (mean_chosen > mean_rejected).astype(mx.float32),
        (logps.chosen > logps.rejected).astype(mx.float32),
    )
    return dict(zip(METRICS, values, strict=True))


class MetricMeans:
    """Running means over pairs, and of what steps have one of (`add_step`) over steps, in float64."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._step_sums: dict[str, float] = {}
        self.pairs = 0
        self.steps = 0

    def add(self, metrics: Mapping[str, mx.array | npt.NDArray[Any]]) -> None:
        """Add the per-pair values of one batch."""
        for key, values in metrics.items():
            self._sums[key] = self._sums.get(key, 0.0) + float(np.array(values, np.float64).sum())
        self.pairs += next(iter(metrics.values())).shape[0]

    def add_step(self, values: Mapping[str, float]) -> None:
        """Add one step's own values."""
        _add(self._step_sums, values)
        self.steps += 1

    def merge(self, other: MetricMeans) -> None:
        """Add what another one has summed."""
        _add(self._sums, other._sums)
        _add(self._step_sums, other._step_sums)
        self.pairs += other.pairs
        self.steps += other.steps

    def means(self) -> dict[str, float]:
        """The mean of each metric over the pairs, or steps, added so far; empty if there were none."""
        over_pairs = {key: total / self.pairs for key, total in self._sums.items()}
        return {**over_pairs, **{key: total / self.steps for key, total in self._step_sums.items()}}

    def to_json(self) -> dict[str, Any]:
        """All of it; JSON keeps every bit of a finite float64."""
        return {"sums": self._sums, "step_sums": self._step_sums, "pairs": self.pairs, "steps": self.steps}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MetricMeans:
        """What `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is something else.
        """
        means = cls()
        means._sums = {str(key): float(total) for key, total in value["sums"].items()}
        means._step_sums = {str(key): float(total) for key, total in value["step_sums"].items()}
        means.pairs, means.steps = int(value["pairs"]), int(value["steps"])
        if min(means.pairs, means.steps) < 0 or (means.pairs == 0 and means._sums):
            raise ValueError("means of no pairs")
        if means.steps == 0 and means._step_sums:
            raise ValueError("means of no steps")
        return means


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for key, total in more.items():
        sums[key] = sums.get(key, 0.0) + total
