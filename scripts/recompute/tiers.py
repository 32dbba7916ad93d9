"""A tier's whole `analysis` again, in its published shape, and whether raw figures agree with each other."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from scripts.recompute.statistics import detectable, difference, holm, mean_and_error, student, variance_of_mean

BASELINE = "dpo"
SAME_LOSS = ("chapter's step", "orpo_style")
SANITY_ALPHA = 0.01
Row = dict[str, Any]


def analysis(tier: Mapping[str, Any]) -> dict[str, Any]:
    """What is published of a tier besides its raw figures."""
    found: dict[str, Any] = {
        "base": {key: mean_and_error([values]) for key, values in tier["base"].items()},
        "variants": {name: _variant(methods, tier["base"]["gold"]) for name, methods in tier["variants"].items()},
    }
    first, *others = tier["variants"].values()
    if others and all("tokens" in seed["test"] for method in first.values() for seed in method["seeds"]):
        before = _measured(first, "tokens")
        found["lengths"] = {
            variant: _with_holm(
                {name: difference(table - before[name]) for name, table in _measured(of, "tokens").items()}
            )
            for variant, of in zip(list(tier["variants"])[1:], others, strict=True)
        }
    if "tokens" in tier["base"] and tier["size"].get("fixed_steps"):
        start = sum(tier["base"]["tokens"]) / len(tier["base"]["tokens"])
        found["tokens_at_kl"] = {name: _tokens_at_kl(methods, start) for name, methods in tier["variants"].items()}
    if "sanity" in tier:
        found["sanity"] = _sanity(tier["sanity"])
    return found


def _variant(methods: Mapping[str, Any], base: list[float]) -> Row:
    measures = {
        name: {
            key: mean_and_error([seed["test"][key] for seed in method["seeds"]]) for key in method["seeds"][0]["test"]
        }
        for name, method in methods.items()
    }
    at_kl = {target: _at_kl(methods, target) for target in _targets(methods)}
    gold = _measured(methods, "gold")
    gains = _with_holm({name: difference(table - np.array(base)) for name, table in gold.items()})
    return {"methods": measures, "gains": gains, **_compared(gold), "at_kl": at_kl}


def _targets(methods: Mapping[str, Any]) -> list[str]:
    seeds = [seed for method in methods.values() for seed in method["seeds"]]
    return sorted({kl for seed in seeds for kl in seed.get("at_kl", {})}, key=float)


def _at_kl(methods: Mapping[str, Any], target: str) -> Row:
    there = {
        name: [seed["at_kl"][target] for seed in method["seeds"] if target in seed.get("at_kl", {})]
        for name, method in methods.items()
    }
    full = {name: seeds for name, seeds in there.items() if len(seeds) == len(methods[name]["seeds"])}
    means = {
        name: {**mean_and_error([s["gold"] for s in seeds]), "step": sum(s["step"] for s in seeds) / len(seeds)}
        for name, seeds in full.items()
    }
    golds = {name: np.array([seed["gold"] for seed in seeds]) for name, seeds in full.items()}
    return {"reached": {name: len(each) for name, each in there.items()}, "methods": means, **_compared(golds)}


def _tokens_at_kl(methods: Mapping[str, Any], start: float) -> Row:
    found: Row = {}
    for target in _targets(methods):
        tokens = {
            name: np.array([[_tokens(seed, target, start)] for seed in method["seeds"]])
            for name, method in methods.items()
            if all(target in seed["at_kl"] for seed in method["seeds"])
        }
        others = [name for name in tokens if name != BASELINE and BASELINE in tokens]
        found[target] = {
            "methods": {name: mean_and_error(table.tolist()) for name, table in tokens.items()},
            "differences": _with_holm({name: difference(tokens[name] - tokens[BASELINE]) for name in others}),
        }
    return found


def _tokens(seed: Row, target: str, start: float) -> float:
    """A training's mean tokens at a KL, as far between the looks around it as its step is."""
    step = seed["at_kl"][target]["step"]
    looks = [{**look, "tokens": look.get("tokens", start)} for look in seed["curve"]]
    for before, after in itertools.pairwise(looks):
        if step <= after["step"]:
            share = (step - before["step"]) / (after["step"] - before["step"])
            return float(before["tokens"] + share * (after["tokens"] - before["tokens"]))
    return float(looks[-1]["tokens"])


def _compared(gold: dict[str, Any]) -> Row:
    found: Row = {}
    if BASELINE in gold and len(gold) > 1:
        gaps = {name: difference(table - gold[BASELINE]) for name, table in gold.items() if name != BASELINE}
        found["differences"] = _with_holm(gaps)
        least = sorted(gap["detectable"] for gap in found["differences"].values())
        middle = (least[(len(least) - 1) // 2] + least[len(least) // 2]) / 2
        found["detectable"] = {"least": least[0], "median": middle, "most": least[-1]}
    if all(name in gold for name in SAME_LOSS):
        found["control"] = difference(gold[SAME_LOSS[0]] - gold[SAME_LOSS[1]])
    return found


def _with_holm(gaps: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    corrected = holm({name: gap["p"] for name, gap in gaps.items()})
    return {
        name: {
            **gap,
            "p_holm": corrected[name],
            "detectable": detectable(gap["standard_error"], len(gaps), gap["freedom"]),
        }
        for name, gap in gaps.items()
    }


def _measured(methods: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: np.array([seed["test"][key] for seed in each["seeds"]]) for name, each in methods.items()}


def _sanity(raw: list[dict[str, Any]]) -> Row:
    rows = [_sanity_row(method) for method in raw]
    tested = [row for row in rows if row["null"] is not None]
    corrected = holm({row["name"]: row["null"]["p"] for row in tested})
    for row in tested:
        null = row["null"]
        null["p_holm"] = corrected[row["name"]]
        null["detectable"] = detectable(null["standard_error"], len(tested), null["freedom"], SANITY_ALPHA)
    for row in rows:
        learned = row["null"] is not None and row["null"]["p_holm"] < SANITY_ALPHA
        row["holds"] = row["mirrors"] and not learned
    return {"alpha": SANITY_ALPHA, "methods": rows, "failed": [row["name"] for row in rows if not row["holds"]]}


def _sanity_row(method: dict[str, Any]) -> Row:
    wins = _bits(method["wins"])
    given, swapped = (sum(wins[labels]) / len(wins[labels]) for labels in ("given", "swapped"))
    mirror = difference(np.array([wins["given"]], float) - np.array([wins["swapped"]], float))
    shuffled = _with_mirrors(wins)
    values = [each - 0.5 for each in shuffled]
    row: Row = {
        "name": method["name"], "pairs": len(wins["given"]), "given": given, "swapped": swapped, "mirror": mirror,
        "mirrors": mirror["low"] > 0 and swapped < 0.5,
        "shuffled": {"mean": sum(shuffled) / len(shuffled), "low": min(shuffled), "high": max(shuffled)},
    }  # fmt: skip
    center = 0.5
    if method["likelihood"]:
        alone = _with_mirrors(_bits(method["likelihood_wins"]))
        row["likelihood_alone"] = sum(alone) / len(alone)
        values, center = [ours - theirs for ours, theirs in zip(shuffled, alone, strict=True)], 0.0
    row["null"] = _null(values, center) if any(each + center for each in values) else None
    return row


def _null(values: list[float], center: float) -> Row:
    mean, error, freedom = sum(values) / len(values), math.sqrt(variance_of_mean(values)), len(values) - 1
    p = student(mean / error, freedom) if error else float(mean == 0)
    return {"mean": mean + center, "standard_error": error, "freedom": freedom, "p": p}


def _bits(wins: dict[str, str]) -> dict[str, list[int]]:
    return {labels: [int(bit) for bit in each] for labels, each in wins.items()}


def _with_mirrors(wins: dict[str, list[int]]) -> list[float]:
    names = [name for name in wins if name.startswith("shuffle") and not name.endswith("mirrored")]
    share = {name: sum(each) / len(each) for name, each in wins.items()}
    return [(share[name] + share[name + " mirrored"]) / 2 for name in names]


Pair = tuple[str, Any, Any]
"""What, as published, as recomputed."""


def raw_figures(tier: Mapping[str, Any]) -> Iterator[Pair]:
    """Raw figures that follow from others: the best look, what was chosen, gold at a KL; and whether all are there."""
    size = tier["size"]
    bound = size["kl_bound"]
    for variant, methods in tier["variants"].items():
        yield f"{variant}, methods", set(methods), set(size["contenders"])
        yield f"{variant}, seeds", {len(method["seeds"]) for method in methods.values()}, {size["seeds"]}
        for name, method in methods.items():
            what = f"{variant} {name}"
            yield f"{what}, chosen", method["chosen"], _chosen(method["tuning"], method["chosen"])
            for entry in method["tuning"]:
                yield f"{what}, score", entry["score"], statistics.fmean(entry["valid_gold"])
                yield f"{what}, KL of a score within the bound", entry["kl"] <= bound, True
            for number, seed in enumerate(method["seeds"]):
                yield from _of_seed(f"{what}, seed {number}", seed, bound, method["chosen"].get("step"))


def _chosen(tuning: list[Row], chosen: Row) -> Row:
    """The best of the longest trainings under the most seeds; of equal ones the first."""
    last = max((entry["steps"], entry.get("seeds", 1)) for entry in tuning)
    among = [entry for entry in tuning if (entry["steps"], entry.get("seeds", 1)) == last]
    entry = max(among, key=lambda each: each["score"])
    fixed = {"step": entry["step"]} if "step" in chosen else {}
    return {"rate": entry["rate"], "strength": entry["strength"], **fixed}


def _of_seed(what: str, seed: Row, bound: float, judged_at: int | None) -> Iterator[Pair]:
    curve = seed["curve"]
    if judged_at is None:
        within = [place for place, look in enumerate(curve) if place == 0 or look["kl"] <= bound]
        yield f"{what}, best", seed["best"], max(within, key=lambda place: (curve[place]["gold"], -place))
        yield f"{what}, gold on valid", curve[seed["best"]]["gold"], statistics.fmean(seed["valid_gold"])
    elif seed["failed"] is None:
        yield f"{what}, judged at", curve[seed["best"]]["step"], judged_at
    if "test_curve" not in seed:
        return
    course = {look["step"]: look for look in seed["test_curve"]}
    best = course[curve[seed["best"]]["step"]]
    for key in ("gold", "kl"):
        yield f"{what}, {key} on test", best[key], statistics.fmean(seed["test"][key])
    steps = [look["step"] for look in curve]
    for target, at in seed["at_kl"].items():
        after = next(step for step in steps if step >= at["step"] - 1e-9)
        before = course[steps[steps.index(after) - 1]]
        share = (math.sqrt(float(target)) - math.sqrt(before["kl"])) / (
            math.sqrt(course[after]["kl"]) - math.sqrt(before["kl"])
        )
        yield f"{what}, KL {target} lies between two looks", -1e-3 <= share <= 1 + 1e-3, True
        # Of KLs that were rounded before the roots were taken.
        for key, mine, slack in (("step", at["step"], 5e-3), ("gold", statistics.fmean(at["gold"]), 2e-4)):
            again = before[key] + share * (course[after][key] - before[key])
            yield f"{what}, {key} at KL {target} is {again:.4f}", abs(mine - again) < slack, True
