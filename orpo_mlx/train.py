"""The story of a training run, from settings to adapters; also the program `python -m orpo_mlx.train`.

Read it from top to bottom: `train` calls the functions below it in their order. Each names what happens in it and
leaves the how to `training/` and `reporting/`.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Before the imports below, which take seconds: a mistyped flag or --help need not wait for them. The command line
    # is a floor above: nothing but this program needs it here.
    from orpo_mlx.cli.train import main

    sys.exit(main())

import dataclasses
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import mlx.core as mx
from rich.console import Console

from orpo_mlx.config.checks import checked_config
from orpo_mlx.config.derived import settings_for_card
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.errors import naming_device_errors
from orpo_mlx.folder_lock import locked
from orpo_mlx.interrupts import Interrupted, message_of
from orpo_mlx.memory.choose_mode import plan_memory
from orpo_mlx.memory.rehearse import rehearse
from orpo_mlx.process_memory import configure_allocator, peak_gib
from orpo_mlx.reporting.callbacks import NamedCallback, TrainingCallback, named_callbacks
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.reporting.hub import check_ready, push
from orpo_mlx.reporting.live.feed import GOING_ON, Feed
from orpo_mlx.reporting.live.server import watched
from orpo_mlx.reporting.model_card import write_card
from orpo_mlx.reporting.run_report import refresh_report
from orpo_mlx.reporting.services import parse_services, require_installed
from orpo_mlx.run_folder import BEST, CARD_FILE, CHECKPOINTS
from orpo_mlx.training.checkpoints.beginning import record_beginning
from orpo_mlx.training.checkpoints.folders import remove_all
from orpo_mlx.training.checkpoints.progress import Progress, TrainingResult
from orpo_mlx.training.checkpoints.random_numbers import random_state, random_state_of, set_random_state
from orpo_mlx.training.checkpoints.resume import (
    Resumed,
    accept,
    begin_again,
    facts,
    find_resumed,
    refuse_unfinished,
    restore,
    restore_reference,
)
from orpo_mlx.training.checkpoints.save import how_to_go_on
from orpo_mlx.training.data_order import steps_of_adapter_file
from orpo_mlx.training.distributed import Ranks, find_ranks
from orpo_mlx.training.evaluating.evaluate_only import evaluate_only
from orpo_mlx.training.interrupts import StopSignals
from orpo_mlx.training.keep_awake import kept_awake
from orpo_mlx.training.loop import Loop
from orpo_mlx.training.prepare import clear_for_training, find_data, load_run, make_output_folder
from orpo_mlx.training.references.reference_pass import precompute_reference, save_reference
from orpo_mlx.training.run import Run
from orpo_mlx.training.sinks import open_callbacks, open_sinks
from orpo_mlx.training.summaries import announce, say_goodbye


@naming_device_errors()
def train(
    config: TrainingConfig,
    reporter: Reporter | None = None,
    ranks: Ranks | None = None,
    *,
    callbacks: Sequence[TrainingCallback] = (),
) -> TrainingResult:
    """Train adapters with one method and write them, checkpoints, `metrics.jsonl` and `run.json` into
    `config.adapter_path`; with `config.resume`, go on from the newest whole checkpoint there. With
    `config.test`, nothing is trained and the adapters that are there are evaluated; with `config.dry_run`, it is said
    what the run would come to, and nothing is kept.

    Where `mlx.launch` has started several processes (`ranks`), they train as one, and rank 0 writes, speaks and calls
    `callbacks`, after the services of `config.report_to`. An exception in one of them ends the run, saved.

    Raises:
        UserError: settings, data or model cannot be used, or the run cannot go on; says what was saved.
        Interrupted: SIGINT or SIGTERM came, or a callback raised KeyboardInterrupt; what was done is saved.
    """
    config = checked_config(config)
    named = named_callbacks(callbacks)
    if config.push_to_hub is not None:
        check_ready(config.push_to_hub, "`push_to_hub`")
    reporter = reporter or Reporter()
    configure_allocator()
    ranks = ranks or find_ranks(config.rank_timeout)
    ranks.timeout_s = config.rank_timeout
    if ranks.first:
        require_installed(parse_services(config.report_to))
    if config.test:
        return evaluate_only(config, reporter, ranks)
    if config.dry_run:
        rehearse(config, reporter, ranks)
        return TrainingResult(Path(config.adapter_path), 0, 0, {}, {}, None, 0, 0.0, peak_gib())
    folder = Path(config.adapter_path).expanduser()
    with ExitStack() as stack:
        config, reporter = stack.enter_context(own_output(config, reporter, ranks))
        stack.enter_context(kept_awake(config.keep_awake, reporter.say))
        feed = stack.enter_context(watched(folder, config.watch if ranks.first else None, reporter))
        run = stack.enter_context(prepared(config, ranks, reporter))
        resumed = find_start(run, reporter)
        result = train_and_evaluate(run, resumed, reporter, named, feed)
        with saying_on_interrupt(f"the run was done, and is saved in {folder}"):
            finish(run, result, reporter)
    # All ranks name the folder that was asked for, which rank 0 has written.
    return dataclasses.replace(result, adapter_path=folder)


@contextmanager
def own_output(config: TrainingConfig, reporter: Reporter, ranks: Ranks) -> Iterator[tuple[TrainingConfig, Reporter]]:
    """Rank 0 writes and speaks for all; the others work in silence, into a folder that is gone at the end."""
    if ranks.first:
        yield config, reporter
        return
    with tempfile.TemporaryDirectory(prefix="orpo_mlx-") as scratch:
        yield dataclasses.replace(config, adapter_path=scratch), Reporter(Console(quiet=True))


@contextmanager
def prepared(config: TrainingConfig, ranks: Ranks, reporter: Reporter) -> Iterator[Run]:
    """Everything a run needs. While the block lasts, no other process trains into its folder."""
    sources = find_data(config, ranks)
    folder = make_output_folder(config.adapter_path)
    # Before anything large is read: whoever has to wait, or to choose another folder, learns it at once.
    with locked(folder):
        clear_for_training(folder)
        if not (config.resume or config.overwrite):
            refuse_unfinished(folder)
        config, begun = begin_again(asked := config, folder, ranks)
        if config.resume != asked.resume:
            reporter.say(f"{folder}/ holds no checkpoint yet: the run starts from the beginning.")
        run = load_run(config, sources, folder, ranks)
        for change in () if begun is None else accept(run, begun, "was begun there and never saved"):
            reporter.say(f"Changed since the run was begun: {change}.")
        yield run


def find_start(run: Run, reporter: Reporter) -> Resumed | None:
    """Find the checkpoint the run goes on from, choose how memory is spent, and say what is about to happen."""
    # First: ranks that differ would wait for each other in the exchanges that follow.
    run.ranks.require_same(facts(run))
    resumed = find_resumed(run)
    # Looked up once: this run may write over the adapter file it starts from.
    run.first_step = steps_of_adapter_file(run) if resumed is None else resumed.state.first_step
    # Before `announce`, which says what `memory=auto` has become.
    plan_memory(run, reporter.say)
    announce(run, reporter, resumed)
    # The prediction of memory draws random numbers; the run's own, of dropout, must not depend on it.
    mx.random.seed(run.config.seed)
    set_random_state(random_state_of(run.ranks.rank, [random_state()]))
    return resumed


def train_and_evaluate(
    run: Run, resumed: Resumed | None, reporter: Reporter, callbacks: Sequence[NamedCallback], feed: Feed
) -> TrainingResult:
    """Evaluate, train, evaluate, compare: everything between the first and the last line of `metrics.jsonl`."""
    with ExitStack() as stack:
        # However the run ends, the reference log-probs it has computed serve the next one.
        stack.callback(save_reference, run, reporter)
        # A service that cannot begin must say so before anything in the folder is replaced.
        all_callbacks = stack.enter_context(open_callbacks(run, reporter, callbacks, resumed))
        stack.enter_context(saying_on_interrupt("" if resumed is None else how_to_go_on(run, resumed.checkpoint.step)))
        # From here on a signal is remembered: what is replaced in the folder is replaced as a whole.
        with StopSignals() as stop:
            progress = begin_in_folder(run, resumed)
            sinks = stack.enter_context(open_sinks(run, reporter, all_callbacks, resumed))
            feed.state = GOING_ON
            if resumed is not None:
                for note in restore_reference(run, resumed):
                    reporter.say(note)
            # Under the weights as they were before training, so before `restore` puts the trained ones back.
            precompute_reference(run, reporter, stop)
            if resumed is not None:
                for note in restore(run, resumed):
                    reporter.say(note)
            loop = Loop(run, progress, sinks, stop, None if resumed is None else resumed.checkpoint.step)
            if resumed is None:
                loop.record_baseline()
            metrics = loop.take_steps()
        # One that came after the last agreement: whoever asked to stop wants no upload, and no next round.
        stop.check(f"the run was done, and is saved in {run.folder}")
        if progress.before and progress.before.keys() == metrics.keys():
            reporter.closing_table(progress.before, metrics)
    return TrainingResult(
        adapter_path=run.folder,
        steps=progress.step,
        skipped=progress.skipped,
        before=progress.before,
        after=metrics,
        best=progress.best,
        trained_tokens=progress.trained_tokens,
        training_seconds=progress.training_seconds,
        peak_memory_gib=loop.peak_memory_gib,
    )


def begin_in_folder(run: Run, resumed: Resumed | None) -> Progress:
    """How far the run has come, written down in its folder; a new run replaces what is there."""
    progress = Progress() if resumed is None else resumed.state.progress
    if resumed is not None:
        progress.resumed_at.append(progress.step)
    # Before the checkpoints of an earlier run go: killed in between, `--resume` finds those or this run, never nothing.
    record_beginning(run, progress)
    if resumed is None:
        remove_all(run.folder / CHECKPOINTS)
        (run.folder / BEST).unlink(missing_ok=True)
    # adapter_config.json comes with the first checkpoint: until then an earlier run's adapters are whole with theirs.
    return progress


@contextmanager
def saying_on_interrupt(message: str) -> Iterator[None]:
    """Let an interrupt of the block, where nothing says anything yet, say what is saved."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if message_of(interrupt) or not message:
            raise
        raise Interrupted(getattr(interrupt, "number", signal.SIGINT), message) from None


def finish(run: Run, result: TrainingResult, reporter: Reporter) -> None:
    """Write the report and the model card, and send everything to the Hub where that was asked for."""
    if run.config.report and run.ranks.first:
        refresh_report(run.folder)
    say_goodbye(run, result, reporter)
    if not run.ranks.first:
        return
    if not write_card(run.folder, result.before, result.after, settings_for_card):
        reporter.say(
            f"{run.folder / CARD_FILE} was changed by hand and stays as it is; move it away to have a new one."
        )
    if run.config.push_to_hub is not None:
        reporter.say(f"Pushed to {push(run.folder, run.config.push_to_hub)}")
