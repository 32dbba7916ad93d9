"""The page of a run that another process trains, or that has ended."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from orpo_mlx.config.flags import OneLineParser, exit_status
from orpo_mlx.config.traits import PORT
from orpo_mlx.errors import ConfigError
from orpo_mlx.folder_lock import LOCK
from orpo_mlx.run_folder import METRICS_FILE
from orpo_mlx.text import printable

PROG = "orpo-mlx watch"
_REMEDY = "give the --adapter-path of a run of orpo-mlx train"


def build_parser() -> OneLineParser:
    """The command line of `watch`."""
    parser = OneLineParser(
        prog=PROG,
        description="Serve a page that draws a run as it goes on, on this machine only, until Ctrl-C.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="ADAPTER_PATH", help="--adapter-path of a run, that trains or has ended")
    parser.add_argument("--port", metavar="N", default="0", help="port; 0, the default: any that is free")
    return parser


def parse_port(text: str) -> int:
    """A port; raises ConfigError where it is none."""
    # `int` alone would take signs, blanks, underscores and other scripts' digits as well.
    if not re.fullmatch("[0-9]{1,5}", text) or not PORT.holds(int(text)):
        raise ConfigError(f"--port {text}: expected a whole number {PORT.text}")
    return int(text)


def run(argv: Sequence[str] | None) -> None:
    """Do what a command line asks; raises UserError."""
    args = build_parser().parse_args(argv)
    folder = Path(args.folder).expanduser()
    port = parse_port(args.port)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; {_REMEDY}")
    # A run that has only begun may have written nothing, or its lock.
    if not any((folder / name).exists() for name in (METRICS_FILE, LOCK)) and any(folder.iterdir()):
        raise ConfigError(f"{folder}: holds no run (no {METRICS_FILE}, no {LOCK}); {_REMEDY}")
    # Only now: a mistyped flag need not wait for libraries.
    from orpo_mlx.reporting.live.feed import Feed
    from orpo_mlx.reporting.live.server import serving

    with serving(Feed(folder), port, "--port") as server, suppress(KeyboardInterrupt):
        if not (folder / METRICS_FILE).exists():
            print(printable(f"{folder} holds no {METRICS_FILE} yet: the page waits for it."))
        print(f"On this machine, {printable(folder.name)} can be watched at {server.address} until Ctrl-C.", flush=True)
        threading.Event().wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status. Ctrl-C is how it ends."""
    return exit_status(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
