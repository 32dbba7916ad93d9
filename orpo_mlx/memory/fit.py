"""Whether a training run fits a Mac, before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.memory.predict import Prediction, made_window, predict, recommended_working_set
from orpo_mlx.memory.skeleton import Blueprint

_ORDER = ("plain", "auto", "fast", "balanced", "thrift")
_MACS = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)


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


def remedies(config: TrainingConfig) -> Iterator[tuple[str, TrainingConfig]]:
    """Flags that lower the peak, each beside the ones before, what costs least first."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("--micro-batch-tokens 1", {"micro_batch_tokens": 1}),
        ("--memory balanced", {"memory": "balanced"}),
        ("--memory thrift", {"memory": "thrift"}),
    ]
    shorter = [config.max_seq_length // 2**power for power in (1, 2, 3)]
    changes += [(f"--max-seq-length {length}", {"max_seq_length": length}) for length in shorter if length >= 64]
    flags: dict[str, str] = {}
    for flag, change in changes:
        if all(getattr(config, name) == value for name, value in change.items()):
            continue
        if "memory" in change and _ORDER.index(change["memory"]) <= _ORDER.index(config.memory):
            continue
        config = dataclasses.replace(config, **change)
        flags[flag.split()[0]] = flag
        yield " ".join(flags.values()), config
