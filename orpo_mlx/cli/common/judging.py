"""Flags about prompts, replies and judges that several commands have."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from orpo_mlx.cli.common.arguments import check_count
from orpo_mlx.errors import ConfigError, DataError
from orpo_mlx.judging.requests import ROWS, Sampling
from orpo_mlx.run_folder import ADAPTER_CONFIG_FILE

if TYPE_CHECKING:
    from orpo_mlx.data.prompts import Prompt
    from orpo_mlx.judging.judges.judges import JudgeOptions
    from orpo_mlx.judging.judges.verdicts import Judge

# The splits whose prompts are taken, the first that is there.
EVALUATED = ("test", "valid", "train")
TRAINED = ("train",)


def add_prompt_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Where prompts come from."""
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--data", required=required, metavar="DATA", help="folder of splits, file, or Hub id; prompts suffice"
    )
    group.add_argument("--columns", help="columns under other names: prompt=question")
    group.add_argument("--prompts", type=int, metavar="N", help="take this many, spread evenly; default: all")
    group.add_argument(
        "--no-template-strings",
        dest="template_strings",
        action="store_false",
        help="give prompts that are strings as they stand, without the chat template",
    )


def add_sampling_options(parser: argparse.ArgumentParser, temperature: float) -> None:
    """How replies are drawn."""
    group = parser.add_argument_group("replies")
    group.add_argument("--max-tokens", type=int, default=128, help="of one reply (default: %(default)s)")
    group.add_argument(
        "--temp", type=float, default=temperature, help="temperature; 0 is greedy (default: %(default)s)"
    )
    group.add_argument("--top-p", type=float, default=1.0, help="probability mass drawn from (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="seed of the replies (default: %(default)s)")
    group.add_argument(
        "--rows", type=int, default=ROWS, help="replies that are generated together (default: %(default)s)"
    )


def add_judge_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Who judges."""
    group = parser.add_argument_group("judge")
    group.add_argument(
        "--judge",
        required=required,
        help="rule:plain, rule:length=5-20, rule:regex=PATTERN, rule:json=KEY,KEY, rule:exact; reward: and a "
        "reward model; implicit: and a folder of adapters; or a model to load; choice: and a "
        "model, for small ones; or endpoint (an OpenAI-style server at 127.0.0.1:8080), or such a server's address",
    )
    group.add_argument(
        "--judge-tokens",
        type=int,
        default=16,
        help="of a model's verdict; more for one that thinks aloud (%(default)s)",
    )
    group.add_argument(
        "--judge-timeout", type=float, default=60.0, help="seconds for an endpoint's answer (%(default)s)"
    )
    group.add_argument(
        "--judge-model", default="default", help="the model's name at an endpoint (default: %(default)s)"
    )


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The sampling that flags ask for; ConfigError where they cannot be used."""
    check_count("--max-tokens", args.max_tokens)
    check_count("--rows", args.rows)
    if not (math.isfinite(args.temp) and args.temp >= 0):
        raise ConfigError(f"--temp: found {args.temp}, expected a number of 0 or more.")
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top-p: found {args.top_p}, expected a number above 0 and at most 1.")
    if args.top_p < 1 and args.temp == 0:
        raise ConfigError(f"--top-p {args.top_p}: --temp 0 draws nothing; give a --temp above 0, or leave it out.")
    if args.seed < 0:
        raise ConfigError(f"--seed: found {args.seed}, expected 0 or more.")
    return Sampling(args.max_tokens, args.temp, args.top_p, args.seed, args.template_strings)


def judge_of(args: argparse.Namespace) -> Judge:
    """The judge that flags ask for; ConfigError where they cannot be used."""
    from orpo_mlx.judging.judges.judges import make_judge

    return make_judge(args.judge, judge_options(args))


def judge_options(args: argparse.Namespace) -> JudgeOptions:
    """How a judge that is a model is asked; ConfigError where flags cannot be used."""
    from orpo_mlx.judging.judges.judges import JudgeOptions

    check_count("--judge-tokens", args.judge_tokens)
    if not (math.isfinite(args.judge_timeout) and args.judge_timeout > 0):
        raise ConfigError(f"--judge-timeout: found {args.judge_timeout}, expected seconds above 0.")
    return JudgeOptions(
        args.judge_tokens,
        args.judge_timeout,
        args.judge_model,
        args.dtype,
        args.trust_remote_code,
        args.template_strings,
    )


def prompts_of(args: argparse.Namespace, splits: tuple[str, ...]) -> list[Prompt]:
    """The prompts that flags ask for, of the first of `splits` that the data has.

    Raises:
        UserError: there are none, or a row has none.
    """
    from orpo_mlx.data.pairs import parse_columns
    from orpo_mlx.data.prompts import read_prompts, spread
    from orpo_mlx.data.sources import find_splits

    if args.prompts is not None:
        check_count("--prompts", args.prompts)
    sources = find_splits(args.data, splits)
    name = next((name for name in splits if name in sources), None)
    if name is None:
        raise DataError(f"--data {args.data}: has none of the splits {', '.join(splits)}.")
    return spread(list(read_prompts(sources[name], parse_columns(args.columns))), args.prompts)


def adapter_folder(flag: str, given: str | None) -> Path | None:
    """A folder of adapters as given; ConfigError where it is not there."""
    if given is None:
        return None
    folder = Path(given).expanduser()
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        raise ConfigError(f"{flag} {given}: holds no adapter_config.json; give a folder that train wrote.")
    return folder
