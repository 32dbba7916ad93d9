"""A run that is ready to start, and what its folder says of it."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.data.splits import Split
from orpo_mlx.engine.memory_modes import Memory
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.losses.recipe import Recipe
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.models.loading import LoadedModel
from orpo_mlx.package_versions import version_of
from orpo_mlx.training.distributed import Ranks
from orpo_mlx.training.references.reference import ReferenceLogProbs
from orpo_mlx.training.steps.step_functions import StepFunctions
from orpo_mlx.training.steps.step_values import RunningMean


@dataclasses.dataclass
class Run:
    """A run that is ready to start."""

    config: TrainingConfig
    folder: Path
    splits: dict[str, Split]
    loaded: LoadedModel
    scorer: PairScorer
    method: Recipe
    reference: ReferenceLogProbs | None
    optimizer: optim.Optimizer
    memory: Memory
    functions: StepFunctions
    max_seq_length: int
    """The longest prompt + completion: of the settings, or of the model where that is less."""
    first_step: int = 0
    """Steps that the adapters it goes on from have taken in its own order of the data."""
    ranks: Ranks = dataclasses.field(default_factory=Ranks)
    """The processes that train as one."""
    rewards: RunningMean = dataclasses.field(default_factory=RunningMean)
    """Of the steps so far, where the method asks for it."""
    weighted: bool = False
    """Whether any pair has a weight other than 1."""
    model_digest: str = ""
    """Of all weights as they were loaded, before adapters."""
    reference_digest: str = ""
    """Of the reference: its name, or of its weights where it is another model or another's adapters."""


def run_record(run: Run) -> dict[str, Any]:
    """What `run.json` holds: resolved settings, versions, data hashes, and what was loaded."""
    return {
        "settings": run.config.settings(),
        "method_parameters": run.method.parameters,
        "model_path": str(run.loaded.path),
        "model_note": run.loaded.note,
        "memory": run.memory.mode,
        "trainable_parameters": sum(array.size for array in adapter_weights(run.loaded.model).values()),
        "data": {name: _split_record(split) for name, split in run.splits.items()},
        "versions": versions(),
    }


def adapter_config(run: Run) -> dict[str, Any]:
    """What `ADAPTER_CONFIG_FILE` holds: mlx-lm's keys, so that its `--adapter-path` takes the folder as it is."""
    config = run.config
    return {
        "fine_tune_type": config.fine_tune_type,
        "num_layers": config.num_layers,
        "lora_parameters": None if config.fine_tune_type == "full" else config.lora_parameters,
        "model": config.model,
        "method": config.method,
        "method_parameters": run.method.parameters,
    }


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    packages = {name: version_of(name) for name in ("orpo-mlx", "mlx", "mlx-lm", "numpy", "transformers")}
    return {
        **packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(mx.default_device()),
    }


def _split_record(split: Split) -> Mapping[str, Any]:
    return {
        "path": split.source.name,
        "sha256": split.sha256,
        "shape": split.report.shape,
        "rows": split.report.rows_read,
        "pairs": len(split.pairs),
        "left_out": dict(split.report.dropped),
        "notes": dict(split.report.notes),
    }
