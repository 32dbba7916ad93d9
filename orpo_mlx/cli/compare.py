"""Compare methods side by side, and write the reports."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from orpo_mlx.compare.plan import PROG, parse_plan
from orpo_mlx.compare.report import write_comparison
from orpo_mlx.compare.runner import run_comparison
from orpo_mlx.config.flags import exit_status
from orpo_mlx.reporting.console import Reporter


def run(argv: Sequence[str]) -> None:
    """Compare and write the reports."""
    plan = parse_plan(argv)
    reporter = Reporter()
    try:
        results = run_comparison(plan, argv, reporter)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished is in {plan.output}/, the same command goes on") from None
    for path in write_comparison(results, plan.output):
        reporter.say(str(path))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
