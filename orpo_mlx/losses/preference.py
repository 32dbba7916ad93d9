"""Preference losses: pure functions of `PairLogProbs`. No model, no data, no I/O.

Each returns per-pair losses; the batch's loss is their mean. x is the prompt, y_w the chosen and y_l the rejected
completion, |y| its number of tokens, π the policy, π_ref the reference, σ the logistic function. With s(y) = log π(y|x)
summed over completion tokens, m(y) = s(y)/|y|, and h(y) = log π(y|x) - log π_ref(y|x). All logs are natural (nats).
Hyper-parameters are keyword-only.
"""

from __future__ import annotations

import math

import mlx.core as mx

from orpo_mlx.losses.numerics import log_odds, log_sigmoid
from orpo_mlx.types import LossOutput, PairLogProbs


def mean_logps(logps: PairLogProbs) -> tuple[mx.array, mx.array]:
    """m(y_w), m(y_l): the length-normalised log-probs."""
    return logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens


def log_odds_ratio(logps: PairLogProbs) -> mx.array:
    """log OR(y_w, y_l) = log odds(y_w|x) - log odds(y_l|x) with length-normalised P (Hong et al. 2024, eq. 5)."""
    chosen, rejected = mean_logps(logps)
    return log_odds(chosen) - log_odds(rejected)


def orpo(logps: PairLogProbs, *, beta: float = 0.1) -> LossOutput:
    """ORPO (Hong et al. 2024, eqs. 6 and 7): L = NLL(y_w) - β log σ(log OR(y_w, y_l)).

    P is the length-normalised probability, exp(m(y)). β is the paper's λ. The reward logged is β m(y).
    """
    chosen, rejected = mean_logps(logps)
    losses = logps.nll - beta * log_sigmoid(log_odds_ratio(logps))
    return _output(losses, beta * chosen, beta * rejected, chosen, rejected)


def orpo_style(logps: PairLogProbs, *, beta: float = 0.5) -> LossOutput:
    """The course chapter's ORPO: L = -log σ(log OR(y_w, y_l)) + β (m(y_l) - m(y_w)).

    Preference term plus style term; no likelihood term. P is length-normalised as in `orpo`. The style term is
    linear and has no minimum, so a long run at a high learning rate drives both sides' probability down.
    """
    chosen, rejected = mean_logps(logps)
    losses = -log_sigmoid(log_odds_ratio(logps)) + beta * (rejected - chosen)
    return _output(losses, beta * chosen, beta * rejected, chosen, rejected)


def simpo(logps: PairLogProbs, *, beta: float = 2.0, gamma: float = 1.0) -> LossOutput:
    """SimPO (Meng, Xia, Chen 2024, eq. 6): L = -log σ(β m(y_w) - β m(y_l) - γ)."""
    chosen, rejected = mean_logps(logps)
    losses = -log_sigmoid(beta * (chosen - rejected) - gamma)
    return _output(losses, beta * chosen, beta * rejected, chosen, rejected)


def cpo(logps: PairLogProbs, *, beta: float = 0.1, alpha: float = 1.0) -> LossOutput:
    """CPO (Xu et al. 2024, eqs. 4 and 5): L = -log σ(β s(y_w) - β s(y_l)) + α NLL(y_w).

    Log-probs are sums in the preference term; the NLL is per token, as in the authors' code.
    """
    losses = -log_sigmoid(beta * (logps.chosen - logps.rejected)) + alpha * logps.nll
    return _output(losses, beta * logps.chosen, beta * logps.rejected, logps.chosen, logps.rejected)


def rrhf(logps: PairLogProbs, *, alpha: float = 1.0) -> LossOutput:
    """RRHF (Yuan et al. 2023, eqs. 2 to 4) for two responses: L = max(0, m(y_l) - m(y_w)) - α s(y_w)."""
    chosen, rejected = mean_logps(logps)
    losses = _positive(rejected - chosen) - alpha * logps.chosen
    return _output(losses, chosen, rejected, chosen, rejected)


def slic(logps: PairLogProbs, *, delta: float = 1.0, alpha: float = 1.0) -> LossOutput:
    """SLiC-HF (Zhao et al. 2023, eq. 1): L = max(0, δ - s(y_w) + s(y_l)) - α s(y_w), the chosen side as target."""
    losses = _positive(delta - logps.chosen + logps.rejected) - alpha * logps.chosen
    return _output(losses, logps.chosen, logps.rejected, logps.chosen, logps.rejected)


def sft(logps: PairLogProbs) -> LossOutput:
    """Supervised fine-tuning on the chosen side: L = NLL(y_w). The reward logged is the mean log-prob."""
    chosen, rejected = mean_logps(logps)
    return _output(logps.nll, chosen, rejected, chosen, rejected)


def dpo(logps: PairLogProbs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> LossOutput:
    """DPO (Rafailov et al. 2023, eq. 7): L = -(1-ε) log σ(z) - ε log σ(-z), z = β(h(y_w) - h(y_l)).

    ε = 0 is the paper's loss; above 0 it is conservative DPO (Mitchell 2023).

    Log-probs are sums over completion tokens. The implicit reward is β h(y).
    """
    z = beta * _margin(logps)
    losses = -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)
    return _rewarded(logps, losses, beta)


def sigmoid_norm(logps: PairLogProbs, *, beta: float = 0.1) -> LossOutput:
    """Length-normalised DPO (Lambert et al. 2024, Tülu 3, eq. 5): L = -log σ(β (h(y_w)/|y_w| - h(y_l)/|y_l|))."""
    chosen, rejected = _log_ratios(logps)
    losses = -log_sigmoid(beta * (chosen / logps.chosen_tokens - rejected / logps.rejected_tokens))
    return _rewarded(logps, losses, beta)


def hinge(logps: PairLogProbs, *, beta: float = 0.1) -> LossOutput:
    """Hinge on the DPO margin (Liu et al. 2023, RSO, table 1): L = max(0, 1 - β (h(y_w) - h(y_l)))."""
    return _rewarded(logps, _positive(1.0 - beta * _margin(logps)), beta)


def ipo(logps: PairLogProbs, *, beta: float = 0.1) -> LossOutput:
    """IPO (Azar et al. 2023, eq. 17): L = (h(y_w)/|y_w| - h(y_l)/|y_l| - 1/(2β))², β the paper's τ.

    Log-ratios are means over tokens, which is the authors' correction to the sums the paper prints.
    """
    chosen, rejected = _log_ratios(logps)
    margin = chosen / logps.chosen_tokens - rejected / logps.rejected_tokens
    return _rewarded(logps, (margin - 1 / (2 * beta)) ** 2, beta)


def robust(logps: PairLogProbs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> LossOutput:
    """Robust DPO (Chowdhury et al. 2024, eq. 12): L = (ε log σ(-z) - (1-ε) log σ(z)) / (1 - 2ε), z as in `dpo`."""
    z = beta * _margin(logps)
    losses = (label_smoothing * log_sigmoid(-z) - (1 - label_smoothing) * log_sigmoid(z)) / (1 - 2 * label_smoothing)
    return _rewarded(logps, losses, beta)


def exo_pair(logps: PairLogProbs, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> LossOutput:
    """EXO for pairs (Ji et al. 2024, eq. 16): L = KL(σ(±z) ‖ (1-ε, ε)), z = β(h(y_w) - h(y_l)).

    = σ(z)(log σ(z) - log(1-ε)) + σ(-z)(log σ(-z) - log ε). ε must be above 0.
    """
    z = beta * _margin(logps)
    up, down = log_sigmoid(z), log_sigmoid(-z)
    losses = mx.exp(up) * (up - math.log1p(-label_smoothing)) + mx.exp(down) * (down - math.log(label_smoothing))
    return _rewarded(logps, losses, beta)


def nca_pair(logps: PairLogProbs, *, beta: float = 0.1) -> LossOutput:
    """NCA for pairs (Chen et al. 2024, eq. 11): L = -log σ(β h(y_w)) - ½ log σ(-β h(y_w)) - ½ log σ(-β h(y_l))."""
    chosen, rejected = (beta * ratio for ratio in _log_ratios(logps))
    losses = -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)
    return _rewarded(logps, losses, beta)


def bco_pair(logps: PairLogProbs, *, beta: float = 0.1, delta: float = 0.0) -> LossOutput:
    """BCO for pairs (Jung et al. 2024, eq. 6): L = -log σ(β h(y_w) - δ) - log σ(-(β h(y_l) - δ)).

    δ is the paper's reward shift, a constant here (0: none), so that a pair's loss does not depend on its batch.
    """
    chosen, rejected = (beta * ratio - delta for ratio in _log_ratios(logps))
    return _rewarded(logps, -log_sigmoid(chosen) - log_sigmoid(-rejected), beta)


def sppo_hard(logps: PairLogProbs, *, beta: float = 0.1) -> LossOutput:
    """SPPO with hard labels (Wu et al. 2024, eq. 4.7 with P = 1 and 0): L = (h(y_w) - 1/(2β))² + (h(y_l) + 1/(2β))².

    β is the inverse of the paper's η.
    """
    chosen, rejected = _log_ratios(logps)
    return _rewarded(logps, (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2, beta)


def aot(logps: PairLogProbs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> LossOutput:
    """AOT, paired (Melnyk et al. 2024, section 3): as DPO, between sorted policy and sorted reference margins.

    z = β (sort(s(y_w) - s(y_l)) - sort(the same under π_ref)), both over the batch: the loss couples its pairs.
    """
    reference_chosen, reference_rejected = _reference(logps)
    # Log-ratios before margins: the sums are large and the differences small, so this order keeps their digits.
    policy = mx.stop_gradient(mx.argsort(logps.chosen - logps.rejected))
    reference = mx.argsort(reference_chosen - reference_rejected)
    chosen = logps.chosen[policy] - reference_chosen[reference]
    rejected = logps.rejected[policy] - reference_rejected[reference]
    return _smoothed(logps, beta * (chosen - rejected), beta, label_smoothing)


def aot_unpaired(logps: PairLogProbs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> LossOutput:
    """AOT, unpaired (Melnyk et al. 2024, section 3): as DPO, z = β (sort(h(y_w)) - sort(h(y_l))) over the batch."""
    # Not mx.sort, whose gradient MLX 0.31 gives to the wrong pairs.
    chosen, rejected = (side[mx.stop_gradient(mx.argsort(side))] for side in _log_ratios(logps))
    return _smoothed(logps, beta * (chosen - rejected), beta, label_smoothing)


def apo_zero(logps: PairLogProbs, *, beta: float = 0.1) -> LossOutput:
    """APO-zero (D'Oosterlinck et al. 2024, eq. 7): L = 1 - σ(β h(y_w)) + σ(β h(y_l))."""
    chosen, rejected = (beta * ratio for ratio in _log_ratios(logps))
    return _rewarded(logps, mx.sigmoid(-chosen) + mx.sigmoid(rejected), beta)


def apo_down(logps: PairLogProbs, *, beta: float = 0.1) -> LossOutput:
    """APO-down (D'Oosterlinck et al. 2024, eq. 8): L = σ(β h(y_w)) + 1 - σ(β (h(y_w) - h(y_l)))."""
    chosen, rejected = (beta * ratio for ratio in _log_ratios(logps))
    return _rewarded(logps, mx.sigmoid(chosen) + mx.sigmoid(rejected - chosen), beta)


def discopop(logps: PairLogProbs, *, beta: float = 0.05, tau: float = 0.05) -> LossOutput:
    """DiscoPOP (Lu et al. 2024, eq. 5): L = -(1 - σ(z/τ)) log σ(z) + σ(z/τ) e⁻ᶻ, z = β(h(y_w) - h(y_l)).

    The second term is e^(log σ(z/τ) - z), since σ(z/τ) underflows where e⁻ᶻ overflows; finite for every z while τ < 1.
    """
    z = beta * _margin(logps)
    losses = mx.exp(log_sigmoid(z / tau) - z) - mx.exp(log_sigmoid(-z / tau)) * log_sigmoid(z)
    return _rewarded(logps, losses, beta)


def dpop(logps: PairLogProbs, *, beta: float = 0.1, delta: float = 50.0) -> LossOutput:
    """DPO-Positive (Pal et al. 2024, eq. 3): L = -log σ(β(h(y_w) - h(y_l) - δ max(0, -h(y_w)))).

    δ is the paper's λ.
    """
    chosen, rejected = _log_ratios(logps)
    losses = -log_sigmoid(beta * (chosen - rejected - delta * _positive(-chosen)))
    return _rewarded(logps, losses, beta)


def _positive(x: mx.array) -> mx.array:
    """max(0, x) with gradient 0 at 0: there a DPO-Positive run starts, on every pair."""
    return mx.where(x > 0, x, 0.0)


def _reference(logps: PairLogProbs) -> tuple[mx.array, mx.array]:
    if logps.reference_chosen is None or logps.reference_rejected is None:
        raise ValueError(
            "this loss compares with a reference model: reference_chosen and reference_rejected are needed."
        )
    return logps.reference_chosen, logps.reference_rejected


def _log_ratios(logps: PairLogProbs) -> tuple[mx.array, mx.array]:
    """h(y_w), h(y_l)."""
    chosen, rejected = _reference(logps)
    return logps.chosen - chosen, logps.rejected - rejected


def _margin(logps: PairLogProbs) -> mx.array:
    chosen, rejected = _log_ratios(logps)
    return chosen - rejected


def _smoothed(logps: PairLogProbs, z: mx.array, beta: float, label_smoothing: float) -> LossOutput:
    return _rewarded(logps, -(1 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z), beta)


def _rewarded(logps: PairLogProbs, losses: mx.array, beta: float) -> LossOutput:
    """`losses` with DPO's implicit rewards β h(y)."""
    chosen, rejected = _log_ratios(logps)
    return _output(losses, beta * chosen, beta * rejected, logps.chosen, logps.rejected)


def _output(losses: mx.array, *logged: mx.array) -> LossOutput:
    return LossOutput(losses, *(mx.stop_gradient(value) for value in logged))
