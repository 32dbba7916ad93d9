"""The course chapter's five claims about ORPO and DPO, each held against a comparison's figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orpo_mlx.compare.intervals import wilson

ORPO, DPO, COPY = "orpo", "dpo", "dpo --reference copy"
CONFIRMED, REFUTED, OPEN = "confirmed", "refuted", "not decided"

Results = Mapping[str, Any]
Arm = Mapping[str, Any]


class Verdict(NamedTuple):
    """One row of the chapter's table."""

    claim: str
    measured: str
    verdict: str


def verdicts(results: Results) -> list[Verdict]:
    """All five rows, in the chapter's order. What was not run is said to be not measured."""
    arms = {arm["name"]: arm for arm in results["methods"]}
    missing = [name for name in (ORPO, DPO) if name not in arms]
    if missing:
        words = f"not measured: --methods has no {' and no '.join(missing)}"
        return [Verdict(claim, words, OPEN) for claim in _CLAIMS]
    orpo, dpo = arms[ORPO], arms[DPO]
    return [
        Verdict(_CLAIMS[0], *_reference(orpo, dpo)),
        Verdict(_CLAIMS[1], *_phases(orpo, dpo)),
        Verdict(_CLAIMS[2], *_memory(orpo, dpo, arms.get(COPY))),
        Verdict(_CLAIMS[3], *_convergence(orpo, dpo, results)),
        Verdict(_CLAIMS[4], *_sensitivity(orpo, dpo, results)),
    ]


_CLAIMS = (
    "DPO needs a reference model, ORPO does not",
    "DPO takes two phases, ORPO one",
    "DPO takes twice the memory",
    "ORPO converges faster",
    "DPO's sensitivity to hyper-parameters is moderate, ORPO's low",
)


def _reference(orpo: Arm, dpo: Arm) -> tuple[str, str]:
    seconds = dpo["summary"]["reference_s"]["mean"]
    measured = (
        f"reference log-probs: {seconds:.1f} s for DPO, {orpo['summary']['reference_s']['mean']:.1f} s for ORPO; "
        "no second model: the same weights with the adapters off"
    )
    holds = dpo["needs_reference"] and not orpo["needs_reference"]
    return measured, f"{CONFIRMED} for reference log-probs, {REFUTED} for a second model" if holds else REFUTED


def _phases(orpo: Arm, dpo: Arm) -> tuple[str, str]:
    share = dpo["summary"]["reference_s"]["mean"] / dpo["summary"]["training_s"]["mean"]
    measured = (
        f"one command and one loop for both; DPO's reference pass is {share:.0%} of its training time here, once per "
        "pair, and 0 % in later epochs and runs that find it remembered"
    )
    return measured, "depends on what a phase is: an extra forward pass over the pairs, yes; a second training, no"


def _memory(orpo: Arm, dpo: Arm, copied: Arm | None) -> tuple[str, str]:
    ours = dpo["summary"]["peak_memory_gib"]["mean"] / orpo["summary"]["peak_memory_gib"]["mean"]
    measured = f"peak of DPO: {ours:.2f} times ORPO's"
    if copied is None:
        measured += f"; with a second copy of the weights: not measured (add '{COPY}' to --methods)"
        return measured, f"{REFUTED} as run here" if ours < 1.5 else CONFIRMED
    theirs = copied["summary"]["peak_memory_gib"]["mean"] / orpo["summary"]["peak_memory_gib"]["mean"]
    measured += f"; with a second copy of the weights, as other trainers run it: {theirs:.2f} times"
    if ours >= 1.5:
        return measured, CONFIRMED
    if theirs >= 1.5:
        return measured, "depends on the trainer: a second copy of the weights costs that, DPO does not"
    return measured, f"{REFUTED}, even with a second copy: what a step keeps outweighs the weights here"


def _convergence(orpo: Arm, dpo: Arm, results: Results) -> tuple[str, str]:
    target = f"{results['target_accuracy']:.0%}"
    reached = {
        name: [v for v in arm["to_target"]["steps"] if v is not None] for name, arm in ((ORPO, orpo), (DPO, dpo))
    }
    if min(map(len, reached.values())) < results["seeds"]:
        counts = " and ".join(
            f"{name} under {len(found)} of {results['seeds']} seeds" for name, found in reached.items()
        )
        return f"{target} on the valid pairs reached by {counts} within {results['budget']['words']}", OPEN
    ours, theirs = orpo["to_target"], dpo["to_target"]
    mean = {key: (statistics.fmean(ours[key]), statistics.fmean(theirs[key])) for key in ("steps", "seconds")}
    measured = (
        f"steps to {target} on the valid pairs: {mean['steps'][0]:.1f} for ORPO, {mean['steps'][1]:.1f} for DPO; "
        f"seconds: {mean['seconds'][0]:.1f} and {mean['seconds'][1]:.1f}"
    )
    signs = {key: _sign(ours[key], theirs[key]) for key in mean}
    sooner, later = ([key for key, sign in signs.items() if sign == wanted] for wanted in (1, -1))
    if sooner and later:
        return measured, "depends on whether steps or seconds are counted"
    if not sooner and not later:
        return measured, f"{OPEN}: no difference that the seeds agree on"
    words, found = (CONFIRMED, sooner) if sooner else (REFUTED, later)
    return measured, words if len(found) == 2 else f"{words} in {found[0]} alone"


def _sign(ours: Sequence[float], theirs: Sequence[float]) -> int:
    """1 where ORPO is sooner under every seed and by more than a twentieth on average, -1 where DPO is."""
    first, second = statistics.fmean(ours), statistics.fmean(theirs)
    if abs(first - second) <= 0.05 * max(first, second):
        return 0
    return 1 if max(ours) < min(theirs) else -1 if max(theirs) < min(ours) else 0


def _sensitivity(orpo: Arm, dpo: Arm, results: Results) -> tuple[str, str]:
    if not orpo["grid"] or not dpo["grid"]:
        return "not measured: give more than one of --learning-rates", OPEN
    failed = [arm["name"] for arm in (orpo, dpo) if arm["sensitivity"] is None]
    if failed:
        return f"training failed at some setting of the grid: {', '.join(failed)}", (
            f"{OPEN}" if len(failed) == 2 else CONFIRMED if failed == [DPO] else REFUTED
        )
    measured = (
        f"range of accuracy over {len(orpo['grid'])} and {len(dpo['grid'])} settings of learning rate and β: "
        f"{orpo['sensitivity']:.1%} for ORPO, {dpo['sensitivity']:.1%} for DPO"
    )
    # Two ranges of shares of so many pairs differ by this much by chance alone.
    pairs = results["settings"]["valid_pairs"]
    pairs = results["data"]["pairs"]["valid"] if pairs == -1 else min(pairs, results["data"]["pairs"]["valid"])
    middle = statistics.fmean(found["accuracy"] for arm in (orpo, dpo) for found in arm["grid"])
    low, high = wilson(middle, pairs)
    if abs(orpo["sensitivity"] - dpo["sensitivity"]) <= (high - low) / 2:
        return measured, f"{OPEN}: {pairs} valid pairs do not tell these apart"
    return measured, CONFIRMED if orpo["sensitivity"] < dpo["sensitivity"] else REFUTED
