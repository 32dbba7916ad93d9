"""The backward pass in segments of layers: memory for one segment and the states between segments, not for all layers.

MLX is lazy: checkpoints inside one graph save memory only as well as its schedule happens to run. Here the forward pass
keeps the states that enter each segment and is evaluated as it goes; after the head, segments are walked from the last
to the first: run again with gradient, evaluated, freed. A pair's prompt and completions go through a segment together,
so the prompt's keys and values live and die inside of it.

How states travel between layers (embedding scale, masks, positions, final norm) stays the model's business: its own
backbone is called each time, with the layers outside of the segment replaced by ones that pass states on. MLX never
evaluates what nobody asks for, so the replaced parts cost nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from orpo_mlx.engine.equivalence import close, probe_pairs, without_dropout
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.types import Batch

Streams = tuple[mx.array, ...]
"""States of each token sequence of a batch, as `PairScorer.streams` orders them."""
Share = Callable[[mx.array], tuple[mx.array, Any]]
"""States to a scalar and whatever else is wanted."""
Gradients = dict[str, mx.array]
"""By flat parameter name."""

ValueAndGrad = Callable[[Batch, Share], tuple[tuple[mx.array, Any], Gradients]]
"""((value, other), gradients) of `share(states of a batch)` towards what is trained."""

_SEEDS = 1 << 30


class LayerWalk:
    """Runs parts of a model's backbone.

    Args:
        scorer: the policy, whose head can be told apart.
        segment_layers: layers that are run and freed together.
        kept_layers: layers at the end whose activations are kept, so that they are not run twice.
    """

    def __init__(self, scorer: PairScorer, *, segment_layers: int = 1, kept_layers: int = 0) -> None:
        assert scorer.head is not None
        self.scorer = scorer
        self.prefix = f"{scorer.head.backbone_name}.layers."
        self.backbone: Any = scorer.backbone
        self.depth = len(self.backbone.layers)
        self.segment_layers, self.kept_layers = segment_layers, kept_layers
        self._beside: int | None = None
        self._beside = self._returned_beside()

    def value_and_grad(self, batch: Batch, share: Share) -> tuple[tuple[mx.array, Any], Gradients]:
        """Value and gradients of `share(scorer.states(batch))`, as `whole_value_and_grad` gives them."""
        trained = dict(tree_flatten(self.scorer.model.trainable_parameters()))
        first = min(map(self._layer_of, trained))
        kept_from = max(first, self.depth - self.kept_layers)
        bounds = sorted({*range(first, kept_from, self.segment_layers), kept_from})
        streams = self._run(batch, None, 0, first)
        mx.eval(streams)
        boundaries: list[tuple[int, Streams]] = []
        # Dropout must be drawn the same when a segment runs again: each has a seed, drawn as if it were a dropout mask.
        seed = int(np.array(mx.random.randint(0, _SEEDS)))
        for low, high in itertools.pairwise(bounds):
            mx.random.seed(seed + low)
            boundaries.append((low, streams))
            streams = self._run(batch, streams, low, high)
            mx.eval(streams)
        mx.random.seed(seed + kept_from)
        names = [name for name in trained if self._layer_of(name) >= kept_from]
        (output, gradients, cotangents), high = self._last(batch, share, kept_from, streams, names), kept_from
        while boundaries:
            low, streams = boundaries.pop()
            mx.random.seed(seed + low)
            names = [name for name in trained if low <= self._layer_of(name) < high]
            pulled, cotangents = self._pull_back(
                batch, low, high, streams, names, cotangents, to_states=bool(boundaries)
            )
            gradients |= pulled
            high = low
        mx.random.seed(seed + self.depth)
        return output, gradients

    def _last(
        self, batch: Batch, share: Share, low: int, streams: Streams, names: list[str]
    ) -> tuple[tuple[mx.array, Any], Gradients, Streams]:
        """`share` through the layers from `low` on: its output, and gradients to their parameters and to `streams`."""

        def function(arrays: tuple[list[mx.array], list[mx.array]]) -> tuple[mx.array, Any]:
            self._set(names, arrays[0])
            outputs = self._run(batch, tuple(arrays[1]), low, self.depth, normed=True)
            return share(self.scorer.wanted(batch, outputs))

        with self._parameters(names) as parameters:
            output, (gradients, cotangents) = mx.value_and_grad(function)((parameters, list(streams)))
            mx.eval(output, gradients, cotangents)
        return output, dict(zip(names, gradients, strict=True)), tuple(cotangents)

    def _pull_back(
        self,
        batch: Batch,
        low: int,
        high: int,
        streams: Streams,
        names: list[str],
        cotangents: Streams,
        *,
        to_states: bool,
    ) -> tuple[Gradients, Streams]:
        """Gradients to a segment's parameters and, with `to_states`, to the states that enter it."""

        def function(*arrays: mx.array) -> list[mx.array]:
            self._set(names, arrays[: len(names)])
            return list(self._run(batch, arrays[len(names) :] or streams, low, high))

        with self._parameters(names) as parameters:
            primals = [*parameters, *(streams if to_states else ())]
            gradients = mx.vjp(function, primals, list(cotangents))[1]
            mx.eval(gradients)
        return dict(zip(names, gradients, strict=False)), tuple(gradients[len(names) :])

    def _returned_beside(self) -> int | None:
        """How many things layers return after their states; None where they return states alone."""
        with self._stand_ins(0, self.depth, None) as layers:
            self.backbone(mx.zeros((1, 1), mx.int32))
        return layers[0].beside

    def _run(self, batch: Batch, streams: Streams | None, low: int, high: int, *, normed: bool = False) -> Streams:
        """States that enter layer `low` (None: ids do) to those that enter layer `high`, or to the output."""
        entering: Iterator[mx.array | None] = itertools.repeat(None) if streams is None else iter(streams)

        def run(ids: mx.array, caches: Any) -> mx.array:
            with self._stand_ins(low, high, next(entering)) as layers:
                output: mx.array = self.backbone(ids, cache=caches)
            return output if normed else layers[high].entering if high < self.depth else layers[-1].leaving

        with self.scorer.layers():
            return self.scorer.sequences(batch, run)

    @contextmanager
    def _stand_ins(self, low: int, high: int, states: mx.array | None) -> Iterator[list[_StandIn]]:
        layers = self.backbone.layers
        self.backbone.layers = [
            _StandIn(layer, low <= number < high, self._beside) for number, layer in enumerate(layers)
        ]
        self.backbone.layers[0].given = states
        try:
            yield self.backbone.layers
        finally:
            self.backbone.layers = layers

    @contextmanager
    def _parameters(self, names: Sequence[str]) -> Iterator[list[mx.array]]:
        """The named parameters' values, which are put back at the end."""
        trained = dict(tree_flatten(self.scorer.model.trainable_parameters()))
        values = [trained[name] for name in names]
        try:
            yield values
        finally:
            self._set(names, values)

    def _set(self, names: Sequence[str], values: Sequence[mx.array]) -> None:
        self.scorer.model.update(tree_unflatten(list(zip(names, values, strict=True))))

    def _layer_of(self, name: str) -> int:
        return int(name[len(self.prefix) :].split(".")[0])


class _StandIn:
    """A layer that is run or passed by, and remembers what came in and what went out."""

    def __init__(self, layer: Any, runs: bool, beside: int | None) -> None:
        self._layer, self._runs, self.beside = layer, runs, beside
        self.given: mx.array | None = None
        self.entering = self.leaving = mx.array(0.0)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The layer's: some backbones choose masks by it."""
        return type(self._layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, states: mx.array, *arguments: Any, **options: Any) -> Any:
        self.entering = states if self.given is None else self.given
        if not self._runs:
            self.leaving = self.entering
            return self.leaving if self.beside is None else (self.leaving, *[None] * self.beside)
        output = self._layer(self.entering, *arguments, **options)
        # Some layers return keys and values as well, for later layers to share.
        several = isinstance(output, tuple)
        self.leaving, self.beside = (output[0], len(output) - 1) if several else (output, None)
        return output


def whole_value_and_grad(scorer: PairScorer, batch: Batch, share: Share) -> tuple[tuple[mx.array, Any], Gradients]:
    """((value, other), gradients by flat name) of `share(scorer.states(batch))` towards what is trained, one graph."""
    model, trained = scorer.model, scorer.model.trainable_parameters()

    def function(parameters: dict[str, Any]) -> tuple[mx.array, Any]:
        model.update(parameters)
        return share(scorer.states(batch))

    try:
        output, gradients = mx.value_and_grad(function)(trained)
    finally:
        # What stands in the model now belongs to the trace; `mx.compile` would meet it again at its next call.
        model.update(trained)
    return output, dict(tree_flatten(gradients))


def find_walk(scorer: PairScorer, *, segment_layers: int, kept_layers: int) -> LayerWalk | None:
    """The walk, proven on a few tokens to give the model's own states and gradients; None where it does not."""
    model = scorer.model
    if scorer.head is None or not scorer.head.is_frozen or not isinstance(scorer.backbone.get("layers"), list):
        return None
    batch = scorer.collate(probe_pairs(scorer.layout), with_prompt=True)

    def share(states: mx.array) -> tuple[mx.array, mx.array]:
        # Weighted: the plain mean square of what an RMS norm has normalised is a constant, and its gradient is noise.
        squares = states.astype(mx.float32).square()
        return (squares * mx.linspace(0.5, 1.5, squares.shape[-1])).mean(), states

    with without_dropout(model):
        try:
            walk = LayerWalk(scorer, segment_layers=segment_layers, kept_layers=kept_layers)
            (_, states), gradients = walk.value_and_grad(batch, share)
        except Exception:
            return None
        (_, expected_states), expected = whole_value_and_grad(scorer, batch, share)
    return (
        walk
        if close(states, expected_states) and all(close(gradients[name], expected[name]) for name in expected)
        else None
    )
