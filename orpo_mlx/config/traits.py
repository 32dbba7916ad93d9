"""What can be known of a setting, and how `settings.py` declares it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from functools import partial
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin

from orpo_mlx.losses.registry import Range


class Trait(enum.Flag):
    """What other modules ask of a setting; `settings.settings_with` answers.

    A setting without any may not change at `--resume`, is not taken over by `--test`, must agree between ranks, stands
    on the model card where it is not the default, and may be given to `compare`.
    """

    NONE = 0
    RESUMABLE = enum.auto()
    """May change when a run goes on: no gradient depends on it."""
    BY_CONTENT = enum.auto()
    """Names what is compared by its content instead, wherever it lies."""
    THIS_COMMAND = enum.auto()
    """Counts where this very command asks for it: no checkpoint has a say in it."""
    PER_RANK = enum.auto()
    """May differ between the processes of one run."""
    EVALUATED = enum.auto()
    """Held-out figures depend on it, so that `--test` takes it from the run that made the adapters."""
    TRAINING_ONLY = enum.auto()
    """Refused with `--test`."""
    TESTED = enum.auto()
    """Counts with `--test` as well, like what is EVALUATED; of all others a flag is refused there."""
    COMPARED = enum.auto()
    """A comparison sets it itself, or has no use for it: refused among the flags that hold for all methods."""
    OF_METHOD = enum.auto()
    """May differ between the methods of a comparison."""
    ON_CARD = enum.auto()
    """Stands on the model card even where it has its default."""
    NOT_ON_CARD = enum.auto()
    """Is no row of the model card's settings: it stands elsewhere on the card, or concerns nobody else."""
    PUBLISHED = enum.auto()
    """Stands in a published measurement of memory, since it decides the figures."""
    OF_ROUNDS = enum.auto()
    """Set by the rounds of `orpo-mlx iterate` themselves: refused among the settings of their trainings."""
    INSPECTED = enum.auto()
    """`orpo-mlx inspect` has it too."""


class Group(NamedTuple):
    """Settings that stand together in `--help`."""

    title: str
    traits: Trait = Trait.NONE
    """What holds for all of them."""


GROUPS = {
    "what": Group("what to train on what"),
    "data": Group("data", Trait.EVALUATED),
    "loss": Group("loss", Trait.EVALUATED),
    "training": Group("training"),
    "adapters": Group("model and adapters"),
    "memory": Group(
        "memory; changes time and size, results by rounding alone", Trait.RESUMABLE | Trait.PER_RANK | Trait.TESTED
    ),
    "machines": Group("more than one machine", Trait.RESUMABLE | Trait.COMPARED),
    "reports": Group("reports and saves", Trait.RESUMABLE | Trait.COMPARED),
    "resume": Group("going on with a run", Trait.OF_ROUNDS | Trait.RESUMABLE | Trait.THIS_COMMAND | Trait.COMPARED),
}


POSITIVE = Range("greater than 0", lambda value: value > 0)
NOT_NEGATIVE = Range("0 or more", lambda value: value >= 0)
SEED = Range("from 0 to 2^64 - 1", lambda value: 0 <= value < 2**64)
# MLX's shapes hold no more.
RANK = Range("from 1 to 2^31 - 1", lambda value: 0 < value < 2**31)
PORT = Range("from 0 to 65535", lambda value: 0 <= value <= 65535)
ALL_OR_COUNT = Range("-1 (all) or greater than 0", lambda value: value == -1 or value > 0)
ALL_OR_SOME = Range("-1 (all) or 0 or more", lambda value: value >= -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """All that is known of one setting."""

    group: str
    """A key of `GROUPS`."""
    help: str
    off_help: str = ""
    """What `--no-NAME` does, of a switch that is on by default."""
    traits: Trait = Trait.NONE
    range: Range | None = None
    choices: tuple[str, ...] = ()
    former: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Values of earlier versions, and what they are called now."""
    any_case: bool = False
    """Whether a choice may be written in capitals."""
    is_size: bool = False
    """Whether 500MB is read as bytes."""
    aliases: tuple[str, ...] = ()
    """Keys of older mlx-lm, mlx-lm-lora and TRL for the same, where the name alone does not lead here."""
    also: tuple[str, ...] = ()
    """Flags that people bring from elsewhere and that are taken for this one."""
    replaces: tuple[str, ...] = ()
    """Settings of a lower level (file, checkpoint) that do not hold where this one is given."""
    # From the field itself, so that it stands there once.
    name: str = ""
    kind: type = str
    default: Any = None

    @property
    def flag(self) -> str:
        """As the command line has it."""
        return f"--{self.name.replace('_', '-')}"


def option(group: str, default: Any, help: str, traits: Trait = Trait.NONE, **more: Any) -> Any:
    """A dataclass field with its `Setting`; `more` are arguments of that."""
    setting = Setting(group=group, help=help, traits=GROUPS[group].traits | traits, **more)
    if isinstance(default, dict):
        # A copy for each config: a table that one of them changes must not be the default of all others.
        return dataclasses.field(default_factory=lambda: {**default}, metadata={"setting": setting})
    return dataclasses.field(default=default, metadata={"setting": setting})


def setting_of(field: dataclasses.Field[Any], annotation: Any) -> Setting:
    """The `Setting` of a field that `option` has made, with the field's name, type and default."""
    if isinstance(annotation, UnionType):  # int | None
        annotation = next(each for each in get_args(annotation) if each is not NoneType)
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    setting: Setting = field.metadata["setting"]
    return dataclasses.replace(setting, name=field.name, kind=get_origin(annotation) or annotation, default=default)


# A field of each group, as `settings.py` declares it.
in_what = partial(option, "what")
in_data = partial(option, "data")
in_loss = partial(option, "loss")
in_parameter = partial(option, "loss", None, traits=Trait.OF_METHOD | Trait.COMPARED)
in_training = partial(option, "training")
in_adapters = partial(option, "adapters")
in_memory = partial(option, "memory")
in_machines = partial(option, "machines")
in_reports = partial(option, "reports")
in_resume = partial(option, "resume")
