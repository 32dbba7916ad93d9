"""What `train` wrote into a folder beside the weights."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from orpo_mlx.errors import ModelError
from orpo_mlx.files import read_json_table
from orpo_mlx.run_folder import ADAPTER_CONFIG_FILE, ADAPTERS_FILE, PEFT_WEIGHTS, RUN_FILE


def base_model(folder: Path, source: str = "`adapter_path`") -> str:
    """The model of the adapters in `folder`, as adapter_config.json (mlx-lm's or PEFT's) or run.json names it.

    Args:
        folder: the adapters' folder.
        source: what the user gave it with, for errors.

    Raises:
        ModelError: there are no adapters, or neither file names a model.
    """
    if not (folder / ADAPTERS_FILE).is_file() and not (folder / PEFT_WEIGHTS).is_file():
        raise ModelError(f"{source} {folder}: holds no {ADAPTERS_FILE}; give a folder that train wrote.")
    config = _table(folder / ADAPTER_CONFIG_FILE)
    name = config.get("model") or config.get("base_model_name_or_path") or recorded(folder, "model")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{folder / ADAPTER_CONFIG_FILE}: names no model; say with `model` what it was made for.")
    return name


def recorded(folder: Path, name: str) -> Any:
    """A setting of the run in a folder, None where nothing is recorded."""
    return _table(_table(folder / RUN_FILE).get("settings")).get(name)


def _table(source: Any) -> dict[str, Any]:
    """A JSON file's table, or `source` itself if it is one; empty where it is neither."""
    if isinstance(source, Path):
        with contextlib.suppress(ModelError):
            source = read_json_table(source, ModelError)
    return source if isinstance(source, dict) else {}
