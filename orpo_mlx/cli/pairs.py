"""The next pairs: N samples a prompt of a model, scored by a judge, in the format that train reads."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from orpo_mlx.cli.common.arguments import add_model_options, check_apart, check_count, check_output_file
from orpo_mlx.cli.common.judging import (
    TRAINED,
    adapter_folder,
    add_judge_options,
    add_prompt_options,
    add_sampling_options,
    judge_of,
    prompts_of,
    sampling_of,
)
from orpo_mlx.config.flags import OneLineParser, exit_status, naming_flags, with_flags
from orpo_mlx.errors import ConfigError, DataError
from orpo_mlx.judging.ranking import FORMS, summary
from orpo_mlx.judging.requests import Loading, Side
from orpo_mlx.text import printable

PROG = "orpo-mlx pairs"


def build_parser() -> OneLineParser:
    """The command line of `pairs`."""
    parser = OneLineParser(
        prog=PROG, description="Samples of a model, scored and made into preference pairs. A killed run goes on."
    )
    what = parser.add_argument_group("what is sampled")
    what.add_argument("--model", help="Hub id, folder or .gguf file; default: what the adapters were made for")
    what.add_argument("--adapter-path", metavar="FOLDER", help="adapters to sample with")
    add_prompt_options(parser)
    add_sampling_options(parser, temperature=1.0)
    parser.add_argument("--samples", type=int, default=8, help="replies per prompt (default: %(default)s)")
    add_judge_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--output", required=True, metavar="FILE", help="JSONL file to write, a prompt's row a line")
    output.add_argument(
        "--form", choices=FORMS, default="pairs", help="best and worst, or all with scores (default: %(default)s)"
    )
    output.add_argument(
        "--min-gap", type=float, default=0.0, help="least score of the best above the worst (default: %(default)s)"
    )
    output.add_argument("--overwrite", action="store_true", help="begin anew where the output is there")
    add_model_options(parser)
    return parser


def run(argv: Sequence[str] | None) -> None:
    """Do what a command line asks; raises UserError."""
    args = build_parser().parse_args(argv)
    output = check_output_file("--output", Path(args.output))
    check_apart("--output", output, {"--data": args.data})
    check_count("--samples", args.samples)
    if args.samples == 1:
        raise ConfigError("--samples: found 1, expected 2 or more to choose between.")
    if not (math.isfinite(args.min_gap) and args.min_gap >= 0):
        raise ConfigError(f"--min-gap: found {args.min_gap}, expected a number of 0 or more.")
    from orpo_mlx.models.names import DEFAULT_MODEL
    from orpo_mlx.models.recorded import base_model

    with naming_flags(vars(args)):
        judge, sampling = judge_of(args), sampling_of(args)
        adapter = adapter_folder("--adapter-path", args.adapter_path)
        side = Side(args.model or (DEFAULT_MODEL if adapter is None else base_model(adapter)), adapter)
        prompts = prompts_of(args, TRAINED)
    # Only now: what is wrong with a flag or the data need not wait for mlx-lm and transformers.
    from orpo_mlx.judging.make_pairs import PairPlan, make_pairs
    from orpo_mlx.process_memory import configure_allocator
    from orpo_mlx.reporting.console import Reporter

    with naming_flags(vars(args)):
        plan = PairPlan(
            side,
            judge,
            sampling,
            args.samples,
            args.form,
            args.min_gap,
            args.rows,
            Loading(args.dtype, args.trust_remote_code),
        )
        configure_allocator()
        found = make_pairs(plan, prompts, output, Reporter(render=with_flags), overwrite=args.overwrite)
    left_out = summary(found.left_out)
    print(f"{found.rows} rows of {found.prompts} prompts in {printable(str(output))}")
    if left_out:
        print(printable(with_flags(f"left out: {left_out}", vars(args))))
    if not found.rows:
        raise DataError(f"{output}: no prompt gave a row; more --samples, another --temp or another --judge may")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
