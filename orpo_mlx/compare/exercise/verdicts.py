"""The course chapter's five claims, each a sentence with figures and a named limit.

ORPO is the paper's loss (Hong et al. 2024). The one that the chapter prints is another (`orpo_style`): where it took
part, the two claims that losses decide are held against it as well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orpo_mlx.compare.exercise.significance import holm, mean_with_error, paired_bootstrap, student_p

ORPO, DPO = "orpo", "dpo"
CHAPTERS = "orpo_style"
_LABELS = {ORPO: "ORPO", CHAPTERS: "the chapter's loss"}
Variant = Mapping[str, Mapping[str, Any]]
"""A variant of a tier in `results.json`: methods by name."""

# Settings from which a grid says something of a method: four rates by three strengths.
_REAL_GRID = 12
_LEVEL = 0.05
# "Twice", of peaks that are predicted within a tenth.
_TWICE = 1.9

CONFIRMED, REFUTED, OPEN = "confirmed", "refuted", "not decided"


class Verdict(NamedTuple):
    """One claim."""

    claim: str
    verdict: str
    measured: str
    limit: str
    """What the measurement does not say."""


def verdicts(results: Mapping[str, Any]) -> list[Verdict]:
    """All of them, from raw figures alone; none holds a time, which differs from run to run."""
    exact = results["tiers"]["exact"]
    variants, bound = exact["variants"], exact["size"]["kl_bound"]
    first = next(iter(variants.values()))
    losses = [name for name in _LABELS if name in first]
    return [
        reference(results["cost"]),
        phases(results["cost"]),
        memory(results["cost"]),
        *(convergence(first, bound, name) for name in losses),
        *(sensitivity(variants, name) for name in losses),
    ]


def claim_of(claim: str, name: str) -> str:
    """A claim about ORPO, and which loss that is where it is not the paper's."""
    return claim if name == ORPO else f"{claim} (the chapter's own loss, {name})"


def reference(cost: Mapping[str, Any]) -> Verdict:
    """Whether DPO needs a second model."""
    own = cost["measured"]
    return Verdict(
        "DPO needs a reference model, ORPO does not",
        f"{CONFIRMED} for reference log-probs, {REFUTED} for a second model",
        f"DPO's reference is its own weights with the adapters off: a step's peak is {own[DPO]['peak_gib']:.2f} GiB, "
        f"ORPO's {own[ORPO]['peak_gib']:.2f}",
        "LoRA; full fine-tuning computes the reference before the first step instead",
    )


def phases(cost: Mapping[str, Any]) -> Verdict:
    """Whether DPO takes two phases."""
    own = cost["measured"]
    return Verdict(
        "DPO takes two phases, ORPO one",
        f"{REFUTED} for a second training, {CONFIRMED} for a second forward pass",
        f"one command and one loop; over {own[DPO]['steps']} steps DPO runs {own[DPO]['forward_tokens']} tokens "
        f"forward without gradient, ORPO {own[ORPO]['forward_tokens']}; once per pair, however many epochs",
        "the supervised training that a chapter puts before DPO is a choice of data, needed by neither loss",
    )


def memory(cost: Mapping[str, Any]) -> Verdict:
    """Where a second copy of the weights doubles the peak."""
    own = cost["measured"]
    shared, copied = (own[name]["peak_gib"] / own[ORPO]["peak_gib"] for name in (DPO, "dpo --reference copy"))
    rows = cost["predicted"]
    reach = [row for row in rows if row["copy_ratio"] >= _TWICE] or [max(rows, key=lambda row: row["copy_ratio"])]
    shown = "; ".join(
        f"{row['copy_ratio']:.2f} times for {row['model'].rpartition('/')[2]} at {row['tokens']} tokens a side, "
        f"--memory {row['memory']}"
        for row in reach
    )
    return Verdict(
        "DPO takes twice the memory",
        CONFIRMED if shared >= _TWICE else f"{REFUTED}; a second copy nears it only where weights outweigh the rest",
        f"measured on {cost['model']}, {cost['tokens']} tokens a side: DPO {shared:.2f} times ORPO's peak, with a "
        f"second copy {copied:.2f} times; predicted with a second copy, the most: {shown}",
        "measured on one model, of 135M; larger ones are predicted, within a tenth; no Mac",
    )


def convergence(variant: Variant, bound: float, name: str = ORPO) -> Verdict:
    """Whether a method or DPO reaches more reward after as many steps and pair tokens, both within the KL bound."""
    label = _LABELS[name]
    curves = [(ours["curve"], theirs["curve"]) for ours, theirs in _seeds(variant, name)]
    # A training that failed has fewer looks, and those are compared that all have; the first is of the base model.
    looks = range(1, min(len(curve) for pair in curves for curve in pair))
    kls = {
        place: tuple(statistics.fmean(pair[side][place]["kl"] for pair in curves) for side in (0, 1)) for place in looks
    }
    within = [place for place in looks if max(kls[place]) <= bound]
    found = [seed_mean([a[place]["gold"] - b[place]["gold"] for a, b in curves]) for place in within]
    ps = holm({str(place): p for place, (*_, p) in zip(within, found, strict=True)})
    parted = [mean for (mean, *_), p in zip(found, ps.values(), strict=True) if p < _LEVEL]
    ahead, behind = sum(mean > 0 for mean in parted), sum(mean < 0 for mean in parted)
    steps = {place: curves[0][0][place]["step"] for place in looks}
    shown = "; ".join(
        f"step {steps[place]}: {mean:+.2f} ({low:+.2f} to {high:+.2f})"
        for place, (mean, low, high, _) in zip(within, found, strict=True)
    )
    if ahead and behind:
        verdict = f"depends on the budget: {label} is ahead at {ahead} and behind at {behind} of {len(found)} looks"
    elif ahead or behind:
        verdict = CONFIRMED if ahead else REFUTED
    else:
        verdict = f"{OPEN}: no look parts them; see what the design could find"
    limit = (
        "looks count after Holm's correction for their number; the same steps are the same pair tokens; seconds are in "
        "the costs. No comparison at equal KL"
    )
    if within:
        kl, dpo_kl = kls[within[-1]]
        rate, dpo_rate = (variant[each]["chosen"]["rate"] for each in (name, DPO))
        limit += (
            f": at the last of these looks it is {kl:.2f} nats for {label} (rate {rate:g}) and {dpo_kl:.2f} for DPO "
            f"(rate {dpo_rate:g})"
        )
    beyond = [f"step {steps[place]}" for place in looks if place not in within]
    if beyond:
        limit += f"; left out, since one of them is beyond the KL bound of {bound:g}: {', '.join(beyond)}"
    return Verdict(
        claim_of("ORPO converges faster", name),
        verdict,
        f"gold of {label} minus DPO on valid prompts, each at its tuned rate, with 95 % intervals over {len(curves)} "
        f"seeds: {shown or 'no look is within the KL bound'}",
        limit,
    )


def _seeds(variant: Variant, name: str) -> list[tuple[Any, Any]]:
    """A method's final trainings and DPO's, seed by seed."""
    return list(zip(variant[name]["seeds"], variant[DPO]["seeds"], strict=True))


class SeedMean(NamedTuple):
    """A mean over seeds."""

    mean: float
    low: float
    """Of its 95 % interval by Student's t; without bounds for one seed."""
    high: float
    p: float
    """Two-sided, of a mean of 0."""


def seed_mean(values: Sequence[float]) -> SeedMean:
    """The mean of a value for each seed."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return SeedMean(mean, -math.inf, math.inf, 1.0)
    # The 97.5 % points for few degrees of freedom (any table of Student's t), else the normal one, which is within 5 %.
    points = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    point = points[len(values) - 2] if len(values) - 2 < len(points) else 2.093
    error = statistics.stdev(values) / math.sqrt(len(values))
    p = student_p(mean / error, len(values) - 1) if error else float(mean == 0)
    return SeedMean(mean, mean - point * error, mean + point * error, p)


def sensitivity(variants: Mapping[str, Variant], name: str = ORPO) -> Verdict:
    """Whether a method or DPO loses more by a setting that was not tuned."""
    parts, signs = [], []
    for labels, variant in variants.items():
        lost, dpo_lost = (shortfall(variant[each]["tuning"]) for each in (name, DPO))
        gap = paired_bootstrap([lost], [dpo_lost])
        signs.append(-1 if gap.high < 0 else 1 if gap.low > 0 else 0)
        mean, dpo_mean = (mean_with_error([values])[0] for values in (lost, dpo_lost))
        gained, dpo_gained = (_most_gained(variant[each]) for each in (name, DPO))
        parts.append(
            f"{labels}: {mean:.2f} of {gained:.2f} for {_LABELS[name]}, {dpo_mean:.2f} of {dpo_gained:.2f} for DPO "
            f"(difference {gap.low:+.2f} to {gap.high:+.2f})"
        )
    settings = len(_grid(variant[name]["tuning"]))
    verdict = CONFIRMED if set(signs) == {-1} else REFUTED if set(signs) == {1} else OPEN
    if verdict != OPEN and settings < _REAL_GRID:
        verdict = f"{verdict} on {settings} settings; a grid of {_REAL_GRID} and more is needed to say so in general"
    return Verdict(
        claim_of("DPO's sensitivity to hyper-parameters is moderate, ORPO's low", name),
        verdict if verdict != OPEN else f"{OPEN}: the variants do not agree, or their intervals hold 0",
        f"gold lost by the average of {settings} settings of learning rate and β against the best of them, of what "
        f"that one gains over the base model within the KL bound: {'; '.join(parts)}",
        "a setting that is beyond the KL bound at its first look is worth what the base model is; a method that gains "
        "little can lose little. One seed; intervals over prompts",
    )


def _most_gained(method: Mapping[str, Any]) -> float:
    """Gold of the grid's best setting on valid prompts, less the base model's."""
    start: float = method["seeds"][0]["curve"][0]["gold"]
    best: float = max(entry["score"] for entry in _grid(method["tuning"]))
    return best - start


def shortfall(tuning: Sequence[Mapping[str, Any]]) -> list[float]:
    """For each valid prompt, the gold of the grid's best setting minus the mean over the grid."""
    grid = _grid(tuning)
    best = max(grid, key=lambda entry: entry["score"])["valid_gold"]
    columns = zip(*(entry["valid_gold"] for entry in grid), strict=True)
    return [top - statistics.fmean(column) for top, column in zip(best, columns, strict=True)]


def _grid(tuning: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first round's trainings, in which all settings took part."""
    first = min(entry["steps"] for entry in tuning)
    return [entry for entry in tuning if entry["steps"] == first]
