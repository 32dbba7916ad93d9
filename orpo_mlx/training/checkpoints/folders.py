"""Write checkpoint folders whole or not at all, tell a whole one from any other, and remove old ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from orpo_mlx.files import flush_folder_to_disk, flush_to_disk, json_text, sha256_of

FORMAT = 1
_MANIFEST = "manifest.json"
_REPLACED = ".replaced"
_NAME = re.compile(rf"step-([0-9]{{7,18}})({re.escape(_REPLACED)})?")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+\.[a-z]+")
_TEMPORARY = ".writing-"


class CheckpointFolder(NamedTuple):
    """A checkpoint whose every file is the one that its manifest names."""

    path: Path
    step: int
    """Optimiser steps that had been taken."""


def checkpoint_name(step: int) -> str:
    """The folder's name; with leading zeros, so that names sort as steps do."""
    return f"step-{step:07d}"


def write_checkpoint(parent: Path, step: int, write: Callable[[Path], None]) -> CheckpointFolder:
    """Make `parent/step-0000040`: `write` fills a temporary folder, which gets a manifest and is renamed when all of it
    is on the disk.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing of it is left, and the error names it.
    """
    folder = parent / checkpoint_name(step)
    temporary = parent / f"{_TEMPORARY}{step:07d}"
    try:
        parent.mkdir(exist_ok=True)
        clear_unfinished(parent)
        temporary.mkdir()
        write(temporary)
        files = sorted(temporary.iterdir())
        described = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files}
        manifest = {"format": FORMAT, "step": step, "files": described}
        (temporary / _MANIFEST).write_text(json_text(manifest), encoding="utf-8")
        # Before the rename: after a power cut, the name must not stand over contents that never reached the disk.
        flush_folder_to_disk(temporary)
        # What bears this name already is of this step too. Until the new one does, it is a checkpoint to go on from.
        replaced = folder.with_name(folder.name + _REPLACED)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        _discard(replaced)
        # The new name is an entry of the parent, which has to reach the disk as well.
        flush_to_disk(parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # The user knows the checkpoint, not the temporary folder.
        error.filename = str(folder)
        error.filename2 = None
        raise
    return CheckpointFolder(folder, step)


def clear_unfinished(parent: Path) -> None:
    """Remove what a killed run left half written in `parent`."""
    for path in parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in parent.glob(f"*{_REPLACED}"):
        if path.with_name(path.name.removesuffix(_REPLACED)).exists():
            _discard(path)


def put_back(checkpoint: CheckpointFolder) -> CheckpointFolder:
    """A checkpoint under its own name, also where it was about to be replaced by one that is damaged."""
    path = checkpoint.path.with_name(checkpoint_name(checkpoint.step))
    if path != checkpoint.path:
        _discard(path)
        checkpoint.path.rename(path)
    return checkpoint._replace(path=path)


def prune(parent: Path, keep: int, newest: int, also: Collection[int] = ()) -> None:
    """Remove all but the newest `keep` checkpoints of `parent`, of which that of step `newest` is one, and those of the
    steps `also`.

    Later ones are damaged, or the run would have gone on from them: they take nobody's place, and are replaced when the
    run comes to their steps.
    """
    older = [each for each in _candidates(parent) if each[0] <= newest]
    for step, folder in older[keep:]:
        if step not in also:
            _discard(folder)


def linked_step(link: Path) -> int | None:
    """The step of the checkpoint that a link leads to."""
    name = _NAME.fullmatch(link.readlink().name) if link.is_symlink() else None
    return int(name[1]) if name else None


def remove_all(parent: Path) -> None:
    """Remove every checkpoint of `parent`."""
    # Newest last: interrupted, an older one must never be taken for the newest.
    for _, folder in reversed(_candidates(parent)):
        _discard(folder)
    shutil.rmtree(parent, ignore_errors=True)


def whole_checkpoints(parent: Path) -> Iterator[CheckpointFolder | str]:
    """Newest step first: each whole checkpoint, and a sentence for each that is not."""
    for step, folder in _candidates(parent):
        problem = defect(folder, step)
        yield f"{folder} is not whole ({problem})." if problem else CheckpointFolder(folder, step)


def defect(folder: Path, step: int) -> str | None:
    """What is wrong with a checkpoint; None where every file is the one that its manifest names."""
    try:
        text = (folder / _MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        expected = (FORMAT, step)
        found = (manifest["format"], manifest["step"])
        if found != expected:
            return f"{_MANIFEST} is of format {found[0]!r} and step {found[1]!r}, expected {FORMAT} and {step}"
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        # Nothing else proves the manifest itself; a changed name, size or sum will not fit the files.
        if text != json_text(manifest) or set(manifest) != {"format", "step", "files"}:
            return f"{_MANIFEST} is not as it was written"
        if not files:
            return f"{_MANIFEST} names no files"
        defects = (_file_defect(folder, name, size, sha256) for name, (size, sha256) in files.items())
        return next(filter(None, defects), None)
    except OSError as error:
        return f"{Path(error.filename or _MANIFEST).name}: {error.strerror or error}"
    # A JSON text of any shape may stand there; each of these means that it is no manifest.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{_MANIFEST} is not one ({type(error).__name__})"


def _file_defect(folder: Path, name: str, size: Any, sha256: Any) -> str | None:
    path = folder / name
    # The name comes from a file that may be anyone's: `../x` must not lead out of the folder.
    if not _PLAIN_NAME.fullmatch(name) or path.is_symlink():
        return f"{_MANIFEST} names {name[:40]!r}, which is not a file of this folder"
    if not path.is_file():
        return f"{name} is missing"
    # The size first: a file that was cut off need not be read to its end.
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes, expected {size!r}"
    if sha256_of(path) != sha256:
        return f"{name} is not what was written"
    return None


def _candidates(parent: Path) -> list[tuple[int, Path]]:
    """Folders that bear a checkpoint's name, newest step first."""
    # By name, not by date: clocks go wrong.
    if not parent.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in parent.iterdir()]
    # Of one step first the one that replaces the other.
    found = sorted((-int(match[1]), match[2] or "", path) for match, path in matches if match)
    return [(-step, path) for step, _, path in found]


def _discard(folder: Path) -> None:
    """Remove a checkpoint's folder."""
    if folder.exists():
        # Renamed first: half removed, it no longer bears a checkpoint's name.
        gone = folder.with_name(f"{_TEMPORARY}removed-{folder.name}")
        # A folder is not renamed over what an interrupted removal has left there.
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)
