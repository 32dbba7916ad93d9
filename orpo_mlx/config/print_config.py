"""The settings of a run, each with its source, as YAML that `--config` takes back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from orpo_mlx.config.derived import recipe
from orpo_mlx.config.settings import SETTINGS, TrainingConfig
from orpo_mlx.config.traits import GROUPS
from orpo_mlx.device_profile import VARIABLE, device_profile
from orpo_mlx.losses.recipe import PARAMETERS

_DEFAULT = "default"


class SourcedConfig(NamedTuple):
    """A run's settings, and those that were taken from each source; the rest have their defaults."""

    config: TrainingConfig
    flags: Mapping[str, Any]
    file: Mapping[str, Any]
    checkpoint: Mapping[str, Any]

    def source(self, name: str) -> tuple[str, Any]:
        """Where a setting comes from, and what was given there."""
        # --grad-checkpoint sets --memory.
        names = (name, "grad_checkpoint") if name == "memory" and self.config.grad_checkpoint else (name,)
        for key in names:
            for source, values in (("flag", self.flags), ("file", self.file), ("checkpoint", self.checkpoint)):
                if key in values:
                    return source, values[key]
        return _DEFAULT, None


def as_yaml(sourced: SourcedConfig) -> str:
    """Every setting with its source in a comment, in the groups of `--help`; then the device's profile."""
    config = sourced.config
    lines = []
    for key, group in GROUPS.items():
        lines.append(f"\n# {group.title}")
        for name in (name for name, setting in SETTINGS.items() if setting.group == key):
            value = getattr(config, name)
            source, given = sourced.source(name)
            if value is None and name in PARAMETERS:
                source += f": {method_defaults(config, name)}"
            elif source == _DEFAULT and SETTINGS[name].default is None and value is not None:
                source += f": {device_profile().name} profile"
            lines += entry_lines(name, value, given, source)
    # Comments, so that the file is one that --config takes back on any device.
    return "\n".join([*lines, "", *profile_lines()]).lstrip("\n") + "\n"


def entry_lines(name: str, value: Any, given: Any, source: str, indent: str = "") -> Iterator[str]:
    """A setting, or an entry of a table of which `given` was given and the rest has its default."""
    if not isinstance(value, dict) or not value:
        yield f"{indent}{yaml_scalar(name)}: {yaml_scalar(value)}  # {source}"
        return
    yield f"{indent}{yaml_scalar(name)}:"
    for key, inner in value.items():
        own = given.get(key) if isinstance(given, dict) else None
        yield from entry_lines(key, inner, own, source if own is not None else _DEFAULT, indent + "  ")


def method_defaults(config: TrainingConfig, name: str) -> str:
    """What a parameter that nobody gave is in the run's method."""
    terms = recipe(config).parameters.items()
    found = [f"{parameters[name]:g} ({term})" for term, parameters in terms if name in parameters]
    return ", ".join(found) or f"{config.method} has none"


def profile_lines() -> Iterator[str]:
    """What the engine does on this device, as comments: these are no settings."""
    profile = device_profile()
    source = VARIABLE if os.environ.get(VARIABLE) is not None else "MLX's default device"
    yield f"# device profile: {profile.name}, from {source}"
    for name, value in profile._asdict().items():
        if hasattr(value, "_asdict"):
            yield f"#   {name}:"
            yield from (f"#     {key}: {yaml_scalar(inner)}" for key, inner in value._asdict().items())
        elif name != "name":
            yield f"#   {name}: {yaml_scalar(value)}"


def yaml_scalar(value: Any) -> str:
    """`value` on one line of YAML, read back as the same by mlx-lm's loader."""
    import yaml

    # mlx-lm's loader reads more texts as numbers than PyYAML's writer knows of: 1e-5.
    from mlx_lm.lora import yaml_loader

    def dumped(**style: Any) -> str:
        # PyYAML breaks long texts over several lines, and ends a plain one with a line of dots.
        whole: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), **style)
        return whole.removesuffix("...\n").rstrip("\n")

    plain = dumped()
    return plain if yaml.load(plain, yaml_loader) == value else dumped(default_style='"')
