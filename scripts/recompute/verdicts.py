"""The sentences of the claims: their figures again from raw ones, their words again from the figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from scripts.recompute.statistics import detectable, difference, holm
from scripts.recompute.tiers import SAME_LOSS, Pair, Row

LOSSES = {"orpo": "", "orpo_style": " (the chapter's own loss, orpo_style)"}
CONFIRMED, REFUTED, OPEN = "confirmed", "refuted", "not decided"
_COPY = "dpo --reference copy"


def verdicts(results: Mapping[str, Any]) -> Iterator[Pair]:
    """Of all claims; they are the exact tier's."""
    if "exact" not in results["tiers"]:
        return
    exact, published = results["tiers"]["exact"], {each["claim"]: each for each in results["verdicts"]}
    yield from _costs(results["cost"], published)
    for method, which in LOSSES.items():
        if method in next(iter(exact["variants"].values())):
            yield from _convergence(published[f"ORPO converges faster{which}"], exact, method)
            claim = f"DPO's sensitivity to hyper-parameters is moderate, ORPO's low{which}"
            yield from _sensitivity(published[claim], exact["variants"], method)


def _costs(cost: Mapping[str, Any], published: Mapping[str, Row]) -> Iterator[Pair]:
    orpo, dpo, copy = (cost["measured"][name] for name in ("orpo", "dpo", _COPY))
    words = {True: CONFIRMED, False: REFUTED}
    forward = words[dpo["forward_tokens"] > orpo["forward_tokens"]]
    second = words[dpo["peak_gib"] >= 1.1 * orpo["peak_gib"]]
    needs, phases, twice = list(published.values())[:3]
    yield "reference", needs["verdict"], f"{forward} for reference log-probs, {second} for a second model"
    yield "phases", phases["verdict"], f"{REFUTED} for a second training, {forward} for a second forward pass"
    ratios = [f"{each['peak_gib'] / orpo['peak_gib']:.2f} times" for each in (dpo, copy)]
    yield "memory", twice["verdict"].split(";")[0], words[dpo["peak_gib"] >= 1.9 * orpo["peak_gib"]]
    yield "memory, measured", [ratio in twice["measured"] for ratio in ratios], [True, True]
    most = max(row["copy_ratio"] for row in cost["predicted"])
    yield "memory, predicted", f"{most:.2f} times" in twice["measured"], True
    for row in cost["predicted"]:
        ratio = 1 + row["weights_gib"] / row["peak_gib"]
        # All three were rounded to two digits.
        yield f"a second copy adds the weights, so {ratio:.2f} times", abs(row["copy_ratio"] - ratio) < 0.015, True


def _convergence(verdict: Row, tier: Mapping[str, Any], method: str) -> Iterator[Pair]:
    figures: list[Row] = []
    apart = {"step": 0.0, "kl": 0.0}
    for variant, methods in tier["variants"].items():
        for key, found in _gaps(tier, methods, method, "dpo").items():
            figures += _labelled(variant, key, found)
        if all(name in methods for name in SAME_LOSS):
            for key, found in _gaps(tier, methods, *SAME_LOSS).items():
                apart[key] = max([apart[key], *(max(abs(gap["low"]), abs(gap["high"])) for gap in found.values())])
    yield f"convergence of {method}", verdict["figures"], figures
    yield f"convergence of {method}, verdict", verdict["verdict"], _said(figures, apart)
    for key, value in apart.items():
        least = [figure["detectable"] for figure in figures if key in figure]
        power = f"{min(least):.3f} to {max(least):.3f} would be found" if least else "nothing was compared"
        yield f"convergence of {method}, {power} is said", power in verdict["measured"], True
        if least and value:
            said = f"not beyond {value:.3f}, as far as that of two tunings of one loss goes"
            yield f"convergence of {method}, {said} is said", said in verdict["measured"], True
    for figure in figures:
        shown = f"{figure['mean']:+.2f} ({figure['low']:+.2f} to {figure['high']:+.2f})"
        what = f"step {figure['step']}" if "step" in figure else f"KL {figure['kl']}"
        yield f"convergence of {method}: {what} {shown} is said", f"{what} {shown}" in verdict["measured"], True


def _gaps(tier: Mapping[str, Any], methods: Mapping[str, Any], one: str, other: str) -> dict[str, dict[Any, Row]]:
    return {"step": dict(_by_step(tier, methods, one, other)), "kl": dict(_by_kl(methods, one, other))}


def _by_step(tier: Mapping[str, Any], methods: Mapping[str, Any], one: str, other: str) -> dict[int, Row]:
    longest, bound = tier["size"]["rounds"][-1]["steps"], tier["size"]["kl_bound"]
    pairs = list(zip(methods[one]["seeds"], methods[other]["seeds"], strict=True))
    found = {}
    for step in (round(longest * quarter / 4) for quarter in (1, 2, 3, 4)):
        looks = [[look for look in seed["curve"] if look["step"] == step] for pair in pairs for seed in pair]
        if step and all(len(look) == 1 and look[0]["kl"] <= bound for look in looks):
            gaps = [[ours[0]["gold"] - theirs[0]["gold"]] for ours, theirs in zip(looks[::2], looks[1::2], strict=True)]
            found[step] = difference(np.array(gaps))
    return found


def _by_kl(methods: Mapping[str, Any], one: str, other: str) -> dict[str, Row]:
    pairs = list(zip(methods[one]["seeds"], methods[other]["seeds"], strict=True))
    found = {}
    for target in sorted({kl for pair in pairs for seed in pair for kl in seed["at_kl"]}, key=float):
        golds = [[seed["at_kl"].get(target, {}).get("gold") for seed in pair] for pair in pairs]
        if all(ours is not None and theirs is not None for ours, theirs in golds):
            found[target] = difference(np.array([np.subtract(ours, theirs) for ours, theirs in golds]))
    return found


def _labelled(variant: str, key: str, found: Mapping[Any, Row]) -> list[Row]:
    corrected = holm({str(place): gap["p"] for place, gap in found.items()})
    return [
        {
            "variant": variant, key: place, **{each: gap[each] for each in ("mean", "low", "high", "p")},
            "p_holm": corrected[str(place)],
            "detectable": detectable(gap["standard_error"], len(found), gap["freedom"]),
        }
        for place, gap in found.items()
    ]  # fmt: skip


def _said(figures: list[Row], apart: Mapping[str, float]) -> str:
    by_step, by_kl = (_direction(figures, key, apart[key]) for key in ("step", "kl"))
    return by_step if by_step == by_kl else f"by steps {by_step}; at equal KL {by_kl}"


def _direction(figures: list[Row], key: str, apart: float) -> str:
    sides: dict[bool, set[str]] = {True: set(), False: set()}
    for figure in figures:
        beyond = figure["low"] > apart or figure["high"] < -apart
        if key in figure and figure["p_holm"] < 0.05 and beyond:
            sides[figure["mean"] > 0].add(figure["variant"])
    named = {side: " and ".join(sorted(found)) for side, found in sides.items()}
    if named[True] and named[False]:
        return f"not the same everywhere (ahead somewhere at {named[True]}, behind somewhere at {named[False]})"
    if not named[True] and not named[False]:
        return OPEN
    side = bool(named[True])
    everywhere = sides[side] == {figure["variant"] for figure in figures}
    return (CONFIRMED if side else REFUTED) + ("" if everywhere else f" at {named[side]}, elsewhere {OPEN}")


def _sensitivity(verdict: Row, variants: Mapping[str, Any], method: str) -> Iterator[Pair]:
    figures: list[Row] = []
    for variant, methods in variants.items():
        for rates in ("all rates", "lower rates"):
            ours, theirs = (_lost(methods[name], rates == "lower rates") for name in (method, "dpo"))
            gap = difference(np.array([ours]) - np.array([theirs]))
            lost = {"lost": float(np.mean(ours)), "lost_by_dpo": float(np.mean(theirs))}
            power = detectable(gap["standard_error"], 1, gap["freedom"])
            ends = {"low": gap["low"], "high": gap["high"]}
            figures.append({"variant": variant, "rates": rates, **lost, **ends, "detectable": power})
            said = (
                f"{variant}, {rates}: {lost['lost']:.0%} for {'ORPO' if method == 'orpo' else 'the chapter'}",
                f"{lost['lost_by_dpo']:.0%} for DPO (difference {gap['low']:+.0%} to {gap['high']:+.0%})",
            )
            yield f"sensitivity of {method}, {said} is said", [each in verdict["measured"] for each in said], [True] * 2
    yield f"sensitivity of {method}", verdict["figures"], figures
    least = [figure["detectable"] for figure in figures]
    found = f"{min(least):.0%} to {max(least):.0%} would be found"
    yield f"sensitivity of {method}, {found} is said", found in verdict["measured"], True
    words = []
    for rates in ("all rates", "lower rates"):
        own = [figure for figure in figures if figure["rates"] == rates]
        low, high = all(each["high"] < 0 for each in own), all(each["low"] > 0 for each in own)
        words.append(CONFIRMED if low else REFUTED if high else OPEN)
    expected = words[0] if words[0] == words[1] else f"over all rates {words[0]}; over lower rates {words[1]}"
    yield f"sensitivity of {method}, verdict", verdict["verdict"].split(", on ")[0], expected


def _lost(method: Row, lower: bool) -> list[float]:
    shortest = min(entry["steps"] for entry in method["tuning"])
    grid = [entry for entry in method["tuning"] if entry["steps"] == shortest]
    if lower:
        rates = sorted({entry["rate"] for entry in grid})
        kept = rates[: (len(rates) + 1) // 2]
        grid = [entry for entry in grid if entry["rate"] in kept]
    table = np.array([entry["valid_gold"] for entry in grid])
    # Published scores are rounded, and so decide between equals.
    best = int(np.argmax([entry["score"] for entry in grid]))
    gain = grid[best]["score"] - method["seeds"][0]["curve"][0]["gold"]
    lost: list[float] = ((table[best] - table.mean(axis=0)) / gain).tolist() if gain > 0 else [0.0] * table.shape[1]
    return lost
