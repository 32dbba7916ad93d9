"""Whether this process is one of the package's commands: asked before anything else is imported, so without imports."""

from __future__ import annotations

# Both are built into Python: `signal`, which wraps the second, is a file to be read, and a signal may come meanwhile.
import _signal  # type: ignore[import-not-found]
import sys

_PACKAGE, _COMMAND = "orpo_mlx", "orpo-mlx"


def is_a_command() -> bool:
    """Whether this process was started as `orpo-mlx` or as `python -m orpo_mlx...`."""
    if sys.argv[:1] != ["-m"]:  # What stands there while packages of `python -m` are imported.
        return bool(sys.argv) and sys.argv[0].replace("\\", "/").rpartition("/")[2] == _COMMAND
    after = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
    return bool(after) and after[0].partition(".")[0] == _PACKAGE


def end_without_traceback() -> None:
    """Let SIGINT end a command at once and without a word, until `interrupts` can say something: Python's own handler
    would print where in its imports the command was."""
    if is_a_command() and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
