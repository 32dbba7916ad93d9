"""Scores in a row: of its two sides, or of each completion in a list."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from orpo_mlx.data.messages import kind
from orpo_mlx.errors import DataError

PAIRINGS = ("best_worst", "all")
"""How a row of rated completions becomes pairs."""

COMPLETION_LISTS = ("completions", "responses", "answers", "generations")
"""Columns that hold a list of completions."""

# The names that published data sets have for the scores of a pair.
_SIDE_SCORES = [
    (pattern.format("chosen"), pattern.format("rejected"))
    for pattern in ("score_{}", "{}_score", "rating_{}", "{}_rating", "{}-rating", "{}_avg_rating", "{}_reward")
]
_LIST_SCORES = ("scores", "ratings", "rewards", "ranks")
_ENTRY_TEXT = ("response", "completion", "content", "text", "answer", "generation")
_ENTRY_SCORE = ("score", "rating", "overall_score", "reward", "rank")


class Rated(NamedTuple):
    """A completion and its score."""

    completion: Any
    score: float
    """The higher the better."""


def margin_of(row: Mapping[str, Any], location: str) -> float | None:
    """Score of the chosen side minus score of the rejected one; None where the row does not have both.

    Raises:
        DataError: one of them is not a number.
    """
    for names in _SIDE_SCORES:
        if row.get(names[0]) is not None and row.get(names[1]) is not None:
            chosen, rejected = (_number(row[name], name, location) for name in names)
            return chosen - rejected
    return None


def weight_of(row: Mapping[str, Any], location: str) -> float:
    """What the row's loss is multiplied by: its `weight`, 1 where it has none.

    Raises:
        DataError: it is not a number of 0 or more.
    """
    if row.get("weight") is None:
        return 1.0
    weight = _number(row["weight"], "weight", location)
    if not 0 <= weight < math.inf:
        raise DataError(f"{location}: 'weight' is {weight:g}, expected a number of 0 or more.")
    return weight


def ranked_pairs(row: Mapping[str, Any], location: str, pairing: str) -> Iterator[tuple[Rated, Rated]]:
    """Better and worse of the row's rated completions, as `pairing`, one of `PAIRINGS`, says; ties make no pair.

    Raises:
        DataError: the row's list is not one of completions with scores.
    """
    ranked = sorted(_rated_completions(row, location), key=lambda each: -each.score)
    pairs = [(ranked[0], ranked[-1])] if pairing == "best_worst" else itertools.combinations(ranked, 2)
    return (pair for pair in pairs if pair[0].score > pair[1].score)


def _rated_completions(row: Mapping[str, Any], location: str) -> list[Rated]:
    name = next(name for name in COMPLETION_LISTS if name in row)
    entries = row[name]
    if not isinstance(entries, list) or len(entries) < 2:
        raise DataError(f"{location}: {name!r} must be a list of at least two completions.")
    if all(isinstance(entry, dict) for entry in entries):
        text = next((key for key in _ENTRY_TEXT if all(key in entry for entry in entries)), None)
        score = next((key for key in _ENTRY_SCORE if all(key in entry for entry in entries)), None)
        if text is None or score is None:
            found = ", ".join(map(str, entries[0]))
            raise DataError(
                f"{location}: {name}[0] has {found}; expected a text ({', '.join(_ENTRY_TEXT)}) and a "
                f"score ({', '.join(_ENTRY_SCORE)})."
            )
        completions = [entry[text] for entry in entries]
        scores: Any = [entry[score] for entry in entries]
    else:
        score = next((key for key in _LIST_SCORES if key in row), None)
        scores = row[score] if score is not None else None
        if not isinstance(scores, list) or len(scores) != len(entries):
            raise DataError(
                f"{location}: {name!r} needs a list of as many scores ({', '.join(_LIST_SCORES)}) beside it."
            )
        completions = entries
    # The best has rank 1 but the highest score.
    sign = -1.0 if score in ("rank", "ranks") else 1.0
    numbers = [sign * _number(value, f"{name} {score}", location) for value in scores]
    return [Rated(*both) for both in zip(completions, numbers, strict=True)]


def _number(value: Any, name: str, location: str) -> float:
    try:
        # float(True) is 1.
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{location}: {name!r} must be a number, found {kind(value)} {str(value)[:40]!r}.") from None
    # Sorting with a NaN among them gives whatever order.
    if number != number:
        raise DataError(f"{location}: {name!r} is not a number (NaN).")
    return number
