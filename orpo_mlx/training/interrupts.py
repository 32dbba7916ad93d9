"""What ends a run early: errors, and signals during its steps (first: stop after this one; second: exit now)."""

from __future__ import annotations

import os
import threading
from types import FrameType
from typing import Any

from orpo_mlx.errors import TrainingError, device_advice, reason_of
from orpo_mlx.interrupts import SIGNALS, Interrupted, leave_terminal, set_handler, tell

_NOTICE = "\nStopping after this step; a second signal leaves at once.\n"
_LEAVING = "\nLeaving at once; checkpoints that were whole still are.\n"


class StopSignals:
    """Remembers the first of `SIGNALS` in a `with` block; the second ends the process with status 128 + number."""

    def __init__(self) -> None:
        self.number: int | None = None
        """Of the signal that came, if one did."""
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python refuses to set handlers in any other thread: signals are left alone there.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._earlier[number] = set_handler(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            set_handler(number, handler)
        self._earlier.clear()

    def check(self, message: str = "") -> None:
        """Go on, or raise `Interrupted`, also after the block, where a signal has come; see there."""
        if self.number is not None:
            raise Interrupted(self.number, message)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            tell(_LEAVING)
            # At once: SystemExit would still run everything that saves and closes.
            os._exit(128 + number)
        self.number = number
        tell(_NOTICE)
        leave_terminal(number)


def reason_to_end(error: Exception, step: int) -> str:
    """Why a run ends in the middle of a step, as text: the file, or the step where the error does not say it."""
    reason = reason_of(error, None)
    if isinstance(error, OSError) and error.filename:
        reason = f"{error.filename}: {error.strerror or reason}"
    if not isinstance(error, (TrainingError, OSError)):
        reason = f"step {step}: {reason}"
    advice = device_advice(error)
    return f"{reason}; {advice}" if advice else reason
