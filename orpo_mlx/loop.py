"""The training loop, one for every method: steps, and what falls due after each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from orpo_mlx.config import DEFAULT_MAX_SKIPPED
from orpo_mlx.errors import HalfAppliedError, NonFiniteError, TrainingError
from orpo_mlx.evaluation import evaluate
from orpo_mlx.metrics import MetricMeans
from orpo_mlx.order import held_out_pairs, total_steps, training_order
from orpo_mlx.prepare import Run
from orpo_mlx.progress import Best, Held, Progress
from orpo_mlx.report import refresh_report
from orpo_mlx.reporting import MetricsFile, Reporter, eval_line, step_numbers, train_line
from orpo_mlx.resume import mark_best, random_state, save, set_random_state
from orpo_mlx.signals import Interrupted, StopSignals
from orpo_mlx.step import optimiser_step
from orpo_mlx.types import TokenizedPair


class Loop:
    """A run in motion.

    A checkpoint is written after a step's report and before its evaluation. What falls due after a step is therefore
    done once more when a run is resumed from that step, and leaves the same lines.

    Args:
        run: what is trained.
        progress: how far it has come.
        reporter: where it says so.
        metrics_file: where it is written down.
        stop: how it is asked to end.
        saved_step: the step of the checkpoint it was resumed from; None for a new run.
        keep_reference: called after each save.
    """

    def __init__(
        self,
        run: Run,
        progress: Progress,
        reporter: Reporter,
        metrics_file: MetricsFile,
        stop: StopSignals,
        *,
        saved_step: int | None = None,
        keep_reference: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.progress = run, progress
        self._reporter, self._metrics, self._stop, self._keep_reference = reporter, metrics_file, stop, keep_reference
        self._saved_step = saved_step
        self._asked: int | None = None
        self._randoms = [random_state()]
        self.total = total_steps(run.config, len(run.splits["train"].pairs))

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
        return held

    def evaluate(self, names: Sequence[str]) -> Held:
        """Evaluate the held-out splits among `names`, at the present step."""
        run, step = self.run, self.progress.step
        held: Held = {}
        for name, pairs in held_out_pairs(run).items():
            if name not in names:
                continue
            suspects: list[TokenizedPair] = []
            with self._reporter.bar(f"evaluating {name}", len(pairs), "pairs") as advance:

                def progress(done: int, advance: Callable[[int], None] = advance) -> None:
                    advance(done)
                    if self.run.ranks.size == 1:
                        self._stop.check()

                held[name] = evaluate(
                    run.scorer, pairs, run.method.loss, batch_size=run.config.batch_size, nll=run.config.nll,
                    reference=run.reference, untrained=step == 0, progress=progress, suspects=suspects.extend,
                    ranks=run.ranks,
                )  # fmt: skip
            self._metrics.write(step, name, held[name])
            self._reporter.figures(eval_line(step, name, held[name]))
            if suspects:
                places = ", ".join(pair.place for pair in suspects[:4])
                self._reporter.say(f"Warning: not finite at step {step} on {len(suspects)} {name} pairs: {places}.")
        return held

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
        progress.seconds += max(time.perf_counter() - started, 0.0)
        progress.step += 1
        if means is not None:
            progress.means.merge(means)
            progress.pair_tokens += sum(pair.pair_tokens for pair in window)
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
        """Report, save and evaluate, as the settings say for this step."""
        config, progress = self.run.config, self.progress
        step, last = progress.step, progress.step == self.total
        evaluates = last or step % config.steps_per_eval == 0
        if progress.reported < step and (last or step % config.steps_per_report == 0):
            self._report()
        every = config.report_every
        if every is not None and step % every == 0 and not last and self.run.ranks.first:
            refresh_report(self.run.folder)
        if (last or step % config.save_every == 0 or (config.save_best and evaluates)) and self._saved_step != step:
            self._save()
            self._keep_reference()
        self._end_if_asked()
        if not evaluates:
            return {}
        held = self.evaluate(("valid", "test") if last else ("valid",))
        if config.save_best:
            self._compare(held["valid"]["loss"])
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
        progress.start_report()

    def _save(self) -> None:
        self._saved_step = save(self.run, self.progress, self._metrics.mark(), self._randoms).step

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
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
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
                problem = f"step {step} cannot be saved: {' '.join(str(second).split()).rstrip('.')}; "
        if self._saved_step is None:
            return f"{problem}nothing was saved"
        return (
            f"{problem}step {self._saved_step} is saved, go on with "
            f"python -m orpo_mlx.train --resume --adapter-path {self.run.config.adapter_path}"
        )
