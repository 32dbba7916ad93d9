"""What a check found, how large it was, and how much rounding is allowed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

MIB = 2**20
GROUPS = ("machine", "paths", "attention", "functions", "modes", "training", "speed", "calibration", "rival")
"""In the order in which they run and are shown."""

TOLERANCES = {"float32": 1e-4, "tf32": 5e-3, "float16": 5e-3, "bfloat16": 3e-2}
"""Largest |found - expected| / |expected| (Euclidean norms) that rounding explains, by dtype of the inputs.

A rounding of float32 is off by 6e-8, of TF32 and float16 by 5e-4, of bfloat16 by 4e-3; a function rounds some ten times
one after the other. `tf32` is float32 on a device whose matrix products round their factors to ten bits.
"""
TF32_FROM = 1e-5
"""Relative error of a float32 matrix product from which on its factors have been rounded to TF32."""


class Sizes(NamedTuple):
    """How large the checks are."""

    queries: tuple[int, ...]
    """Query rows of attention."""
    head_dims: tuple[int, ...]
    dtypes: tuple[str, ...]
    half_queries: int
    """Most query rows of attention in half precision: a CPU is some 30 times slower there."""
    tokens: int
    """Tokens of the functions' inputs, and of the longest pair of the modes."""
    shape: str
    """Of the model whose steps are timed: see `package.SHAPES`."""
    pair: tuple[int, int]
    """Tokens of prompt and completion of the two pairs of a timed step."""
    steps: int
    """Steps that are timed, after two that are not."""
    product: int
    """Rows and columns of a float32 matrix product, a multiple of 64."""
    half_product: int
    """The same in half precision."""
    copied: int
    """Bytes of an array that is read and written."""


# Head dims for which MLX has fused kernels, and 96 and 256, where it has them in part; query rows on both sides of 8,
# where its kernels change.
_QUERIES, _DIMS, _DTYPES = (1, 4, 8, 9, 64, 1024), (64, 80, 96, 128, 256), ("float32", "bfloat16", "float16")
_CPU_SHAPE = "SmolLM2-135M, 6 of 30 layers"
SIZES = {
    "gpu": Sizes(_QUERIES, _DIMS, _DTYPES, 1024, 1152, "SmolLM2-135M", (400, 300), 5, 4096, 4096, 256 * MIB),
    # No BLAS has half precision: products and rows in it are kept small there.
    "cpu": Sizes((*_QUERIES[:-1], 256), _DIMS, _DTYPES, 64, 128, _CPU_SHAPE, (100, 75), 2, 1024, 192, 64 * MIB),
    # Quick: a tiny model and two head dims.
    "gpu quick": Sizes(_QUERIES, (64, 128), _DTYPES, 1024, 128, "tiny", (200, 150), 3, 2048, 2048, 64 * MIB),
    "cpu quick": Sizes((4, 8, 9, 64), (64, 128), _DTYPES, 9, 64, "tiny", (48, 32), 2, 512, 64, 16 * MIB),
}


class Finding(NamedTuple):
    """What one check found."""

    group: str
    name: str
    passed: bool | None
    """None: measured, not judged."""
    sentence: str
    """What is wrong, or what was found."""
    figures: Mapping[str, Any] = MappingProxyType({})
    """Whatever a JSON file can hold; what is named `rows` is a list of lists."""


def relative_error(found: mx.array, expected: mx.array) -> float:
    """|found - expected| / |expected|, Euclidean norms over all entries; infinite where one is not finite."""
    # Not the engine's own: what judges shares no code with what is judged.
    first, second = (np.array(each.astype(mx.float32), np.float64) for each in (found, expected))
    if first.shape != second.shape or not np.isfinite(first).all():
        return float("inf")
    return float(np.linalg.norm(first - second) / max(float(np.linalg.norm(second)), 1e-30))


def label_of(dtype: str, quantised: bool) -> str:
    """What a model's weights are."""
    return f"{dtype}, 4 bits" if quantised else dtype


@cache
def product_error() -> float:
    """Relative error of a float32 matrix product of 256 x 256 on the device; tells TF32 from float32."""
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((256, 256)).astype(np.float32) for _ in range(2))
    found = np.array(mx.array(first) @ mx.array(second), np.float64)
    expected = first.astype(np.float64) @ second.astype(np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def tolerance(dtype: str) -> float:
    """What `TOLERANCES` allows for inputs of a dtype on this device."""
    return TOLERANCES["tf32" if dtype == "float32" and product_error() > TF32_FROM else dtype]


@contextmanager
def on_a_cpu() -> Iterator[None]:
    """Within the block MLX computes on the CPU, and compiles nothing: it would call a C++ compiler there."""
    mx.disable_compile()
    try:
        with mx.stream(mx.Device(mx.cpu)):
            yield
    finally:
        # Who has switched compiling off for the whole process wants it to stay off.
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()


def seconds(work: Callable[[], Any], times: int, *, warm_up: bool = True) -> float:
    """The least seconds of several calls, each evaluated, after one that is not counted."""
    if warm_up:
        mx.eval(work())
    least = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        mx.eval(work())
        least = min(least, time.perf_counter() - started)
    return least


def peak_mib(work: Callable[[], Any]) -> float:
    """MiB that `work` holds at most beside what was there before, its result included."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(work())
    return (mx.get_peak_memory() - before) / MIB


def random_arrays(shapes: Sequence[tuple[int, ...]], dtype: str, seed: int = 0) -> list[mx.array]:
    """Standard normal numbers, the same on every machine up to their rounding to `dtype`."""
    rng = np.random.default_rng(seed)
    return [mx.array(rng.standard_normal(shape).astype(np.float32)).astype(getattr(mx, dtype)) for shape in shapes]


def reason_of(error: BaseException) -> str:
    """An exception in one line."""
    words = " ".join(str(error).split()).rstrip(".")
    return without_paths(f"{type(error).__name__}{': ' + words if words else ''}")[:300]


def without_paths(text: str) -> str:
    """`text` with only the last part of each path: the folders above may have the user's name in them."""
    return re.sub(r"(?<![\w.])~?/(?:[^\s:'\"/]+/)+([^\s:'\"/]*)", r"\1", text.replace(str(Path.home()), "~"))


def guarded(group: str, name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a check finds; an exception becomes a finding, whatever it is, and the command goes on."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(group, name, False, reason_of(error))
