"""How the process holds memory: what is wired, what is cached, what is given back."""

from __future__ import annotations

import ctypes
import sys

import mlx.core as mx

_CACHE_SHARE = 0.1
# glibc's names are M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER_TRIM, _LARGEST_MMAP_THRESHOLD = (1 << 31) - 1, 1 << 30


def working_set_bytes() -> int | None:
    """What the device recommends as the most to use; None where it reports no such size."""
    size = mx.device_info().get("max_recommended_working_set_size")
    return None if size is None else int(size)


def settle() -> None:
    """Set the limits a training run wants, for the whole process.

    On Metal: weights stay resident up to what the device recommends, and freed buffers kept for reuse take at most a
    tenth of that. On Linux, freed memory stays with the process: MLX's CPU allocator returns every large array to the
    system, which hands it back page by page (2 to 4 times the time of an elementwise operation on arrays over 1 MB).
    """
    size = working_set_bytes()
    if size is not None:
        mx.set_wired_limit(size)
        mx.set_cache_limit(int(_CACHE_SHARE * size))
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_TRIM_THRESHOLD, _NEVER_TRIM)
            mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)


def clear_cache_above(threshold: int | None) -> None:
    """Give back what MLX keeps for reuse if that is more than `threshold` bytes; None: never."""
    if threshold is not None and mx.get_cache_memory() > threshold:
        mx.clear_cache()
