"""What a tier's raw figures say: means with errors, differences with corrected p values, power, sanity."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from orpo_mlx.compare.exercise.contenders import BASELINE
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
        "variants": {name: analyse_variant(variant) for name, variant in study["variants"].items()},
    }
    lengths = analyse_lengths(study["variants"])
    if lengths:
        found["lengths"] = lengths
    if "sanity" in study:
        found["sanity"] = analyse_sanity(study["sanity"])
    cleaned: dict[str, Any] = rounded(found)
    return cleaned


def analyse_variant(variant: Mapping[str, Any]) -> dict[str, Any]:
    """Means over seeds and prompts of each method, and its difference in gold to the baseline's."""
    methods = {}
    for name, method in variant.items():
        tests = [seed["test"] for seed in method["seeds"]]
        measures = [key for key, values in tests[0].items() if _per_prompt(values)]
        methods[name] = {key: _mean_and_error([test[key] for test in tests]) for key in measures}
    found: dict[str, Any] = {"methods": methods}
    if BASELINE in variant and len(variant) > 1:
        gold = {name: [seed["test"]["gold"] for seed in method["seeds"]] for name, method in variant.items()}
        differences = {name: paired_bootstrap(gold[name], gold[BASELINE]) for name in variant if name != BASELINE}
        found["differences"] = _corrected(differences)
        errors = [difference.standard_error for difference in differences.values()]
        found["detectable"] = detectable(statistics.median(errors), len(errors))
    return found


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


def _corrected(differences: Mapping[str, Difference]) -> dict[str, dict[str, float]]:
    """Differences with their p values after Holm's correction among them."""
    corrected = holm({name: difference.p for name, difference in differences.items()})
    return {name: {**difference._asdict(), "p_holm": corrected[name]} for name, difference in differences.items()}


def analyse_sanity(sanity: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether swapped labels mirror and shuffled ones teach nothing, method by method.

    - mirror: the share of held-out pairs that a method's own reward ranks right after training on the given labels is
      higher than after training on swapped ones (paired bootstrap over pairs, interval above 0).
    - shuffled: over several shuffles, each with its mirror image, the mean share is 50 %. Of a method with a likelihood
      term, whose effect does not depend on the labels, the share minus that of the term alone on the same shuffles is
      0; Student's t.

    A p value of the second that is below `SANITY_ALPHA` after Holm's correction is a failure.
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
            "mirrors": mirror.low > 0,
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
        row["null"] = None if null is None else {**null._asdict(), "p_holm": corrected[row["name"]]}
        # A method that is its own likelihood term differs from it by nothing at all: there is nothing to test.
        row["holds"] = row["mirrors"] and (null is None or corrected[row["name"]] >= SANITY_ALPHA)
    return {"alpha": SANITY_ALPHA, "methods": rows, "failed": [row["name"] for row in rows if not row["holds"]]}


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
    return {"mean": mean, "standard_error": error if math.isfinite(error) else 0.0}
