"""Losses of ranked lists of completions: pure functions of `GroupLogProbs`. No model, no data, no I/O.

Each returns a loss for each list; the batch's loss is their mean. y_1 ... y_K are a prompt's completions from the best
to the worst, ψ their scores; h(y) = log π(y|x) - log π_ref(y|x), m(y) = log π(y|x) / |y|; σ is the logistic function,
logs are natural (nats). Completions of one score are not compared with each other: they are in no sum below each
other's, so that a list of two is one pair, and no loss depends on the order in which they stand.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from orpo_mlx.losses.numerics import log_sigmoid
from orpo_mlx.losses.registry import LIST, NonNegative, Positive, preference_loss
from orpo_mlx.losses.terms import differences, group_log_ratios, group_output, is_best, is_worse, mean_group_logps
from orpo_mlx.types import GroupLogProbs, GroupLossOutput

listwise_loss = partial(preference_loss, unit=LIST)


@listwise_loss(
    equation="-Σ_k log(e^{βh_k} / Σ_{j≥k} e^{βh_j})",
    source="Rafailov et al. 2023, arXiv:2305.18290",
    needs_reference=True,
)
def pl(logps: GroupLogProbs, *, beta: Positive = 0.1) -> GroupLossOutput:
    """Plackett-Luce DPO (appendix A.3, eq. 20); of two completions it is `dpo`."""
    rewards = beta * group_log_ratios(logps)
    losses = above_worse(logps, rewards[:, None, :] - rewards[:, :, None])
    return group_output(logps, losses, rewards, mx.zeros(1, rewards.dtype))


@listwise_loss(
    equation="-Σ_{ψ_i>ψ_j} Δ_ij log σ(β(h_i - h_j)), Δ = |2^ψ_i - 2^ψ_j| |1/log(1+τ_i) - 1/log(1+τ_j)|",
    source="Liu et al. 2024, arXiv:2402.01878",
    needs_reference=True,
)
def lipo(logps: GroupLogProbs, *, beta: Positive = 0.1) -> GroupLossOutput:
    """LiPO-λ (eqs. 9 and 10). τ is a completion's rank by βh, from 1, without gradient; where some are equal, as all
    are where the policy is the reference, Δ is its mean over the orders in which they could be ranked.

    The paper's ψ lie in [0, 1]: scores are brought there over each list, its worst to 0 and its best to 1.
    """
    rewards = beta * group_log_ratios(logps)
    gain = mx.power(2.0, scores_in_unit_interval(logps))
    weight = mx.stop_gradient(mx.abs(differences(gain)) * discounts_apart(logps, rewards))
    compared = weight * log_sigmoid(differences(rewards))
    losses = -mx.where(is_worse(logps), compared, 0.0).sum(axis=(1, 2))
    return group_output(logps, losses, rewards, mx.zeros(1, rewards.dtype))


@listwise_loss(
    equation="-Σ_k log(e^{m_k/T_k} / (e^{m_k/T_k} + Σ_{j>k} e^{m_j(ψ_k - ψ_j)})) + α NLL_1, 1/T_k = max_j(ψ_k - ψ_j)",
    source="Song et al. 2023, arXiv:2306.17492",
)
def pro(logps: GroupLogProbs, *, alpha: NonNegative = 0.05) -> GroupLossOutput:
    """PRO (eqs. 7, 9 and 10; α is its β, for which the authors take 0.05 (K - 1)²). The reward logged is m.

    Differences of scores are the inverse temperatures, so their unit counts.
    """
    means = mean_group_logps(logps)
    # (B, k, j): how far k scores above j; of completions that are not worse, 0.
    above = mx.where(is_worse(logps), differences(logps.scores), 0.0)
    own = above.max(axis=-1)
    losses = above_worse(logps, means[:, None, :] * above - (means * own)[:, :, None])
    best = is_best(logps)
    nll = -mx.where(best, means, 0.0).sum(axis=1) / best.sum(axis=1)
    return group_output(logps, losses + alpha * nll, means, mx.zeros(1, means.dtype), compared=means)


def above_worse(logps: GroupLogProbs, exponents: mx.array) -> mx.array:
    """(B,): Σ_k log(1 + Σ_j e^x_kj), j over the completions that score less than k, x = `exponents` (B, K, K)."""
    worse = is_worse(logps)
    # Of -inf alone logsumexp has a gradient of NaN: one with none below it keeps its exponents until the end.
    some = worse.any(axis=-1)
    # The largest apart, so that nothing overflows; -log σ(-x) is log(1 + eˣ), exact at both ends.
    total = mx.logsumexp(mx.where(worse | ~some[:, :, None], exponents, -mx.inf), axis=-1)
    return mx.where(some, -log_sigmoid(-mx.where(some, total, 0.0)), 0.0).sum(axis=1)


def discounts_apart(logps: GroupLogProbs, values: mx.array) -> mx.array:
    """(B, K, K): |1/log(1+τ_k) - 1/log(1+τ_j)|, τ the ranks by `values` from 1; the mean over all orders of equals."""
    apart = differences(mx.stop_gradient(values))
    there = logps.present[:, None, :]
    above = ((apart < 0) & there).sum(axis=-1, keepdims=True)
    count = ((apart == 0) & there).sum(axis=-1, keepdims=True)
    ranks = mx.arange(1, values.shape[1] + 1)
    # (B, k, τ): the ranks that k and its equals have between them.
    own = (ranks > above) & (ranks <= above + count)
    discounts = 1 / mx.log1p(ranks.astype(values.dtype))
    # What is not there may have no ranks, and 0/0 stays NaN in gradients whatever `where` leaves out.
    means = mx.where(own, discounts, 0.0).sum(axis=-1) / mx.maximum(count[..., 0], 1)
    both = own[..., :, None] & own[..., None, :]
    total = mx.where(both, mx.abs(discounts[:, None] - discounts), 0.0).sum(axis=(-1, -2))
    # Two equals have two different ones of these ranks. Others' ranks lie wholly above or below: the means will do.
    among = total[..., None] / mx.maximum(count * (count - 1), 1)
    return mx.where(apart == 0, among, mx.abs(differences(means)))


def scores_in_unit_interval(logps: GroupLogProbs) -> mx.array:
    """(B, K): scores of each list from 0, its lowest, to 1, its highest."""
    low = mx.where(logps.present, logps.scores, mx.inf).min(axis=1, keepdims=True)
    high = mx.where(logps.present, logps.scores, -mx.inf).max(axis=1, keepdims=True)
    # Scores that are all equal would be 0/0; nothing of such a list is compared.
    return mx.where(logps.present, (logps.scores - low) / mx.maximum(high - low, 1e-30), 0.0)
