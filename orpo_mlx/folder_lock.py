"""One run at a time in an adapter folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orpo_mlx.errors import TrainingError

LOCK = "train.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process. The system lets go of it however the process ends.

    The file stays and holds the process id of its last owner: removing it would let two processes lock two files.

    Raises:
        TrainingError: another process holds it, which the message names.
        OSError: the folder cannot be written, or its file system has no locks.
    """
    path = folder / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 32).decode("ascii", "replace").strip()
            who = f"process {owner}" if owner.isdigit() else "another process"
            raise TrainingError(
                f"`adapter_path` {folder}: {who} is training into it; wait for it, or give another folder"
            ) from None
        except OSError as error:
            # `flock` is given a descriptor, so its error names no file.
            error.filename = str(path)
            raise
        # Only once the lock is held: until then the file names its holder, to be read by whoever finds it taken.
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def is_held_by_a_living_process(folder: Path) -> bool:
    """Whether the process that last held `folder` lives, as far as this machine knows.

    Trying the lock instead would let a run that starts at that moment find it taken. A process id that has gone to
    another program since is taken for the run.
    """
    try:
        owner = int((folder / LOCK).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return False
    try:
        os.kill(owner, 0)
    except PermissionError:  # It lives, and is another user's.
        return True
    except (ProcessLookupError, OverflowError):
        return False
    # To `kill`, 0 and what is below stand for groups of processes, which are alive.
    return owner > 0
