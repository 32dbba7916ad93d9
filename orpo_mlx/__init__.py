"""ORPO, DPO and their family in MLX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from orpo_mlx._blas import load_blas

load_blas()

if TYPE_CHECKING:
    from orpo_mlx.chapter import orpo_training_step
    from orpo_mlx.losses import compute_odds_ratio, odds_ratio_loss

__version__ = "0.1.0"
__all__ = ["compute_odds_ratio", "odds_ratio_loss", "orpo_training_step"]

_HOMES = {
    "compute_odds_ratio": "orpo_mlx.losses",
    "odds_ratio_loss": "orpo_mlx.losses",
    "orpo_training_step": "orpo_mlx.chapter",
}


def __getattr__(name: str) -> Any:
    # Looked up when asked for: mlx-lm and transformers take a second to import.
    if name not in _HOMES:
        raise AttributeError(f"module 'orpo_mlx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
