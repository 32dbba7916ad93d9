"""Losses of single completions that are good or bad: pure functions of `GroupLogProbs`. No model, no data, no I/O.

Each returns a loss for each completion; the batch's loss is their mean. x is the prompt, y a completion, π the policy,
π_ref the reference, h = log π(y|x) - log π_ref(y|x) summed over completion tokens; σ is the logistic function, logs are
natural (nats). Hyper-parameters are keyword-only. The reward logged is the implicit one, β h.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from orpo_mlx.losses.numerics import log_sigmoid
from orpo_mlx.losses.registry import COMPLETION, NonNegative, Positive, preference_loss
from orpo_mlx.losses.terms import group_log_ratios, group_output, is_good
from orpo_mlx.types import GroupLogProbs, GroupLossOutput, Wanted

unpaired_loss = partial(preference_loss, unit=COMPLETION, needs_reference=True)


@unpaired_loss(
    equation="good: λ_D(1 - σ(β(h - KL))), bad: λ_U(1 - σ(β(KL - h)))",
    source="Ethayarajh et al. 2024, arXiv:2402.01306",
    wanted=Wanted(kl=True),
)
def kto(
    logps: GroupLogProbs,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> GroupLossOutput:
    """KTO (eqs. 7 and 8). KL is max(0, mean of h over prompts with another prompt's completion), without gradient.

    Raises:
        ValueError: there is no estimate of KL.
    """
    if logps.kl is None:
        raise ValueError("kto measures rewards from an estimate of KL(π ‖ π_ref), which is needed.")
    h = group_log_ratios(logps)
    kl = mx.stop_gradient(mx.maximum(logps.kl, 0.0))
    # σ(-x) for 1 - σ(x), which rounds to 0 beyond x = 17 in float32, and its gradient with it.
    losses = mx.where(
        is_good(logps),
        desirable_weight * mx.sigmoid(-beta * (h - kl)),
        undesirable_weight * mx.sigmoid(-beta * (kl - h)),
    )
    return group_output(logps, losses, beta * h, beta * kl)


@unpaired_loss(equation="good: λ_D(1 - σ(βh)), bad: λ_U σ(βh)", source="D'Oosterlinck et al. 2024, arXiv:2408.06266")
def apo_zero_unpaired(
    logps: GroupLogProbs,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> GroupLossOutput:
    """APO-zero (eq. 7), a term for each completion alone, with KTO's weights."""
    h = group_log_ratios(logps)
    good, bad = desirable_weight * mx.sigmoid(-beta * h), undesirable_weight * mx.sigmoid(beta * h)
    losses = mx.where(is_good(logps), good, bad)
    return group_output(logps, losses, beta * h, mx.zeros(1, h.dtype))


@unpaired_loss(
    equation="good: -log σ(βh - δ), bad: -log σ(δ - βh), δ: running mean of βh",
    source="Jung et al. 2024, arXiv:2404.04656",
    couples_pairs=True,
    wanted=Wanted(running=True),
)
def bco(logps: GroupLogProbs, *, beta: Positive = 0.1) -> GroupLossOutput:
    """BCO (eqs. 6 and 12). δ is the mean of all rewards so far, those of this step included, without gradient; every
    completion counts the same, as in TRL.

    Raises:
        ValueError: there is no mean of the steps before.
    """
    if logps.running is None:
        raise ValueError("bco measures rewards from their running mean, which is needed.")
    rewards = beta * group_log_ratios(logps)
    now = mx.stop_gradient(mx.where(logps.present, rewards, 0.0))
    count = logps.present.sum().astype(now.dtype)
    before, steps = logps.running[:1], logps.running[1:]
    # In this order, so that an infinite number of rewards before leaves their mean as it is.
    shift = before + (now.sum() / count - before) * (count / (steps + count))
    losses = -log_sigmoid(mx.where(is_good(logps), rewards - shift, shift - rewards))
    return group_output(logps, losses, rewards, shift)
