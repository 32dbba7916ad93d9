"""What `train` wrote into a folder, as the defaults of commands that come after it."""

from __future__ import annotations

from pathlib import Path

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.errors import DataError
from orpo_mlx.models.recorded import recorded
from orpo_mlx.run_folder import ADAPTERS_FILE


def chosen_adapters(adapter_path: str | None, model: str | None) -> Path | None:
    """The adapters a command is about: those given or, where nothing was, those that `train` writes by default.

    None where a model was given alone, or nothing was and there are no adapters.
    """
    if adapter_path is not None:
        return Path(adapter_path).expanduser()
    default = Path(TrainingConfig.adapter_path)
    return default if model is None and (default / ADAPTERS_FILE).is_file() else None


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
