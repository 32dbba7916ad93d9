"""Align a model with preference pairs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orpo_mlx.config.command_line import GivenSettings, check_test_flags, given_settings, merge_settings
from orpo_mlx.config.derived import recipe
from orpo_mlx.config.flags import exit_status, with_flags
from orpo_mlx.config.settings import TrainingConfig

if TYPE_CHECKING:
    from orpo_mlx.training.distributed import Ranks

PROG = "orpo-mlx train"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    return exit_status(PROG, lambda: run(argv))


def run(argv: Sequence[str] | None) -> None:
    """Do what a command line asks; raises UserError."""
    given = given_settings(argv, PROG)
    config = given_alone(given)
    # Only now: what is wrong with the settings need not wait for mlx-lm and transformers.
    from orpo_mlx.reporting.console import Reporter
    from orpo_mlx.train import train
    from orpo_mlx.training.distributed import find_ranks

    ranks = find_ranks(TrainingConfig.rank_timeout)
    with given.naming_sources():
        if config is None:
            config = merge_settings(given, earlier_settings(given, ranks))
        train(config, Reporter(render=with_flags), ranks)


def given_alone(given: GivenSettings) -> TrainingConfig | None:
    """The settings of a run that goes on from nothing; of one that does, None, its method checked all the same.

    Raises:
        ConfigError: a setting that cannot be used, or settings that contradict each other.
    """
    if not (given.values.get("test") or given.values.get("resume")):
        return merge_settings(given, {})
    if given.values.get("test"):
        check_test_flags(given)
    if "method" in given.values:
        with given.naming_sources():
            recipe(TrainingConfig(method=given.values["method"]))
    return None


def earlier_settings(given: GivenSettings, ranks: Ranks) -> dict[str, Any]:
    """Settings of what the run goes on from: the adapters that `--test` evaluates, or the checkpoint of `--resume`."""
    from orpo_mlx.training.checkpoints.resume import settings_to_resume
    from orpo_mlx.training.evaluating.evaluate_only import settings_of_adapters

    values = given.values
    if values.get("test"):
        return settings_of_adapters(values)
    if not values.get("resume"):
        return {}
    # Rank 0 alone has checkpoints; the others take what it found.
    adapter_path = values.get("adapter_path", TrainingConfig.adapter_path)
    settings = settings_to_resume(adapter_path, values) if ranks.first else {}
    taken: dict[str, Any] = json.loads(ranks.from_first(json.dumps(settings).encode()))
    return taken


if __name__ == "__main__":
    sys.exit(main())
