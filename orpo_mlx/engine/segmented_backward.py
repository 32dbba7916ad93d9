"""The backward pass in segments of layers: memory for one segment and the states between segments, not for all layers.

MLX is lazy: checkpoints inside one graph save memory only as well as its schedule happens to run. Here the forward pass
keeps the states that enter each segment, and what `kept_outputs` says; after the head, segments are taken from the last
to the first: run again with gradient, and freed. On a CPU each is evaluated before the next is built; a GPU is given
many at a time, each made to wait for the one before (`handover`). A pair's prefix and rows go through a segment
together, so the prefix's keys and values live and die inside of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from orpo_mlx.engine.compiled import CompiledByShape
from orpo_mlx.engine.equivalence import close, probe_pairs, without_dropout
from orpo_mlx.engine.functions.dropout import dropout_from, dropout_keys, has_dropout
from orpo_mlx.engine.handover import Handover
from orpo_mlx.engine.kept_outputs import keeping, taking
from orpo_mlx.engine.layer_calls import (
    LayerCall,
    LayerRecorder,
    SequenceCalls,
    call_layer,
    layer_kind,
    split_arrays,
)
from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.errors import reason_of
from orpo_mlx.types import Batch

Kept = list[list[mx.array]]
"""Outputs of linear layers that need not be computed again, of each call of a layer."""
Streams = tuple[mx.array, ...]
"""States of each array of token ids of a batch, as `PairScorer.sequences` orders them."""
Extra = Any
"""A tree of arrays."""
Share = Callable[[mx.array, Batch, Extra], tuple[mx.array, Any]]
"""States (N, H) of a batch's targets, the batch, and what else it needs: to a scalar and what else is wanted."""
Gradients = dict[str, mx.array]
"""By flat parameter name."""
ValueAndGrad = Callable[[Batch, Extra, Share], tuple[tuple[mx.array, Any], Gradients]]
"""((value, other), gradients) of a share of a batch towards what is trained."""


class Segment(NamedTuple):
    """Layers [low, high) as one batch calls them."""

    low: int
    high: int
    calls: list[list[LayerCall]]
    """Of each layer, for each array of token ids."""
    arrays: list[mx.array]
    """The arrays among what they are called with."""
    kind: str
    """Equal only for segments whose layers run alike but for parameters and arrays."""


class Entered(NamedTuple):
    """A segment that was run forward, and what it needs to be run again."""

    segment: Segment
    streams: Streams
    kept: Kept
    key: mx.array | None
    """From which its dropout masks are drawn, where there is dropout."""

    def after(self, cotangents: Streams, work: Handover) -> Entered:
        """The same, not run again before the segment behind it has given `cotangents`."""
        kept = [list(work.after(outputs, cotangents)) for outputs in self.kept]
        return self._replace(streams=work.after(self.streams, cotangents), kept=kept)


class SegmentedBackward:
    """Gradients of a model's layers, segment by segment.

    Args:
        scorer: the policy, whose head can be told apart.
        segment_layers: layers that are run and freed together.
        kept_layers: layers at the end whose activations are kept, so that they are not run twice.

    Raises:
        CannotSegmentError: the model does not run its layers one after another.
    """

    def __init__(self, scorer: PairScorer, *, segment_layers: int = 1, kept_layers: int = 0) -> None:
        assert scorer.head is not None
        self.scorer = scorer
        self._prefix = f"{scorer.head.backbone_name}.layers."
        self._recorder = LayerRecorder(scorer)
        self._layers = self._recorder.layers
        self._kinds = [layer_kind(layer) for layer in self._layers]
        self._segment_layers, self._kept_layers = segment_layers, kept_layers
        self._functions: dict[Any, CompiledByShape] = {}

    def value_and_grad(self, batch: Batch, extra: Extra, share: Share) -> tuple[tuple[mx.array, Any], Gradients]:
        """Value and gradients of `share`, as `whole_value_and_grad` gives them."""
        sequences = self._recorder.record(batch)
        # Layers before the first trained one pass no gradient on: they are run once, and nothing of them is needed
        # again.
        first = next(number for number, layer in enumerate(self._layers) if trained_names(layer))
        # From here on layers run in one piece with the head and are not run again.
        kept_from = max(first, len(self._layers) - self._kept_layers)
        size = self._segment_layers
        # Segments begin anew at the first trained layer, so that none is half trained; kept layers end the last one,
        # however long it is.
        bounds = sorted({*range(0, first, size), *range(first, kept_from, size), kept_from})
        work = Handover(2 * len(bounds) - 1, self.scorer.profile.handovers)
        streams = tuple(sequence.entering for sequence in sequences)
        # Dropout must be drawn the same when a segment runs again.
        keys = dropout_keys(len(bounds)) if has_dropout(self.scorer.model) else [None] * len(bounds)
        segments = [self._segment(sequences, *each) for each in itertools.pairwise(bounds)]
        entered, streams = self._enter(segments, first, streams, keys, work)
        last = Entered(self._segment(sequences, kept_from, len(self._layers)), streams, [], keys[-1])
        output, gradients, cotangents = self._last(last, batch, extra, share)
        # The last states are of no use any more; the first segment has the others.
        del sequences, segments, streams, last
        work.piece(output, gradients, cotangents)
        cotangents = work.after(cotangents, (output, gradients))
        while entered:
            again = entered.pop().after(cotangents, work)
            found, cotangents = self._backward(again, cotangents, to_states=bool(entered))
            gradients |= found
            cotangents = work.after(cotangents, found)
            work.piece(gradients, cotangents)
        return output, gradients

    def _enter(
        self, segments: Sequence[Segment], first: int, streams: Streams, keys: Any, work: Handover
    ) -> tuple[list[Entered], Streams]:
        """The forward pass: the segments from layer `first`, to be run again, and the states that leave the last."""
        entered: list[Entered] = []
        # There is one key more than segments: the last is for the kept layers.
        for segment, key in zip(segments, keys, strict=False):
            leaving, kept = self._forward(segment, streams, key)
            if segment.low >= first:
                entered.append(Entered(segment, streams, kept, key))
            streams = work.after(leaving, leaving)
            work.piece(streams, [again.kept for again in entered])
        return entered, streams

    def forget(self) -> None:
        """Drop all compiled functions."""
        self._functions.clear()

    def _segment(self, sequences: Sequence[SequenceCalls], low: int, high: int) -> Segment:
        calls = [[sequence.calls[number] for sequence in sequences] for number in range(low, high)]
        arrays, words = split_arrays(list(itertools.chain(*calls)))
        return Segment(low, high, calls, arrays, "\n\n".join([*self._kinds[low:high], words]))

    def _forward(self, segment: Segment, streams: Streams, key: mx.array | None) -> tuple[Streams, Kept]:
        """States that leave a segment, and what running it again need not compute."""
        layers = self._layers[segment.low : segment.high]
        widest = self.scorer.profile.kept_width

        def function(
            parameters: Parameters, streams: Streams, arrays: list[mx.array], key: mx.array | None
        ) -> tuple[Streams, Kept]:
            kept: Kept = []
            with parameters_set(layers, parameters), dropout_from(key):
                return self._run(layers, segment.calls, streams, arrays, lambda: keeping(kept, widest)), kept

        compiled = self._function(("forward", segment.kind), function)
        leaving: tuple[Streams, Kept] = compiled(
            [flat_parameters(layer) for layer in layers], streams, segment.arrays, key
        )
        return leaving

    def _backward(self, entered: Entered, cotangents: Streams, *, to_states: bool) -> tuple[Gradients, Streams]:
        """Gradients to a segment's trained parameters and, with `to_states`, to the states that enter it."""
        segment, widest = entered.segment, self.scorer.profile.kept_width
        layers = self._layers[segment.low : segment.high]

        def function(
            parameters: Parameters,
            streams: Streams,
            kept: Kept,
            arrays: list[mx.array],
            key: mx.array | None,
            cotangents: Streams,
        ) -> Any:
            names = [trained_names(layer) for layer in layers]
            trained = [values[name] for values, own in zip(parameters, names, strict=True) for name in own]

            def run(*primals: mx.array) -> Streams:
                given = iter(primals)
                learnt = [
                    {**values, **{name: next(given) for name in own}}
                    for values, own in zip(parameters, names, strict=True)
                ]
                outputs = iter(kept)
                with parameters_set(layers, learnt), dropout_from(key):
                    return self._run(
                        layers,
                        segment.calls,
                        # States that nothing before them learns from are constants here, not among the primals.
                        tuple(given) or streams,
                        arrays,
                        lambda: taking(next(outputs), widest),
                    )

            # Backward passes of this package's own functions read frozen weights from the layers, after `run` is over.
            with parameters_set(layers, parameters):
                return mx.vjp(run, [*trained, *(streams if to_states else ())], list(cotangents))[1]

        compiled = self._function(("backward", to_states, segment.kind), function)
        parameters = [flat_parameters(layer) for layer in layers]
        found = compiled(parameters, entered.streams, entered.kept, segment.arrays, entered.key, cotangents)
        names = self._trained_names(segment.low, segment.high)
        return dict(zip(names, found, strict=False)), tuple(found[len(names) :])

    def _last(
        self, entered: Entered, batch: Batch, extra: Extra, share: Share
    ) -> tuple[tuple[mx.array, Any], Gradients, Streams]:
        """`share` through the kept layers: its output, and gradients to their parameters and to what enters them."""
        segment = entered.segment
        layers = self._layers[segment.low :]

        def function(streams: Streams, arrays: list[mx.array], key: mx.array | None, batch: Batch, extra: Extra) -> Any:
            def run(parameters: Parameters, streams: Streams) -> tuple[mx.array, Any]:
                with parameters_set(layers, parameters), dropout_from(key):
                    outputs = self._run(layers, segment.calls, streams, arrays)
                    return share(self.scorer.wanted(batch, self._recorder.finish(batch, outputs)), batch, extra)

            trained = [dict(tree_flatten(layer.trainable_parameters())) for layer in layers]
            return mx.value_and_grad(run, argnums=(0, 1))(trained, streams)

        compiled = self._function(("last", segment.low, segment.kind, share), function, self._model_state)
        output, (gradients, cotangents) = compiled(entered.streams, segment.arrays, entered.key, batch, extra)
        values = [value for found in gradients for value in found.values()]
        names = self._trained_names(segment.low, segment.high)
        return output, dict(zip(names, values, strict=True)), tuple(cotangents)

    def _run(
        self,
        layers: Sequence[Any],
        calls: list[list[LayerCall]],
        streams: Streams,
        arrays: list[mx.array],
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Streams:
        """States that enter these layers to those that leave them, prefixes and rows together; each layer is called
        within `around`."""
        given = iter(arrays)
        with self.scorer.layers():
            for layer, own in zip(layers, calls, strict=True):
                prefix: Any = None
                leaving = []
                for states, call in zip(streams, own, strict=True):
                    cache = None
                    if call.cache is not None and prefix is None:
                        cache = prefix = call.cache.fresh(states.shape[1])
                    elif prefix is not None:
                        cache = prefix.branch(states.shape[0] // streams[0].shape[0])
                    with around():
                        leaving.append(call_layer(layer, states, call, given, cache))
                streams = tuple(leaving)
        return streams

    def _function(
        self, key: Any, function: Callable[..., Any], state: Callable[[], list[Any]] = list
    ) -> CompiledByShape:
        """The function that was first made for that key: those of equal keys compute the same."""
        if not self.scorer.profile.compiled:
            return CompiledByShape(function, state, 0)
        # Traced at once: of a graph this small a trace takes what one or two plain calls do, a replay a tenth, and most
        # are called for many layers of one micro-batch.
        return self._functions.setdefault(key, CompiledByShape(function, state, self.scorer.profile.most_traces))

    def _model_state(self) -> list[Any]:
        return [self.scorer.model.state]

    def _trained_names(self, low: int, high: int) -> list[str]:
        """Flat names in the model of what is trained in layers [low, high)."""
        return [
            f"{self._prefix}{number}.{name}"
            for number in range(low, high)
            for name in trained_names(self._layers[number])
        ]


Parameters = list[Gradients]
"""Of each layer, by flat name."""


def trained_names(layer: nn.Module) -> list[str]:
    """Flat names of a layer's trained parameters."""
    return list(dict(tree_flatten(layer.trainable_parameters())))


def flat_parameters(layer: nn.Module) -> Gradients:
    """A layer's parameters, frozen ones too, by flat name."""
    return dict(tree_flatten(layer.parameters()))


@contextmanager
def parameters_set(layers: Sequence[nn.Module], parameters: Parameters) -> Iterator[None]:
    """These parameters in the layers, for the length of a `with` block."""
    own = [layer.parameters() for layer in layers]
    for layer, values in zip(layers, parameters, strict=True):
        layer.update(tree_unflatten(list(values.items())))
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            layer.update(before)


def whole_value_and_grad(
    scorer: PairScorer, batch: Batch, extra: Extra, share: Share
) -> tuple[tuple[mx.array, Any], Gradients]:
    """((value, other), gradients by flat name) of a share of a batch towards what is trained, in one graph."""
    model, trained = scorer.model, scorer.model.trainable_parameters()

    def function(parameters: dict[str, Any]) -> tuple[mx.array, Any]:
        model.update(parameters)
        # Elsewhere what routers say is not kept: it would keep what it was made from.
        with scorer.routers.recorded() if scorer.routers else nullcontext():
            states = scorer.states(batch)
        return share(states, batch, extra)

    try:
        output, gradients = mx.value_and_grad(function)(trained)
    finally:
        # What stands in the model now belongs to the trace; `mx.compile` would meet it again at its next call.
        model.update(trained)
    return output, dict(tree_flatten(gradients))


def find_segmented(
    scorer: PairScorer, *, segment_layers: int, kept_layers: int
) -> tuple[SegmentedBackward | None, str]:
    """The backward pass in segments, or None and why: enabled only if it matches the whole graph's on a probe."""
    if scorer.head is None:
        return None, "its head cannot be told apart from its body"
    if not scorer.head.is_frozen:
        return None, "something outside of its layers is trained"
    if not isinstance(scorer.backbone.get("layers"), list):
        return None, "its layers are not in one list"
    batch = scorer.collate(probe_pairs(scorer.layout), with_prompt=True)
    with without_dropout(scorer.model):
        try:
            segmented = SegmentedBackward(scorer, segment_layers=segment_layers, kept_layers=kept_layers)
            (_, states), gradients = segmented.value_and_grad(batch, (), _probe_share)
            # The probe is a batch of its own shapes: what was traced for it would never be used again.
            segmented.forget()
            (_, expected_states), expected = whole_value_and_grad(scorer, batch, (), _probe_share)
            rounding = expected_states.dtype
            same = close(states, expected_states) and all(
                close(gradients[name], expected[name], rounding) for name in expected
            )
        # Whatever a model's own code raises here, the run goes on by the whole graph and says why.
        except Exception as error:
            return None, reason_of(error)
    return (segmented, "") if same else (None, "its states or gradients differ from those of the whole graph")


def _probe_share(states: mx.array, _: Batch, __: Extra) -> tuple[mx.array, mx.array]:
    # Weighted: the plain mean square of what an RMS norm has normalised is a constant, and its gradient is noise.
    squares = states.astype(mx.float32).square()
    return (squares * mx.linspace(0.5, 1.5, squares.shape[-1])).mean(), states
