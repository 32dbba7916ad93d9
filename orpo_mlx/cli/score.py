"""Score pairs: log-probs of both completions of every row, in input order."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_mlx.compare.intervals import wilson
from orpo_mlx.config.flags import OneLineParser, exit_status
from orpo_mlx.data.pairs import Reading, load_pairs, parse_columns
from orpo_mlx.errors import ConfigError, DataError
from orpo_mlx.files import write_text
from orpo_mlx.models.names import DEFAULT_MODEL, DTYPES
from orpo_mlx.text import printable
from orpo_mlx.types import TokenizedPair

if TYPE_CHECKING:
    from orpo_mlx.models.loading import LoadedModel

PROG = "orpo-mlx score"


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy with its interval, and mean margin, in one line."""
    wins = sum(row["prefers_chosen"] for row in rows)
    low, high = wilson(wins / len(rows), len(rows))
    margin = sum(row["margin"] for row in rows) / len(rows)
    return (
        f"{len(rows)} pairs: chosen preferred in {wins / len(rows):.1%} (95 % interval {low:.1%} to {high:.1%}) "
        f"by mean log-prob, mean margin {margin:.4f} nats per token"
    )


def build_parser() -> OneLineParser:
    """The command line of `score`."""
    parser = OneLineParser(prog=PROG, description="Log-probs of preference pairs under a model, a row each.")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="Hub id, local folder or .gguf file (default: %(default)s)"
    )
    parser.add_argument("--adapter-path", help="folder of adapters to score with")
    parser.add_argument("--data", required=True, metavar="FILE", help="file of any kind that train takes, a pair a row")
    parser.add_argument("--columns", help="columns under other names: prompt=question,rejected=worse")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL file to write")
    parser.add_argument("--per-token", action="store_true", help="add the log-prob of every completion token")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per forward (default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: the checkpoint's, float32 on a CPU")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the checkpoint"
    )
    return parser


def _run(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size: found {args.batch_size}, expected a whole number above 0.")
    data = Path(args.data)
    output = Path(args.output)
    if data.is_dir():
        raise DataError(f"--data {data}: is a folder; score takes one file, such as {data / 'test.jsonl'}.")
    if not output.parent.is_dir() or output.is_dir():
        raise ConfigError(f"--output {output}: cannot be written there; give a file in a folder that exists.")
    # Only now: a mistyped flag need not wait for mlx-lm and transformers.
    from orpo_mlx.data.tokenization import PairTokenizer
    from orpo_mlx.engine.pair_scorer import PairScorer
    from orpo_mlx.engine.score import score_pairs
    from orpo_mlx.models.adapters import add_trained_adapters
    from orpo_mlx.models.loading import check_vocabulary, find, load

    raw = load_pairs(data, Reading(parse_columns(args.columns)))
    info = find(args.model, trust_remote_code=args.trust_remote_code)
    pairs = list(PairTokenizer(info.tokenizer).each(raw))
    loaded = load(info, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    if loaded.note:
        print(printable(loaded.note))
    for pair in pairs:
        check_vocabulary(loaded, max(itertools.chain(*pair[:3])), pair.location)
    _check_lengths(loaded, pairs)
    if args.adapter_path is not None:
        add_trained_adapters(loaded.model, Path(args.adapter_path))
    rows = score_pairs(PairScorer(loaded.model), pairs, batch_size=args.batch_size, per_token=args.per_token)
    text = "".join(_lines(rows))
    write_text(output, text)
    print(summary(rows))


def _lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    return (json.dumps(row) + "\n" for row in rows)


def _check_lengths(loaded: LoadedModel, pairs: Sequence[TokenizedPair]) -> None:
    limit = loaded.exact_tokens
    for pair in pairs if limit is not None else ():
        longest = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        if limit is not None and longest > limit:
            raise DataError(
                f"{pair.location}: {longest} tokens, but this model attends within a window of {limit} which mlx-lm "
                "does not apply, so the log-probs would be wrong; leave out or shorten the row."
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: _run(argv))


if __name__ == "__main__":
    sys.exit(main())
