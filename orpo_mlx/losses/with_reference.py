"""Losses that compare the policy with a reference model: pure functions of `PairLogProbs`. No model, no data, no I/O.

Each returns per-pair losses; the batch's loss is their mean. x is the prompt, y_w the chosen and y_l the rejected
completion, |y| its number of tokens, π the policy, π_ref the reference. s(y) = log π(y|x) is summed over completion
tokens, h(y) = log π(y|x) - log π_ref(y|x), z = β(h(y_w) - h(y_l)); σ is the logistic function, logs are natural (nats).
u = π/π_ref, so h = log u. Hyper-parameters are keyword-only. The reward logged is the implicit one, β h(y), where the
loss does not say another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated

import mlx.core as mx

from orpo_mlx.losses.numerics import log_sigmoid, positive_part, power_gain
from orpo_mlx.losses.registry import NoiseRate, NonNegative, Positive, Range, Share, UnitInterval, preference_loss
from orpo_mlx.losses.terms import (
    Sides,
    less_margin,
    log_ratios,
    log_ratios_of_shared_length,
    loss_margin,
    margin,
    mean_log_ratios,
    noisy_preference,
    output,
    output_with_implicit_rewards,
    reference_logps,
)
from orpo_mlx.types import LossOutput, PairLogProbs, Wanted

reference_loss = partial(preference_loss, needs_reference=True)
F_DPO = "Wang et al. 2023, arXiv:2309.16240"
LoggableNoiseRate = Annotated[
    float, Range("above 0 and below 0.5 for exo_pair, whose loss has log ε in it", lambda value: 0 < value < 0.5)
]


@reference_loss(
    equation="-(1-ε) log σ(z) - ε log σ(-z), z = β(h_w - h_l)",
    source="Rafailov et al. 2023, arXiv:2305.18290",
    takes_margin=True,
)
def dpo(logps: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: NoiseRate = 0.0) -> LossOutput:
    """DPO (eq. 7) at ε = 0; above 0 it is conservative DPO (Mitchell 2023), with a loss margin ODPO (Amini 2024)."""
    z = less_margin(logps, beta * margin(logps))
    return output_with_implicit_rewards(logps, noisy_preference(z, label_smoothing), beta)


@reference_loss(
    equation="-log σ(β(h_w/|y_w| - h_l/|y_l|))", source="Lambert et al. 2024, arXiv:2411.15124", takes_margin=True
)
def sigmoid_norm(logps: PairLogProbs, *, beta: Positive = 0.1) -> LossOutput:
    """Length-normalised DPO (Tülu 3, eq. 5)."""
    chosen, rejected = mean_log_ratios(logps)
    z = less_margin(logps, beta * (chosen - rejected))
    return output_with_implicit_rewards(logps, -log_sigmoid(z), beta)


@reference_loss(
    equation="max(0, 1 - z), z = β(h_w - h_l)", source="Liu et al. 2023, arXiv:2309.06657", takes_margin=True
)
def hinge(logps: PairLogProbs, *, beta: Positive = 0.1) -> LossOutput:
    """Hinge on the DPO margin (RSO, table 1)."""
    wanted = 1.0 + loss_margin(logps)
    return output_with_implicit_rewards(logps, positive_part(wanted - beta * margin(logps)), beta)


@reference_loss(equation="(h_w/|y_w| - h_l/|y_l| - 1/(2β))²", source="Azar et al. 2023, arXiv:2310.12036")
def ipo(logps: PairLogProbs, *, beta: Positive = 0.1) -> LossOutput:
    """IPO (eq. 17; β is its τ). Means over tokens, which is the authors' correction to the sums the paper prints."""
    chosen, rejected = mean_log_ratios(logps)
    return output_with_implicit_rewards(logps, (chosen - rejected - 1 / (2 * beta)) ** 2, beta)


@reference_loss(
    equation="(ε log σ(-z) - (1-ε) log σ(z))/(1 - 2ε), z = β(h_w - h_l)",
    source="Chowdhury et al. 2024, arXiv:2403.00409",
)
def robust(logps: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: NoiseRate = 0.1) -> LossOutput:
    """Robust DPO (eq. 12)."""
    z = beta * margin(logps)
    losses = (label_smoothing * log_sigmoid(-z) - (1 - label_smoothing) * log_sigmoid(z)) / (1 - 2 * label_smoothing)
    return output_with_implicit_rewards(logps, losses, beta)


@reference_loss(equation="KL(σ(±z) ‖ (1-ε, ε)), z = β(h_w - h_l)", source="Ji et al. 2024, arXiv:2402.00856")
def exo_pair(logps: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: LoggableNoiseRate = 1e-3) -> LossOutput:
    """EXO for pairs (eq. 16): σ(z)(log σ(z) - log(1-ε)) + σ(-z)(log σ(-z) - log ε). ε must be above 0."""
    z = beta * margin(logps)
    up = log_sigmoid(z)
    down = log_sigmoid(-z)
    # log1p: 1 - ε in float would lose the digits of a small ε.
    losses = mx.exp(up) * (up - math.log1p(-label_smoothing)) + mx.exp(down) * (down - math.log(label_smoothing))
    return output_with_implicit_rewards(logps, losses, beta)


@reference_loss(equation="-log σ(βh_w) - ½ log σ(-βh_w) - ½ log σ(-βh_l)", source="Chen et al. 2024, arXiv:2402.05369")
def nca_pair(logps: PairLogProbs, *, beta: Positive = 0.1) -> LossOutput:
    """NCA for pairs (eq. 11)."""
    chosen, rejected = log_ratios(logps).times(beta)
    losses = -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)
    return output_with_implicit_rewards(logps, losses, beta)


@reference_loss(equation="-log σ(βh_w - δ) - log σ(δ - βh_l)", source="Jung et al. 2024, arXiv:2404.04656")
def bco_pair(logps: PairLogProbs, *, beta: Positive = 0.1, delta: NonNegative = 0.0) -> LossOutput:
    """BCO for pairs (eq. 6).

    δ is the paper's reward shift, a constant here (0: none), so that a pair's loss does not depend on its batch.
    """
    chosen, rejected = log_ratios(logps).times(beta)
    losses = -log_sigmoid(chosen - delta) - log_sigmoid(-(rejected - delta))
    return output_with_implicit_rewards(logps, losses, beta)


@reference_loss(equation="(h_w - 1/(2β))² + (h_l + 1/(2β))²", source="Wu et al. 2024, arXiv:2405.00675")
def sppo_hard(logps: PairLogProbs, *, beta: Positive = 0.1) -> LossOutput:
    """SPPO with hard labels (eq. 4.7 with P = 1 and 0; β is the inverse of its η)."""
    chosen, rejected = log_ratios(logps)
    return output_with_implicit_rewards(logps, (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2, beta)


@reference_loss(
    equation="dpo, z = β(sort(s_w - s_l) - sort(ref))",
    source="Melnyk et al. 2024, arXiv:2406.05882",
    couples_pairs=True,
    takes_weights=False,
)
def aot(logps: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: NoiseRate = 0.0) -> LossOutput:
    """AOT, paired (section 3): as `dpo`, between policy margins and reference margins, each sorted over the batch."""
    reference = reference_logps(logps)
    # Log-ratios before margins: the sums are large and the differences small, so this order keeps their digits.
    order = mx.stop_gradient(mx.argsort(logps.chosen - logps.rejected))
    reference_order = mx.argsort(reference.chosen - reference.rejected)
    chosen = logps.chosen[order] - reference.chosen[reference_order]
    rejected = logps.rejected[order] - reference.rejected[reference_order]
    losses = noisy_preference(beta * (chosen - rejected), label_smoothing)
    return output_with_implicit_rewards(logps, losses, beta)


@reference_loss(
    equation="dpo, z = β(sort(h_w) - sort(h_l))",
    source="Melnyk et al. 2024, arXiv:2406.05882",
    couples_pairs=True,
    takes_weights=False,
)
def aot_unpaired(logps: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: NoiseRate = 0.0) -> LossOutput:
    """AOT, unpaired (section 3): as `dpo`, between the sides' log-ratios, each sorted over the batch."""
    # Not mx.sort, whose gradient MLX 0.31 gives to the wrong pairs.
    chosen, rejected = (side[mx.stop_gradient(mx.argsort(side))] for side in log_ratios(logps))
    losses = noisy_preference(beta * (chosen - rejected), label_smoothing)
    return output_with_implicit_rewards(logps, losses, beta)


@reference_loss(equation="1 - σ(βh_w) + σ(βh_l)", source="D'Oosterlinck et al. 2024, arXiv:2408.06266")
def apo_zero(logps: PairLogProbs, *, beta: Positive = 0.1) -> LossOutput:
    """APO-zero (eq. 7)."""
    chosen, rejected = log_ratios(logps).times(beta)
    # σ(-x) for 1 - σ(x), which is 0 in float32 beyond x = 17, and its gradient with it.
    return output_with_implicit_rewards(logps, mx.sigmoid(-chosen) + mx.sigmoid(rejected), beta)


@reference_loss(equation="σ(βh_w) + 1 - σ(z), z = β(h_w - h_l)", source="D'Oosterlinck et al. 2024, arXiv:2408.06266")
def apo_down(logps: PairLogProbs, *, beta: Positive = 0.1) -> LossOutput:
    """APO-down (eq. 8)."""
    chosen, rejected = log_ratios(logps).times(beta)
    return output_with_implicit_rewards(logps, mx.sigmoid(chosen) + mx.sigmoid(rejected - chosen), beta)


@reference_loss(equation="-σ(-z/τ) log σ(z) + σ(z/τ) e⁻ᶻ, z = β(h_w - h_l)", source="Lu et al. 2024, arXiv:2406.08414")
def discopop(logps: PairLogProbs, *, beta: Positive = 0.05, tau: UnitInterval = 0.05) -> LossOutput:
    """DiscoPOP (eq. 5). Finite for every z while τ < 1."""
    z = beta * margin(logps)
    # The second term as e^(log σ(z/τ) - z), since σ(z/τ) underflows where e⁻ᶻ overflows.
    losses = mx.exp(log_sigmoid(z / tau) - z) - mx.exp(log_sigmoid(-z / tau)) * log_sigmoid(z)
    return output_with_implicit_rewards(logps, losses, beta)


@reference_loss(equation="-log σ(β(h_w - h_l - δ max(0, -h_w)))", source="Pal et al. 2024, arXiv:2402.13228")
def dpop(logps: PairLogProbs, *, beta: Positive = 0.1, delta: NonNegative = 50.0) -> LossOutput:
    """DPO-Positive (eq. 3; δ is its λ)."""
    chosen, rejected = log_ratios(logps)
    losses = -log_sigmoid(beta * (chosen - rejected - delta * positive_part(-chosen)))
    return output_with_implicit_rewards(logps, losses, beta)


@reference_loss(equation="-log σ(β(f(h_w) - f(h_l))), f(h) = 1 - e⁻ʰ", source=F_DPO, takes_margin=True)
def dpo_forward_kl(logps: PairLogProbs, *, beta: Positive = 0.1) -> LossOutput:
    """DPO under the forward KL divergence (f-DPO, table 1): f'(u) = 1 - 1/u. The reward logged is β f'(u)."""
    return _under_divergence(logps, partial(power_gain, power=1.0), beta)


@reference_loss(equation="-log σ(β(f(h_w) - f(h_l))), f(h) = log 2σ(h)", source=F_DPO, takes_margin=True)
def dpo_js(logps: PairLogProbs, *, beta: Positive = 0.1) -> LossOutput:
    """DPO under the Jensen-Shannon divergence (f-DPO, table 1): f'(u) = log 2u/(1 + u). Reward logged: β f'(u)."""
    return _under_divergence(logps, lambda h: math.log(2) + log_sigmoid(h), beta)


@reference_loss(equation="-log σ(β(f(h_w) - f(h_l))), f(h) = (1 - exp(-αh))/α", source=F_DPO, takes_margin=True)
def dpo_alpha(logps: PairLogProbs, *, beta: Positive = 0.1, alpha: UnitInterval = 0.5) -> LossOutput:
    """DPO under an α-divergence (f-DPO, table 1): f'(u) = (1 - u^-α)/α, between reverse (α → 0) and forward KL (α → 1).

    TRL's `f_alpha_divergence_coef` is 1 - α. The reward logged is β f'(u).
    """
    return _under_divergence(logps, partial(power_gain, power=alpha), beta)


@reference_loss(
    equation="-v_w v_l log σ(β(h_w - h_l)), v = exp(mean of log p(y_t) - log Σ_v p(v)²)",
    source="Zhou et al. 2024, arXiv:2406.11827",
    wanted=Wanted(alignment=True),
    takes_margin=True,
)
def wpo(logps: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: NoiseRate = 0.0) -> LossOutput:
    """WPO (eqs. 2 and 3, sampled alignment): DPO with pairs weighted by how likely the policy would sample them.

    The weights take no gradient.

    Raises:
        ValueError: there are no alignments.
    """
    if logps.chosen_alignment is None or logps.rejected_alignment is None:
        raise ValueError("this loss weighs pairs by their alignment: chosen_alignment and rejected_alignment needed.")
    weights = mx.stop_gradient(mx.exp(logps.chosen_alignment + logps.rejected_alignment))
    chosen, rejected = log_ratios(logps)
    z = less_margin(logps, beta * (chosen - rejected))
    return output_with_implicit_rewards(logps, weights * noisy_preference(z, label_smoothing), beta)


@reference_loss(
    equation="-log σ(β(h'_w - h'_l)), h' = h of the first min(|y_w|, |y_l|) tokens + λ h of the rest",
    source="Liu et al. 2024, arXiv:2409.06411",
    wanted=Wanted(tails=True),
    takes_margin=True,
)
def ld_dpo(
    logps: PairLogProbs,
    *,
    beta: Positive = 0.1,
    ld_alpha: Share = 0.5,
    label_smoothing: NoiseRate = 0.0,
) -> LossOutput:
    """Length-desensitised DPO; λ is the paper's α: 1 is DPO, 0 leaves the longer completion's further tokens out.

    The reward logged is β h'.
    """
    ratios = log_ratios_of_shared_length(logps, ld_alpha)
    z = less_margin(logps, beta * (ratios.chosen - ratios.rejected))
    compared = Sides(logps.chosen, logps.rejected)
    return output(noisy_preference(z, label_smoothing), ratios.times(beta), compared)


def _under_divergence(logps: PairLogProbs, derivative: Callable[[mx.array], mx.array], beta: float) -> LossOutput:
    """DPO with f'(u) for the log-ratio; `derivative` takes log u."""
    rewards = Sides(*(derivative(side) for side in log_ratios(logps))).times(beta)
    z = less_margin(logps, rewards.chosen - rewards.rejected)
    return output(-log_sigmoid(z), rewards, Sides(logps.chosen, logps.rejected))
