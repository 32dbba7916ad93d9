"""A run put back to where a checkpoint left it: the checkpoint found, its settings compared, its arrays restored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_unflatten

from orpo_mlx.config.settings import TrainingConfig, settings_with
from orpo_mlx.config.traits import Trait
from orpo_mlx.errors import ConfigError, TrainingError, reason_of
from orpo_mlx.models.adapters import adapter_metadata, adapter_weights, load_adapter_file
from orpo_mlx.run_folder import ADAPTERS_FILE, CHECKPOINTS
from orpo_mlx.training.checkpoints.beginning import find_beginning
from orpo_mlx.training.checkpoints.folders import (
    CheckpointFolder,
    checkpoint_name,
    clear_unfinished,
    put_back,
    whole_checkpoints,
)
from orpo_mlx.training.checkpoints.progress import Progress
from orpo_mlx.training.checkpoints.random_numbers import random_state_of, set_random_state
from orpo_mlx.training.checkpoints.save import (
    OPTIMIZER_FILE,
    REFERENCE_FILE,
    REFERENCE_IDENTITY,
    REFERENCE_WEIGHTS_FILE,
    optimizer_arrays,
    put_adapters,
)
from orpo_mlx.training.checkpoints.state import Recorded, State, read_state
from orpo_mlx.training.data_order import order_digest, total_steps
from orpo_mlx.training.distributed import Ranks
from orpo_mlx.training.optimizers import set_learning_rate
from orpo_mlx.training.references.other_references import SyncedReference
from orpo_mlx.training.run import Run, versions


class Resumed(NamedTuple):
    """What a run goes on from."""

    checkpoint: CheckpointFolder
    state: State
    notes: list[str]
    """Sentences for the user: newer checkpoints that are not whole, what has changed since."""


def newest(folder: Path) -> tuple[CheckpointFolder | None, list[str]]:
    """The newest whole checkpoint of an adapter folder, and a sentence for each newer one that is not whole."""
    problems: list[str] = []
    for found in whole_checkpoints(folder / CHECKPOINTS):
        if isinstance(found, CheckpointFolder):
            return found, problems
        problems.append(found)
    return None, problems


def refuse_unfinished(folder: Path) -> None:
    """Raise TrainingError where the folder holds a run that has not, or may not have, come to its end: a new one would
    write over it."""
    checkpoint, problems = newest(folder)
    if checkpoint is None and problems:
        raise TrainingError(
            f"`adapter_path` {folder}: holds a run whose checkpoints are damaged ({problems[0].rstrip('.')}); put a "
            "whole one back, or `overwrite` starts anew"
        )
    if checkpoint is None:
        return
    state = read_state(checkpoint)
    if not state.finished:
        raise TrainingError(
            f"`adapter_path` {folder}: holds a run that ended at step {checkpoint.step} of {state.total}; "
            "`resume` goes on with it, `overwrite` starts anew, or give another folder"
        )


def begin_again(config: TrainingConfig, folder: Path, ranks: Ranks) -> tuple[TrainingConfig, Recorded | None]:
    """The settings a run is prepared with, and what is known of it where it ended before its first checkpoint.

    Such a run begins again and is no resumed one: `resume` is then off, so that it loads the adapters it starts from.

    Raises:
        TrainingError: see `find_checkpoint` and `beginning.find_beginning`.
    """
    if not config.resume:
        return config, None
    # Rank 0 alone has the run's own folder.
    nothing_saved = ranks.first and find_checkpoint(folder)[0] is None
    recorded = find_beginning(folder) if nothing_saved else None
    # Rank 0 decides for all: ranks that disagreed here would make other exchanges from here on, and wait for ever.
    if json.loads(ranks.from_first(json.dumps(nothing_saved).encode())):
        return dataclasses.replace(config, resume=False), recorded
    return config, None


def find_resumed(run: Run) -> Resumed | None:
    """What a run goes on from, once it has been found to fit; None where it starts from the beginning.

    Raises:
        ConfigError: it is not the run that was saved, see `accept`, or has taken more steps than it is to take.
        TrainingError: there are checkpoints and none of them is whole.
    """
    checkpoint, problems = find_checkpoint(run.folder) if run.config.resume else (None, [])
    checkpoint = copied_to_all(run, checkpoint)
    if checkpoint is None:
        return None
    state = read_state(checkpoint)
    changes = accept(run, state.recorded, f"was saved at step {state.progress.step}")
    notes = [*problems, *(f"Changed since the checkpoint: {change}." for change in changes)]
    return Resumed(checkpoint, state, [*notes, *_steps_left(run, state.progress)])


def _steps_left(run: Run, progress: Progress) -> list[str]:
    """What is to be said of a run that has no step left; ConfigError where it has taken more than it is to take."""
    total = total_steps(run.config, len(run.splits["train"].pairs))
    if progress.step > total:
        raise ConfigError(
            f"`resume`: {progress.step} steps are taken already, and the settings end the run after {total}; give "
            f"`iters={progress.step}` or more."
        )
    progress.out_of_patience = progress.out_of_patience and progress.patience.is_over(run.config)
    if not progress.out_of_patience:
        return []
    said = f"The run ended by itself after step {progress.step} (`patience={run.config.patience}`)"
    return [f"{said}, and trains no further; a larger `patience` goes on."]


def find_checkpoint(folder: Path) -> tuple[CheckpointFolder | None, list[str]]:
    """What `resume` goes on from, None where nothing was saved yet; TrainingError where no checkpoint is whole."""
    checkpoint, problems = newest(folder)
    _require_whole(folder, checkpoint, problems)
    # First: what is cleared may be the very one that was chosen.
    checkpoint = checkpoint and put_back(checkpoint)
    clear_unfinished(folder / CHECKPOINTS)
    return checkpoint, problems


def _require_whole(folder: Path, checkpoint: CheckpointFolder | None, problems: Sequence[str]) -> None:
    if checkpoint is None and problems:
        raise TrainingError(
            f"`resume`: no checkpoint in {folder / CHECKPOINTS} is whole ({problems[0].rstrip('.')}); put a whole one "
            "back, or remove that folder to start from the beginning"
        )


def settings_to_resume(adapter_path: str, given: Collection[str] = ()) -> dict[str, Any]:
    """The settings of the run in an adapter path: of its newest whole checkpoint or, before the first, of `run.json`.

    None where nothing was begun there, if the settings `given` say what to train.

    Raises:
        TrainingError: there is nothing to go on with; see also `find_checkpoint` and `beginning.find_beginning`.
    """
    folder = Path(adapter_path).expanduser()
    checkpoint, problems = newest(folder)
    _require_whole(folder, checkpoint, problems)
    recorded = read_state(checkpoint).recorded if checkpoint else find_beginning(folder)
    if recorded is None:
        if set(given) <= set(settings_with(Trait.THIS_COMMAND | Trait.RESUMABLE)):
            raise TrainingError(
                f"`resume`: {folder} holds no run to go on with; check `adapter_path`, or give the run's settings, too"
            )
        return {}
    mine = settings_with(Trait.THIS_COMMAND)
    return {name: value for name, value in recorded.settings.items() if name not in mine}


def facts(run: Run) -> dict[str, Any]:
    """What all ranks of a run must have in common."""
    common = run.config.settings(without=Trait.PER_RANK | Trait.BY_CONTENT)
    settings = {f"`{name}`": value for name, value in common.items()}
    weights = adapter_weights(run.loaded.model)
    packages = {name: version for name, version in versions().items() if name in ("orpo-mlx", "mlx", "mlx-lm")}
    return {
        **settings,
        **{f"`data`, rows of {name}": split.sha256 for name, split in run.splits.items()},
        "`data`, in order": order_digest(run),
        "`model`, weights": run.model_digest,
        "`reference`": run.reference_digest,
        "trained parameters": [sum(array.size for array in weights.values()), len(weights)],
        **packages,
    }


def copied_to_all(run: Run, checkpoint: CheckpointFolder | None) -> CheckpointFolder | None:
    """Rank 0's checkpoint, copied into the other ranks' own folders."""
    ranks = run.ranks
    if ranks.size == 1:
        return checkpoint
    # Through the ranks' own connection: they need not share a disk.
    names = sorted(path.name for path in checkpoint.path.iterdir()) if checkpoint else []
    step, names = json.loads(ranks.from_first(json.dumps([checkpoint and checkpoint.step, names]).encode()))
    if step is None:
        return None
    folder = run.folder / CHECKPOINTS / checkpoint_name(step)
    folder.mkdir(parents=True, exist_ok=True)
    # The names are rank 0's, so that all ranks make the same number of transfers.
    for name in names:
        content = ranks.from_first((folder / name).read_bytes() if ranks.first else b"")
        if not ranks.first:
            (folder / name).write_bytes(content)
    return CheckpointFolder(folder, step)


def accept(run: Run, recorded: Recorded, when: str) -> list[str]:
    """The differences between a run and what is recorded of the one it goes on with, as text; `when` is for errors.

    Raises:
        ConfigError: some change the maths, and `--resume-with-changes` is not given; lists them.
    """
    changed = changed_settings(run, recorded)
    harmless = [name for name in changed if name in settings_with(Trait.RESUMABLE)]
    serious = [_change(run, recorded, name) for name in changed if name not in harmless]
    others = [name for name, split in run.splits.items() if split.sha256 != recorded.data.get(name, split.sha256)]
    if others:
        serious.append(f"`data`: other rows in {', '.join(others)}")
    # Where settings have changed that the order depends on, or the rows themselves, to speak of it would mislead.
    elif recorded.order != order_digest(run) and not serious:
        serious.append("`data`: other tokens to train on")
    if recorded.model != run.model_digest:
        serious.append("`model`: other weights")
    if _is_another_reference(run, recorded):
        then = recorded.settings.get("reference")
        serious.append(f"`reference` {then} is now {run.config.reference}, another model")
    if serious and not run.config.resume_with_changes:
        raise ConfigError(
            f"`resume`: this is not the run that {when} ({'; '.join(serious)}); give the same settings, or "
            "`resume_with_changes`"
        )
    now = versions()
    newer = [f"{name} {old} is now {now.get(name)}" for name, old in recorded.versions.items() if now.get(name) != old]
    return [*serious, *(_change(run, recorded, name) for name in harmless), *newer]


def changed_settings(run: Run, recorded: Recorded) -> list[str]:
    """Names of settings whose values are not those recorded; one that is not there had its default."""
    defaults = TrainingConfig().settings()
    ours = run.config.settings(without=Trait.THIS_COMMAND | Trait.BY_CONTENT)
    return [name for name, value in ours.items() if value != recorded.settings.get(name, defaults[name])]


def restore_reference(run: Run, resumed: Resumed) -> list[str]:
    """Put back a reference that moves, and the log-probs that the checkpoint remembers; what could not be put back, as
    text. TrainingError where they cannot be read."""
    checkpoint, recorded = resumed.checkpoint, resumed.state.recorded
    if isinstance(run.reference, SyncedReference):
        # First: what it had remembered belongs to the weights it had.
        weights = checkpoint.path / REFERENCE_WEIGHTS_FILE
        with _readable(weights):
            run.reference.restore(_arrays(weights), checkpoint.step)
    path = checkpoint.path / REFERENCE_FILE
    if run.reference is None or not path.is_file():
        return []
    if recorded.model != run.model_digest or _is_another_reference(run, recorded):
        return ["The checkpoint's reference log-probs are of another model: they are computed anew."]
    with _readable(path):
        run.reference.table.restore(_arrays(path), adapter_metadata(path).get(REFERENCE_IDENTITY, ""))
    return []


def _is_another_reference(run: Run, recorded: Recorded) -> bool:
    return recorded.reference not in ("", run.reference_digest)


def restore(run: Run, resumed: Resumed) -> list[str]:
    """Put adapters, optimiser and random numbers back; what could not be put back, as text.

    Raises:
        UserError: the adapters are not those of this model, or the optimiser is another one.
    """
    folder = resumed.checkpoint.path
    load_adapter_file(run.loaded.model, folder / ADAPTERS_FILE, run.config.lora_parameters["scale"])
    run.rewards = resumed.state.rewards
    notes = _restore_optimizer(run, folder / OPTIMIZER_FILE)
    # Read now: the checkpoint's file may be gone before a lazy array of it is looked at.
    mx.eval(run.loaded.model.trainable_parameters(), run.optimizer.state)
    # A run that was killed, or met a full disk, between its last checkpoint and these does not save that step again.
    put_adapters(run, resumed.checkpoint)
    # Last: between here and the first step nothing may draw any.
    set_random_state(random_state_of(run.ranks.rank, resumed.state.random_states))
    return notes


def _restore_optimizer(run: Run, path: Path) -> list[str]:
    # Until it is initialised there is no state to compare the file's with.
    run.optimizer.init(run.loaded.model.trainable_parameters())
    expected = {name: _kind(array) for name, array in optimizer_arrays(run).items()}
    with _readable(path):
        found = _arrays(path)
    kinds = {name: _kind(array) for name, array in found.items()}
    problems = sorted(name for name in {*expected, *kinds} if expected.get(name) != kinds.get(name))
    if problems and run.config.resume_with_changes:
        return ["The optimiser is another one: it begins anew."]
    if problems:
        raise TrainingError(f"{path}: {problems[0]} is not what this run's optimiser keeps")
    run.optimizer.state = tree_unflatten(list(found.items()))
    # Once more: MLX's setter marks the optimiser as not initialised, and flattening has dropped empty states.
    run.optimizer.init(run.loaded.model.trainable_parameters())
    set_learning_rate(run.optimizer, run.config)
    return []


def _change(run: Run, recorded: Recorded, name: str) -> str:
    return f"`{name}` {recorded.settings.get(name)} is now {getattr(run.config, name)}"


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
