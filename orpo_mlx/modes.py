"""What a run keeps for the backward pass and what it computes again: `--memory`."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from orpo_mlx.allocator import working_set_bytes


class Mode(NamedTuple):
    """One way to spend memory. Every mode gives the same loss and gradients."""

    help: str
    share_prompt: bool = True
    split_head: bool = True
    lean: bool = True
    """Whether layers call `lean`'s functions rather than mlx-lm's."""
    kept_layers: float = 1.0
    """Share of the layers, from the last, that are not run again in the backward pass."""


MODES = {
    "fast": Mode("keeps everything a backward pass wants"),
    "balanced": Mode("runs the first 60 % of the layers again, in segments", kept_layers=0.4),
    "thrift": Mode("runs every layer again, in segments", kept_layers=0.0),
    "plain": Mode("mlx-lm's own forward, all logits, prompts twice", share_prompt=False, split_head=False, lean=False),
}
"""From the fastest to the smallest, and the one to compare with."""

_AUTOMATIC = ("fast", "balanced", "thrift")
_SAFE_SHARE = 0.8


def choose_memory(model: nn.Module, tokens: int) -> str:
    """The fastest mode that should fit this machine, by a rule of thumb.

    Needed: the weights; four times the trained parameters (themselves, gradient, two moments); and for each token and
    kept layer 12 hidden and 6 feed-forward widths, counted on a llama. There to be used: 80 % of the device's
    recommended working set or, where it names none, of half the machine's memory.

    Args:
        model: with what is trained marked as such.
        tokens: the most that are run at one time.
    """
    size = working_set_bytes() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    weights = _bytes(model.parameters()) + 3 * _bytes(model.trainable_parameters())
    for name in _AUTOMATIC:
        kept = MODES[name].kept_layers * len(model.layers)
        if weights + tokens * _bytes_per_token(model) * max(kept, 1) <= _SAFE_SHARE * size:
            return name
    return _AUTOMATIC[-1]


def _bytes_per_token(model: nn.Module) -> int:
    hidden = int(getattr(model.args, "hidden_size", 4096))
    width = int(getattr(model.args, "intermediate_size", 0)) or 4 * hidden
    return 4 * (12 * hidden + 6 * width)


def _bytes(parameters: Any) -> int:
    arrays: dict[str, mx.array] = dict(tree_flatten(parameters))
    return sum(array.nbytes for array in arrays.values())
