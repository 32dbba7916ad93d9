"""Score pairs: log-probs of both completions of every row, in input order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from orpo_mlx.data.batching import best_and_worst, length_order, split_by_completion
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.types import Example, TokenizedGroup, TokenizedPair


def score_pairs(
    scorer: PairScorer, pairs: Sequence[Example], *, batch_size: int = 8, per_token: bool = False
) -> list[dict[str, Any]]:
    """A row for each pair or group, in the order given.

    Keys: `index`; `chosen_logps`, `rejected_logps` (sums over completion tokens, nats); `chosen_tokens`,
    `rejected_tokens`; `chosen_mean_logps`, `rejected_mean_logps` (nats per token); `margin` (difference of the means);
    `prefers_chosen` (margin > 0); with `per_token` also `chosen_token_logps`, `rejected_token_logps`.
    Of a group: `index`, and lists with an entry for each completion: `scores` (labels: 1 good, 0 bad), `logps`,
    `tokens`, `mean_logps`, with `per_token` also `token_logps`; `margin` (mean of the best minus mean of the worst) and
    `prefers_best`, both null where there are no two that differ in score.
    """
    rows: dict[int, dict[str, Any]] = {}
    for indices in length_order(pairs, batch_size):
        batch = [pairs[index] for index in indices]
        logps = np.array(scorer(scorer.collate(batch), gradient=False))
        for index, example, values in zip(indices, batch, split_by_completion(batch, logps), strict=True):
            if isinstance(example, TokenizedPair):
                chosen, rejected = values
                row = _row({"chosen": chosen, "rejected": rejected}, per_token)
            else:
                row = _group_row(example, values, per_token)
            rows[index] = {"index": index, **row}
    return [rows[index] for index in range(len(pairs))]


def _row(sides: dict[str, np.ndarray[Any, Any]], per_token: bool) -> dict[str, Any]:
    sums = {side: float(values.sum(dtype=np.float64)) for side, values in sides.items()}
    means = {side: sums[side] / len(values) for side, values in sides.items()}
    margin = means["chosen"] - means["rejected"]
    row: dict[str, Any] = {f"{side}_logps": value for side, value in sums.items()}
    row |= {f"{side}_tokens": len(values) for side, values in sides.items()}
    row |= {f"{side}_mean_logps": value for side, value in means.items()}
    row |= {"margin": margin, "prefers_chosen": margin > 0}
    if per_token:
        row |= {f"{side}_token_logps": [float(value) for value in values] for side, values in sides.items()}
    return row


def _group_row(group: TokenizedGroup, values: Sequence[np.ndarray[Any, Any]], per_token: bool) -> dict[str, Any]:
    sums = [float(each.sum(dtype=np.float64)) for each in values]
    means = [total / len(each) for total, each in zip(sums, values, strict=True)]
    best, worst = best_and_worst(group)
    margin = means[best] - means[worst] if group.scores[best] > group.scores[worst] else None
    row: dict[str, Any] = {
        "scores": list(group.scores),
        "logps": sums,
        "tokens": [len(each) for each in values],
        "mean_logps": means,
        "margin": margin,
        "prefers_best": None if margin is None else margin > 0,
    }
    return row | ({"token_logps": [list(map(float, each)) for each in values]} if per_token else {})
