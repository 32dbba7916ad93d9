"""Every setting of a training run, declared once: its default, its flag, its help and what values it takes."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from orpo_mlx.cli import OneLineParser
from orpo_mlx.data import Reading, parse_columns
from orpo_mlx.errors import ConfigError
from orpo_mlx.lora import FINE_TUNE_TYPES
from orpo_mlx.methods import PARAMETERS, Recipe, describe
from orpo_mlx.methods import resolve as resolve_method
from orpo_mlx.models import DEFAULT_MODEL, DTYPES
from orpo_mlx.modes import MODES
from orpo_mlx.shapes import PAIRINGS
from orpo_mlx.tokenization import TRUNCATIONS

OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")
NLL_KINDS = ("completion", "sequence")
NONFINITE = ("stop", "skip")
DEFAULT_MAX_SKIPPED = 10
REFERENCES = ("shared", "copy")

DEFAULT_LORA = {"rank": 8, "dropout": 0.0, "scale": 20.0}
DEFAULT_OPTIMIZER_CONFIG: dict[str, dict[str, Any]] = {
    "adam": {"bias_correction": True},
    "adamw": {"bias_correction": True, "weight_decay": 0.0},
    "muon": {},
    "sgd": {},
    "adafactor": {},
}


class _Check:
    """A predicate on a number and the words for it in an error."""

    def __init__(self, words: str, holds: Callable[[float], bool]) -> None:
        self.words, self.holds = words, holds


_POSITIVE = _Check("greater than 0", lambda value: value > 0)
_NOT_NEGATIVE = _Check("0 or more", lambda value: value >= 0)
_PORT = _Check("from 0 to 65535", lambda value: 0 <= value <= 65535)
_ALL_OR_COUNT = _Check("-1 (all) or greater than 0", lambda value: value == -1 or value > 0)
_ALL_OR_SOME = _Check("-1 (all) or 0 or more", lambda value: value >= -1)


def _option(default: Any, help_text: str, kind: type, group: str, **extra: Any) -> Any:
    metadata = {"help": help_text, "kind": kind, "group": group, **extra}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: {**default}, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Settings of one run. Names, meanings and defaults follow `mlx_lm.lora` where it has them.

    `iters` counts optimiser steps, each on `batch_size * grad_accumulation_steps` pairs.
    """

    method: str = _option("orpo", "how to learn from the pairs, or a sum such as 'sigmoid + 0.2*sft'", str, "what")
    model: str = _option(DEFAULT_MODEL, "Hub id, local folder or .gguf file", str, "what")
    data: str = _option("data", "folder of splits, file, or Hub id owner/name[:config][@revision]", str, "what")
    adapter_path: str = _option("adapters", "folder to write adapters, metrics and settings into", str, "what")

    columns: str | None = _option(None, "columns under other names: prompt=question,rejected=worse", str, "data")
    min_margin: float | None = _option(
        None, "least score of chosen above rejected; pairs below are left out", float, "data", check=_NOT_NEGATIVE
    )
    pair_ratings: str | None = _option(
        None, "make pairs of rows of rated completions: best and worst, or all", str, "data", choices=PAIRINGS
    )
    max_seq_length: int = _option(2048, "tokens of prompt and completion, at most", int, "data", check=_POSITIVE)
    truncate: str = _option(
        "drop",
        "what becomes of longer pairs: left out, or the prompt cut (and, only then, the completions)",
        str,
        "data",
        choices=TRUNCATIONS,
    )
    skip_bad_rows: bool = _option(False, "leave out rows that cannot be used, and list them", bool, "data")

    beta: float | None = _option(None, "β of the method; default: the method's own, as for those below", float, "loss")
    label_smoothing: float | None = _option(None, "ε: share of pairs taken to be labelled wrongly", float, "loss")
    gamma: float | None = _option(None, "γ: target margin of simpo", float, "loss")
    alpha: float | None = _option(None, "α: weight of the likelihood term of cpo, rrhf, slic", float, "loss")
    delta: float | None = _option(None, "δ: margin of slic, shift of bco_pair, penalty of dpop", float, "loss")
    tau: float | None = _option(None, "τ: temperature of discopop's blend", float, "loss")
    nll: str = _option(
        "completion",
        "tokens of the NLL term: the chosen completion's, or prompt and chosen as in TRL",
        str,
        "loss",
        choices=NLL_KINDS,
    )

    iters: int | None = _option(None, "optimiser steps", int, "training", check=_POSITIVE)
    epochs: float | None = _option(
        None, "passes over the train split, instead of --iters; default 1", float, "training", check=_POSITIVE
    )
    batch_size: int = _option(4, "pairs per optimiser step", int, "training", check=_POSITIVE)
    grad_accumulation_steps: int = _option(
        1, "multiplies --batch-size, as in mlx_lm.lora", int, "training", check=_POSITIVE
    )
    micro_batch_tokens: int = _option(
        1024, "padded tokens run at one time; bounds memory, changes no number", int, "training", check=_POSITIVE
    )
    learning_rate: float = _option(1e-4, "learning rate", float, "training", check=_POSITIVE)
    lr_schedule: dict[str, Any] | None = _option(None, "mlx-lm's schedule: name, arguments, warmup", dict, "training")
    optimizer: str = _option("adamw", "optimiser", str, "training", choices=OPTIMIZERS)
    optimizer_config: dict[str, Any] = _option(
        DEFAULT_OPTIMIZER_CONFIG, "arguments of each optimiser", dict, "training"
    )
    max_grad_norm: float | None = _option(
        None, "scale gradients down to this norm; default: as they are", float, "training", check=_POSITIVE
    )
    on_nonfinite: str = _option(
        "stop",
        "what a NaN or infinity in a step does: end the run, or pass the step over and count it",
        str,
        "training",
        choices=NONFINITE,
    )
    max_skipped: int | None = _option(
        None,
        "steps passed over before the run ends, with --on-nonfinite skip; default 10",
        int,
        "training",
        check=_NOT_NEGATIVE,
    )
    precompute_reference: bool = _option(
        False, "compute the reference log-probs of all pairs before the first step", bool, "training"
    )
    reference: str = _option(
        "shared",
        "reference model, where one is needed: the policy's own weights as they were, or a second copy of them, run "
        "at every step, for comparison",
        str,
        "training",
        choices=REFERENCES,
    )
    shuffle: bool = _option(True, "train in file order", bool, "training")
    seed: int = _option(0, "seed of adapters, order and dropout", int, "training", check=_NOT_NEGATIVE)

    fine_tune_type: str = _option("lora", "what is trained", str, "adapters", choices=FINE_TUNE_TYPES)
    num_layers: int = _option(-1, "blocks to train, from the last; -1: all", int, "adapters", check=_ALL_OR_COUNT)
    lora_parameters: dict[str, Any] = _option(DEFAULT_LORA, "rank, scale, dropout, keys", dict, "adapters")
    resume_adapter_file: str | None = _option(
        None, "start from the weights of this adapter (mlx-lm or PEFT); --resume goes on with a run", str, "adapters"
    )
    dtype: str | None = _option(
        None,
        "weights' dtype; default: the checkpoint's, float32 on a CPU",
        str,
        "adapters",
        choices=tuple(DTYPES),
    )
    memory_check: bool = _option(True, "train without predicting the peak of memory first", bool, "adapters")
    trust_remote_code: bool = _option(False, "run Python code that comes with the checkpoint", bool, "adapters")

    memory: str = _option(
        "auto",
        "; ".join(
            [
                "auto: the fastest that is predicted to fit this machine",
                *(f"{name}: {m.help}" for name, m in MODES.items()),
            ]
        ),
        str,
        "memory",
        choices=("auto", *MODES),
    )
    segment_layers: int | None = _option(
        None,
        "layers run and freed together with --memory thrift or balanced; default 1",
        int,
        "memory",
        check=_POSITIVE,
    )
    grad_checkpoint: bool = _option(False, "mlx_lm.lora's name for --memory thrift", bool, "memory")
    share_prompt: bool = _option(True, "run each prompt once per completion, for comparison", bool, "memory")
    plain_head: bool = _option(False, "compute the logits of every position, for comparison", bool, "memory")

    rank_timeout: float = _option(
        300.0, "seconds to wait for the other processes of mlx.launch", float, "machines", check=_POSITIVE
    )

    steps_per_report: int = _option(10, "steps between reports", int, "reports", check=_POSITIVE)
    steps_per_eval: int = _option(200, "steps between validations", int, "reports", check=_POSITIVE)
    val_batches: int = _option(25, "validation batches; -1: all, 0: no validation", int, "reports", check=_ALL_OR_SOME)
    test_batches: int = _option(500, "test batches; -1: all, 0: no test", int, "reports", check=_ALL_OR_SOME)
    save_every: int = _option(100, "steps between checkpoints", int, "reports", check=_POSITIVE)
    keep: int = _option(3, "checkpoints that are kept, the newest ones", int, "reports", check=_POSITIVE)
    save_best: bool = _option(
        False, "save and keep the checkpoint of the lowest validation loss as well; best/ leads to it", bool, "reports"
    )
    samples: int = _option(3, "sample replies before and after training", int, "reports", check=_NOT_NEGATIVE)
    report: bool = _option(True, "write no report.html and report.png", bool, "reports")
    report_every: int | None = _option(
        None,
        "steps between writing report.html and report.png; default: at the end only",
        int,
        "reports",
        check=_POSITIVE,
    )
    watch: int | None = _option(
        None,
        "serve a page that draws the run as it goes on, on this machine only, at this port; 0: any that is free",
        int,
        "reports",
        check=_PORT,
    )
    push_to_hub: str | None = _option(
        None, "owner/name: send adapters, model card and figures to this model repository at the end", str, "reports"
    )

    resume: bool = _option(
        False, "go on from the newest whole checkpoint in --adapter-path, with its settings", bool, "resume"
    )
    resume_with_changes: bool = _option(
        False, "let --resume go on where settings, data or model differ from the checkpoint's", bool, "resume"
    )
    overwrite: bool = _option(False, "start anew where --adapter-path holds an unfinished run", bool, "resume")

    def settings(self) -> dict[str, Any]:
        """All settings as a plain dictionary."""
        return dataclasses.asdict(self)


_FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig)}
_GROUPS = {
    "what": "what to train on what",
    "data": "data",
    "loss": "loss",
    "training": "training",
    "adapters": "model and adapters",
    "memory": "memory; changes no number but time and size",
    "machines": "more than one machine",
    "reports": "reports and saves",
    "resume": "going on with a run",
}


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
    groups = add_settings(parser, tuple(_FIELDS))
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
    used = {_FIELDS[name].metadata["group"] for name in names}
    groups = {key: parser.add_argument_group(title) for key, title in _GROUPS.items() if key in used}
    for name in names:
        field = _FIELDS[name]
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
    given = {name: value for name, value in vars(args).items() if name in _FIELDS}
    return {name: _coerce(name, value, _flag(name)) for name, value in given.items()}, args


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
        values = {**_left_of(earlier(values.get("adapter_path", _FIELDS["adapter_path"].default)), values), **values}
    return make_config(values)


def _left_of(earlier: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Earlier settings without those that settings given now take the place of under another name."""
    instead = ({"iters", "epochs"}, {"memory", "grad_checkpoint", "segment_layers"})
    gone = {name for names in instead if names & set(values) for name in names}
    return {name: value for name, value in earlier.items() if name not in gone}


def recipe(config: TrainingConfig) -> Recipe:
    """The method of a run with its parameters.

    Raises:
        ConfigError: see `methods.resolve`.
    """
    return resolve_method(config.method, {name: getattr(config, name) for name in PARAMETERS})


def data_reading(config: TrainingConfig) -> Reading:
    """How a run's rows are read.

    Raises:
        ConfigError: see `data.parse_columns`.
    """
    columns = parse_columns(config.columns)
    return Reading(columns, config.pair_ratings, config.min_margin, config.skip_bad_rows)


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


def make_config(values: Mapping[str, Any]) -> TrainingConfig:
    """A `TrainingConfig` from checked values, with the checks that concern several of them.

    Raises:
        ConfigError: settings that contradict each other, or nested tables with unknown keys.
    """
    config = TrainingConfig(**dict(values))
    if config.iters is not None and config.epochs is not None:
        raise ConfigError("--iters and --epochs both say how long to train; give one of them.")
    if config.report_every is not None and not config.report:
        raise ConfigError("--no-report: --report-every asks for reports; give one of them.")
    if not recipe(config).needs_reference and config.precompute_reference:
        raise ConfigError(f"--precompute-reference: method {config.method} compares with no reference; leave it out.")
    if config.max_skipped is not None and config.on_nonfinite != "skip":
        raise ConfigError("--max-skipped counts what --on-nonfinite skip passes over; add that, or leave it out.")
    if config.resume_with_changes and not config.resume:
        raise ConfigError("--resume-with-changes says how --resume goes on; add that.")
    if config.resume and config.overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite starts anew; give one of them.")
    if config.reference == "copy":
        if not recipe(config).needs_reference:
            raise ConfigError(f"--reference copy: method {config.method} compares with no reference; leave it out.")
        if config.precompute_reference:
            raise ConfigError("--reference copy runs the copy at every step; leave out --precompute-reference.")
        if config.resume and config.resume_adapter_file is not None:
            raise ConfigError(
                "--reference copy: a resumed run no longer loads what --resume-adapter-file names, so nothing can be "
                "copied; use --reference shared."
            )
    data_reading(config)
    config = dataclasses.replace(config, memory=_memory_mode(config))
    lora = {**DEFAULT_LORA, **config.lora_parameters}
    _check_table("lora_parameters", lora, {"rank", "scale", "dropout", "keys"})
    for key, check in (("rank", _POSITIVE), ("scale", _POSITIVE), ("dropout", _NOT_NEGATIVE)):
        _number(lora[key], int if key == "rank" else float, check, f"lora_parameters.{key}")
    if lora["dropout"] >= 1:
        raise ConfigError(f"lora_parameters.dropout: found {lora['dropout']}, expected a number below 1.")
    keys = lora.get("keys")
    if keys is not None and not (isinstance(keys, list) and keys and all(isinstance(key, str) for key in keys)):
        raise ConfigError(
            f"lora_parameters.keys: found {keys!r}, expected a list of module names such as self_attn.q_proj."
        )
    _check_table("optimizer_config", config.optimizer_config, set(OPTIMIZERS))
    optimizers = {}
    for key in OPTIMIZERS:
        table = config.optimizer_config.get(key) or {}
        if not isinstance(table, dict):
            raise ConfigError(f"optimizer_config.{key}: found {table!r}, expected a table.")
        optimizers[key] = {**DEFAULT_OPTIMIZER_CONFIG[key], **table}
    return dataclasses.replace(config, lora_parameters=lora, optimizer_config=optimizers)


def _memory_mode(config: TrainingConfig) -> str:
    """`config.memory` with `grad_checkpoint` taken into account.

    Raises:
        ConfigError: flags that contradict it, or would do nothing.
    """
    mode = config.memory
    if config.grad_checkpoint:
        if mode not in ("auto", "thrift"):
            raise ConfigError(
                f"--grad-checkpoint means --memory thrift, and --memory {mode} is given; give one of them."
            )
        mode = "thrift"
    in_segments = mode in MODES and MODES[mode].kept_layers < 1
    if config.segment_layers is not None and not in_segments:
        raise ConfigError(f"--segment-layers: --memory {mode} runs no segments; add --memory thrift or balanced.")
    if config.plain_head and in_segments:
        raise ConfigError(f"--plain-head: --memory {mode} needs the head apart from the layers; use --memory fast.")
    if mode == "plain" and (config.plain_head or not config.share_prompt):
        raise ConfigError("--memory plain sets --no-share-prompt and --plain-head itself; leave them out.")
    return mode


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


def check_settings(table: Mapping[Any, Any], place: str) -> dict[str, Any]:
    """The settings of a table, each as its type; those that are None are left out.

    Raises:
        ConfigError: an unknown key or a wrong value; names `place`.
    """
    values = {}
    for key, value in table.items():
        if key not in _FIELDS:
            near = difflib.get_close_matches(str(key), _FIELDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known keys are {', '.join(_FIELDS)}."
            raise ConfigError(f"{place}: unknown key {key!r}{hint}")
        if value is not None:
            values[key] = _coerce(key, value, f"{place}: {key}")
    return values


def group_of(name: str) -> str:
    """The group a setting is declared in."""
    return str(_FIELDS[name].metadata["group"])


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _coerce(name: str, value: Any, place: str) -> Any:
    """`value` as the setting's type.

    Raises:
        ConfigError: it is not of that type or outside its range; names `place`.
    """
    metadata = _FIELDS[name].metadata
    kind: type = metadata["kind"]
    if kind in (int, float):
        return _number(value, kind, metadata.get("check"), place)
    if not isinstance(value, kind):
        names = {dict: "a table", bool: "true or false", str: "text"}
        raise ConfigError(f"{place}: found {value!r}, expected {names[kind]}.")
    choices = metadata.get("choices")
    if choices and value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"{place}: found {value!r}, expected one of {', '.join(choices)}{hint}")
    return value


def _number(value: Any, kind: type[int] | type[float], check: _Check | None, place: str) -> int | float:
    wanted = ("a whole number" if kind is int else "a number") + (f" {check.words}" if check else "")
    try:
        if isinstance(value, bool):
            raise ValueError
        number: int | float = kind(value) if isinstance(value, str) or kind is float else value
        if not isinstance(number, kind) or not math.isfinite(number) or (check and not check.holds(number)):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{place}: found {value!r}, expected {wanted}.") from None
    return number


def _check_table(name: str, table: Mapping[str, Any], known: set[str]) -> None:
    for key in map(str, table):
        if key not in known:
            hint = " (mlx-lm's 'scale' is alpha divided by rank)" if key == "alpha" else ""
            raise ConfigError(f"{name}.{key}: unknown key, expected one of {', '.join(sorted(known))}{hint}.")
