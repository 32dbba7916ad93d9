"""Quantities that several losses are made of, and the `LossOutput` they end in. x is the prompt throughout."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from orpo_mlx.losses.numerics import log_odds, log_sigmoid
from orpo_mlx.types import GroupLogProbs, GroupLossOutput, LossOutput, PairLogProbs


class Sides(NamedTuple):
    """One value per pair, shape (B,), for each of its completions."""

    chosen: mx.array
    rejected: mx.array

    def times(self, factor: float) -> Sides:
        """Both multiplied by `factor`."""
        return Sides(factor * self.chosen, factor * self.rejected)


def mean_logps(logps: PairLogProbs) -> Sides:
    """m(y_w), m(y_l): the length-normalised log-probs."""
    return Sides(logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens)


def log_odds_ratio(logps: PairLogProbs) -> mx.array:
    """log OR(y_w, y_l) = log odds(y_w|x) - log odds(y_l|x) with length-normalised P (Hong et al. 2024, eq. 5)."""
    chosen, rejected = mean_logps(logps)
    return log_odds(chosen) - log_odds(rejected)


def reference_logps(logps: PairLogProbs) -> Sides:
    """log π_ref(y_w|x), log π_ref(y_l|x).

    Raises:
        ValueError: there are none.
    """
    if logps.reference_chosen is None or logps.reference_rejected is None:
        raise ValueError(
            "this loss compares with a reference model: reference_chosen and reference_rejected are needed."
        )
    return Sides(logps.reference_chosen, logps.reference_rejected)


def log_ratios(logps: PairLogProbs) -> Sides:
    """h(y_w), h(y_l): log π(y|x) - log π_ref(y|x), summed over tokens."""
    reference = reference_logps(logps)
    return Sides(logps.chosen - reference.chosen, logps.rejected - reference.rejected)


def mean_log_ratios(logps: PairLogProbs) -> Sides:
    """h(y_w)/|y_w|, h(y_l)/|y_l|."""
    chosen, rejected = log_ratios(logps)
    return Sides(chosen / logps.chosen_tokens, rejected / logps.rejected_tokens)


def margin(logps: PairLogProbs) -> mx.array:
    """h(y_w) - h(y_l)."""
    chosen, rejected = log_ratios(logps)
    return chosen - rejected


def loss_margin(logps: PairLogProbs) -> mx.array | float:
    """What z must exceed before a pair counts as learned, 0 where none is given (Amini et al. 2024, arXiv:2402.10571,
    eq. 7 with the identity for f)."""
    return 0.0 if logps.margin is None else logps.margin


def less_margin(logps: PairLogProbs, z: mx.array) -> mx.array:
    """`z` less the loss margin."""
    # Not `z - 0.0` where there is none: that would be one more operation in every step's graph.
    return z if logps.margin is None else z - logps.margin


def log_ratios_of_shared_length(logps: PairLogProbs, tail_weight: float) -> Sides:
    """h(y_w), h(y_l) with the tokens beyond the shorter completion's length multiplied by `tail_weight`.

    Raises:
        ValueError: there are no log-probs of those tokens, or no reference.
    """
    chosen, rejected = log_ratios(logps)
    tails = (logps.chosen_tail, logps.rejected_tail, logps.reference_chosen_tail, logps.reference_rejected_tail)
    if any(tail is None for tail in tails):
        raise ValueError("this loss weighs the tokens beyond the shorter completion: their log-probs are needed.")
    chosen_tail, rejected_tail, reference_chosen_tail, reference_rejected_tail = tails
    cut = 1.0 - tail_weight
    return Sides(
        chosen - cut * (chosen_tail - reference_chosen_tail),  # type: ignore[operator]
        rejected - cut * (rejected_tail - reference_rejected_tail),  # type: ignore[operator]
    )


def noisy_preference(z: mx.array, label_smoothing: float) -> mx.array:
    """Cross-entropy of σ(z) and a label that is wrong with probability ε."""
    return -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)


def output(losses: mx.array, rewards: Sides, compared: Sides) -> LossOutput:
    """`losses` (B,) with what is logged beside them, which takes no gradient: rewards, and the log-probs compared."""
    return LossOutput(losses, *(mx.stop_gradient(value) for value in (*rewards, *compared)))


def group_log_ratios(logps: GroupLogProbs) -> mx.array:
    """h: log π(y|x) - log π_ref(y|x) of every completion, (B, K); 0 where there is none.

    Raises:
        ValueError: there is no reference.
    """
    if logps.reference is None:
        raise ValueError("this loss compares with a reference model: the reference's log-probs are needed.")
    return logps.logps - logps.reference


def mean_group_logps(logps: GroupLogProbs) -> mx.array:
    """m: the length-normalised log-prob of every completion, (B, K); 0 where there is none."""
    # Where there is no completion there are 0 tokens, and 0/0 stays NaN in gradients whatever `where` leaves out.
    return logps.logps / mx.maximum(logps.tokens, 1.0)


def differences(values: mx.array) -> mx.array:
    """(B, K, K) of (B, K): [:, k, j] is that of k minus that of j."""
    return values[:, :, None] - values[:, None, :]


def is_worse(logps: GroupLogProbs) -> mx.array:
    """(B, K, K) bool: [:, k, j] is whether j is there and scores less than k, which is there too."""
    there = logps.present
    return (differences(logps.scores) > 0) & there[:, :, None] & there[:, None, :]


def is_best(logps: GroupLogProbs) -> mx.array:
    """(B, K) bool: which completions have their list's highest score."""
    return logps.present & ~is_worse(logps).any(axis=1)


def is_good(logps: GroupLogProbs) -> mx.array:
    """(B, K) bool: which completions are labelled good: 0 is the label of bad ones."""
    return logps.present & (logps.scores > 0)


def group_output(
    logps: GroupLogProbs, losses: mx.array, rewards: mx.array, zero: mx.array, compared: mx.array | None = None
) -> GroupLossOutput:
    """`losses`, (B, K) or (B,), with what is logged beside them, which takes no gradient.

    Args:
        logps: of the groups.
        losses: of each completion or of each list.
        rewards: of each completion, (B, K).
        zero: (1,), see `GroupLossOutput`.
        compared: the log-probs that the method compares; the sums by default.
    """
    if losses.ndim == 2:
        losses = mx.where(logps.present, losses, 0.0)
    logged = (rewards, logps.logps if compared is None else compared, zero)
    return GroupLossOutput(losses, *(mx.stop_gradient(value) for value in logged))


def output_with_implicit_rewards(logps: PairLogProbs, losses: mx.array, beta: float) -> LossOutput:
    """`losses` (B,) with DPO's implicit rewards β h(y) (Rafailov et al. 2023, section 4)."""
    return output(losses, log_ratios(logps).times(beta), Sides(logps.chosen, logps.rejected))
