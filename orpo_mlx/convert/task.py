"""What every conversion has in common: its settings, the model written, the result compared with what it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn

from orpo_mlx.convert.quantisation import Quantisation
from orpo_mlx.convert.quantize import cast, quantise
from orpo_mlx.convert.write_model import take_weights, write_json, write_weights
from orpo_mlx.models.names import DTYPES

# Hidden, so that no loader takes it for part of the model.
SCRATCH = ".source"
"""A folder within the one that is written, for what is needed meanwhile."""


class Task(NamedTuple):
    """What was asked for, whatever the kind of conversion."""

    destination: Path
    overwrite: bool
    verify: bool
    trust_remote_code: bool
    dtype: str | None = None
    how: Quantisation | None = None


def write_model(task: Task, folder: Path, model: nn.Module, config: dict[str, Any]) -> int:
    """Cast and quantise as asked, then weights in mlx-lm's layout and config; the bytes of the weights."""
    if task.dtype is not None:
        cast(model, DTYPES[task.dtype])
        config = with_dtype(config, task.dtype)
    if task.how is not None:
        config, left = quantise(model, config, task.how)
        if left:
            names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
            print(
                f"{len(left)} layers stay as they are, since {task.how.group_size} does not divide their width: {names}"
            )
    written = write_weights(folder, take_weights(model), task.destination, layout="mlx")
    write_json(folder / "config.json", config)
    return written


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`config` that says so."""
    # transformers 5 says `dtype`, earlier ones `torch_dtype`; where a config has both they must agree.
    return {**config, **{key: dtype for key in ("dtype", "torch_dtype") if key in config or key == "dtype"}}


def report(task: Task, written: int) -> None:
    """Say what was written."""
    size = f"{written / 1e9:.2f} GB" if written >= 1e8 else f"{written / 1e6:.2f} MB"
    print(f"wrote {task.destination}: {size} of weights")
