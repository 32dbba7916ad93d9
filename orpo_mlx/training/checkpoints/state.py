"""`state.json`: what a checkpoint says of its run besides arrays."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orpo_mlx.config.checks import check_settings
from orpo_mlx.config.traits import Trait
from orpo_mlx.errors import TrainingError, kind_and_reason
from orpo_mlx.reporting.resumable_jsonl import FileMark
from orpo_mlx.training.checkpoints.folders import CheckpointFolder
from orpo_mlx.training.checkpoints.progress import Progress
from orpo_mlx.training.checkpoints.random_numbers import RandomState
from orpo_mlx.training.data_order import epoch_and_step, order_digest, total_steps
from orpo_mlx.training.run import Run, versions
from orpo_mlx.training.steps.step_values import RunningMean

STATE_FILE = "state.json"


class Recorded(NamedTuple):
    """What makes a run the run it is, as a checkpoint or `run.json` says it."""

    settings: Mapping[str, Any]
    order: str
    """`order_digest` of the run."""
    data: Mapping[str, str]
    """SHA-256 of each split's rows."""
    model: str
    """`model_digest` of the run."""
    reference: str
    """`reference_digest` of the run; empty where earlier versions wrote it."""
    versions: Mapping[str, str]


class State(NamedTuple):
    """What `state.json` says, checked."""

    progress: Progress
    total: int
    """Steps of the whole run."""
    first_step: int
    """Steps that the adapters it began with had taken in the run's own order of the data."""
    recorded: Recorded
    random_states: list[RandomState]
    """Of each rank."""
    metrics: FileMark
    samples: FileMark | None
    """None where no sample replies were kept."""
    rewards: RunningMean
    """Of the steps so far."""

    @property
    def finished(self) -> bool:
        """Whether all steps had been taken, or the run had ended by itself before that."""
        return self.progress.step >= self.total or self.progress.out_of_patience


def describe(
    run: Run, progress: Progress, marks: Mapping[str, FileMark], randoms: Sequence[RandomState]
) -> dict[str, Any]:
    """What `read_state` reads: `marks` of the files `metrics` and `samples`, `randoms` of all ranks."""
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
        "reference": run.reference_digest,
        **({"rewards": dataclasses.asdict(run.rewards)} if run.method.wanted.running else {}),
        "settings": run.config.settings(without=Trait.THIS_COMMAND),
        "versions": versions(),
    }


def read_state(checkpoint: CheckpointFolder) -> State:
    """What a checkpoint says of its run.

    Raises:
        TrainingError: its `state.json` is not one of this package.
        ConfigError: its settings are not settings of this version.
    """
    path = checkpoint.path / STATE_FILE
    try:
        state = _parse(json.loads(path.read_text(encoding="utf-8")))
        if state.progress.step != checkpoint.step:
            raise ValueError(f"step {state.progress.step}, expected {checkpoint.step}")
    # A JSON text of any shape may stand there; each of these means that it is of another.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise TrainingError(f"{path}: not the state of a run ({kind_and_reason(error)})") from None
    return state._replace(recorded=checked(state.recorded, path))


def checked(recorded: Recorded, path: Path) -> Recorded:
    """The same with its settings checked; ConfigError where they are not settings of this version."""
    return recorded._replace(settings=check_settings(recorded.settings, str(path)))


def parse_recorded(value: Mapping[str, Any]) -> Recorded:
    """What a table of a checkpoint says; KeyError, TypeError, ValueError or AttributeError where it does not."""
    return Recorded(
        settings=dict(value["settings"]),
        order=str(value["order"]),
        data=_texts(value["data"]),
        model=str(value["model"]),
        reference=str(value.get("reference", "")),
        versions=_texts(value["versions"]),
    )


def _parse(value: Mapping[str, Any]) -> State:
    """The state in a JSON value, its settings still as they are there."""
    state = State(
        progress=Progress.from_json(value["progress"]),
        total=int(value["total_steps"]),
        first_step=int(value["first_step"]),
        recorded=parse_recorded(value),
        random_states=[(int(high), int(low)) for high, low in value["random_states"]],
        metrics=_mark(value["metrics"]),
        samples=_mark(value["samples"]) if "samples" in value else None,
        rewards=RunningMean(**{name: float(number) for name, number in value.get("rewards", {}).items()}),
    )
    words = [word for pair in state.random_states for word in pair]
    # A word of more than 32 bits would run into the other half of the seed it becomes (`set_random_state`).
    if not words or not all(0 <= word < 1 << 32 for word in words) or state.first_step < 0:
        raise ValueError("a number out of range")
    return state


def _texts(table: Mapping[Any, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in table.items()}


def _mark(value: Mapping[str, Any]) -> FileMark:
    mark = FileMark(int(value["size"]), str(value["sha256"]))
    if mark.size < 0:
        raise ValueError("a negative size")
    return mark
