"""A model's scorer and gradient under one of the memory modes."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import mlx.nn as nn

from orpo_mlx.engine.modes import AUTOMATIC, MODES
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.engine.segmented_backward import ValueAndGrad, find_segmented, whole_value_and_grad


class Memory(NamedTuple):
    """How a run spends memory."""

    mode: str
    """One of `MODES`."""
    value_and_grad: ValueAndGrad
    in_one_graph: bool
    """Whether that evaluates nothing, so that it can be compiled as a whole."""
    notes: tuple[str, ...] = ()
    """What the user should know about it."""


def spend_memory(
    model: nn.Module, memory: str, *, share_prompt: bool, split_head: bool, segment_layers: int
) -> tuple[PairScorer, Memory]:
    """The policy's scorer, and how gradients are taken, as the model allows.

    Args:
        model: with its adapters.
        memory: one of `MODES`, or "auto" for the fastest.
        share_prompt: whether the mode may run a prompt once for both completions.
        split_head: whether the mode may leave out logits that no loss needs.
        segment_layers: layers run and freed together, in the modes that run layers again.
    """
    name = AUTOMATIC[0] if memory == "auto" else memory
    mode = MODES[name]
    scorer = PairScorer(
        model,
        share_prompt=mode.share_prompt and share_prompt,
        split_head=mode.split_head and split_head,
        lean=mode.lean,
        kept_attention_bytes=mode.kept_attention_mib << 20,
    )
    segmented, why_not = None, ""
    if mode.kept_layers < 1:
        kept = int(mode.kept_layers * len(model.layers))
        segmented, why_not = find_segmented(scorer, segment_layers=segment_layers, kept_layers=kept)
    value_and_grad = segmented.value_and_grad if segmented else partial(whole_value_and_grad, scorer)
    missing = {
        "This model's head cannot be told apart from its body: the logits of every position are computed.": (
            mode.split_head and split_head and not scorer.splits_head
        ),
        "This model cannot share a prompt: each prompt is run once per completion.": (
            mode.share_prompt and share_prompt and not scorer.shares_prompt
        ),
        f"This model's layers cannot be run in segments ({why_not}): instead of `memory={name}` it takes fast.": (
            why_not != ""
        ),
    }
    notes = tuple(note for note, holds in missing.items() if holds)
    return scorer, Memory(name, value_and_grad, segmented is None, (*notes, *scorer.notes))
