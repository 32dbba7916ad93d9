"""What rows give a loss besides their tokens: weights, and margins from scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from orpo_mlx.data.batching import row_margins, row_weights
from orpo_mlx.data.splits import Split
from orpo_mlx.errors import ConfigError, DataError
from orpo_mlx.losses.recipe import Recipe
from orpo_mlx.losses.registry import PAIR
from orpo_mlx.types import Example, GroupLogProbs, LogProbs


class RowValues(NamedTuple):
    """Of B pairs, float32, (B,) each; None where they change no loss."""

    weight: mx.array | None = None
    margin: mx.array | None = None
    """Loss margins: differences of scores, scaled."""


def row_values(pairs: Sequence[Example], method: Recipe, *, weighted: bool) -> RowValues:
    """The values of some pairs; `weighted`: whether any pair of the run has a weight other than 1."""
    # Weights of 1 are left out of all batches or of none: each way is a graph of its own where steps are compiled.
    weight = None
    if weighted and method.unit == PAIR:
        weight = mx.array(row_weights(pairs).astype(np.float32))
    elif weighted:
        weight = mx.array([pair.weight for pair in pairs], mx.float32)
    if method.margin_scale == 0:
        return RowValues(weight)
    return RowValues(weight, mx.array((method.margin_scale * row_margins(pairs)).astype(np.float32)))


def with_row_values(logps: LogProbs, values: RowValues) -> LogProbs:
    """`logps` with the rows' values beside them."""
    if isinstance(logps, GroupLogProbs):
        return logps._replace(weight=values.weight)
    return logps._replace(weight=values.weight, margin=values.margin)


def find_weighted(splits: Mapping[str, Split], method: Recipe) -> bool:
    """Whether any pair has a weight other than 1.

    Raises:
        ConfigError: some do, and the method has no loss of single pairs.
        DataError: margins are asked for and rows have no scores; or all weights of a split are 0.
    """
    weighted = False
    for split in splits.values():
        weights = row_weights(split.pairs)
        if not weights.any():
            raise DataError(f"{split.source.name}: the `weight` of every row is 0; nothing would be learned.")
        other = np.flatnonzero(weights != 1)
        weighted |= bool(other.size)
        if other.size and not method.takes_weights:
            raise ConfigError(
                f"`method` {method.expression} sorts the pairs of a batch, so a row's weight means nothing to it, and "
                f"{split.pairs.location(int(other[0]))} has one; leave out the column, or take another method."
            )
        require_scores(split, row_margins(split.pairs), method)
    return weighted


def require_scores(split: Split, margins: npt.NDArray[np.float64], method: Recipe) -> None:
    """Raise DataError where margins are asked for and rows have no scores."""
    missing = np.flatnonzero(~np.isfinite(margins))
    if method.margin_scale > 0 and missing.size:
        raise DataError(
            f"{split.pairs.location(int(missing[0]))}: `margin_scale={method.margin_scale:g}` needs scores such as "
            f"score_chosen and score_rejected, as finite numbers; {missing.size} of {len(margins)} pairs lack them."
        )
