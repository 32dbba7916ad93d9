"""Scores in a row: of its two sides, of each completion in a list, or a label of its only one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orpo_mlx.data.shapes.messages import kind
from orpo_mlx.errors import DataError

PAIRINGS = ("best_worst", "all", "adjacent")
"""How a row of rated completions becomes pairs: the best and the worst, each with every worse one, or each with those
of the next lower score."""

COMPLETION_LISTS = ("completions", "responses", "answers", "generations")
"""Columns that hold a list of completions."""

# The names that published data sets have for the scores of a pair.
_SIDE_SCORES = [
    (pattern.format("chosen"), pattern.format("rejected"))
    for pattern in ("score_{}", "{}_score", "rating_{}", "{}_rating", "{}-rating", "{}_avg_rating", "{}_reward")
]
LIST_SCORES = ("scores", "ratings", "rewards", "ranks")
"""Columns that hold the score of each completion of such a list."""

_LARGEST = 1e38

_ENTRY_TEXT = ("response", "completion", "content", "text", "answer", "generation")
_ENTRY_SCORE = ("score", "rating", "overall_score", "reward", "rank")

# CSV files have words in place of booleans; 1.0 is what a table with gaps makes of 1.
_GOOD = ("true", "1", "1.0", "👍", "thumbs_up", "thumbs up", "up")
_BAD = ("false", "0", "0.0", "👎", "thumbs_down", "thumbs down", "down")


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
    if weight < 0:
        raise DataError(f"{location}: 'weight' is {weight:g}, expected a number of 0 or more.")
    return weight


def pairs_of_scores(scores: Sequence[float], pairing: str) -> list[tuple[int, int]]:
    """The places of better and worse, the best first, as `pairing`, one of `PAIRINGS`, says; ties make no pair."""
    # A stable sort: completions of equal scores keep the row's order.
    ranked = sorted(range(len(scores)), key=lambda place: -scores[place])
    pairs = [(ranked[0], ranked[-1])] if pairing == "best_worst" else itertools.combinations(ranked, 2)
    worse = {high: low for low, high in itertools.pairwise(sorted(set(scores)))}
    return [
        (first, second)
        for first, second in pairs
        if scores[first] > scores[second] and (pairing != "adjacent" or worse[scores[first]] == scores[second])
    ]


def rated_completions_of(row: Mapping[str, Any], location: str) -> list[Rated]:
    """The row's rated completions, as they stand.

    Raises:
        DataError: the row's list is not one of completions with scores.
    """
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
        score = next((key for key in LIST_SCORES if key in row), None)
        scores = row[score] if score is not None else None
        if not isinstance(scores, list) or len(scores) != len(entries):
            raise DataError(
                f"{location}: {name!r} needs a list of as many scores ({', '.join(LIST_SCORES)}) beside it."
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
    # Sorting with a NaN among them gives whatever order; differences, too, must be finite in float32.
    if not abs(number) <= _LARGEST:
        raise DataError(f"{location}: {name!r} is {number:g}, expected a number of at most {_LARGEST:g} in size.")
    return number


def label_of(value: Any, location: str, labels: Sequence[str]) -> bool:
    """Whether a row's label calls its completion good.

    Args:
        value: true or false, 1 or 0, a thumb up or down, these in words, or one of `labels`.
        location: for the error.
        labels: the data set's own words for good and bad, if it has any.

    Raises:
        DataError: it is none of these.
    """
    word = str(value).strip().lower()
    goods, bads = ((labels[0].lower(),), (labels[1].lower(),)) if labels else (_GOOD, _BAD)
    if word in goods or word in bads:
        return word in goods
    expected = " or ".join(labels) if labels else "true or false, 1 or 0, a thumb up or down"
    raise DataError(
        f"{location}: 'label': found {kind(value)} {str(value)[:40]!r}, expected {expected}; "
        "`labels=GOOD,BAD` says which words a data set has for a good and for a bad completion."
    )
