"""Recompute every published figure of the exercise from its raw figures, and hold two runs against each other.

    python scripts/check_comparison.py DIR/results.json [--same-as OTHER/results.json]

Written apart from the package, of which it imports nothing but how a file is read and a command ends: a formula that is
wrong there is not wrong here as well.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from orpo_mlx.config.flags import OneLineParser, exit_status
from orpo_mlx.errors import DataError
from orpo_mlx.files import read_json_table

PROG = "python scripts/check_comparison.py"
_RESAMPLES = 4000
# Published figures are rounded to five digits.
_TOLERANCE = 2e-5
_Z = {"two-sided 5 %": 1.959963984540054, "power 80 %": 0.8416212335729143}
_LOSSES = {"orpo": "", "orpo_style": " (the chapter's own loss, orpo_style)"}
_VARYING = {"date", "seconds", "command", "commit", "step_s", "reference_s", "peak_gib", "peaks_gib", "copy_ratio"}


def check_tier(tier: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(what, published, recomputed) for every figure of a tier's analysis."""
    analysis = tier["analysis"]
    for key, values in tier["base"].items():
        yield from _mean(f"base {key}", analysis["base"][key], [values])
    for variant, methods in tier["variants"].items():
        found = analysis["variants"][variant]
        for name, method in methods.items():
            for key in method["seeds"][0]["test"]:
                rows = [seed["test"][key] for seed in method["seeds"]]
                yield from _mean(f"{variant} {name} {key}", found["methods"][name][key], rows)
        if "differences" in found:
            yield from _differences(variant, methods, found)
    if "lengths" in analysis:
        yield from _lengths(tier["variants"], analysis["lengths"])
    if "sanity" in tier:
        yield from _sanity(tier["sanity"], analysis["sanity"])


def _mean(what: str, published: dict[str, float], rows: list[list[float]]) -> Iterator[tuple[str, float, float]]:
    total = sum(map(sum, rows)) / sum(map(len, rows))
    yield f"{what}, mean", published["mean"], total
    yield f"{what}, standard error", published["standard_error"], _error(rows)


def _error(rows: list[list[float]]) -> float:
    """Standard error of a mean over seeds (rows) and prompts (columns), both of them samples."""
    by_seed = [sum(row) / len(row) for row in rows]
    by_prompt = [sum(column) / len(column) for column in zip(*rows, strict=True)]
    return math.sqrt(_variance_of_mean(by_seed) + _variance_of_mean(by_prompt))


def _variance_of_mean(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)


def _bootstrap(table: np.ndarray[Any, Any]) -> dict[str, float]:
    """Resample by resample, where the package multiplies matrices; the draws are numpy's multinomial of seed 0."""
    seeds, prompts = table.shape
    rng = np.random.default_rng(0)
    seed_counts = rng.multinomial(seeds, [1 / seeds] * seeds, _RESAMPLES)
    prompt_counts = rng.multinomial(prompts, [1 / prompts] * prompts, _RESAMPLES)
    means = np.array(
        [float(a @ table @ b) / (seeds * prompts) for a, b in zip(seed_counts, prompt_counts, strict=True)]
    )
    # A mean that is 0 but for rounding is on both sides.
    near = np.where(np.abs(means) < 1e-12, 0.0, means)
    side = min(int((near <= 0).sum()), int((near >= 0).sum()))
    ends = np.percentile(means, [2.5, 97.5])
    return {
        "mean": float(table.mean()),
        "low": float(ends[0]),
        "high": float(ends[1]),
        "standard_error": _error(table.tolist()),
        "p": min(1.0, 2 * (side + 1) / (_RESAMPLES + 1)),
    }


def _holm(ps: dict[str, float]) -> dict[str, float]:
    ordered = sorted(ps.items(), key=lambda each: (each[1], each[0]))
    count = len(ordered)
    return {
        name: min(1.0, max((count - before) * p for before, (_, p) in enumerate(ordered[: place + 1])))
        for place, (name, _) in enumerate(ordered)
    }


def _measured(methods: dict[str, Any], key: str) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.array([seed["test"][key] for seed in each["seeds"]]) for name, each in methods.items()}


def _compared(
    what: str, mine: dict[str, dict[str, float]], published: dict[str, dict[str, float]]
) -> Iterator[tuple[str, float, float]]:
    corrected = _holm({name: each["p"] for name, each in mine.items()})
    for name, each in mine.items():
        for key, value in {**each, "p_holm": corrected[name]}.items():
            yield f"{what} {name}, {key}", published[name][key], value


def _lengths(variants: dict[str, Any], published: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    first, *others = (_measured(methods, "tokens") for methods in variants.values())
    for variant, tokens in zip(list(variants)[1:], others, strict=True):
        mine = {name: _bootstrap(table - first[name]) for name, table in tokens.items()}
        yield from _compared(f"{variant} tokens", mine, published[variant])


def _differences(variant: str, methods: dict[str, Any], found: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    gold = _measured(methods, "gold")
    base = gold.pop("dpo")
    mine = {name: _bootstrap(table - base) for name, table in gold.items()}
    yield from _compared(f"{variant} minus dpo", mine, found["differences"])
    errors = sorted(each["standard_error"] for each in mine.values())
    middle = (errors[(len(errors) - 1) // 2] + errors[len(errors) // 2]) / 2
    z = _normal_quantile(1 - 0.025 / len(errors)) + _Z["power 80 %"]
    yield f"{variant} detectable", found["detectable"], z * middle


def _normal_quantile(p: float) -> float:
    low, high = 0.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < p else (low, middle)
    return low


def _sanity(raw: list[dict[str, Any]], published: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    ps: dict[str, float] = {}
    rows = {row["name"]: row for row in published["methods"]}
    for method in raw:
        name, row, wins = method["name"], rows[method["name"]], _bits(method["wins"])
        yield f"sanity {name} given", row["given"], sum(wins["given"]) / len(wins["given"])
        yield f"sanity {name} swapped", row["swapped"], sum(wins["swapped"]) / len(wins["swapped"])
        mirror = _bootstrap(np.array([wins["given"]], float) - np.array([wins["swapped"]], float))
        for key, value in mirror.items():
            yield f"sanity {name} mirror {key}", row["mirror"][key], value
        shuffled = _with_mirrors(wins)
        yield f"sanity {name} shuffled", row["shuffled"]["mean"], sum(shuffled) / len(shuffled)
        values = [each - 0.5 for each in shuffled]
        if method["likelihood"]:
            alone = _with_mirrors(_bits(method["likelihood_wins"]))
            values = [ours - theirs for ours, theirs in zip(shuffled, alone, strict=True)]
        if row["null"] is not None:
            mean, error = sum(values) / len(values), math.sqrt(_variance_of_mean(values))
            ps[name] = _student(mean / error, len(values) - 1) if error else float(mean == 0)
            yield f"sanity {name} null p", row["null"]["p"], ps[name]
    for name, value in _holm(ps).items():
        yield f"sanity {name} null p_holm", rows[name]["null"]["p_holm"], value


def _bits(wins: dict[str, str]) -> dict[str, list[int]]:
    return {labels: [int(bit) for bit in each] for labels, each in wins.items()}


def _with_mirrors(wins: dict[str, list[int]]) -> list[float]:
    names = [name for name in wins if name.startswith("shuffle") and not name.endswith("mirrored")]
    share = {name: sum(each) / len(each) for name, each in wins.items()}
    return [(share[name] + share[name + " mirrored"]) / 2 for name in names]


def _student(t: float, freedom: int) -> float:
    """Two-sided p: 1 - the integral of the density over [-|t|, |t|], by Simpson's rule."""
    count = 20_000
    xs = np.linspace(0, abs(t), count + 1)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = scale * (1 + xs**2 / freedom) ** (-(freedom + 1) / 2)
    weights = np.ones(count + 1)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return max(0.0, 1 - 2 * float((density * weights).sum()) * abs(t) / count / 3)


def check_verdicts(results: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """The figures of the sentences on convergence and sensitivity; they are the exact tier's."""
    if "exact" not in results["tiers"]:
        return
    sentences = {each["claim"]: each["measured"] for each in results["verdicts"]}
    variants = results["tiers"]["exact"]["variants"]
    for method, which in _LOSSES.items():
        if method in next(iter(variants.values())):
            yield from _convergence(sentences[f"ORPO converges faster{which}"], variants, method)
            claim = f"DPO's sensitivity to hyper-parameters is moderate, ORPO's low{which}"
            yield from _sensitivity(sentences[claim], variants, method)


def _convergence(sentence: str, variants: dict[str, Any], method: str) -> Iterator[tuple[str, float, float]]:
    first = next(iter(variants.values()))
    for step, value in re.findall(r"step (\d+): ([+-][\d.]+)", sentence):
        golds = (
            [next(look["gold"] for look in seed["curve"] if look["step"] == int(step)) for seed in first[name]["seeds"]]
            for name in (method, "dpo")
        )
        gaps = [ours - theirs for ours, theirs in zip(*golds, strict=True)]
        yield f"convergence of {method} at step {step}", float(value), round(sum(gaps) / len(gaps), 2)


def _sensitivity(sentence: str, variants: dict[str, Any], method: str) -> Iterator[tuple[str, float, float]]:
    for variant, methods in variants.items():
        part = sentence.split(f"{variant}: ")[1]
        published = re.findall(r"([\d.]+) of ([-\d.]+) for", part)[:2]
        for (value, gain), name in zip(published, (method, "dpo"), strict=True):
            shortest = min(entry["steps"] for entry in methods[name]["tuning"])
            grid = [entry for entry in methods[name]["tuning"] if entry["steps"] == shortest]
            means = [sum(entry["valid_gold"]) / len(entry["valid_gold"]) for entry in grid]
            lost = max(means) - sum(means) / len(means)
            yield f"sensitivity {variant} {name}", float(value), round(lost, 2)
            gained = max(means) - methods[name]["seeds"][0]["curve"][0]["gold"]
            yield f"sensitivity {variant} {name}, gain", float(gain), round(gained, 2)


def differing(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """Places where two results differ, times, dates and bytes of memory apart.

    The sentences of verdicts are passed over: their figures are of what is compared here, or bytes.
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs} - _VARYING):
            if key == "measured" and isinstance(ours.get(key), str):
                continue
            if key not in ours or key not in theirs:
                yield f"{path}/{key}"
            else:
                yield from differing(ours[key], theirs[key], f"{path}/{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            yield from differing(a, b, f"{path}/{place}")
    elif ours != theirs:
        yield path


def read(path: Path) -> dict[str, Any]:
    """Results of the exercise; DataError where they are not."""
    found = read_json_table(path, DataError)
    if found.get("kind") != "exercise":
        raise DataError(f"{path}: is not results.json of compare --quick or --full.")
    return found


def check(results: dict[str, Any]) -> tuple[int, list[str]]:
    """How many figures were recomputed, and those that differ."""
    count, wrong = 0, []
    for name, tier in results["tiers"].items():
        for what, published, mine in check_tier(tier):
            count += 1
            if not math.isclose(published, mine, abs_tol=_TOLERANCE):
                wrong.append(f"{name} {what}: published {published}, recomputed {mine:.6f}")
    for what, published, mine in check_verdicts(results):
        count += 1
        # The sentence was rounded from the same numbers, and may have been rounded the other way at a half.
        if not math.isclose(published, mine, abs_tol=0.0101):
            wrong.append(f"{what}: published {published}, recomputed {mine}")
    return count, wrong


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog=PROG, description=__doc__.split("\n")[0] if __doc__ else "", allow_abbrev=False)
    parser.add_argument("results", type=Path, metavar="FILE", help="results.json of compare --quick or --full")
    parser.add_argument("--same-as", type=Path, metavar="FILE", help="another run's, which must be equal but for times")
    return parser


def run() -> None:
    """The command; DataError where figures differ or there are none."""
    args = build_parser().parse_args()
    results = read(args.results)
    try:
        count, wrong = check(results)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise DataError(
            f"{args.results}: raw figures or those made of them are missing or damaged ({error!r}); give results.json "
            "as compare --quick or --full wrote it."
        ) from None
    if not count:
        raise DataError(f"{args.results}: has no figures; give results.json as compare --quick or --full wrote it.")
    if wrong:
        raise DataError(f"{args.results}: {len(wrong)} of {count} figures differ; the first: {wrong[0]}")
    print(f"{count} figures recomputed, all as published")
    if args.same_as is not None:
        places = list(differing(results, read(args.same_as)))
        if places:
            raise DataError(
                f"{args.same_as}: differs from {args.results} in {len(places)} places; the first: {places[0]}"
            )
        print("both runs have the same losses, accuracies, replies and verdicts")


if __name__ == "__main__":
    sys.exit(exit_status(PROG, run))
