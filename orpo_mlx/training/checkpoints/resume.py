"""What a checkpoint holds of a run, and a run put back to where a checkpoint left it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from orpo_mlx.config.settings import SETTINGS, TrainingConfig, settings_with
from orpo_mlx.config.traits import Trait
from orpo_mlx.errors import ConfigError, TrainingError, reason_of
from orpo_mlx.files import json_text, save_adapters, save_json, save_safetensors
from orpo_mlx.models.adapters import adapter_weights, load_adapter_file
from orpo_mlx.reporting.resumable_jsonl import FileMark
from orpo_mlx.training.checkpoints.folders import (
    Checkpoint,
    clear_unfinished,
    prune,
    whole_checkpoints,
    write_checkpoint,
)
from orpo_mlx.training.checkpoints.progress import Progress
from orpo_mlx.training.checkpoints.state import (
    _ADAPTERS,
    _OPTIMIZER,
    _REFERENCE,
    _STATE,
    State,
    _describe,
    random_state_of,
    read_state,
    set_random_state,
)
from orpo_mlx.training.data_order import order_digest, place_metadata
from orpo_mlx.training.run import Run, adapter_config, versions

CHECKPOINTS = "checkpoints"
BEST = "best"


def save(run: Run, progress: Progress, marks: Mapping[str, FileMark], randoms: Sequence[tuple[int, int]]) -> Checkpoint:
    """Save a run as it stands after `progress.step` steps, then remove the checkpoints that are one too many.

    Only rank 0 writes. `marks` say how far the files of `metrics` and `samples` had come; `randoms` are the random
    states of all ranks.

    Raises:
        TrainingError: a weight is not finite, or the disk cannot be written; earlier checkpoints are untouched.
    """
    weights, optimizer = adapter_weights(run.loaded.model), _optimizer_arrays(run)
    place = place_metadata(run, progress.step)
    for name, array in (*weights.items(), *optimizer.items()):
        if not mx.isfinite(array).all().item():
            raise TrainingError(f"{name} is not finite after step {progress.step}, so it is not saved")
    if not run.ranks.first:
        return Checkpoint(run.folder / CHECKPOINTS, progress.step)
    state = _describe(run, progress, marks, randoms)

    def write(folder: Path) -> None:
        save_safetensors(folder / _ADAPTERS, weights, place)
        save_safetensors(folder / _OPTIMIZER, optimizer)
        if run.reference is not None:
            save_safetensors(folder / _REFERENCE, run.reference.table.arrays())
        (folder / _STATE).write_text(json_text(state), encoding="utf-8")
        (folder / "adapter_config.json").write_text(json_text(adapter_config(run)), encoding="utf-8")

    parent = run.folder / CHECKPOINTS
    try:
        checkpoint = write_checkpoint(parent, progress.step, write)
        save_adapters(run.folder, weights, place)
        save_json(run.folder / "adapter_config.json", adapter_config(run))
        prune(parent, run.config.keep, [] if progress.best is None else [progress.best.step])
    except OSError as error:
        raise TrainingError(f"{error.filename}: cannot be saved ({error.strerror or error})") from None
    return checkpoint


def mark_best(run: Run, step: int) -> None:
    """Let `best` lead to the checkpoint of a step."""
    link, temporary = run.folder / BEST, run.folder / f".{BEST}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(Path(CHECKPOINTS) / f"step-{step:07d}")
    temporary.replace(link)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of an adapter folder, and a sentence for each newer one that is not whole."""
    problems: list[str] = []
    for found in whole_checkpoints(folder / CHECKPOINTS):
        if isinstance(found, Checkpoint):
            return found, problems
        problems.append(found)
    return None, problems


def find_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """What `--resume` goes on from: `newest`, where None means that the run has not saved anything yet.

    Raises:
        TrainingError: there are checkpoints and none of them is whole.
    """
    checkpoint, problems = newest(folder)
    if checkpoint is None and problems:
        raise TrainingError(
            f"--resume: no checkpoint in {folder / CHECKPOINTS} is whole ({problems[0].rstrip('.')}); put a whole one "
            "back, or remove that folder to start from the beginning"
        )
    clear_unfinished(folder / CHECKPOINTS)
    return checkpoint, problems


def settings_of_newest(adapter_path: str) -> dict[str, Any]:
    """The settings that the newest whole checkpoint of an adapter path was made with; none where there is no such.

    Raises:
        ConfigError: they are not settings of this version.
    """
    checkpoint, _ = newest(Path(adapter_path).expanduser())
    if checkpoint is None:
        return {}
    settings = read_state(checkpoint).settings
    return {name: value for name, value in settings.items() if name not in settings_with(Trait.THIS_COMMAND)}


def facts(run: Run) -> dict[str, Any]:
    """What all ranks of a run must have in common."""
    common = run.config.settings(without=Trait.PER_RANK | Trait.BY_CONTENT)
    settings = {SETTINGS[name].flag: value for name, value in common.items()}
    weights = adapter_weights(run.loaded.model)
    packages = {name: version for name, version in versions().items() if name in ("orpo-mlx", "mlx", "mlx-lm")}
    return {
        **settings,
        **{f"--data, rows of {name}": split.sha256 for name, split in run.splits.items()},
        "--data, in order": order_digest(run),
        "--model, weights": run.model_digest,
        "trained parameters": [sum(array.size for array in weights.values()), len(weights)],
        **packages,
    }


def copied_to_all(run: Run, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Rank 0's checkpoint, copied into the other ranks' own folders."""
    ranks = run.ranks
    if ranks.size == 1:
        return checkpoint
    names = sorted(path.name for path in checkpoint.folder.iterdir()) if checkpoint else []
    step, names = json.loads(ranks.from_first(json.dumps([checkpoint and checkpoint.step, names]).encode()))
    if step is None:
        return None
    folder = run.folder / CHECKPOINTS / f"step-{step:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        content = ranks.from_first((folder / name).read_bytes() if ranks.first else b"")
        if not ranks.first:
            (folder / name).write_bytes(content)
    return Checkpoint(folder, step)


def accept(run: Run, state: State) -> list[str]:
    """The differences between a run and the checkpoint it goes on from, in words.

    Raises:
        ConfigError: some change the maths, and `--resume-with-changes` is not given; lists them.
    """
    ours = run.config.settings(without=Trait.THIS_COMMAND | Trait.BY_CONTENT)
    defaults = TrainingConfig().settings()
    changed = [name for name, value in ours.items() if value != state.settings.get(name, defaults[name])]
    harmless = [name for name in changed if name in settings_with(Trait.RESUMABLE)]
    serious = [_change(run, state, name) for name in changed if name not in harmless]
    hashes = {name: split.sha256 for name, split in run.splits.items()}
    if state.order != order_digest(run) and not serious:
        serious.append("--data: other rows to train on")
    serious += [
        f"--data: other rows in {name}" for name in hashes if hashes[name] != state.data.get(name, hashes[name])
    ]
    if state.model != run.model_digest:
        serious.append("--model: other weights")
    if serious and not run.config.resume_with_changes:
        raise ConfigError(
            f"--resume: this is not the run that was saved at step {state.progress.step} ({'; '.join(serious)}); give "
            "the same settings, or --resume-with-changes"
        )
    now = versions()
    others = [f"{name} {old} is now {now.get(name)}" for name, old in state.versions.items() if now.get(name) != old]
    return [*serious, *(_change(run, state, name) for name in harmless), *others]


def restore_reference(run: Run, checkpoint: Checkpoint) -> None:
    """Remember the reference log-probs that the checkpoint remembers.

    Raises:
        TrainingError: they cannot be read.
    """
    path = checkpoint.folder / _REFERENCE
    if run.reference is not None and path.is_file():
        with _readable(path):
            run.reference.table.restore(_arrays(path))


def restore(run: Run, checkpoint: Checkpoint, state: State) -> list[str]:
    """Put adapters, optimiser and random numbers back; what could not be put back, in words.

    Raises:
        UserError: the adapters are not those of this model.
    """
    notes = []
    load_adapter_file(run.loaded.model, checkpoint.folder / _ADAPTERS, run.config.lora_parameters["scale"])
    path = checkpoint.folder / _OPTIMIZER
    run.optimizer.init(run.loaded.model.trainable_parameters())
    expected = _optimizer_arrays(run)
    with _readable(path):
        found = _arrays(path)
    problems = [
        name
        for name in {*expected, *found}
        if name not in expected or name not in found or _kind(found[name]) != _kind(expected[name])
    ]
    if not problems:
        run.optimizer.state = tree_unflatten(list(found.items()))
        run.optimizer.init(run.loaded.model.trainable_parameters())
        if run.config.lr_schedule is None:
            run.optimizer.learning_rate = run.config.learning_rate
    elif run.config.resume_with_changes:
        notes.append("The optimiser is another one: it begins anew.")
    else:
        raise TrainingError(f"{path}: {sorted(problems)[0]} is not what this run's optimiser keeps")
    mx.eval(run.loaded.model.trainable_parameters(), run.optimizer.state)
    set_random_state(random_state_of(run.ranks.rank, state.random_states))
    return notes


def _change(run: Run, state: State, name: str) -> str:
    old, new = state.settings.get(name), getattr(run.config, name)
    return f"{SETTINGS[name].flag} {old} is now {new}"


def _optimizer_arrays(run: Run) -> dict[str, mx.array]:
    flat: list[tuple[str, Any]] = tree_flatten(run.optimizer.state)  # type: ignore[assignment]
    return {name: value for name, value in flat if isinstance(value, mx.array)}


def _kind(array: mx.array) -> tuple[Any, ...]:
    return array.shape, array.dtype


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path}: not what a checkpoint holds under this name ({reason_of(error)})") from None


def _arrays(path: Path) -> dict[str, mx.array]:
    """The arrays of a file, read now: the file may be gone before a lazy one is looked at."""
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    return arrays
