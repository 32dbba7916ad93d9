"""The training loop, one for every method, and its command line."""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from orpo_mlx.allocator import settle
from orpo_mlx.batching import TrainingOrder, length_order, micro_batches, side_lengths, steps_per_epoch
from orpo_mlx.checkpoint import save_adapters, save_json, write_text
from orpo_mlx.cli import exit_status
from orpo_mlx.config import TrainingConfig, resolve
from orpo_mlx.errors import TrainingError
from orpo_mlx.evaluation import evaluate
from orpo_mlx.lora import adapter_metadata, adapter_weights
from orpo_mlx.memory_plan import plan_memory
from orpo_mlx.metrics import MetricMeans
from orpo_mlx.prepare import Run, adapter_config, prepare, run_record
from orpo_mlx.reference_table import ReferenceTable
from orpo_mlx.report import refresh_report
from orpo_mlx.reporting import MetricsFile, Reporter, eval_line, step_numbers, train_line
from orpo_mlx.samples import Reply, pick_prompts, sample_replies
from orpo_mlx.splits import Split
from orpo_mlx.step import optimiser_step
from orpo_mlx.types import Pair, TokenizedPair

PROG = "python -m orpo_mlx.train"

_SAMPLED_FROM = 1000
_ORDER_KEY, _STEP_KEY = "orpo_mlx_order", "orpo_mlx_step"

Held = dict[str, dict[str, float]]
"""Metrics by split."""


def train(config: TrainingConfig, reporter: Reporter | None = None) -> Held:
    """Train adapters with one method and write them, `metrics.jsonl` and `run.json` into `config.adapter_path`.

    Returns:
        The held-out metrics after training, by split.

    Raises:
        UserError: settings, data or model cannot be used, or the run cannot go on.
    """
    reporter = reporter or Reporter()
    settle()
    run = prepare(config)
    # Once, since this run may write over the file it goes on from.
    run.first_step = _first_step(run)
    plan_memory(run, reporter.say)
    _announce(run, reporter)
    # The prediction draws random numbers; the run's own, of dropout, must not depend on it.
    mx.random.seed(config.seed)
    save_json(run.folder / "run.json", run_record(run))
    save_json(run.folder / "adapter_config.json", adapter_config(run))
    metrics_file = MetricsFile(run.folder / "metrics.jsonl")
    try:
        prompts = _sample_prompts(run, reporter)
        _precompute_reference(run, reporter)
        replies_before = _replies(run, prompts)
        before = _evaluate_splits(run, reporter, metrics_file, 0, tuple(run.splits))
        after = _steps(run, reporter, metrics_file)
        if before:
            reporter.closing_table(before, after)
        reporter.replies(replies_before, _replies(run, prompts))
    finally:
        metrics_file.close()
        _save_reference(run, reporter)
    if config.report:
        refresh_report(run.folder)
    reporter.say(f"\nAdapters, metrics and settings are in {run.folder}/.")
    return after


def total_steps(config: TrainingConfig, num_pairs: int) -> int:
    """Optimiser steps of a run: `iters`, or `epochs` (default 1) passes over the train split."""
    if config.iters is not None:
        return config.iters
    per_epoch = steps_per_epoch(num_pairs, config.batch_size * config.grad_accumulation_steps)
    return max(1, math.ceil((config.epochs or 1) * per_epoch))


def _steps(run: Run, reporter: Reporter, metrics_file: MetricsFile) -> Held:
    """All optimiser steps with their reports, evaluations and saves; the last evaluation's metrics."""
    config, model = run.config, run.loaded.model
    pairs = run.splits["train"].pairs
    total = total_steps(config, len(pairs))
    order = _training_order(run)
    means, pair_tokens, seconds = MetricMeans(), 0, 0.0
    held: Held = {}
    mx.reset_peak_memory()
    model.train()
    with reporter.bar("training", total, "steps") as advance:
        for step, indices in enumerate(itertools.islice(order, total), 1):
            window = [pairs[index] for index in indices]
            started = time.perf_counter()
            with _saved_if_it_ends_here(run, step):
                step_means = optimiser_step(run, window, step)
            seconds += time.perf_counter() - started
            means.merge(step_means)
            pair_tokens += sum(pair.pair_tokens for pair in window)
            advance(step, step_numbers(step_means.means(), pair_tokens / seconds, mx.get_peak_memory() / 2**30))
            if step % config.steps_per_report == 0 or step == total:
                report = {
                    **means.means(),
                    "pair_tokens_per_s": pair_tokens / seconds,
                    "peak_memory_gib": mx.get_peak_memory() / 2**30,
                    "learning_rate": float(run.optimizer.learning_rate),
                }
                metrics_file.write(step, "train", report)
                reporter.say(train_line(step, total, report))
                means, pair_tokens, seconds = MetricMeans(), 0, 0.0
            if config.report_every is not None and step % config.report_every == 0 and step != total:
                refresh_report(run.folder)
            if step % config.save_every == 0 or step == total:
                _save(run, step, numbered=step != total)
                _save_reference(run, reporter, sparingly=True)
            if step == total:
                held = _evaluate_splits(run, reporter, metrics_file, step, tuple(run.splits))
            elif step % config.steps_per_eval == 0:
                _evaluate_splits(run, reporter, metrics_file, step, ("valid",))
    return held


def _announce(run: Run, reporter: Reporter) -> None:
    if run.loaded.note:
        reporter.say(run.loaded.note)
    for name, split in run.splits.items():
        report = split.report
        reporter.say(f"{name}: {len(split.pairs)} pairs from {split.source.name} ({report.shape}){report.summary()}")
    lines = [line for split in run.splits.values() for line in split.report.left_out]
    listing = run.folder / "left_out.txt"
    listing.unlink(missing_ok=True)
    if lines:
        write_text(listing, "\n".join(lines) + "\n")
        reporter.say(f"The rows left out are listed in {listing}.")
    if "valid" not in run.splits:
        reporter.say("No valid split: training without validation.")
    for note in run.memory.notes:
        reporter.say(note)
    if run.reference is not None:
        _pass_on_notes(run.reference.table, reporter)
        if len(run.reference.table):
            reporter.say(f"Reference log-probs of {len(run.reference.table)} pairs are known from earlier runs.")
    if run.first_step:
        reporter.say(f"Goes on in the data where {run.config.resume_adapter_file} ended, after step {run.first_step}.")
    if (run.folder / "adapters.safetensors").exists():
        reporter.say(f"{run.folder}/ holds an earlier run, which this one overwrites.")
    shown = ((name, key, value) for name, table in run.method.parameters.items() for key, value in table.items())
    several = len(run.method.parameters) > 1
    parameters = ", ".join(f"{name + ' ' if several else ''}{key} {value:g}" for name, key, value in shown)
    trainable = sum(array.size for array in adapter_weights(run.loaded.model).values())
    reporter.say(
        f"Training {trainable:,} parameters with {run.config.method} ({parameters or 'no parameters'}), "
        f"--memory {run.memory.mode}."
    )


def _evaluate_splits(run: Run, reporter: Reporter, metrics_file: MetricsFile, step: int, names: Sequence[str]) -> Held:
    """Evaluate the held-out splits among `names`."""
    limits = _held_out_batches(run)
    held: Held = {}
    for name in (name for name in names if name in limits):
        pairs = _held_out(run.splits[name], limits[name], run.config.batch_size)
        with reporter.bar(f"evaluating {name}", len(pairs), "pairs") as advance:
            held[name] = evaluate(
                run.scorer, pairs, run.method.loss, batch_size=run.config.batch_size, nll=run.config.nll,
                reference=run.reference, untrained=step == 0, progress=advance,
            )  # fmt: skip
        metrics_file.write(step, name, held[name])
        reporter.say(eval_line(step, name, held[name]))
    return held


def _held_out(split: Split, batches: int, batch_size: int) -> Sequence[TokenizedPair]:
    return split.pairs if batches == -1 else split.pairs[: batches * batch_size]


@contextmanager
def _saved_if_it_ends_here(run: Run, step: int) -> Iterator[None]:
    """Save the adapters as the steps before left them when this step is interrupted or fails."""
    before = adapter_weights(run.loaded.model)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if step == 1:
            raise
        run.loaded.model.load_weights(list(before.items()), strict=False)
        _save(run, step - 1, numbered=False)
        folder = run.folder
        saved = f"the adapters of step {step - 1} are in {folder}/, --resume-adapter-file {folder} trains on from them"
        if isinstance(error, (KeyboardInterrupt, TrainingError)):
            error.args = (f"{error}; {saved}" if str(error) else saved,)
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TrainingError(f"step {step}: {reason.rstrip('.')}; {saved}.") from error


def _save(run: Run, done: int, *, numbered: bool) -> None:
    """Save the adapters after `done` steps of this run, with their place in the data."""
    place = {_ORDER_KEY: _order_digest(run), _STEP_KEY: str(run.first_step + done)}
    try:
        weights = adapter_weights(run.loaded.model)
        save_adapters(run.folder, weights, step=done if numbered else None, metadata=place)
    except OSError as error:
        raise TrainingError(
            f"{run.folder}: the adapters cannot be saved ({error.strerror}); the last save there is whole."
        ) from None


def _training_order(run: Run) -> TrainingOrder:
    """The windows of this run: from the first, or from where the adapters it goes on from have come to."""
    config = run.config
    size = config.batch_size * config.grad_accumulation_steps
    pairs = run.splits["train"].pairs
    return TrainingOrder(pairs, size, seed=config.seed, shuffle=config.shuffle, step=run.first_step)


def _first_step(run: Run) -> int:
    """Steps that `--resume-adapter-file` has taken in this very order, 0 where it was another."""
    if run.config.resume_adapter_file is None:
        return 0
    metadata = adapter_metadata(run.config.resume_adapter_file)
    return int(metadata[_STEP_KEY]) if metadata.get(_ORDER_KEY) == _order_digest(run) else 0


def _order_digest(run: Run) -> str:
    """What the order of windows depends on: the pairs, their number in a step, the seed."""
    config = run.config
    lengths = side_lengths(run.splits["train"].pairs).tobytes()
    size = config.batch_size * config.grad_accumulation_steps
    parts = (run.splits["train"].sha256, hashlib.sha256(lengths).hexdigest(), size, config.seed, config.shuffle)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _precompute_reference(run: Run, reporter: Reporter) -> None:
    """Reference log-probs of all pairs to come, where the settings or the kind of reference ask for that."""
    reference = run.reference
    if reference is None or not (run.config.precompute_reference or reference.needs_precomputing):
        return
    if reference.needs_precomputing:
        reporter.say("Computing reference log-probs first: the weights that define them are about to change.")
    groups = _groups_to_come(run)
    with reporter.bar("reference log-probs", sum(map(len, groups)), "pairs") as advance:
        reference.remember(groups, advance)
    _save_reference(run, reporter)


def _save_reference(run: Run, reporter: Reporter, *, sparingly: bool = False) -> None:
    if run.reference is not None:
        run.reference.table.save(sparingly=sparingly)
        _pass_on_notes(run.reference.table, reporter)


def _pass_on_notes(table: ReferenceTable, reporter: Reporter) -> None:
    for note in table.notes:
        reporter.say(note)
    table.notes.clear()


def _groups_to_come(run: Run) -> list[list[TokenizedPair]]:
    """Every pair this run will meet, grouped as the first epoch and the evaluations will group them."""
    config, pairs = run.config, run.splits["train"].pairs
    order = _training_order(run)
    per_epoch = steps_per_epoch(len(pairs), config.batch_size * config.grad_accumulation_steps)
    # From the middle of an epoch, its rest and one whole epoch meet every pair.
    most = min(total_steps(config, len(pairs)), per_epoch + -order.step % per_epoch)
    groups: list[list[TokenizedPair]] = []
    for indices in itertools.islice(order, most):
        groups += micro_batches([pairs[index] for index in indices], config.batch_size, config.micro_batch_tokens)
    for name, batches in _held_out_batches(run).items():
        held_out = _held_out(run.splits[name], batches, config.batch_size)
        groups += [[held_out[index] for index in indices] for indices in length_order(held_out, config.batch_size)]
    return groups


def _held_out_batches(run: Run) -> dict[str, int]:
    """Batches of each held-out split that is evaluated; -1 means all."""
    limits = {"valid": run.config.val_batches, "test": run.config.test_batches}
    return {name: limit for name, limit in limits.items() if limit != 0 and name in run.splits}


def _sample_prompts(run: Run, reporter: Reporter) -> list[Pair]:
    """Pairs whose prompts are answered before and after training: of the first of test, valid, train that is text."""
    if run.config.samples == 0:
        return []
    split = next(run.splits[name] for name in ("test", "valid", "train") if name in run.splits)
    pairs = list(itertools.islice(split.raw(), _SAMPLED_FROM))
    if not pairs:
        reporter.say("The rows are token ids: no sample replies.")
    return pick_prompts(pairs, run.config.samples)


def _replies(run: Run, prompts: Sequence[Pair]) -> list[Reply]:
    return sample_replies(run.loaded.model, run.loaded.tokenizer, prompts) if prompts else []


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: train(resolve(argv, PROG)))


if __name__ == "__main__":
    sys.exit(main())
