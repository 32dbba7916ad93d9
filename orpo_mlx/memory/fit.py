"""Whether a training run fits a Mac, before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from orpo_mlx.config.checks import make_config
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.errors import ConfigError
from orpo_mlx.memory.predict import Prediction, made_window, predict, recommended_working_set
from orpo_mlx.memory.skeleton import Blueprint

# Memory modes by the memory they take, most first: a remedy may only lower it.
_ORDER = ("plain", "auto", "fast", "balanced", "thrift")
# Tokens of a pair's side below which a shorter one is not proposed.
_SHORTEST = 64
# GiB that Macs with Apple's chips have been sold with.
_MACS = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)


class Remedy(NamedTuple):
    """A run that takes less memory."""

    changed: dict[str, Any]
    """Settings that are other than in the run asked about."""
    config: TrainingConfig


def predicted(config: TrainingConfig, blueprint: Blueprint, prompt_tokens: int | None = None) -> Prediction:
    """The peak of a run whose pairs are all `max_seq_length` long; half of that is the prompt where it is not given."""
    prompt = max(1, config.max_seq_length // 2) if prompt_tokens is None else prompt_tokens
    vocabulary = int(blueprint.config.get("vocab_size", 0)) or 256
    return predict(config, blueprint, made_window(config, prompt, vocabulary))


def describe(prediction: Prediction) -> str:
    """The parts of a prediction, a line each."""
    lines = [f"  {name:<12} {part:8.2f} GiB" for name, part in prediction._asdict().items()]
    return "\n".join([*lines, f"  {'peak':<12} {prediction.peak:8.2f} GiB"])


def verdict(peak: float, memory: float | None) -> str:
    """Whether a peak (GiB) fits a Mac with that much memory (GiB), or which Macs it fits."""
    if memory is None:
        fitting = [size for size in _MACS if peak <= recommended_working_set(size)]
        return f"It fits Macs with {fitting[0]} GiB and more." if fitting else "It fits no Mac."
    limit = recommended_working_set(memory)
    fits = "it fits" if peak <= limit else "it does not fit"
    return f"A Mac with {memory:g} GiB recommends a working set of {limit:.2f} GiB: {fits}."


def _can_be_given(config: TrainingConfig) -> bool:
    """Whether `train` takes these settings together."""
    try:
        make_config(config.settings())
    except ConfigError:
        return False
    return True


def remedies(config: TrainingConfig) -> Iterator[Remedy]:
    """Settings that lower the peak, each beside the ones before, what costs least first."""
    shorter = [config.max_seq_length // 2**power for power in (1, 2, 3)]
    changes: list[tuple[str, Any]] = [
        ("micro_batch_tokens", 1),
        ("memory", "balanced"),
        ("memory", "thrift"),
        *(("max_seq_length", length) for length in shorter if length >= _SHORTEST),
    ]
    changed: dict[str, Any] = {}
    for name, value in changes:
        if getattr(config, name) == value:
            continue
        if name == "memory" and _ORDER.index(value) <= _ORDER.index(config.memory):
            continue
        smaller = dataclasses.replace(config, **{name: value})
        # Another setting may not go with it, such as a head that is not apart from the layers.
        if not _can_be_given(smaller):
            continue
        changed, config = {**changed, name: value}, smaller
        yield Remedy(changed, config)
