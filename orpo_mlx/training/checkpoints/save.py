"""A run saved between two steps: its checkpoint, the adapters beside it, and the link to the best one."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from orpo_mlx.errors import TrainingError
from orpo_mlx.files import copy_if_different, json_text, save_safetensors
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.reporting.resumable_jsonl import FileMark
from orpo_mlx.run_folder import ADAPTER_CONFIG_FILE, ADAPTERS_FILE, BEST, CHECKPOINTS
from orpo_mlx.training.checkpoints.folders import (
    CheckpointFolder,
    checkpoint_name,
    linked_step,
    prune,
    write_checkpoint,
)
from orpo_mlx.training.checkpoints.progress import Progress
from orpo_mlx.training.checkpoints.random_numbers import RandomState
from orpo_mlx.training.checkpoints.state import STATE_FILE, describe
from orpo_mlx.training.data_order import order_metadata
from orpo_mlx.training.references.other_references import SyncedReference
from orpo_mlx.training.run import Run, adapter_config

OPTIMIZER_FILE = "optimizer.safetensors"
REFERENCE_FILE = "reference.safetensors"
REFERENCE_IDENTITY = "identity"
"""Key in that file's header: `ReferenceTable.identity`."""
REFERENCE_WEIGHTS_FILE = "reference_weights.safetensors"


def save(
    run: Run, progress: Progress, marks: Mapping[str, FileMark], randoms: Sequence[RandomState]
) -> CheckpointFolder:
    """Write a checkpoint of a run as it stands after `progress.step` steps.

    Only rank 0 writes. `marks` say how far the files of `metrics` and `samples` had come; `randoms` are the random
    states of all ranks.

    Raises:
        TrainingError: a weight is not finite, or the disk cannot be written; earlier checkpoints are untouched.
    """
    weights = adapter_weights(run.loaded.model)
    optimizer = optimizer_arrays(run)
    # On all ranks: rank 0 alone would raise, and the others would wait for it.
    _require_finite({**weights, **optimizer}, progress.step)
    if not run.ranks.first:
        return CheckpointFolder(run.folder / CHECKPOINTS, progress.step)
    metadata = order_metadata(run, progress.step)
    state = describe(run, progress, marks, randoms)

    def write(folder: Path) -> None:
        save_safetensors(folder / ADAPTERS_FILE, weights, metadata)
        save_safetensors(folder / OPTIMIZER_FILE, optimizer)
        if run.reference is not None:
            table = run.reference.table
            save_safetensors(folder / REFERENCE_FILE, table.arrays(), {REFERENCE_IDENTITY: table.identity})
        if isinstance(run.reference, SyncedReference):
            save_safetensors(folder / REFERENCE_WEIGHTS_FILE, run.reference.weights())
        (folder / STATE_FILE).write_text(json_text(state), encoding="utf-8")
        (folder / ADAPTER_CONFIG_FILE).write_text(json_text(adapter_config(run)), encoding="utf-8")

    with _saying_what_cannot_be_saved():
        return write_checkpoint(run.folder / CHECKPOINTS, progress.step, write)


def after_save(run: Run, progress: Progress, checkpoint: CheckpointFolder) -> None:
    """What follows a new checkpoint: adapters beside it, then those that are one too many are removed.

    Raises:
        TrainingError: the disk cannot be written; the checkpoint is whole.
    """
    put_adapters(run, checkpoint)
    if not run.ranks.first:
        return
    with _saying_what_cannot_be_saved():
        # `best` may lead to one that this run does not know of: nothing is removed that a link promises.
        also = {step for step in (progress.best and progress.best.step, linked_step(run.folder / BEST)) if step}
        # Last: until the new checkpoint is whole, an older one is all there is to go on from.
        prune(run.folder / CHECKPOINTS, run.config.keep, progress.step, also)


def put_adapters(run: Run, checkpoint: CheckpointFolder) -> None:
    """Let the adapters in the run's folder be those of a checkpoint; TrainingError where the disk cannot be written."""
    if not run.ranks.first:
        return
    with _saying_what_cannot_be_saved():
        for name in (ADAPTERS_FILE, ADAPTER_CONFIG_FILE):
            copy_if_different(checkpoint.path / name, run.folder / name)


@contextmanager
def _saying_what_cannot_be_saved() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingError(f"{error.filename}: cannot be saved ({error.strerror or error})") from None


def is_gone(run: Run, step: int) -> bool:
    """Whether the checkpoint of a step, which this run wrote or came from, is not there any more."""
    return run.ranks.first and not (run.folder / CHECKPOINTS / checkpoint_name(step)).is_dir()


def how_to_go_on(run: Run, step: int) -> str:
    """What a run that ends says of its newest checkpoint."""
    folder = shlex.quote(run.config.adapter_path)
    return f"step {step} is saved, go on with orpo-mlx train --resume --adapter-path {folder}"


def mark_best(run: Run, step: int) -> None:
    """Let `best` lead to the checkpoint of a step."""
    link = run.folder / BEST
    temporary = run.folder / f".{BEST}"
    # A link cannot be changed, only replaced; renamed over the old one, there is no moment without it.
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(Path(CHECKPOINTS) / checkpoint_name(step))
    temporary.replace(link)


def optimizer_arrays(run: Run) -> dict[str, mx.array]:
    """The arrays of the optimiser's state by flat name; its numbers come from the settings."""
    flat: list[tuple[str, Any]] = tree_flatten(run.optimizer.state)  # type: ignore[assignment]
    return {name: value for name, value in flat if isinstance(value, mx.array)}


def _require_finite(arrays: Mapping[str, mx.array], step: int) -> None:
    finite = np.array(mx.stack([mx.isfinite(array).all() for array in arrays.values()]))
    for name, good in zip(arrays, finite, strict=True):
        if not good:
            raise TrainingError(f"{name} is not finite after step {step}, so it is not saved")
