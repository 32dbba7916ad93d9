"""SIGINT and SIGTERM. First signal: stop after this step; second: exit now."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

_NOTICE = "\nStopping after this step; a second signal leaves at once.\n"
_LEAVING = "\nLeaving at once; checkpoints that were whole still are.\n"


class Interrupted(KeyboardInterrupt):
    """A run that ends because a signal asked it to.

    Args:
        number: the signal's.
        message: what was saved and how to go on.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number


class StopSignals:
    """Remembers the first SIGINT or SIGTERM of a `with` block; the second ends the process with status 128 + number."""

    def __init__(self) -> None:
        self.number: int | None = None
        """Of the signal that came, if one did."""
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python refuses to set handlers in any other thread: signals are left alone there.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier.clear()

    def check(self) -> None:
        """Go on, or raise `Interrupted` where a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # os.write, not print: a handler may run in the middle of another print.
        if self.number is not None:
            os.write(2, _LEAVING.encode())
            # At once: SystemExit would still run everything that saves and closes.
            os._exit(128 + number)
        self.number = number
        os.write(2, _NOTICE.encode())
