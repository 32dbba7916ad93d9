"""A training run from settings to adapters, and its command line.

The module can be called as well: it is `orpo_mlx.train`, as is the function.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
from rich.console import Console

from orpo_mlx.config.checks import check_settings, make_config
from orpo_mlx.config.settings import TrainingConfig, settings_for_card
from orpo_mlx.errors import ConfigError, TrainingError, UserError
from orpo_mlx.files import save_json
from orpo_mlx.folder_lock import locked
from orpo_mlx.memory.choose_mode import plan_memory
from orpo_mlx.process_memory import settle
from orpo_mlx.reporting.callbacks import Callbacks, Named, TrainingCallback, named_callbacks
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.reporting.hub import check_ready, push
from orpo_mlx.reporting.live.feed import GOING_ON, PREPARING, Feed
from orpo_mlx.reporting.live.server import serving
from orpo_mlx.reporting.metrics_log import FILE as METRICS
from orpo_mlx.reporting.metrics_log import SAMPLES, MetricsFile
from orpo_mlx.reporting.model_card import FILE as CARD
from orpo_mlx.reporting.model_card import write_card
from orpo_mlx.reporting.resumable_jsonl import LineFile
from orpo_mlx.reporting.run_report import refresh_report
from orpo_mlx.reporting.services import parse_services, require_installed
from orpo_mlx.reporting.tracking import reporting_to
from orpo_mlx.training.checkpoints.folders import Checkpoint, remove_all
from orpo_mlx.training.checkpoints.progress import Held, Progress, TrainingResult
from orpo_mlx.training.checkpoints.resume import (
    BEST,
    CHECKPOINTS,
    accept,
    copied_to_all,
    facts,
    find_checkpoint,
    newest,
    restore,
    restore_reference,
)
from orpo_mlx.training.checkpoints.state import (
    State,
    random_numbers_kept,
    random_state,
    random_state_of,
    read_state,
    set_random_state,
)
from orpo_mlx.training.data_order import groups_to_come, steps_of_adapter_file, total_steps
from orpo_mlx.training.distributed import Ranks, find_ranks
from orpo_mlx.training.evaluate_only import evaluate_only
from orpo_mlx.training.interrupts import StopSignals
from orpo_mlx.training.loop import Loop, Outlets
from orpo_mlx.training.prepare import prepare
from orpo_mlx.training.run import Run, adapter_config, run_record
from orpo_mlx.training.samples import Sampler, pick_prompts
from orpo_mlx.training.startup_summary import announce, pass_on_notes
from orpo_mlx.types import Pair

_SAMPLED_FROM = 1000


def train(
    config: TrainingConfig,
    reporter: Reporter | None = None,
    ranks: Ranks | None = None,
    *,
    callbacks: Sequence[TrainingCallback] = (),
) -> TrainingResult:
    """Train adapters with one method and write them, checkpoints, `metrics.jsonl` and `run.json` into
    `config.adapter_path`; with `config.resume`, go on from the newest whole checkpoint there. With
    `config.test`, nothing is trained and the adapters that are there are evaluated.

    Where `mlx.launch` has started several processes (`ranks`), they train as one, and rank 0 writes, speaks and calls
    `callbacks`, after the services of `config.report_to`. An exception in one of them ends the run, saved.

    Raises:
        UserError: settings, data or model cannot be used, or the run cannot go on; says what was saved.
        Interrupted: SIGINT or SIGTERM came, or a callback raised KeyboardInterrupt; what was done is saved.
    """
    config = checked(config)
    given = named_callbacks(callbacks)
    if config.push_to_hub is not None:
        check_ready(config.push_to_hub, "--push-to-hub")
    reporter = reporter or Reporter()
    folder = Path(config.adapter_path).expanduser()
    settle()
    ranks = ranks or find_ranks(config.rank_timeout)
    ranks.timeout_s = config.rank_timeout
    if ranks.first:
        require_installed(parse_services(config.report_to))
    if config.test:
        return evaluate_only(config, reporter, ranks)
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
        loop, after = _train(prepare(config, hold, ranks), reporter, given, page)
    progress = loop.progress
    return TrainingResult(
        folder, progress.step, progress.skipped, progress.before, after, progress.best, progress.trained_tokens,
        progress.training_seconds, loop.peak_memory_gib,
    )  # fmt: skip


def checked(config: TrainingConfig) -> TrainingConfig:
    """A config as if each of its fields had come from a flag: checked, and with what follows from it.

    Raises:
        ConfigError: a value that cannot be used; names the field.
    """
    if not isinstance(config, TrainingConfig):
        raise ConfigError(f"config: found {type(config).__name__}, expected a TrainingConfig.")
    for field in dataclasses.fields(config):
        if getattr(config, field.name) is None and field.default is not None:
            raise ConfigError(f"TrainingConfig: {field.name}: found None; leave it out to have the default.")
    return make_config(check_settings(config.settings(), "TrainingConfig"))


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
    announce(run, reporter, checkpoint)
    for note in (*problems, *(f"Changed since the checkpoint: {change}." for change in changes)):
        reporter.say(note)
    return (None, None) if checkpoint is None or state is None else (checkpoint, state)


def _train(run: Run, reporter: Reporter, callbacks: Sequence[Named], page: Feed | None) -> tuple[Loop, Held]:
    checkpoint, state = _checkpoint_and_state(run, reporter)
    # The prediction draws random numbers; the run's own, of dropout, must not depend on it.
    mx.random.seed(run.config.seed)
    set_random_state(random_state_of(run.ranks.rank, [random_state()]))
    with ExitStack() as stack:
        stack.callback(_save_reference, run, reporter)
        told = stack.enter_context(_all_callbacks(run, reporter, callbacks, checkpoint))
        progress = _begin(run, state)
        outlets = _outlets(run, reporter, told, state, stack)
        if page is not None:
            page.state = GOING_ON
        with StopSignals() as stop:
            if checkpoint is not None:
                restore_reference(run, checkpoint)
            _precompute_reference(run, reporter, stop)
            if checkpoint is not None and state is not None:
                for note in restore(run, checkpoint, state):
                    reporter.say(note)
            loop = Loop(
                run, progress, outlets, stop,
                saved_step=None if checkpoint is None else checkpoint.step,
                keep_reference=lambda: _save_reference(run, reporter, sparingly=True),
            )  # fmt: skip
            if checkpoint is None:
                loop.look_before()
            after = loop.steps()
        try:
            _compare(loop, after)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the run was done, and is saved in {run.folder}") from None
    if run.config.report and run.ranks.first:
        refresh_report(run.folder)
    _close(run, progress, reporter)
    if run.ranks.first:
        _publish(run, progress.before, after, reporter)
    return loop, after


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
        reporter.say(f"On this machine, the run can be watched at {server.address}")
        try:
            yield feed
        except (UserError, KeyboardInterrupt) as error:
            reporter.said.append(str(error))
            raise


def _course(run: Run, progress: Progress) -> dict[str, Any]:
    """What `run.json` says of the steps: how many there will be, and where the run was taken up again."""
    return {"total_steps": total_steps(run.config, len(run.splits["train"].pairs)), "resumed_at": progress.resumed_at}


@contextmanager
def _all_callbacks(
    run: Run, reporter: Reporter, callbacks: Sequence[Named], checkpoint: Checkpoint | None
) -> Iterator[Callbacks]:
    """The services' callbacks, then those given, on rank 0."""
    if not run.ranks.first:
        yield Callbacks()
        return
    config = run.config
    step = None if checkpoint is None else checkpoint.step
    names = parse_services(config.report_to)
    settings = {**config.settings(), "method_parameters": run.method.parameters}
    with reporting_to(names, config.project_name, run.folder, settings, step, reporter.say) as services:
        # Services first: they must have a step whatever the others make of it.
        yield Callbacks([*services, *callbacks], random_numbers_kept)


def _begin(run: Run, state: State | None) -> Progress:
    """How far the run has come; a new one takes the place of what is in its folder."""
    if state is None:
        progress = Progress()
        remove_all(run.folder / CHECKPOINTS)
        (run.folder / BEST).unlink(missing_ok=True)
    else:
        progress = state.progress
        progress.resumed_at.append(progress.step)
    save_json(run.folder / "run.json", {**run_record(run), **_course(run, progress)})
    save_json(run.folder / "adapter_config.json", adapter_config(run))
    return progress


def _outlets(run: Run, reporter: Reporter, callbacks: Callbacks, state: State | None, stack: ExitStack) -> Outlets:
    """What the run writes to, closed with `stack`."""
    metrics = MetricsFile(run.folder / METRICS, None if state is None else state.metrics)
    stack.callback(metrics.close)
    prompts = _sample_prompts(run, reporter)
    kept = None if state is None else state.samples
    path = run.folder / SAMPLES
    file = None
    if kept is not None or (prompts and run.config.sample_every is not None):
        file = LineFile(path, kept)
        stack.callback(file.close)
    else:
        path.unlink(missing_ok=True)
    sampler = Sampler(run.loaded.model, run.loaded.tokenizer, prompts, file)
    return Outlets(reporter, metrics, sampler, callbacks)


def _compare(loop: Loop, after: Held) -> None:
    """Say how the end compares with the beginning."""
    progress, (reporter, _, sampler, _) = loop.progress, loop.outlets
    if progress.before and progress.before.keys() == after.keys():
        reporter.closing_table(progress.before, after)
    if len(progress.replies_before) == len(sampler.prompts):
        reporter.replies(progress.replies_before, loop.replies_after())


def _close(run: Run, progress: Progress, reporter: Reporter) -> None:
    if progress.skipped:
        reporter.say(f"{progress.skipped} steps were passed over, because a number in them was not finite.")
    if progress.best is not None:
        step, loss = progress.best
        reporter.say(f"The lowest validation loss, {loss:.4f}, was at step {step}: {run.folder / BEST}/.")
    reporter.say(f"\nAdapters, metrics and settings are in {run.folder}/.")


def _publish(run: Run, before: Held, after: Held, reporter: Reporter) -> None:
    """Write the model card, and send everything to the Hub where that was asked for."""
    if not write_card(run.folder, before, after, settings_for_card):
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
        pass_on_notes(run.reference.table, reporter)


def _sample_prompts(run: Run, reporter: Reporter) -> list[Pair]:
    """Pairs whose prompts are answered before and after training: of the first of test, valid, train that is text."""
    if run.config.samples == 0 or not run.ranks.first:
        return []
    split = next(run.splits[name] for name in ("test", "valid", "train") if name in run.splits)
    pairs = list(itertools.islice(split.raw(), _SAMPLED_FROM))
    if not pairs:
        reporter.say("The rows are token ids: no sample replies.")
    return pick_prompts(pairs, run.config.samples)


class _Callable(ModuleType):
    """A module that is its function `train` when it is called.

    Importing a submodule sets the package's attribute of that name to the module, whatever was there. One object that
    is both is right in any order of imports.
    """

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    from orpo_mlx.cli.train import main

    sys.exit(main())
