"""Look at a data set before training on it: what was recognised, what is left out, how long, how lopsided."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from orpo_mlx.cli.common.arguments import check_apart, check_output_file
from orpo_mlx.config.checks import make_config
from orpo_mlx.config.command_line import add_settings, parse_settings
from orpo_mlx.config.derived import data_reading
from orpo_mlx.config.flags import OneLineParser, exit_status, with_flags
from orpo_mlx.config.settings import settings_with
from orpo_mlx.config.traits import Trait
from orpo_mlx.files import json_text, write_text
from orpo_mlx.text import printable, printable_lines

PROG = "orpo-mlx inspect"


def build_parser() -> OneLineParser:
    """The command line of `inspect`; settings are those of `train`."""
    parser = OneLineParser(
        prog=PROG, description="Look at preference pairs as training would take them.", allow_abbrev=False
    )
    add_settings(parser, settings_with(Trait.INSPECTED))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the figures as JSON, to FILE or instead of the text"
    )
    output.add_argument("--png", metavar="FILE", help="draw histograms of lengths into FILE")
    return parser


def run(argv: Sequence[str] | None) -> None:
    """Do what a command line asks; raises UserError."""
    given, args = parse_settings(build_parser(), argv)
    for name in ("json", "png"):
        if getattr(args, name) not in (None, "-"):
            setattr(args, name, check_output_file(f"--{name}", Path(getattr(args, name))))
    config = make_config(given)
    for name in ("json", "png"):
        if getattr(args, name) not in (None, "-"):
            check_apart(f"--{name}", Path(getattr(args, name)), {"--data": config.data})
    # Only now: a mistyped flag need not wait for mlx-lm and transformers.
    from orpo_mlx.data.sources import find_splits
    from orpo_mlx.data.splits import tokenized_split
    from orpo_mlx.data.statistics import as_text, draw_lengths, inspect_splits
    from orpo_mlx.models.loading import find, vocabulary_unloaded
    from orpo_mlx.models.vocabulary import check_ids
    from orpo_mlx.training.prepare import data_lengths

    sources = find_splits(config.data)
    info = find(config.model, trust_remote_code=config.trust_remote_code)
    lengths = data_lengths(config, info.exact_tokens)
    splits = {
        name: tokenized_split(source, data_reading(config), info.tokenizer, lengths) for name, source in sources.items()
    }
    vocabulary = vocabulary_unloaded(info, trust_remote_code=config.trust_remote_code)
    for split in splits.values():
        token, location = split.pairs.largest
        if vocabulary is not None:
            check_ids(vocabulary, [max(token, 0)], location)
    figures = inspect_splits(
        splits,
        info.tokenizer,
        batch_size=config.batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        seed=config.seed,
    )
    for split in figures["splits"].values():
        split["left_out"] = [with_flags(line) for line in split["left_out"]]
    table = json_text(figures)
    if info.note:
        print(printable(info.note), file=sys.stderr)
    print(table if args.json == "-" else printable_lines(with_flags(as_text(figures))), end="")
    if args.json not in (None, "-"):
        write_text(args.json, table)
    if args.png is not None:
        draw_lengths(splits, config.max_seq_length, Path(args.png))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
