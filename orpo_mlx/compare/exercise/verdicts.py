"""The course chapter's claims, each a sentence with figures and a named limit.

Convergence is judged twice, since the two need not agree: by reward after as many steps, and by reward at the same KL.

ORPO is the paper's loss (Hong et al. 2024). The one that the chapter prints is another (`orpo_style`): where it took
part, the two claims that losses decide are held against it as well.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from orpo_mlx.compare import claims
from orpo_mlx.compare.claims import CONFIRMED, COPY, DPO, OPEN, ORPO, REFUTED
from orpo_mlx.compare.exercise.contenders import SAME_LOSS
from orpo_mlx.compare.exercise.significance import Difference, detectable, holm, paired_bootstrap

CHAPTERS = "orpo_style"
_LABELS = {ORPO: "ORPO", CHAPTERS: "the chapter's loss"}
Variant = Mapping[str, Mapping[str, Any]]
"""A variant of a tier in `results.json`: methods by name."""
Figures = list[dict[str, Any]]

# Settings from which a grid says something of a method: four rates by three strengths.
_REAL_GRID = 12
_LEVEL = 0.05
# Of a final training's steps: looks nearer to each other say the same again.
_QUARTERS = (0.25, 0.5, 0.75, 1.0)
# "Twice", of peaks that are predicted within a tenth.
_TWICE = 1.9
# More than peaks differ by from run to run.
_MORE = 1.1


class Verdict(NamedTuple):
    """One claim."""

    claim: str
    verdict: str
    measured: str
    limit: str
    """What the measurement does not say."""
    figures: Figures
    """What the verdict was drawn from, where that is in no other table."""


def verdicts(results: Mapping[str, Any]) -> list[Verdict]:
    """All of them; none holds a time, which differs from run to run."""
    exact = results["tiers"]["exact"]
    losses = [name for name in _LABELS if name in next(iter(exact["variants"].values()))]
    return [
        reference(results["cost"]),
        phases(results["cost"]),
        memory(results["cost"]),
        *(convergence(exact, name) for name in losses),
        *(sensitivity(exact["variants"], name) for name in losses),
    ]


def _said(holds: bool) -> str:
    return CONFIRMED if holds else REFUTED


def claim_of(claim: str, name: str) -> str:
    """A claim about ORPO, and which loss that is where it is not the paper's."""
    return claim if name == ORPO else f"{claim} (the chapter's own loss, {name})"


def reference(cost: Mapping[str, Any]) -> Verdict:
    """Whether DPO needs a second model."""
    own = cost["measured"]
    needed = own[DPO]["forward_tokens"] > 0 and own[ORPO]["forward_tokens"] == 0
    second = own[DPO]["peak_gib"] >= _MORE * own[ORPO]["peak_gib"]
    return Verdict(
        claims.REFERENCE,
        f"{_said(needed)} for reference log-probs, {_said(second)} for a second model",
        f"DPO's reference is its own weights with the adapters off: a step's peak is {own[DPO]['peak_gib']:.2f} GiB, "
        f"ORPO's {own[ORPO]['peak_gib']:.2f}",
        "LoRA; full fine-tuning computes the reference before the first step instead",
        [],
    )


def phases(cost: Mapping[str, Any]) -> Verdict:
    """Whether DPO takes two phases."""
    own = cost["measured"]
    forward = own[DPO]["forward_tokens"] > own[ORPO]["forward_tokens"]
    return Verdict(
        claims.PHASES,
        f"{REFUTED} for a second training, {_said(forward)} for a second forward pass",
        f"one command and one loop; over {own[DPO]['steps']} steps DPO runs {own[DPO]['forward_tokens']} tokens "
        f"forward without gradient, ORPO {own[ORPO]['forward_tokens']}; once per pair, however many epochs",
        "the supervised training that a chapter puts before DPO is a choice of data, needed by neither loss",
        [],
    )


def memory(cost: Mapping[str, Any]) -> Verdict:
    """Where a second copy of the weights doubles the peak."""
    own = cost["measured"]
    shared, copied = (own[name]["peak_gib"] / own[ORPO]["peak_gib"] for name in (DPO, COPY))
    rows = cost["predicted"]
    reach = [row for row in rows if row["copy_ratio"] >= _TWICE] or [max(rows, key=lambda row: row["copy_ratio"])]
    shown = "; ".join(
        f"{row['copy_ratio']:.2f} times for {row['model'].rpartition('/')[2]} at {row['tokens']} tokens a side, "
        f"--memory {row['memory']}"
        for row in reach
    )
    return Verdict(
        claims.MEMORY,
        CONFIRMED if shared >= _TWICE else f"{REFUTED}; a second copy nears it only where weights outweigh the rest",
        f"measured on {cost['model']}, {cost['tokens']} tokens a side: DPO {shared:.2f} times ORPO's peak, with a "
        f"second copy {copied:.2f} times; predicted with a second copy, the most: {shown}",
        "measured on one model, of 135M; larger ones are predicted, within a tenth; no Mac",
        [],
    )


def convergence(tier: Mapping[str, Any], name: str = ORPO) -> Verdict:
    """Whether a method or DPO has more reward after as many steps and pair tokens, and which has more at equal KL.

    A difference counts if it is significant and its interval lies beyond every one of the same kind between two
    contenders that have one loss: settings are tuned, and tuning parts even those.
    """
    label, bound = _LABELS[name], tier["size"]["kl_bound"]
    quarters = (round(share * tier["size"]["rounds"][-1]["steps"]) for share in _QUARTERS)
    steps = sorted({step for step in quarters if step})
    figures: Figures = []
    controls: Figures = []
    words = []
    for labels, variant in tier["variants"].items():
        analysis = tier["analysis"]["variants"][labels]["at_kl"]
        looks = at_steps(variant, (name, DPO), steps, bound)
        at_kl = at_targets(analysis, name)
        figures += [{"variant": labels, **figure} for figure in (*looks, *at_kl)]
        said = [*map(_at_step, looks), *map(_at_target, at_kl)] or ["no look of all seeds is within the KL bound"]
        words.append(f"{labels}: {', '.join(said)}")
        if set(SAME_LOSS) <= set(variant):
            controls += at_steps(variant, SAME_LOSS, steps, bound)
        controls += [{"kl": kl, **at["control"]} for kl, at in analysis.items() if "control" in at]
    decided, margins = {}, []
    for kind, said_of in (("step", "by steps"), ("kl", "at equal KL")):
        ends = (abs(each[end]) for each in controls if kind in each for end in ("low", "high"))
        margin = max(ends, default=0.0)
        decided[said_of] = _decided([figure for figure in figures if kind in figure], figures, margin)
        margins.append(_power(figures, kind, said_of, margin))
    same = len(set(decided.values())) == 1
    return Verdict(
        claim_of(claims.CONVERGENCE, name),
        decided["by steps"] if same else "; ".join(f"{said_of} {word}" for said_of, word in decided.items()),
        f"gold of {label} minus DPO's, each at its tuned rate, with 95 % intervals: {'; '.join((*words, *margins))}",
        "the exact tier alone; steps: on valid prompts, which the settings were tuned on, where all seeds of both are "
        f"within the KL bound of {bound:g}, intervals over seeds; KL: on test prompts; each as far as both came. p "
        "after Holm's correction over the looks, or the KLs, of one kind of labels. The same steps are the same pair "
        "tokens; seconds are in the costs",
        figures,
    )


def at_steps(variant: Variant, pair: tuple[str, str], steps: Iterable[int], bound: float) -> Figures:
    """Gold of one method minus another's after as many steps, where all seeds of both were within the bound."""
    found: dict[int, Difference] = {}
    ours, theirs = (variant[name]["seeds"] for name in pair)
    for step in steps:
        looks = [[_look(seed["curve"], step, bound) for seed in both] for both in zip(ours, theirs, strict=True)]
        gaps = [one["gold"] - other["gold"] for one, other in looks if one and other]
        if len(gaps) == len(looks):
            found[step] = paired_bootstrap([[each] for each in gaps], [[0.0]] * len(gaps))
    return _together("step", {step: gap._asdict() for step, gap in found.items()})


def _look(curve: Sequence[Mapping[str, Any]], step: int, bound: float) -> Mapping[str, Any] | None:
    return next((look for look in curve if look["step"] == step and look["kl"] <= bound), None)


def at_targets(at_kl: Mapping[str, Any], name: str) -> Figures:
    """Gold of a method minus DPO's where both had the same KL."""
    return _together(
        "kl", {kl: at["differences"][name] for kl, at in at_kl.items() if name in at.get("differences", {})}
    )


def _together(kind: str, gaps: Mapping[Any, Mapping[str, float]]) -> Figures:
    """Differences that are tested together."""
    corrected = holm({str(place): gap["p"] for place, gap in gaps.items()})
    return [
        {
            kind: place,
            **{key: gap[key] for key in ("mean", "low", "high", "p")},
            "p_holm": corrected[str(place)],
            "detectable": detectable(gap["standard_error"], len(gaps), gap["freedom"]),
        }
        for place, gap in gaps.items()
    ]


def _at_step(figure: Mapping[str, Any]) -> str:
    return f"step {figure['step']} {_interval(figure)}"


def _at_target(figure: Mapping[str, Any]) -> str:
    return f"KL {figure['kl']} {_interval(figure)}"


def _interval(figure: Mapping[str, Any]) -> str:
    return f"{figure['mean']:+.2f} ({figure['low']:+.2f} to {figure['high']:+.2f})"


def _power(figures: Figures, kind: str, said: str, margin: float) -> str:
    """What would have been found, and what counts."""
    least = [figure["detectable"] for figure in figures if kind in figure]
    if not least:
        return f"{said} nothing was compared"
    control = (
        f"an interval that is not beyond {margin:.3f}, as far as that of two tunings of one loss goes, does not count"
        if margin
        else "there are no two tunings of one loss to hold it against"
    )
    return f"{said} {min(least):.3f} to {max(least):.3f} would be found with a chance of 80 %, and {control}"


def _decided(own: Figures, figures: Figures, margin: float) -> str:
    """What the differences of a kind say together: those that count must point one way."""
    counted = [figure for figure in own if figure["p_holm"] < _LEVEL and _nearest(figure) > margin]
    ahead = {figure["variant"] for figure in counted if figure["mean"] > 0}
    behind = {figure["variant"] for figure in counted if figure["mean"] < 0}
    if ahead and behind:
        return f"not the same everywhere (ahead somewhere at {_named(ahead)}, behind somewhere at {_named(behind)})"
    if not counted:
        return OPEN
    every = {figure["variant"] for figure in figures}
    where = "" if (ahead or behind) == every else f" at {_named(ahead or behind)}, elsewhere {OPEN}"
    return f"{CONFIRMED if ahead else REFUTED}{where}"


def _nearest(figure: Mapping[str, Any]) -> float:
    """How far from 0 the interval's nearest end is; 0 where 0 is within."""
    return float(max(figure["low"], -figure["high"], 0.0))


def _named(variants: Iterable[str]) -> str:
    return " and ".join(sorted(variants))


def sensitivity(variants: Mapping[str, Variant], name: str = ORPO) -> Verdict:
    """Whether a method or DPO loses more of what it can gain by a setting that was not tuned: over all rates, and over
    the lower half of them, at which few settings leave the KL bound at once."""
    parts: list[str] = []
    figures: Figures = []
    for labels, variant in variants.items():
        for range_name, lower in (("all rates", False), ("lower rates", True)):
            lost, dpo_lost = (share_lost(variant[each], lower=lower) for each in (name, DPO))
            gap = paired_bootstrap([lost], [dpo_lost])
            ours, theirs = statistics.fmean(lost), statistics.fmean(dpo_lost)
            figures.append(
                {
                    **{"variant": labels, "rates": range_name, "lost": ours, "lost_by_dpo": theirs},
                    **{"low": gap.low, "high": gap.high},
                    "detectable": detectable(gap.standard_error, 1, gap.freedom),
                }
            )
            parts.append(
                f"{labels}, {range_name}: {ours:.0%} for {_LABELS[name]}, {theirs:.0%} for DPO (difference "
                f"{gap.low:+.0%} to {gap.high:+.0%})"
            )
    least = [float(figure["detectable"]) for figure in figures]
    parts.append(f"differences of {min(least):.0%} to {max(least):.0%} would be found with a chance of 80 %")
    settings = len(_grid(variants[next(iter(variants))][name]["tuning"]))
    signs = {
        each: {_sign(figure) for figure in figures if figure["rates"] == each} for each in ("all rates", "lower rates")
    }
    by_range = [CONFIRMED if each == {-1} else REFUTED if each == {1} else OPEN for each in signs.values()]
    verdict = (
        by_range[0]
        if len(set(by_range)) == 1
        else "; ".join(f"over {each} {word}" for each, word in zip(signs, by_range, strict=True))
    )
    if settings < _REAL_GRID:
        verdict += f", on {settings} settings: a grid of {_REAL_GRID} and more is needed to say so in general"
    return Verdict(
        claim_of(claims.SENSITIVITY, name),
        verdict,
        f"share of what the best of {settings} settings of learning rate and β gains over the base model within the KL "
        f"bound that the average of them loses: {'; '.join(parts)}",
        "a setting that is beyond the KL bound at its first look is worth what the base model is, which high rates are "
        "first; which values of β make a grid is a choice. One seed; intervals over prompts, the gain taken as known",
        figures,
    )


def _sign(figure: Mapping[str, Any]) -> int:
    return -1 if figure["high"] < 0 else 1 if figure["low"] > 0 else 0


def share_lost(method: Mapping[str, Any], *, lower: bool) -> list[float]:
    """For each valid prompt, the gold of the grid's best setting minus the grid's mean, over the best setting's gain.

    `lower` takes the lower half of the rates alone. Where nothing is gained nothing can be lost: 0.
    """
    grid = _grid(method["tuning"])
    rates = sorted({entry["rate"] for entry in grid})
    if lower:
        grid = [entry for entry in grid if entry["rate"] <= rates[(len(rates) - 1) // 2]]
    best = max(grid, key=lambda entry: entry["score"])
    gain = best["score"] - method["seeds"][0]["curve"][0]["gold"]
    columns = zip(*(entry["valid_gold"] for entry in grid), strict=True)
    lost = [top - statistics.fmean(column) for top, column in zip(best["valid_gold"], columns, strict=True)]
    return [each / gain if gain > 0 else 0.0 for each in lost]


def _grid(tuning: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first round's trainings, in which all settings took part."""
    first = min(entry["steps"] for entry in tuning)
    return [entry for entry in tuning if entry["steps"] == first]
