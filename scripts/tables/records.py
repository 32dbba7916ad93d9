"""Tables of what was measured apart from comparisons: memory, machines that the doctor examined, printed figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orpo_mlx.compare.tables import number
from orpo_mlx.errors import DataError
from orpo_mlx.reporting.html_page import Table, TableCell


def memory_table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every published measurement of memory, a row for each method and mode."""
    header = (
        "machine",
        "model",
        "pairs a step",
        "method",
        "--memory",
        "peak, GiB (MLX)",
        "step, s",
        "pair tokens/s",
        "date",
    )
    rows: list[tuple[TableCell, ...]] = []
    for record in records.values():
        settings = record["settings"]
        machine = str(record["machine"].get("device_name") or record["machine"]["platform"])
        pairs = settings["batch_size"] * settings["grad_accumulation_steps"]
        for row in record["methods"]:
            start = (
                TableCell(machine),
                TableCell(settings["model"]),
                TableCell(str(pairs), pairs),
                TableCell(row["method"]),
                TableCell(_mode(row, settings)),
            )
            figures = (
                (TableCell(row["error"]), TableCell("–"), TableCell("–"))
                if "error" in row
                else (
                    number(row["peak_memory_gib"], "{:.2f}"),
                    number(row["step_s_median"], "{:.2f}"),
                    number(row["pair_tokens_per_s"], "{:.0f}"),
                )
            )
            rows.append((*start, *figures, TableCell(record["date"][:10])))
    return Table(header, tuple(rows))


def _mode(row: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The memory mode of a row with the switches that were off."""
    switches = {"--no-share-prompt": not settings.get("share_prompt", True), "--plain-head": settings.get("plain_head")}
    return " ".join([row["memory"], *(flag for flag, given in switches.items() if given)])


def modes_table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """Modes and switches against `plain` on the same batches: each idea's share. A method is compared with itself."""
    found = [(row, _mode(row, record["settings"])) for record in records.values() for row in record["methods"]]
    plain = {row["method"]: row for row, mode in found if mode == "plain"}

    def cells(row: Mapping[str, Any], mode: str) -> dict[str, TableCell]:
        base = plain[row["method"]]
        return {
            "method": TableCell(row["method"]),
            "--memory": TableCell(mode),
            "all batches, s": number(sum(row["steps_s"]), "{:.1f}"),
            "speed, plain = 1": number(sum(base["steps_s"]) / sum(row["steps_s"]), "{:.2f}"),
            "step, s (median)": number(row["step_s_median"], "{:.2f}"),
            "step of a first epoch, s": number(row["step_s_median"] + row["reference_s"], "{:.2f}"),
            "peak, GiB (MLX)": number(row["peak_memory_gib"], "{:.2f}"),
            "peak, plain = 1": number(row["peak_memory_gib"] / base["peak_memory_gib"], "{:.2f}"),
        }

    rows = [cells(row, mode) for row, mode in sorted(found, key=lambda each: each[0]["method"] != "orpo")]
    return Table(tuple(rows[0]), tuple(tuple(row.values()) for row in rows))


def examined_table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `orpo-mlx doctor` found, a row for each machine; steps are those of the full examination only.

    Raises:
        DataError: a record is not the doctor's.
    """
    header = ("machine", "memory, GiB", "system", "mlx", "checks", "verdict")
    timed = tuple(f"{mode}, s" for mode in _TIMED)
    rates = ("peak of fast, GiB", "bfloat16, TFLOP/s", "4 bits, TFLOP/s", "GB/s", "µs a launch", "date")
    rows = []
    for name, record in records.items():
        try:
            rows.append(_examined_row(record))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{name}: is not what orpo-mlx doctor --json writes ({error!r}).") from None
    return Table((*header, *timed, *rates), tuple(rows))


_TIMED_SHAPE = "SmolLM2-135M, bfloat16, "
_TIMED = ("fast", "balanced", "thrift", "plain", "mlx-lm-lora")


def _examined_row(record: Mapping[str, Any]) -> tuple[TableCell, ...]:
    checks = record["checks"]
    steps = {check["name"].removeprefix(_TIMED_SHAPE): check for check in checks.get("speed", ())}
    rivals = [check for check in checks.get("rival", ()) if check["name"].endswith(_TIMED_SHAPE.rstrip(", "))]
    if rivals:
        steps["mlx-lm-lora"] = rivals[0]
    rates = {check["name"]: check for check in checks.get("calibration", ())}

    def figure(found: Mapping[str, Any], key: str, shown: str) -> TableCell:
        return number(found[key], shown) if key in found else TableCell("–")

    return (
        TableCell(str(record["device"].get("device_name") or record["machine"]["chip"])),
        number(record["machine"]["memory_gib"], "{:.0f}"),
        TableCell(record["machine"]["system"]),
        TableCell(record["versions"]["mlx"]),
        TableCell(record["level"]),
        TableCell(record["verdict"]),
        *(figure(steps.get(mode, {}), "step_s", "{:.3f}") for mode in _TIMED),
        figure(steps.get("fast", {}), "peak_gib", "{:.2f}"),
        figure(rates.get("product, bfloat16", {}), "tflop_per_s", "{:.1f}"),
        figure(rates.get("product with 4 bits, bfloat16", {}), "tflop_per_s", "{:.1f}"),
        figure(rates.get("memory", {}), "gigabytes_per_s", "{:.0f}"),
        figure(rates.get("launches", {}), "microseconds_per_launch", "{:.2f}"),
        TableCell(record["date"][:10]),
    )


def figures(record: Mapping[str, Any]) -> str:
    """A table of figures a program printed, and how they were taken."""
    rows = tuple(tuple(TableCell(str(value)) for value in row) for row in record["rows"])
    table = Table(tuple(record["columns"]), rows).markdown()
    return f"{table}\n\nTaken {record['date']} on {record['machine']}, by `{record['command']}`."
