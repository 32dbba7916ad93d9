"""Finished trainings, remembered on disk, so that an interrupted exercise goes on where it was, in any number of
processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from orpo_mlx.compare.exercise.significance import rounded
from orpo_mlx.errors import ConfigError
from orpo_mlx.files import read_json_table, save_json

T = TypeVar("T")
Progress = Callable[[int, str, float], None]
"""Told of how many different cells are done, the name of the newest, and the seconds it took since this process began;
0 where it was done before."""
_LOCKS = "cells.lock"
_PAUSE_SECONDS = 1.0


class BusyError(Exception):
    """A cell that another process is at."""


class Cells:
    """Results by what makes each different from the others, one file each.

    Several processes may share a folder: a cell is computed by one of them. The system lets go of a cell however its
    process ends.

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
        self.left_to_others: Callable[[], bool] = lambda: False
        """Whether other processes compute the cells, so that this one need not."""
        self._known: dict[str, dict[str, Any]] = {}
        self._seen: set[str] = set()
        found = json.loads(json.dumps(dict(common)))
        file = folder / "exercise.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = read_json_table(file, ConfigError) if file.is_file() else None
            self._done_before = {path.name for path in folder.glob("*.json")}
            # Held open: closing any descriptor of the file would let go of all of this process's locks.
            self._locks = os.open(folder / _LOCKS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except (OSError, ValueError) as error:
            raise ConfigError(f"`output` {folder}: cannot be used ({error}); give another `output`.") from None
        if before is None:
            save_json(file, found)
        elif before != found:
            other = next(key for key in sorted({*before, *found}) if before.get(key) != found.get(key))
            raise ConfigError(f"{file}: holds another exercise, whose {other} differs; give another `output`.")

    def get(self, identity: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The result of a cell: remembered, or computed now and kept.

        Raises:
            BusyError: another process is at it, or will be.
            ConfigError: the folder is on a file system without locks.
        """
        file, found = self._get(identity, lambda: rounded(dict(compute())))
        if found["identity"] not in self._seen:
            self._seen.add(found["identity"])
            seconds = 0.0 if file.name in self._done_before else found["seconds"]
            self._progress(len(self._seen), name_of(identity), seconds)
        return dict(found["result"])

    def keep(self, identity: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """As `get`, for what cells are computed from: in full precision, and not counted as progress."""
        return dict(self._get(identity, compute)[1]["result"])

    def _get(
        self, identity: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
    ) -> tuple[Path, dict[str, Any]]:
        # Through JSON, as what is read back has been: a result is the same object whether it was remembered or not.
        key = json.dumps(identity, sort_keys=True)
        # Cut short, since a chance match does no harm: the file holds the whole identity, which is compared.
        digest = hashlib.sha256(key.encode()).hexdigest()[:24]
        file = self._folder / f"{digest}.json"
        if self._remembered(file, key) is None:
            if self.left_to_others():
                raise BusyError
            with self._claimed(int(digest[:15], 16)):
                # Another process may have finished it just now.
                if self._remembered(file, key) is None:
                    started = time.perf_counter()
                    result = json.loads(json.dumps(compute()))
                    seconds = time.perf_counter() - started
                    self._known[key] = {"identity": key, "seconds": seconds, "result": result}
                    save_json(file, self._known[key])
        return file, self._known[key]

    @contextmanager
    def _claimed(self, place: int) -> Iterator[None]:
        """Hold a cell for this process: the lock of one byte of a file, which need not be as long as that."""
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):
            raise BusyError from None
        except OSError as error:
            raise ConfigError(
                f"`output` {self._folder}: its file system has no locks ({error.strerror}); give another `output`."
            ) from None
        try:
            yield
        finally:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, place)

    def _remembered(self, file: Path, key: str) -> dict[str, Any] | None:
        if key not in self._known:
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                return None
            if not isinstance(found, dict) or found.get("identity") != key:
                return None
            self._known[key] = found
        return self._known[key]


def every(calls: Iterable[Callable[[], T]]) -> list[T]:
    """The results of all calls, in order; BusyError, once all were made, where another process is at any of them."""
    found: list[T] = []
    busy = False
    for call in calls:
        try:
            found.append(call())
        except BusyError:
            busy = True
    if busy:
        raise BusyError
    return found


def until_done(calls: Sequence[Callable[[], T]]) -> list[T]:
    """`every`, again and again until no other process is at any of them: whoever is free computes what nobody is at."""
    while True:
        try:
            return every(calls)
        except BusyError:
            time.sleep(_PAUSE_SECONDS)


def name_of(identity: Mapping[str, Any]) -> str:
    """A cell in words: the values of what makes it different."""
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in identity.values())
