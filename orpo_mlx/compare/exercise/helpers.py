"""Processes beside the first that compute cells of the exercise, each on its part of the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orpo_mlx.compare.exercise.cells import Cells
from orpo_mlx.compare.exercise.sizes import make_tier, size_from
from orpo_mlx.compare.exercise.study import help_study
from orpo_mlx.compare.exercise.task import Size
from orpo_mlx.compare.plan import PROG
from orpo_mlx.config.flags import exit_status
from orpo_mlx.errors import ConfigError
from orpo_mlx.process_memory import configure_allocator

# OpenBLAS and MKL take all cores each, and several processes then wait for each other.
_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def helped(folder: Path, tier: str, size: Size, processes: int) -> Iterator[Callable[[], bool]]:
    """Start `processes` that compute the cells of a tier in `folder`; yields whether any of them lives.

    They end with this process, however it ends. One that ends early has said why on stderr.
    """
    spec = json.dumps({"folder": str(folder), "tier": tier, "size": size._asdict(), "processes": processes})
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {**dict.fromkeys(_THREADS, threads), **os.environ}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "orpo_mlx.compare.exercise.helpers", spec],
            # Closed by the system when this process ends, which is how a helper knows.
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment,
            # Ctrl-C is for the command alone, which ends its helpers.
            start_new_session=True,
        )
        for _ in range(processes)
    ]
    try:
        yield lambda: any(each.poll() is None for each in started)
    finally:
        for each in started:
            each.communicate()


def help_out(spec: Mapping[str, Any]) -> None:
    """Compute cells that no other process is at until all are there."""
    threading.Thread(target=_end_with_the_first_process, daemon=True).start()
    configure_allocator(spec["processes"])
    tier = make_tier(spec["tier"], size_from(spec["size"]))
    folder = Path(spec["folder"])
    try:
        common = json.loads((folder / "exercise.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: cannot be helped ({error}).") from None
    cells = Cells(folder, common, lambda done, name, seconds: None)
    help_study(tier.make(cells), cells)


def _end_with_the_first_process() -> None:
    sys.stdin.read()
    # Whatever it computes is of no use: nothing else can be interrupted from a thread.
    os._exit(1)


if __name__ == "__main__":
    sys.exit(exit_status(PROG, lambda: help_out(json.loads(sys.argv[1]))))
