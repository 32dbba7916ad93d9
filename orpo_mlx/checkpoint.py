"""Write files whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it over `path`.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is then as it was, and the error names it.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def save_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically, indented, in UTF-8."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def save_adapters(
    folder: Path, weights: Mapping[str, mx.array], *, step: int | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `adapters.safetensors`, and with `step` also `0000100_adapters.safetensors`, as mlx-lm names them.

    `metadata` goes into the files' headers, which other readers pass over.
    """
    names = ["adapters.safetensors"] if step is None else [f"{step:07d}_adapters.safetensors", "adapters.safetensors"]
    for name in names:
        write_atomically(folder / name, lambda temporary: save_safetensors(temporary, weights, metadata))


def save_safetensors(path: Path, weights: Mapping[str, mx.array], metadata: Mapping[str, str] | None) -> None:
    """Write a safetensors file, not atomically.

    Raises:
        OSError: it cannot be written.
    """
    try:
        mx.save_safetensors(str(path), dict(weights), dict(metadata or {}))
    except RuntimeError as error:  # What MLX makes of a full disk.
        raise OSError(errno.EIO, str(error).rstrip(".")) from error
