"""What a run says: a progress bar, lines, a closing table, and `metrics.jsonl`."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from orpo_mlx.errors import TrainingError, printable_lines
from orpo_mlx.samples import Reply

_WIDE = 110
_REMEMBERED = 40

CLOSING_ROWS = {
    "preference accuracy, mean log-prob": ("accuracies/mean_logps", "{:.1%}"),
    "preference accuracy, summed log-prob": ("accuracies/sum_logps", "{:.1%}"),
    "preference accuracy, the method's reward": ("rewards/accuracies", "{:.1%}"),
    "reward margin": ("rewards/margins", "{:.4f}"),
    "NLL of chosen (nats per token)": ("nll_loss", "{:.4f}"),
    "loss": ("loss", "{:.4f}"),
}


class FileMark(NamedTuple):
    """How far a file has come."""

    size: int
    """Bytes."""
    sha256: str
    """Of those bytes."""


class MetricsFile:
    """`metrics.jsonl`: one JSON object per report, appended in one piece.

    A run that goes on from a checkpoint cuts off what was appended after it (`since`), since those steps are run
    again: every step is in the file once. Cutting a file is one operation of the file system; interrupted before or
    after, it is done again, or found done, when the run is next resumed. What is not finite is written as null.

    Raises:
        OSError: the file cannot be written.
        TrainingError: the file does not begin with what the checkpoint knows of it.
    """

    def __init__(self, path: Path, since: FileMark | None = None) -> None:
        self._path = path
        self._size, self._digest = 0, hashlib.sha256()
        if since is not None and path.exists():
            self._take_up(since)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._handle, self._size)

    def _take_up(self, since: FileMark) -> None:
        with self._path.open("rb") as file:
            self._digest.update(file.read(since.size))
            self._size = file.tell()
        if (self._size, self._digest.hexdigest()) != since:
            raise TrainingError(
                f"{self._path}: its first {since.size} bytes are not those the checkpoint was saved with; put the file "
                "back, or move it away to begin a new one"
            )

    def write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        """Append one report.

        Raises:
            OSError: the disk is full; part of the line may be in the file, where the next write replaces it.
        """
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        line = (json.dumps({"step": step, "split": split, **finite}, allow_nan=False) + "\n").encode()
        try:
            done = 0
            while done < len(line):
                done += os.pwrite(self._handle, line[done:], self._size + done)
        except OSError as error:
            error.filename = str(self._path)
            raise
        self._size += len(line)
        self._digest.update(line)

    def mark(self) -> FileMark:
        """How far the file has come, once all of that is on the disk."""
        os.fsync(self._handle)
        return FileMark(self._size, self._digest.hexdigest())

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


class Reporter:
    """Prints to the terminal: a bar where there is one, plain lines where there is not."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.said: deque[str] = deque(maxlen=_REMEMBERED)
        """The newest lines, without the figures."""

    def say(self, line: str) -> None:
        """Plain text; what comes from data or file names is never read as markup or obeyed by the terminal."""
        self.said.append(line)
        self.figures(line)

    def figures(self, line: str) -> None:
        """A line of figures, which `metrics.jsonl` has as well."""
        self.console.print(Text(printable_lines(line)), soft_wrap=True)

    @contextmanager
    def bar(self, what: str, total: int, unit: str) -> Iterator[Any]:
        """A progress bar; yields `advance(done, note="")`. Nothing is drawn where output is not a terminal."""
        if not self.console.is_terminal:
            # Switched off, the bar of rich before 14.3 still prints an empty line.
            yield lambda done, note="": None
            return
        columns: list[ProgressColumn] = [MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
        # Where the line is short, the numbers go before the bar and its words.
        if self.console.width >= _WIDE:
            columns = [TextColumn("{task.description}"), BarColumn(), TextColumn(unit), *columns]
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(what, total=total, note="")

            def advance(done: int, note: str = "") -> None:
                progress.update(task, completed=done, note=note)

            yield advance

    def closing_table(
        self, before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Held-out metrics before and after training, per split."""
        table = Table(title="Held-out pairs, before and after training", title_justify="left")
        table.add_column("")
        for split in before:
            table.add_column(f"{split} before", justify="right")
            table.add_column(f"{split} after", justify="right")
        for title, (key, form) in CLOSING_ROWS.items():
            cells = [form.format(side[split][key]) for split in before for side in (before, after)]
            table.add_row(title, *cells)
        self.console.print(table)

    def replies(self, before: Sequence[Reply], after: Sequence[Reply]) -> None:
        """Sample replies side by side, as plain text."""
        for first, second in zip(before, after, strict=True):
            self.say(f"\nprompt  {_one_line(first.prompt)}")
            self.say(f"before  [{first.tokens} tokens] {_one_line(first.text)}")
            self.say(f"after   [{second.tokens} tokens] {_one_line(second.text)}")


def train_line(step: int, total: int, metrics: Mapping[str, float]) -> str:
    """The line of one training report."""
    numbers = step_numbers(metrics, metrics["pair_tokens_per_s"], metrics["peak_memory_gib"])
    return f"step {step}/{total}  {numbers}"


def step_numbers(metrics: Mapping[str, float], tokens_per_s: float, peak_gib: float) -> str:
    """Loss, accuracy of the rewards, margin, pair tokens per second and peak memory, in under 60 columns."""
    return (
        f"loss {metrics['loss']:.4f} accuracy {metrics['rewards/accuracies']:.2f} "
        f"margin {metrics['rewards/margins']:.3f} {tokens_per_s:.0f} tok/s {peak_gib:.2f} GiB"
    )


def eval_line(step: int, split: str, metrics: Mapping[str, float]) -> str:
    """The line of one evaluation: accuracy by mean log-prob, and by the method's reward."""
    return (
        f"step {step}  {split}  loss {metrics['loss']:.4f}  accuracy {metrics['accuracies/mean_logps']:.1%} "
        f"(reward {metrics['rewards/accuracies']:.1%})  margin {metrics['rewards/margins']:.4f}"
    )


def _one_line(text: str) -> str:
    """`text` on one line, without the control characters a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))
