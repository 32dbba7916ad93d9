"""Files of one JSON object a line that a resumed run continues without gap or duplicate."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orpo_mlx.errors import TrainingError
from orpo_mlx.files import check_regular, flush_handle


class FileMark(NamedTuple):
    """How far a file has come."""

    size: int
    """Bytes."""
    sha256: str
    """Of those bytes."""


class Marks(NamedTuple):
    """How far the output of a run had come right after a step's report."""

    step: int
    files: dict[str, FileMark]
    before: dict[str, dict[str, float]]
    """What was measured before the first step and written there by then; the rest is measured again."""


def check_beginning(path: Path, since: FileMark) -> Any:
    """The hash, to be gone on with, of what a file held when it was marked; TrainingError where it does not now."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(since.size))
        size = file.tell()
    if (size, digest.hexdigest()) != since:
        raise TrainingError(
            f"{path}: its first {since.size} bytes are not those that were written before; put the file back, or move "
            "it away to begin a new one"
        )
    return digest


class LineFile:
    """One JSON object a line, each call's lines appended in one piece.

    A run that goes on from a checkpoint cuts off what was appended after it (`since`), since those steps are run
    again: every step is in the file once.

    Raises:
        OSError: the file cannot be written.
        TrainingError: the file does not begin with what the checkpoint knows of it.
    """

    def __init__(self, path: Path, since: FileMark | None = None) -> None:
        self._path = path
        self._size = 0
        self._digest = hashlib.sha256()
        check_regular(path)
        if since is not None and path.exists():
            self._digest = check_beginning(path, since)
            self._size = since.size
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        # One operation of the file system: interrupted before or after, it is done again, or found done, when the run
        # is next resumed.
        os.ftruncate(self._handle, self._size)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append objects without NaN or infinity.

        Raises:
            OSError: the disk is full; part of the lines may be in the file, where the next call replaces it.
        """
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        try:
            done = 0
            # At its own place, not at the file's end: the next call writes over what a full disk has cut off.
            while done < len(lines):
                done += os.pwrite(self._handle, lines[done:], self._size + done)
        except OSError as error:
            # `pwrite` is given a descriptor, so its error names no file.
            error.filename = str(self._path)
            raise
        self._size += len(lines)
        self._digest.update(lines)

    def mark(self) -> FileMark:
        """How far the file has come."""
        return FileMark(self._size, self._digest.hexdigest())

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        flush_handle(self._handle)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)
