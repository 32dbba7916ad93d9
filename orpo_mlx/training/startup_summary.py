"""What a run says before it begins: its data, its memory, its method, and what it goes on from."""

from __future__ import annotations

from orpo_mlx.files import write_text
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.text import printable
from orpo_mlx.training.checkpoints.folders import Checkpoint
from orpo_mlx.training.reference_store import ReferenceTable
from orpo_mlx.training.run import Run


def announce(run: Run, reporter: Reporter, checkpoint: Checkpoint | None) -> None:
    """Say all of it, and list the rows that are left out in `left_out.txt`."""
    if run.loaded.note:
        reporter.say(run.loaded.note)
    for name, split in run.splits.items():
        reporter.say(split.summary(name))
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
        pass_on_notes(run.reference.table, reporter)
        if len(run.reference.table):
            reporter.say(
                f"{len(run.reference.table)} pairs have reference log-probs from earlier runs with this model; where "
                "this run meets them, they are not computed again."
            )
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


def pass_on_notes(table: ReferenceTable, reporter: Reporter) -> None:
    """Say what the table has to say, once."""
    for note in table.notes:
        reporter.say(note)
    table.notes.clear()
