"""The course chapter's training step, under the name its reader would look for."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from orpo_mlx.engine.pair_scorer import PairScorer, pair_logps
from orpo_mlx.losses.preference import compute_odds_ratio, mean_logps, odds_ratio_loss
from orpo_mlx.types import Batch


def orpo_training_step(model: nn.Module | PairScorer, batch: Batch, optimizer: optim.Optimizer) -> dict[str, float]:
    """Log-probs of both completions, the chapter's loss, backward, one optimiser step.

    Log-probs are means over completion tokens, as ORPO defines P(y|x) (Hong et al. 2024, section 4.1); the chapter's
    sum over a whole sequence makes every P of a real answer 0. The loss is the mean of `odds_ratio_loss` over pairs.

    Args:
        model: an mlx-lm model with trainable parameters, or a `PairScorer` of one, which saves probing it each step.
        batch: pairs from `batching.collate`.
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
    mx.eval(loss, scorer.model.trainable_parameters(), optimizer.state)
    accuracy, ratio = (chosen > rejected).astype(mx.float32).mean(), compute_odds_ratio(chosen, rejected).mean()
    return {"loss": float(loss), "accuracy": float(accuracy), "odds_ratio": float(ratio)}
