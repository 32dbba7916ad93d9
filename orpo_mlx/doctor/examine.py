"""All checks, one after the other, in a process of its own: a GPU's error can end a process, and must not end the rest.

`python -m orpo_mlx.doctor.examine LEVEL` is that process. It writes a line of JSON for each check that begins and for
each finding; where it dies, the check that was at work has failed, and another process goes on with the next one.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import IO, Any, NamedTuple

import mlx.core as mx

from orpo_mlx.doctor.attention import check_attention
from orpo_mlx.doctor.findings import GROUPS, SIZES, Finding, Sizes, guarded, label_of, without_paths
from orpo_mlx.doctor.functions import NAMES, check_function
from orpo_mlx.doctor.machine import check_calibration, check_machine, check_paths
from orpo_mlx.doctor.package import MEMORY_MODES
from orpo_mlx.doctor.speed import check_rival, check_steps
from orpo_mlx.doctor.training import check_defaults, check_modes, check_training
from orpo_mlx.process_memory import configure_allocator

SCHEMA = 1
LEVELS = ("full", "quick")
# A person who sees nothing for three seconds thinks that it hangs.
_HEARTBEAT_S = 2.5
_LONGEST_S = 900.0
"""After which a check is taken to hang."""
# A device that fails everywhere would have every check start a process of its own, for minutes.
_MOST_DEATHS = 5
_LLAMA = "Llama-3.2-3B, 4 of 28 layers"

Event = Mapping[str, Any]
Say = Callable[[str], object]


class Unit(NamedTuple):
    """A part of the examination that fails by itself."""

    group: str
    name: str
    check: Callable[[], Iterator[Finding]]


def planned(sizes: Sizes, *, full: bool, bench: bool, gpu: bool) -> list[Unit]:
    """Everything that is to be examined, in order."""
    dtype = "bfloat16" if gpu else "float32"
    kinds = [("float32", False)]
    if full or gpu:
        kinds += [("bfloat16", False), (dtype, True)]
    if full and gpu:
        kinds += [("float16", False)]
    timed = [(sizes.shape, dtype, False), *([(_LLAMA, dtype, True)] if full and gpu else [])]
    made: list[tuple[str, str, Callable[[], Iterator[Finding]]]] = [
        ("machine", "machine", check_machine),
        *(("paths", label_of(*kind), partial(check_paths, kind[0], quantised=kind[1])) for kind in kinds),
        *(
            ("attention", f"{name}, head dim {size}", partial(check_attention, name, size, sizes))
            for name in sizes.dtypes
            for size in sizes.head_dims
        ),
        *(
            ("functions", f"{name}, {kind}", partial(check_function, name, kind, sizes))
            for name in NAMES
            for kind in sizes.dtypes
        ),
        *(("modes", label_of(*kind), partial(check_modes, kind[0], sizes.tokens, quantised=kind[1])) for kind in kinds),
        ("training", "settings left at their defaults", check_defaults),
        ("training", "20 steps, interrupted and resumed", check_training),
        *(
            ("speed", f"{shape}, {mode}", partial(check_steps, shape, sizes, name, mode, quantised=quantised))
            for shape, name, quantised in timed
            for mode in MEMORY_MODES
            # All logits of a vocabulary of 128,256 would not fit a small Mac.
            if not (shape == _LLAMA and mode == "plain")
        ),
        ("calibration", "products, memory, launches", partial(check_calibration, sizes)),
    ]
    if bench:
        made += [
            ("rival", shape, partial(check_rival, shape, sizes, name, quantised=quantised))
            for shape, name, quantised in timed
        ]
    return [Unit(*each) for each in made]


def events(units: Sequence[Unit], first: int = 0) -> Iterator[Event]:
    """Runs the units from number `first` on: `unit` and `name` where one begins, then each `finding`."""
    for number, unit in enumerate(units[first:], first):
        yield {"unit": number, "of": len(units), "group": unit.group, "name": unit.name}
        for finding in guarded(unit.group, unit.name, unit.check):
            yield {"finding": {**finding._asdict(), "figures": dict(finding.figures)}}
        # Buffers of the check before would count in the next one's peak.
        mx.clear_cache()
    yield {"done": True}


def planned_here(level: str, bench: bool) -> list[Unit]:
    """The plan for MLX's default device."""
    gpu = mx.default_device() != mx.Device(mx.cpu)
    sizes = SIZES[f"{'gpu' if gpu else 'cpu'}{' quick' if level == 'quick' else ''}"]
    return planned(sizes, full=level == "full", bench=bench, gpu=gpu)


class Process:
    """Starts the process that examines, from a unit on, and reads what it writes.

    Args:
        words: its command line, to which the number of the first unit is added.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words

    def __call__(self, first: int, say: Say) -> Iterator[Event]:
        """Its events, the last of which is `done`, or `died` with the reason; `say` is told that it is at work."""
        # A file and not a pipe: nobody reads it meanwhile, and a full pipe would let the process wait.
        with tempfile.TemporaryFile("w+") as errors:
            environment = {**os.environ, "ORPO_MLX_CACHE": "off", "PYTHONUNBUFFERED": "1"}
            with subprocess.Popen(
                [*self._words, str(first)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            ) as child:
                assert child.stdout is not None
                try:
                    yield from until_silent(child.stdout, say)
                finally:
                    child.kill()
                errors.seek(0)
                yield {"died": cause_of_death(child.wait(), errors.read())}


def until_silent(stream: IO[str], say: Say) -> Iterator[Event]:
    """Events of a process until it ends, is done, or is silent for too long."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    since = time.monotonic()
    while time.monotonic() - since < _LONGEST_S:
        try:
            line = lines.get(timeout=_HEARTBEAT_S)
        except queue.Empty:
            say(f"  still at it, {time.monotonic() - since:.0f} s")
            continue
        if line is None:
            return
        yield json.loads(line)
        since = time.monotonic()


def cause_of_death(status: int, errors: str) -> str:
    """Why a process ended before it was done, in one line."""
    how = f"ended with status {status}"
    if status < 0:
        how = f"was ended by {signal.Signals(-status).name}"
    last = (errors.strip().splitlines() or [""])[-1]
    return without_paths(f"the process {how}{': ' + last.strip() if last else ''}")[:300]


def examine(run: Callable[[int, Say], Iterable[Event]], say: Say) -> list[Finding]:
    """All findings. A unit whose process dies has failed, and a new process goes on after it.

    Args:
        run: gives the events from a unit on: a `Process`, or `events` in this one.
        say: takes a line on what is being done.
    """
    findings: list[Finding] = []
    unit: Event = {"unit": -1, "group": "machine", "name": "start"}
    for _ in range(_MOST_DEATHS):
        died = None
        for event in run(unit["unit"] + 1, say):
            if "done" in event:
                return findings
            if "finding" in event:
                findings.append(Finding(**event["finding"]))
            elif "died" in event:
                died = event["died"]
            else:
                unit = event
                say(f"{unit['unit'] + 1}/{unit['of']} {unit['group']}: {unit['name']}")
        findings.append(Finding(unit["group"], unit["name"], False, died or "the process ended early"))
        # It died before its first check, and so would the next one.
        if unit["unit"] < 0:
            break
    sentence = f"the process was ended {_MOST_DEATHS} times: what follows this was not examined"
    findings.append(Finding(unit["group"], unit["name"], False, sentence))
    return findings


def record_of(findings: Sequence[Finding], level: str, seconds: float) -> dict[str, Any]:
    """What `--json` writes. It names no user, no host and no folder."""
    machine = next((finding.figures for finding in findings if finding.group == "machine" and finding.figures), {})
    failures = [f"{found.group}: {found.name}: {found.sentence}" for found in findings if found.passed is False]
    groups = {}
    for group in GROUPS[1:]:
        checks = [finding for finding in findings if finding.group == group]
        if checks:
            groups[group] = [
                {"name": each.name, "passed": each.passed, "sentence": each.sentence, **each.figures} for each in checks
            ]
    return {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "level": level,
        "verdict": "FAIL" if failures else "PASS",
        "failures": failures,
        "seconds": round(seconds, 1),
        **machine,
        "checks": groups,
    }


def record_text(record: Mapping[str, Any]) -> str:
    """A record as its file holds it: JSON, with lists of numbers and words on one line each."""
    # MLX's and the system's messages may have paths in them, with the user's name.
    text = without_paths(json.dumps(record, indent=1, ensure_ascii=False, default=str))
    return re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]).replace("[ ", "["), text) + "\n"


def main(level: str, bench: str, first: str) -> None:
    """The process that examines. What libraries print goes to stderr."""
    # Libraries print to stdout, MLX's own C++ among them: the channel keeps the descriptor, and theirs becomes stderr.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    configure_allocator()
    for event in events(planned_here(level, bench == "bench"), int(first)):
        print(json.dumps(event, default=str), file=channel, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
