"""What a run says: a progress bar, lines, a closing table."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from orpo_mlx.text import printable_lines
from orpo_mlx.types import Reply

# Columns from which a progress bar has room for all of its words.
_WIDE = 110
_REMEMBERED_LINES = 40
_WARNING = "Warning"
# Rich's own 30 s hold no two steps of a large model, and then there is no time remaining at all.
_ESTIMATED_OVER_S = 3600.0

CLOSING_ROWS = {
    "preference accuracy, mean log-prob": ("accuracies/mean_logps", "{:.1%}"),
    "preference accuracy, summed log-prob": ("accuracies/sum_logps", "{:.1%}"),
    "preference accuracy, the method's reward": ("rewards/accuracies", "{:.1%}"),
    "reward margin": ("rewards/margins", "{:.4f}"),
    "NLL of chosen (nats per token)": ("nll_loss", "{:.4f}"),
    "loss": ("loss", "{:.4f}"),
}


class LastingOutput:
    """`sys.stdout`, whichever that is at the moment, that never fails: what cannot be written goes nowhere.

    A terminal that is closed, or a pipe whose reader has gone, must not end a night of training.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    def write(self, text: str) -> int:
        """As a file's."""
        try:
            return sys.stdout.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """As a file's."""
        try:
            sys.stdout.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        # The descriptor itself: Python writes what is left in the buffer when it ends, and would fail then.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Reporter:
    """Prints to the terminal: a bar where there is one, plain lines where there is not."""

    def __init__(self, console: Console | None = None, render: Callable[[str], str] = str) -> None:
        """`render` rewrites what the run says, for a command line that calls settings by their flags."""
        self.console = console or Console(highlight=False, file=cast(TextIO, LastingOutput()))
        self.render = render
        self._progress: Progress | None = None
        self.said: deque[str] = deque(maxlen=_REMEMBERED_LINES)
        """The newest lines, without the figures."""

    def say(self, line: str) -> None:
        """Print plain text; what comes from data or file names is never read as markup or obeyed by the terminal."""
        self._say_as_it_is(self.render(line))

    def _say_as_it_is(self, line: str) -> None:
        self.said.append(line)
        self.figures(line)

    def figures(self, line: str) -> None:
        """A line of figures, which `metrics.jsonl` has as well."""
        # A terminal has lines broken between words; in a file, a line is one to search for.
        style = "yellow" if line.startswith(_WARNING) else ""
        self.console.print(Text(printable_lines(line), style), soft_wrap=not self.console.is_terminal)

    @contextmanager
    def bar(self, what: str, total: int, unit: str) -> Iterator[Any]:
        """A progress bar; yields `advance(done, note="")`. Nothing is drawn where output is not a terminal.

        A bar inside another one's block is drawn below it.
        """
        with self._bars() as progress:
            # Where there is no room for a description, it stands where the numbers will.
            note = "" if self._wide else what
            task = progress.add_task(what, total=total, unit=unit, note=note)

            def advance(done: int, note: str = note) -> None:
                progress.update(task, completed=done, note=note)

            try:
                yield advance
            finally:
                progress.refresh()
                progress.remove_task(task)

    @property
    def _wide(self) -> bool:
        return self.console.width >= _WIDE

    @contextmanager
    def _bars(self) -> Iterator[Progress]:
        """The one display of all bars."""
        # A terminal has room for one, and rich before 14.1 refuses a second.
        if self._progress is not None:
            yield self._progress
            return
        columns: list[ProgressColumn] = [MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
        # Where the line is short, the numbers go before the bar and its words.
        if self._wide:
            columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[unit]}"), *columns]
        terminal = self.console.is_terminal
        progress = Progress(
            *columns,
            console=self.console,
            transient=True,
            disable=not terminal,
            speed_estimate_period=_ESTIMATED_OVER_S,
        )
        # Some versions of rich end even a disabled display with an empty line.
        with progress if terminal else nullcontext():
            self._progress = progress
            try:
                yield progress
            finally:
                self._progress = None

    def closing_table(
        self, before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Held-out metrics per split, before and after training; those after it alone where none are known before."""
        title = "Held-out pairs, before and after training" if before else "Held-out pairs"
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for split in after:
            for when in ("before", "after") if before else ("",):
                table.add_column(f"{split} {when}".rstrip(), justify="right")
        for row, (key, form) in CLOSING_ROWS.items():
            sides = (before, after) if before else (after,)
            # A row that no split can fill says nothing.
            if any(key in side[split] for split in after for side in sides):
                table.add_row(row, *(shown_metric(side[split], key, form) for split in after for side in sides))
        self.console.print(table)

    def replies(self, before: Sequence[Reply], after: Sequence[Reply]) -> None:
        """Sample replies side by side, as plain text."""
        for first, second in zip(before, after, strict=True):
            self._say_as_it_is(f"\nprompt  {_one_line(first.prompt)}")
            self._say_as_it_is(f"before  [{first.tokens} tokens] {_one_line(first.text)}")
            self._say_as_it_is(f"after   [{second.tokens} tokens] {_one_line(second.text)}")

    def samples(self, step: int, replies: Sequence[Reply]) -> None:
        """Sample replies in the middle of a run."""
        for reply in replies:
            self._say_as_it_is(f"step {step}  prompt  {_one_line(reply.prompt)}")
            self._say_as_it_is(f"step {step}  reply   [{reply.tokens} tokens] {_one_line(reply.text)}")


def train_line(step: int, total: int, metrics: Mapping[str, float]) -> str:
    """The line of one training report."""
    numbers = step_numbers(metrics, metrics["pair_tokens_per_s"], metrics["peak_memory_gib"])
    return f"step {step}/{total}  {numbers}"


def step_numbers(metrics: Mapping[str, float], tokens_per_s: float, peak_gib: float) -> str:
    """Loss, accuracy of the rewards, margin, pair tokens per second and peak memory, in under 60 columns; of single
    completions without a worth neither accuracy nor margin."""
    told = ""
    if "rewards/accuracies" in metrics:
        margin = shown_metric(metrics, "rewards/margins", "{:.3f}")
        told = f"accuracy {metrics['rewards/accuracies']:.2f} margin {margin} "
    return f"loss {metrics['loss']:.4f} {told}{tokens_per_s:.0f} tok/s {peak_gib:.2f} GiB"


def eval_line(step: int, split: str, metrics: Mapping[str, float]) -> str:
    """The line of one evaluation: accuracy by mean log-prob, and by the method's reward, where there is any."""
    start = f"step {step}  {split}  loss {metrics['loss']:.4f}"
    if "rewards/accuracies" not in metrics:
        return start
    accuracy = shown_metric(metrics, "accuracies/mean_logps", "{:.1%}")
    return (
        f"{start}  accuracy {accuracy} (reward {metrics['rewards/accuracies']:.1%})  "
        f"margin {shown_metric(metrics, 'rewards/margins', '{:.4f}')}"
    )


def shown_metric(metrics: Mapping[str, float], key: str, form: str) -> str:
    """A metric, or a dash: single completions have no pairs, and a step may lack the good or the bad."""
    return form.format(metrics[key]) if key in metrics else "-"


def _one_line(text: str) -> str:
    """`text` on one line, without the control characters a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))
