"""What a tier's raw figures say: means with errors, differences with corrected p values, power, sanity."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orpo_mlx.compare.exercise.contenders import BASELINE, SAME_LOSS
from orpo_mlx.compare.exercise.significance import (
    Difference,
    NullTest,
    detectable,
    holm,
    mean_with_error,
    null_test,
    paired_bootstrap,
    rounded,
)

Study = Mapping[str, Any]
"""What `study.run_study` returns; docs/results.md has the keys."""

# Chance that a sound command fails its sanity checks, all of them together (by Holm's procedure).
SANITY_ALPHA = 0.01


def analyse(study: Study) -> dict[str, Any]:
    """Everything that is published of a tier besides its raw figures, from those alone."""
    found: dict[str, Any] = {
        "base": {key: _mean_and_error([values]) for key, values in study["base"].items() if _per_prompt(values)},
        "variants": {
            name: analyse_variant(variant, study["base"]["gold"]) for name, variant in study["variants"].items()
        },
    }
    lengths = analyse_lengths(study["variants"])
    if lengths:
        found["lengths"] = lengths
    at_kl = {name: tokens_at_kl(variant, study) for name, variant in study["variants"].items()}
    if any(at_kl.values()):
        found["tokens_at_kl"] = at_kl
    if "sanity" in study:
        found["sanity"] = analyse_sanity(study["sanity"])
    cleaned: dict[str, Any] = rounded(found)
    return cleaned


def analyse_variant(variant: Mapping[str, Any], base: Sequence[float]) -> dict[str, Any]:
    """Means over seeds and prompts of each method, and its difference in gold to the base model's and the baseline's.

    `base` is the base model's gold on each test prompt.
    """
    methods = {}
    for name, method in variant.items():
        tests = [seed["test"] for seed in method["seeds"]]
        measures = [key for key, values in tests[0].items() if _per_prompt(values)]
        methods[name] = {key: _mean_and_error([test[key] for test in tests]) for key in measures}
    found: dict[str, Any] = {"methods": methods}
    gold = {name: [seed["test"]["gold"] for seed in method["seeds"]] for name, method in variant.items()}
    found["gains"] = _corrected({name: paired_bootstrap(each, [base] * len(each)) for name, each in gold.items()})
    found |= compared(gold)
    found["at_kl"] = {target: _at_kl(variant, target) for target in _targets(variant)}
    return found


Gold = Mapping[str, Sequence[Sequence[float]]]
"""Of each method, for each seed, a value for each prompt."""


def compared(gold: Gold) -> dict[str, Any]:
    """`differences` of each method to the baseline, with what would have been found of each (`detectable`); `control`,
    the difference of the two contenders with one loss. Nothing of what takes no part."""
    found: dict[str, Any] = {}
    if BASELINE in gold and len(gold) > 1:
        found["differences"] = _corrected(
            {name: paired_bootstrap(gold[name], gold[BASELINE]) for name in gold if name != BASELINE}
        )
        least = [each["detectable"] for each in found["differences"].values()]
        found["detectable"] = {"least": min(least), "median": statistics.median(least), "most": max(least)}
    if set(SAME_LOSS) <= set(gold):
        ours, theirs = SAME_LOSS
        found["control"] = paired_bootstrap(gold[ours], gold[theirs])._asdict()
    return found


def _targets(variant: Mapping[str, Any]) -> list[str]:
    """The KLs at which any final training was measured."""
    found = {target for method in variant.values() for seed in method["seeds"] for target in seed.get("at_kl", ())}
    return sorted(found, key=float)


def _at_kl(variant: Mapping[str, Any], target: str) -> dict[str, Any]:
    """Each method where its KL was this much, of those that reached it under every seed; and how many seeds did."""
    seeds = {
        name: [seed["at_kl"][target] for seed in method["seeds"] if target in seed.get("at_kl", ())]
        for name, method in variant.items()
    }
    full = {name: each for name, each in seeds.items() if len(each) == len(variant[name]["seeds"])}
    gold = {name: [seed["gold"] for seed in each] for name, each in full.items()}
    return {
        "reached": {name: len(each) for name, each in seeds.items()},
        "methods": {
            name: {**_mean_and_error(gold[name]), "step": statistics.fmean(seed["step"] for seed in each)}
            for name, each in full.items()
        },
        **compared(gold),
    }


def analyse_lengths(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Tokens of a reply after training on each further variant minus those after the first, method by method; empty
    where replies have one length."""
    tokens = {
        variant: {name: [seed["test"].get("tokens") for seed in method["seeds"]] for name, method in methods.items()}
        for variant, methods in variants.items()
    }
    first, *others = tokens
    if any(None in seeds for seeds in tokens[first].values()):
        return {}
    return {
        variant: _corrected(
            {name: paired_bootstrap(seeds, tokens[first][name]) for name, seeds in tokens[variant].items()}
        )
        for variant in others
    }


def tokens_at_kl(variant: Mapping[str, Any], study: Study) -> dict[str, Any]:
    """Tokens of a reply where a final training's KL was as much as the others': by KL, `methods` and `differences` to
    the baseline, over seeds alone; empty where replies have one length, or where looks are not on the test prompts."""
    if not study["size"].get("fixed_steps") or "tokens" not in study["base"]:
        return {}
    before = statistics.fmean(study["base"]["tokens"])
    found = {}
    for target in _targets(variant):
        tokens = {
            name: [[_tokens_at(seed["at_kl"][target]["step"], seed["curve"], before)] for seed in method["seeds"]]
            for name, method in variant.items()
            if all(target in seed["at_kl"] for seed in method["seeds"])
        }
        gaps = {
            name: paired_bootstrap(each, tokens[BASELINE])
            for name, each in tokens.items()
            if name != BASELINE and BASELINE in tokens
        }
        methods = {name: _mean_and_error(each) for name, each in tokens.items()}
        found[target] = {"methods": methods, "differences": _corrected(gaps)}
    return found


def _tokens_at(step: float, looks: Sequence[Mapping[str, float]], before: float) -> float:
    """Tokens at a step between two looks, of which the first is at the base model: what is linear in √KL from one to
    the other, as the step of a KL is, is linear in the step."""
    tokens = [before, *(look["tokens"] for look in looks[1:])]
    return float(np.interp(step, [look["step"] for look in looks], tokens))


def _corrected(differences: Mapping[str, Difference]) -> dict[str, dict[str, float]]:
    """Differences with their p values after Holm's correction among them, and what would have been found of each."""
    corrected = holm({name: difference.p for name, difference in differences.items()})
    return {
        name: {
            **difference._asdict(),
            "p_holm": corrected[name],
            "detectable": detectable(difference.standard_error, len(differences), difference.freedom),
        }
        for name, difference in differences.items()
    }


def analyse_sanity(sanity: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether swapped labels mirror and shuffled ones teach nothing, method by method.

    - mirror: the share of held-out pairs that a method's own reward ranks right after training on the given labels is
      higher than after training on swapped ones (paired bootstrap over pairs, interval above 0), which is below 50 %.
    - shuffled: over several shuffles, each with its mirror image, the mean share is 50 %. Of a method with a likelihood
      term, whose effect does not depend on the labels, the share minus that of the term alone on the same shuffles is
      0; Student's t.

    A p value of the second that is below `SANITY_ALPHA` after Holm's correction is a failure; `detectable` is the
    smallest deviation that fails with a chance of 80 %.
    """
    rows = []
    nulls: dict[str, NullTest] = {}
    for method in sanity:
        wins = {labels: list(map(int, each)) for labels, each in method["wins"].items()}
        shares = {labels: statistics.fmean(each) for labels, each in wins.items()}
        mirror = paired_bootstrap([wins["given"]], [wins["swapped"]])
        shuffled = mirrored_means(method["wins"])
        row = {
            "name": method["name"],
            "pairs": len(wins["given"]),
            "given": shares["given"],
            "swapped": shares["swapped"],
            "mirror": mirror._asdict(),
            "mirrors": mirror.low > 0 and shares["swapped"] < 0.5,
            "shuffled": {"mean": statistics.fmean(shuffled), "low": min(shuffled), "high": max(shuffled)},
        }
        expected, values = 0.5, shuffled
        if method["likelihood"]:
            alone = mirrored_means(method["likelihood_wins"])
            row["likelihood_alone"] = statistics.fmean(alone)
            expected, values = 0.0, [ours - theirs for ours, theirs in zip(shuffled, alone, strict=True)]
        if any(values):
            nulls[method["name"]] = null_test(values, expected)
        rows.append(row)
    corrected = holm({name: null.p for name, null in nulls.items()})
    for row in rows:
        null = nulls.get(row["name"])
        row["null"] = null if null is None else _of_all(null, corrected[row["name"]], len(nulls))
        # A method that is its own likelihood term differs from it by nothing at all: there is nothing to test.
        row["holds"] = row["mirrors"] and (null is None or corrected[row["name"]] >= SANITY_ALPHA)
    return {"alpha": SANITY_ALPHA, "methods": rows, "failed": [row["name"] for row in rows if not row["holds"]]}


def _of_all(null: NullTest, p_holm: float, tests: int) -> dict[str, float]:
    smallest = detectable(null.standard_error, tests, null.freedom, alpha=SANITY_ALPHA)
    return {**null._asdict(), "p_holm": p_holm, "detectable": smallest}


def mirrored_means(wins: Mapping[str, str]) -> list[float]:
    """The mean share of each shuffle and its mirror image."""
    shares = {labels: statistics.fmean(map(int, each)) for labels, each in wins.items() if labels.startswith("shuffle")}
    return [
        (share + shares[f"{labels} mirrored"]) / 2
        for labels, share in shares.items()
        if not labels.endswith("mirrored")
    ]


def _per_prompt(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)


def _mean_and_error(values: Sequence[Sequence[float]]) -> dict[str, float]:
    mean, error = mean_with_error(values)
    return {"mean": mean, "standard_error": error}
