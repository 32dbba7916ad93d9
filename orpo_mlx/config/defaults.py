"""Choices and defaults of settings that other modules name as well."""

from __future__ import annotations

from typing import Any

PATIENCE_ON = ("loss", "accuracy")
REFERENCES = "start, base, copy"
# MLX's, each with what it takes besides a learning rate; named here, since their import takes time.
OPTIMIZER_ARGUMENTS = {
    "adam": ("betas", "eps", "bias_correction"),
    "adamw": ("betas", "eps", "weight_decay", "bias_correction"),
    "muon": ("momentum", "weight_decay", "nesterov", "ns_steps"),
    "sgd": ("momentum", "weight_decay", "dampening", "nesterov"),
    "adafactor": (
        *("eps", "clip_threshold", "decay_rate", "beta_1", "weight_decay"),
        *("scale_parameter", "relative_step", "warmup_init"),
    ),
}
OPTIMIZERS = tuple(OPTIMIZER_ARGUMENTS)
DEFAULT_MAX_SKIPPED = 10
BEST_BY = ("loss", "win_rate")

# As in mlx_lm.lora, like the defaults below that it has: its config files mean the same here.
DEFAULT_LORA = {"rank": 8, "dropout": 0.0, "scale": 20.0}
DEFAULT_OPTIMIZER_CONFIG: dict[str, dict[str, Any]] = {
    "adam": {"bias_correction": True},
    "adamw": {"bias_correction": True, "weight_decay": 0.0},
    "muon": {},
    "sgd": {},
    "adafactor": {},
}
