"""Methods trained side by side, cell by cell, each in a process of its own; what is finished is never run again."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from orpo_mlx.compare.plan import PROG, Arm, Plan
from orpo_mlx.compare.results import Cells, JudgementKey, TrainingKey, collect
from orpo_mlx.config.flags import why_it_died
from orpo_mlx.config.settings import settings_with
from orpo_mlx.config.traits import Trait
from orpo_mlx.data.sources import find_splits
from orpo_mlx.errors import ConfigError, TrainingError
from orpo_mlx.files import read_json_table, save_json
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.training.run import versions


class Job(NamedTuple):
    """A cell to run: where its result goes, and the flags of its process."""

    folder: Path
    file: str
    identity: dict[str, Any]
    """What makes it different from the other cells of its comparison."""
    argv: tuple[str, ...]


class Runner:
    """Runs cells and remembers them in `plan.output`/cells/."""

    def __init__(self, plan: Plan, reporter: Reporter, done: Callable[[float, str], None]) -> None:
        self._plan = plan
        self._reporter = reporter
        self._done = done
        self._finished = 0

    def base(self) -> dict[str, Any]:
        """The model before any training, judged on the held-out pairs."""
        argv = self._argv(self._plan.arms[0], 0, self._plan.rates[0])
        return self._cell("base", "test.json", {"kind": "base"}, argv)

    def train(self, arm: Arm, seed: int, rate: float, factor: float = 1.0, labels: str = "given") -> dict[str, Any]:
        """One training."""
        beta = None if arm.beta is None or factor == 1 else arm.beta * factor
        # β last: of a flag that is given twice, the last one holds.
        argv = (*self._argv(arm, seed, rate), *arm.argv[2:], *(() if beta is None else ("--beta", f"{beta:.6g}")))
        identity = cell_identity("train", arm, seed, rate, factor, labels)
        return self._cell(cell_name(arm, seed, rate, factor, labels), "train.json", identity, argv)

    def train_or_fail(self, arm: Arm, seed: int, rate: float, labels: str = "given") -> dict[str, Any]:
        """One training; TrainingError where it failed."""
        cell = self.train(arm, seed, rate, 1.0, labels)
        if "failed" in cell:
            raise TrainingError(f"{cell_name(arm, seed, rate, 1.0, labels)}: {cell['failed']}")
        return cell

    def test(self, arm: Arm, seed: int, rate: float, labels: str = "given") -> dict[str, Any]:
        """One training's adapters, judged on the held-out pairs."""
        name = cell_name(arm, seed, rate, 1.0, labels)
        adapters = ("--resume-adapter-file", str(self._plan.output / "cells" / name))
        identity = cell_identity("test", arm, seed, rate, 1.0, labels)
        return self._cell(name, "test.json", identity, (*self._argv(arm, seed, rate), *adapters))

    def _argv(self, arm: Arm, seed: int, rate: float) -> tuple[str, ...]:
        # `repr` is read back as the very same float, which is the one in the cell's identity.
        own = ("--seed", str(seed), "--learning-rate", repr(rate), "--no-memory-check")
        # The method alone: an arm's own flags are for training, and its adapters are judged without them.
        return (*self._plan.arguments, *arm.argv[:2], *own)

    def _cell(self, name: str, file: str, identity: dict[str, Any], argv: tuple[str, ...]) -> dict[str, Any]:
        folder = self._plan.output / "cells" / name
        job = Job(folder, file, identity, (*argv, "--adapter-path", str(folder)))
        title = f"{name} {'judged' if file == 'test.json' else 'trained'}"
        result = known_result(job)
        if result is None:
            self._done(self._finished, title)
            self._run(job, title)
            result = known_result(job)
            if result is None:
                raise TrainingError(f"{folder / file}: was written and cannot be read; give the command again")
            if not self._reporter.console.is_terminal:
                self._reporter.say(f"{title}{': ' + result['failed'] if 'failed' in result else ''}")
        self._finished += 1
        self._done(self._finished, title)
        return result

    def _run(self, job: Job, title: str) -> None:
        """Run one cell; errors as of `in_a_process`."""
        job.folder.mkdir(parents=True, exist_ok=True)
        plan = self._plan
        spec = {
            **job.identity,
            "argv": job.argv,
            "identity": job.identity,
            "output": str(job.folder / job.file),
            "budget": list(plan.budget),
            "valid_pairs": plan.valid_pairs,
            "test_pairs": plan.test_pairs,
            "curve_points": plan.curve_points,
        }
        in_a_process(spec, title, lambda share: self._done(self._finished + share, title))


def known_result(job: Job) -> dict[str, Any] | None:
    """A finished cell's result; None where there is none, or it is of something else that has the same name."""
    try:
        found: dict[str, Any] = json.loads((job.folder / job.file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # Through JSON, which makes lists of tuples, as the file's own has been.
    same = isinstance(found, dict) and found.get("spec") == json.loads(json.dumps(job.identity))
    return found if same else None


def in_a_process(spec: dict[str, Any], title: str, report_share: Callable[[float], None]) -> None:
    """Run one cell in a process of its own, which writes its result.

    Raises:
        ConfigError: it ended with one sentence about settings, data or model.
        TrainingError: it died.
    """
    # A peak of memory is a process's: within one, a cell would inherit the peak of those before it.
    process = subprocess.Popen(
        [sys.executable, "-m", "orpo_mlx.compare.cell", json.dumps(spec)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tokens and reference log-probs remembered from another cell would make this one's times too short.
        env={**os.environ, "ORPO_MLX_CACHE": "off"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    # Read at the same time: a full pipe of errors would stop the process, and this one waits for its output.
    reader = threading.Thread(target=errors.extend, args=(process.stderr,))
    reader.start()
    try:
        for line in process.stdout:
            # Libraries may print as well.
            if line.startswith('{"progress"'):
                report_share(json.loads(line)["progress"])
    # Whatever ends this command must not leave a training behind that nobody waits for.
    except BaseException:
        process.terminate()
        raise
    finally:
        status = process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()
    raise_for_status(status, errors, title)


def raise_for_status(status: int, errors: Sequence[str], title: str) -> None:
    """Raise what a cell's process ended with, if it was not well; see `in_a_process`."""
    why = why_it_died(status, errors, PROG)
    if why is not None:
        raise TrainingError(f"{title}: its process died ({why}); what is finished is kept, the same command goes on")


def cell_identity(kind: str, arm: Arm, seed: int, rate: float, factor: float, labels: str) -> dict[str, Any]:
    """All that makes a cell different from the others of its comparison."""
    return {"kind": kind, "arm": arm.argv, "seed": seed, "rate": rate, "factor": factor, "labels": labels}


def cell_name(arm: Arm, seed: int, rate: float, factor: float, labels: str) -> str:
    """The folder of a training: its arm, seed, learning rate and what else is unusual about it."""
    # Names that come out alike are told apart by the identity within the file (`known_result`).
    parts = [re.sub(r"[^a-z0-9_.]+", "-", arm.name.lower()).strip("-"), f"seed{seed}", f"lr{rate:g}"]
    parts += [f"beta-times-{factor:g}"] if factor != 1 else []
    parts += [f"labels-{labels}"] if labels != "given" else []
    return "_".join(parts)


def started_as() -> list[str]:
    """The words that began the command that was typed."""
    script = Path(sys.argv[0]).name == "compare_methods.py"
    return ["python", "scripts/compare_methods.py"] if script else ["orpo-mlx", "compare"]


def run_comparison(plan: Plan, argv: Sequence[str], reporter: Reporter) -> dict[str, Any]:
    """Run what is missing of a plan and collect its results.

    Raises:
        UserError: settings, data or model cannot be used; a process died; `plan.output` holds another comparison.
    """
    # Data that is not there is said now, before the folder is claimed and a process started.
    find_splits(plan.config.data)
    claim_folder(plan)
    # Equal sweep keys share a learning rate: an arm with a copied reference is swept by its twin without.
    swept = [arm for arm in plan.arms if not arm.copies_reference or twin_of(plan, arm) is arm]
    with reporter.bar("comparing", count_cells(plan, swept), "cells") as advance:
        cells = run_cells(plan, swept, Runner(plan, reporter, advance))
    cells.check()
    results = {
        "schema": 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([*started_as(), *argv]),
        "machine": machine(),
        "versions": versions(),
        **collect(plan, cells),
    }
    save_json(plan.output / "results.json", results)
    return results


def run_cells(plan: Plan, swept: Sequence[Arm], runner: Runner) -> Cells:
    """All cells of a plan: the base model, sweeps, seeds, the sensitivity grid, sanity checks."""
    cells = Cells(base=runner.base())
    for arm in swept:
        for rate in plan.rates:
            cells.trained[TrainingKey(arm.name, 0, rate)] = runner.train(arm, 0, rate)
        cells.choose(arm, plan.rates)
    for arm in plan.arms:
        rate = cells.rates[arm.name] = cells.rates[twin_of(plan, arm).name]
        for seed in range(plan.seeds):
            cells.trained[TrainingKey(arm.name, seed, rate)] = runner.train_or_fail(arm, seed, rate)
            cells.tested[JudgementKey(arm.name, seed)] = runner.test(arm, seed, rate)
    for arm in (arm for arm in swept if arm.beta is not None):
        for factor in other_factors(plan):
            for rate in plan.rates:
                cells.trained[TrainingKey(arm.name, 0, rate, factor)] = runner.train(arm, 0, rate, factor)
    for arm in plan.sanity:
        for labels in ("swapped", "shuffled"):
            rate = cells.rates[arm.name]
            cells.trained[TrainingKey(arm.name, 0, rate, labels=labels)] = runner.train_or_fail(arm, 0, rate, labels)
            cells.tested[JudgementKey(arm.name, 0, labels)] = runner.test(arm, 0, rate, labels)
    return cells


def machine() -> dict[str, Any]:
    """What figures were taken on."""
    info = mx.device_info()
    keys = ("device_name", "architecture", "memory_size", "max_recommended_working_set_size")
    known = {key: info[key] for key in keys if key in info}
    return {"platform": platform.platform(), "cores": os.cpu_count(), "device": str(mx.default_device()), **known}


def twin_of(plan: Plan, arm: Arm) -> Arm:
    """The arm whose learning rate holds for `arm`: the same maths without the copy, or itself."""
    return next((other for other in plan.arms if other.sweep_key == arm.sweep_key and not other.copies_reference), arm)


def other_factors(plan: Plan) -> list[float]:
    """The factors of β besides the sweep's own 1."""
    return [factor for factor in plan.beta_factors if factor != 1]


def count_cells(plan: Plan, swept: Sequence[Arm]) -> int:
    """How many cells `run_cells` will ask for."""
    grid = sum(len(plan.rates) * (1 + (len(other_factors(plan)) if arm.beta is not None else 0)) for arm in swept)
    return 1 + grid + 2 * len(plan.arms) * plan.seeds + 4 * len(plan.sanity)


def claim_folder(plan: Plan) -> None:
    """Raise ConfigError unless `plan.output` is new, or holds cells of this very comparison."""
    file = plan.output / "comparison.json"
    found = versions()
    decisive = {name: found[name] for name in ("orpo-mlx", "mlx", "mlx-lm", "device")}
    # Through JSON, which makes lists of tuples, as the file's own has been.
    identity = json.loads(json.dumps({**plan.identity, "versions": decisive}))
    try:
        plan.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"`output` {plan.output}: cannot be made ({error.strerror}).") from None
    if not file.is_file():
        save_json(file, identity)
        return
    before = read_json_table(file, ConfigError)
    # Earlier versions also wrote down settings that a comparison has no use for.
    for key in sorted({*identity, *before} - {*settings_with(Trait.COMPARED)}):
        if identity.get(key) != before.get(key):
            raise ConfigError(
                f"{file}: holds another comparison, whose {key} is {before.get(key)!r} and here {identity.get(key)!r}; "
                "give another `output`."
            )
