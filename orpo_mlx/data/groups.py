"""What of a group can be used: completions that are empty, too long or in no pair are left out."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

from orpo_mlx.data.shapes.messages import is_empty
from orpo_mlx.errors import DataError
from orpo_mlx.types import Group, Pair, TokenizedGroup, TokenizedPair

COMPLETIONS_LEFT_OUT = "with some of the completions left out, being empty, too long or in no pair"

AnyGroup = TypeVar("AnyGroup", bound=Group | TokenizedGroup)


def pair_count(row: Pair | TokenizedPair | Group | TokenizedGroup) -> int:
    """Pairs that a method for pairs is given of it."""
    return len(row.pairs) if isinstance(row, Group | TokenizedGroup) else 1


def usable_group(group: AnyGroup, min_margin: float | None) -> tuple[AnyGroup | None, str | None]:
    """What of a group can be used, or None; and why something is left out, a key of `row_counts.REASONS`.

    Raises:
        DataError: a least margin is asked for where there are no pairs.
    """
    if min_margin is not None and not group.pairs:
        raise DataError(
            f"{group.location}: `min_margin={min_margin:g}` is about pairs, and the row gives none; with rated "
            "completions, `pair_ratings=all` makes pairs."
        )
    if (is_empty(group.prompt) and not group.whole_text) if isinstance(group, Group) else not group.prompt_ids:
        return None, "empty_prompt"
    if isinstance(group, Group):
        keep = [place for place, completion in enumerate(group.completions) if not is_empty(completion)]
    else:
        keep = [place for place, ids in enumerate(group.completions) if ids]
    reason = None if len(keep) == len(group.completions) else "empty_side"
    pairs = group.pairs
    if min_margin is not None:
        pairs = tuple(pair for pair in pairs if group.scores[pair[0]] - group.scores[pair[1]] >= min_margin)
        reason = reason or (None if len(pairs) == len(group.pairs) else "low_margin")
    return narrowed(group, keep, pairs), reason


def narrowed(group: AnyGroup, keep: Collection[int], pairs: Collection[tuple[int, int]]) -> AnyGroup | None:
    """A group with only some of its completions and pairs; None where there is nothing left to learn from.

    A completion that is in no pair is not kept either, where the group has pairs: it would be run for nothing.
    """
    kept_pairs = [(better, worse) for better, worse in pairs if better in keep and worse in keep]
    if group.pairs:
        keep = {place for pair in kept_pairs for place in pair}
    places = sorted(keep)
    scores = tuple(group.scores[place] for place in places)
    # One labelled completion says something by itself; of rated ones it takes two that differ.
    if not places or (not group.labelled and len(set(scores)) < 2):
        return None
    new = {place: number for number, place in enumerate(places)}
    completions: tuple[Any, ...] = group.completions
    return group._replace(  # type: ignore[return-value] # What it is given, whichever of the two that is.
        completions=tuple(completions[place] for place in places),
        scores=scores,
        pairs=tuple((new[better], new[worse]) for better, worse in kept_pairs),
    )
