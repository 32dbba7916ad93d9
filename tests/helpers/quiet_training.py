"""Training runs that print nothing, as a command line too, and what is left of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from orpo_mlx.config.checks import make_config
from orpo_mlx.models.adapters import adapter_weights
from orpo_mlx.reporting.console import Reporter
from orpo_mlx.train import train
from orpo_mlx.training.prepare import prepare
from orpo_mlx.training.run import Run


class Unseen(Console):
    """A quiet console lays out all that it does not show, a tenth of the time of a tiny run."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Nothing."""


def run_quietly(settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Train with these settings; metrics after the run, by split."""
    return train(make_config(dict(settings)), Reporter(Unseen(quiet=True))).after


def flags(settings: dict[str, Any]) -> list[str]:
    """The settings as a command line."""
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    off = {"--memory-check": "--no-memory-check", "--report": "--no-report"}
    return [off.get(word, word) for word in words if word != "False"]


def trainable(run: Run) -> dict[str, Any]:
    return {name: np.array(value) for name, value in adapter_weights(run.loaded.model).items()}


def rows(settings: dict[str, Any], split: str | None = None) -> list[dict[str, Any]]:
    lines = (Path(settings["adapter_path"]) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if split in (None, row["split"])]


def make_run(settings: dict[str, Any], **changes: Any) -> Run:
    return prepare(make_config({**settings, **changes}))
