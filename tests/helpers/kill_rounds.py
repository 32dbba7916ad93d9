"""Commands about replies killed at random moments of their work and begun again: `python -m tests.helpers.kill_rounds`.

`iterate` goes on where it was; `pairs` with the next group of prompts; `evaluate` begins again. All must end with the
files of one that nobody disturbed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.helpers.kill_and_resume import FEW_THREADS, metrics

_TIMED = ("training_seconds",)


OUTPUTS = {"iterate": "rounds", "pairs": "train.jsonl", "evaluate": "replies.jsonl"}
"""The commands, with the name of the output of each: a folder, or a file."""


class Killed(NamedTuple):
    """What became of a command that was killed and begun again until it ended."""

    kills: int
    starts: int
    ended: int
    """Outputs that were brought to their end."""
    different: list[str]
    """Their files that are not those of the undisturbed one; expected: none."""


def disturbed(
    argv: Sequence[str],
    folder: Path,
    name: str,
    *,
    kills: int,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> Killed:
    """Run a command once undisturbed, and then with `kills` SIGKILLs at random moments.

    Each output is begun again until it is whole, and another one is begun where kills are left. All are written to the
    same path, which files name, and moved away once they are whole.

    Args:
        argv: the command line but for the output, its last argument.
        folder: receives the outputs.
        name: of an output.
        kills: how many processes are killed.
        seed: of the moments.
        say: told what happens.
    """
    generator = random.Random(seed)
    work, whole = folder / "work", folder / f"{argv[0]}-whole"
    work.mkdir()
    began = time.perf_counter()
    process = start(argv, work / name)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    life = time.perf_counter() - began
    work.rename(whole)
    say(f"{argv[0]}, undisturbed: {life:.1f} s")
    done = starts = ended = 0
    different: list[str] = []
    while done < kills:
        work.mkdir()
        while True:
            starts += 1
            # Behind Python's own start and the imports, which are not what is tried here.
            delay = life * (0.15 + 0.7 * generator.random()) if done < kills else None
            process = start(argv, work / name)
            try:
                out, _ = process.communicate(timeout=delay)
                assert process.returncode == 0, out
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                done += 1
                say(f"killed after {delay:.1f} s")
        cut = folder / f"{argv[0]}-cut-{ended}"
        work.rename(cut)
        ended += 1
        different += [f"{cut.name}: {path}" for path in different_files(whole, cut)]
    return Killed(done, starts, ended, different)


def start(argv: Sequence[str], output: Path) -> subprocess.Popen[str]:
    """The command, in a process of its own."""
    environment = {**os.environ, **FEW_THREADS, "ORPO_MLX_CACHE": str(output.parent.parent / "cache")}
    command = [sys.executable, "-m", "orpo_mlx", *argv, str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def different_files(whole: Path, cut: Path) -> list[str]:
    """Names of files below two folders that differ in more than what a clock decides."""
    both = [{str(path.relative_to(folder)) for path in results(folder)} for folder in (whole, cut)]
    differing = {name for name in both[0] & both[1] if content(whole / name) != content(cut / name)}
    return sorted((both[0] ^ both[1]) | differing)


def results(folder: Path) -> list[Path]:
    """What a command leaves behind for its user: no checkpoints on the way, and no record of how a run went."""
    kinds = (".jsonl", ".json", ".safetensors", ".samples")
    found = [path for path in folder.rglob("*") if path.is_file() and path.suffix in kinds]
    return [path for path in found if "checkpoints" not in path.parts and path.name not in ("run.json", "state.json")]


def content(path: Path) -> Any:
    """A file's content, without what a clock decides."""
    if path.name == "metrics.jsonl":
        return metrics(path.parent)
    return without_times(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()


def without_times(value: Any) -> Any:
    """A JSON value without keys that a clock decides."""
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in _TIMED}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def prepare(folder: Path) -> dict[str, list[str]]:
    """A tiny model, prompts, and the command lines of `iterate`, `pairs` and `evaluate`, but for their output."""
    from tests.conftest import SMALL, write_model_folder, write_rows
    from tests.convert.test_conversions import write_adapter_folder

    model = write_model_folder(folder / "model")
    adapter = write_adapter_folder(folder / "adapter")
    data = folder / "data"
    rows = [{"prompt": f"Say {number}."} for number in range(24)]
    write_rows(data / "train.jsonl", rows)
    write_rows(data / "test.jsonl", rows[:8])
    config = folder / "rounds.yaml"
    train = {**SMALL, "model": str(model), "save_every": 2, "samples": 0}
    table = {
        **{"data": str(data), "judge": "rule:length=1", "rounds": 3, "samples": 5, "rows": 20, "max_tokens": 24},
        **{"least_gain": -1, "train": train},
    }
    config.write_text(yaml.safe_dump(table))
    common = ["--model", str(model), "--data", str(data), "--judge", "rule:length=1", "--max-tokens", "24"]
    return {
        "iterate": ["iterate", "-c", str(config), "--output"],
        "pairs": ["pairs", *common, "--samples", "5", "--rows", "10", "--output"],
        "evaluate": ["evaluate", *common, "--adapter-path", str(adapter), "--replies"],
    }


def main() -> None:
    """Kill iterate, pairs and evaluate on a tiny model and print what became of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.kill_rounds", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(OUTPUTS))
    args = parser.parse_args()
    bad = False
    for name, argv in prepare(args.folder).items():
        if args.only in (None, name):
            say = functools.partial(print, flush=True)
            found = disturbed(argv, args.folder, OUTPUTS[name], kills=args.kills, seed=args.seed, say=say)
            say(f"{name}, seed {args.seed}: {found}")
            bad |= bool(found.different)
    sys.exit(bad)


if __name__ == "__main__":
    main()
