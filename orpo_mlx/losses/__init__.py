"""Losses of preference alignment, pure functions of `PairLogProbs`: `from orpo_mlx.losses import dpo`."""

from orpo_mlx.losses.reference_free import *  # noqa: F403 (every loss, so that adding one opens one file)
from orpo_mlx.losses.registry import METHODS
from orpo_mlx.losses.with_reference import *  # noqa: F403

__all__ = [*METHODS]
