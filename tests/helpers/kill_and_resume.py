"""Runs killed at random moments and resumed until they are done: `python -m tests.helpers.kill_and_resume --help`."""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import orpo_mlx  # noqa: F401  (loads a BLAS before mlx)

# isort: split
import mlx.core as mx
import numpy as np
import yaml

FEW_THREADS = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Tiny models gain nothing from several."""
TIMED = ("pair_tokens_per_s", "peak_memory_gib")


class Outcome(NamedTuple):
    """What became of some runs."""

    runs: int
    equal: int
    """Runs whose adapters and metrics are those of the uninterrupted one, bit for bit."""
    kills: int
    starts: int


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics without what a clock or the process decides."""
    return [{key: value for key, value in row.items() if key not in TIMED} for row in records(folder)]


def adapters(folder: Path) -> dict[str, Any]:
    """A run's adapters as NumPy arrays."""
    loaded = mx.load(str(folder / "adapters.safetensors"))
    assert isinstance(loaded, dict)
    return {name: np.array(value) for name, value in loaded.items()}


def same(first: Path, second: Path) -> bool:
    """Whether two runs gave the same adapters and metrics, bit for bit, each line of metrics once."""
    return (
        metrics(first) == metrics(second)
        and (first / "adapters.safetensors").read_bytes() == (second / "adapters.safetensors").read_bytes()
    )


def kill_and_resume(
    settings: dict[str, Any], folder: Path, *, runs: int, seed: int, say: Callable[[str], None] = lambda line: None
) -> Outcome:
    """An uninterrupted run, and `runs` that are killed after random times until a start lives to the end.

    Kills fall anywhere in a run's life after its first line: restoring, evaluation, steps, reports, saves.
    """
    generator = random.Random(seed)
    config = folder / "night.yaml"
    folder.mkdir(parents=True, exist_ok=True)

    def start(name: str, resume: bool) -> subprocess.Popen[bytes]:
        config.write_text(yaml.safe_dump({**settings, "adapter_path": str(folder / name), "resume": resume}))
        environment = {**os.environ, "ORPO_MLX_CACHE": str(folder / f"{name} cache"), **FEW_THREADS}
        argv = [sys.executable, "-m", "orpo_mlx.train", "-c", str(config)]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)

    began = time.perf_counter()
    whole = start("whole", False)
    assert whole.stdout is not None
    whole.stdout.readline()
    first_line = time.perf_counter() - began
    rest, _ = whole.communicate()
    life = time.perf_counter() - began - first_line
    assert whole.returncode == 0, rest
    equal = kills = starts = 0
    for number in range(runs):
        name = f"run {number}"
        done, mercy = False, 0.0
        while not done:
            process = start(name, resume=True)
            starts += 1
            assert process.stdout is not None
            line = process.stdout.readline()
            try:
                delay = generator.random() * life
                out, _ = process.communicate(timeout=None if generator.random() < mercy else delay)
                assert process.returncode == 0, (line, out)
                done = mercy > 0
                if not done:  # It was too quick for its killer: again.
                    shutil.rmtree(folder / name)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                mercy = 0.6
        equal += same(folder / "whole", folder / name)
        say(f"{number + 1} runs: {equal} equal, {kills} kills, {starts} starts")
        shutil.rmtree(folder / f"{name} cache", ignore_errors=True)
    return Outcome(runs, equal, kills, starts)


class Ends(NamedTuple):
    """What became of processes that were signalled."""

    runs: int
    equal: int
    """As of `Outcome`."""
    statuses: dict[str, int]
    """How many processes ended how, by signal and status."""
    faults: list[str]
    """Tracebacks, wrong statuses, more than a sentence."""


def signal_and_resume(settings: dict[str, Any], folder: Path, *, runs: int, seed: int) -> Ends:
    """Runs that meet a signal at a moment between their first millisecond and their last, and are then resumed."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "ORPO_MLX_CACHE": str(folder / "cache"), **FEW_THREADS}

    def start(name: str) -> subprocess.Popen[str]:
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump({**settings, "adapter_path": str(folder / name)}))
        # With nothing but the folder once the run has begun, as its own last sentence says.
        begun = (folder / name / "run.json").is_file()
        own = ["--adapter-path", str(folder / name)] if begun else ["-c", str(config)]
        argv = [sys.executable, "-m", "orpo_mlx.train", "--resume", *own]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    began = time.perf_counter()
    whole = start("whole")
    _, err = whole.communicate()
    life = time.perf_counter() - began
    assert whole.returncode == 0, err
    equal = 0
    statuses: dict[str, int] = {}
    faults: list[str] = []
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]
    for run in range(runs):
        name = f"run {run}"
        number = numbers[run % len(numbers)]
        process = start(name)
        # Squared: the first seconds are where most goes on that is not a step.
        time.sleep(life * generator.random() ** 2)
        process.send_signal(number)
        _, err = process.communicate()
        status = process.returncode
        key = f"{number.name} {status}"
        statuses[key] = statuses.get(key, 0) + 1
        expected = {0, -number if number == signal.SIGKILL else 128 + number}
        # Python's own start, some milliseconds before the first line of the package, is nobody's to mend.
        own_start = "orpo_mlx" not in err.replace("__editable___orpo_mlx", "") and (
            (status == -number and number != signal.SIGKILL) or "Traceback" in err
        )
        if own_start:
            statuses["before the package"] = statuses.get("before the package", 0) + 1
        elif status not in expected or "Traceback" in err or "Exception" in err:
            faults.append(f"{name}, {key}: {err}")
        rest = start(name)
        _, err = rest.communicate()
        if rest.returncode:
            faults.append(f"{name} resumed: {err}")
        else:
            equal += same(folder / "whole", folder / name)
    return Ends(runs, equal, statuses, faults)


def main() -> None:
    """Kill runs on a tiny model and print what became of them."""
    from tests.conftest import SMALL, make_pairs, write_id_rows, write_model_folder

    parser = argparse.ArgumentParser(prog="python -m tests.helpers.kill_and_resume", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="orpo")
    parser.add_argument("--signals", action="store_true", help="SIGINT, SIGTERM, SIGHUP as well, from the first moment")
    args = parser.parse_args()
    for split, seed in (("train", 0), ("valid", 1), ("test", 2)):
        write_id_rows(args.folder / "data" / f"{split}.jsonl", make_pairs(6, seed=seed))
    settings: dict[str, Any] = {
        **SMALL,
        "model": str(write_model_folder(args.folder / "model")),
        "data": str(args.folder / "data"),
        "method": args.method,
        "iters": 60,
        "save_every": 3,
        "steps_per_report": 4,
        "steps_per_eval": 5,
        "save_best": True,
        "lora_parameters": {"dropout": 0.1},
    }
    if args.signals:
        ends = signal_and_resume({**settings, "iters": 30}, args.folder, runs=args.runs, seed=args.seed)
        print(ends)
        sys.exit(ends.equal != ends.runs or bool(ends.faults))
    say = functools.partial(print, flush=True)
    outcome = kill_and_resume(settings, args.folder, runs=args.runs, seed=args.seed, say=say)
    print(f"{args.method}, seed {args.seed}: {outcome}")
    sys.exit(outcome.equal != outcome.runs)


if __name__ == "__main__":
    main()
