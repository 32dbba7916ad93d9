"""Compare methods side by side, and write the reports."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from orpo_mlx.compare.plan import BUDGETS, PROG, Budget, Plan, check_shared, make_arm
from orpo_mlx.config.command_line import resolve
from orpo_mlx.config.flags import OneLineParser, exit_status, naming_flags, with_flags
from orpo_mlx.errors import ConfigError, TrainingError

# Of a comparison; the exercise has its own.
_METHODS, _SEEDS = "orpo,dpo", 3
_OWN = ("methods", "learning_rates", "output")
"""Flags of this command that messages of the room mention."""


def build_parser() -> OneLineParser:
    """The command line of `compare`."""
    parser = OneLineParser(
        prog=PROG,
        description="Train methods side by side under one budget and report what each costs and reaches.",
        epilog="Flags of orpo-mlx train about model, data, batches, adapters and memory are taken as well "
        "and hold for every method. A command that was interrupted goes on where it was when it is given again; "
        "methods, seeds and learning rates can be added to what is there.",
        allow_abbrev=False,
    )
    count = checked_number(int, lambda value: value > 0, "a whole number above 0")
    some = checked_number(int, lambda value: value == -1 or value > 0, "-1 (all) or a whole number above 0")
    amount = checked_number(float, lambda value: 0 < value < math.inf, "a number above 0")
    share = checked_number(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for results.json, reports and pictures")
    parser.add_argument(
        "--methods",
        help="methods with commas between, each with flags of its own if need be: 'orpo,dpo,dpo --reference copy' "
        f"(default: {_METHODS})",
    )
    _add_extents(parser)
    budget = parser.add_argument_group("budget of every method, one of")
    budget.add_argument("--steps", type=count, metavar="N", help="optimiser steps")
    budget.add_argument("--pair-tokens", type=count, metavar="N", help="tokens of pairs trained on")
    budget.add_argument("--seconds", type=amount, metavar="X", help="seconds of training, reference included")
    tuning = parser.add_argument_group("trainings and what they are judged by")
    tuning.add_argument("--seeds", type=count, metavar="N", help=f"seeds 0 to N - 1 (default: {_SEEDS})")
    tuning.add_argument(
        "--learning-rates",
        default="1e-4,3e-4",
        metavar="X,...",
        help="rates each method is tried with on the valid split, under seed 0 (default: %(default)s)",
    )
    tuning.add_argument(
        "--beta-factors",
        default="",
        metavar="X,...",
        help="sensitivity: also train with β times these, at each learning rate; default: the rates alone",
    )
    tuning.add_argument(
        "--sanity", default="", metavar="METHODS", help="train these also with labels swapped, and with labels shuffled"
    )
    tuning.add_argument(
        "--valid-pairs", type=some, default=24, metavar="N", help="valid pairs for sweeps and curves (default: 24)"
    )
    tuning.add_argument("--test-pairs", type=some, default=-1, metavar="N", help="held-out pairs (default: -1, all)")
    tuning.add_argument(
        "--curve-points", type=count, default=3, metavar="N", help="validations during the budget (default: 3)"
    )
    tuning.add_argument(
        "--accuracy", type=share, default=0.9, metavar="X", help="report when this accuracy is reached (default: 0.9)"
    )
    return parser


def _add_extents(parser: argparse.ArgumentParser) -> None:
    """The flags that ask for the chapter's exercise."""
    group = parser.add_argument_group("the chapter's exercise")
    extents = group.add_mutually_exclusive_group()
    extents.add_argument(
        "--quick",
        dest="extent",
        action="store_const",
        const="quick",
        help="small: gold reward against KL, with sanity checks; takes --output, --tier, --methods, --seeds and "
        "--processes alone",
    )
    extents.add_argument(
        "--full", dest="extent", action="store_const", const="full", help="the same, all methods and seeds: a night"
    )
    group.add_argument(
        "--tier",
        choices=("exact", "open"),
        help="the tiny model with an exact reward, or SmolLM2; both by default",
    )
    group.add_argument(
        "--processes",
        type=checked_number(int, lambda value: value > 0, "a whole number above 0"),
        metavar="N",
        help="trainings at the same time, 1 to 2 GB each (default: on a GPU 1, on a CPU one for each core, at most 4)",
    )


class ExerciseRequest(NamedTuple):
    """The chapter's exercise was asked for."""

    extent: str
    """A key of `compare.exercise.sizes.EXTENTS`."""
    output: Path
    tier: str | None
    methods: tuple[str, ...] | None
    seeds: int | None
    processes: int | None = None
    """None: as many as the machine suggests."""


_OF_EXERCISE = ("extent", "output", "tier", "methods", "seeds", "processes")


@naming_flags(_OWN)
def parse_request(argv: Sequence[str] | None) -> Plan | ExerciseRequest:
    """What a command line asks for; ConfigError as of `parse_plan`."""
    own, rest = build_parser().parse_known_args(argv)
    if own.extent is None:
        for flag, value in (("--tier", own.tier), ("--processes", own.processes)):
            if value is not None:
                raise ConfigError(f"{flag} {value}: is for the exercise; give --quick or --full with it.")
        return parse_plan(argv)
    defaults = build_parser().parse_args(["--output", own.output])
    given = [name for name, value in vars(own).items() if name not in _OF_EXERCISE and value != getattr(defaults, name)]
    if rest or given:
        what = rest[0] if rest else f"--{given[0].replace('_', '-')}"
        raise ConfigError(
            f"{what}: --quick and --full set everything themselves; of other flags give --output, --tier, --methods, "
            "--seeds and --processes alone."
        )
    methods = None if own.methods is None else tuple(parse_names(own.methods, "--methods"))
    return ExerciseRequest(own.extent, output_folder(own.output), own.tier, methods, own.seeds, own.processes)


def output_folder(name: str) -> Path:
    """The folder of `--output`; ConfigError where it is a file."""
    output = Path(name)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output}: is a file; give a folder.")
    return output


@naming_flags(_OWN)
def parse_plan(argv: Sequence[str] | None) -> Plan:
    """A plan from the command line.

    Raises:
        ConfigError: flags that cannot be used together, or with a comparison.
    """
    own, rest = build_parser().parse_known_args(argv)
    arguments = tuple(rest)
    config = resolve(arguments, PROG, check_shared)
    budget = parse_budget(own)
    arms = tuple(make_arm(name, arguments) for name in parse_names(own.methods or _METHODS, "--methods"))
    if len({arm.name for arm in arms}) < len(arms):
        raise ConfigError(f"--methods {own.methods}: a method stands in the list twice.")
    if arms[0].copies_reference:
        raise ConfigError("--methods: the first method is what the others are compared with; give one without a copy.")
    sanity = tuple(make_arm(name, arguments) for name in parse_names(own.sanity, "--sanity")) if own.sanity else ()
    for arm in sanity:
        if arm not in arms:
            raise ConfigError(f"--sanity {arm.name}: is not among --methods.")
    return Plan(
        arguments=arguments,
        config=config,
        arms=arms,
        seeds=own.seeds or _SEEDS,
        budget=budget,
        rates=parse_numbers(own.learning_rates, "--learning-rates"),
        beta_factors=parse_numbers(own.beta_factors, "--beta-factors") if own.beta_factors else (),
        sanity=sanity,
        valid_pairs=own.valid_pairs,
        test_pairs=own.test_pairs,
        curve_points=own.curve_points,
        accuracy=own.accuracy,
        output=output_folder(own.output),
    )


def checked_number(
    kind: type[int] | type[float], holds: Callable[[float], bool], expected: str
) -> Callable[[str], float]:
    """A type for argparse: a number of a kind for which `holds` holds."""

    def convert(found: str) -> float:
        try:
            value = kind(found)
            if not holds(value):
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(f"found {found!r}, expected {expected}") from None
        return value

    return convert


def parse_budget(flags: argparse.Namespace) -> Budget:
    """The one budget among the flags; ConfigError where there is none, or several."""
    given = [(kind, getattr(flags, kind)) for kind in BUDGETS if getattr(flags, kind) is not None]
    if len(given) != 1:
        raise ConfigError("--steps, --pair-tokens, --seconds: give exactly one, the budget of every method.")
    return Budget(*given[0])


def parse_names(listed: str, flag: str) -> list[str]:
    """Methods with commas between; ConfigError where one is empty."""
    # Before a number alone a comma is within a value: `--sync-reference 0.6,512`, and not `orpo,0.5*dpo + sft`.
    names = [" ".join(name.split()) for name in re.split(r",(?!\s*[\d.]+\s*(?:,|--|$))", listed)]
    if not all(names):
        raise ConfigError(f"{flag} {listed}: found an empty name, expected methods with commas between.")
    return names


def parse_numbers(listed: str, flag: str) -> tuple[float, ...]:
    """Different numbers above 0 with commas between; ConfigError where they are not."""
    try:
        numbers = [float(word) for word in listed.split(",")]
    except ValueError:
        numbers = [0.0]
    if not all(0 < number < math.inf for number in numbers) or len(set(numbers)) < len(numbers):
        raise ConfigError(f"{flag} {listed}: expected different numbers above 0 with commas between.")
    return tuple(numbers)


def run(argv: Sequence[str]) -> None:
    """Do what a command line asks; raises UserError."""
    plan = parse_request(argv)
    if isinstance(plan, ExerciseRequest):
        run_request(plan, argv)
        return
    # Only now: a mistyped flag need not wait for mlx-lm and transformers.
    from orpo_mlx.compare.report import write_comparison
    from orpo_mlx.compare.runner import run_comparison
    from orpo_mlx.reporting.console import Reporter

    reporter = Reporter(render=with_flags)
    try:
        with naming_flags(_OWN):
            results = run_comparison(plan, argv, reporter)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished is in {plan.output}/, the same command goes on") from None
    for path in write_comparison(results, plan.output):
        reporter.say(str(path))
    fail_if_wrong(
        [f"{row['name']}, labels {row['labels']}" for row in results["sanity"] if row["holds"] is False], plan
    )


def run_request(request: ExerciseRequest, argv: Sequence[str]) -> None:
    """The chapter's exercise; raises UserError, also where a sanity check fails."""
    # Only now: a mistyped flag need not wait for mlx-lm and transformers.
    from orpo_mlx.compare.exercise.helpers import usual_processes
    from orpo_mlx.compare.exercise.page import write_page
    from orpo_mlx.compare.exercise.run import failures, run_exercise
    from orpo_mlx.compare.exercise.sizes import Part
    from orpo_mlx.reporting.console import Reporter

    reporter = Reporter(render=with_flags)
    try:
        with naming_flags(_OWN):
            part = Part(request.tier, request.methods, request.seeds)
            processes = request.processes or usual_processes()
            results = run_exercise(request.extent, request.output, argv, reporter, part, processes)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is finished is in {request.output}/, the same command goes on") from None
    for path in write_page(results, request.output):
        reporter.say(str(path))
    fail_if_wrong(failures(results), request)


def fail_if_wrong(failed: Sequence[str], request: Plan | ExerciseRequest) -> None:
    """Raise TrainingError where sanity checks failed; the reports are written all the same."""
    if failed:
        raise TrainingError(
            f"a sanity check failed ({'; '.join(failed)}): see the first line of {request.output / 'report.md'}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
