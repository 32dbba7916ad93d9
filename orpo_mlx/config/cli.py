"""What every command line of the package has in common: one sentence on stderr, and the exit status."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from orpo_mlx.errors import UserError, printable


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one sentence on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Print `message` without the usage text and leave with status 2."""
        self.exit(2, f"{self.prog}: error: {printable(message).rstrip('.')}; see {self.prog} --help.\n")


def exit_status(prog: str, command: Callable[[], object]) -> int:
    """Run a command: 0, 2 with one sentence on stderr for what a user can mend, 130 or 143 where it was interrupted."""
    try:
        command()
    except UserError as error:
        message = printable(str(error)).rstrip(".")
        print(f"{prog}: error: {message}{'' if message.endswith('?') else '.'}", file=sys.stderr)
        return 2
    except OSError as error:  # A full disk, or a folder that cannot be written, wherever a command meets it.
        place = f"{error.filename}: " if error.filename else ""
        print(f"{prog}: error: {place}{error.strerror or error}; free space or choose another folder.", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"{prog}: interrupted: {str(interrupt) or 'nothing was saved'}.", file=sys.stderr)
        return 128 + getattr(interrupt, "number", signal.SIGINT)
    return 0
