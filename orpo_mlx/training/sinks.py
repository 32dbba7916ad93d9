"""What a run writes its output to: the terminal, `metrics.jsonl`, sample replies, callbacks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import NamedTuple

from orpo_mlx.reporting.callbacks import Callbacks, NamedCallback
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.reporting.metrics_log import MetricsFile
from orpo_mlx.reporting.resumable_jsonl import LineFile
from orpo_mlx.reporting.services import parse_services
from orpo_mlx.reporting.tracking import reporting_to
from orpo_mlx.run_folder import METRICS_FILE, SAMPLES_FILE
from orpo_mlx.training.checkpoints.random_numbers import random_numbers_kept
from orpo_mlx.training.checkpoints.resume import Resumed
from orpo_mlx.training.evaluating.judged import JudgedReplies, judged_replies
from orpo_mlx.training.evaluating.samples import Sampler, pick_prompts
from orpo_mlx.training.run import Run
from orpo_mlx.types import Group, Pair

# Sample prompts are spread over this many pairs of a split, so that a large one need not be read to its end.
_PAIRS_TO_SAMPLE = 1000


class Sinks(NamedTuple):
    """Where the output of a run goes."""

    reporter: Reporter
    metrics: MetricsFile
    sampler: Sampler
    callbacks: Callbacks
    judged: JudgedReplies | None = None
    """Judges replies with `evaluate_every`."""


@contextmanager
def open_callbacks(
    run: Run, reporter: Reporter, callbacks: Sequence[NamedCallback], resumed: Resumed | None
) -> Iterator[Callbacks]:
    """Callbacks of the services in `--report-to`, then those given, on rank 0; ConfigError where one cannot begin."""
    if not run.ranks.first:
        yield Callbacks()
        return
    config = run.config
    step = None if resumed is None else resumed.checkpoint.step
    names = parse_services(config.report_to)
    settings = {**config.settings(), "method_parameters": run.method.parameters}
    with reporting_to(names, config.project_name, run.folder, settings, step, reporter.say) as services:
        # Services first: they must have a step whatever the others make of it.
        yield Callbacks([*services, *callbacks], random_numbers_kept)


@contextmanager
def open_sinks(run: Run, reporter: Reporter, callbacks: Callbacks, resumed: Resumed | None) -> Iterator[Sinks]:
    """The files of a run, which a resumed one continues where its checkpoint left them, and the rest of its sinks.

    Raises:
        TrainingError: a file does not begin with what the checkpoint knows of it.
        OSError: a file cannot be written.
    """
    with ExitStack() as stack:
        known = None if resumed is None else resumed.state.metrics
        metrics = stack.enter_context(closing(MetricsFile(run.folder / METRICS_FILE, known)))
        prompts = sample_prompts(run, reporter)
        known = None if resumed is None else resumed.state.samples
        file = None
        if known is not None or (prompts and run.config.sample_every is not None):
            file = stack.enter_context(closing(LineFile(run.folder / SAMPLES_FILE, known)))
        else:
            # What an earlier run left there would be taken for this one's.
            (run.folder / SAMPLES_FILE).unlink(missing_ok=True)
        sampler = Sampler(
            run.loaded.model,
            run.loaded.tokenizer,
            prompts,
            run.config.sample_tokens,
            file,
            template_strings=run.config.template_strings,
        )
        yield Sinks(reporter, metrics, sampler, callbacks, judged_replies(run))


def sample_prompts(run: Run, reporter: Reporter) -> list[Pair | Group]:
    """Pairs whose prompts are answered before and after training: of the first of test, valid, train that is text."""
    if run.config.samples == 0 or not run.ranks.first:
        return []
    split = next(run.splits[name] for name in ("test", "valid", "train") if name in run.splits)
    pairs = list(itertools.islice(split.raw(), _PAIRS_TO_SAMPLE))
    if not pairs:
        reporter.say("The rows are token ids: no sample replies.")
    prompts = [pair for pair in pairs if not pair.whole_text]
    if pairs and not prompts:
        reporter.say("The rows are texts without prompts: no sample replies.")
    return pick_prompts(prompts, run.config.samples)
