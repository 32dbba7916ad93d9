"""What `train` wrote into a folder, as the defaults of commands that come after it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.errors import DataError, ModelError
from orpo_mlx.files import read_json_table

_ADAPTERS = "adapters.safetensors"
_PEFTS = "adapter_model.safetensors"


def chosen_adapters(adapter_path: str | None, model: str | None) -> Path | None:
    """The adapters a command is about: those given or, where nothing was, those that `train` writes by default.

    None where a model was given alone, or nothing was and there are no adapters.
    """
    if adapter_path is not None:
        return Path(adapter_path).expanduser()
    default = Path(TrainingConfig.adapter_path)
    return default if model is None and (default / _ADAPTERS).is_file() else None


def base_model(folder: Path) -> str:
    """The model of the adapters in `folder`, as adapter_config.json (mlx-lm's or PEFT's) or run.json names it.

    Raises:
        ModelError: there are no adapters, or neither file names a model.
    """
    if not (folder / _ADAPTERS).is_file() and not (folder / _PEFTS).is_file():
        raise ModelError(f"`adapter_path` {folder}: holds no adapters.safetensors; give a folder that train wrote.")
    config = _table(folder / "adapter_config.json")
    name = config.get("model") or config.get("base_model_name_or_path") or recorded(folder, "model")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{folder / 'adapter_config.json'}: names no model; say with `model` what it was made for.")
    return name


def recorded(folder: Path, name: str) -> Any:
    """A setting of the run in a folder, None where nothing is recorded."""
    return _table(_table(folder / "run.json").get("settings")).get(name)


def held_out_file(folder: Path | None) -> str:
    """The held-out file of the run that wrote `folder`, of its test or else its valid split.

    Raises:
        DataError: there is none that is a single file on this machine.
    """
    from orpo_mlx.data.sources import FileSource, folder_splits

    data = None if folder is None else recorded(folder, "data")
    if isinstance(data, str) and Path(data).expanduser().is_dir():
        splits = folder_splits(Path(data).expanduser(), ("test", "valid"))
        source = splits.get("test") or splits.get("valid")
        if isinstance(source, FileSource) and len(source.paths) == 1:
            return str(source.paths[0])
    raise DataError(
        "--data: says which pairs are scored, and no run is at hand whose held-out file could be; give a file."
    )


def _table(source: Any) -> dict[str, Any]:
    """A JSON file's table, or `source` itself if it is one; empty where it is neither."""
    if isinstance(source, Path):
        with contextlib.suppress(ModelError):
            source = read_json_table(source, ModelError)
    return source if isinstance(source, dict) else {}
