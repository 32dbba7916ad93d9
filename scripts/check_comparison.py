"""Recompute every published figure of the exercise from its raw figures, and hold two runs against each other.

    python scripts/check_comparison.py DIR/results.json [--same-as OTHER/results.json]

`scripts/recompute` is a second implementation of the same definitions, apart from the package: it finds a slip in
either, and none in a definition. What needs a model is taken as it was measured: rewards, KLs, costs, the frontier.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A script's own folder comes first in sys.path; its modules are those of the repository's root, as tests have them.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orpo_mlx.config.flags import OneLineParser, exit_status
from orpo_mlx.errors import DataError
from orpo_mlx.files import read_json_table
from scripts.recompute import tiers
from scripts.recompute.verdicts import verdicts

PROG = "python scripts/check_comparison.py"
# Published figures are rounded to five digits.
_TOLERANCE = 2e-5
_VARYING = {"date", "seconds", "command", "commit", "step_s", "reference_s", "peak_gib", "peaks_gib", "copy_ratio"}


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
    pairs = [(f"{name} tier", tier["analysis"], tiers.analysis(tier)) for name, tier in results["tiers"].items()]
    for name, tier in results["tiers"].items():
        to_come = [each for each in tier["size"]["variants"] if f"{name}, {each}" in results.get("unfinished", ())]
        pairs.append((f"{name} tier, variants", [*tier["variants"], *to_come], tier["size"]["variants"]))
        pairs += [(f"{name} {what}", *values) for what, *values in tiers.raw_figures(tier)]
    for what, published, mine in (*pairs, *verdicts(results)):
        for place, ours, theirs in leaves(published, mine, what):
            count += 1
            if not same(ours, theirs):
                wrong.append(f"{place}: published {ours}, recomputed {theirs}")
    return count, wrong


_NOTHING = "nothing"


def leaves(published: Any, mine: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two nested structures have values, and both values; one that only one of them has is there too."""
    if isinstance(published, dict) and isinstance(mine, dict):
        for key in {**published, **mine}:
            yield from leaves(published.get(key, _NOTHING), mine.get(key, _NOTHING), f"{place}, {key}")
    elif isinstance(published, list) and isinstance(mine, list) and len(published) == len(mine):
        for number, values in enumerate(zip(published, mine, strict=True)):
            yield from leaves(*values, f"{place}, {number}")
    else:
        yield place, published, mine


def same(published: Any, mine: Any) -> bool:
    """Equal, numbers but for rounding."""
    numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in (published, mine))
    return math.isclose(published, mine, rel_tol=1e-6, abs_tol=_TOLERANCE) if numbers else bool(published == mine)


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
