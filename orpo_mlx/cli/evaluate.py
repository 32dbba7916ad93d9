"""Did it get better? Replies of a tuned model and its base, or of any two, compared by a judge."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orpo_mlx.cli.common.arguments import add_model_options, check_apart, check_count, check_output_file
from orpo_mlx.cli.common.judging import (
    EVALUATED,
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
from orpo_mlx.judging.requests import Loading, Side
from orpo_mlx.text import printable_lines

PROG = "orpo-mlx evaluate"
_TEMPERATURE = 0.0


def build_parser() -> OneLineParser:
    """The command line of `evaluate`."""
    parser = OneLineParser(prog=PROG, description="Which of two models answers better, judged prompt by prompt.")
    what = parser.add_argument_group("what is compared")
    what.add_argument("--model", help="Hub id, folder or .gguf file; default: what the adapters were made for")
    what.add_argument("--adapter-path", metavar="FOLDER", help="adapters of the candidate")
    what.add_argument("--baseline-model", metavar="MODEL", help="default: the candidate's model")
    what.add_argument("--baseline-adapter", metavar="FOLDER", help="adapters of the baseline; default: none")
    add_prompt_options(parser, required=False)
    add_judge_options(parser, required=False)
    parser.add_argument("--check-judge", metavar="RULE", help="hold the judge against a rule, such as rule:plain")
    add_sampling_options(parser, temperature=_TEMPERATURE)
    tasks = parser.add_argument_group("tasks, instead of a judge: what was unlearnt")
    tasks.add_argument("--tasks", metavar="NAME,NAME", help="tasks of lm-evaluation-harness, adapters off and on")
    tasks.add_argument("--tasks-path", metavar="FOLDER", help="further tasks, as YAML files of lm-eval's")
    tasks.add_argument("--limit", type=int, metavar="N", help="items of each task, at most")
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write the figures as JSON")
    output.add_argument("--replies", metavar="FILE", help="write every comparison as a line of JSON")
    add_model_options(parser)
    return parser


def run(argv: Sequence[str] | None) -> None:
    """Do what a command line asks; raises UserError."""
    args = build_parser().parse_args(argv)
    for name in ("json", "replies"):
        if getattr(args, name) is not None:
            setattr(args, name, check_output_file(f"--{name}", Path(getattr(args, name))))
            check_apart(f"--{name}", getattr(args, name), {"--data": args.data})
    if args.replies is not None:
        check_apart("--replies", args.replies, {"--json": args.json})
    if args.tasks is not None:
        run_tasks_of(args)
        return
    for name in ("limit", "tasks_path"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: is about --tasks; give both, or leave it out.")
    if args.data is None or args.judge is None:
        raise ConfigError("give --data and --judge, to have replies compared, or --tasks.")
    from orpo_mlx.judging.judges.judges import rule_of

    with naming_flags(vars(args)):
        judge, sampling = judge_of(args), sampling_of(args)
        rule = None if args.check_judge is None else rule_of(args.check_judge)
        baseline, candidate = sides_of(args)
        prompts = prompts_of(args, EVALUATED)
    # Only now: what is wrong with a flag or the data need not wait for mlx-lm and transformers.
    from orpo_mlx.files import save_json
    from orpo_mlx.judging.evaluate import Plan, as_text, evaluate, failure_warning, write_replies
    from orpo_mlx.process_memory import configure_allocator
    from orpo_mlx.reporting.console import Reporter

    with naming_flags(vars(args)):
        plan = Plan(
            baseline,
            candidate,
            judge,
            rule,
            sampling,
            Loading(args.dtype, args.trust_remote_code),
            args.rows,
        )
        configure_allocator()
        found = evaluate(plan, prompts, Reporter(render=with_flags))
    for note in found.replies.notes:
        print(printable_lines(note), file=sys.stderr)
    if args.replies is not None:
        write_replies(args.replies, found.judged)
    if args.json is not None:
        save_json(args.json, found.figures)
    print(printable_lines(as_text(found.figures)), end="")
    warning = failure_warning(found.figures)
    if found.figures["win_rate"] is None:
        raise DataError(f"{warning}; there is no win rate")
    if warning is not None:
        print(printable_lines(f"Warning: {warning}."), file=sys.stderr)


def run_tasks_of(args: argparse.Namespace) -> None:
    """What `--tasks` asks for; raises UserError."""
    for flag, default in judging_defaults().items():
        if getattr(args, flag) != default and flag != "template_strings":
            raise ConfigError(f"--{flag.replace('_', '-')}: has no meaning with --tasks; leave it out.")
    if not args.template_strings:
        raise ConfigError("--no-template-strings: tasks are given without a chat template in any case; leave it out.")
    if args.limit is not None:
        check_count("--limit", args.limit)
    adapter = adapter_folder("--adapter-path", args.adapter_path)
    if adapter is None:
        raise ConfigError("--tasks: compares a model with its adapters and without; give --adapter-path.")
    if args.tasks_path is not None and not Path(args.tasks_path).is_dir():
        raise ConfigError(f"--tasks-path {args.tasks_path}: is not a folder.")
    from orpo_mlx.files import save_json
    from orpo_mlx.judging.regression import regression_figures, regression_line
    from orpo_mlx.judging.tasks import TaskPlan, run_tasks
    from orpo_mlx.models.recorded import base_model

    with naming_flags(vars(args)):
        side = Side(args.model or base_model(adapter), adapter)
        folder = None if args.tasks_path is None else Path(args.tasks_path)
        names = [name.strip() for name in args.tasks.split(",") if name.strip()]
        loading = Loading(args.dtype, args.trust_remote_code)
        found = run_tasks(TaskPlan(side, names, folder, args.limit, loading))
    for name, regression in found.items():
        print(printable_lines(regression_line(name, regression)))
    if args.json is not None:
        save_json(args.json, {name: regression_figures(each) for name, each in found.items()})


def judging_defaults() -> dict[str, Any]:
    """What is about replies and their judge, by argument, as it is where nobody gives it."""
    parser = argparse.ArgumentParser()
    add_prompt_options(parser, required=False)
    add_judge_options(parser, required=False)
    add_sampling_options(parser, temperature=_TEMPERATURE)
    own = dict.fromkeys(("replies", "baseline_model", "baseline_adapter", "check_judge"))
    return {**vars(parser.parse_args([])), **own}


def sides_of(args: argparse.Namespace) -> tuple[Side, Side]:
    """Baseline and candidate.

    Raises:
        ConfigError: they are the same, or adapters are not there.
    """
    from orpo_mlx.models.names import DEFAULT_MODEL
    from orpo_mlx.models.recorded import base_model

    adapter = adapter_folder("--adapter-path", args.adapter_path)
    model = args.model or (DEFAULT_MODEL if adapter is None else base_model(adapter))
    candidate = Side(model, adapter)
    baseline = Side(args.baseline_model or model, adapter_folder("--baseline-adapter", args.baseline_adapter))
    if baseline == candidate:
        raise ConfigError(
            "baseline and candidate are the same model: give --adapter-path, --baseline-adapter or --baseline-model."
        )
    return baseline, candidate


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
