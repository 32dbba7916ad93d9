"""Whether this package does on this machine what it promises, and how fast: PASS or FAIL, and a file to publish."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orpo_mlx.cli.common.arguments import check_output_file
from orpo_mlx.config.flags import OneLineParser, exit_status
from orpo_mlx.files import write_text
from orpo_mlx.text import printable

PROG = "orpo-mlx doctor"
_FAILED = 1
_SHOWN = 10


def build_parser() -> OneLineParser:
    """The flags of `doctor`."""
    parser = OneLineParser(
        prog=PROG,
        description=f"{(__doc__ or '').strip()} Nothing is downloaded and nothing of yours is read.",
        epilog="Exit status: 0 PASS, 1 FAIL, 2 flags that cannot be used. docs/macs.md has more.",
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller checks, in under a minute")
    parser.add_argument("--bench", action="store_true", help="time mlx-lm-lora's step as well, where it is installed")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write everything there, to be sent in; no user name, no host name and no paths are in it",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    verdicts: list[bool] = []
    status = exit_status(PROG, lambda: verdicts.append(_run(argv)))
    return status or (0 if verdicts[0] else _FAILED)


def _run(argv: Sequence[str] | None) -> bool:
    """Whether all is well."""
    args = build_parser().parse_args(argv)
    file = args.json
    if file is not None:
        file = check_output_file("--json", file)
    from orpo_mlx.device_profile import device_profile
    from orpo_mlx.doctor.examine import LEVELS, Process, examine, record_of, record_text

    # A profile that there is not is a wrong flag, not something that the machine is found to lack.
    device_profile()
    level = LEVELS[args.quick]
    started = time.monotonic()
    words = [sys.executable, "-m", "orpo_mlx.doctor.examine", level, "bench" if args.bench else "alone"]
    findings = examine(Process(words), _say)
    record = record_of(findings, level, time.monotonic() - started)
    print(summary(record))
    if file is not None:
        write_text(file, record_text(record))
        print(f"Written to {file}.")
    return bool(record["verdict"] == "PASS")


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def summary(record: Mapping[str, Any]) -> str:
    """A line for each group, with the figures a person wants, the checks that failed, and the verdict."""
    lines = [machine_line(record)]
    for group, checks in record["checks"].items():
        judged = [check["passed"] for check in checks if check["passed"] is not None]
        verdict = ("PASS" if all(judged) else "FAIL") if judged else "-"
        lines.append(f"{group:<12} {verdict:<5} {_FIGURES[group](checks)}")
    failures = record["failures"]
    lines += [f"  {failure}" for failure in failures[:_SHOWN]]
    if len(failures) > _SHOWN:
        lines.append(f"  and {len(failures) - _SHOWN} more, which --json has")
    lines.append(f"{record['verdict']}, {record['seconds']:.0f} s")
    return "\n".join(map(printable, lines))


def machine_line(record: Mapping[str, Any]) -> str:
    """Chip, memory, system, versions, device and profile."""
    if "machine" not in record:
        return "machine      FAIL  could not be examined"
    machine, versions, device = record["machine"], record["versions"], record["device"]
    where = f"{device['device']} {device.get('device_name', '')}".strip()
    kept = ", ".join(f"{name} {versions[name]}" for name in ("orpo-mlx", "mlx", "mlx-lm", "python"))
    return (
        f"{machine['chip']}, {machine['memory_gib']:.0f} GiB, {machine['system']}; {kept}; {where}, "
        f"profile {record['profile']['name']}"
    )


Checks = Sequence[Mapping[str, Any]]


def paths_line(checks: Checks) -> str:
    off = [check["name"] for check in checks if not check["passed"]]
    return f"off in {'; '.join(off)}" if off else f"all on in {len(checks)} modes and dtypes"


def attention_line(checks: Checks) -> str:
    rows = [row for check in checks for row in check.get("rows", ())]
    raised = [row for row in rows if row[3] == "mlx" and not row[4]]
    words = ""
    if raised:
        few = ", ".join(map(str, sorted({row[0] for row in raised})))
        words = f", for {few} queries" + (", all under a gradient" if all(row[2] for row in raised) else "")
    return f"{len(rows) // 2} calls; MLX's own raises in {len(raised)}{words}"


def functions_line(checks: Checks) -> str:
    measured = [check for check in checks if "error" in check]
    if not measured:
        return "none ran"
    worst = max(measured, key=lambda check: check["error"] / check["tolerance"])
    return f"{len(checks)} checks; closest to its tolerance: {worst['name']}, {worst['sentence']}"


def modes_line(checks: Checks) -> str:
    exact = [check for check in checks if "float32" in check["name"] and "gradient_error" in check]
    if not exact:
        return "none ran in float32"
    loss, gradient = (max(check[key] for check in exact) for key in ("loss_error", "gradient_error"))
    return f"float32: loss within {loss:.1e}, gradients within {gradient:.1e} of plain"


def sentences_line(checks: Checks) -> str:
    return "; ".join(check["sentence"] for check in checks)


def speed_line(checks: Checks) -> str:
    measured = [check for check in checks if "step_s" in check]
    words: dict[str, list[str]] = {}
    for check in measured:
        shape = f"{check['shape']} {check['dtype']}{' 4 bits' if check['bits'] else ''}"
        words.setdefault(shape, []).append(f"{check['mode']} {check['step_s']:.3f} s {check['peak_gib']:.2f} GiB")
    return "; ".join(f"{shape}: {', '.join(modes)}" for shape, modes in words.items()) or "none ran"


def calibration_line(checks: Checks) -> str:
    products = [check for check in checks if "tflop_per_s" in check]
    rates = [f"{check['name'].removeprefix('product, ')} {check['tflop_per_s']:.3g}" for check in products]
    others = [check["sentence"] for check in checks if check["name"] in ("memory", "launches")]
    return "; ".join([f"TFLOP/s: {', '.join(rates)}", *others])


_FIGURES: dict[str, Callable[[Checks], str]] = {
    "paths": paths_line,
    "attention": attention_line,
    "functions": functions_line,
    "modes": modes_line,
    "training": sentences_line,
    "speed": speed_line,
    "calibration": calibration_line,
    "rival": sentences_line,
}

if __name__ == "__main__":
    sys.exit(main())
