"""Rounds of pairs, training and evaluation from one config."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from orpo_mlx.config.flags import GivenOnce, OneLineParser, exit_status, naming_keys, with_flags
from orpo_mlx.text import printable

PROG = "orpo-mlx iterate"


def build_parser() -> OneLineParser:
    """The command line of `iterate`."""
    parser = OneLineParser(
        prog=PROG,
        description="Rounds of: samples made into pairs, training on them, evaluation against the base model. The same "
        "command again goes on where it was killed.",
    )
    parser.add_argument(
        "-c",
        "--config",
        action=GivenOnce,
        required=True,
        metavar="FILE",
        help="YAML file: data, judge, rounds, samples, ..., train",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="receives the rounds and their report")
    return parser


def run(argv: Sequence[str] | None) -> None:
    """Do what a command line asks; raises UserError."""
    args = build_parser().parse_args(argv)
    # Only now: a mistyped flag need not wait for mlx-lm and transformers.
    from orpo_mlx.reporting.console import Reporter
    from orpo_mlx.rounds.iterate import iterate
    from orpo_mlx.rounds.settings import KEYS, read_rounds_config

    folder = Path(args.output).expanduser()
    with naming_keys(args.config, KEYS):
        record = iterate(read_rounds_config(Path(args.config)), folder, Reporter(render=with_flags))
    rates = [
        (each["evaluation"]["win_rate"], each["round"])
        for each in record["rounds"]
        if each["evaluation"] is not None and each["evaluation"]["win_rate"] is not None
    ]
    print(f"The rounds ended: {record['stopped']}.")
    if rates:
        rate, best = max(rates)
        print(f"Best: round {best}, win rate over the base {rate:.1%}, in {printable(str(folder / f'round-{best}'))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
