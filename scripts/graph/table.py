"""A counted step as a record, and records as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from scripts.graph.cost_model import CHIPS, build_on_mac, build_unit, estimate, totals
from scripts.graph.count import Cost, counting

Record = dict[str, Any]
SHOWN = ("M1 Max", "M2 Ultra", "M3 Max", "M4 Max", "M5 Max")
"""Chips with a column in the table; records have all."""


def measure(step: Callable[[], Any]) -> tuple[Cost, float]:
    """What `step` costs, and the least processor seconds of three more calls, which need not trace again."""
    with counting() as cost:
        cost.add(step())
    build = []
    for _ in range(3):
        with counting(walk=False) as again:
            step()
        build.append(again.build_seconds)
    return cost, min(build)


def record(workload: str, trainer: str, mode: str, step: Callable[[], Any]) -> Record:
    """A step's counts, and its seconds on every chip."""
    unit = build_unit()
    cost, build = measure(step)
    on_mac = build_on_mac(build, min(unit, build_unit()))
    work = totals(cost.nodes)
    by_chip = {name: estimate(cost.nodes, chip, waits=cost.stops, build_seconds=on_mac) for name, chip in CHIPS.items()}
    return {
        "workload": workload,
        "trainer": trainer,
        "mode": mode,
        "mlx": version("mlx"),
        "dispatches": cost.dispatches,
        "launches": cost.launches,
        "nodes": cost.nodes.total(),
        "evals": cost.evals,
        "async_evals": cost.async_evals,
        "host_waits": cost.host_waits,
        "tflop": round(work.tflop, 3),
        "gigabytes": round(work.gigabytes, 2),
        "build_seconds": round(on_mac, 4),
        "seconds": {name: [round(value, 3) for value in one.seconds] for name, one in by_chip.items()},
        "families": {
            name: {family: round(value, 4) for family, value in one.families.items()} for name, one in by_chip.items()
        },
    }


def as_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as lines, under the workload they share."""
    lines = []
    for workload in dict.fromkeys(row["workload"] for row in records):
        lines += ["", workload, _HEAD]
        lines += [_line(row) for row in records if row["workload"] == workload]
    return "\n".join(lines[1:])


_HEAD = (
    f"{'':24}{'dispatches':>11}{'launches':>10}{'nodes':>9}{'evals':>7}{'waits':>7}{'TFLOP':>8}{'GB':>8}{'build':>8}"
    + "".join(f"{chip:>14}" for chip in SHOWN)
)


def _line(row: Mapping[str, Any]) -> str:
    name = f"{row['trainer']} {row['mode']}".strip()
    counts = f"{row['dispatches']:>11}{row['launches']:>10}{row['nodes']:>9}{row['evals']:>7}{row['host_waits']:>7}"
    work = f"{row['tflop']:>8.2f}{row['gigabytes']:>8.1f}{row['build_seconds']:>8.3f}"
    seconds = [row["seconds"][chip] for chip in SHOWN]
    return f"{name:24}{counts}{work}" + "".join(f"{f'{low:.2f}-{high:.2f}':>14}" for low, high in seconds)
