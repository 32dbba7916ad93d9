"""A training run that prints nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from orpo_mlx.config.checks import make_config
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.train import train


def run_quietly(settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Train with these settings; metrics after the run, by split."""
    return train(make_config(dict(settings)), Reporter(Console(quiet=True))).after
