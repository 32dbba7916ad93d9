"""Make the tables in README.md and docs/ anew from the results in docs/results/, so that no figure is typed by hand."""

from __future__ import annotations

import sys
from pathlib import Path

from orpo_mlx.config.cli import OneLineParser, exit_status
from orpo_mlx.errors import ConfigError, DataError
from orpo_mlx.published import add_results, stale_documents

ROOT = Path(__file__).resolve().parent.parent
PROG = "python scripts/update_tables.py"


def build_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser(prog=PROG, description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a table is not that of its results"
    )
    parser.add_argument("--add", type=Path, metavar="FILE", help="results.json of compare_methods.py to publish first")
    parser.add_argument("--name", help="its name in docs/results/ and in markers")
    parser.add_argument("--without-replies", action="store_true", help="publish it without prompts and replies")
    return parser


def _run() -> None:
    args = build_parser().parse_args()
    if (args.add is None) != (args.name is None) or (args.without_replies and args.add is None):
        raise ConfigError("--add, --name: give both, or neither; --without-replies goes with them.")
    if args.check and args.add is not None:
        raise ConfigError("--check writes nothing; leave out --add.")
    if args.add is not None:
        print(add_results(args.add, ROOT, args.name, replies=not args.without_replies))
    stale = stale_documents(ROOT, write=not args.check)
    for name in stale:
        print(name)
    if args.check and stale:
        raise DataError(f"{', '.join(stale)}: tables are not those of docs/results/; run {PROG}.")


if __name__ == "__main__":
    sys.exit(exit_status(PROG, _run))
