"""Settings from where a user gives them: flags, then a YAML file, then a checkpoint, then the defaults."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from orpo_mlx.config.checks import check_settings, coerce, make_config
from orpo_mlx.config.mlx_lm_keys import KEYS, without_mlx_lm_keys
from orpo_mlx.config.print_config import CHECKPOINT, FILE, FLAG, Settled, as_yaml
from orpo_mlx.config.settings import FIELDS, GROUPS, TrainingConfig, flag_of
from orpo_mlx.errors import ConfigError, reason_of
from orpo_mlx.losses.recipe import describe_methods
from orpo_mlx.text import printable


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one sentence on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Print `message` without the usage text and leave with status 2."""
        self.exit(2, f"{self.prog}: error: {printable(message).rstrip('.')}; see {self.prog} --help.\n")


Earlier = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""From the settings given by flags and a file to those that an earlier run left for this one."""

_REPLACES = {
    "iters": ("epochs",),
    "epochs": ("iters",),
    "memory": ("grad_checkpoint", "segment_layers"),
    "grad_checkpoint": ("memory",),
}


class _ListMethods(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(describe_methods())
        parser.exit(0)


def build_parser(prog: str = "orpo-mlx train") -> OneLineParser:
    """The command line of `train`, one flag per setting that is not a table."""
    parser = OneLineParser(
        prog=prog,
        description="Align a language model with preference pairs (ORPO, DPO and others).",
        epilog="What a config file switches on, --no-NAME switches off, and --NAME the other way round.",
        allow_abbrev=False,
    )
    groups = add_settings(parser, tuple(FIELDS))
    groups["what"].add_argument(
        "-c",
        "--config",
        metavar="FILE",
        help="YAML file with these settings, lora_parameters, lr_schedule and optimizer_config; mlx_lm.lora's keys are "
        "taken as well",
    )
    groups["what"].add_argument(
        "--print-config", action="store_true", help="print all settings as a file for --config, and leave"
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
            _add_switch(group, name, flag, bool(field.default), help_text)
            continue
        choices = field.metadata.get("choices")
        metavar = "{" + ",".join(choices) + "}" if choices else {int: "N", float: "X"}.get(kind, "NAME")
        metavar = "SIZE" if field.metadata.get("size") else metavar
        shown = "" if field.default is None else f" (default: {field.default})"
        group.add_argument(flag, dest=name, metavar=metavar, default=argparse.SUPPRESS, help=help_text + shown)
    return groups


def _add_switch(group: argparse._ArgumentGroup, name: str, flag: str, default: bool, help_text: str) -> None:
    """The flag that sets a switch to what it is not by default and, without a line in --help, the one back."""
    for word, value in ((flag, True), (f"--no-{flag[2:]}", False)):
        shown = argparse.SUPPRESS if value == default else help_text
        group.add_argument(word, dest=name, action="store_const", const=value, default=argparse.SUPPRESS, help=shown)


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
    argv: Sequence[str] | None = None, prog: str = "orpo-mlx train", earlier: Earlier = lambda values: {}
) -> TrainingConfig:
    """Settings from a command line: flags over the `--config` file over what `earlier` finds over defaults.

    With `--print-config` they are printed, and the program leaves with status 0.

    Raises:
        ConfigError: an unknown key, or a value that cannot be used; names the flag or the file and key.
    """
    flags, args = parse_settings(build_parser(prog), argv)
    file = {} if args.config is None else _left_of(read_config_file(Path(args.config), flags), flags)
    values = {**file, **flags}
    found = _left_of(earlier(values), values)
    config = make_config({**found, **values})
    if args.print_config:
        print(as_yaml(Settled(config, {FLAG: flags, FILE: file, CHECKPOINT: found})), end="")
        raise SystemExit(0)
    return config


def _left_of(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `lower` without those that `upper` replaces under another name."""
    gone = {name for given in upper for name in _REPLACES.get(given, ())}
    return {name: value for name, value in lower.items() if name not in gone}


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


def read_config_file(path: Path, flags: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings in a YAML file, checked; `flags` are those of the command line.

    Raises:
        ConfigError: it cannot be read, is not a table, or holds an unknown key or a wrong value.
    """
    # mlx-lm's loader reads 1e-5 as a number, which PyYAML alone does not.
    from mlx_lm.lora import yaml_loader

    try:
        table = yaml.load(path.read_text(encoding="utf-8"), yaml_loader)
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path}: not a text file in UTF-8, expected YAML.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML ({reason_of(error)}).") from None
    if not isinstance(table, dict):
        found = "nothing" if table is None else f"a {type(table).__name__}"
        raise ConfigError(f"{path}: found {found}, expected a table of settings (key: value).")
    return check_settings(without_mlx_lm_keys(table, flags or {}, str(path)), str(path), KEYS)
