"""Score pairs: log-probs of both completions of every row, in input order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from orpo_mlx.data.batching import length_order, split_by_completion
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.types import TokenizedPair


def score_pairs(
    scorer: PairScorer, pairs: Sequence[TokenizedPair], *, batch_size: int = 8, per_token: bool = False
) -> list[dict[str, Any]]:
    """A row for each pair, in the order given.

    Keys: `index`; `chosen_logps`, `rejected_logps` (sums over completion tokens, nats); `chosen_tokens`,
    `rejected_tokens`; `chosen_mean_logps`, `rejected_mean_logps` (nats per token); `margin` (difference of the means);
    `prefers_chosen` (margin > 0); with `per_token` also `chosen_token_logps`, `rejected_token_logps`.
    """
    rows: dict[int, dict[str, Any]] = {}
    for indices in length_order(pairs, batch_size):
        group = [pairs[index] for index in indices]
        logps = np.array(scorer(scorer.collate(group), gradient=False))
        for index, (chosen, rejected) in zip(indices, split_by_completion(group, logps), strict=True):
            rows[index] = {"index": index, **_row({"chosen": chosen, "rejected": rejected}, per_token)}
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
