"""Functions compiled for the sets of shapes that recur, a bounded number of them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten


class CompiledByShape:
    """`function`, compiled (`mx.compile`) for each set of shapes and dtypes that its arguments have often enough.

    A trace pays only where it is replayed often, and most shapes of a run are not: the function is called as it is
    until they are met for the `traced_at`-th time. `mx.compile` alone also keeps every trace for ever: some ten
    thousand nodes each, and on Metal the process ends at 499,000 resources. Here the least recently used trace is
    dropped beyond `most`, and its shapes are counted from the beginning again: never more than one call in `traced_at`
    is a trace, however many shapes take turns.

    Args:
        function: of trees of arrays; returns a tree of arrays. It must not evaluate anything.
        state: trees that it reads and may replace arrays in, such as a model's parameters.
        most: traces kept; 0 calls `function` as it is.
        traced_at: the meeting at which shapes are traced; 1 traces them at once.
    """

    def __init__(
        self, function: Callable[..., Any], state: Callable[[], list[Any]], most: int, traced_at: int = 1
    ) -> None:
        self._function, self._state, self._most, self._traced_at = function, state, most, traced_at
        self._traces: OrderedDict[tuple[Any, ...], Callable[..., Any]] = OrderedDict()
        # By hash: there is no bound to how many shapes are met, and a key names every array.
        self._met: Counter[int] = Counter()
        self.traced = 0
        """How often shapes were traced."""

    @property
    def compiles(self) -> bool:
        """Whether anything is compiled."""
        return self._most > 0

    def __call__(self, *arguments: Any) -> Any:
        if not self._most:
            return self._function(*arguments)
        key = tuple((name, array.shape, array.dtype) for name, array in _arrays(arguments))
        if key in self._traces:
            self._traces.move_to_end(key)
            return self._traces[key](*arguments)
        self._met[hash(key)] += 1
        if self._met[hash(key)] < self._traced_at:
            return self._function(*arguments)
        del self._met[hash(key)]
        state = self._state() or None
        # A callable of its own: MLX keeps traces by the callable's address, and all that are kept under it go with the
        # first compiled function of it that is dropped.
        self._traces[key] = mx.compile(partial(self._function), inputs=state, outputs=state)
        self.traced += 1
        if len(self._traces) > self._most:
            self._traces.popitem(last=False)
        return self._traces[key](*arguments)


def _arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """Arrays of a tree by their places in it; what is no array, such as None, is not counted."""
    flat: dict[str, Any] = dict(tree_flatten(tree))
    return [(name, value) for name, value in flat.items() if isinstance(value, mx.array)]
