"""A run before its first checkpoint: what `run.json` says of it, and beginning it again with `--resume`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from orpo_mlx.errors import TrainingError, kind_and_reason
from orpo_mlx.files import read_json_table, save_json, sha256_of
from orpo_mlx.run_folder import ADAPTERS_FILE, RUN_FILE
from orpo_mlx.training.checkpoints.progress import Progress
from orpo_mlx.training.checkpoints.state import Recorded, checked, parse_recorded
from orpo_mlx.training.data_order import order_digest, total_steps
from orpo_mlx.training.run import Run, run_record

_OVERWRITES = "overwrites_adapters"
"""Key of `run.json`: SHA-256 of the adapters that an earlier run left where this one will write its own."""


def record_beginning(run: Run, progress: Progress) -> None:
    """Write `run.json`: what `run_record` holds, what proves the run to be the same, and how far it goes."""
    path = run.folder / RUN_FILE
    adapters = run.folder / ADAPTERS_FILE
    # Those of this very run, once it has saved some, are not overwritten but gone on with.
    overwritten = sha256_of(adapters) if not progress.step and adapters.is_file() else None
    save_json(
        path,
        {
            **run_record(run),
            "order": order_digest(run),
            "model_digest": run.model_digest,
            "reference": run.reference_digest,
            _OVERWRITES: overwritten,
            # To the minute: what tells runs apart on a page, and nothing that a resumed run must repeat.
            "started": _started(path) if progress.step else datetime.now().astimezone().isoformat(timespec="minutes"),
            # The live page counts with these two: how many steps there will be, and where the run was taken up again.
            "total_steps": total_steps(run.config, len(run.splits["train"].pairs)),
            "resumed_at": progress.resumed_at,
        },
    )


def _started(path: Path) -> str | None:
    """When the run that goes on was begun, None where that is not known."""
    # The checkpoint has all that matters: a file that is damaged costs this date, and is written anew.
    with suppress(TrainingError):
        started = read_json_table(path, TrainingError).get("started")
        return started if isinstance(started, str) else None
    return None


def find_beginning(folder: Path) -> Recorded | None:
    """What `run.json` says of a run of which there is no checkpoint; None where no run was begun here.

    Raises:
        TrainingError: there are adapters that beginning again would overwrite, or `run.json` is not one.
        ConfigError: its settings are not settings of this version.
    """
    path = folder / RUN_FILE
    table = read_json_table(path, TrainingError) if path.is_file() else {}
    adapters = folder / ADAPTERS_FILE
    if adapters.is_file() and table.get(_OVERWRITES) != sha256_of(adapters):
        raise TrainingError(
            f"`resume`: {folder} holds adapters and no checkpoint to go on from; `resume_adapter_file` with another "
            "`adapter_path` starts from their weights, and `overwrite` starts anew"
        )
    if not table:
        return None
    try:
        return checked(_parse(table), path)
    # A JSON text of any shape may stand there; each of these means that it is of another.
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(
            f"{path}: does not say what run it is of ({kind_and_reason(error)}); `overwrite` starts anew"
        ) from None


def _parse(table: Mapping[str, Any]) -> Recorded:
    data = {str(name): str(split["sha256"]) for name, split in table["data"].items()}
    return parse_recorded({**table, "data": data, "model": table["model_digest"]})
