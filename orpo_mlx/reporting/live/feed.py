"""What is new in a run since a page last asked: read from the run's folder, and of `metrics.jsonl` nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orpo_mlx.files import check_regular
from orpo_mlx.folder_lock import is_held_by_a_living_process
from orpo_mlx.run_folder import METRICS_FILE, RUN_FILE
from orpo_mlx.text import printable

PIECE = 1 << 20
"""Bytes of `metrics.jsonl` in one answer, at most."""
# Bytes before a mark that its digest covers: the last reports, which differ from run to run.
_CHECKED = 1024
_MARK = re.compile(r"([0-9]{1,15})-([0-9a-f]{16})")
START = "0-" + hashlib.sha256().hexdigest()[:16]
"""The mark before a file's first byte."""

# The states of a run, as the page shows them.
PREPARING = "preparing"
GOING_ON = "going on"
ENDED = "ended"


class Lines(NamedTuple):
    """Whole lines of a file that follow a mark."""

    mark: str
    """To ask with for what follows these."""
    again: bool
    """Whether they are the file's first, because what had been read is no longer in the file."""
    more: bool
    """Whether there is more to read now."""
    content: bytes


def lines_after(path: Path, mark: str) -> Lines:
    """What `path` holds after `mark`, at most `PIECE` bytes of it; "" or anything else that is no mark is the start.

    A mark is an offset in the file with a digest of the bytes before it. A line that is not finished is left for later.

    Raises:
        OSError: the file is there and cannot be read.
    """
    # An offset alone would not do: a resumed run cuts its metrics off and goes on writing, so that it could lie in the
    # middle of other lines by the time it is asked for.
    found = _MARK.fullmatch(mark)
    start = int(found[1]) if found else 0
    try:
        check_regular(path)
        with path.open("rb") as file:
            again = found is not None and _digest(file, start) != found[2]
            start = 0 if again else start
            file.seek(start)
            content = file.read(PIECE)
            end = content.rfind(b"\n") + 1
            # A line longer than a piece is no report; stopping before it would stop there for ever.
            end = end or (PIECE if len(content) == PIECE else 0)
            digest = _digest(file, start + end)
            return Lines(f"{start + end}-{digest}", again, len(content) == PIECE, content[:end])
    except FileNotFoundError:
        return Lines(START, start > 0, False, b"")


class Feed:
    """The answers to a page about one run.

    Args:
        folder: the run's adapter path.
        said: what the run has said, newest last; for a run of this process.
        state: PREPARING, GOING_ON or ENDED, for a run of this process, which keeps it up to date; None finds out.
    """

    def __init__(self, folder: Path, said: Callable[[], Sequence[str]] = tuple, state: str | None = None) -> None:
        self.folder = folder
        self.state = state
        self._said = said
        self._record: tuple[int, dict[str, Any]] = (0, {})

    def lines(self, mark: str) -> Lines:
        """See `lines_after`. What an earlier run left in the folder is not shown while a new one is prepared."""
        if self.state == PREPARING:
            return Lines(START, mark not in ("", START), False, b"")
        return lines_after(self.folder / METRICS_FILE, mark)

    def facts(self) -> dict[str, Any]:
        """What a page shows beside the figures: plain texts and numbers.

        `elapsed_s` lies between the start, at step `since`, and the newest report, `age_s` between that and now.
        """
        state = self.state or (GOING_ON if is_held_by_a_living_process(self.folder) else ENDED)
        record, started = ({}, 0) if self.state == PREPARING else self._read_record()
        settings = record.get("settings")
        settings = settings if isinstance(settings, dict) else {}
        resumed = record.get("resumed_at")
        since = resumed[-1] if isinstance(resumed, list) and resumed else 0
        written = None if self.state == PREPARING else _modified(self.folder / METRICS_FILE)
        return {
            "state": state,
            "method": _text(settings.get("method")),
            "model": _text(settings.get("model")),
            "total": _count(record.get("total_steps")),
            "since": _count(since) or 0,
            "elapsed_s": (written - started) / 1e9 if written and started and written > started else None,
            "age_s": max(0.0, (time.time_ns() - written) / 1e9) if written else None,
            "said": [printable(line) for text in self._said() for line in text.split("\n") if line],
        }

    def _read_record(self) -> tuple[dict[str, Any], int]:
        """`run.json` and when it was written; read again only when it was."""
        path = self.folder / RUN_FILE
        written = _modified(path)
        if written is None:
            return {}, 0
        if self._record[0] != written:
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                record = {}
            self._record = (written, record if isinstance(record, dict) else {})
        return self._record[1], written


def _digest(file: Any, end: int) -> str:
    """Of the bytes before `end` that tell one file from another; of fewer where the file is shorter than that."""
    file.seek(max(0, end - _CHECKED))
    return hashlib.sha256(file.read(min(_CHECKED, end))).hexdigest()[:16]


def _modified(path: Path) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def _text(value: object) -> str | None:
    return printable(value) if isinstance(value, str) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
