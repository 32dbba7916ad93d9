"""A command that works in silence says that it still does."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_EVERY_S = 2.5
"""Silence of more than three seconds is taken for a hang."""


@contextmanager
def heartbeat(what: str, every: float = _EVERY_S) -> Iterator[None]:
    """For the length of a `with` block, stderr says every few seconds what is done and for how long: on one line of a
    terminal, elsewhere on a line each time."""
    ended = threading.Event()
    terminal = sys.stderr.isatty()
    began = time.monotonic()

    def beat() -> None:
        while not ended.wait(every):
            line = f"{what}: {time.monotonic() - began:.0f} s"
            with suppress(OSError, ValueError):  # A closed terminal is no reason to stop.
                print(f"\r{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if terminal and time.monotonic() - began >= every:
            # What comes next stands where this stood.
            print(f"\r{' ' * (len(what) + 12)}\r", end="", file=sys.stderr, flush=True)
