"""Standard streams of a command that are closed, or whose reader has gone: `>&-`, `| head -1`, a full disk."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_NAMES = {1: "standard output", 2: "standard error"}


def lasting_streams() -> None:
    """From now on a standard stream that is closed is an empty one, and what nobody reads any more goes nowhere.

    A command does what it was asked to in either case: files that it is to write are not those of the stream.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is this one. Left free, it would be that of the next file to be opened,
            # and libraries would write their messages into it.
            os.open(os.devnull, os.O_RDWR)
    # Python has None for a stream that was closed when it started.
    sys.stdin = sys.stdin or _nowhere("r")
    sys.stdout = _lasting(sys.stdout) if sys.stdout else _nowhere("w")
    sys.stderr = _lasting(sys.stderr) if sys.stderr else _nowhere("w")


@contextmanager
def written_out() -> Iterator[None]:
    """Write out, at the end of a `with` block, what standard output still holds.

    Raises:
        OSError: it cannot be written. Python itself would find out after the command's status is told, and have 120.
    """
    try:
        yield
    except SystemExit as leaving:  # argparse's, after --help.
        if not leaving.code:
            sys.stdout.flush()
        raise
    except BaseException:
        # What went wrong first is what is said.
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        raise
    sys.stdout.flush()


class _Descriptor(io.FileIO):
    """A standard stream's descriptor, which leads nowhere from the first write on that fails."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            # As with `head`, which has what it wanted.
            self._lead_nowhere()
            return len(memoryview(data).cast("B"))
        except BlockingIOError:
            raise
        except OSError as error:
            # What is left in buffers is written when Python ends, and would fail once more.
            self._lead_nowhere()
            error.filename = _NAMES[self.fileno()]
            raise

    def _lead_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def _lasting(stream: TextIO) -> TextIO:
    """A stream as it is, on such a descriptor; what is no stream of this process's own, as in tests, stays itself."""
    if stream not in (sys.__stdout__, sys.__stderr__) or not isinstance(stream, io.TextIOWrapper):
        return stream
    if stream.fileno() not in _NAMES or stream.isatty():
        return stream
    with suppress(OSError):
        stream.flush()
    raw = _Descriptor(stream.fileno(), "wb", closefd=False)
    unbuffered = isinstance(stream.buffer, io.RawIOBase)  # python -u
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _nowhere(mode: str) -> Any:
    return open(os.devnull, mode, encoding="utf-8")
