"""Settings from where a user gives them: flags, then a YAML file, then a checkpoint, then the defaults."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from orpo_mlx.cli import OneLineParser
from orpo_mlx.config import FIELDS, GROUPS, TrainingConfig, flag_of
from orpo_mlx.config_checks import check_settings, coerce, make_config
from orpo_mlx.errors import ConfigError
from orpo_mlx.methods import describe


class _ListMethods(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(describe())
        parser.exit(0)


def build_parser(prog: str = "python -m orpo_mlx.train") -> OneLineParser:
    """The command line of `train`, one flag per setting that is not a table."""
    parser = OneLineParser(
        prog=prog,
        description="Align a language model with preference pairs (ORPO, DPO and others).",
        allow_abbrev=False,
    )
    groups = add_settings(parser, tuple(FIELDS))
    groups["what"].add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help="YAML file with these settings, and lora_parameters and optimizer_config",
    )
    groups["what"].add_argument(
        "--list-methods", action=_ListMethods, nargs=0, default=argparse.SUPPRESS, help="print all methods and leave"
    )
    return parser


def add_settings(parser: argparse.ArgumentParser, names: Sequence[str]) -> dict[str, argparse._ArgumentGroup]:
    """Give `parser` the flags of the settings `names`, in groups."""
    used = {FIELDS[name].metadata["group"] for name in names}
    groups = {key: parser.add_argument_group(title) for key, title in GROUPS.items() if key in used}
    for name in names:
        field = FIELDS[name]
        group, kind = groups[field.metadata["group"]], field.metadata["kind"]
        flag = f"--{name.replace('_', '-')}"
        help_text = field.metadata["help"].replace("%", "%%")  # argparse formats it.
        if kind is dict:
            continue
        if kind is bool:
            flag = flag if not field.default else f"--no-{flag[2:]}"
            group.add_argument(
                flag,
                dest=name,
                action="store_const",
                const=not field.default,
                default=argparse.SUPPRESS,
                help=help_text,
            )
            continue
        choices = field.metadata.get("choices")
        metavar = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X"}.get(kind, "NAME")
        shown = "" if field.default is None else f" (default: {field.default})"
        group.add_argument(flag, dest=name, metavar=metavar, default=argparse.SUPPRESS, help=help_text + shown)
    return groups


def parse_settings(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[dict[str, Any], argparse.Namespace]:
    """Parse a command line: the settings given, checked, and the parser's other arguments.

    Raises:
        ConfigError: a value that cannot be used; names the flag.
    """
    args = parser.parse_args(_joined_numbers(sys.argv[1:] if argv is None else argv))
    given = {name: value for name, value in vars(args).items() if name in FIELDS}
    return {name: coerce(name, value, flag_of(name)) for name, value in given.items()}, args


def resolve(
    argv: Sequence[str] | None = None,
    prog: str = "python -m orpo_mlx.train",
    earlier: Callable[[str], Mapping[str, Any]] = lambda folder: {},
) -> TrainingConfig:
    """Settings from a command line: flags over the `--config` file over defaults.

    With `--resume`, the settings that `earlier` finds in the adapter path come before the defaults.

    Raises:
        ConfigError: an unknown key, or a value that cannot be used; names the flag or the file and key.
    """
    given, args = parse_settings(build_parser(prog), argv)
    values = {} if args.config is None else read_config_file(Path(args.config))
    values = {**values, **given}
    if values.get("resume"):
        values = {**_left_of(earlier(values.get("adapter_path", FIELDS["adapter_path"].default)), values), **values}
    return make_config(values)


def _left_of(earlier: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Earlier settings without those that settings given now take the place of under another name."""
    instead = ({"iters", "epochs"}, {"memory", "grad_checkpoint", "segment_layers"})
    gone = {name for names in instead if names & set(values) for name in names}
    return {name: value for name, value in earlier.items() if name not in gone}


def _joined_numbers(argv: Sequence[str]) -> list[str]:
    """`--flag -1e-4` as `--flag=-1e-4`: argparse would take the number for a flag and not say what is wrong."""
    joined: list[str] = []
    for word in argv:
        if word.startswith("-") and joined and joined[-1].startswith("--") and _is_number(word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, checked.

    Raises:
        ConfigError: it cannot be read, is not a table, or holds an unknown key or a wrong value.
    """
    # mlx-lm's loader reads 1e-5 as a number, which PyYAML alone does not.
    from mlx_lm.lora import yaml_loader

    try:
        table = yaml.load(path.read_text(encoding="utf-8"), yaml_loader)
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config {path}: not valid YAML ({reason}).") from None
    if not isinstance(table, dict):
        found = "nothing" if table is None else f"a {type(table).__name__}"
        raise ConfigError(f"{path}: found {found}, expected a table of settings (key: value).")
    return check_settings(table, str(path))
