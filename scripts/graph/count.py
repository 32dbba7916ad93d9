"""Counts what a training step builds and waits for, usually without computing any of it.

    with counting() as cost:
        cost.add(step())
    print(cost.nodes.total(), cost.evals, cost.host_waits)

While it counts, `mx.eval` and `mx.async_eval` count the graphs they are given instead of evaluating them, and what
would read an array's numbers (`.item()`, `.tolist()`, `float()`, `np.array()`, ...) is given zeros, and True where they
are booleans. So a model of four billion parameters needs neither time nor memory, and a step that looks at its numbers
takes the way of zeros. With `evaluate=True` everything is evaluated as well: for small models, where numbers matter.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from scripts.graph.kernels import dispatches, launches
from scripts.graph.metal import metal_graph, replaced
from scripts.graph.walker import Node, Walker

_READS = ("item", "tolist", "__float__", "__int__", "__index__", "__bool__", "__repr__", "__str__", "__format__")
_ARRAY_READS = ("array", "asarray", "asanyarray", "ascontiguousarray")


class Cost:
    """What has been counted."""

    def __init__(self, walker: Walker, *, evaluate: bool = False, walk: bool = True) -> None:
        self.nodes: Counter[Node] = Counter()
        """Nodes of all graphs that were evaluated, or would have been."""
        self.evals = 0
        """Graphs handed to the device: by `mx.eval` and `mx.async_eval`, and by reads of arrays that were not
        evaluated. Calls that find nothing to evaluate are not counted."""
        self.async_evals = 0
        """Those of them that the host does not wait for."""
        self.host_waits = 0
        """Reads for which the host waits, each a stop of the device, and `mx.synchronize` while something runs."""
        self.stops = 0
        """Times that the host waits for the device, by reading or by `mx.eval`."""
        self.build_seconds = 0.0
        """Processor time of this process inside, without what counting and evaluating took."""
        self._walker, self._evaluate, self._walk = walker, evaluate, walk
        self._running: list[mx.array] = []
        self._not_building = 0.0
        self._real_eval, self._real_async_eval = mx.eval, mx.async_eval

    @property
    def dispatches(self) -> int:
        """Nodes that run on the device; views are not."""
        return sum(times * dispatches(node) for node, times in self.nodes.items())

    @property
    def launches(self) -> int:
        """Kernels launched: two and more for some nodes."""
        return sum(times * launches(node) for node, times in self.nodes.items())

    def add(self, *trees: Any) -> int:
        """Count what `trees` of arrays need and has not been counted, without an evaluation; returns how many nodes."""
        found = 0
        with self._aside():
            if self._walk:
                nodes = self._walker.walk(arrays_in(trees))
                self.nodes += nodes
                found = nodes.total()
            if self._evaluate:
                self._real_eval(*trees)
                # Addresses of what is freed now will name other arrays.
                self._walker.forget()
        return found

    def eval(self, *trees: Any) -> None:
        """Stands for `mx.eval`."""
        found = self.add(*trees) > 0
        self.evals += found
        self._stop(found)

    def async_eval(self, *trees: Any) -> None:
        """Stands for `mx.async_eval`."""
        if self.add(*trees):
            self.evals += 1
            self.async_evals += 1
            self._running += arrays_in(trees)

    def synchronize(self, *_: Any) -> None:
        """Stands for `mx.synchronize`."""
        self.host_waits += bool(self._running)
        self._stop(bool(self._running))

    def read(self, array: mx.array) -> bool:
        """Note that the host reads `array`; returns whether zeros have to do."""
        pending = self._walker.is_pending(array)
        if pending or any(array is running for running in self._running):
            self.host_waits += 1
            self.evals += pending
            self.add(array)
            self._stop(True)
        return not self._walker.is_evaluated(array)

    def _stop(self, waits: bool) -> None:
        self.stops += waits
        self._running.clear()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        start = time.process_time()
        yield
        self._not_building += time.process_time() - start


@contextmanager
def counting(*, evaluate: bool = False, walk: bool = True) -> Iterator[Cost]:
    """Count what is built inside, as it would be for a Mac's GPU.

    With `evaluate`, numbers are computed too; without `walk`, nodes are not counted, and `build_seconds` alone is of
    interest.

    Raises:
        UserError: the walker of graphs cannot be compiled.
    """
    walker = Walker()
    walker.forget()
    cost = Cost(walker, evaluate=evaluate, walk=walk)
    with ExitStack() as stack:
        stack.callback(walker.forget)
        stack.enter_context(metal_graph(evaluate=evaluate))
        for owner, functions in _stand_ins(cost):
            stack.enter_context(replaced(owner, **functions))
        start = time.process_time()
        yield cost
        cost.build_seconds = time.process_time() - start - cost._not_building


def arrays_in(tree: Any) -> list[mx.array]:
    """The arrays of a tree as `mx.eval` takes it: dicts (as modules are), lists and tuples; the rest is left out."""
    if isinstance(tree, mx.array):
        return [tree]
    if isinstance(tree, dict):
        return [array for value in tree.values() for array in arrays_in(value)]
    if isinstance(tree, (list, tuple)):
        return [array for value in tree for array in arrays_in(value)]
    return []


def _stand_ins(cost: Cost) -> list[tuple[Any, dict[str, Any]]]:
    """What is replaced while `cost` counts."""
    reads = {name: _reading(cost, getattr(mx.array, name), partial(_read_zeros, name)) for name in _READS}
    arrays = {name: _reading(cost, getattr(np, name), _zeros) for name in _ARRAY_READS}
    evals = {"eval": cost.eval, "async_eval": cost.async_eval, "synchronize": cost.synchronize}
    return [(mx, evals), (mx.array, reads), (np, arrays)]


def _reading(cost: Cost, read: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    def run(array: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(array, mx.array) and cost.read(array):
            return stand_in(array, *args, **kwargs)
        return read(array, *args, **kwargs)

    return run


def _read_zeros(name: str, array: mx.array, *args: Any) -> Any:
    """What the method `name` of numpy's zeros returns."""
    if name == "__index__":
        return 0
    return getattr(_zeros(array), name)(*args)


def _zeros(array: mx.array, dtype: Any = None, *_: Any, **__: Any) -> Any:
    fill = np.ones if array.dtype == mx.bool_ else np.zeros
    return fill(array.shape, _numpy_dtype(array) if dtype is None else dtype)


def _numpy_dtype(array: mx.array) -> Any:
    return np.dtype(np.float32) if array.dtype == mx.bfloat16 else np.dtype(str(array.dtype).rpartition(".")[2])
