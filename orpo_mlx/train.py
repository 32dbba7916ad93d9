"""A training run from settings to adapters, and its command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console

from orpo_mlx.allocator import settle
from orpo_mlx.checkpoint import Checkpoint, remove_all, save_json, write_text
from orpo_mlx.cli import exit_status
from orpo_mlx.config import TrainingConfig, resolve
from orpo_mlx.distributed import Ranks, find_ranks
from orpo_mlx.errors import TrainingError, UserError, printable
from orpo_mlx.live import GOING_ON, PREPARING, Feed
from orpo_mlx.live_server import serving
from orpo_mlx.lock import locked
from orpo_mlx.loop import Loop
from orpo_mlx.lora import adapter_weights
from orpo_mlx.memory_plan import plan_memory
from orpo_mlx.model_card import FILE as CARD
from orpo_mlx.model_card import write_card
from orpo_mlx.order import groups_to_come, steps_of_adapter_file, total_steps
from orpo_mlx.prepare import Run, adapter_config, prepare, run_record
from orpo_mlx.progress import Held, Progress
from orpo_mlx.push import check_ready, push
from orpo_mlx.reference_table import ReferenceTable
from orpo_mlx.report import refresh_report
from orpo_mlx.reporting import MetricsFile, Reporter
from orpo_mlx.resume import (
    BEST,
    CHECKPOINTS,
    State,
    accept,
    copied_to_all,
    facts,
    find_checkpoint,
    newest,
    random_state,
    random_state_of,
    read_state,
    restore,
    restore_reference,
    set_random_state,
    settings_of_newest,
)
from orpo_mlx.samples import Reply, pick_prompts, sample_replies
from orpo_mlx.signals import StopSignals
from orpo_mlx.types import Pair

PROG = "python -m orpo_mlx.train"

_SAMPLED_FROM = 1000


def train(config: TrainingConfig, reporter: Reporter | None = None, ranks: Ranks | None = None) -> Held:
    """Train adapters with one method and write them, checkpoints, `metrics.jsonl` and `run.json` into
    `config.adapter_path`; with `config.resume`, go on from the newest whole checkpoint there.

    Where `mlx.launch` has started several processes (`ranks`), they train as one, and rank 0 writes and speaks.

    Returns:
        The held-out metrics after training, by split.

    Raises:
        UserError: settings, data or model cannot be used, or the run cannot go on.
        Interrupted: SIGINT or SIGTERM came; what was done is saved.
    """
    reporter = reporter or Reporter()
    if config.push_to_hub is not None:
        check_ready(config.push_to_hub, "--push-to-hub")
    settle()
    ranks = ranks or find_ranks(config.rank_timeout)
    ranks.timeout_s = config.rank_timeout
    with ExitStack() as stack:
        if not ranks.first:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="orpo_mlx-"))
            config = dataclasses.replace(config, adapter_path=scratch)
            reporter = Reporter(Console(quiet=True))

        def hold(folder: Path) -> None:
            stack.enter_context(locked(folder))
            if not (config.resume or config.overwrite):
                _refuse_unfinished(folder, config)

        page = stack.enter_context(watched(config, reporter)) if ranks.first else None
        return _train(prepare(config, hold, ranks), reporter, page)


def _checkpoint_and_state(run: Run, reporter: Reporter) -> tuple[Checkpoint, State] | tuple[None, None]:
    """What the run goes on from, once everything has been found to fit, and said."""
    run.ranks.require_same(facts(run))
    checkpoint, problems = find_checkpoint(run.folder) if run.config.resume else (None, [])
    checkpoint = copied_to_all(run, checkpoint)
    state, changes = None, []
    if checkpoint is None:
        # Once, since this run may write over the file it goes on from.
        run.first_step = steps_of_adapter_file(run)
    else:
        state = read_state(checkpoint)
        changes = accept(run, state)
        run.first_step = state.first_step
    plan_memory(run, reporter.say)
    _announce(run, reporter, checkpoint)
    for note in (*problems, *(f"Changed since the checkpoint: {change}." for change in changes)):
        reporter.say(note)
    return (None, None) if checkpoint is None or state is None else (checkpoint, state)


def _train(run: Run, reporter: Reporter, page: Feed | None) -> Held:
    config = run.config
    checkpoint, state = _checkpoint_and_state(run, reporter)
    # The prediction draws random numbers; the run's own, of dropout, must not depend on it.
    mx.random.seed(config.seed)
    set_random_state(random_state_of(run.ranks.rank, [random_state()]))
    if state is None:
        progress = Progress()
        remove_all(run.folder / CHECKPOINTS)
        (run.folder / BEST).unlink(missing_ok=True)
    else:
        progress = state.progress
        progress.resumed_at.append(progress.step)
    metrics_file = MetricsFile(run.folder / "metrics.jsonl", None if state is None else state.metrics)
    save_json(run.folder / "run.json", {**run_record(run), **_course(run, progress)})
    save_json(run.folder / "adapter_config.json", adapter_config(run))
    if page is not None:
        page.state = GOING_ON
    try:
        with StopSignals() as stop:
            if checkpoint is not None:
                restore_reference(run, checkpoint)
            _precompute_reference(run, reporter, stop)
            if checkpoint is not None and state is not None:
                for note in restore(run, checkpoint, state):
                    reporter.say(note)
            loop = Loop(
                run, progress, reporter, metrics_file, stop,
                saved_step=None if checkpoint is None else checkpoint.step,
                keep_reference=lambda: _save_reference(run, reporter, sparingly=True),
            )  # fmt: skip
            prompts = _sample_prompts(run, reporter)
            if checkpoint is None:
                progress.replies_before = _replies(run, prompts)
                progress.before = loop.evaluate(("valid", "test"))
            after = loop.steps()
        try:
            if progress.before and progress.before.keys() == after.keys():
                reporter.closing_table(progress.before, after)
            if len(progress.replies_before) == len(prompts):
                reporter.replies(progress.replies_before, _replies(run, prompts))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the run was done, and is saved in {run.folder}") from None
    finally:
        metrics_file.close()
        _save_reference(run, reporter)
    if config.report and run.ranks.first:
        refresh_report(run.folder)
    _close(run, progress, reporter)
    if run.ranks.first:
        _publish(run, progress.before, after, reporter)
    return after


@contextmanager
def watched(config: TrainingConfig, reporter: Reporter) -> Iterator[Feed | None]:
    """Serve the page of `--watch`, where that was asked for.

    Raises:
        ConfigError: the port cannot be had.
    """
    if config.watch is None:
        yield None
        return
    feed = Feed(Path(config.adapter_path).expanduser(), lambda: list(reporter.said), PREPARING)
    with serving(feed, config.watch, "--watch") as server:
        reporter.say(f"The run can be watched at {server.address}, on this machine.")
        try:
            yield feed
        except (UserError, KeyboardInterrupt) as error:
            reporter.said.append(str(error))
            raise


def _course(run: Run, progress: Progress) -> dict[str, Any]:
    """What `run.json` says of the steps: how many there will be, and where the run was taken up again."""
    return {"total_steps": total_steps(run.config, len(run.splits["train"].pairs)), "resumed_at": progress.resumed_at}


def _close(run: Run, progress: Progress, reporter: Reporter) -> None:
    if progress.skipped:
        reporter.say(f"{progress.skipped} steps were passed over, because a number in them was not finite.")
    if progress.best is not None:
        step, loss = progress.best
        reporter.say(f"The lowest validation loss, {loss:.4f}, was at step {step}: {run.folder / BEST}/.")
    reporter.say(f"\nAdapters, metrics and settings are in {run.folder}/.")


def _publish(run: Run, before: Held, after: Held, reporter: Reporter) -> None:
    """Write the model card, and send everything to the Hub where that was asked for."""
    if not write_card(run.folder, before, after):
        reporter.say(f"{run.folder / CARD} was changed by hand and stays as it is; move it away to have a new one.")
    if run.config.push_to_hub is not None:
        reporter.say(f"Pushed to {push(run.folder, run.config.push_to_hub)}")


def _refuse_unfinished(folder: Path, config: TrainingConfig) -> None:
    """Keep a new run from writing over one that has not come to its end.

    Raises:
        TrainingError: the folder holds such a run.
    """
    checkpoint, _ = newest(folder)
    if checkpoint is None:
        return
    state = read_state(checkpoint)
    if not state.finished:
        raise TrainingError(
            f"--adapter-path {folder}: holds a run that ended at step {checkpoint.step} of {state.total}; "
            "--resume goes on with it, --overwrite starts anew, or give another folder"
        )


def _announce(run: Run, reporter: Reporter, checkpoint: Checkpoint | None) -> None:
    if run.loaded.note:
        reporter.say(run.loaded.note)
    for name, split in run.splits.items():
        report = split.report
        reporter.say(f"{name}: {len(split.pairs)} pairs from {split.source.name} ({report.shape}){report.summary()}")
    lines = [line for split in run.splits.values() for line in split.report.left_out]
    listing = run.folder / "left_out.txt"
    listing.unlink(missing_ok=True)
    if lines:
        write_text(listing, "\n".join(map(printable, lines)) + "\n")
        reporter.say(f"The rows left out are listed in {listing}.")
    if "valid" not in run.splits:
        reporter.say("No valid split: training without validation.")
    for note in run.memory.notes:
        reporter.say(note)
    if run.reference is not None:
        _pass_on_notes(run.reference.table, reporter)
        if len(run.reference.table):
            reporter.say(f"Reference log-probs of {len(run.reference.table)} pairs are known from earlier runs.")
    if run.first_step and checkpoint is None:
        reporter.say(f"Goes on in the data where {run.config.resume_adapter_file} ended, after step {run.first_step}.")
    if checkpoint is not None:
        reporter.say(f"Goes on from step {checkpoint.step}: {checkpoint.folder}.")
    elif run.config.resume:
        reporter.say(f"{run.folder}/ holds no checkpoint yet: the run starts from the beginning.")
    elif (run.folder / "adapters.safetensors").exists():
        reporter.say(f"{run.folder}/ holds an earlier run, which this one overwrites.")
    shown = ((name, key, value) for name, table in run.method.parameters.items() for key, value in table.items())
    several = len(run.method.parameters) > 1
    parameters = ", ".join(f"{name + ' ' if several else ''}{key} {value:g}" for name, key, value in shown)
    trainable = sum(array.size for array in adapter_weights(run.loaded.model).values())
    reporter.say(
        f"Training {trainable:,} parameters with {run.config.method} ({parameters or 'no parameters'}), "
        f"--memory {run.memory.mode}."
    )


def _precompute_reference(run: Run, reporter: Reporter, stop: StopSignals) -> None:
    """Reference log-probs of all pairs to come, where the settings or the kind of reference ask for that.

    Raises:
        TrainingError: a resumed run needs some that are not in its checkpoint and can no longer be computed.
    """
    reference = run.reference
    if reference is None or not (run.config.precompute_reference or reference.needs_precomputing):
        return
    if reference.needs_precomputing:
        reporter.say("Computing reference log-probs first: the weights that define them are about to change.")
    groups = groups_to_come(run)
    unknown = reference.unknown(groups)
    if unknown and reference.needs_precomputing and run.config.resume and run.config.resume_adapter_file:
        raise TrainingError(
            f"--resume: the reference log-probs of {unknown} pairs are not in the checkpoint, and the adapters that "
            "define them are no longer those the run began with; start a new run with --resume-adapter-file"
        )
    with reporter.bar("reference log-probs", sum(map(len, groups)), "pairs") as advance:

        def progress(done: int) -> None:
            advance(done)
            if run.ranks.size == 1:
                stop.check()

        reference.remember_among(run.ranks, groups, progress)
    _save_reference(run, reporter)


def _save_reference(run: Run, reporter: Reporter, *, sparingly: bool = False) -> None:
    if run.reference is not None:
        run.reference.table.save(sparingly=sparingly)
        _pass_on_notes(run.reference.table, reporter)


def _pass_on_notes(table: ReferenceTable, reporter: Reporter) -> None:
    for note in table.notes:
        reporter.say(note)
    table.notes.clear()


def _sample_prompts(run: Run, reporter: Reporter) -> list[Pair]:
    """Pairs whose prompts are answered before and after training: of the first of test, valid, train that is text."""
    if run.config.samples == 0 or not run.ranks.first:
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
    return exit_status(PROG, lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> None:
    ranks = find_ranks(TrainingConfig.rank_timeout)

    def earlier(folder: str) -> dict[str, Any]:
        settings = settings_of_newest(folder) if ranks.first else {}
        taken: dict[str, Any] = json.loads(ranks.from_first(json.dumps(settings).encode()))
        return taken

    train(resolve(argv, PROG, earlier), ranks=ranks)


if __name__ == "__main__":
    sys.exit(main())
