"""What methods cost side by side: memory and seconds of a training step, each method in a process of its own."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from orpo_mlx.cli.common.arguments import check_from_beginning, check_output_file
from orpo_mlx.config.command_line import resolve
from orpo_mlx.config.flags import OneLineParser, exit_status
from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.errors import ConfigError, TrainingError
from orpo_mlx.files import save_json

PROG = "orpo-mlx memory"
_DEFAULTS = ("--iters", "3")
# The same pairs for every method, and no prediction, which would run steps of its own before the peak is taken.
_FIXED = ("--no-shuffle", "--no-memory-check")


def build_parser() -> OneLineParser:
    """The flags `memory` has beside those of `train`."""
    parser = OneLineParser(
        prog=PROG,
        description=f"{(__doc__ or '').strip()} Rows are taken in file order.",
        epilog="Flags of orpo-mlx train are taken as well, but for --test, --resume and --dry-run, and hold for "
        "every method; --iters is 3 here.",
        allow_abbrev=False,
    )
    parser.add_argument("--methods", default="orpo,dpo", help="names with commas between (default: %(default)s)")
    parser.add_argument("--modes", default="", help="values of --memory to measure each method with: plain,fast,...")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    parser.add_argument(
        "--publish",
        type=Path,
        metavar="FILE",
        help="write the figures there without paths, to be sent in: docs/memory.md",
    )
    return parser


class BenchmarkRequest(NamedTuple):
    """What is to be measured, and where the figures go."""

    configs: list[TrainingConfig]
    """Of each method, in each mode."""
    json_file: Path | None
    publish_file: Path | None


def benchmark_request(argv: Sequence[str] | None) -> BenchmarkRequest:
    """What a command line asks.

    Raises:
        ConfigError: flags that cannot be used.
    """
    own, arguments = build_parser().parse_known_args(argv)
    methods = [name.strip() for name in own.methods.split(",")]
    # By hand, since train's flags are not parsed yet: a value may follow after `=` or as the next word.
    if any(word.split("=")[0] == "--method" for word in arguments):
        raise ConfigError("--method: this command measures several; give --methods orpo,dpo.")
    modes = [name.strip() for name in own.modes.split(",")] if own.modes else []
    if modes and any(word.split("=")[0] == "--memory" for word in arguments):
        raise ConfigError("--memory: several modes are measured; leave out --memory or --modes.")
    mode_flags: list[tuple[str, ...]] = [("--memory", mode) for mode in modes] or [()]
    configs = [
        resolve([*_DEFAULTS, *arguments, *mode, *_FIXED, "--method", method], PROG, check_from_beginning)
        for method, mode in itertools.product(methods, mode_flags)
    ]
    files = [
        None if file is None else check_output_file(flag, file)
        for flag, file in (("--json", own.json), ("--publish", own.publish))
    ]
    return BenchmarkRequest(configs, *files)


def run(argv: Sequence[str] | None) -> None:
    """Do what a command line asks; raises UserError."""
    configs, json_file, publish_file = benchmark_request(argv)
    # Only now: a mistyped flag need not wait for mlx-lm and transformers.
    from orpo_mlx.memory.benchmark import costs_table, measure_methods, publishable_memory

    record = measure_methods(configs, json_file)
    if publish_file is not None:
        save_json(publish_file, publishable_memory(record))
    print(costs_table(record["methods"]))
    died = [f"{row['method']} ({row['error']})" for row in record["methods"] if "error" in row]
    if died:
        raise TrainingError(f"the process of {', '.join(died)} died before it was measured")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
