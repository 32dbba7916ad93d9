"""Pairs that are too long, or whose sides are (or become) equal: cut, or left out and counted."""

from __future__ import annotations

from typing import NamedTuple

from orpo_mlx.types import TokenizedPair

TRUNCATIONS = ("drop", "keep_start", "keep_end")
"""What becomes of a pair that is too long: left out, or its prompt cut at the end or at the start."""


class Fitted(NamedTuple):
    """A pair fitted to a length."""

    pair: TokenizedPair | None
    """None where it is left out."""
    reason: str = ""
    """Why it is left out, a key of `row_counts.REASONS`."""
    prompt_cut: bool = False
    completion_cut: bool = False


def fit(pair: TokenizedPair, max_seq_length: int, truncate: str = "drop") -> Fitted:
    """Fit prompt + completion, on both sides, into `max_seq_length` tokens; `truncate` is one of `TRUNCATIONS`.

    The prompt is cut first, and down to one token if need be; only then do completions lose their ends. Both sides see
    the same prompt.
    """
    prompt, chosen, rejected = pair[:3]
    longest = max(len(chosen), len(rejected))
    too_long = len(prompt) + longest > max_seq_length
    if too_long and truncate == "drop":
        return Fitted(None, "too_long")
    if too_long:
        # One token of the prompt must stay: the first completion token is predicted from it.
        room = min(len(prompt), max(1, max_seq_length - longest))
        prompt = prompt[:room] if truncate == "keep_start" else prompt[-room:]
        most = max_seq_length - len(prompt)
        chosen = chosen[:most]
        rejected = rejected[:most]
        if not chosen:
            return Fitted(None, "no_completion_left")
    # After the cut: two long answers that differ at their ends only have become one.
    if chosen == rejected:
        return Fitted(None, "equal_sides")
    return Fitted(
        pair._replace(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected),
        prompt_cut=len(prompt) < len(pair.prompt_ids),
        completion_cut=max(len(chosen), len(rejected)) < longest,
    )
