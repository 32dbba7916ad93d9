"""How a command speaks and ends: one sentence on stderr, in which settings are called by their flags."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from orpo_mlx.config.settings import SETTINGS
from orpo_mlx.errors import UserError
from orpo_mlx.interrupts import Interrupted, finished, raising_interrupts
from orpo_mlx.text import printable

_MENTION = re.compile(r"`(?P<name>[a-z][a-z0-9_]*)(?:=(?P<value>[^`]*))?`")
"""How libraries mention a setting: `seed`, or with a value `memory=fast`, `shuffle=False`."""


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one sentence on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Print `message` without the usage text and leave with status 2."""
        self.exit(2, f"{self.prog}: error: {printable(message).rstrip('.')}; see {self.prog} --help.\n")


def flag_of(name: str, value: str | None = None) -> str:
    """What a command line has for a setting, or an argument of a library, and its value."""
    dashed = name.replace("_", "-")
    switches = {None: f"--{dashed}", "True": f"--{dashed}", "False": f"--no-{dashed}"}
    return switches.get(value, f"--{dashed} {value}")


def with_flags(text: str, own: Collection[str] = ()) -> str:
    """A library's message with the settings it mentions as flags; `own` are a command's besides those of `train`."""

    def flag(mention: re.Match[str]) -> str:
        # Data may stand in backticks as well, and is left alone.
        known = mention["name"] in SETTINGS or mention["name"] in own
        return flag_of(mention["name"], mention["value"]) if known else mention[0]

    return _MENTION.sub(flag, text)


@contextmanager
def naming_flags(own: Collection[str] = ()) -> Iterator[None]:
    """Let errors that pass through call settings by their flags."""
    try:
        yield
    except UserError as error:
        # Changed in place: a new exception would lose the kind, the cause and the traceback.
        error.args = (with_flags(str(error), own),)
        raise


def exit_status(prog: str, command: Callable[[], object]) -> int:
    """Run a command: 0, 2 with one sentence on stderr for what a user can mend, or 128 + a signal's number."""
    with raising_interrupts(prog) as signals:
        try:
            with naming_flags():
                command()
            status = 0
        except KeyboardInterrupt as interrupt:
            status = _tell_interrupt(prog, interrupt, signals.number)
        except Exception as error:
            # Libraries turn an interrupt in the middle of an import into errors of their own.
            if signals.number is not None:
                status = _tell_interrupt(prog, Interrupted(signals.number), signals.number)
            elif isinstance(error, (UserError, OSError)):
                _tell_error(prog, error)
                status = 2
            else:
                raise
        finished(status)
    return status


def _tell_error(prog: str, error: UserError | OSError) -> None:
    if isinstance(error, UserError):
        message = printable(str(error)).rstrip(".")
        message += "" if message.endswith("?") else "."
    else:  # A full disk, or a folder that cannot be written, wherever a command meets it.
        location = f"{error.filename}: " if error.filename else ""
        message = printable(f"{location}{error.strerror or error}; free space or choose another folder.")
    _print(f"{prog}: error: {message}")


def _tell_interrupt(prog: str, interrupt: KeyboardInterrupt, number: int | None) -> int:
    """Say what an interrupt says; the exit status."""
    _print(f"{prog}: interrupted: {printable(with_flags(str(interrupt))) or 'nothing was saved'}.")
    return 128 + getattr(interrupt, "number", number or signal.SIGINT)


def _print(sentence: str) -> None:
    with suppress(OSError):  # A terminal that is closed by now must not change the status.
        print(sentence, file=sys.stderr)
