"""What a comparison of methods is to run: arms, budget, learning rates, seeds."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orpo_mlx.config.command_line import resolve
from orpo_mlx.config.derived import recipe
from orpo_mlx.config.settings import TrainingConfig, settings_with
from orpo_mlx.config.traits import Trait
from orpo_mlx.errors import ConfigError

# Cells print their errors under the name of the command that started them.
PROG = "orpo-mlx compare"
BUDGETS = {"steps": int, "pair_tokens": int, "seconds": float}


class Budget(NamedTuple):
    """How long every method may train."""

    kind: str
    """One of `BUDGETS`."""
    amount: float

    def share(self, steps: int, pair_tokens: int, seconds: float) -> float:
        """How much of it is spent, 1 or more when it is over."""
        return {"steps": steps, "pair_tokens": pair_tokens, "seconds": seconds}[self.kind] / self.amount

    def __str__(self) -> str:
        unit = {"steps": "steps", "pair_tokens": "pair tokens", "seconds": "seconds of training"}[self.kind]
        return f"{self.amount:g} {unit}" if self.kind == "seconds" else f"{self.amount:,.0f} {unit}"


class Arm(NamedTuple):
    """A method with its own flags."""

    name: str
    """As it was given: `dpo`, or `dpo --reference copy`."""
    argv: tuple[str, ...]
    """Flags that make it: `--method` and its value, then its own."""
    beta: float | None
    """Its β, where it has exactly one."""
    needs_reference: bool
    copies_reference: bool

    @property
    def sweep_key(self) -> tuple[str, ...]:
        """Sweep key; equal keys share a learning rate."""
        # A copied reference gives the same log-probs, so it changes memory and time and no number of the maths.
        return tuple(word for word in self.argv if word not in ("--reference", "copy"))


@dataclasses.dataclass(frozen=True)
class Plan:
    """One comparison."""

    arguments: tuple[str, ...]
    """Flags of `orpo_mlx.train`, for all arms."""
    config: TrainingConfig
    arms: tuple[Arm, ...]
    seeds: int
    budget: Budget
    rates: tuple[float, ...]
    beta_factors: tuple[float, ...]
    sanity: tuple[Arm, ...]
    valid_pairs: int
    test_pairs: int
    curve_points: int
    accuracy: float
    output: Path

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for cells to be of one comparison; arms, seeds and rates may be added to."""
        return {
            **self.config.settings(without=Trait.COMPARED),
            "budget": list(self.budget),
            "valid_pairs": self.valid_pairs,
            "test_pairs": self.test_pairs,
            "curve_points": self.curve_points,
        }


def make_arm(name: str, arguments: Sequence[str]) -> Arm:
    """An arm from a method and the flags after it; ConfigError where these make no method."""
    expression, mark, flags = name.partition(" --")
    try:
        own = shlex.split(mark + flags)
    except ValueError as error:
        raise ConfigError(f"`methods` {name}: cannot be read ({error}).") from None
    argv = ("--method", expression, *own)
    config = resolve([*arguments, *argv], PROG)
    plain = resolve([*arguments, "--method", expression], PROG).settings()
    # By effect and not by name: a flag that repeats what holds anyway changes nothing.
    changed = {key for key, value in config.settings().items() if value != plain[key]}
    wrong = sorted(changed - {*settings_with(Trait.OF_METHOD)})
    if wrong:
        raise ConfigError(f"`methods` {name}: `{wrong[0]}` is not a method's; give it for all of them.")
    found = recipe(config)
    betas = {parameters["beta"] for parameters in found.parameters.values() if "beta" in parameters}
    beta = betas.pop() if len(betas) == 1 else None
    return Arm(name, argv, beta, found.needs_reference, config.reference == "copy")


def check_shared(config: TrainingConfig) -> None:
    """Raise ConfigError where the settings of all arms set what a comparison sets itself."""
    defaults = TrainingConfig().settings()
    settings = config.settings()
    for name in settings_with(Trait.COMPARED):
        if settings[name] != defaults[name]:
            raise ConfigError(
                f"`{name}`: a comparison sets this itself, method by method, or has no use for it; leave it out."
            )
    if config.fine_tune_type == "full":
        raise ConfigError("`fine_tune_type=full`: the base model must stay at hand; use lora or dora.")
