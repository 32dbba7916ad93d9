"""Files and folders written whole or not at all: beside their destination first, renamed when they are on the disk."""

from __future__ import annotations

import errno
import fcntl
import filecmp
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from orpo_mlx.errors import ConfigError, UserError, reason_of
from orpo_mlx.run_folder import ADAPTERS_FILE
from orpo_mlx.text import redacted

_UNFINISHED = ".unfinished-"
_REPLACED = ".replaced-"
_GB = 1e9
# Bytes. A hostile checkpoint's config could otherwise fill the memory.
_MOST_JSON = 100_000_000


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it over `path`.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is then as it was, and the error names it.
    """
    temporary: Path | None = None
    try:
        # Beside it: a rename is one operation within a file system alone. MLX adds its suffix to a name that lacks it.
        temporary = _new_file(path)
        write(temporary)
        # Before the rename: after a power cut, the name must not stand over content that never reached the disk.
        flush_to_disk(temporary)
        if path.is_file():
            # As if it were written in its place.
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        temporary.replace(path)
    except OSError as error:
        # The user knows `path`, not the temporary name beside it.
        error.filename = str(path)
        error.filename2 = None
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _new_file(path: Path) -> Path:
    """An empty file beside `path`, under a name that nobody has, for all whom the process's umask lets at it."""
    while True:
        # Not mkstemp, whose files are their owner's alone: what a mode is to be, only the system knows without setting
        # the umask anew, which all threads share.
        temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
        with suppress(FileExistsError):
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return temporary


def new_folder(parent: Path, prefix: str) -> Path:
    """An empty folder under a name that nobody has, for all whom the process's umask lets at it."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def clear_temporaries(folder: Path, names: Collection[str]) -> None:
    """Remove what a killed `write_atomically` has left of files of these names, which nobody may be writing now."""
    for name in map(Path, names):
        # What `_new_file` makes, and no more: a user may have a hidden file of a similar name.
        temporary = re.compile(rf"\.{re.escape(name.stem)}\.[a-z0-9_]{{8}}{re.escape(name.suffix)}")
        for path in folder.iterdir():
            if temporary.fullmatch(path.name) and path.is_file():
                path.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def copy_if_different(source: Path, path: Path) -> None:
    """Write another file's content atomically, unless it is there already."""
    if not (path.is_file() and filecmp.cmp(source, path, shallow=False)):
        write_atomically(path, lambda temporary: shutil.copyfile(source, temporary))


def save_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically, indented, in UTF-8."""
    write_text(path, json_text(value))


def json_text(value: Mapping[str, Any]) -> str:
    """A JSON object as a file holds it: without access tokens, and with no character that a terminal would obey."""
    text = redacted(json.dumps(value, indent=2, ensure_ascii=False, default=str)) + "\n"
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def check_regular(path: Path) -> None:
    """Raise OSError where a device or pipe is at `path`: opening one would wait for somebody at its other end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "a device or pipe, expected a file", str(path))


def read_json_table(path: Path, error: type[UserError]) -> dict[str, Any]:
    """A JSON object from a file of reasonable size.

    Raises:
        error: it is missing, cannot be read, is too large, not JSON, or not an object.
    """
    try:
        found = path.stat()
        # Reading a pipe would wait for somebody to write into it.
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise error(f"{path}: is no regular file.")
        if found.st_size > _MOST_JSON:
            raise error(f"{path}: {found.st_size} bytes is no JSON settings file.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file.") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror}).") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: cannot be read as JSON ({reason_of(problem)}).") from None
    if not isinstance(value, dict):
        raise error(f"{path}: holds a {type(value).__name__}, expected a table.")
    return value


def save_adapters(folder: Path, weights: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Write `adapters.safetensors`; `metadata` goes into its header, which other readers skip."""
    write_atomically(folder / ADAPTERS_FILE, lambda temporary: save_safetensors(temporary, weights, metadata))


def save_safetensors(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """MLX's writer, whose complaint about a full disk becomes an `OSError`."""
    try:
        mx.save_safetensors(str(path), dict(arrays), dict(metadata or {}))
    except RuntimeError as error:
        # MLX says that it cannot write, and not why.
        if shutil.disk_usage(path.parent).free < sum(array.nbytes for array in arrays.values()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise OSError(errno.EIO, str(error).rstrip(".")) from error


def sha256_of(*paths: Path, head: bytes = b"") -> str:
    """SHA-256 of `head` and the content of some files after it, as hex."""
    digest = hashlib.sha256(head)
    for path in paths:
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        flush_handle(handle)
    finally:
        os.close(handle)


def flush_handle(handle: int) -> None:
    """`flush_to_disk` for an open file."""
    if sys.platform == "darwin":
        # fsync on macOS returns while the drive still holds the data in its own cache. Network drives and other file
        # systems than Apple's may refuse the stronger one.
        with suppress(OSError):
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


def flush_folder_to_disk(folder: Path) -> None:
    """`flush_to_disk` for a folder and all that is in it."""
    for path in (*folder.rglob("*"), folder):
        flush_to_disk(path)


def cache_folder() -> Path | None:
    """`$ORPO_MLX_CACHE` (None if "off": nothing is kept), or `orpo_mlx` in the user's cache folder."""
    # Not the adapter's folder: the next run usually has another one, and tokens and the reference are the same for all
    # learning rates, β and methods tried on one model and data set.
    # ~/.cache on macOS too, where the Hub's cache is: people who look for space look there.
    given = os.environ.get("ORPO_MLX_CACHE")
    if given:
        return None if given == "off" else Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "orpo_mlx"


def check_space(folder: Path, needed: int) -> None:
    """Raise ConfigError unless `needed` bytes, and a little more, are free where `folder` is."""
    free = shutil.disk_usage(folder).free
    if needed * 1.01 + 1e6 > free:
        raise ConfigError(
            f"{folder.parent}: {needed / _GB:.2f} GB are to be written and {free / _GB:.2f} GB are free there; "
            "free space or choose another folder."
        )


@contextmanager
def staged_folder(destination: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `destination` to write into; renamed to it at the end of the `with` block, gone on any error.

    What a killed run left there is cleaned up first: its lock was dropped by the system. With `overwrite`, an existing
    destination is moved aside only once the new one is whole.

    Raises:
        ConfigError: `destination` exists and `overwrite` is False, or cannot be written beside.
        OSError: the disk is full, or a file cannot be written.
    """
    parent = destination.parent
    if not parent.is_dir() or destination.name in ("", ".", ".."):
        raise ConfigError(f"{destination}: cannot be written there; give a new folder in a folder that exists.")
    _clean_up(destination)
    _check_free(destination, overwrite)
    staging = new_folder(parent, f".{destination.name}{_UNFINISHED}")
    try:
        with _locked(staging):
            yield staging
            flush_folder_to_disk(staging)
            # Again: another program may have put something there while the block was at work.
            _check_free(destination, overwrite)
            _put_in_place(staging, destination)
    finally:
        if staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(destination: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A path to write a large file to; renamed to `destination` at the end of the `with` block, gone on any error.

    It lies in a folder of its own, which the block may use besides, and which is cleaned up like `staged_folder`'s.

    Raises:
        ConfigError: `destination` exists and `overwrite` is False, is a folder, or cannot be written beside.
        OSError: the disk is full, or the file cannot be written.
    """
    if not destination.parent.is_dir() or destination.is_dir():
        raise ConfigError(f"{destination}: cannot be written there; give a new file in a folder that exists.")
    _clean_up(destination)
    if destination.exists() and not overwrite:
        raise ConfigError(f"{destination}: exists already; give `overwrite` to replace it, or another file.")
    staging = new_folder(destination.parent, f".{destination.name}{_UNFINISHED}")
    try:
        with _locked(staging):
            file = staging / destination.name
            yield file
            flush_to_disk(file)
            if destination.is_file():
                file.chmod(stat.S_IMODE(destination.stat().st_mode))
            file.replace(destination)
            flush_to_disk(destination.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_free(destination: Path, overwrite: bool) -> None:
    # Not `exists`: a link that leads nowhere is somebody's as well.
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise ConfigError(f"{destination}: exists already; give `overwrite` to replace it, or another folder.")
    if not destination.is_dir() or destination.is_symlink():
        raise ConfigError(f"{destination}: is not a folder, so it is not replaced; remove it, or give another folder.")


def _clean_up(destination: Path) -> None:
    """Remove what a killed run left behind, and put back a destination it had moved aside but not replaced."""
    name = glob.escape(destination.name)
    for left in sorted(destination.parent.glob(f".{name}{_REPLACED}*")):
        if _abandoned(left):
            if os.path.lexists(destination):
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(destination)
    for left in sorted(destination.parent.glob(f".{name}{_UNFINISHED}*")):
        if left.is_dir() and _abandoned(left):
            shutil.rmtree(left, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    """Whether no process holds `folder`: a lock, unlike a file with a process id, dies with its owner."""
    try:
        with _locked(folder):
            return True
    except OSError:
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _put_in_place(staging: Path, destination: Path) -> None:
    if not destination.is_dir():
        _rename(staging, destination)
    else:
        old = destination.with_name(f".{destination.name}{_REPLACED}{staging.name.rpartition('-')[2]}")
        # The lock goes with the folder to its new name, so no other run takes it for a remnant.
        with _locked(destination):
            destination.rename(old)
            try:
                _rename(staging, destination)
            # Ctrl-C as well: where the new folder does not come, the old one must have its name back.
            except BaseException:
                old.rename(destination)
                raise
        # The new folder is in place by then; what is left of the old one is cleaned up the next time.
        with suppress(OSError):
            shutil.rmtree(old)
    # The new name is an entry of the parent, which has to reach the disk as well.
    flush_to_disk(destination.parent)


def _rename(staging: Path, destination: Path) -> None:
    try:
        staging.rename(destination)
    except OSError as error:
        # A folder is renamed over an empty one in silence, and over anything else not at all.
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise ConfigError(f"{destination}: appeared while this run was at work; it was left as it is.") from None
        raise
