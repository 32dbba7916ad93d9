"""Settings from where a user gives them: flags, then a YAML file, then a checkpoint, then the defaults."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from orpo_mlx.config.checks import check_settings, coerce, make_config, parse_number
from orpo_mlx.config.defaults import DEFAULT_LORA
from orpo_mlx.config.flags import GivenOnce, OneLineParser, flag_of, naming_flags, naming_keys
from orpo_mlx.config.mlx_lm_keys import KEYS, without_mlx_lm_keys
from orpo_mlx.config.print_config import SourcedConfig, as_yaml
from orpo_mlx.config.settings import SETTINGS, TrainingConfig
from orpo_mlx.config.traits import GROUPS, Setting, Trait
from orpo_mlx.config.yaml_table import read_yaml_table
from orpo_mlx.errors import ConfigError
from orpo_mlx.losses.recipe import describe_methods

_METAVARS = {int: "N", float: "X", str: "NAME"}


KNOWN_AS = {f"--{alias.replace('_', '-')}": setting.flag for setting in SETTINGS.values() for alias in setting.aliases}
KNOWN_AS |= {"--rank": "--lora-rank", "--lora-r": "--lora-rank", "--target-modules": "--lora-keys"}
"""Flags of other programs, by which an unknown one is guessed."""


class LoraFlag(NamedTuple):
    """A flag for one entry of `lora_parameters`, which is a table in files."""

    key: str
    kind: type
    help: str


LORA_FLAGS = {
    "lora_rank": LoraFlag("rank", int, f"rank of the adapters (default: {DEFAULT_LORA['rank']})"),
    "lora_alpha": LoraFlag("alpha", float, f"scale times rank; default: a scale of {DEFAULT_LORA['scale']:g}"),
    "lora_dropout": LoraFlag("dropout", float, f"dropout before the adapters (default: {DEFAULT_LORA['dropout']:g})"),
    "lora_keys": LoraFlag("keys", str, "modules to adapt, separated by commas: self_attn.q_proj,self_attn.v_proj"),
}


class GivenSettings(NamedTuple):
    """Settings of a command line and of the file it names, each checked by itself."""

    flags: Mapping[str, Any]
    file: Mapping[str, Any]
    print_config: bool
    """Whether the settings are only to be printed."""
    config_file: str | None = None
    """That file."""

    @property
    def values(self) -> dict[str, Any]:
        """Flags over file."""
        return {**self.file, **self.flags}

    @contextmanager
    def naming_sources(self) -> Iterator[None]:
        """Let errors that pass through call settings by what gave them: the file's keys, or else flags."""
        keys = {name: name for name in self.file if name not in self.flags}
        with naming_flags(), naming_keys(self.config_file or "", keys):
            yield


class _ListMethods(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(describe_methods())
        parser.exit(0)


def build_parser(prog: str = "orpo-mlx train") -> OneLineParser:
    """The command line of `train`, one flag per setting that is not a table."""
    parser = OneLineParser(
        prog=prog,
        known_as=KNOWN_AS,
        description="Align a language model with preference pairs (ORPO, DPO and others).",
        epilog="What a config file switches on, --no-NAME switches off, and --NAME the other way round.",
        # An abbreviation would change its meaning, or lose it, with the next flag.
        allow_abbrev=False,
    )
    groups = add_settings(parser, tuple(SETTINGS))
    for name, key in LORA_FLAGS.items():
        groups["adapters"].add_argument(
            f"--{name.replace('_', '-')}",
            metavar="NAMES" if key.kind is str else _METAVARS[key.kind],
            default=argparse.SUPPRESS,
            help=key.help,
        )
    groups["what"].add_argument(
        "-c",
        "--config",
        action=GivenOnce,
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
    settings = [SETTINGS[name] for name in names]
    used = {setting.group for setting in settings}
    groups = {key: parser.add_argument_group(group.title) for key, group in GROUPS.items() if key in used}
    for setting in settings:
        if setting.kind is bool:
            add_switch(groups[setting.group], setting)
        elif setting.kind is not dict:  # Tables stand in a file.
            add_option(groups[setting.group], setting)
    return groups


def add_option(group: argparse._ArgumentGroup, setting: Setting) -> None:
    """The flag of a setting that takes a value, which is checked later, together with those of files."""
    metavar = "{" + ",".join(setting.choices) + "}" if setting.choices else _METAVARS[setting.kind]
    shown = "" if setting.default is None else f" (default: {setting.default})"
    group.add_argument(
        setting.flag,
        *setting.also,
        dest=setting.name,
        metavar="SIZE" if setting.is_size else metavar,
        # What was not given is not there, and so leaves a file or a checkpoint its say.
        default=argparse.SUPPRESS,
        help=escaped(setting.help + shown),
    )


def add_switch(group: argparse._ArgumentGroup, setting: Setting) -> None:
    """The flag that sets a switch, and the one that takes it back; `--help` has the latter where it says something."""
    by_default = " (default)" if setting.default else ""
    texts = {True: f"{setting.help}{by_default}", False: setting.off_help}
    for word, value in ((setting.flag, True), (f"--no-{setting.flag[2:]}", False)):
        shown = escaped(texts[value]) if texts[value] else argparse.SUPPRESS
        group.add_argument(
            word, dest=setting.name, action="store_const", const=value, default=argparse.SUPPRESS, help=shown
        )


def escaped(text: str) -> str:
    """A help text as argparse wants it, which takes % for a format."""
    return text.replace("%", "%%")


def parse_settings(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[dict[str, Any], argparse.Namespace]:
    """Parse a command line: the settings given, checked, and the parser's other arguments.

    Raises:
        ConfigError: a value that cannot be used; names the flag.
    """
    args = parser.parse_args(join_negative_numbers(sys.argv[1:] if argv is None else argv))
    given = {name: value for name, value in vars(args).items() if name in SETTINGS}
    return {name: coerce(name, value, SETTINGS[name].flag) for name, value in given.items()}, args


def given_settings(argv: Sequence[str] | None = None, prog: str = "orpo-mlx train") -> GivenSettings:
    """What a command line of `train` and its `--config` file give, without what a flag replaces in the file.

    Raises:
        ConfigError: an unknown key, or a value that cannot be used; names the flag or the file and key.
    """
    flags, args = parse_settings(build_parser(prog), argv)
    if lora := given_lora(args):
        flags["lora_parameters"] = lora
    # A flag must win over the file under another name too: --epochs over `iters`.
    file = {} if args.config is None else without_replaced(read_config_file(Path(args.config), flags), flags)
    return GivenSettings(flags, file, args.print_config, args.config)


def given_lora(args: argparse.Namespace) -> dict[str, Any]:
    """Entries of `lora_parameters` that flags give, `alpha` among them; ConfigError for a value that is no number."""
    table: dict[str, Any] = {}
    for name, (key, kind, _) in LORA_FLAGS.items():
        if name in args:
            text = getattr(args, name)
            flag = f"--{name.replace('_', '-')}"
            table[key] = text.split(",") if kind is str else parse_number(text, kind, None, flag)
    return table


def merged_lora(*tables: Mapping[str, Any] | None) -> dict[str, Any]:
    """`lora_parameters` of several sources, the later ones first; `alpha`, as flags have it, becomes mlx-lm's scale."""
    merged: dict[str, Any] = {}
    for table in tables:
        merged |= table or {}
    if "alpha" in merged:
        rank = parse_number(merged.get("rank", DEFAULT_LORA["rank"]), int, None, "lora_parameters.rank")
        alpha = parse_number(merged.pop("alpha"), float, None, "lora_parameters.alpha")
        merged["scale"] = alpha / max(rank, 1)  # A rank below 1 is refused with the others.
    return merged


def merge_settings(given: GivenSettings, checkpoint: Mapping[str, Any]) -> TrainingConfig:
    """The settings of a run: those given over those of a `checkpoint`, or of adapters, over the defaults.

    With `--print-config` they are printed, and the program leaves with status 0.

    Raises:
        ConfigError: settings that contradict each other.
    """
    found = without_replaced(checkpoint, given.values)
    if {**found, **given.values}.get("fine_tune_type") == "full":
        refuse_lora_flags(given)
        # mlx-lm records a table that it made nothing of, and whoever goes on from there cannot leave it out.
        found = _without_adapters(found)
        if "fine_tune_type" in given.flags:
            # The file may be that of other runs as well, with adapters.
            given = given._replace(file=_without_adapters(given.file))
    if "lora_parameters" in given.flags:
        # A flag gives one entry of the table: the rest is the file's or the checkpoint's.
        tables = [source.get("lora_parameters") for source in (found, given.file, given.flags)]
        own = merged_lora(*tables)
        given = given._replace(flags={**given.flags, "lora_parameters": own})
    with given.naming_sources():
        config = make_config({**found, **given.values})
    refuse_idle_flags(given, config)
    if given.print_config:
        print(as_yaml(SourcedConfig(config, given.flags, given.file, found)), end="")
        raise SystemExit(0)
    return config


def _without_adapters(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in ("lora_parameters", "lora_plus_ratio")}


def refuse_lora_flags(given: GivenSettings) -> None:
    """Refuse the flags of `LORA_FLAGS` where full weights are trained; raises ConfigError."""
    table = given.flags.get("lora_parameters", {})
    for name, flag in LORA_FLAGS.items():
        if flag.key in table:
            with given.naming_sources():
                raise ConfigError(f"{flag_of(name)}: `fine_tune_type=full` trains no adapters; leave out one of them.")


def refuse_idle_flags(given: GivenSettings, config: TrainingConfig) -> None:
    """Refuse flags to which other settings leave nothing to do; raises ConfigError. A file, or a run that goes on, may
    have them: nobody edits those to switch something off for once."""
    idle = {
        "steps_per_eval": config.val_batches == 0 and "`val_batches=0` leaves nothing to validate",
        "sample_tokens": config.samples == 0
        and config.judge is None
        and "`samples=0` and no `judge` leave no reply to bound",
    }
    for name, why in idle.items():
        if why and name in given.flags:
            with given.naming_sources():
                raise ConfigError(f"`{name}`: {why}; leave it out.")


def check_test_flags(given: GivenSettings) -> None:
    """Refuse flags that are about training beside `--test`; raises ConfigError. A file may have them: it is the one
    that the run was trained with."""
    # What would do harm is refused in a file as well, with the other settings that contradict each other.
    elsewhere = Trait.EVALUATED | Trait.TESTED | Trait.TRAINING_ONLY
    for name, value in given.flags.items():
        if not SETTINGS[name].traits & elsewhere:
            with given.naming_sources():
                raise ConfigError(f"`{name}={value}`: is about training, and `test` trains nothing; leave it out.")


def resolve(
    argv: Sequence[str] | None = None,
    prog: str = "orpo-mlx train",
    check: Callable[[TrainingConfig], object] = lambda _: None,
) -> TrainingConfig:
    """Settings from a command line alone; see `given_settings` and `merge_settings`.

    `check` raises ConfigError where a command has no use for a setting.
    """
    given = given_settings(argv, prog)
    config = merge_settings(given, {})
    with given.naming_sources():
        check(config)
    return config


def without_replaced(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `lower` without those that `upper` replaces under another name."""
    gone = {name for given in upper for name in SETTINGS[given].replaces}
    return {name: value for name, value in lower.items() if name not in gone}


def join_negative_numbers(argv: Sequence[str]) -> list[str]:
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
    table = read_yaml_table(path, f"--config {path}")
    return check_settings(without_mlx_lm_keys(table, flags or {}, str(path)), str(path), KEYS)
