"""ORPO, DPO and their family in MLX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from orpo_mlx._blas import load_blas

load_blas()

if TYPE_CHECKING:
    from orpo_mlx.chapter import compute_odds_ratio, odds_ratio_loss, orpo_training_step
    from orpo_mlx.config.settings import TrainingConfig
    from orpo_mlx.errors import UserError
    from orpo_mlx.reporting.callbacks import TrainingCallback
    from orpo_mlx.train import train
    from orpo_mlx.training.checkpoints.progress import TrainingResult

__version__ = "0.1.0"
__all__ = [
    "TrainingCallback",
    "TrainingConfig",
    "TrainingResult",
    "UserError",
    "compute_odds_ratio",
    "odds_ratio_loss",
    "orpo_training_step",
    "train",
]

_HOMES = {
    "TrainingCallback": "orpo_mlx.reporting.callbacks",
    "TrainingConfig": "orpo_mlx.config.settings",
    "TrainingResult": "orpo_mlx.training.checkpoints.progress",
    "UserError": "orpo_mlx.errors",
    "compute_odds_ratio": "orpo_mlx.chapter",
    "odds_ratio_loss": "orpo_mlx.chapter",
    "orpo_training_step": "orpo_mlx.chapter",
}


def __getattr__(name: str) -> Any:
    # Looked up when asked for: mlx-lm and transformers take a second to import.
    if name == "train":
        # A submodule that can be called: importing it sets this very name, whoever does it and when.
        return importlib.import_module("orpo_mlx.train")
    if name not in _HOMES:
        raise AttributeError(f"module 'orpo_mlx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
