"""What this machine is and can do, and which of the package's paths are on: nothing that names its owner."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from orpo_mlx.device_profile import VARIABLE, device_profile
from orpo_mlx.doctor.findings import (
    Finding,
    Sizes,
    label_of,
    product_error,
    random_arrays,
    reason_of,
    seconds,
)
from orpo_mlx.doctor.package import MEMORY_MODES, make_model, notes_of
from orpo_mlx.training.run import versions

_GIB = 2**30
_KEPT = (
    "device_name",
    "architecture",
    "memory_size",
    "total_memory",
    "max_recommended_working_set_size",
    "max_buffer_length",
    "compute_capability_major",
    "compute_capability_minor",
)
"""Keys of `mx.device_info`, whichever the backend has; none of them is a serial number or a name a user gave."""
_VARIABLES = ("MLX_ENABLE_TF32", "MLX_SDPA_VJP_FALLBACK", "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER", VARIABLE)
"""Environment variables that change what is measured."""
# Of dependent additions. Their difference leaves out what one evaluation costs by itself; 1,000 launches of some
# microseconds are long beside a clock's grain.
_SHORT_CHAIN, _LONG_CHAIN = 200, 1200
# The cost of one is some tens of microseconds: the mean of fewer would be noise.
_EVALS = 200


def check_machine() -> Iterator[Finding]:
    """The machine, the versions, MLX's device and the profile taken for it."""
    info = mx.device_info()
    profile = device_profile()
    figures = {
        "machine": machine(),
        "versions": {key: value for key, value in versions().items() if key not in ("platform", "device")},
        "device": {"device": str(mx.default_device()), **{key: info[key] for key in _KEPT if key in info}},
        "profile": {**profile._asdict(), "layout": profile.layout._asdict()},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    found = figures["machine"]
    sentence = (
        f"{found['chip']}, {found['memory_gib']:.0f} GiB, {found['system']}; mlx {figures['versions']['mlx']} on "
        f"{figures['device'].get('device_name', 'a device without a name')}, profile {profile.name}"
    )
    yield Finding("machine", "machine", None, sentence, figures)


def machine() -> dict[str, Any]:
    """Chip, cores, memory and system; without host name, user name and paths."""
    mac = sys.platform == "darwin"
    return {
        "chip": (sysctl("machdep.cpu.brand_string") if mac else linux_chip()) or platform.machine(),
        "cores": os.cpu_count(),
        "performance_cores": int(sysctl("hw.perflevel0.physicalcpu") or 0) or None if mac else None,
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB,
        "system": f"macOS {platform.mac_ver()[0]}" if mac else f"Linux {platform.release().split('-')[0]}",
        # An Apple Silicon Mac can run a Python made for Intel, and MLX is then slow or absent.
        "architecture": platform.machine(),
    }


def sysctl(name: str) -> str:
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def linux_chip(info: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = info.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def check_paths(dtype: str, *, quantised: bool = False) -> Iterator[Finding]:
    """Whether each mode's paths were found to match a plain forward on this device; the notes say which were not."""
    model = make_model("tiny", dtype, quantised=quantised)
    for mode in MEMORY_MODES:
        notes = notes_of(model, mode)
        name = f"{mode}, {label_of(dtype, quantised)}"
        yield Finding(
            "paths", name, not notes, " ".join(notes) or "all that this mode has is on", {"notes": list(notes)}
        )


def check_calibration(sizes: Sizes) -> Iterator[Finding]:
    """What the cost of a step is reckoned from. What MLX cannot do on this device is said, and not judged."""
    for name, measure in measurements(sizes).items():
        try:
            sentence, figures = measure()
        except Exception as error:
            sentence, figures = reason_of(error), {}
        yield Finding("calibration", name, None, sentence, figures)


Measured = tuple[str, dict[str, float]]
"""A sentence and its figures."""


def measurements(sizes: Sizes) -> dict[str, Callable[[], Measured]]:
    """By what they measure."""
    found: dict[str, Callable[[], Measured]] = {"rounding of float32 products": rounding}
    for dtype in sizes.dtypes:
        size = sizes.product if dtype == "float32" else sizes.half_product
        found[f"product, {dtype}"] = partial(product_rate, size, dtype)
        found[f"product with 4 bits, {dtype}"] = partial(quantised_rate, size, dtype)
    return {**found, "memory": partial(copy_rate, sizes.copied), "launches": launches}


def rounding() -> Measured:
    """Tells float32 from TF32."""
    error = product_error()
    return f"a float32 product is {error:.1e} off", {"relative_error": error}


def product_rate(size: int, dtype: str) -> Measured:
    """TFLOP/s of a product of two square matrices."""
    first, second = random_arrays([(size, size)] * 2, dtype)
    mx.eval(first, second)
    return rate_of(size, lambda: first @ second)


def quantised_rate(size: int, dtype: str) -> Measured:
    """TFLOP/s of a product with a matrix of 4 bits, as a linear layer has it."""
    x, weight = random_arrays([(size, size)] * 2, dtype)
    packed, scales, biases = mx.quantize(weight, group_size=64, bits=4)
    mx.eval(x, packed, scales, biases)
    return rate_of(size, lambda: mx.quantized_matmul(x, packed, scales, biases, transpose=True, group_size=64, bits=4))


def rate_of(size: int, work: Callable[[], mx.array]) -> Measured:
    """Of a product of square matrices."""
    taken = seconds(work, 5)
    rate = 2 * size**3 / taken / 1e12
    figures = {"size": size, "tflop_per_s": rate, "microseconds": 1e6 * taken}
    return f"{rate:.3g} TFLOP/s, {size} x {size} x {size}", figures


def copy_rate(copied: int) -> Measured:
    """Gigabytes that are read and written in a second."""
    array = mx.zeros((copied // 4,), mx.float32)
    mx.eval(array)
    rate = 2 * copied / seconds(lambda: array + 1, 5) / 1e9
    return f"reads and writes {rate:.0f} GB/s", {"gigabytes_per_s": rate}


def launches() -> Measured:
    """Microseconds for a small operation that waits for the one before, to build its node, and for an evaluation."""
    start = mx.zeros((8,))
    mx.eval(start)

    def chain(length: int) -> mx.array:
        found = start
        for _ in range(length):
            found = found + 1
        return found

    launch = (seconds(lambda: chain(_LONG_CHAIN), 5) - seconds(lambda: chain(_SHORT_CHAIN), 5)) / (
        _LONG_CHAIN - _SHORT_CHAIN
    )
    started = time.perf_counter()
    chain(_LONG_CHAIN)
    node = (time.perf_counter() - started) / _LONG_CHAIN
    started = time.perf_counter()
    for _ in range(_EVALS):
        mx.eval(start + 1)
    evaluation = (time.perf_counter() - started) / _EVALS
    figures = {
        "microseconds_per_launch": 1e6 * launch,
        "microseconds_per_node": 1e6 * node,
        "microseconds_per_eval": 1e6 * evaluation,
    }
    sentence = f"{1e6 * launch:.2f} µs a launch, {1e6 * node:.2f} to build it, {1e6 * evaluation:.1f} an evaluation"
    return sentence, figures
