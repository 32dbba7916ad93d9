"""Processes beside the first that compute cells of the exercise, each on its part of the machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from orpo_mlx.compare.exercise.cells import Cells
from orpo_mlx.compare.exercise.sizes import make_tier, size_from
from orpo_mlx.compare.exercise.study import help_study
from orpo_mlx.compare.exercise.task import Size
from orpo_mlx.compare.plan import PROG
from orpo_mlx.config.flags import exit_status
from orpo_mlx.errors import ConfigError
from orpo_mlx.files import read_json_table
from orpo_mlx.process_memory import configure_allocator
from orpo_mlx.reporting.console import Reporter

_MODULE = "orpo_mlx.compare.exercise.helpers"
# OpenBLAS and MKL take all cores each, and several processes then wait for each other.
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_PATIENCE_SECONDS = 10.0
_MOST_PROCESSES = 4
# The first process holds a model as well, and a machine has other things to do.
_BYTES_OF_A_PROCESS = 4 << 30


def usual_processes() -> int:
    """How many trainings run at the same time where nobody says: one for each core of a CPU, as far as memory goes."""
    if mx.default_device() != mx.Device(mx.cpu):
        return 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(_MOST_PROCESSES, os.cpu_count() or 1, memory // _BYTES_OF_A_PROCESS))


class Helpers:
    """Processes that were started to compute cells.

    Args:
        processes: as they were started, their standard input a pipe.
        reporter: told of each that ends early.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], reporter: Reporter) -> None:
        self._living = list(processes)
        self._reporter = reporter

    def at_work(self) -> bool:
        """Whether any lives; says of each that has failed since that it did."""
        for process in [each for each in self._living if each.poll() is not None]:
            self._living.remove(process)
            _close_input(process)
            status = process.returncode
            if status:
                how = f"status {status}" if status > 0 else signal.Signals(-status).name
                rest = f"{len(self._living)} go on" if self._living else "this one goes on alone"
                self._reporter.say(f"A process that helped has ended ({how}); {rest}.")
        return bool(self._living)

    def end(self) -> None:
        """End those that live, and wait for them."""
        for process in self._living:
            _close_input(process)
        for process in self._living:
            try:
                process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _close_input(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


@contextmanager
def helped(folder: Path, tier: str, size: Size, processes: int, reporter: Reporter) -> Iterator[Helpers]:
    """Start `processes` that compute the cells of a tier in `folder`; they end with this process, however it ends."""
    spec = json.dumps({"folder": str(folder), "tier": tier, "size": size._asdict(), "processes": processes})
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    started = [
        subprocess.Popen(
            [sys.executable, "-m", _MODULE, spec],
            # Closed by the system when this process ends, which is how a helper knows.
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**dict.fromkeys(THREADS, threads), **os.environ},
            # Ctrl-C is for the command alone, which ends its helpers.
            start_new_session=True,
        )
        for _ in range(processes)
    ]
    helpers = Helpers(started, reporter)
    try:
        yield helpers
    finally:
        helpers.end()


def help_out(spec: Mapping[str, Any]) -> None:
    """Compute cells that no other process is at until all are there."""
    threading.Thread(target=_end_with_the_first_process, daemon=True).start()
    configure_allocator(spec["processes"])
    tier = make_tier(spec["tier"], size_from(spec["size"]))
    folder = Path(spec["folder"])
    common = read_json_table(folder / "exercise.json", ConfigError)
    cells = Cells(folder, common, lambda done, name, seconds: None)
    help_study(tier.make(cells), cells)


def _end_with_the_first_process() -> None:
    sys.stdin.read()
    # From a thread nothing gentler reaches a product that takes seconds; a cell's file is written whole or not at all.
    os._exit(1)


if __name__ == "__main__":
    sys.exit(exit_status(PROG, lambda: help_out(json.loads(sys.argv[1]))))
