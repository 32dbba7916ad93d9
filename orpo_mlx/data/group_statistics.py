"""What there is to know about groups: how many completions, how the labels are balanced, and what length tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo_mlx.data.tokens.token_store import LABELLED, TokenStore

# Ethayarajh et al. 2024, eq. 8: λ_D n_D / (λ_U n_U) should lie between 1 and 4/3.
_BALANCED = 4 / 3


def completion_lengths(store: TokenStore) -> npt.NDArray[np.int64]:
    """Tokens of every completion."""
    return store.lengths[:, 1:].reshape(-1) if store.groups is None else store.groups.lengths


def compared_lengths(store: TokenStore) -> npt.NDArray[np.int64]:
    """(P, 3): tokens of prompt, better and worse of each pair; of a row of rated completions without pairs those of
    the best and the worst."""
    groups = store.groups
    if groups is None:
        return store.lengths
    found = []
    first, pair = 0, 0
    for prompt, count, pairs in zip(store.lengths[:, 0], groups.counts, groups.pair_counts, strict=True):
        own = slice(first, first + count)
        scores, lengths = groups.scores[own], groups.lengths[own]
        compared = groups.pairs[pair : pair + pairs].tolist()
        if not pairs and scores.max() > scores.min():
            compared = [(scores.argmax(), scores.argmin())]
        # A single completion is a pair with itself, in which nothing is compared.
        found += [(prompt, lengths[better], lengths[worse]) for better, worse in compared if better != worse]
        first, pair = first + count, pair + pairs
    return np.array(found, np.int64).reshape(-1, 3)


def group_figures(store: TokenStore) -> dict[str, Any]:
    """Completions of each row and, of labelled ones, their balance with the weights that it asks for; as plain JSON."""
    groups = store.groups
    if groups is None:
        return {}
    # A completion alone, of whose worth nothing is said: good only in that it is learned.
    single = (groups.counts == 1) & (groups.pair_counts == 1)
    quantiles = np.quantile(groups.counts, [0, 0.5, 1]).tolist()
    found: dict[str, Any] = {
        "completions": int(groups.counts.sum()),
        "completions_per_row": dict(zip(("min", "median", "max"), quantiles, strict=True)),
        "pairs_of_groups": int(groups.pair_counts[~single].sum()),
    }
    labelled = np.repeat((groups.kinds == LABELLED) & ~single, groups.counts)
    if labelled.any():
        good = int((groups.scores[labelled] > 0.5).sum())
        found["labels"] = balance(good, int(labelled.sum()) - good)
    return found


def balance(good: int, bad: int) -> dict[str, Any]:
    """Counts of good and bad completions and, where one kind outweighs the other, the weight that makes up for it."""
    found: dict[str, Any] = {"good": good, "bad": bad, "proposal": {}}
    if good and bad and not 1 <= good / bad <= _BALANCED:
        name = "desirable_weight" if good < bad else "undesirable_weight"
        found["proposal"] = {name: round(max(good, bad) / min(good, bad), 2)}
    return found


def group_lines(table: Mapping[str, Any]) -> list[str]:
    """`group_figures` as lines to read."""
    if "completions" not in table:
        return []
    spread = table["completions_per_row"]
    paired = f", in {table['pairs_of_groups']} pairs" if table["pairs_of_groups"] else ""
    lines = [
        f"completions: {table['completions']}, {spread['min']:.0f} to {spread['max']:.0f} a row "
        f"(median {spread['median']:.0f}){paired}"
    ]
    if "labels" in table:
        labels = table["labels"]
        good, bad = labels["good"], labels["bad"]
        lines.append(f"labels: {good} good, {bad} bad ({good / (good + bad):.1%} good)")
        if not (good and bad):
            missing = "good" if bad else "bad"
            lines.append(f"balance: there is no {missing} completion; kto learns little from one kind alone")
        for name, value in labels["proposal"].items():
            lines.append(f"balance: `{name}={value:g}` gives both the same weight in kto")
    return lines
