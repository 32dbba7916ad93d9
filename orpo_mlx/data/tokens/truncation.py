"""Pairs that are too long, or whose sides are (or become) equal: cut, or left out and counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from orpo_mlx.data.groups import narrowed
from orpo_mlx.data.tokens.trained_turns import learned_ids
from orpo_mlx.types import Example, TokenizedGroup, TokenizedPair

TRUNCATIONS = ("drop", "keep_start", "keep_end")
"""What becomes of a pair that is too long: left out, cut at its completions' ends, or at its prompt's start."""


class Fitted(NamedTuple):
    """A pair or group fitted to a length."""

    pair: Example | None
    """None where it is left out."""
    reason: str = ""
    """Why it is left out, a key of `row_counts.REASONS`."""
    prompt_cut: bool = False
    completion_cut: bool = False


def fit(example: Example, max_seq_length: int, truncate: str = "drop") -> Fitted:
    """Fit prompt and every completion into `max_seq_length` tokens; `truncate` is one of `TRUNCATIONS`.

    "keep_start" is TRL's: the first tokens of prompt and completion are kept, so that the end of the question and the
    assistant's header stay, and a pair whose prompt alone fills the length is left out. "keep_end" cuts the prompt's
    start, down to one token if need be, and only then the completions' ends; unlike TRL's, it leaves all completions
    the same prompt, cut for the longest of them, and never keeps a completion's end without its beginning. Of a group,
    too long completions are left out alone, and so are pairs that are the same tokens.
    """
    if isinstance(example, TokenizedGroup):
        return _fit_group(example, max_seq_length, truncate)
    return _fit_pair(example, max_seq_length, truncate)


def _fit_group(group: TokenizedGroup, max_seq_length: int, truncate: str) -> Fitted:
    keep = list(range(len(group.completions)))
    prompt, completions = group.prompt_ids, group.completions
    if truncate == "drop":
        keep = [place for place in keep if len(prompt) + len(completions[place]) <= max_seq_length]
        reason = "too_long"
    else:
        prompt, completions = _cut(prompt, completions, max_seq_length, truncate)
        keep = [place for place in keep if learned_ids(completions[place])]
        reason = "no_completion_left"
    # A single completion is both sides of its pair, and meant to be.
    pairs = [
        (better, worse) for better, worse in group.pairs if better == worse or completions[better] != completions[worse]
    ]
    # Nothing was too long or cut to nothing, so what took the pairs is that their sides are equal.
    if len(keep) == len(completions) and len(pairs) < len(group.pairs):
        reason = "equal_sides"
    return Fitted(
        narrowed(group._replace(prompt_ids=prompt, completions=completions), keep, pairs),
        reason,
        prompt_cut=len(prompt) < len(group.prompt_ids),
        completion_cut=completions != group.completions,
    )


def _cut(
    prompt: tuple[int, ...], completions: Sequence[tuple[int, ...]], max_seq_length: int, truncate: str
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    longest = max(map(len, completions))
    if truncate == "keep_end" and len(prompt) + longest > max_seq_length:
        # One token of the prompt must stay: the first completion token is predicted from it.
        prompt = prompt[-min(len(prompt), max(1, max_seq_length - longest)) :]
    most = max(0, max_seq_length - len(prompt))
    return prompt, tuple(ids[:most] for ids in completions)


def _fit_pair(pair: TokenizedPair, max_seq_length: int, truncate: str) -> Fitted:
    prompt, chosen, rejected = pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
    longest = max(len(chosen), len(rejected))
    if len(prompt) + longest > max_seq_length:
        if truncate == "drop":
            return Fitted(None, "too_long")
        prompt, (chosen, rejected) = _cut(prompt, (chosen, rejected), max_seq_length, truncate)
        if not (learned_ids(chosen) and learned_ids(rejected)):
            return Fitted(None, "no_completion_left")
    # After the cut: two long answers that differ at their ends only have become one.
    if chosen == rejected:
        return Fitted(None, "equal_sides")
    return Fitted(
        pair._replace(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected),
        prompt_cut=len(prompt) < len(pair.prompt_ids),
        completion_cut=max(len(chosen), len(rejected)) < longest,
    )
