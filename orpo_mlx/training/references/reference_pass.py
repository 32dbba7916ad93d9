"""Reference log-probs computed before the first step, and kept on the disk."""

from __future__ import annotations

from collections.abc import Sequence

from orpo_mlx.errors import TrainingError
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.training.data_order import groups_to_come
from orpo_mlx.training.interrupts import StopSignals
from orpo_mlx.training.references.reference import ReferenceLogProbs
from orpo_mlx.training.references.reference_store import ReferenceTable
from orpo_mlx.training.run import Run
from orpo_mlx.types import Example


def precompute_reference(run: Run, reporter: Reporter, stop: StopSignals) -> None:
    """Reference log-probs of all pairs to come, where the settings or the kind of reference ask for that.

    Raises:
        TrainingError: a resumed run needs some that are not in its checkpoint and can no longer be computed.
        Interrupted: a signal has come.
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
            f"`resume`: the reference log-probs of {unknown} pairs are not in the checkpoint, and the adapters that "
            "define them are no longer those the run began with; start a new run with `resume_adapter_file`"
        )
    compute_reference(run, reference, groups, reporter, stop)
    save_reference(run, reporter)


def compute_reference(
    run: Run,
    reference: ReferenceLogProbs,
    groups: Sequence[Sequence[Example]],
    reporter: Reporter,
    stop: StopSignals,
) -> None:
    """Reference log-probs of these groups of pairs, under a progress bar; Interrupted where a signal has come."""
    with reporter.bar("reference log-probs", sum(map(len, groups)), "pairs") as advance:

        def progress(done: int) -> None:
            advance(done)
            # Of several ranks none may leave alone: the others would wait for it. They agree between steps.
            if run.ranks.size == 1:
                stop.check()

        reference.remember_among(run.ranks, groups, progress)


def save_reference(run: Run, reporter: Reporter, *, sparingly: bool = False) -> None:
    """Write the reference's table, where there is one; see `ReferenceTable.save`."""
    if run.reference is not None:
        run.reference.table.save(sparingly=sparingly)
        pass_on_notes(run.reference.table, reporter)


def pass_on_notes(table: ReferenceTable, reporter: Reporter) -> None:
    """Say what the table has to say, once."""
    for note in table.notes:
        reporter.say(note)
    table.notes.clear()
