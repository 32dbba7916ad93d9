"""Score pairs: log-probs of both completions of every row, in input order."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_mlx.cli.common.arguments import add_model_options, check_apart, check_count, check_output_file
from orpo_mlx.cli.common.run_folder import chosen_adapters, held_out_file
from orpo_mlx.config.flags import OneLineParser, exit_status
from orpo_mlx.data.pairs import Reading, load_pairs, parse_columns, parse_labels
from orpo_mlx.data.tokens.trained_turns import TRAINED_TURNS, read_ids
from orpo_mlx.errors import ConfigError, DataError
from orpo_mlx.files import write_text
from orpo_mlx.judging.intervals import wilson
from orpo_mlx.models.names import DEFAULT_MODEL
from orpo_mlx.models.recorded import base_model
from orpo_mlx.text import printable
from orpo_mlx.types import Example

if TYPE_CHECKING:
    import mlx.nn as nn

    from orpo_mlx.models.loading import LoadedModel

PROG = "orpo-mlx score"


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy with its interval, and mean margin, in one line."""
    pairs = [row for row in rows if row["margin"] is not None]
    if not pairs:
        means = [mean for row in rows for mean in row["mean_logps"]]
        mean = sum(means) / len(means)
        return f"{len(rows)} rows without a better and a worse completion: mean {mean:.4f} nats per token"
    wins = sum(row["margin"] > 0 for row in pairs)
    low, high = wilson(wins / len(pairs), len(pairs))
    margin = sum(row["margin"] for row in pairs) / len(pairs)
    what, side = ("pairs", "chosen") if len(pairs) == len(rows) and "prefers_chosen" in rows[0] else ("groups", "best")
    return (
        f"{len(pairs)} {what}: {side} preferred in {wins / len(pairs):.1%} (95 % interval {low:.1%} to {high:.1%}) "
        f"by mean log-prob, mean margin {margin:.4f} nats per token"
    )


def build_parser() -> OneLineParser:
    """The command line of `score`."""
    parser = OneLineParser(prog=PROG, description="Log-probs of preference pairs under a model, a row each.")
    parser.add_argument("--model", help="Hub id, local folder or .gguf file; default: what the adapters were made for")
    parser.add_argument(
        "--adapter-path", metavar="FOLDER", help="adapters to score with (default: adapters; with --model alone: none)"
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="file of any kind that train takes, a pair a row; default: the test file of the adapters' run",
    )
    parser.add_argument("--columns", help="columns under other names: prompt=question,rejected=worse")
    parser.add_argument("--labels", help="words of the label column for a good and for a bad completion: good,bad")
    parser.add_argument(
        "--no-template-strings",
        dest="template_strings",
        action="store_false",
        help="take strings as they stand, without the chat template",
    )
    parser.add_argument(
        "--train-on",
        choices=TRAINED_TURNS,
        default=TRAINED_TURNS[0],
        help="what counts of completions of several turns, as in train (default: %(default)s)",
    )
    parser.add_argument("--output", metavar="FILE", help="JSONL file to write; default: print the rows")
    parser.add_argument("--per-token", action="store_true", help="add the log-prob of every completion token")
    parser.add_argument(
        "--categories",
        metavar="FOLDER",
        help="write accuracy by the rows' subset or category, with adapters also against the base, as page and picture",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per forward (default: %(default)s)")
    add_model_options(parser)
    return parser


def run(argv: Sequence[str] | None) -> None:
    """Do what a command line asks; raises UserError."""
    args = build_parser().parse_args(argv)
    check_count("--batch-size", args.batch_size)
    adapters = chosen_adapters(args.adapter_path, args.model)
    data = Path(held_out_file(adapters) if args.data is None else args.data)
    if data.is_dir():
        raise DataError(f"--data {data}: is a folder; score takes one file, such as {data / 'test.jsonl'}.")
    if args.output is not None:
        args.output = check_output_file("--output", Path(args.output))
        check_apart("--output", args.output, {"--data": data})
    if args.categories is not None and not Path(args.categories).is_dir():
        raise ConfigError(f"--categories {args.categories}: is not a folder; give one that exists.")
    # What the rest of the command reads, whichever way it was found.
    was_given = args.adapter_path is not None
    args.data = str(data)
    args.adapter_path = None if adapters is None else str(adapters)
    args.model = args.model or (base_model(adapters) if adapters else DEFAULT_MODEL)
    raw = load_pairs(data, Reading(parse_columns(args.columns), labels=parse_labels(args.labels)))
    # Only now: what is wrong with a flag or the data need not wait for mlx-lm and transformers.
    from orpo_mlx.data.tokens.tokenization import PairTokenizer
    from orpo_mlx.engine.pair_scorer import PairScorer
    from orpo_mlx.engine.score import score_pairs
    from orpo_mlx.models.adapters import add_trained_adapters
    from orpo_mlx.models.loading import find, load
    from orpo_mlx.models.vocabulary import check_ids, vocabulary_of

    info = find(args.model, trust_remote_code=args.trust_remote_code)
    to_ids = PairTokenizer(info.tokenizer, args.train_on, template_strings=args.template_strings)
    pairs = list(to_ids.each(raw))
    loaded = load(info, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    # What is said goes to stderr where the rows go to stdout.
    out = sys.stdout if args.output is not None else sys.stderr
    if adapters is not None and not was_given:
        print(printable(f"{data} under {args.model} with the adapters in {adapters}"), file=out)
    if loaded.note:
        print(printable(loaded.note), file=out)
    # mlx looks up an id beyond the embedding without complaint, and rows beyond the window without applying it.
    vocabulary = vocabulary_of(loaded.model)
    for pair in pairs:
        check_ids(vocabulary, [*pair.prompt_ids, *read_ids(list(itertools.chain(*pair.completions)))], pair.location)
    check_lengths(loaded, pairs)
    if adapters is not None:
        add_trained_adapters(loaded.model, adapters)
    rows = score_pairs(PairScorer(loaded.model), pairs, batch_size=args.batch_size, per_token=args.per_token)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if args.output is None:
        print(lines, end="")
    else:
        write_text(args.output, lines)
    print(summary(rows), file=out)
    if args.categories is not None:
        base = base_rows(loaded.model, pairs, args.batch_size) if args.adapter_path is not None else None
        report_categories(args, rows, base, [pair.location for pair in pairs])


def base_rows(model: nn.Module, pairs: Sequence[Example], batch_size: int) -> list[dict[str, Any]] | None:
    """The rows of the same model with its adapters off; None where they cannot be switched off."""
    from orpo_mlx.engine.pair_scorer import PairScorer
    from orpo_mlx.engine.score import score_pairs
    from orpo_mlx.models.adapters import adapters_off, has_switchable_adapters

    if not has_switchable_adapters(model):
        return None
    with adapters_off(model):
        return score_pairs(PairScorer(model), pairs, batch_size=batch_size)


def report_categories(
    args: argparse.Namespace,
    rows: Sequence[dict[str, Any]],
    base: Sequence[dict[str, Any]] | None,
    locations: Sequence[str],
) -> None:
    """Write the accuracies by category; raises DataError where rows are no pairs."""
    from orpo_mlx.judging.categories import accuracies, categories_of, table, write_categories

    if not all("prefers_chosen" in row for row in rows):
        raise DataError(f"--data {args.data}: --categories needs pairs of a chosen and a rejected side in every row.")
    names = categories_of(Path(args.data))
    found = accuracies(rows, base, [names[location] for location in locations])
    write_categories(Path(args.categories), found, args.adapter_path or args.model)
    for line in table(found).rows:
        print(printable("  ".join(cell.text for cell in line)))
    if args.adapter_path is not None and base is None:
        print("The adapters are whole weights, which cannot be switched off: no log-ratio to the base.")


def check_lengths(loaded: LoadedModel, pairs: Sequence[Example]) -> None:
    """Refuse rows that are longer than what mlx-lm runs exactly; raises DataError."""
    limit = loaded.exact_tokens
    if limit is None:
        return
    for pair in pairs:
        longest = len(pair.prompt_ids) + max(map(len, pair.completions))
        if longest > limit:
            raise DataError(
                f"{pair.location}: {longest} tokens, but this model attends within a window of {limit} which mlx-lm "
                "does not apply, so the log-probs would be wrong; leave out or shorten the row."
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
