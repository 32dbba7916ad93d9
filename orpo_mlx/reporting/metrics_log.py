"""A run's `metrics.jsonl`: written line by line, and read back in whatever state the run left it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from orpo_mlx.errors import DataError
from orpo_mlx.files import check_regular
from orpo_mlx.reporting.resumable_jsonl import LineFile
from orpo_mlx.run_folder import METRICS_FILE, SAMPLES_FILE

Points = list[tuple[int, float]]
"""Steps and values, steps ascending."""

SPLITS = ("train", "valid", "test")
KEY = "Lines: training. Dashes with dots: valid. Open squares: test."
"""How the splits are told apart in a chart."""


class Chart(NamedTuple):
    """Metrics that are drawn together over the steps."""

    title: str
    """With the unit."""
    keys: tuple[str, ...]
    caption: str
    factor: float = 1.0
    """From the metric's unit to the title's."""


LOSS = Chart("loss (nats)", ("loss",), "Loss of the method; losses of different methods are not comparable.")
ACCURACY = Chart(
    "preference accuracy (%)",
    ("accuracies/mean_logps",),
    "Pairs whose chosen side has the higher mean log-prob.",
    100.0,
)
MARGIN = Chart(
    "reward margin (nats)",
    ("rewards/margins",),
    "The method's reward of the chosen side minus that of the rejected one.",
)
REWARDS = Chart(
    "rewards (nats)",
    ("rewards/chosen", "rewards/rejected"),
    "The method's reward of each side: its margin, taken apart.",
)
WIN_RATE = Chart(
    "win rate over the base (%)", ("win_rate",), "Replies judged against the base model's, ties counting half.", 100.0
)
KL = Chart("KL estimate (nats)", ("kl",), "From what the rewards of kto are measured: KL(π ‖ π_ref), at least 0.")
LEARNING_RATE = Chart("learning rate", ("learning_rate",), "As of the last step of a report.")
SPEED = Chart("throughput (pair tokens/s)", ("pair_tokens_per_s",), "Training, from report to report.")
MEMORY = Chart("peak memory (GiB)", ("peak_memory_gib",), "MLX's peak since the run began.")


class RunLog(NamedTuple):
    """What a run reported."""

    name: str
    """The folder's name."""
    reports: dict[str, dict[int, dict[str, float]]]
    """By split (`train`, `valid`, `test`), then by step: the finite numbers of that report."""
    unread: int
    """Lines that are no report: a last line torn by a crash, or something else's."""

    def points(self, split: str, key: str) -> Points:
        """One metric over the steps; empty where it was never reported."""
        steps = self.reports.get(split, {})
        return [(step, steps[step][key]) for step in sorted(steps) if key in steps[step]]


class Report(NamedTuple):
    """One line of `metrics.jsonl`."""

    split: str
    step: int
    numbers: dict[str, float]
    """Those that are finite."""


class Sample(NamedTuple):
    """A sample reply in the middle of a run."""

    step: int
    prompt: str
    text: str
    tokens: int


def read_samples(folder: Path) -> list[Sample]:
    """The replies in `folder`/samples.jsonl, prompt by prompt, then by step; empty where there is no such file.

    Lines that are no reply are skipped.
    """
    try:
        check_regular(folder / SAMPLES_FILE)
        lines = (folder / SAMPLES_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = [sample for sample in map(read_sample, filter(str.strip, lines)) if sample is not None]
    order = list(dict.fromkeys(sample.prompt for sample in found))
    return sorted(found, key=lambda sample: (order.index(sample.prompt), sample.step))


def read_sample(line: str) -> Sample | None:
    row = json_row(line)
    try:
        return Sample(int(row["step"]), str(row["prompt"]), str(row["text"]), int(row["tokens"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def json_row(line: str) -> dict[str, Any]:
    """The JSON object of a line; empty where it is none."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def read_run(folder: Path) -> RunLog:
    """The reports in `folder`/metrics.jsonl.

    Unknown keys are kept, and lines that are no report are counted.

    Raises:
        DataError: there is no such file, or no report in it.
    """
    path = folder / METRICS_FILE
    try:
        check_regular(path)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give the `adapter_path` of a run of orpo_mlx.train."
        ) from None
    reports: dict[str, dict[int, dict[str, float]]] = {}
    unread = 0
    for line in filter(str.strip, lines):
        found = read_report(line)
        if found is None:
            unread += 1
        else:
            # Of two values of one step the later one holds: a run that went on after a crash took that step again.
            reports.setdefault(found.split, {}).setdefault(found.step, {}).update(found.numbers)
    if not reports:
        raise DataError(f"{path}: holds no report yet ({unread} lines that are none); train for a step first.")
    return RunLog(folder.resolve().name, reports, unread)


def read_report(line: str) -> Report | None:
    """The report of one line; None where it is none."""
    row = json_row(line)
    split = row.get("split")
    step = row.get("step")
    # To Python, True is an integer.
    if not isinstance(split, str) or not isinstance(step, int) or isinstance(step, bool):
        return None
    numbers = {key: float(value) for key, value in row.items() if key != "step" and _is_number(value)}
    return Report(split, step, numbers)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class MetricsFile(LineFile):
    """`metrics.jsonl`: a line for each report, appended in one piece; what is not finite is written as null."""

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Append one report; OSError as in `LineFile.append`."""
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self.append([{"step": step, "split": split, **finite}])
