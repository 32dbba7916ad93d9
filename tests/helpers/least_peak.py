"""The peak of MLX's memory while something is computed."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

_TRIES = 5


def least_peak(compute: Callable[[], object], enough: float = 0) -> int:
    """Bytes above what was held before, the least of several tries: on a busy machine a CPU's stream allocates ahead of
    what it frees. The first try that takes less than `enough` is the last."""
    peaks: list[int] = []
    for _ in range(_TRIES):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        compute()
        peaks.append(mx.get_peak_memory() - before)
        if peaks[-1] < enough:
            break
    return min(peaks)
