"""The training loop, one for every method: steps, and what falls due after each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx

from orpo_mlx.config.settings import DEFAULT_MAX_SKIPPED
from orpo_mlx.errors import HalfAppliedError, NonFiniteError, TrainingError, reason_of
from orpo_mlx.losses.metrics import MetricMeans
from orpo_mlx.reporting.callbacks import Callbacks
from orpo_mlx.reporting.console import Reporter, step_numbers, train_line
from orpo_mlx.reporting.metrics_log import MetricsFile
from orpo_mlx.reporting.resumable_jsonl import FileMark, LineFile
from orpo_mlx.reporting.run_report import refresh_report
from orpo_mlx.training.checkpoints.progress import Best, Held, Progress
from orpo_mlx.training.checkpoints.resume import mark_best, save
from orpo_mlx.training.checkpoints.state import random_numbers_kept, random_state, set_random_state
from orpo_mlx.training.data_order import total_steps, training_order
from orpo_mlx.training.evaluation import evaluate_splits
from orpo_mlx.training.interrupts import Interrupted, StopSignals
from orpo_mlx.training.run import Run
from orpo_mlx.training.samples import Sampler
from orpo_mlx.training.step import optimiser_step
from orpo_mlx.types import Reply, TokenizedPair


class Outlets(NamedTuple):
    """What a run tells of itself, and to whom."""

    reporter: Reporter
    metrics: MetricsFile
    sampler: Sampler
    callbacks: Callbacks


class Loop:
    """A run in motion.

    A checkpoint is written after a step's report and before its evaluation. What falls due after a step is therefore
    done once more when a run is resumed from that step, and leaves the same lines.

    Args:
        run: what is trained.
        progress: how far it has come.
        outlets: where it says so.
        stop: how it is asked to end.
        saved_step: the step of the checkpoint it was resumed from; None for a new run.
        keep_reference: called after each save.
    """

    def __init__(
        self,
        run: Run,
        progress: Progress,
        outlets: Outlets,
        stop: StopSignals,
        *,
        saved_step: int | None = None,
        keep_reference: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.progress, self.outlets = run, progress, outlets
        self._reporter, self._metrics = outlets.reporter, outlets.metrics
        self._stop, self._keep_reference = stop, keep_reference
        self._saved_step = saved_step
        self._due: tuple[int, dict[str, FileMark]] | None = None
        self._replies: list[Reply] | None = None
        self.peak_memory_gib = 0.0
        """MLX's peak since the first step."""
        self._asked: int | None = None
        self._randoms = [random_state()]
        self.total = total_steps(run.config, len(run.splits["train"].pairs))

    def look_before(self) -> None:
        """What is to be compared with at the end: sample replies and held-out metrics before the first step.

        Raises:
            Interrupted, TrainingError: the run ends before it has begun.
        """
        progress = self.progress
        with random_numbers_kept():
            progress.replies_before = self.outlets.sampler(0)
        try:
            progress.before = self.evaluate(("valid", "test"))
        except TrainingError as error:
            raise TrainingError(f"{error}; nothing was saved") from error.__cause__

    def replies_after(self) -> list[Reply]:
        """Sample replies after the last step."""
        return self.outlets.sampler(self.total) if self._replies is None else self._replies

    def steps(self) -> Held:
        """All steps that are left; the last evaluation's metrics.

        Raises:
            Interrupted, KeyboardInterrupt, TrainingError: the run ends early; says what was saved and how to go on.
        """
        mx.reset_peak_memory()
        self.run.loaded.model.train()
        with self._reporter.bar("training", self.total, "steps") as advance, self._saved_if_it_ends():
            pairs, progress = self.run.splits["train"].pairs, self.progress
            self._agree()
            advance(progress.step)
            held = self._what_is_due() if progress.step else {}
            windows = iter(training_order(self.run, progress.step))
            while progress.step < self.total:
                self._end_if_asked()
                means = self._step([pairs[index] for index in next(windows)])
                self._agree()
                if means is not None:
                    rate = progress.pair_tokens / max(progress.seconds, 1e-9)
                    advance(progress.step, step_numbers(means.means(), rate, mx.get_peak_memory() / 2**30))
                held = self._what_is_due()
            self.peak_memory_gib = mx.get_peak_memory() / 2**30
        return held

    def evaluate(self, names: Sequence[str]) -> Held:
        """Evaluate the held-out splits among `names`, at the present step."""
        return evaluate_splits(
            self.run, names, step=self.progress.step, untrained=self.progress.step == 0, reporter=self._reporter,
            metrics_file=self._metrics, stop=self._stop, told=self.outlets.callbacks.report_validation,
        )  # fmt: skip

    def _step(self, window: Sequence[TokenizedPair]) -> MetricMeans | None:
        """One step and its part of the report; None where it was passed over."""
        progress = self.progress
        before = random_state()
        started = time.perf_counter()
        try:
            means: MetricMeans | None = optimiser_step(self.run, window, progress.step + 1)
        except NonFiniteError as error:
            means = None
            self._pass_over(error)
        except BaseException:
            # The step is as if it had never begun.
            set_random_state(before)
            raise
        # A clock that goes backwards costs a figure of speed, never a step.
        seconds = max(time.perf_counter() - started, 0.0)
        progress.seconds += seconds
        progress.training_seconds += seconds
        progress.step += 1
        if means is not None:
            progress.means.merge(means)
            tokens = sum(pair.pair_tokens for pair in window)
            progress.pair_tokens += tokens
            progress.trained_tokens += tokens
            for warning in progress.watch.add(means.means()):
                self._reporter.say(f"Warning, step {progress.step}: {warning}")
        return means

    def _agree(self) -> None:
        """Learn between steps how far the ranks' random numbers are, and whether one of them was asked to end."""
        answers = self.run.ranks.gather([self._stop.number, *random_state()])
        self._randoms = [(high, low) for _, high, low in answers]
        self._asked = next((number for number, _, _ in answers if number is not None), None)

    def _end_if_asked(self) -> None:
        if self._asked is not None:
            raise Interrupted(self._asked)

    def _pass_over(self, error: NonFiniteError) -> None:
        config, progress = self.run.config, self.progress
        if config.on_nonfinite != "skip":
            raise error
        most = DEFAULT_MAX_SKIPPED if config.max_skipped is None else config.max_skipped
        if progress.skipped >= most:
            raise TrainingError(f"{error}; {progress.skipped} steps were passed over before, --max-skipped is {most}")
        progress.skipped += 1
        self._reporter.say(f"Passed over ({progress.skipped} of at most {most}): {error}.")

    def _what_is_due(self) -> Held:
        """Report, save, evaluate and sample, as the settings say for this step."""
        config, progress = self.run.config, self.progress
        step, last = progress.step, progress.step == self.total
        evaluates = last or step % config.steps_per_eval == 0
        if progress.reported < step and (last or step % config.steps_per_report == 0):
            self._report()
        self._due = (step, self._marks())
        every = config.report_every
        if every is not None and step % every == 0 and not last and self.run.ranks.first:
            refresh_report(self.run.folder)
        if (last or step % config.save_every == 0 or (config.save_best and evaluates)) and self._saved_step != step:
            self._save()
            self._keep_reference()
        self._end_if_asked()
        held = self.evaluate(("valid", "test") if last else ("valid",)) if evaluates else {}
        if config.save_best and evaluates:
            self._compare(held["valid"]["loss"])
        if config.sample_every is not None and (last or step % config.sample_every == 0):
            self._sample()
        return held

    def _report(self) -> None:
        progress = self.progress
        report = {
            **progress.means.means(),
            "pair_tokens_per_s": progress.pair_tokens / max(progress.seconds, 1e-9),
            "peak_memory_gib": mx.get_peak_memory() / 2**30,
            "learning_rate": float(self.run.optimizer.learning_rate),
        }
        if self.run.config.on_nonfinite == "skip":
            report["skipped"] = progress.skipped
        self._metrics.write(progress.step, "train", report)
        if progress.means.pairs:
            self._reporter.figures(train_line(progress.step, self.total, report))
        steps, seconds = progress.step - progress.reported, progress.seconds
        progress.start_report()
        self.outlets.callbacks.report_training(
            progress.step, report, steps=steps, seconds=seconds, trained_tokens=progress.trained_tokens
        )

    def _sample(self) -> None:
        with random_numbers_kept():
            self._replies = self.outlets.sampler(self.progress.step)
        if self.progress.step < self.total:
            self._reporter.samples(self.progress.step, self._replies)

    def _files(self) -> dict[str, LineFile]:
        file = self.outlets.sampler.file
        return {"metrics": self._metrics, **({} if file is None else {"samples": file})}

    def _marks(self) -> dict[str, FileMark]:
        return {name: file.mark() for name, file in self._files().items()}

    def _save(self) -> None:
        # Also where the run ends after its evaluation: resumed, the step's evaluation is done and written once more.
        step, marks = self._due or (None, {})
        if step != self.progress.step:
            marks = self._marks()
        for file in self._files().values():
            file.sync()
        self._saved_step = save(self.run, self.progress, marks, self._randoms).step

    def _compare(self, loss: float) -> None:
        """Remember this step if its validation loss is the lowest so far."""
        best = self.progress.best
        if math.isfinite(loss) and (best is None or loss < best.loss):
            self.progress.best = Best(self.progress.step, loss)
            mark_best(self.run, self.progress.step)

    @contextmanager
    def _saved_if_it_ends(self) -> Iterator[None]:
        """Save the last whole step when the run is interrupted or fails, and say how to go on."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            words = self._ending(error)
            if isinstance(error, KeyboardInterrupt):
                number = error.number if isinstance(error, Interrupted) else 2
                raise Interrupted(number, words) from None
            reason = reason_of(error, None)
            if isinstance(error, OSError) and error.filename:
                reason = f"{error.filename}: {error.strerror or reason}"
            if not isinstance(error, (TrainingError, OSError)):
                reason = f"step {self.progress.step + 1}: {reason}"
            raise TrainingError(f"{reason}; {words}") from error

    def _ending(self, error: BaseException) -> str:
        """Save, if there is something to save, and say what there is to go on from."""
        problem = ""
        step = self.progress.step
        if step and self._saved_step != step and not isinstance(error, HalfAppliedError):
            try:
                self._save()
            except (TrainingError, OSError) as second:
                problem = f"step {step} cannot be saved: {reason_of(second, None)}; "
        if self._saved_step is None:
            return f"{problem}nothing was saved"
        return (
            f"{problem}step {self._saved_step} is saved, go on with "
            f"orpo-mlx train --resume --adapter-path {self.run.config.adapter_path}"
        )
