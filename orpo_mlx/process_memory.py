"""How the process holds memory: what is wired, what is cached, what is given back."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from orpo_mlx.device_profile import device_profile

_GIB = 2**30

_STATUS = Path("/proc/self/status")

_RUSAGE_INFO_V4 = 4

# Of a GPU's own memory: each process has half a gigabyte of context besides what MLX counts.
_SHARED_OUT, _CACHED = 0.75, 0.1


# glibc's names are M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER_TRIM, _LARGEST_MMAP_THRESHOLD = (1 << 31) - 1, 1 << 30


def working_set_bytes() -> int | None:
    """What the device recommends as the most to use; None where it reports no such size."""
    size = mx.device_info().get("max_recommended_working_set_size")
    return None if size is None else int(size)


def configure_allocator(processes: int = 1) -> None:
    """Configure MLX and malloc limits for the process, one of `processes` that share the device.

    On a GPU: weights stay resident up to what the device recommends, and freed buffers kept for reuse take at most the
    device profile's share of that; of either a process has its part. Where a GPU's memory is its own (CUDA), several
    processes keep from each other what MLX would let one take: nearly all. On Linux, freed memory stays with the
    process: MLX's CPU allocator returns every large array to the system, which hands it back page by page (2 to 4 times
    the time of an elementwise operation on arrays over 1 MB).
    """
    size = working_set_bytes()
    if size is not None:
        mx.set_wired_limit(size // processes)
        share = device_profile().cache_share
        if share is not None:
            mx.set_cache_limit(int(share * size) // processes)
    elif processes > 1:
        own = mx.device_info().get("total_memory")
        if own is not None:
            mx.set_memory_limit(int(_SHARED_OUT * int(own)) // processes)
            mx.set_cache_limit(int(_CACHED * int(own)) // processes)
    if sys.platform == "linux":
        # C libraries other than glibc, such as musl, have none.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_TRIM_THRESHOLD, _NEVER_TRIM)
            mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)


def peak_gib() -> float:
    """MLX's peak since it was last reset, GiB."""
    return mx.get_peak_memory() / _GIB


def clear_cache_above(threshold: int | None) -> None:
    """Give back what MLX keeps for reuse if that is more than `threshold` bytes; None: never."""
    if threshold is not None and mx.get_cache_memory() > threshold:
        mx.clear_cache()


class Footprint(NamedTuple):
    """GiB, now and at most since the process began."""

    now_gib: float
    peak_gib: float


class RUsageInfo(ctypes.Structure):
    """`rusage_info_v4` of macOS (sys/resource.h): 16 bytes of UUID, then 35 numbers of 64 bits."""

    _fields_ = [
        ("uuid", ctypes.c_uint8 * 16),
        ("before_footprint", ctypes.c_uint64 * 7),
        ("phys_footprint", ctypes.c_uint64),
        ("before_lifetime_max", ctypes.c_uint64 * 20),
        ("lifetime_max_phys_footprint", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 6),
    ]


def process_footprint(platform: str = sys.platform, status: Path = _STATUS, library: Any = None) -> Footprint:
    """Memory of this process: physical footprint on macOS, resident set on Linux, else the peak resident set for both.

    The physical footprint is what macOS counts against a process and what Activity Monitor shows; it holds Metal's
    buffers and compressed pages, which the resident set leaves out.

    Args:
        platform: as `sys.platform` says it.
        status: Linux's file with VmRSS and VmHWM.
        library: a stand-in for macOS's system library, which has `proc_pid_rusage`.
    """
    found = None
    if platform == "darwin":
        found = _macos(library)
    elif status.is_file():
        found = _linux(status.read_text(encoding="utf-8"))
    # Bytes on macOS, KiB elsewhere.
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform == "darwin" else 1024) / _GIB
    return found or Footprint(largest, largest)


def _linux(status: str) -> Footprint | None:
    kib = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.endswith(" kB")}
    if "VmRSS" not in kib or "VmHWM" not in kib:
        return None
    return Footprint(int(kib["VmRSS"]) * 1024 / _GIB, int(kib["VmHWM"]) * 1024 / _GIB)


def _macos(library: Any) -> Footprint | None:
    usage = RUsageInfo()
    try:
        status = (library or ctypes.CDLL(None)).proc_pid_rusage(os.getpid(), _RUSAGE_INFO_V4, ctypes.byref(usage))
    except (OSError, AttributeError):
        return None
    if status != 0:
        return None
    return Footprint(usage.phys_footprint / _GIB, usage.lifetime_max_phys_footprint / _GIB)
