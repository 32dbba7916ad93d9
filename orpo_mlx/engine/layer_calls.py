"""What a model's own backbone passes to its layers, found out without running them.

How states travel between layers (embedding scale, masks, positions, final norm) stays the model's business: its
backbone is called with stand-ins in the layers' places, which take note of what they are called with and pass states
on. MLX never evaluates what nobody asks for, so this costs the building of a few nodes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from orpo_mlx.engine.pair_scorer import PairScorer
from orpo_mlx.types import Batch


class CannotSegmentError(Exception):
    """This model's layers are not called one after another with states alone between them."""


class LayerCall(NamedTuple):
    """What one layer is called with, beside the states."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    cache: Any = None
    """The one among them that the layer was given for this sequence, if any."""


class SequenceCalls(NamedTuple):
    """How a backbone runs one array of token ids."""

    entering: mx.array
    """States (R, L, H) that enter the first layer."""
    calls: list[LayerCall]
    """One a layer."""


class RecordingLayer:
    """Stands in a layer's place, takes note of a call and passes on the states it was given."""

    def __init__(self, layer: Any, extra_outputs: int | None, given: mx.array | None = None) -> None:
        self._layer, self._given = layer, given
        self.entering: mx.array | None = None
        self.leaving: mx.array | None = None
        self.call = LayerCall((), {})
        self.extra_outputs = extra_outputs

    # Some backbones choose masks by their layers' class: a stand-in says that it is of the layer's.
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, states: mx.array, *arguments: Any, **options: Any) -> Any:
        self.entering, self.call = states, LayerCall(arguments, options)
        self.leaving = states if self._given is None else self._given
        return self.leaving if self.extra_outputs is None else (self.leaving, *[None] * self.extra_outputs)


class _EnoughSeenError(Exception):
    """Ends a backbone's call."""


class _FirstLayer(RecordingLayer):
    """Runs the layer, and sees how many things it returns beside its states: None where it returns states alone."""

    def __call__(self, states: mx.array, *arguments: Any, **options: Any) -> Any:
        output = self._layer(states, *arguments, **options)
        self.extra_outputs = len(output) - 1 if isinstance(output, tuple) else None
        raise _EnoughSeenError


class LayerRecorder:
    """Records a backbone's calls of its layers.

    Args:
        scorer: of a model whose head can be told apart.

    Raises:
        CannotSegmentError: states do not go from each layer to the next as they are.
    """

    def __init__(self, scorer: PairScorer) -> None:
        self._scorer = scorer
        self._backbone: Any = scorer.backbone
        self.layers: list[Any] = self._backbone.layers
        self._extra_outputs: int | None = None
        self._extra_outputs = self._count_extra_outputs()

    def record(self, batch: Batch) -> list[SequenceCalls]:
        """How the backbone runs each of a batch's arrays of token ids, in the order of `PairScorer.sequences`."""
        found: list[SequenceCalls] = []

        def run(ids: mx.array, caches: Any) -> mx.array:
            with self._recording() as layers:
                output: mx.array = self._backbone(ids, cache=caches)
            # The last one's states may be normed before they are returned.
            passed = itertools.pairwise(layers)
            if layers[0].entering is None or any(low.leaving is not high.entering for low, high in passed):
                raise CannotSegmentError("states are changed between layers")
            found.append(SequenceCalls(layers[0].entering, [with_cache(layer.call, caches) for layer in layers]))
            return output

        self._scorer.sequences(batch, run)
        return found

    def finish(self, batch: Batch, leaving: Sequence[mx.array]) -> tuple[mx.array, ...]:
        """What the backbone returns where those states leave its last layer."""
        given = iter(leaving)

        def run(ids: mx.array, caches: Any) -> mx.array:
            with self._recording(next(given)):
                output: mx.array = self._backbone(ids, cache=caches)
            return output

        return self._scorer.sequences(batch, run)

    def _count_extra_outputs(self) -> int | None:
        """How many things layers return beside their states; None where they return states alone."""
        first = _FirstLayer(self.layers[0], None)
        try:
            self._backbone.layers = [first, *self.layers[1:]]
            self._backbone(mx.zeros((1, 1), mx.int32))
        except _EnoughSeenError:
            pass
        finally:
            self._backbone.layers = self.layers
        return first.extra_outputs

    @contextmanager
    def _recording(self, leaving: mx.array | None = None) -> Iterator[list[RecordingLayer]]:
        last = len(self.layers) - 1
        layers = [
            RecordingLayer(layer, self._extra_outputs, leaving if number == last else None)
            for number, layer in enumerate(self.layers)
        ]
        self._backbone.layers = layers
        try:
            yield layers
        finally:
            self._backbone.layers = self.layers


def with_cache(call: LayerCall, caches: Sequence[Any] | None) -> LayerCall:
    """The call with its cache named, one of `caches`."""
    values = (*call.arguments, *call.options.values())
    cache = next((value for value in values if any(value is each for each in caches or ())), None)
    return call._replace(cache=cache)


def split_arrays(calls: Sequence[LayerCall]) -> tuple[list[mx.array], str]:
    """The arrays among what layers are called with, and all else in words, equal only where the calls are."""
    arrays: list[mx.array] = []

    def words(value: Any, cache: Any) -> str:
        if isinstance(value, mx.array):
            arrays.append(value)
            return f"array {value.shape} {value.dtype}"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {words(each, cache)}" for key, each in value.items()) + "}"
        if isinstance(value, (tuple, list)):
            return "(" + ", ".join(words(each, cache) for each in value) + ")"
        # Each layer has a cache of its own: which one it is makes no difference, what it is does.
        return type(value).__name__ if value is cache else repr(value)

    return arrays, "; ".join(words(call[:2], call.cache) for call in calls)


def call_layer(layer: Any, states: mx.array, call: LayerCall, arrays: Iterator[mx.array], cache: Any) -> mx.array:
    """The layer's states where it is called as in `call`, but with the next of `arrays`, in `split_arrays`' order, and
    with `cache`, in place of those there."""

    def filled(value: Any) -> Any:
        if isinstance(value, mx.array):
            return next(arrays)
        if isinstance(value, dict):
            return {key: filled(each) for key, each in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(map(filled, value))
        return cache if call.cache is not None and value is call.cache else value

    output = layer(states, *filled(call.arguments), **filled(call.options))
    result: mx.array = output[0] if isinstance(output, tuple) else output
    return result


def layer_kind(layer: nn.Module) -> str:
    """All that a layer's code may depend on but its parameters' values, in words: layers of one kind run alike."""
    parts = []
    for path, module in sorted(layer.named_modules()):
        settings = {key: value for key, value in vars(module).items() if key not in ("_no_grad", "_training")}
        parts.append(f"{path} {type(module).__module__}.{type(module).__qualname__} {sorted(settings.items())}")
        # Arrays under a private name are no parameters, but constants such as RoPE's frequencies.
        parts += [f"{key} {_constant(value)}" for key, value in sorted(module.items()) if not _is_tree(key, value)]
    flat: dict[str, mx.array] = dict(tree_flatten(layer.parameters()))
    parts += [f"{name} {flat[name].shape} {flat[name].dtype}" for name in sorted(flat)]
    parts += dict(tree_flatten(layer.trainable_parameters()))
    return "\n".join(parts)


def _is_tree(key: str, value: Any) -> bool:
    """Whether an entry of a module is a parameter or a module, or such in a list or table."""
    private = key.startswith("_")
    if isinstance(value, (list, tuple)):
        return all(_is_tree(key, each) for each in value)
    if isinstance(value, dict) and not isinstance(value, nn.Module):
        return all(_is_tree(key, each) for each in value.values())
    return isinstance(value, nn.Module) or (isinstance(value, mx.array) and not private)


def _constant(value: Any) -> str:
    return repr(np.array(value.astype(mx.float32)).tolist()) if isinstance(value, mx.array) else repr(value)
