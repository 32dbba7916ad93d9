"""A Mac kept from going to sleep while a run lasts."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PROGRAM = "caffeinate"
"""Of macOS."""


@contextmanager
def kept_awake(wanted: bool, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """For the length of a `with` block, a Mac that nobody uses does not go to sleep (`caffeinate -i`), if `wanted`.

    A lid that is closed, or an empty battery, still puts it to sleep; the run then goes on when it wakes. `say` takes a
    line for the user.
    """
    if not wanted or platform.system() != "Darwin":
        yield
        return
    try:
        # -w: it ends with this process, however that ends. Its own session: Ctrl-C is for the run alone.
        process = subprocess.Popen(
            [_PROGRAM, "-i", "-w", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        say(f"The Mac may go to sleep during the run: {_PROGRAM} cannot be started ({error.strerror}).")
        yield
        return
    say("The Mac is kept awake while the run lasts; `keep_awake=False` lets it sleep.")
    try:
        yield
    finally:
        process.terminate()
        process.wait()
