"""Which shapes are compiled, how often, and that a trace outlives the others."""

from __future__ import annotations

from collections import Counter

import mlx.core as mx
import numpy as np

from orpo_mlx.data.batching import TrainingOrder, collate, micro_batches
from orpo_mlx.device_profile import GPU
from orpo_mlx.engine.compiled import CompiledByShape
from orpo_mlx.training.steps.step_functions import TRACED_AT
from orpo_mlx.types import TokenizedPair


class Counted:
    """A function that counts its real calls: traces, and calls that are not compiled."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: mx.array) -> mx.array:
        self.calls += 1
        return x + 1


def test_a_trace_that_is_dropped_takes_no_other_with_it() -> None:
    real = Counted()
    function = CompiledByShape(real, list, 4)
    sizes = [mx.zeros(length) for length in range(1, 6)]
    for array in sizes:
        function(array)
    # The first is dropped; the four that are kept are replayed.
    for array in sizes[1:]:
        function(array)
    assert real.calls == function.traced == 5
    function(sizes[0])
    assert real.calls == function.traced == 6


def test_shapes_are_compiled_once_they_have_recurred() -> None:
    real = Counted()
    function = CompiledByShape(real, list, 1, traced_at=3)
    for number in range(5):
        assert mx.array_equal(function(mx.array([1.0])), mx.array([2.0])).item()
        assert function.traced == (number >= 2)
    assert real.calls == 3
    # Dropped for another, its shape is counted from the beginning again.
    for _ in range(3):
        function(mx.zeros(2))
    for number in range(3):
        function(mx.zeros(1))
        assert function.traced == 2 + (number == 2)


def test_of_real_lengths_few_micro_batches_are_traced() -> None:
    """Drawn as chat data has them: most shapes come once or a few times, and tracing each takes more than it saves."""
    rng = np.random.default_rng(0)
    drawn = np.exp(rng.normal(np.log([150, 250, 250]), [1.0, 0.8, 0.8], (400, 3))).clip(4, 1024).astype(int)
    pairs = [TokenizedPair(*((1,) * length for length in row)) for row in drawn.tolist()]
    function = CompiledByShape(lambda x: x + 1, list, GPU.most_traces, TRACED_AT)
    met: Counter[tuple[int, ...]] = Counter()
    for _, batch in zip(range(300), TrainingOrder(pairs, 4, seed=0, shuffle=True), strict=False):
        for part in micro_batches([pairs[index] for index in batch], 4, GPU.micro_batch_tokens, GPU.layout):
            made = collate(part, GPU.layout)
            shape = (len(part), made.row_ids[0].shape[1], made.targets.size)
            met[shape] += 1
            function(mx.zeros(shape))
    assert len(met) > 4 * GPU.most_traces
    # In the figures of `TRACED_AT`, against the better of "never compiled" and "compiled at once" for each shape.
    plain, trace, replay = 0.055, 0.42, 0.03
    calls, traced = sum(met.values()), function.traced
    assert traced <= sum(count >= TRACED_AT for count in met.values())
    spent = (calls - traced) * plain + traced * trace
    best = sum(min(count * plain, trace + (count - 1) * replay) for count in met.values())
    at_once = sum(trace + (count - 1) * replay for count in met.values())
    assert spent <= 1.5 * best < at_once
