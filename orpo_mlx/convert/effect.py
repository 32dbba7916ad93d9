"""How much of an adapter's effect a merged model keeps, in nats on pairs: quantising can round it away."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from orpo_mlx.data.pairs import load_pairs
from orpo_mlx.data.prompts import spread
from orpo_mlx.data.tokens.tokenization import PairTokenizer
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.engine.score import score_pairs
from orpo_mlx.errors import DataError
from orpo_mlx.models.adapters import add_trained_adapters
from orpo_mlx.models.loading import LoadedModel, load
from orpo_mlx.models.vocabulary import check_ids, vocabulary_of
from orpo_mlx.types import Example, TokenizedPair

MOST_PAIRS = 100
"""Pairs that are measured on, spread evenly over those given."""
ENOUGH = 0.9
"""A share of the effect below which is warned."""


class Effect(NamedTuple):
    """What an adapter does to pairs' margins, log p(chosen) - log p(rejected), and what is left of it once merged.

    A quantised merge is held against the base quantised in the same way: what quantising does to the base itself is not
    the adapter's.
    """

    pairs: int
    kept: float
    """Σ (merged - its base)(tuned - base) / Σ (tuned - base)², over the pairs' margins: 1 where all of it is kept."""
    tuned_change: float
    """Mean of tuned - base, nats; so is the next of merged - its base."""
    merged_change: float
    off: float
    """Mean of |(merged - its base) - (tuned - base)|, nats."""


class Margins(NamedTuple):
    """Margins of the same pairs, nats."""

    base: Sequence[float]
    tuned: Sequence[float]
    """With the adapter."""
    merged: Sequence[float]
    merged_base: Sequence[float]
    """Of the base in the form of the merged model."""


def measure_effect(model: str, adapter: Path, merged: Path, data: Path, *, trust_remote_code: bool) -> Effect:
    """Measure on the pairs in a file.

    Raises:
        UserError: the pairs or a model cannot be used.
    """
    loaded = load(str(merged), trust_remote_code=trust_remote_code)
    each = PairTokenizer(loaded.tokenizer).each(load_pairs(data))
    found = [pair for pair in each if isinstance(pair, TokenizedPair)]
    if not found:
        raise DataError(f"{data}: holds no pairs of a chosen and a rejected side to measure on.")
    pairs = spread(found, MOST_PAIRS)
    vocabulary = vocabulary_of(loaded.model)
    for pair in pairs:
        check_ids(vocabulary, [*pair.prompt_ids, *itertools.chain(*pair.completions)], pair.location)
    after = margins_of(loaded, pairs)
    forms = quantised_layers(loaded.model)
    # One model at a time: two need not fit.
    del loaded
    gc.collect()
    base = load(model, trust_remote_code=trust_remote_code)
    untouched = margins_of(base, pairs)
    quantise_as(base.model, forms)
    same_form = margins_of(base, pairs) if forms else untouched
    del base
    gc.collect()
    tuned = load(model, trust_remote_code=trust_remote_code)
    add_trained_adapters(tuned.model, adapter)
    return effect_of(Margins(untouched, margins_of(tuned, pairs), after, same_form))


def quantised_layers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """How each quantised layer of a model is quantised, by its name."""
    return {
        name: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for name, module in model.named_modules()
        if "scales" in module
    }


def quantise_as(model: nn.Module, forms: Mapping[str, Mapping[str, Any]]) -> None:
    """Quantise the layers of `model` that are named, as it says there; those that are quantised already stay."""

    def form(name: str, module: nn.Module) -> bool | dict[str, Any]:
        return dict(forms[name]) if name in forms and hasattr(module, "to_quantized") else False

    nn.quantize(model, class_predicate=form)
    mx.eval(model.parameters())


def margins_of(loaded: LoadedModel, pairs: Sequence[Example]) -> list[float]:
    """Each pair's log p(chosen) - log p(rejected), nats."""
    rows = score_pairs(PairScorer(loaded.model), pairs)
    return [float(row["chosen_logps"] - row["rejected_logps"]) for row in rows]


def effect_of(margins: Margins) -> Effect:
    """The figures of some margins; an adapter without any effect keeps all of it."""
    base, tuned, merged, merged_base = (np.asarray(each, np.float64) for each in margins)
    wanted, found = tuned - base, merged - merged_base
    size = float(wanted @ wanted)
    kept = float(found @ wanted) / size if size > 0 else 1.0
    off = float(np.abs(found - wanted).mean())
    return Effect(len(base), kept, float(wanted.mean()), float(found.mean()), off)


def effect_text(effect: Effect) -> str:
    """The figures in a sentence, and a warning where little is left."""
    said = (
        f"{effect.kept:.1%} of the adapter's effect is kept on {effect.pairs} pairs: margins move by "
        f"{effect.merged_change:+.3f} nats where the adapter moves them by {effect.tuned_change:+.3f}, and are "
        f"{effect.off:.3f} off"
    )
    if effect.kept >= ENOUGH:
        return said
    return (
        f"Warning: {said}. Below {ENOUGH:.0%}: `mode=mixed` keeps adapted layers at 8 bits, `bits=8` all of them, and "
        "the adapter can be used unmerged."
    )
