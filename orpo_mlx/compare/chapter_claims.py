"""The course chapter's claims, each held against a comparison's figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from orpo_mlx.compare import claims
from orpo_mlx.compare.claims import CONFIRMED, COPY, DPO, OPEN, ORPO, REFUTED
from orpo_mlx.compare.results import Results
from orpo_mlx.judging.intervals import wilson

# One peak "twice" another, measured: halfway between the same and twice as much.
_TWICE = 1.5
# Differences of less than this share are none.
_NEGLIGIBLE = 0.05

Arms = Mapping[str, Mapping[str, Any]]
"""Entries of `methods` in `results.json`, by name."""


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
        unmeasured = f"not measured: --methods has no {' and no '.join(missing)}"
        return [Verdict(claim, unmeasured, OPEN) for claim in _CLAIMS]
    return [Verdict(claim, *judge(arms, results)) for claim, judge in _CLAIMS.items()]


def reference(arms: Arms, results: Results) -> tuple[str, str]:
    """What was measured of the first claim, and the verdict; so for the others."""
    seconds = {name: arms[name]["summary"]["reference_s"]["mean"] for name in (DPO, ORPO)}
    measured = (
        f"reference log-probs: {seconds[DPO]:.1f} s for DPO, {seconds[ORPO]:.1f} s for ORPO; no second model: the same "
        "weights with the adapters off"
    )
    holds = arms[DPO]["needs_reference"] and not arms[ORPO]["needs_reference"]
    return measured, f"{CONFIRMED} for reference log-probs, {REFUTED} for a second model" if holds else REFUTED


def phases(arms: Arms, results: Results) -> tuple[str, str]:
    summary = arms[DPO]["summary"]
    share = summary["reference_s"]["mean"] / summary["training_s"]["mean"]
    measured = (
        f"one command and one loop for both; DPO's reference pass is {share:.0%} of its training time here, once per "
        "pair, and 0 % in later epochs and runs that find it remembered"
    )
    return measured, "depends on what a phase is: an extra forward pass over the pairs, yes; a second training, no"


def memory(arms: Arms, results: Results) -> tuple[str, str]:
    peaks = {name: arm["summary"]["peak_memory_gib"]["mean"] for name, arm in arms.items()}
    ours = peaks[DPO] / peaks[ORPO]
    measured = f"peak of DPO: {ours:.2f} times ORPO's"
    if COPY not in peaks:
        measured += f"; with a second copy of the weights: not measured (add '{COPY}' to --methods)"
        return measured, f"{REFUTED} as run here" if ours < _TWICE else CONFIRMED
    theirs = peaks[COPY] / peaks[ORPO]
    measured += f"; with a second copy of the weights, as other trainers run it: {theirs:.2f} times"
    if ours >= _TWICE:
        return measured, CONFIRMED
    if theirs >= _TWICE:
        return measured, "depends on the trainer: a second copy of the weights costs that, DPO does not"
    return measured, f"{REFUTED}, even with a second copy: what a step keeps outweighs the weights here"


def convergence(arms: Arms, results: Results) -> tuple[str, str]:
    target = f"{results['target_accuracy']:.0%}"
    seeds = results["seeds"]
    reached = {name: arms[name]["to_target"] for name in (ORPO, DPO)}
    counts = {name: sum(step is not None for step in found["steps"]) for name, found in reached.items()}
    # A mean over the seeds that arrived would leave out the slow ones.
    if min(counts.values()) < seeds:
        shown = " and ".join(f"{name} under {count} of {seeds} seeds" for name, count in counts.items())
        return f"{target} on the valid pairs reached by {shown} within {results['budget']['words']}", OPEN
    means = {key: [statistics.fmean(reached[name][key]) for name in (ORPO, DPO)] for key in ("steps", "seconds")}
    measured = (
        f"steps to {target} on the valid pairs: {means['steps'][0]:.1f} for ORPO, {means['steps'][1]:.1f} for DPO; "
        f"seconds: {means['seconds'][0]:.1f} and {means['seconds'][1]:.1f}"
    )
    signs = {key: which_is_sooner(reached[ORPO][key], reached[DPO][key]) for key in means}
    sooner = [key for key, sign in signs.items() if sign == 1]
    later = [key for key, sign in signs.items() if sign == -1]
    if sooner and later:
        return measured, "depends on whether steps or seconds are counted"
    if not sooner and not later:
        return measured, f"{OPEN}: no difference that the seeds agree on"
    verdict = CONFIRMED if sooner else REFUTED
    return measured, verdict if len(sooner or later) == 2 else f"{verdict} in {(sooner or later)[0]} alone"


def which_is_sooner(ours: Sequence[float], theirs: Sequence[float]) -> int:
    """1 where `ours` are sooner under every seed and by more than a twentieth on average, -1 where `theirs` are."""
    means = statistics.fmean(ours), statistics.fmean(theirs)
    if abs(means[0] - means[1]) <= _NEGLIGIBLE * max(means):
        return 0
    return 1 if max(ours) < min(theirs) else -1 if max(theirs) < min(ours) else 0


def sensitivity(arms: Arms, results: Results) -> tuple[str, str]:
    both = [arms[ORPO], arms[DPO]]
    if not all(arm["grid"] for arm in both):
        return "not measured: give more than one of --learning-rates", OPEN
    failed = [arm["name"] for arm in both if arm["sensitivity"] is None]
    if failed:
        # A method that fails at a setting where the other does not is the more sensitive one.
        verdict = OPEN if len(failed) == 2 else CONFIRMED if failed == [DPO] else REFUTED
        return f"training failed at some setting of the grid: {', '.join(failed)}", verdict
    ranges = [arm["sensitivity"] for arm in both]
    sizes = [len(arm["grid"]) for arm in both]
    measured = (
        f"range of accuracy over {sizes[0]} and {sizes[1]} settings of learning rate and β: {ranges[0]:.1%} for ORPO, "
        f"{ranges[1]:.1%} for DPO"
    )
    pairs = results["data"]["pairs"]["valid"]
    if results["settings"]["valid_pairs"] != -1:
        pairs = min(pairs, results["settings"]["valid_pairs"])
    # Two ranges of shares of so many pairs differ by half of this interval by chance alone.
    low, high = wilson(statistics.fmean(found["accuracy"] for arm in both for found in arm["grid"]), pairs)
    if abs(ranges[0] - ranges[1]) <= (high - low) / 2:
        return measured, f"{OPEN}: {pairs} valid pairs do not tell these apart"
    return measured, CONFIRMED if ranges[0] < ranges[1] else REFUTED


_CLAIMS: dict[str, Callable[[Arms, Results], tuple[str, str]]] = {
    claims.REFERENCE: reference,
    claims.PHASES: phases,
    claims.MEMORY: memory,
    claims.CONVERGENCE: convergence,
    claims.SENSITIVITY: sensitivity,
}
