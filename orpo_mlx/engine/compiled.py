"""Functions compiled once for each set of shapes, a bounded number of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten


class CompiledByShape:
    """`function`, compiled (`mx.compile`) for each set of shapes and dtypes that its arguments have.

    `mx.compile` alone keeps every trace for ever: some ten thousand nodes each, and on Metal the process ends at
    499,000 resources. Here the least recently used trace is dropped beyond `most`; met again, its shapes are traced
    again, which costs what building the graph once without compilation does.

    Args:
        function: of trees of arrays; returns a tree of arrays. It must not evaluate anything.
        state: trees that it reads and may replace arrays in, such as a model's parameters.
        most: traces kept; 0 calls `function` as it is.
    """

    def __init__(self, function: Callable[..., Any], state: Callable[[], list[Any]], most: int) -> None:
        self._function, self._state, self._most = function, state, most
        self._traces: OrderedDict[tuple[Any, ...], Callable[..., Any]] = OrderedDict()
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
        else:
            state = self._state() or None
            self._traces[key] = mx.compile(self._function, inputs=state, outputs=state)
            self.traced += 1
            if len(self._traces) > self._most:
                self._traces.popitem(last=False)
        return self._traces[key](*arguments)


def _arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """Arrays of a tree by their places in it; what is no array, such as None, is not counted."""
    flat: dict[str, Any] = dict(tree_flatten(tree))
    return [(name, value) for name, value in flat.items() if isinstance(value, mx.array)]
