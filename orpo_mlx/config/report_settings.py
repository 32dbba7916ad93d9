"""Settings of what a run says, evaluates and saves on its way; `settings.py` has all others, and says what a field
declares."""

from __future__ import annotations

import dataclasses

from orpo_mlx.config import defaults
from orpo_mlx.config.loss_settings import LossSettings
from orpo_mlx.config.traits import ALL_OR_SOME, NOT_NEGATIVE, PORT, POSITIVE, Trait, in_reports
from orpo_mlx.reporting.services import SERVICES


@dataclasses.dataclass(frozen=True)
class ReportSettings(LossSettings):
    """What a run shows and keeps; no gradient depends on it."""

    steps_per_report: int = in_reports(10, "steps between reports", range=POSITIVE, aliases=("logging_steps",))
    steps_per_eval: int = in_reports(200, "steps between validations", range=POSITIVE, aliases=("eval_steps",))
    val_batches: int = in_reports(
        25, "validation batches; -1: all, 0: no validation", Trait.EVALUATED, range=ALL_OR_SOME
    )
    test_batches: int = in_reports(500, "test batches; -1: all, 0: no test", Trait.EVALUATED, range=ALL_OR_SOME)
    save_every: int = in_reports(100, "steps between checkpoints", range=POSITIVE, aliases=("save_steps",))
    save_minutes: float = in_reports(
        10.0, "minutes after which one is saved whatever the step; 0: by steps alone", range=NOT_NEGATIVE
    )
    keep: int = in_reports(
        3, "checkpoints that are kept, the newest ones", range=POSITIVE, aliases=("save_total_limit",)
    )
    keep_awake: bool = in_reports(
        True, "keep a Mac from going to sleep while the run lasts", off_help="let a Mac go to sleep in the middle of it"
    )
    save_best: bool = in_reports(False, "save and keep the best checkpoint as well, see --best-by; best/ leads to it")
    best_by: str = in_reports(
        "loss",
        "what --save-best goes by: validation loss, or the win rate of --evaluate-every",
        choices=defaults.BEST_BY,
    )
    evaluate_every: int | None = in_reports(
        None, "steps between judgements of replies against the base's, by --judge", Trait.TRAINING_ONLY, range=POSITIVE
    )
    judge: str | None = in_reports(
        None,
        "who judges with --evaluate-every: rule:plain, reward:PATH, implicit:FOLDER, a model, endpoint, ...",
        Trait.TRAINING_ONLY,
    )
    judge_prompts: int = in_reports(20, "held-out prompts that are judged with --evaluate-every", range=POSITIVE)
    samples: int = in_reports(3, "sample replies before and after training", range=NOT_NEGATIVE)
    sample_every: int | None = in_reports(
        None,
        "steps between sample replies during training; default: before and after only",
        Trait.TRAINING_ONLY,
        range=POSITIVE,
    )
    sample_tokens: int = in_reports(64, "tokens of a sample or judged reply, at most", range=POSITIVE)
    report_to: str | None = in_reports(
        None, f"services to report to, separated by commas: {', '.join(SERVICES)}", Trait.TRAINING_ONLY
    )
    project_name: str | None = in_reports(None, "project that --report-to files the run under")
    report: bool = in_reports(True, "write report.html and report.png", off_help="write no report.html and report.png")
    report_every: int | None = in_reports(
        None, "steps between writing report.html and report.png; default: at the end only", range=POSITIVE
    )
    watch: int | None = in_reports(
        None,
        "serve a page that draws the run as it goes on, on this machine only, at this port; 0: any that is free",
        Trait.THIS_COMMAND | Trait.TRAINING_ONLY,
        range=PORT,
    )
    push_to_hub: str | None = in_reports(
        None,
        "owner/name: send adapters, model card and figures to this model repository at the end",
        Trait.TRAINING_ONLY | Trait.NOT_ON_CARD,
    )
