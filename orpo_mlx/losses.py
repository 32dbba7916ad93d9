"""Preference losses: pure functions of `PairLogProbs`. No model, no data, no I/O.

Each returns per-pair losses; the batch's loss is their mean. x is the prompt, y_w the chosen and y_l the rejected
completion, |y| its number of tokens, π the policy, π_ref the reference, σ the logistic function. All logs are natural
(nats). Hyper-parameters are keyword-only.

References:
    Hong, Lee, Thorne. ORPO: Monolithic Preference Optimization without Reference Model. 2024. arXiv:2403.07691
    Rafailov et al. Direct Preference Optimization. 2023. arXiv:2305.18290
"""

from __future__ import annotations

import math

import mlx.core as mx

from orpo_mlx.types import LossOutput, PairLogProbs

_LN_2 = math.log(2.0)
# A float32 mean log-prob can round to exactly 0, where the odds are infinite; the largest log-prob told apart from it.
_LARGEST_LOGP = -1e-20


def log1mexp(x: mx.array) -> mx.array:
    """log(1 - eˣ) for x <= 0, accurate and with a finite gradient at both ends.

    Branches at -ln 2 (Mächler 2012, eq. 7). Both branches see guarded inputs: `where` multiplies the gradient of the
    branch not taken by zero, and 0·inf is NaN.
    """
    x = mx.minimum(x, _LARGEST_LOGP)
    near_zero = x > -_LN_2
    small = mx.log(-mx.expm1(mx.where(near_zero, x, -_LN_2)))
    large = mx.log1p(-mx.exp(mx.where(near_zero, -_LN_2, x)))
    return mx.where(near_zero, small, large)


def log_odds(logps: mx.array) -> mx.array:
    """log(P / (1 - P)) of P = exp(logps) (Hong et al. 2024, eq. 4), computed without leaving log space."""
    return mx.minimum(logps, _LARGEST_LOGP) - log1mexp(logps)


def log_sigmoid(x: mx.array) -> mx.array:
    """log σ(x) = -log(1 + e⁻ˣ), finite for every finite x.

    Two branches, each with guarded input: the gradient of `mx.logaddexp` is up to 2 % off where one side is small.
    """
    positive = x >= 0
    above = -mx.log1p(mx.exp(-mx.where(positive, x, 0.0)))
    below = mx.where(positive, 0.0, x)
    return mx.where(positive, above, below - mx.log1p(mx.exp(below)))


def mean_logps(logps: PairLogProbs) -> tuple[mx.array, mx.array]:
    """(1/|y|) log π(y|x) of both sides: the length-normalised log-prob ORPO's odds are made of."""
    return logps.chosen / logps.chosen_tokens, logps.rejected / logps.rejected_tokens


def log_odds_ratio(logps: PairLogProbs) -> mx.array:
    """log OR(y_w, y_l) = log odds(y_w|x) - log odds(y_l|x) with length-normalised P (Hong et al. 2024, eq. 5)."""
    chosen, rejected = mean_logps(logps)
    return log_odds(chosen) - log_odds(rejected)


def orpo(logps: PairLogProbs, *, beta: float = 0.1) -> LossOutput:
    """ORPO (Hong et al. 2024, eqs. 6 and 7): L = NLL(y_w) - β log σ(log OR(y_w, y_l)).

    P is the length-normalised probability, exp((1/|y|) log π(y|x)). β is the paper's λ. The implicit reward is
    β (1/|y|) log π(y|x).
    """
    chosen, rejected = mean_logps(logps)
    losses = logps.nll - beta * log_sigmoid(log_odds_ratio(logps))
    return _output(losses, beta * chosen, beta * rejected, chosen, rejected)


def orpo_style(logps: PairLogProbs, *, beta: float = 0.5) -> LossOutput:
    """The course chapter's ORPO: L = -log σ(log OR(y_w, y_l)) + β ((1/|y_l|) log π(y_l|x) - (1/|y_w|) log π(y_w|x)).

    Preference term plus style term; no likelihood term. P is length-normalised as in `orpo`. The style term is
    linear and has no minimum, so a long run at a high learning rate drives both sides' probability down.
    """
    chosen, rejected = mean_logps(logps)
    losses = -log_sigmoid(log_odds_ratio(logps)) + beta * (rejected - chosen)
    return _output(losses, beta * chosen, beta * rejected, chosen, rejected)


def dpo(logps: PairLogProbs, *, beta: float = 0.1) -> LossOutput:
    """DPO (Rafailov et al. 2023, eq. 7): L = -log σ(β (log π(y_w|x)/π_ref(y_w|x) - log π(y_l|x)/π_ref(y_l|x))).

    Log-probs are sums over completion tokens. The implicit reward is β log π(y|x)/π_ref(y|x).
    """
    chosen_ratio, rejected_ratio = _log_ratios(logps)
    losses = -log_sigmoid(beta * (chosen_ratio - rejected_ratio))
    return _output(losses, beta * chosen_ratio, beta * rejected_ratio, logps.chosen, logps.rejected)


def sft(logps: PairLogProbs) -> LossOutput:
    """Supervised fine-tuning on the chosen side: L = NLL(y_w). The reward logged is the mean log-prob."""
    chosen, rejected = mean_logps(logps)
    return _output(logps.nll, chosen, rejected, chosen, rejected)


def _log_ratios(logps: PairLogProbs) -> tuple[mx.array, mx.array]:
    if logps.reference_chosen is None or logps.reference_rejected is None:
        raise ValueError(
            "this loss compares with a reference model: reference_chosen and reference_rejected are needed."
        )
    return logps.chosen - logps.reference_chosen, logps.rejected - logps.reference_rejected


def _output(losses: mx.array, *logged: mx.array) -> LossOutput:
    return LossOutput(losses, *(mx.stop_gradient(value) for value in logged))
