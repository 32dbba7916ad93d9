"""Send what a run made to the Hub: adapters, model card and figures, never checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from orpo_mlx.config.flags import OneLineParser, exit_status
from orpo_mlx.text import printable

PROG = "orpo-mlx push"


def build_parser() -> OneLineParser:
    """The command line of `push`."""
    parser = OneLineParser(prog=PROG, description="Send adapters, model card and figures of a run to the Hub.")
    parser.add_argument("adapter_path", metavar="ADAPTER_PATH", help="folder that train wrote")
    parser.add_argument("repo_id", metavar="REPO_ID", help="model repository, owner/name; made where it is not there")
    parser.add_argument("--private", action="store_true", help="make it private, if it is made")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent, and send nothing")
    return parser


def run(argv: Sequence[str] | None) -> None:
    """Do what a command line asks; raises UserError."""
    args = build_parser().parse_args(argv)
    folder = Path(args.adapter_path).expanduser()
    # Only now: a mistyped flag need not wait for the Hub's client.
    from orpo_mlx.reporting.hub import check_name, check_ready, contents, listing, push

    check_name(args.repo_id, "REPO_ID")
    if args.dry_run:
        print(printable(f"Would be sent to {args.repo_id}:"))
        print(listing(contents(folder)))
        return
    check_ready(args.repo_id, "REPO_ID")
    print(listing(contents(folder)))
    # None and not False: without the flag the owner's settings on the Hub decide.
    print(printable(f"Pushed to {push(folder, args.repo_id, private=args.private or None)}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
