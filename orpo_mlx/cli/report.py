"""A training run, or several laid over each other, as a page and a picture, from the lines they left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from orpo_mlx.config.flags import OneLineParser, exit_status
from orpo_mlx.errors import ConfigError
from orpo_mlx.reporting.run_report import write_report

PROG = "orpo-mlx report"


def build_parser() -> OneLineParser:
    """The command line of `report`."""
    parser = OneLineParser(
        prog=PROG, description="Draw one training run, or several laid over each other.", allow_abbrev=False
    )
    parser.add_argument(
        "folders", nargs="+", metavar="ADAPTER_PATH", help="--adapter-path of a run, with metrics.jsonl"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder to write report.html and report.png into; default: the run's"
    )
    return parser


def run(argv: Sequence[str] | None) -> None:
    """Do what a command line asks; raises UserError."""
    args = build_parser().parse_args(argv)
    folders = [Path(name) for name in args.folders]
    if args.output is None and len(folders) > 1:
        raise ConfigError("--output: several runs are drawn together; give the folder for their report.")
    output = Path(args.output or folders[0])
    if args.output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--output {output}: cannot be made ({error.strerror}).") from None
    for path in write_report(folders, output):
        print(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
