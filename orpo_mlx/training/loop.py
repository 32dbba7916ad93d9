"""The training loop, one for every method: steps, and what falls due after each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from orpo_mlx.config.defaults import DEFAULT_MAX_SKIPPED
from orpo_mlx.errors import HalfAppliedError, NonFiniteError, TrainingError, reason_of
from orpo_mlx.interrupts import Interrupted
from orpo_mlx.losses.metrics import MetricMeans
from orpo_mlx.models.adapters import adapters_off
from orpo_mlx.process_memory import peak_gib
from orpo_mlx.reporting.console import step_numbers, train_line
from orpo_mlx.reporting.resumable_jsonl import LineFile, Marks
from orpo_mlx.reporting.run_report import refresh_report
from orpo_mlx.run_folder import CHECKPOINTS
from orpo_mlx.training.checkpoints.beginning import record_beginning
from orpo_mlx.training.checkpoints.progress import Best, EvalMetrics, Progress
from orpo_mlx.training.checkpoints.random_numbers import random_numbers_kept, random_state, set_random_state
from orpo_mlx.training.checkpoints.save import after_save, how_to_go_on, is_gone, mark_best, save
from orpo_mlx.training.data_order import total_steps, training_order
from orpo_mlx.training.evaluating.evaluation import evaluate_splits
from orpo_mlx.training.evaluating.judged import judged_line
from orpo_mlx.training.interrupts import StopSignals, reason_to_end
from orpo_mlx.training.references.reference_pass import save_reference
from orpo_mlx.training.run import Run
from orpo_mlx.training.sinks import Sinks
from orpo_mlx.training.steps.step import optimiser_step
from orpo_mlx.types import Example


class Loop:
    """A run in motion.

    Args:
        run: what is trained.
        progress: how far it has come.
        sinks: where its output goes.
        stop: how it is asked to end.
        saved_step: the step of the checkpoint it was resumed from; None for a new run.
    """

    def __init__(
        self, run: Run, progress: Progress, sinks: Sinks, stop: StopSignals, saved_step: int | None = None
    ) -> None:
        self.run = run
        self.progress = progress
        self.sinks = sinks
        total = total_steps(run.config, len(run.splits["train"].pairs))
        # A run that ended by itself stays ended: resumed, it only does again what was due after its last step.
        self.total = progress.step if progress.out_of_patience else total
        self.peak_memory_gib = 0.0
        """MLX's peak since the first step."""
        self._stop = stop
        self._saved_step = saved_step
        self._saved_best = progress.best
        """As the newest checkpoint knows it."""
        self._saved_at = time.monotonic()
        self._save_is_due = False
        """By the clock, as rank 0 has it; as of the last agreement."""
        self._unsaved_step: int | None = None
        """The last step that could not be saved."""
        self._marks: Marks | None = None
        # Of all ranks, as of their last agreement: the signal of the first that was asked to end, and random states.
        self._signal: int | None = None
        self._random_states = [random_state()]

    @property
    def _base_is_kept(self) -> bool:
        """Whether the model as it was before training is there at any time, by taking the adapters off."""
        config = self.run.config
        return config.fine_tune_type != "full" and config.resume_adapter_file is None

    def record_baseline(self) -> None:
        """Record what must be known, or is quickly known, of the model before the first step: metrics of the valid
        split, and sample replies and metrics of the test split where `record_rest_of_baseline` could not have them.

        Raises:
            Interrupted, TrainingError: the run ends before it has begun.
        """
        later = self._base_is_kept
        # A file of samples begins with those before training. Elsewhere they can wait, as long as the base is kept.
        if not later or self.sinks.sampler.file is not None:
            with random_numbers_kept():
                self.progress.replies_before = self.sinks.sampler(0)
        try:
            self.progress.before = self.evaluate(("valid",) if later else ("valid", "test"))
        except TrainingError as error:
            raise TrainingError(f"{error}; nothing was saved") from error.__cause__

    def record_rest_of_baseline(self) -> None:
        """Record the test split's metrics before training, after it: the first step need not wait for them."""
        progress = self.progress
        if self._base_is_kept and progress.before.get("test") is None:
            reference = self.run.reference
            if reference is not None:
                reference.forget_if_moved()
            with adapters_off(self.run.loaded.model):
                # A new table: marks hold the one that was known to them.
                progress.before = progress.before | self.evaluate(("test",), step=0)
            if reference is not None:
                reference.forget_if_moved()

    def take_steps(self) -> EvalMetrics:
        """Take all steps that are left; the last evaluation's metrics.

        Raises:
            Interrupted, KeyboardInterrupt, TrainingError: the run ends early; says what was saved and how to go on.
        """
        mx.reset_peak_memory()
        self.run.loaded.model.train()
        with self.sinks.reporter.bar("training", self.total, "steps") as advance, self._saved_if_it_ends():
            pairs = self.run.splits["train"].pairs
            progress = self.progress
            # Before anything can be saved: a checkpoint has all ranks' random states as of the last agreement.
            self._agree()
            advance(progress.step)
            # A resumed run does again what was due after the step of its checkpoint.
            metrics = self.after_step() if progress.step else {}
            step_batches = iter(training_order(self.run, progress.step))
            while progress.step < self.total:
                self._end_if_asked()
                means = self.step([pairs[index] for index in next(step_batches)])
                self._agree()
                if means is not None:
                    advance(progress.step, step_numbers(means.means(), progress.tokens_per_s, peak_gib()))
                metrics = self.after_step()
            self.peak_memory_gib = peak_gib()
            self._require_folder()
        return metrics

    def step(self, step_batch: Sequence[Example]) -> MetricMeans | None:
        """One step and its part of the report; None where it was skipped."""
        progress = self.progress
        before = random_state()
        started = time.perf_counter()
        try:
            means: MetricMeans | None = optimiser_step(self.run, step_batch, progress.step + 1)
        except NonFiniteError as error:
            # Skipped, the step is over all the same: its pairs and its random numbers are used up.
            means = None
            self.skip(error)
        except BaseException:
            # The step is as if it had never begun.
            set_random_state(before)
            raise
        # A clock that goes backwards costs a figure of speed, never a step.
        seconds = max(time.perf_counter() - started, 0.0)
        progress.seconds += seconds
        progress.training_seconds += seconds
        progress.step += 1
        # Also where the step was skipped: a reference that follows the policy goes by the step's number.
        if self.run.reference is not None:
            self.run.reference.after_step(progress.step)
        if means is not None:
            self._count(means, sum(pair.pair_tokens for pair in step_batch))
        return means

    def skip(self, error: NonFiniteError) -> None:
        """Count a step whose numbers were not finite, or raise TrainingError where that ends the run."""
        config = self.run.config
        if config.on_nonfinite != "skip":
            raise error
        skipped = self.progress.skipped
        most = DEFAULT_MAX_SKIPPED if config.max_skipped is None else config.max_skipped
        if skipped >= most:
            raise TrainingError(f"{error}; {skipped} steps were skipped before, `max_skipped` is {most}")
        self.progress.skipped += 1
        self.sinks.reporter.say(f"Skipped ({self.progress.skipped} of at most {most}): {error}.")

    def after_step(self) -> EvalMetrics:
        """Report, save, evaluate and sample, as the settings say for this step; the metrics of its evaluation."""
        # A checkpoint is written after a step's report and before its evaluation. What falls due after a step is
        # therefore done once more when a run is resumed from that step, and leaves the same lines.
        config, step = self.run.config, self.progress.step
        last = step == self.total
        evaluates = last or step % config.steps_per_eval == 0
        # Where the validation can end the run, nothing may be left to report after it.
        reports = last or step % config.steps_per_report == 0 or (evaluates and config.patience)
        if self.progress.reported < step and reports:
            self.report()
        # Taken before the evaluation writes: a run that goes on from here evaluates this step again.
        self._marks = self._mark()
        if self._is_due(config.report_every) and not last and self.run.ranks.first:
            refresh_report(self.run.folder)
        best_is_known = evaluates if config.best_by == "loss" else self._is_due(config.evaluate_every)
        due = last or self._save_is_due or step % config.save_every == 0 or (config.save_best and best_is_known)
        if due and self._saved_step != step:
            self.save()
            save_reference(self.run, self.sinks.reporter, sparingly=True)
        # Only now: what was due of this step is reported and saved, and an evaluation may take long.
        self._end_if_asked()
        if last:
            # What a person wants to see first; the evaluations that follow may take minutes.
            self.compare_replies()
            self.record_rest_of_baseline()
        metrics = self.evaluate(("valid", "test") if last else ("valid",)) if evaluates else {}
        if config.save_best and evaluates and config.best_by == "loss":
            self._note_best(Best(step, metrics["valid"]["loss"]))
        if evaluates and not last and (said := self.progress.validated(metrics.get("valid", {}), config)):
            self.sinks.reporter.say(f"Ended after step {step} of {self.total}: {said}.")
            # This is the last step now; what is due after that one and was not after this follows.
            self.total = step
            # Also where this step is saved already: only now does the state say that the run has ended by itself.
            self.save()
            self.compare_replies()
            self.record_rest_of_baseline()
            metrics |= self.evaluate(("test",))
        if self._is_due(config.evaluate_every):
            self.judge()
        if self._is_due(config.sample_every) and self.progress.step < self.total:
            self.sample()
        if step == self.total and self.progress.best != self._saved_best:
            # Known only now: a run that is made longer would not know it, and remove the checkpoint that it is.
            self.save()
        return metrics

    def report(self) -> None:
        """Report the means over the steps since the last report."""
        progress = self.progress
        metrics = {
            **progress.means.means(),
            "pair_tokens_per_s": progress.tokens_per_s,
            "peak_memory_gib": peak_gib(),
            "learning_rate": float(self.run.optimizer.learning_rate),
        }
        if self.run.config.on_nonfinite == "skip":
            metrics["skipped"] = progress.skipped
        self.sinks.metrics.write(progress.step, "train", metrics)
        if progress.means.pairs:
            self.sinks.reporter.figures(train_line(progress.step, self.total, metrics))
        steps = progress.step - progress.reported
        seconds = progress.seconds
        # Before the callbacks: one that raises must not have these steps reported twice.
        progress.start_report()
        self.sinks.callbacks.report_training(
            progress.step, metrics, steps=steps, seconds=seconds, trained_tokens=progress.trained_tokens
        )

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        # The marks of this step, where there are any, also where the run ends after its evaluation.
        marks = self._marks if self._marks is not None and self._marks.step == self.progress.step else self._mark()
        # Before the checkpoint: its marks must not promise lines that a power cut takes away.
        for file in self._files().values():
            file.sync()
        # Until it is saved: where that fails, the end of the run does not try the same step again.
        self._unsaved_step = self.progress.step
        gone = self._folder_is_gone()
        if gone:
            # Somebody has removed it, and a night's work with it unless it is made again.
            self.run.folder.mkdir(parents=True)
            record_beginning(self.run, self.progress)
        saved = dataclasses.replace(self.progress, before=marks.before)
        # After an error of the GPU nothing runs there any more, and the last whole step is still to be saved.
        with mx.stream(mx.cpu):
            checkpoint = save(self.run, saved, marks.files, self._random_states)
        # At once: whatever fails from here on, this step is there to go on from.
        self._saved_step, self._saved_best = checkpoint.step, self.progress.best
        self._unsaved_step = None
        self._saved_at = time.monotonic()
        after_save(self.run, self.progress, checkpoint)
        if gone:
            # The run's metrics and its lock went with the folder.
            raise TrainingError(f"{self.run.folder}: was removed while the run went on, and was made again")

    def evaluate(self, names: Sequence[str], step: int | None = None) -> EvalMetrics:
        """Evaluate the held-out splits among `names`, at the present step; 0 says that the model is the base."""
        step = self.progress.step if step is None else step
        return evaluate_splits(
            self.run,
            names,
            step=step,
            untrained=step == 0,
            reporter=self.sinks.reporter,
            metrics_file=self.sinks.metrics,
            stop=self._stop,
            told=self.sinks.callbacks.report_validation,
        )

    def sample(self) -> None:
        """Answer the sample prompts in the middle of the run."""
        with random_numbers_kept():
            replies = self.sinks.sampler(self.progress.step)
        self.sinks.reporter.samples(self.progress.step, replies)

    def judge(self) -> None:
        """Judge replies against the base's, and write that down beside the valid split's metrics."""
        if self.sinks.judged is None:
            return
        with random_numbers_kept():
            found = self.sinks.judged()
        step = self.progress.step
        self.sinks.metrics.write(step, "valid", found)
        self.sinks.reporter.figures(judged_line(step, found))
        self.sinks.callbacks.report_judged(step, found)
        if self.run.config.save_best and self.run.config.best_by == "win_rate":
            self._note_best(Best(step, None, found["win_rate"]))

    def compare_replies(self) -> None:
        """Show replies to the sample prompts, before training and after it."""
        progress, sampler = self.progress, self.sinks.sampler
        with random_numbers_kept():
            replies = sampler(progress.step)
            if self._base_is_kept and not progress.replies_before:
                with adapters_off(self.run.loaded.model):
                    progress.replies_before = sampler(0)
        # A resumed run may be given another number of `samples`: replies would stand beside other prompts'.
        if len(progress.replies_before) == len(sampler.prompts):
            self.sinks.reporter.replies(progress.replies_before, replies)

    def _count(self, means: MetricMeans, tokens: int) -> None:
        progress = self.progress
        progress.means.merge(means)
        progress.pair_tokens += tokens
        progress.trained_tokens += tokens
        # A method that looks at one side alone promises nothing of the other, which rows may not even have.
        for warning in () if self.run.method.one_sided else progress.watch.add(means.means()):
            self.sinks.reporter.say(f"Warning, step {progress.step}: {warning}")

    def _agree(self) -> None:
        """Learn between steps how far the ranks' random numbers are, and whether one of them was asked to end."""
        minutes = self.run.config.save_minutes
        due = minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes
        answers = self.run.ranks.gather([self._stop.number, *random_state(), due])
        self._signal = next((number for number, *_ in answers if number is not None), None)
        self._random_states = [(high, low) for _, high, low, _ in answers]
        self._save_is_due = answers[0][3]

    def _end_if_asked(self) -> None:
        if self._signal is not None:
            raise Interrupted(self._signal)

    def _files(self) -> dict[str, LineFile]:
        """The files that a resumed run continues, by their name in `state.json`."""
        samples = self.sinks.sampler.file
        return {"metrics": self.sinks.metrics, **({} if samples is None else {"samples": samples})}

    def _mark(self) -> Marks:
        files = {name: file.mark() for name, file in self._files().items()}
        return Marks(self.progress.step, files, self.progress.before)

    def _is_due(self, every: int | None) -> bool:
        """Whether what happens every so many steps, and after the last, happens after this one."""
        return every is not None and (self.progress.step == self.total or self.progress.step % every == 0)

    def _note_best(self, found: Best) -> None:
        """Remember this step if it is the best so far."""
        if found.is_finite and (self.progress.best is None or found.is_better_than(self.progress.best)):
            self.progress.best = found
            mark_best(self.run, self.progress.step)

    @contextmanager
    def _saved_if_it_ends(self) -> Iterator[None]:
        """Save the last whole step when the run is interrupted or fails, and say how to go on."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            how_to_go_on = self._save_at_the_end(error)
            if isinstance(error, KeyboardInterrupt):
                number = error.number if isinstance(error, Interrupted) else 2
                raise Interrupted(number, how_to_go_on) from None
            raise TrainingError(f"{reason_to_end(error, self.progress.step + 1)}; {how_to_go_on}") from error

    def _save_at_the_end(self, error: BaseException) -> str:
        """Save, if there is something to save, and say what there is to go on from."""
        problem = ""
        step = self.progress.step
        if self._saved_step is not None and is_gone(self.run, self._saved_step):
            self._saved_step = None
            problem = f"what was saved in {self.run.folder / CHECKPOINTS} is gone; "
        # A step that was applied by half is neither this one nor the next. What could not be saved just now, on a disk
        # that is full, is not tried twice, and not said twice.
        tried = self._unsaved_step == step or self._saved_step == step
        if step and not tried and not isinstance(error, HalfAppliedError):
            try:
                self.save()
                problem = ""
            # MLX's own as well: after an error of the GPU others follow.
            except (TrainingError, OSError, RuntimeError) as second:
                # Where it failed after the checkpoint, the step is saved all the same.
                failed = "" if self._saved_step == step else f"step {step} cannot be saved: "
                problem += f"{failed}{reason_of(second, None)}; "
        saved = None if self._saved_step is None else how_to_go_on(self.run, self._saved_step)
        return problem + (saved or f"nothing {'is' if problem else 'was'} saved")

    def _folder_is_gone(self) -> bool:
        """Whether somebody has removed the folder of the run."""
        return self.run.ranks.first and not self.run.folder.is_dir()

    def _require_folder(self) -> None:
        """Save once more, and raise TrainingError, where the folder is gone after the last save."""
        if self._folder_is_gone():
            self.save()
