"""What a run says before its first step and after its last one."""

from __future__ import annotations

import shlex

from orpo_mlx.data.batching import epoch_order
from orpo_mlx.data.group_statistics import group_figures
from orpo_mlx.files import write_text
from orpo_mlx.losses.registry import COMPLETION
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.run_folder import ADAPTERS_FILE, BEST, LEFT_OUT_FILE, REPORT_PAGE
from orpo_mlx.text import printable
from orpo_mlx.training.checkpoints.progress import TrainingResult
from orpo_mlx.training.checkpoints.resume import Resumed
from orpo_mlx.training.data_order import default_epochs, evaluation_pairs, pairs_per_step, total_steps
from orpo_mlx.training.learned import doubt
from orpo_mlx.training.references.reference_pass import pass_on_notes
from orpo_mlx.training.run import Run


def announce(run: Run, reporter: Reporter, resumed: Resumed | None) -> None:
    """Say what is trained on what, and from where; list the rows that are left out in `left_out.txt`."""
    if run.loaded.note:
        reporter.say(run.loaded.note)
    for name, split in run.splits.items():
        reporter.say(split.summary(name))
    list_left_out(run, reporter)
    announce_labels(run, reporter)
    if "valid" not in run.splits:
        reporter.say("No valid split: training without validation.")
    announce_evaluation(run, reporter)
    for note in run.memory.notes:
        reporter.say(note)
    announce_reference(run, reporter)
    announce_start(run, reporter, resumed)
    trainable = sum(array.size for array in adapter_weights(run.loaded.model).values())
    reporter.say(
        f"Training {trainable:,} parameters with {run.config.method} ({shown_parameters(run)}), "
        f"`memory={run.memory.mode}`."
    )
    for note in () if resumed is None else resumed.notes:
        reporter.say(note)


def list_left_out(run: Run, reporter: Reporter) -> None:
    """Write `left_out.txt`, a line for each row that is not trained on, or remove an earlier run's."""
    lines = [reporter.render(line) for split in run.splits.values() for line in split.report.left_out]
    listing = run.folder / LEFT_OUT_FILE
    # An earlier run's would be taken for this one's.
    listing.unlink(missing_ok=True)
    if lines:
        write_text(listing, "\n".join(map(printable, lines)) + "\n")
        reporter.say(f"The rows left out are listed in {listing}.")


def announce_labels(run: Run, reporter: Reporter) -> None:
    """Say how good and bad completions are balanced, where the method learns from them and the rows are labelled."""
    train = run.splits["train"].pairs
    labels = group_figures(train).get("labels")
    if labels is None or run.method.unit != COMPLETION:
        return
    reporter.say(f"train: {labels['good']} good and {labels['bad']} bad completions.")
    for name, value in labels["proposal"].items():
        # Where neither was given: both are 1 then. bco has none.
        if any(table["desirable_weight"] == table["undesirable_weight"] for table in weights_of(run)):
            reporter.say(f"`{name}={value:g}` would give both kinds the same weight.")
    steps = epoch_order(train, pairs_per_step(run.config), seed=run.config.seed, epoch=0, shuffle=run.config.shuffle)
    alone = sum(len({score > 0 for index in indices for score in train[index].scores}) == 1 for indices in steps)
    if alone:
        reporter.say(
            f"{alone} of {len(steps)} steps of an epoch have only good or only bad completions, and learn from those "
            "alone; a larger `batch_size` mixes them."
        )


def weights_of(run: Run) -> list[dict[str, float]]:
    """Parameters of the terms that weigh good and bad completions."""
    return [table for table in run.method.parameters.values() if "desirable_weight" in table]


def announce_evaluation(run: Run, reporter: Reporter) -> None:
    """Say which held-out pairs are passed over, and how to have them evaluated."""
    for name, pairs in evaluation_pairs(run).items():
        total = len(run.splits[name].pairs)
        if len(pairs) < total:
            setting = {"valid": "val_batches", "test": "test_batches"}[name]
            reporter.say(f"Of {total} {name} pairs the first {len(pairs)} are evaluated; `{setting}=-1` takes all.")


def announce_reference(run: Run, reporter: Reporter) -> None:
    """Say what is known of the reference from earlier runs."""
    if run.reference is None:
        return
    if run.config.reference != "start":
        reporter.say(f"Reference: {run.config.reference}.")
    pass_on_notes(run.reference.table, reporter)
    known = len(run.reference.table)
    if known:
        reporter.say(
            f"{known} pairs have reference log-probs from earlier runs with this model; where this run meets them, "
            "they are not computed again."
        )


def announce_start(run: Run, reporter: Reporter, resumed: Resumed | None) -> None:
    """Say what the run goes on from, or what it replaces."""
    if run.first_step and resumed is None:
        reporter.say(f"Goes on in the data where {run.config.resume_adapter_file} ended, after step {run.first_step}.")
    if (epochs := chosen_epochs(run)) is not None:
        steps = total_steps(run.config, len(run.splits["train"].pairs))
        reporter.say(f"{steps} steps, {epochs} epochs, as suits a set of this size; `epochs` sets another number.")
    if resumed is not None:
        reporter.say(f"Goes on from step {resumed.checkpoint.step}: {resumed.checkpoint.path}.")
    elif (run.folder / ADAPTERS_FILE).exists():
        reporter.say(f"{run.folder}/ holds an earlier run, which this one overwrites.")


def chosen_epochs(run: Run) -> int | None:
    """How many epochs the size of the train split made of the default; None where it is one, or a setting says so."""
    config = run.config
    if config.iters is not None or config.epochs is not None:
        return None
    epochs = default_epochs(config, len(run.splits["train"].pairs))
    return epochs if epochs > 1 else None


def shown_parameters(run: Run) -> str:
    """The method's parameters in one line; those of a sum each with the name of its term."""
    several = len(run.method.parameters) > 1
    shown = [
        f"{name + ' ' if several else ''}{key} {value:g}"
        for name, table in run.method.parameters.items()
        for key, value in table.items()
    ]
    return ", ".join(shown) or "no parameters"


def say_goodbye(run: Run, result: TrainingResult, reporter: Reporter) -> None:
    """Say how the steps went and where everything is."""
    if result.skipped:
        reporter.say(f"{result.skipped} steps were skipped, because a number in them was not finite.")
    if result.best is not None:
        best = result.best
        lowest = "" if best.loss is None else f"lowest validation loss, {best.loss:.4f}"
        what = lowest or f"best win rate, {best.win_rate:.1%}"
        reporter.say(f"The {what}, was at step {best.step}: {run.folder / BEST}/.")
    if (sentence := doubt(run, result)) is not None:
        reporter.say(f"\n{sentence}")
    reporter.say(f"\nAdapters, metrics and settings are in {run.folder}/.")
    for what, command in next_commands(run).items():
        reporter.say(f"{what}: {command}")


def next_commands(run: Run) -> dict[str, str]:
    """What one does with a run that is done, by what it is for."""
    folder = shlex.quote(str(run.folder))
    # Whole weights cannot be switched off.
    beside = "" if run.config.fine_tune_type == "full" else " --compare"
    look = f"{run.folder / REPORT_PAGE}, in a browser" if run.config.report else f"orpo-mlx report {folder}"
    return {"To look at it": look, "To talk with it": f"orpo-mlx chat --adapter-path {folder}{beside}"}
