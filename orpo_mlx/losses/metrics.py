"""Metrics under the names TRL logs them: per pair, then averaged over pairs, so that uneven batches weigh right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from orpo_mlx.losses.numerics import log_sigmoid
from orpo_mlx.losses.terms import (
    differences,
    is_best,
    is_good,
    is_worse,
    log_odds_ratio,
    mean_group_logps,
    mean_logps,
)
from orpo_mlx.types import GroupLogProbs, GroupLossOutput, LogProbs, LossOutput, PairLogProbs

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

AUX_LOSS = "aux_loss"
"""TRL's name of the load-balancing loss of experts, which stands behind the others where it is computed."""

OF_ONE_SIDE = ("loss", "nll_loss", "rewards/chosen", "logps/chosen")
"""Those of them that a single completion has as well."""


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


GROUP_METRICS = (
    "loss",
    "nll_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "accuracies/mean_logps",
    "accuracies/sum_logps",
    "rewards/margins",
)
"""Keys of `group_metrics`, in its order."""


def group_metrics(logps: GroupLogProbs, output: GroupLossOutput) -> dict[str, tuple[mx.array, mx.array]]:
    """For each metric a sum over each group's completions or pairs and their number, (B,) both; the quotient of the
    totals is what is logged, and what has no number is not.

    "Chosen" are the completions that are labelled good or, in a list, the best; "rejected" those that are bad, or the
    worst. `rewards/accuracies`: of single completions, whether a reward lies above the method's zero where the label is
    good and not where it is bad; of lists, whether of two completions the better has the higher reward. The other keys
    are as in `pair_metrics`, `accuracies/mean_logps` and `accuracies/sum_logps` over the pairs of one prompt.
    `rewards/margins` is counted for lists alone: of single completions it is the difference of the two means.
    """
    there, worse = logps.present, is_worse(logps)
    of_completions = output.losses.ndim == 2
    good = is_good(logps) if of_completions else is_best(logps)
    bad = there & (~good if of_completions else ~worse.any(axis=2))
    rewards, means = output.rewards, mean_group_logps(logps)
    right = ((rewards > output.zero) == good, there) if of_completions else (differences(rewards) > 0, worse)
    counted: dict[str, tuple[mx.array, mx.array]] = {
        "loss": (output.losses, there) if of_completions else (output.losses, mx.ones(output.losses.shape, mx.bool_)),
        "nll_loss": (-means, good),
        "rewards/chosen": (rewards, good),
        "rewards/rejected": (rewards, bad),
        "rewards/accuracies": right,
        "logps/chosen": (output.logps, good),
        "logps/rejected": (output.logps, bad),
        "accuracies/mean_logps": (differences(means) > 0, worse),
        "accuracies/sum_logps": (differences(logps.logps) > 0, worse),
        "rewards/margins": (differences(rewards), worse & (not of_completions)),
    }
    return {key: (_sum(mx.where(which, values, 0.0)), _sum(which)) for key, (values, which) in counted.items()}


def metric_array(logps: LogProbs, output: Any) -> mx.array:
    """All metrics as one array: of pairs (metrics, P) values, of whole groups (2, metrics, B) sums and numbers."""
    if isinstance(logps, PairLogProbs):
        return mx.stack(list(pair_metrics(logps, output).values()))
    found = group_metrics(logps, output).values()
    return mx.stack([mx.stack(list(column)) for column in zip(*found, strict=True)])


def with_balance_loss(metrics: mx.array, loss: mx.array) -> mx.array:
    """What `metric_array` gave, and the load-balancing loss of the batch as that of each of its rows."""
    row = mx.broadcast_to(mx.stop_gradient(loss), (1, metrics.shape[-1]))
    # Of whole groups: the sums, and how many each is a sum of.
    return mx.concatenate([metrics, row if metrics.ndim == 2 else mx.stack([row, mx.ones_like(row)])], axis=-2)


def _sum(values: mx.array) -> mx.array:
    """(B,) sums, float32."""
    return values.astype(mx.float32).reshape(values.shape[0], -1).sum(axis=1)


class MetricMeans:
    """Running means over pairs, and of what steps have one of (`add_step`) over steps, in float64."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._step_sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self.pairs = 0
        self.steps = 0

    def add(self, metrics: Mapping[str, mx.array | npt.NDArray[Any]]) -> None:
        """Add the per-pair values of one batch."""
        for key, values in metrics.items():
            self._sums[key] = self._sums.get(key, 0.0) + float(np.array(values, np.float64).sum())
        self.pairs += next(iter(metrics.values())).shape[0]

    def add_array(self, values: npt.NDArray[Any], two_sided: npt.NDArray[np.bool_] | None = None) -> None:
        """Add what `metric_array` gave; `two_sided`, (P,), says which pairs have two sides, None: all.

        Single completions count for the metrics `OF_ONE_SIDE` alone: the others would compare a side with itself.
        """
        if values.ndim == 2:
            part = MetricMeans()
            part.add(dict(zip((*METRICS, AUX_LOSS), values, strict=False)))
            if two_sided is not None and not two_sided.all():
                of_pairs = {key: row[two_sided] for key, row in zip(METRICS, values, strict=False)}
                for key in of_pairs.keys() - set(OF_ONE_SIDE):
                    part._sums[key] = float(of_pairs[key].astype(np.float64).sum())
                    part._counts[key] = float(np.count_nonzero(two_sided))
            self.merge(part)
            return
        sums, counts = np.asarray(values, np.float64).sum(axis=2).tolist()
        _add(self._sums, dict(zip((*GROUP_METRICS, AUX_LOSS), sums, strict=False)))
        _add(self._counts, dict(zip((*GROUP_METRICS, AUX_LOSS), counts, strict=False)))
        self.pairs += values.shape[2]

    def total(self, *keys: str) -> tuple[float, float]:
        """Sum and number of what was counted under these keys."""
        return sum(self._sums.get(key, 0.0) for key in keys), sum(self._counts.get(key, 0.0) for key in keys)

    def add_step(self, values: Mapping[str, float]) -> None:
        """Add one step's own values."""
        _add(self._step_sums, values)
        self.steps += 1

    def merge(self, other: MetricMeans) -> None:
        """Add what another one has summed."""
        # What only one of them counts by itself, each of the other's pairs has had.
        for own, others in ((self, other), (other, self)):
            for key in own._sums.keys() & others._counts.keys() - own._counts.keys():
                own._counts[key] = float(own.pairs)
        _add(self._sums, other._sums)
        _add(self._step_sums, other._step_sums)
        _add(self._counts, other._counts)
        self.pairs += other.pairs
        self.steps += other.steps

    def means(self) -> dict[str, float]:
        """The mean of each metric over the pairs, completions or steps added so far; none of what there were none."""
        counts = {key: self._counts.get(key, self.pairs) for key in self._sums}
        over_pairs = {key: total / counts[key] for key, total in self._sums.items() if counts[key]}
        if "rewards/margins" in counts and not counts["rewards/margins"]:
            sides = [over_pairs[key] for key in ("rewards/chosen", "rewards/rejected") if key in over_pairs]
            over_pairs |= {"rewards/margins": sides[0] - sides[1]} if len(sides) == 2 else {}
        return {**over_pairs, **{key: total / self.steps for key, total in self._step_sums.items()}}

    def to_json(self) -> dict[str, Any]:
        """All of it; JSON keeps every bit of a finite float64."""
        counts = {"counts": self._counts} if self._counts else {}
        return {"sums": self._sums, "step_sums": self._step_sums, **counts, "pairs": self.pairs, "steps": self.steps}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MetricMeans:
        """What `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is something else.
        """
        means = cls()
        means._sums = {str(key): float(total) for key, total in value["sums"].items()}
        means._step_sums = {str(key): float(total) for key, total in value["step_sums"].items()}
        # Pairs have no counts of their own, nor have checkpoints of earlier versions.
        means._counts = {str(key): float(total) for key, total in value.get("counts", {}).items()}
        means.pairs, means.steps = int(value["pairs"]), int(value["steps"])
        if min(means.pairs, means.steps) < 0 or (means.pairs == 0 and means._sums):
            raise ValueError("means of no pairs")
        if means.steps == 0 and means._step_sums:
            raise ValueError("means of no steps")
        return means


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for key, total in more.items():
        sums[key] = sums.get(key, 0.0) + total
