"""Finished trainings, remembered on disk, so that an interrupted exercise goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orpo_mlx.compare.exercise.significance import rounded
from orpo_mlx.errors import ConfigError
from orpo_mlx.files import save_json

Progress = Callable[[int, str, float], None]
"""Told of how many different cells are done, the name of the newest, and the seconds it took; 0 where remembered."""


class Cells:
    """Results by what makes each different from the others, one file each.

    Args:
        folder: where they are kept.
        common: what all of them depend on; a folder that holds others is refused.
        progress: told of each.

    Raises:
        ConfigError: the folder cannot be made, or holds cells of another exercise.
    """

    def __init__(self, folder: Path, common: Mapping[str, Any], progress: Progress) -> None:
        self._folder = folder
        self._progress = progress
        self._seen: set[str] = set()
        found = json.loads(json.dumps(dict(common)))
        file = folder / "exercise.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        except (OSError, ValueError) as error:
            raise ConfigError(f"`output` {folder}: cannot be used ({error}); give another `output`.") from None
        if before is None:
            save_json(file, found)
        elif before != found:
            other = next(key for key in sorted({*before, *found}) if before.get(key) != found.get(key))
            raise ConfigError(f"{file}: holds another exercise, whose {other} differs; give another `output`.")

    def get(self, identity: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The result of a cell: remembered, or computed now and kept."""
        # Through JSON, as what is read back has been: a result is the same object whether it was remembered or not.
        key = json.dumps(identity, sort_keys=True)
        # Cut short, since a chance match does no harm: the file holds the whole identity, which is compared.
        file = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        result = self._remembered(file, key)
        seconds = 0.0
        if result is None:
            started = time.perf_counter()
            result = json.loads(json.dumps(rounded(dict(compute()))))
            seconds = time.perf_counter() - started
            save_json(file, {"identity": key, "result": result})
        self._seen.add(key)
        self._progress(len(self._seen), name_of(identity), seconds)
        return result

    def _remembered(self, file: Path, key: str) -> dict[str, Any] | None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        result: dict[str, Any] | None = found["result"] if found.get("identity") == key else None
        return result


def name_of(identity: Mapping[str, Any]) -> str:
    """A cell in words: the values of what makes it different."""
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in identity.values())
