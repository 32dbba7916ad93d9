"""Losses of preference alignment, pure functions of log-probs: `from orpo_mlx.losses import dpo`."""

# In the order in which lists and tables show them.
# isort: off
from orpo_mlx.losses.reference_free import *  # noqa: F403 (every loss, so that adding one opens one file)
from orpo_mlx.losses.with_reference import *  # noqa: F403
from orpo_mlx.losses.unpaired import *  # noqa: F403
from orpo_mlx.losses.listwise import *  # noqa: F403
from orpo_mlx.losses.registry import METHODS

__all__ = [*METHODS]
