"""Losses that look at the policy alone: pure functions of `PairLogProbs`. No model, no data, no I/O.

Each returns per-pair losses; the batch's loss is their mean. x is the prompt, y_w the chosen and y_l the rejected
completion, |y| its number of tokens, π the policy. s(y) = log π(y|x) is summed over completion tokens, m(y) = s(y)/|y|;
σ is the logistic function, logs are natural (nats). Hyper-parameters are keyword-only.
"""

from __future__ import annotations

import mlx.core as mx

from orpo_mlx.losses.numerics import log_sigmoid, positive_part, power_gain
from orpo_mlx.losses.registry import AnyNumber, NonNegative, Positive, preference_loss
from orpo_mlx.losses.terms import Sides, less_margin, log_odds_ratio, loss_margin, mean_logps, output
from orpo_mlx.types import LossOutput, PairLogProbs


@preference_loss(equation="NLL_w - β log σ(log OR)", source="Hong et al. 2024, arXiv:2403.07691", takes_margin=True)
def orpo(logps: PairLogProbs, *, beta: Positive = 0.1) -> LossOutput:
    """ORPO (eqs. 6 and 7 of the paper; β is its λ). P is length-normalised, exp(m(y)). The reward logged is β m(y)."""
    means = mean_logps(logps)
    losses = logps.nll - beta * log_sigmoid(less_margin(logps, log_odds_ratio(logps)))
    return output(losses, means.times(beta), means)


@preference_loss(equation="-log σ(log OR) + β(m_l - m_w)", source="course chapter on ORPO")
def orpo_style(logps: PairLogProbs, *, beta: Positive = 0.5) -> LossOutput:
    """The course chapter's ORPO: preference term plus style term; no likelihood term. P as in `orpo`.

    The style term is linear and has no minimum, so a long run at a high learning rate drives both sides' probability
    down.
    """
    means = mean_logps(logps)
    losses = -log_sigmoid(log_odds_ratio(logps)) + beta * (means.rejected - means.chosen)
    return output(losses, means.times(beta), means)


@preference_loss(equation="-log σ(β(m_w - m_l) - γ)", source="Meng et al. 2024, arXiv:2405.14734", takes_margin=True)
def simpo(logps: PairLogProbs, *, beta: Positive = 2.0, gamma: NonNegative = 1.0) -> LossOutput:
    """SimPO (eq. 6)."""
    means = mean_logps(logps)
    z = less_margin(logps, beta * (means.chosen - means.rejected) - gamma)
    return output(-log_sigmoid(z), means.times(beta), means)


@preference_loss(
    equation="-log σ(β(r_w - r_l) - γ), r = (1 - exp(-α m))/α",
    source="Gupta et al. 2025, arXiv:2501.03884",
    takes_margin=True,
)
def alphapo(
    logps: PairLogProbs,
    *,
    beta: Positive = 2.0,
    gamma: NonNegative = 1.0,
    alpha: AnyNumber = 0.25,
) -> LossOutput:
    """AlphaPO: SimPO with another shape of reward, which is SimPO's at α = 0. Reward logged: β r."""
    means = mean_logps(logps)
    rewards = Sides(*(power_gain(side, alpha) for side in means)).times(beta)
    z = less_margin(logps, rewards.chosen - rewards.rejected - gamma)
    return output(-log_sigmoid(z), rewards, means)


@preference_loss(
    equation="-log σ(β(s_w - s_l)) + α NLL_w", source="Xu et al. 2024, arXiv:2401.08417", takes_margin=True
)
def cpo(logps: PairLogProbs, *, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> LossOutput:
    """CPO (eqs. 4 and 5). Sums in the preference term; the NLL is per token, as in the authors' code."""
    sums = Sides(logps.chosen, logps.rejected)
    z = less_margin(logps, beta * (logps.chosen - logps.rejected))
    losses = -log_sigmoid(z) + alpha * logps.nll
    return output(losses, sums.times(beta), sums)


@preference_loss(equation="max(0, m_l - m_w) - α s_w", source="Yuan et al. 2023, arXiv:2304.05302")
def rrhf(logps: PairLogProbs, *, alpha: NonNegative = 1.0) -> LossOutput:
    """RRHF (eqs. 2 to 4) for two responses."""
    means = mean_logps(logps)
    losses = positive_part(means.rejected - means.chosen) - alpha * logps.chosen
    return output(losses, means, means)


@preference_loss(
    equation="max(0, δ - s_w + s_l) - α s_w", source="Zhao et al. 2023, arXiv:2305.10425", takes_margin=True
)
def slic(logps: PairLogProbs, *, delta: NonNegative = 1.0, alpha: NonNegative = 1.0) -> LossOutput:
    """SLiC-HF (eq. 1), the chosen side as target."""
    sums = Sides(logps.chosen, logps.rejected)
    wanted = delta + loss_margin(logps)
    losses = positive_part(wanted - logps.chosen + logps.rejected) - alpha * logps.chosen
    return output(losses, sums, sums)


@preference_loss(equation="exp(m_l) - exp(m_w)", source="Xiao et al. 2025, arXiv:2502.00883")
def simper(logps: PairLogProbs) -> LossOutput:
    """SimPER: the difference of inverse perplexities, exp(m(y)). The reward logged is the mean log-prob."""
    means = mean_logps(logps)
    return output(mx.exp(means.rejected) - mx.exp(means.chosen), means, means)


@preference_loss(equation="NLL_w", source="maximum likelihood", one_sided=True)
def sft(logps: PairLogProbs) -> LossOutput:
    """Supervised fine-tuning on the chosen side. The reward logged is the mean log-prob."""
    means = mean_logps(logps)
    return output(logps.nll, means, means)
