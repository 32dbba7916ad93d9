"""What a checkpoint says of a run, and the run's random numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from orpo_mlx.config.checks import check_settings
from orpo_mlx.config.traits import Trait
from orpo_mlx.errors import TrainingError, kind_and_reason
from orpo_mlx.reporting.resumable_jsonl import FileMark
from orpo_mlx.training.checkpoints.folders import Checkpoint
from orpo_mlx.training.checkpoints.progress import Progress
from orpo_mlx.training.data_order import epoch_and_step, order_digest, total_steps
from orpo_mlx.training.run import Run, versions

_ADAPTERS, _OPTIMIZER, _REFERENCE, _STATE = (
    "adapters.safetensors", "optimizer.safetensors", "reference.safetensors", "state.json",
)  # fmt: skip


class State(NamedTuple):
    """What `state.json` says, checked."""

    progress: Progress
    total: int
    first_step: int
    settings: Mapping[str, Any]
    random_states: list[tuple[int, int]]
    """Of each rank."""
    order: str
    data: Mapping[str, str]
    model: str
    versions: Mapping[str, str]
    metrics: FileMark
    samples: FileMark | None
    """None where no sample replies were kept."""

    @property
    def finished(self) -> bool:
        """Whether all steps had been taken."""
        return self.progress.step >= self.total


def random_state() -> tuple[int, int]:
    """MLX's random state: two 32-bit words."""
    state: Any = mx.random.state
    high, low = np.array(state[0]).tolist()
    return int(high), int(low)


def set_random_state(state: Sequence[int]) -> None:
    """Put MLX's random numbers back to where `random_state` found them."""
    mx.random.seed((state[0] << 32) | state[1])


def random_state_of(rank: int, states: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """A rank's own random numbers; one that had none yet gets some that no other rank has."""
    if rank < len(states):
        return states[rank]
    digest = hashlib.sha256(repr((states[0], rank)).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Whatever draws random numbers in this block, the run's own, of dropout, do not depend on it."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def read_state(checkpoint: Checkpoint) -> State:
    """What a checkpoint says of its run.

    Raises:
        TrainingError: its `state.json` is not one of this package.
        ConfigError: its settings are not settings of this version.
    """
    path = checkpoint.folder / _STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        randoms = [(int(high), int(low)) for high, low in state["random_states"]]
        metrics = _mark(state["metrics"])
        samples = _mark(state["samples"]) if "samples" in state else None
        progress = Progress.from_json(state["progress"])
        total, first_step = int(state["total_steps"]), int(state["first_step"])
        texts = [{str(k): str(v) for k, v in state[name].items()} for name in ("data", "versions")]
        settings, order, model = dict(state["settings"]), str(state["order"]), str(state["model"])
        words = [word for pair in randoms for word in pair]
        if not words or not all(0 <= word < 1 << 32 for word in words) or first_step < 0:
            raise ValueError("a number out of range")
        if progress.step != checkpoint.step:
            raise ValueError(f"step {progress.step}, expected {checkpoint.step}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise TrainingError(f"{path}: not the state of a run ({kind_and_reason(error)})") from None
    checked = check_settings(settings, str(path))
    return State(progress, total, first_step, checked, randoms, order, texts[0], model, texts[1], metrics, samples)


def _mark(value: Mapping[str, Any]) -> FileMark:
    mark = FileMark(int(value["size"]), str(value["sha256"]))
    if mark.size < 0:
        raise ValueError("a negative size")
    return mark


def _describe(
    run: Run, progress: Progress, marks: Mapping[str, FileMark], randoms: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    epoch, step = epoch_and_step(run, progress.step)
    return {
        "step": progress.step,
        "total_steps": total_steps(run.config, len(run.splits["train"].pairs)),
        "epoch": epoch,
        "step_in_epoch": step,
        "first_step": run.first_step,
        "progress": progress.to_json(),
        "random_states": list(randoms),
        **{name: mark._asdict() for name, mark in marks.items()},
        "order": order_digest(run),
        "data": {name: split.sha256 for name, split in run.splits.items()},
        "model": run.model_digest,
        "settings": run.config.settings(without=Trait.THIS_COMMAND),
        "versions": versions(),
    }
