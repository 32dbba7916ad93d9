"""Signals that ask a command to end, at any moment of its life: one sentence, and 128 + the signal's number.

A training run handles them itself while it takes steps (`training.interrupts`). This is for the rest of a command's
life, in which Python would print a traceback (SIGINT) or die without a word (SIGTERM, SIGHUP): imports, loading, and
the moments after the last line.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from orpo_mlx._command import is_a_command
from orpo_mlx.errors import TrainingError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a user, a system that shuts down, and a closed terminal send."""

_COMMAND = "orpo-mlx"


class Interrupted(KeyboardInterrupt):
    """A command that ends because a signal asked it to.

    Args:
        number: the signal's.
        message: what was saved and how to go on.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number


def message_of(interrupt: BaseException) -> str:
    """What an interrupt says or, where it says nothing, what the one that it met on its way did: a second signal may
    come when a run has just said how to go on."""
    error: BaseException | None = interrupt
    while error is not None:
        if isinstance(error, (KeyboardInterrupt, TrainingError)) and str(error):
            return str(error)
        error = error.__context__
    return ""


def end_early_in_one_sentence() -> None:
    """Where this process is one of the package's commands: until it has begun, a signal ends it at once, in a sentence.

    Called first of all when the package is imported; a program that imports the package keeps its own handlers.
    """
    if is_a_command() and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            set_handler(number, _leave)


def set_handler(number: int, handler: Any) -> Any:
    """`signal.signal`, which leaves alone a SIGHUP that nohup has switched off; the earlier handler."""
    earlier = signal.getsignal(number)
    if number == signal.SIGHUP and earlier == signal.SIG_IGN:
        return earlier
    return signal.signal(number, handler)


def tell(line: str) -> None:
    """Write to stderr from a handler, which may run in the middle of a print; a terminal may be gone by then."""
    with suppress(OSError):
        os.write(2, line.encode())


def leave_terminal(number: int) -> None:
    """After SIGHUP nothing more can be printed: what would be, goes nowhere instead of raising in the middle of a save.

    Only for outputs that are a terminal: a log file is still there, and wants its lines.
    """
    if number != signal.SIGHUP:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if os.isatty(output):
            os.dup2(nowhere, output)
    os.close(nowhere)


@contextmanager
def raising_interrupts(prog: str) -> Iterator[Signals]:
    """For the length of a command a signal raises `Interrupted` in it; a second one leaves at once.

    Yields what came. Where no handler can be set, in a thread, the signals are left alone.
    """
    signals = Signals(prog)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    earlier = {number: set_handler(number, signals.note) for number in SIGNALS}
    hook = sys.unraisablehook
    sys.unraisablehook = signals.unraisable
    try:
        yield signals
    finally:
        sys.unraisablehook = hook
        for number, handler in earlier.items():
            set_handler(number, handler)


class Signals:
    """What signals came while a command ran."""

    def __init__(self, prog: str) -> None:
        self.number: int | None = None
        """Of the first."""
        self._prog = prog

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        leave_terminal(number)
        raise Interrupted(number)

    def unraisable(self, what: Any) -> None:
        """`sys.unraisablehook`: an interrupt that came in a destructor or a weak reference's callback is no less one.

        Python would print a traceback there and go on as if nothing had been asked.
        """
        if isinstance(what.exc_value, KeyboardInterrupt):
            tell(f"{self._prog}: interrupted: nothing was saved.\n")
            os._exit(128 + (self.number or signal.SIGINT))
        sys.__unraisablehook__(what)


_finished: int | None = None


def finished(status: int) -> None:
    """Tell the early handlers that the command has come to its end with this status, which a late signal keeps."""
    global _finished
    _finished = status


def _leave(number: int, frame: FrameType | None) -> None:
    # os._exit: SystemExit would be an ImportError by the time it has left the import of an extension.
    if _finished is not None:
        os._exit(_finished)
    leave_terminal(number)
    tell(f"{_COMMAND}: interrupted: nothing was saved.\n")
    os._exit(128 + number)
