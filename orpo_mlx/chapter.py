"""The course chapter's training step, under the name its reader would look for."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from orpo_mlx.engine.pair_scorer import PairScorer, pair_logps
from orpo_mlx.losses.numerics import log_sigmoid
from orpo_mlx.losses.terms import mean_logps
from orpo_mlx.types import Batch

_PRINTED_EPSILON = 1e-8

_LARGEST_EXPONENT = 88.0


def compute_odds_ratio(logps_chosen: mx.array, logps_rejected: mx.array) -> mx.array:
    """The course chapter's odds ratio, odds(chosen) / odds(rejected) with odds = P / (1 - P + 1e-8).

    Equal to the printed formula wherever that is finite, and right where P underflows and it is 0/0: it is computed in
    log space. A ratio beyond e⁸⁸, the end of float32, is given as e⁸⁸.

    Args:
        logps_chosen: log-probs (nats, <= 0), any shape, float32.
        logps_rejected: the same shape.
    """
    return mx.exp(mx.minimum(_printed_log_odds_ratio(logps_chosen, logps_rejected), _LARGEST_EXPONENT))


def odds_ratio_loss(logps_chosen: mx.array, logps_rejected: mx.array, beta: float = 0.5) -> mx.array:
    """The course chapter's loss, elementwise: -log(r / (1 + r)) + beta (logp_rejected - logp_chosen), r the odds ratio.

    -log(r / (1 + r)) = -log σ(log r), so r itself is never formed: finite in value and gradient for log-probs of any
    size. Take the mean for a batch.

    Args:
        logps_chosen: log-probs (nats, <= 0), any shape, float32.
        logps_rejected: the same shape.
        beta: weight of the style term.
    """
    style = beta * (logps_rejected - logps_chosen)
    return style - log_sigmoid(_printed_log_odds_ratio(logps_chosen, logps_rejected))


def _printed_log_odds_ratio(chosen: mx.array, rejected: mx.array) -> mx.array:
    ratio = chosen - rejected
    return ratio - mx.log(-mx.expm1(chosen) + _PRINTED_EPSILON) + mx.log(-mx.expm1(rejected) + _PRINTED_EPSILON)


def orpo_training_step(model: nn.Module | PairScorer, batch: Batch, optimizer: optim.Optimizer) -> dict[str, float]:
    """Log-probs of both completions, the chapter's loss, backward, one optimiser step.

    Log-probs are means over completion tokens, as ORPO defines P(y|x) (Hong et al. 2024, section 4.1); the chapter's
    sum over a whole sequence makes every P of a real answer 0. The loss is the mean of `odds_ratio_loss` over pairs.

    Args:
        model: an mlx-lm model with trainable parameters, or a `PairScorer` of one, which saves probing it each step.
        batch: pairs from `PairScorer.collate`, or `data.batching.collate`.
        optimizer: any MLX optimiser.

    Returns:
        `loss`, `accuracy` (share of pairs whose chosen side has the higher log-prob) and `odds_ratio`: means over the
        batch, from before the step.
    """
    scorer = model if isinstance(model, PairScorer) else PairScorer(model)

    def forward(batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        chosen, rejected = mean_logps(pair_logps(scorer, batch))
        return odds_ratio_loss(chosen, rejected).mean(), chosen, rejected

    (loss, chosen, rejected), gradients = nn.value_and_grad(scorer.model, forward)(batch)
    optimizer.update(scorer.model, gradients)
    # MLX is lazy: the weights would hold on to this step's graph, and to that of each step after it.
    mx.eval(loss, scorer.model.trainable_parameters(), optimizer.state)
    accuracy, ratio = (chosen > rejected).astype(mx.float32).mean(), compute_odds_ratio(chosen, rejected).mean()
    return {"loss": float(loss), "accuracy": float(accuracy), "odds_ratio": float(ratio)}
