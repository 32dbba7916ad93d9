"""The optimiser of a run: MLX's, with a schedule of mlx-lm's, and with a rate of its own for LoRA's second factor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx_lm.tuner.utils import build_schedule

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.errors import ConfigError, reason_of
from orpo_mlx.text import quoted

_OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}


def make_optimizer(config: TrainingConfig) -> optim.Optimizer:
    """The optimiser with its schedule, its `learning_rate` that of all parameters but those of `lora_plus_ratio`.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) trains B faster than A; DoRA's magnitudes go with B, as in PEFT.

    Raises:
        ConfigError: mlx-lm or MLX has no such schedule or arguments.
    """
    schedule = make_schedule(config)
    arguments = config.optimizer_config[config.optimizer]
    make = _OPTIMIZERS[config.optimizer]
    ratio = config.lora_plus_ratio
    try:
        if ratio is None:
            return make(learning_rate=schedule, **arguments)
        faster = (lambda step: ratio * schedule(step)) if callable(schedule) else ratio * schedule
        optimizers = [make(learning_rate=schedule, **arguments), make(learning_rate=faster, **arguments)]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optimizer_config.{config.optimizer}: {quoted(arguments)} does not fit ({reason_of(error)})."
        ) from None
    # One filter for two optimisers: the last one takes what no filter has taken.
    return optim.MultiOptimizer(optimizers, [lambda name, _: not is_faster(name)])


def is_faster(name: str) -> bool:
    """Whether LoRA+ trains the parameter of this name faster."""
    return name.endswith((".lora_b", ".m"))


def make_schedule(config: TrainingConfig) -> Any:
    """The learning rate, or a function from a step to it; ConfigError where mlx-lm has no such schedule."""
    if config.lr_schedule is None:
        return config.learning_rate
    try:
        schedule = build_schedule(config.lr_schedule)
        # Some wrong arguments show only when a schedule is asked for a rate: 0 steps, or a growth without end.
        for step in (0, 1, config.iters or 1):
            rate = float(schedule(mx.array(step)))
            if not (math.isfinite(rate) and rate >= 0):
                raise ValueError(f"its rate at step {step} is {rate:g}")
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"lr_schedule: {quoted(config.lr_schedule)} is not a schedule of mlx-lm ({reason_of(error)})."
        ) from None
    return schedule


def set_learning_rate(optimizer: optim.Optimizer, config: TrainingConfig) -> None:
    """Give an optimiser whose state comes from a checkpoint the rate of the settings, where that is a number."""
    # A schedule sets the rate anew at every step.
    if config.lr_schedule is not None:
        return
    ratio = config.lora_plus_ratio
    if ratio is None or not isinstance(optimizer, optim.MultiOptimizer):
        optimizer.learning_rate = config.learning_rate
        return
    # MLX would give both the same.
    for each, factor in zip(optimizer.optimizers, (1.0, ratio), strict=True):
        each.learning_rate = factor * config.learning_rate
