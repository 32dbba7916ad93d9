"""Seconds of a counted step on Macs, reckoned: nobody has measured them.

A roofline per node, max(FLOP / (peak · efficiency · occupancy), bytes / bandwidth), and a gap per kernel; with that
overlaps the host's pass over the graph; before it the host builds the graph, and after each evaluation it waits.
Ratios of two steps under the same inputs are worth more than their seconds. Each input has its source; guesses are
marked as such, and are to be replaced by what a Mac measures.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from scripts.graph.kernels import VIEWS, Product, Work, work
from scripts.graph.walker import Node


class Input(NamedTuple):
    """A number that the model takes from elsewhere."""

    value: float
    source: str
    guess: bool = False


def _guess(value: float, source: str) -> Input:
    return Input(value, source, guess=True)


@dataclass(frozen=True)
class Chip:
    """What the model knows of a chip's GPU."""

    cores: Input
    teraflops: Input
    """Peak of float32, 10¹² operations a second; up to M4, float16 has the same."""
    gigabytes: Input
    """Peak of memory, 10⁹ bytes a second."""
    bfloat16: Input
    """Speed of bfloat16 products over float32's."""
    float16: Input
    """Speed of float16 products over float32's."""

    def speed(self, dtype: str) -> float:
        """Of products in a dtype, over float32's, which is taken at its full precision (M5 takes TF32 by default)."""
        return {"g2": self.bfloat16.value, "f2": self.float16.value}.get(dtype, 1.0)


_SCALED = "cores times 128 lanes times 2 times a clock that others report"
_BF16 = {
    "M1": _guess(0.55, "emulated: 17.2 ms against 30.6 ms of float16 (mlx pull request 4216), which narrows it since"),
    "M2": _guess(0.6, "emulated, as on M1"),
    "M3": _guess(0.9, "native conversions"),
    "M4": _guess(0.95, "native conversions"),
    "M5": _guess(4.0, "matrix units of the GPU cores, where MLX has kernels for them; Apple says 4 times M4's peak"),
}
_SAME = Input(1.0, "one rate for float32 and float16 in Apple's GPU cores up to M4")


def _chip(family: str, cores: int, teraflops: Input, gigabytes: float, source: str) -> Chip:
    f16 = _BF16["M5"] if family == "M5" else _SAME
    return Chip(Input(cores, source), teraflops, Input(gigabytes, source), _BF16[family], f16)


CHIPS: dict[str, Chip] = {
    "M1": _chip("M1", 8, Input(2.6, "Apple, November 2020"), 68.0, "Apple, M1 specifications"),
    "M2": _chip("M2", 10, Input(3.6, "Apple, June 2022"), 100.0, "Apple, June 2022"),
    "M3": _chip("M3", 10, _guess(3.55, _SCALED), 100.0, "Apple, October 2023"),
    "M4": _chip("M4", 10, _guess(4.3, _SCALED), 120.0, "Apple, May 2024"),
    "M5": _chip("M5", 10, _guess(4.4, _SCALED), 153.0, "Apple, October 2025"),
    "M1 Max": _chip("M1", 32, Input(10.4, "Apple, October 2021"), 400.0, "Apple, October 2021"),
    "M2 Ultra": _chip("M2", 76, Input(27.2, "Apple, June 2023"), 800.0, "Apple, June 2023"),
    "M3 Max": _chip("M3", 40, _guess(14.2, _SCALED), 400.0, "Apple, October 2023"),
    "M4 Max": _chip("M4", 40, _guess(17.2, _SCALED), 546.0, "Apple, October 2024"),
    "M5 Max": _chip("M5", 40, _guess(17.5, _SCALED), 614.0, "Apple, M5 Max specifications"),
}
"""By name, with the largest GPU of each."""

EFFICIENCY = Input(0.70, "share of the peak in large products: 615 tokens/s of Qwen3-4B 4-bit on M3 Pro (mlx-lm 1569)")
BANDWIDTH = _guess(0.80, "share of the memory's peak that long copies reach")
GAP = (
    _guess(1.0e-6, "seconds between two kernels at best"),
    Input(2.75e-6, "seconds between two kernels: 3,200 tiny dependent ones in 8.8 ms on M3 Ultra (mlx issue 4521)"),
)
EVAL_WAIT = Input(180e-6, "seconds that the host waits for at the end of an evaluation (mlx issue 4438)")
NODE_PASS = _guess(1.0e-6, "seconds of mx.eval per node, while the device works")
NODE_TAPE = _guess(0.4e-6, "seconds of mx.eval per node before the device has anything to do")
NODE_BUILD = _guess(
    0.16e-6,
    "seconds a performance core takes to build a node as `build_unit` does: 2.2 times as fast as a server's core of "
    "0.35e-6",
)
TILE = _guess(64, "rows and columns of an output tile, one threadgroup's")
LEAST_OCCUPANCY = _guess(0.1, "share of the peak that the smallest products reach")

_UNIT_NODES = 4000


class Estimate(NamedTuple):
    """What a step would take on one chip."""

    seconds: tuple[float, float]
    """With the small and the large gap between kernels."""
    device: float
    """Seconds of the device's work, without gaps."""
    families: Mapping[str, float]
    """The same, by family of kernels."""


class Totals(NamedTuple):
    """What a step does, on any chip."""

    launches: int
    tflop: float
    """10¹² operations of matrix products."""
    gigabytes: float
    """10⁹ bytes read and written."""


def totals(nodes: Mapping[Node, int]) -> Totals:
    """Launches, operations and bytes of counted nodes."""
    works = _works(nodes)
    return Totals(
        sum(times * one.launches for one, times in works),
        sum(times * one.flops for one, times in works) / 1e12,
        sum(times * one.nbytes for one, times in works) / 1e9,
    )


def estimate(nodes: Mapping[Node, int], chip: Chip, *, waits: int = 1, build_seconds: float = 0.0) -> Estimate:
    """Seconds of a step with these nodes, `waits` stops of the host, and a host that builds for `build_seconds`."""
    families: defaultdict[str, float] = defaultdict(float)
    launches = 0
    for one, times in _works(nodes):
        families[one.family] += times * _seconds(one, chip)
        launches += times * one.launches
    count = sum(nodes.values())
    device = sum(families.values())
    host = build_seconds + count * NODE_TAPE.value + waits * EVAL_WAIT.value
    low, high = (max(device + launches * gap.value, count * NODE_PASS.value) + host for gap in GAP)
    return Estimate((low, high), device, dict(families))


def _works(nodes: Mapping[Node, int]) -> list[tuple[Work, int]]:
    return [(work(node), times) for node, times in nodes.items() if node.name not in VIEWS]


def _seconds(one: Work, chip: Chip) -> float:
    memory = one.nbytes / (chip.gigabytes.value * 1e9 * BANDWIDTH.value)
    if not one.flops:
        return memory
    filled = _occupancy(one.product, int(chip.cores.value)) if one.product else 1.0
    rate = chip.teraflops.value * 1e12 * EFFICIENCY.value * filled * chip.speed(one.dtype)
    return max(one.flops / rate, memory)


def _occupancy(product: Product, cores: int) -> float:
    """Share of the cores that have a tile of the output to compute, the last round being partly empty."""
    tiles = product.batch * math.ceil(product.m / TILE.value) * math.ceil(product.n / TILE.value) * product.parts
    rounds = math.ceil(tiles / cores)
    return max(LEAST_OCCUPANCY.value, tiles / (rounds * cores))


def build_unit() -> float:
    """Processor seconds that this machine takes to build one node, the best of three chains of additions."""
    best = math.inf
    one = mx.array(1.0)
    for _ in range(3):
        start = time.process_time()
        total = one
        for _ in range(_UNIT_NODES):
            total = total + one
        best = min(best, time.process_time() - start)
    return best / _UNIT_NODES


def build_on_mac(seconds: float, unit: float) -> float:
    """Seconds of building a graph on a Mac, from those on a machine where `build_unit` is `unit`."""
    return seconds * NODE_BUILD.value / unit
