"""Services for training curves by name, and whether they can be had. None is imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orpo_mlx.errors import ConfigError, did_you_mean


class Service(NamedTuple):
    """A service for training curves."""

    package: str
    """What is imported, and installed with pip."""
    attribute: str
    """What the package has; a folder of the same name, which Python takes for a package too, has not."""
    has_projects: bool
    failed: Mapping[str, Any]
    """Arguments of the package's `finish` for a run that came to no good end."""


SERVICES = {
    "wandb": Service("wandb", "init", True, {"exit_code": 1}),
    "swanlab": Service("swanlab", "init", True, {"state": "crashed", "error": "the run ended early"}),
    "tensorboard": Service("tensorboardX", "SummaryWriter", False, {}),
}
"""Those of mlx-lm, and TensorBoard."""


def parse_services(text: str | None) -> tuple[str, ...]:
    """The names in `text`, separated by commas, in any case, each once.

    Raises:
        ConfigError: a name that is no service's.
    """
    names = [] if text is None else [name.strip().lower() for name in text.split(",")]
    for name in names:
        if name not in SERVICES:
            hint = did_you_mean(name, SERVICES)
            found = repr(name) if name else "an empty name"
            raise ConfigError(f"`report_to` {text!r}: found {found}, expected some of {', '.join(SERVICES)}{hint}")
    return tuple(dict.fromkeys(names))


def check_reporting(report_to: str | None, project_name: str | None) -> None:
    """See that the settings of these names go together.

    Raises:
        ConfigError: they do not.
    """
    names = parse_services(report_to)
    if project_name is not None and not any(SERVICES[name].has_projects for name in names):
        having = " or ".join(name for name, service in SERVICES.items() if service.has_projects)
        raise ConfigError(f"`project_name`: is a project of `report_to={having}`; add that, or leave it out.")


def require_installed(names: Sequence[str]) -> None:
    """See that the packages of these services can be imported.

    Raises:
        ConfigError: one cannot; says how to install it.
    """
    for name in names:
        service = SERVICES[name]
        try:
            found = hasattr(importlib.import_module(service.package), service.attribute)
        except ImportError:
            found = False
        if not found:
            raise ConfigError(f"`report_to={name}`: needs a package; pip install {service.package}")
