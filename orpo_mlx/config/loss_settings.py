"""Settings of losses; `settings.py` has all others, and says what a field declares.

A loss's parameter (`in_parameter`) is also a keyword argument of the losses that have it.
"""

from __future__ import annotations

import dataclasses

from orpo_mlx.config.traits import NOT_NEGATIVE, Trait, in_loss, in_parameter


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """What the loss of a method takes beside its pairs."""

    beta: float | None = in_parameter("β of the method; default: the method's own, as for those below")
    label_smoothing: float | None = in_parameter("ε: share of pairs taken to be labelled wrongly")
    gamma: float | None = in_parameter("γ: target margin of simpo, alphapo")
    alpha: float | None = in_parameter(
        "α: weight of the likelihood term of cpo, rrhf, slic, pro; power of alphapo, dpo_alpha"
    )
    ld_alpha: float | None = in_parameter("λ of ld_dpo: weight of tokens beyond the shorter completion's length")
    delta: float | None = in_parameter("δ: margin of slic, shift of bco_pair, penalty of dpop")
    tau: float | None = in_parameter("τ: temperature of discopop's blend")
    margin_scale: float = in_loss(
        0.0,
        "loss margin for each point of score that chosen has above rejected, where a method takes one",
        Trait.OF_METHOD | Trait.COMPARED,
        range=NOT_NEGATIVE,
    )
    desirable_weight: float | None = in_parameter("λ_D: weight of good completions in kto and apo_zero_unpaired")
    undesirable_weight: float | None = in_parameter("λ_U: weight of bad completions there")
    nll: str = in_loss(
        "completion",
        "tokens of the NLL term: the chosen completion's, or prompt and chosen as in TRL",
        choices=("completion", "sequence"),
    )
    router_aux_loss_coef: float = in_loss(
        0.0,
        "mixtures of experts: weight of the load-balancing loss of their routers; takes --memory plain",
        Trait.ON_CARD | Trait.COMPARED,
        range=NOT_NEGATIVE,
    )
