"""What `sync_reference` says."""

from __future__ import annotations

from typing import NamedTuple

from orpo_mlx.config.settings import TrainingConfig
from orpo_mlx.errors import ConfigError


class Sync(NamedTuple):
    """How the reference follows the policy (TR-DPO: Gorbatovski et al. 2024, arXiv:2404.09656)."""

    tau: float
    """The policy's share of the new reference, above 0 and at most 1."""
    steps: int
    """Optimiser steps from one time to the next."""


def sync_of(config: TrainingConfig) -> Sync | None:
    """What `sync_reference` says.

    Raises:
        ConfigError: it is not a share and a number of steps.
    """
    text = config.sync_reference
    if text is None:
        return None
    try:
        share, steps = text.split(",")
        sync = Sync(float(share), int(steps))
    except ValueError:
        sync = Sync(0.0, 0)
    if not 0 < sync.tau <= 1 or sync.steps < 1:
        raise ConfigError(
            f"`sync_reference`: found {text!r}, expected TAU,STEPS with TAU above 0 and at most 1, such as 0.6,512."
        )
    return sync
