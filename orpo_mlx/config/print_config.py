"""The settings of a run and where each of them came from, as YAML that `--config` takes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml

from orpo_mlx.config.settings import FIELDS, GROUPS, TrainingConfig, recipe
from orpo_mlx.losses.recipe import PARAMETERS

FLAG, FILE, CHECKPOINT, DEFAULT = "flag", "file", "checkpoint", "default"
"""Where a setting may come from, the first of them first."""


class Settled(NamedTuple):
    """A run's settings, and what they were settled from."""

    config: TrainingConfig
    given: Mapping[str, Mapping[str, Any]]
    """By `FLAG`, `FILE` and `CHECKPOINT`: the settings that were taken from there."""

    def origin(self, name: str) -> str:
        """Where a setting came from."""
        # --grad-checkpoint sets --memory.
        names = (name, "grad_checkpoint") if name == "memory" and self.config.grad_checkpoint else (name,)
        return next((source for key in names for source, values in self.given.items() if key in values), DEFAULT)


def as_yaml(settled: Settled) -> str:
    """Every setting with its origin in a comment, in the groups of `--help`."""
    lines = []
    for group, title in GROUPS.items():
        lines.append(f"\n# {title}")
        for name, field in FIELDS.items():
            if field.metadata["group"] == group:
                value, origin = getattr(settled.config, name), settled.origin(name)
                given = settled.given.get(origin, {}).get(name)
                if value is None and name in PARAMETERS:
                    origin += f": {_of_method(settled.config, name)}"
                lines += _lines(name, value, given, origin)
    return "\n".join(lines).lstrip("\n") + "\n"


def _lines(name: str, value: Any, given: Any, origin: str, indent: str = "") -> Iterator[str]:
    """A setting, or an entry of a table of which `given` was given and the rest has its default."""
    if not isinstance(value, dict) or not value:
        yield f"{indent}{_scalar(name)}: {_scalar(value)}  # {origin}"
        return
    yield f"{indent}{_scalar(name)}:"
    for key, inner in value.items():
        own = given.get(key) if isinstance(given, dict) else None
        yield from _lines(key, inner, own, origin if own is not None else DEFAULT, indent + "  ")


def _of_method(config: TrainingConfig, name: str) -> str:
    """What a parameter that nobody gave is in the run's method."""
    terms = recipe(config).parameters.items()
    found = [f"{parameters[name]:g} ({term})" for term, parameters in terms if name in parameters]
    return ", ".join(found) or f"{config.method} has none"


def _scalar(value: Any) -> str:
    """`value` on one line of YAML, read back as the same by mlx-lm's loader."""
    # mlx-lm's loader reads more texts as numbers than PyYAML's writer knows of: 1e-5.
    from mlx_lm.lora import yaml_loader

    def dumped(**style: Any) -> str:
        whole: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), **style)
        return whole.removesuffix("...\n").rstrip("\n")

    plain = dumped()
    return plain if yaml.load(plain, yaml_loader) == value else dumped(default_style='"')
